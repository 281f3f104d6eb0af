//! Kernels of kernels/ on an NVIDIA card: compiled for it on first use, launched on torch's stream.
//!
//! Nothing of CUDA is opened before a kernel is wanted. A source is compiled by NVRTC for the exact
//! architecture of the card, kept on disk ([`cache`]) and loaded into the primary context, which is
//! torch's. A launch is asynchronous and waits for nothing. The first launch of a source loads its
//! module, which a CUDA graph under capture forbids: run an op once before capturing it, as torch asks
//! for its own.
//!
//! Kernels are named `<op>_<dtype>`, take what [`Arg`] makes, in order, and are compiled with
//! [`nvrtc::OPTIONS`]: a fused multiply-add only where the source says `fmaf`.

pub mod cache;
mod driver;
pub mod kernels;
mod library;
mod module;
pub mod nvrtc;

use std::ffi::c_void;
#[cfg(feature = "testing")]
use std::sync::atomic::{AtomicU8, Ordering};

use crate::base::error::{Error, Result};
use driver::driver;
use kernels::Source;

/// A card and the stream to launch on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    /// Number of the card, as torch counts.
    pub ordinal: i32,
    /// `cudaStream_t`; zero for the default stream.
    pub stream: u64,
}

/// A kernel with the shape of its launch.
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    /// Where the kernel is.
    pub source: &'static Source,
    /// Its name.
    pub kernel: &'static str,
    /// Blocks; nothing is launched where one of the three is zero.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Bytes of dynamic shared memory.
    pub shared: u32,
}

/// An argument of a kernel, in the bytes that the kernel reads.
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
        ptr: u64, "An address on the card, for any pointer.";
        i32: i32, "`int`.";
        u32: u32, "`unsigned int`.";
        i64: i64, "`long long`.";
        f32: f32, "`float`.";
        f64: f64, "`double`.";
    }
}

impl Device {
    /// Puts a kernel on the stream and returns.
    ///
    /// # Errors
    /// [`Error::Cuda`]: no driver or compiler, or what either reports, with the kernel's name and the
    /// shape of the launch. An error of a kernel that ran before on the stream may come up here too.
    pub fn launch(&self, launch: &Launch, args: &[Arg]) -> Result<()> {
        if launch.grid.contains(&0) {
            return Ok(());
        }
        self.try_launch(launch, args).map_err(|message| launch.error(message))
    }

    #[allow(unsafe_code)] // calls into the driver
    fn try_launch(&self, launch: &Launch, args: &[Arg]) -> std::result::Result<(), String> {
        const MAX_DYNAMIC_SHARED_SIZE_BYTES: i32 = 8;
        /// What any kernel may have without asking.
        const GRANTED: u32 = 48 << 10;
        let driver = driver()?;
        let kernel = module::kernel(self.ordinal, launch.source, launch.kernel)?;
        let _current = module::Current::new(driver, kernel.context)?;
        let function = kernel.function as driver::Handle;
        if launch.shared > GRANTED {
            let shared = launch.shared as i32;
            // SAFETY: a function that stays loaded.
            let code = unsafe { (driver.set_function)(function, MAX_DYNAMIC_SHARED_SIZE_BYTES, shared) };
            driver.check(code, "cuFuncSetAttribute")?;
        }
        let mut pointers: Vec<*mut c_void> =
            args.iter().map(|arg| (&raw const arg.0).cast_mut().cast()).collect();
        let ([gx, gy, gz], [bx, by, bz]) = (launch.grid, launch.block);
        let stream = self.stream as driver::Handle;
        // SAFETY: the driver copies the arguments before it returns. That their number and types, and
        // the memory behind the pointers, are what the kernel wants is the adapter's promise.
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
    }

    /// Number of multiprocessors.
    ///
    /// # Errors
    /// [`Error::Cuda`]: what the driver reports.
    pub fn multiprocessors(&self) -> Result<u32> {
        Ok(self.card()?.multiprocessors)
    }

    /// Compute capability: 9 and 0 for `sm_90`.
    ///
    /// # Errors
    /// [`Error::Cuda`]: what the driver reports.
    pub fn capability(&self) -> Result<(i32, i32)> {
        Ok(self.card()?.capability)
    }

    fn card(&self) -> Result<module::Card> {
        let unknown = |message| Error::Cuda { kernel: String::new(), launch: String::new(), message };
        module::card(self.ordinal).map_err(unknown)
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

/// True if the driver opens: a build of torch for other cards calls them CUDA devices too.
#[must_use]
pub fn is_available() -> bool {
    driver().is_ok()
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
