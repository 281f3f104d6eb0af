//! Tensors as slices, checked.
#![allow(unsafe_code)] // the functions that turn a data pointer into a slice

use half::{bf16, f16};
use tch::{Device, Kind, Tensor};

use crate::base::error::{Error, Result};

/// An element type that a tensor's storage can be viewed as.
pub trait Element: Copy {
    /// The tensor dtype with this layout.
    const KIND: Kind;
}

macro_rules! element {
    ($($ty:ty => $kind:ident),*) => { $(impl Element for $ty { const KIND: Kind = Kind::$kind; })* };
}

element!(f32 => Float, f64 => Double, bf16 => BFloat16, f16 => Half, i64 => Int64, u8 => Uint8, bool => Bool);

fn check<T: Element>(tensor: &Tensor) -> Result<usize> {
    let misfit = tensor.device() != Device::Cpu || !tensor.is_contiguous() || tensor.f_kind()? != T::KIND;
    if misfit {
        return Err(Error::Internal(format!("a view of {:?} on a tensor {tensor:?}", T::KIND)));
    }
    Ok(tensor.numel())
}

/// The elements of a contiguous CPU tensor.
///
/// # Errors
/// If the tensor is on another device, strided, or has another dtype, which is a bug of the caller.
pub fn slice<T: Element>(tensor: &Tensor) -> Result<&[T]> {
    let len = check::<T>(tensor)?;
    if len == 0 {
        return Ok(&[]);
    }
    // SAFETY: the tensor is contiguous, on the CPU, has `len` elements of T's layout, and outlives
    // the slice. This crate does not write to it; a Python thread that writes to an argument during a call
    // would race with any PyTorch op.
    Ok(unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast::<T>(), len) })
}

/// The elements of a contiguous CPU tensor that this call created and has not shared.
///
/// # Errors
/// As [`slice`].
pub fn slice_mut<T: Element>(tensor: &mut Tensor) -> Result<&mut [T]> {
    let len = check::<T>(tensor)?;
    if len == 0 {
        return Ok(&mut []);
    }
    // SAFETY: as for `slice`; `&mut` makes it the only view.
    Ok(unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast::<T>(), len) })
}

/// The elements of a contiguous CPU tensor that is changed in place: a parameter, or the state of an
/// optimiser.
///
/// # Errors
/// As [`slice`].
pub fn slice_in_place<T: Element>(tensor: &mut Tensor) -> Result<&mut [T]> {
    // The handle is exclusive; other handles to the storage are Python's, whose threads would race with an
    // update in place of any optimiser.
    slice_mut(tensor)
}

/// Wraps a slice in a tensor without copying; the tensor must not outlive the slice.
pub(super) fn borrow<T: Element>(data: &[T], rows: usize, columns: usize) -> Result<Tensor> {
    debug_assert_eq!(data.len(), rows * columns);
    let (rows, columns) = (rows as i64, columns as i64);
    // SAFETY: the slice has `rows * columns` elements of this kind. Callers drop the tensor before the borrow
    // ends; those that write through it hold a `&mut` to the slice.
    let tensor = unsafe {
        Tensor::f_from_blob(data.as_ptr().cast(), &[rows, columns], &[columns, 1], T::KIND, Device::Cpu)
    };
    Ok(tensor?)
}
