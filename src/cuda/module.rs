//! Kernels on a GPU: compiled for it, loaded into torch's context, never unloaded.
#![allow(unsafe_code)] // calls into the driver

use std::collections::HashMap;
use std::ffi::CString;
use std::ptr;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError, RwLock};

use super::cache::{Cache, Digest, digest};
use super::driver::{Driver, Handle, driver};
use super::kernels::{ALL, COMMON, KernelSource};
use super::nvrtc::{OPTIONS, SMALL_ARGUMENTS, nvrtc};

/// A GPU, with the context that torch uses too.
#[derive(Clone, Copy, Debug)]
pub struct Gpu {
    /// The primary context, an address.
    context: usize,
    /// Compute capability: 9 and 0 for `sm_90`.
    pub capability: (i32, i32),
    /// Number of multiprocessors.
    pub multiprocessors: u32,
}

/// GPUs by index, and modules by GPU and source: loaded once, never unloaded.
#[derive(Debug, Default)]
struct Loaded {
    gpus: HashMap<i32, Gpu>,
    modules: HashMap<(i32, &'static str), usize>,
}

static LOADED: Mutex<Option<Loaded>> = Mutex::new(None);
/// By GPU, source and name.
type Kernels = HashMap<(i32, &'static str, &'static str), Kernel>;

/// Not in [`LOADED`]: a launch does not wait while another thread compiles.
static KERNELS: RwLock<Option<Kernels>> = RwLock::new(None);

/// A kernel on a GPU, with the context it is loaded in; both are addresses.
#[derive(Clone, Copy, Debug)]
pub struct Kernel {
    pub function: usize,
    pub context: usize,
}

fn loaded() -> MutexGuard<'static, Option<Loaded>> {
    // No panic can leave the tables inconsistent.
    LOADED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The GPU of this index.
///
/// # Errors
/// Errors of the driver.
pub fn gpu(ordinal: i32) -> Result<Gpu, String> {
    // Before the lock, which another thread may have held when this process was forked.
    driver()?;
    gpu_of(loaded().get_or_insert_default(), ordinal)
}

fn gpu_of(loaded: &mut Loaded, ordinal: i32) -> Result<Gpu, String> {
    const MULTIPROCESSOR_COUNT: i32 = 16;
    const CAPABILITY: [i32; 2] = [75, 76];
    if let Some(gpu) = loaded.gpus.get(&ordinal) {
        return Ok(*gpu);
    }
    let driver = driver()?;
    let (mut device, mut context) = (0, ptr::null_mut());
    // SAFETY: writes a number.
    driver.check(unsafe { (driver.device)(&raw mut device, ordinal) }, "cuDeviceGet")?;
    let attribute = |attribute: i32| {
        let mut value = 0;
        // SAFETY: writes a number.
        let code = unsafe { (driver.attribute)(&raw mut value, attribute, device) };
        driver.check(code, "cuDeviceGetAttribute").map(|()| value)
    };
    let capability = (attribute(CAPABILITY[0])?, attribute(CAPABILITY[1])?);
    let multiprocessors = attribute(MULTIPROCESSOR_COUNT)?.max(1) as u32;
    // SAFETY: writes a handle. It is never released, because torch may use it until the process ends.
    let code = unsafe { (driver.retain_context)(&raw mut context, device) };
    driver.check(code, "cuDevicePrimaryCtxRetain")?;
    let gpu = Gpu { context: context as usize, capability, multiprocessors };
    loaded.gpus.insert(ordinal, gpu);
    Ok(gpu)
}

/// Runs `run` with a GPU's context as the current one of this thread, and then restores the previous one, from
/// which torch reads its current device.
///
/// # Errors
/// Those of `run`, and errors of the driver.
pub fn within<R>(
    driver: &Driver,
    context: usize,
    run: impl FnOnce() -> Result<R, String>,
) -> Result<R, String> {
    let mut before = ptr::null_mut();
    // SAFETY: writes a handle.
    driver.check(unsafe { (driver.get_context)(&raw mut before) }, "cuCtxGetCurrent")?;
    let wanted = context as Handle;
    if before == wanted {
        return run();
    }
    // SAFETY: the context is never released.
    driver.check(unsafe { (driver.set_context)(wanted) }, "cuCtxSetCurrent")?;
    let result = run();
    // SAFETY: the context that was current before, or null.
    let restore = || driver.check(unsafe { (driver.set_context)(before) }, "cuCtxSetCurrent");
    // A second time: torch would go on on another GPU.
    let restored = restore().or_else(|_| restore());
    result.and_then(|result| restored.map(|()| result))
}

/// Whether a CUDA graph is captured on a stream.
fn is_capturing(driver: &Driver, stream: Handle) -> Result<bool, String> {
    let mut status = 0;
    // SAFETY: a stream of torch, and room for a number.
    driver.check(unsafe { (driver.is_capturing)(stream, &raw mut status) }, "cuStreamIsCapturing")?;
    Ok(status != 0)
}

/// A kernel on a GPU, compiled and loaded on its first use, for a launch on a stream.
///
/// # Errors
/// Errors of the compiler or the driver; a first use while a CUDA graph is captured.
pub fn kernel(
    ordinal: i32,
    source: &'static KernelSource,
    name: &'static str,
    stream: Handle,
) -> Result<Kernel, String> {
    let key = (ordinal, source.name, name);
    let known = KERNELS.read().unwrap_or_else(PoisonError::into_inner);
    if let Some(kernel) = known.as_ref().and_then(|known| known.get(&key)) {
        return Ok(*kernel);
    }
    drop(known);
    let driver = driver()?;
    let mut loaded = loaded();
    let loaded = loaded.get_or_insert_default();
    let gpu = gpu_of(loaded, ordinal)?;
    let symbol = CString::new(name).map_err(|error| error.to_string())?;
    let mut function = ptr::null_mut();
    within(driver, gpu.context, || {
        if !loaded.modules.contains_key(&(ordinal, source.name)) && is_capturing(driver, stream)? {
            // The driver would end the capture.
            return Err(
                "its first use is while a CUDA graph is captured, and it has to be loaded before; run the \
                        operation once before the capture"
                    .to_owned(),
            );
        }
        let module = module_of(loaded, ordinal, source)?;
        // SAFETY: the module stays loaded; the string is alive.
        let code = unsafe { (driver.get_function)(&raw mut function, module as Handle, symbol.as_ptr()) };
        driver.check(code, "cuModuleGetFunction")
    })?;
    let kernel = Kernel { function: function as usize, context: gpu.context };
    let mut known = KERNELS.write().unwrap_or_else(PoisonError::into_inner);
    known.get_or_insert_default().insert(key, kernel);
    Ok(kernel)
}

/// Loads a source on a GPU, compiled if need be.
///
/// # Errors
/// Errors of the compiler or the driver.
pub fn load(ordinal: i32, source: &'static KernelSource) -> Result<(), String> {
    let driver = driver()?;
    let mut loaded = loaded();
    let loaded = loaded.get_or_insert_default();
    let gpu = gpu_of(loaded, ordinal)?;
    within(driver, gpu.context, || module_of(loaded, ordinal, source).map(|_| ()))
}

/// A digest of everything that kernels on a GPU depend on. A compiler that is missing counts as one.
///
/// # Errors
/// Errors of the driver.
pub fn identity(ordinal: i32) -> Result<Digest, String> {
    let gpu = gpu(ordinal)?;
    let compiler = nvrtc().and_then(super::nvrtc::Nvrtc::release).unwrap_or_default();
    let machine = format!("{compiler:?} {} {:?}", driver()?.release()?, gpu.capability);
    let options = OPTIONS.join(" ");
    let parts = ALL.iter().map(|source| source.text).chain([COMMON, &options, &machine]);
    Ok(digest(parts.map(str::as_bytes)))
}

/// The module of a source, in the current context, which is the GPU's.
fn module_of(loaded: &mut Loaded, ordinal: i32, source: &'static KernelSource) -> Result<usize, String> {
    if let Some(&module) = loaded.modules.get(&(ordinal, source.name)) {
        return Ok(module);
    }
    let gpu = gpu_of(loaded, ordinal)?;
    let cubin = cubin(source, &format!("sm_{}{}", gpu.capability.0, gpu.capability.1))?;
    let (driver, mut module) = (driver()?, ptr::null_mut());
    // SAFETY: a complete cubin, which the driver copies.
    let code = unsafe { (driver.load_module)(&raw mut module, cubin.as_ptr().cast()) };
    driver.check(code, "cuModuleLoadData")?;
    loaded.modules.insert((ordinal, source.name), module as usize);
    Ok(module as usize)
}

/// True if compiler and driver both know kernels with more than 4 KB of arguments.
///
/// # Errors
/// Errors of the compiler or the driver.
pub fn has_large_arguments() -> Result<bool, String> {
    // Kernels are compiled for what the first answer was.
    static LARGE: OnceLock<bool> = OnceLock::new();
    if let Some(&large) = LARGE.get() {
        return Ok(large);
    }
    let large = nvrtc()?.release()? >= (12, 1) && driver()?.release()? >= 12_010;
    Ok(*LARGE.get_or_init(|| large))
}

/// The binary of a source for an architecture, from the cache on disk if it is there.
fn cubin(source: &KernelSource, architecture: &str) -> Result<Vec<u8>, String> {
    let nvrtc = nvrtc()?;
    let versions = format!("{:?} {}", nvrtc.release()?, driver()?.release()?);
    let parts = [source.text, COMMON, &OPTIONS.join(" "), architecture, &versions];
    let key = digest(parts.map(str::as_bytes));
    let name = format!("{}-{architecture}", source.name);
    let extra: &[&str] = if has_large_arguments()? { &[] } else { &[SMALL_ARGUMENTS] };
    let make = || nvrtc.compile(source, architecture, extra).map(|compiled| compiled.cubin);
    Cache::of_environment().get_or_make(&name, key, make)
}
