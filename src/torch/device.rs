//! Which GPU a tensor is on, which path it takes, and tensors as arguments of kernels.

use std::ffi::c_void;
#[cfg(feature = "testing")]
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
#[cfg(feature = "testing")]
use std::sync::{Mutex, PoisonError};

use tch::{Device, Kind, Tensor};

use super::abi::symbols;
use super::dtype::dtype_name;
use crate::base::error::{Error, Result};
use crate::cuda::trust::{self, Family};
use crate::cuda::{self, Arg};

/// The GPU of this tensor and its current stream on this thread; `None` if the tensor is not on a GPU of NVIDIA,
/// or if one of the families of kernels is not trusted there. With an emulated GPU, CPU tensors are on it.
///
/// # Errors
/// If libtorch has no current stream, and those of [`trust::trusts`].
pub fn of(tensor: &Tensor, families: &[Family]) -> Result<Option<cuda::Device>> {
    let (ordinal, stream): (_, fn(i32) -> Result<u64>) = match tensor.device() {
        // Without a driver the trial says so, and trusts nothing.
        Device::Cuda(index) if !cuda::is_foreign() => {
            let ordinal = i32::try_from(index).map_err(|error| Error::Internal(error.to_string()))?;
            (ordinal, current_stream)
        }
        Device::Cpu if cuda::is_emulated() && !cuda::is_foreign() => (emulated_gpu(), emulated_stream),
        _ => return Ok(None),
    };
    if !trust::trusts(ordinal, families)? {
        return Ok(None);
    }
    Ok(Some(cuda::Device { ordinal, stream: stream(ordinal)? }))
}

/// `aoti_torch_get_current_cuda_stream`: writes the calling thread's stream of a device.
pub type StreamOf = unsafe extern "C" fn(i32, *mut *mut c_void) -> i32;

fn current_stream(ordinal: i32) -> Result<u64> {
    ask(symbols::torch().map_err(Error::Torch)?.aoti_torch_get_current_cuda_stream, ordinal)
}

fn ask(current: Option<StreamOf>, ordinal: i32) -> Result<u64> {
    let Some(current) = current else {
        let without = "this torch was built without CUDA (it lacks aoti_torch_get_current_cuda_stream)";
        return Err(Error::Torch(format!("no kernel can run on cuda:{ordinal}: {without}")));
    };
    let mut stream = std::ptr::null_mut();
    // SAFETY: writes a pointer.
    #[allow(unsafe_code)]
    let code = unsafe { current(ordinal, &raw mut stream) };
    if code == 0 {
        Ok(stream as u64)
    } else {
        Err(Error::Torch(format!("no current stream of cuda:{ordinal}")))
    }
}

/// What stands for libtorch's function while a GPU is emulated; there, streams are numbers.
#[cfg(feature = "testing")]
static STREAMS: Mutex<Option<StreamOf>> = Mutex::new(None);

/// Asks this function for the current stream of the emulated GPU; without one it is the default stream.
#[cfg(feature = "testing")]
pub fn emulate_streams(current: Option<StreamOf>) {
    *STREAMS.lock().unwrap_or_else(PoisonError::into_inner) = current;
}

/// The emulated GPU that CPU tensors are on.
#[cfg(feature = "testing")]
static EMULATED_GPU: AtomicI32 = AtomicI32::new(0);

/// From now on CPU tensors are on the emulated GPU of this index.
#[cfg(feature = "testing")]
pub fn emulate_gpu(ordinal: i32) {
    EMULATED_GPU.store(ordinal, Ordering::Relaxed);
}

#[cfg(feature = "testing")]
fn emulated_gpu() -> i32 {
    EMULATED_GPU.load(Ordering::Relaxed)
}

#[cfg(not(feature = "testing"))]
const fn emulated_gpu() -> i32 {
    0
}

#[cfg(feature = "testing")]
fn emulated_stream(ordinal: i32) -> Result<u64> {
    let current = *STREAMS.lock().unwrap_or_else(PoisonError::into_inner);
    current.map_or(Ok(0), |current| ask(Some(current), ordinal))
}

#[cfg(not(feature = "testing"))]
#[allow(clippy::unnecessary_wraps)] // as the other
fn emulated_stream(_: i32) -> Result<u64> {
    Ok(0)
}

/// A pointer to the first element of a contiguous tensor of this dtype, for a kernel.
///
/// # Errors
/// If the tensor is strided or has another dtype, which is a bug of the caller.
pub fn pointer(tensor: &Tensor, kind: Kind) -> Result<Arg> {
    if !tensor.is_contiguous() || tensor.f_kind()? != kind {
        return Err(Error::Internal(format!("a pointer to {} on a tensor {tensor:?}", dtype_name(kind))));
    }
    Ok(Arg::ptr(tensor.data_ptr() as u64))
}

/// The number of blocks for `items`, with `each` items per block.
///
/// # Errors
/// If a grid cannot have that many blocks; no GPU has memory for such a tensor.
pub fn grid(items: i64, each: i64) -> Result<[u32; 3]> {
    let blocks = (items as u64).div_ceil(each as u64);
    let blocks =
        i32::try_from(blocks).map_err(|error| Error::Internal(format!("{blocks} blocks: {error}")))?;
    Ok([blocks as u32, 1, 1])
}

/// The device's name in Python. tch does not distinguish devices other than CPU and CUDA.
#[must_use]
pub fn device_name(device: Device) -> String {
    match device {
        Device::Cpu => "cpu".into(),
        Device::Cuda(index) => format!("cuda:{index}"),
        _ => "another device".into(),
    }
}

/// Checks that arguments are on the device of the first, before anything is read or launched: a kernel cannot
/// tell a pointer to another device's memory.
///
/// # Errors
/// The first argument on another device, by name.
pub fn check_devices<'a>(
    op: &'static str,
    (first_name, first): (&str, &Tensor),
    others: impl IntoIterator<Item = (&'static str, Option<&'a Tensor>)>,
) -> Result<()> {
    let device = first.device();
    for (argument, tensor) in others {
        if let Some(tensor) = tensor
            && tensor.device() != device
        {
            let expected = format!("on the device of {first_name}, {}", device_name(device));
            let got = format!("on {}", device_name(tensor.device()));
            return Err(Error::Value { op, argument, expected, got });
        }
    }
    Ok(())
}

/// Makes CPU tensors take the path of other devices, so that a machine without one can test it.
#[cfg(feature = "testing")]
static TENSOR_OPS: AtomicBool = AtomicBool::new(false);

/// Switches the path of other devices on or off for CPU tensors.
#[cfg(feature = "testing")]
pub fn use_tensor_ops(on: bool) {
    TENSOR_OPS.store(on, Ordering::Relaxed);
}

/// True while CPU tensors take the path of other devices: of an emulated GPU too, where no kernel serves them.
#[must_use]
pub fn tensor_ops() -> bool {
    #[cfg(feature = "testing")]
    return TENSOR_OPS.load(Ordering::Relaxed) || cuda::is_emulated();
    #[cfg(not(feature = "testing"))]
    false
}

/// True if values can be read without waiting for a device.
#[must_use]
pub fn on_host(tensor: &Tensor) -> bool {
    tensor.device() == Device::Cpu && !cuda::is_emulated()
}

#[cfg(test)]
mod tests {
    use super::ask;

    #[test]
    fn a_torch_without_cuda_is_named() {
        let error = ask(None, 0).expect_err("no function");
        assert_eq!(
            error.to_string(),
            "libtorch: no kernel can run on cuda:0: this torch was built without CUDA (it lacks \
             aoti_torch_get_current_cuda_stream)"
        );
    }
}
