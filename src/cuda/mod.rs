//! Kernels of kernels/ on an NVIDIA GPU: compiled for it on first use, launched on torch's stream.
//!
//! No CUDA library is opened before the first kernel. NVRTC compiles a source for the exact architecture of
//! the GPU; the result is kept on disk ([`cache`]) and loaded into the primary context, which torch uses too.
//! Launches are asynchronous. The first launch of a source loads its module, which is not allowed while a
//! CUDA graph is captured: run an op once before capturing it, as with torch's ops.
//!
//! Kernels are named `<op>_<dtype>`, take [`Arg`]s in order, and are compiled with [`nvrtc::OPTIONS`]: no
//! fused multiply-add except `fmaf` in the source.

pub mod cache;
mod driver;
pub mod kernels;
mod library;
mod module;
pub mod nvrtc;
pub mod private_folder;
pub mod trust;

use std::ffi::c_void;
#[cfg(feature = "testing")]
use std::sync::atomic::AtomicU8;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::base::error::{Error, Result};
use driver::driver;
use kernels::KernelSource;
pub use library::reason;

/// A GPU and the stream to launch on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    /// Index of the GPU in torch.
    pub ordinal: i32,
    /// `cudaStream_t`; zero for the default stream.
    pub stream: u64,
}

/// A kernel with its launch dimensions.
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    /// The source of the kernel.
    pub source: &'static KernelSource,
    /// Its name.
    pub kernel: &'static str,
    /// Blocks; nothing is launched if one of the three is zero.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Bytes of dynamic shared memory.
    pub shared: u32,
}

/// An argument of a kernel, as bytes.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(8))]
pub struct Arg([u8; 8]);

macro_rules! argument {
    ($($name:ident: $ty:ty, $doc:literal;)*) => { $(
        #[doc = $doc]
        #[must_use]
        pub fn $name(value: $ty) -> Self {
            let mut bytes = [0; 8];
            let value = value.to_ne_bytes();
            bytes[..value.len()].copy_from_slice(&value);
            Self(bytes)
        }
    )* };
}

impl Arg {
    argument! {
        ptr: u64, "An address on the GPU, for any pointer.";
        i32: i32, "`int`.";
        u32: u32, "`unsigned int`.";
        i64: i64, "`long long`.";
        f32: f32, "`float`.";
        f64: f64, "`double`.";
    }

    /// The address of [`Arg::ptr`], for an argument that has many.
    #[must_use]
    pub fn address(self) -> u64 {
        u64::from_ne_bytes(self.0)
    }
}

impl Device {
    /// Puts a kernel on the stream and returns.
    ///
    /// # Errors
    /// [`Error::Cuda`]: no driver or compiler, or an error of either, with the kernel's name and the launch
    /// dimensions. An error of an earlier kernel on the stream can be reported here too.
    pub fn launch(&self, launch: &Launch, args: &[Arg]) -> Result<()> {
        self.launch_at(launch, args.iter().map(|arg| (&raw const arg.0).cast()).collect())
    }

    /// As [`Device::launch`], of a kernel whose one argument is a struct with the layout of C.
    ///
    /// # Errors
    /// As [`Device::launch`].
    pub fn launch_with<T: Copy>(&self, launch: &Launch, argument: &T) -> Result<()> {
        self.launch_at(launch, vec![std::ptr::from_ref(argument).cast()])
    }

    fn launch_at(&self, launch: &Launch, args: Vec<*const c_void>) -> Result<()> {
        if launch.grid.contains(&0) {
            return Ok(());
        }
        self.try_launch(launch, args).map_err(|message| launch.error(message))
    }

    #[allow(unsafe_code)] // calls into the driver
    fn try_launch(&self, launch: &Launch, args: Vec<*const c_void>) -> std::result::Result<(), String> {
        const MAX_DYNAMIC_SHARED_SIZE_BYTES: i32 = 8;
        /// Dynamic shared memory that needs no opt-in.
        const GRANTED: u32 = 48 << 10;
        let driver = driver()?;
        let stream = self.stream as driver::Handle;
        let kernel = module::kernel(self.ordinal, launch.source, launch.kernel, stream)?;
        let function = kernel.function as driver::Handle;
        let mut pointers: Vec<*mut c_void> = args.into_iter().map(<*const c_void>::cast_mut).collect();
        let ([gx, gy, gz], [bx, by, bz]) = (launch.grid, launch.block);
        module::within(driver, kernel.context, || {
            if launch.shared > GRANTED {
                let shared = launch.shared as i32;
                // SAFETY: the function stays loaded.
                let code = unsafe { (driver.set_function)(function, MAX_DYNAMIC_SHARED_SIZE_BYTES, shared) };
                driver.check(code, "cuFuncSetAttribute")?;
            }
            // SAFETY: the driver copies the arguments before it returns. The adapter guarantees their number and
            // types and the memory behind the pointers.
            let code = unsafe {
                (driver.launch)(
                    function,
                    gx,
                    gy,
                    gz,
                    bx,
                    by,
                    bz,
                    launch.shared,
                    stream,
                    pointers.as_mut_ptr(),
                    std::ptr::null_mut(),
                )
            };
            driver.check(code, "cuLaunchKernel")
        })
    }

    /// Number of multiprocessors.
    ///
    /// # Errors
    /// [`Error::Cuda`]: an error of the driver.
    pub fn multiprocessors(&self) -> Result<u32> {
        Ok(self.gpu()?.multiprocessors)
    }

    /// Compute capability: 9 and 0 for `sm_90`.
    ///
    /// # Errors
    /// [`Error::Cuda`]: an error of the driver.
    pub fn capability(&self) -> Result<(i32, i32)> {
        Ok(self.gpu()?.capability)
    }

    fn gpu(&self) -> Result<module::Gpu> {
        let unknown = |message| Error::Cuda { kernel: String::new(), launch: String::new(), message };
        module::gpu(self.ordinal).map_err(unknown)
    }
}

impl Launch {
    fn error(&self, message: String) -> Error {
        let ([gx, gy, gz], [bx, by, bz]) = (self.grid, self.block);
        let launch =
            format!("grid ({gx}, {gy}, {gz}), block ({bx}, {by}, {bz}), {} bytes shared", self.shared);
        Error::Cuda { kernel: self.kernel.to_owned(), launch, message }
    }
}

/// Whether torch was built for GPUs of another maker, which it calls CUDA devices too.
static FOREIGN: AtomicBool = AtomicBool::new(false);

/// Says that torch's CUDA devices are not NVIDIA's: no kernel can run on them, even if there is a driver.
pub fn set_foreign(foreign: bool) {
    FOREIGN.store(foreign, Ordering::Relaxed);
}

/// As [`set_foreign`] says.
#[must_use]
pub fn is_foreign() -> bool {
    FOREIGN.load(Ordering::Relaxed)
}

/// True if the arguments of a kernel may have 32,764 bytes together, and not only 4,096.
///
/// # Errors
/// [`Error::Cuda`]: errors of the compiler or the driver.
pub fn has_large_arguments() -> Result<bool> {
    let unknown = |message| Error::Cuda { kernel: String::new(), launch: String::new(), message };
    module::has_large_arguments().map_err(unknown)
}

/// Compiles a source for a GPU and loads it, if that has not been done.
///
/// # Errors
/// [`Error::Cuda`]: errors of the compiler or the driver.
pub fn load(ordinal: i32, source: &'static KernelSource) -> Result<()> {
    let unknown = |message| Error::Cuda { kernel: String::new(), launch: String::new(), message };
    module::load(ordinal, source).map_err(unknown)
}

/// A digest of what is launched on a GPU: all sources, options, compiler, driver interface and architecture.
///
/// # Errors
/// [`Error::Cuda`]: an error of the driver.
pub fn identity(ordinal: i32) -> Result<cache::Digest> {
    let unknown = |message| Error::Cuda { kernel: String::new(), launch: String::new(), message };
    module::identity(ordinal).map_err(unknown)
}

/// Whether CPU tensors take the path of a GPU: 0 not asked yet, 1 no, 2 yes.
#[cfg(feature = "testing")]
static EMULATED: AtomicU8 = AtomicU8::new(0);

/// True while CPU tensors take the path of a GPU, through a driver that emulates one: if
/// `ODDSMITH_CUDA_DRIVER` was set when this was first asked, or as [`emulate`] says.
#[cfg(feature = "testing")]
#[must_use]
pub fn is_emulated() -> bool {
    match EMULATED.load(Ordering::Relaxed) {
        0 => {
            let named = std::env::var_os(driver::VARIABLE).is_some_and(|path| !path.is_empty());
            emulate(named);
            named
        }
        state => state == 2,
    }
}

/// Never without the feature `testing`.
#[cfg(not(feature = "testing"))]
#[must_use]
pub fn is_emulated() -> bool {
    false
}

/// Switches the emulation on or off. The driver itself is opened once a process.
#[cfg(feature = "testing")]
pub fn emulate(on: bool) {
    EMULATED.store(1 + u8::from(on), Ordering::Relaxed);
}
