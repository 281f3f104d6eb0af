//! Large results in large pages.

use tch::{Device, Kind, Tensor};

use super::dtype::dtype_name;
use crate::base::error::{Error, Result};
use crate::base::huge_pages;

/// An uninitialised tensor on the CPU, in large pages if it is large and the system gives them.
///
/// # Errors
/// Errors of libtorch, such as out of memory.
pub fn empty(shape: &[i64], kind: Kind) -> Result<Tensor> {
    let tensor = Tensor::f_empty(shape, (kind, Device::Cpu))?;
    let bytes = tensor.numel() * kind.elt_size_in_bytes();
    if bytes > 0 {
        let start = tensor.data_ptr().cast::<std::mem::MaybeUninit<u8>>();
        if start.is_null() {
            return Err(Error::Internal(format!("no storage for {shape:?} {}", dtype_name(kind))));
        }
        // SAFETY: the storage of a new contiguous tensor, to which there is no other reference.
        #[allow(unsafe_code)]
        huge_pages::advise(unsafe { std::slice::from_raw_parts_mut(start, bytes) });
    }
    Ok(tensor)
}
