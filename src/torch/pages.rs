//! Large pages for large results.
//!
//! A result of 64 MB is 16,384 pages that the kernel maps one fault at a time when they are first
//! written, and that costs several times what dequantising into them does. In pages of 2 MB it is 32
//! faults.

use tch::{Device, Tensor};

use super::head::dtype_name;
use crate::error::{Error, Result};

/// Bytes from which a result asks for large pages: two of them.
const WORTH_IT: usize = 4 << 20;

/// An uninitialised tensor on the CPU, in large pages if it is large and the system gives them.
///
/// # Errors
/// What libtorch reports: no memory.
pub fn empty(shape: &[i64], kind: tch::Kind) -> Result<Tensor> {
    let tensor = Tensor::f_empty(shape, (kind, Device::Cpu))?;
    if tensor.data_ptr().is_null() && tensor.numel() > 0 {
        return Err(Error::Internal(format!("no storage for {shape:?} {}", dtype_name(kind))));
    }
    let bytes = tensor.numel() * kind.elt_size_in_bytes();
    if bytes >= WORTH_IT {
        advise(tensor.data_ptr() as usize, bytes);
    }
    Ok(tensor)
}

#[cfg(target_os = "linux")]
#[allow(unsafe_code)] // madvise
fn advise(start: usize, bytes: usize) {
    use std::ffi::{c_int, c_void};
    const MADV_HUGEPAGE: c_int = 14;
    const PAGE: usize = 4096;
    unsafe extern "C" {
        fn madvise(address: *mut c_void, length: usize, advice: c_int) -> c_int;
    }
    let first = start.next_multiple_of(PAGE);
    let whole = (start + bytes - first) / PAGE * PAGE;
    // SAFETY: the range lies within an allocation of this process, and the advice changes no content.
    // Where it is refused the pages stay small.
    unsafe { madvise(first as *mut c_void, whole, MADV_HUGEPAGE) };
}

#[cfg(not(target_os = "linux"))]
fn advise(_start: usize, _bytes: usize) {}
