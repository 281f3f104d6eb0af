//! The functions of the CUDA driver that launching needs.
#![allow(unsafe_code)] // calls into the library, with the types of cuda.h

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::path::PathBuf;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use libloading::Library;

use super::library::{library, reason};

/// `CUcontext`, `CUmodule`, `CUfunction` or `CUstream`.
pub type Handle = *mut c_void;

library! {
    /// The functions of the driver.
    struct Driver {
        fn init = cuInit(c_uint) -> c_int;
        fn version = cuDriverGetVersion(*mut c_int) -> c_int;
        fn error_name = cuGetErrorName(c_int, *mut *const c_char) -> c_int;
        fn error_string = cuGetErrorString(c_int, *mut *const c_char) -> c_int;
        fn device = cuDeviceGet(*mut c_int, c_int) -> c_int;
        fn attribute = cuDeviceGetAttribute(*mut c_int, c_int, c_int) -> c_int;
        fn retain_context = cuDevicePrimaryCtxRetain(*mut Handle, c_int) -> c_int;
        fn get_context = cuCtxGetCurrent(*mut Handle) -> c_int;
        fn set_context = cuCtxSetCurrent(Handle) -> c_int;
        fn load_module = cuModuleLoadData(*mut Handle, *const c_void) -> c_int;
        fn get_function = cuModuleGetFunction(*mut Handle, Handle, *const c_char) -> c_int;
        fn set_function = cuFuncSetAttribute(Handle, c_int, c_int) -> c_int;
        fn is_capturing = cuStreamIsCapturing(Handle, *mut c_int) -> c_int;
        fn launch = cuLaunchKernel(
            Handle, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Handle, *mut *mut c_void,
            *mut *mut c_void,
        ) -> c_int;
    }
}

/// The environment variable that names another driver library.
#[cfg(feature = "testing")]
pub const VARIABLE: &str = "ODDSMITH_CUDA_DRIVER";

/// The library, opened and initialised on first use: the system's, or that of an emulator. If that fails, the next
/// call tries it again.
///
/// # Errors
/// Errors of the system or the driver; a process that was forked after the first use, where the driver does not work.
pub fn driver() -> Result<&'static Driver, String> {
    static DRIVER: OnceLock<Driver> = OnceLock::new();
    /// The process that opened it.
    static PROCESS: AtomicU32 = AtomicU32::new(0);
    if let Some(driver) = DRIVER.get() {
        if PROCESS.load(Ordering::Relaxed) != std::process::id() {
            return Err("this process was forked from one that had used CUDA, which does not work in it; start it with \
                        the method \"spawn\" or \"forkserver\" of multiprocessing"
                .to_owned());
        }
        return Ok(driver);
    }
    let opened = open()?;
    // Another thread that comes first is of the same process.
    PROCESS.store(std::process::id(), Ordering::Relaxed);
    Ok(DRIVER.get_or_init(|| opened))
}

fn open() -> Result<Driver, String> {
    let path = PathBuf::from(if cfg!(windows) { "nvcuda.dll" } else { "libcuda.so.1" });
    #[cfg(feature = "testing")]
    let path = std::env::var_os(VARIABLE).map_or(path, PathBuf::from);
    // SAFETY: NVIDIA's driver, or a test's emulator; neither needs anything to be opened.
    let library = unsafe { Library::new(&path) };
    let library = library.map_err(|error| format!("the CUDA driver cannot be opened: {}", reason(&error)))?;
    let driver = Driver::load(library)?;
    // SAFETY: may be called any number of times.
    driver.check(unsafe { (driver.init)(0) }, "cuInit")?;
    Ok(driver)
}

/// Errors after which every call of a process fails: of a kernel's memory, instructions or asserts, of the hardware.
const LOSING: [c_int; 13] = [214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719];
const LOST: &str = "; nothing can run on this GPU in this process any more, so start it again";

impl Driver {
    /// An error with the driver's message.
    ///
    /// # Errors
    /// Unless the code is zero.
    pub fn check(&self, code: c_int, call: &str) -> Result<(), String> {
        if code == 0 {
            return Ok(());
        }
        let text = |get: unsafe extern "C" fn(c_int, *mut *const c_char) -> c_int| {
            let mut text = ptr::null();
            // SAFETY: returns a constant string, or null for an unknown number.
            let known = unsafe { get(code, &raw mut text) } == 0 && !text.is_null();
            // SAFETY: as above.
            if known { unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned() } else { "?".into() }
        };
        let lost = if LOSING.contains(&code) { LOST } else { "" };
        Err(format!("{call}: {} ({code}): {}{lost}", text(self.error_name), text(self.error_string)))
    }

    /// The newest CUDA version that the driver supports: 13000 for 13.0.
    ///
    /// # Errors
    /// Errors of the driver.
    pub fn release(&self) -> Result<i32, String> {
        let mut version = 0;
        // SAFETY: writes a number.
        self.check(unsafe { (self.version)(&raw mut version) }, "cuDriverGetVersion")?;
        Ok(version)
    }
}
