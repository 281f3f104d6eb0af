//! Which GPU a tensor is on, which path it takes, and tensors as arguments of kernels.

#[cfg(feature = "testing")]
use std::sync::atomic::{AtomicBool, Ordering};

use tch::{Device, Kind, Tensor};

use super::abi::symbols::{self, Torch};
use super::dtype::dtype_name;
use crate::base::error::{Error, Result};
use crate::cuda::{self, Arg};

/// The GPU of this tensor and its current stream on this thread; `None` if the tensor is not on a GPU. With
/// an emulated GPU, CPU tensors are on it.
///
/// # Errors
/// If libtorch has no current stream.
pub fn of(tensor: &Tensor) -> Result<Option<cuda::Device>> {
    match tensor.device() {
        Device::Cuda(index) if cuda::is_available() => {
            let ordinal = i32::try_from(index).map_err(|error| Error::Internal(error.to_string()))?;
            Ok(Some(cuda::Device { ordinal, stream: current_stream(ordinal)? }))
        }
        Device::Cpu if cuda::is_emulated() => Ok(Some(cuda::Device { ordinal: 0, stream: 0 })),
        _ => Ok(None),
    }
}

fn current_stream(ordinal: i32) -> Result<u64> {
    stream_of(symbols::torch().map_err(Error::Torch)?, ordinal)
}

fn stream_of(torch: &Torch, ordinal: i32) -> Result<u64> {
    let none = || Error::Torch(format!("no current stream of cuda:{ordinal}"));
    let current = torch.aoti_torch_get_current_cuda_stream.ok_or_else(none)?;
    let mut stream = std::ptr::null_mut();
    // SAFETY: writes a pointer.
    #[allow(unsafe_code)]
    let code = unsafe { current(ordinal, &raw mut stream) };
    if code == 0 { Ok(stream as u64) } else { Err(none()) }
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

/// True while CPU tensors take the path of other devices.
#[must_use]
pub fn tensor_ops() -> bool {
    #[cfg(feature = "testing")]
    return TENSOR_OPS.load(Ordering::Relaxed);
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
    use super::{current_stream, stream_of};
    use crate::torch::abi::symbols::without;

    #[test]
    fn a_card_that_is_not_there_is_an_error() {
        // libtorch throws an exception, which must not unwind through Rust.
        let error = current_stream(120).expect_err("no machine has so many");
        assert_eq!(error.to_string(), "libtorch: no current stream of cuda:120");
    }

    #[test]
    fn a_torch_without_cuda_has_no_stream() {
        let torch = without(&["aoti_torch_get_current_cuda_stream"]).expect("an optional function");
        let error = stream_of(&torch, 0).expect_err("no function");
        assert_eq!(error.to_string(), "libtorch: no current stream of cuda:0");
    }
}
