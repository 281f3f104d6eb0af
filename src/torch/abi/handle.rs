//! Handles of tensors, owned and borrowed, and what can be asked of them.

use std::ffi::{c_int, c_void};
use std::ptr;

use torch_sys::C_tensor;

use super::error::{Result, check};
use super::symbols::{Code, Torch, torch};

/// An owned handle of a tensor.
#[derive(Debug)]
pub struct Handle(*mut C_tensor);

impl Handle {
    /// The handle that a function writes.
    pub fn from(
        function: &'static str,
        write: impl FnOnce(&'static Torch, *mut *mut C_tensor) -> Code,
    ) -> Result<Self> {
        let torch = torch()?;
        let mut handle = ptr::null_mut();
        check(torch, write(torch, &raw mut handle), &|| function.into())?;
        Ok(Self(handle))
    }

    /// Takes over a handle.
    ///
    /// # Safety
    /// A handle that nobody else deletes.
    pub unsafe fn from_raw(handle: *mut C_tensor) -> Self {
        Self(handle)
    }

    /// The handle, for someone who deletes it.
    pub fn into_raw(self) -> *mut C_tensor {
        std::mem::ManuallyDrop::new(self).0
    }

    /// The handle, for the time of a call.
    pub fn raw(&self) -> *mut C_tensor {
        self.0
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: an owned handle; a table was there when it was made.
        let _ = torch().map(|torch| unsafe { (torch.aoti_torch_delete_tensor_object)(self.0) });
    }
}

/// Another handle of the same tensor.
pub fn share(x: *mut C_tensor) -> Result<Handle> {
    Handle::from("new_tensor_handle", |torch, out| unsafe { (torch.aoti_torch_new_tensor_handle)(x, out) })
}

/// Writes the result of one of tch's `atg_*` functions.
///
/// # Safety
/// `out` has room for a pointer.
pub unsafe fn put(out: *mut *mut C_tensor, result: Result<Handle>) {
    // SAFETY: as the caller says.
    unsafe { *out = super::error::or_set(result.map(Handle::into_raw), ptr::null_mut()) };
}

/// What a function writes for a tensor.
pub fn get<T: Copy>(
    start: T,
    read: impl FnOnce(&'static Torch, *mut T) -> Code,
    function: &'static str,
) -> Result<T> {
    let torch = torch()?;
    let mut value = start;
    check(torch, read(torch, &raw mut value), &|| function.into())?;
    Ok(value)
}

/// The lengths of the dimensions; borrowed from the tensor.
///
/// # Safety
/// A live handle, of which the slice is read before the tensor changes.
pub unsafe fn sizes<'a>(x: *mut C_tensor) -> Result<&'a [i64]> {
    let sizes = get(ptr::null(), |t, out| unsafe { (t.aoti_torch_get_sizes)(x, out) }, "get_sizes")?;
    // SAFETY: libtorch keeps `dim` numbers there.
    Ok(unsafe { numbers(sizes, dim(x)?) })
}

/// The strides of the dimensions; borrowed from the tensor.
///
/// # Safety
/// As [`sizes`].
pub unsafe fn strides<'a>(x: *mut C_tensor) -> Result<&'a [i64]> {
    let strides = get(ptr::null(), |t, out| unsafe { (t.aoti_torch_get_strides)(x, out) }, "get_strides")?;
    // SAFETY: libtorch keeps `dim` numbers there.
    Ok(unsafe { numbers(strides, dim(x)?) })
}

unsafe fn numbers<'a>(start: *const i64, len: usize) -> &'a [i64] {
    if len == 0 {
        return &[];
    }
    // SAFETY: as the callers say.
    unsafe { std::slice::from_raw_parts(start, len) }
}

/// The number of dimensions.
pub fn dim(x: *mut C_tensor) -> Result<usize> {
    Ok(get(0, |t, out| unsafe { (t.aoti_torch_get_dim)(x, out) }, "get_dim")? as usize)
}

/// The dtype, by tch's number.
pub fn dtype(x: *mut C_tensor) -> Result<c_int> {
    get(0, |t, out| unsafe { (t.aoti_torch_get_dtype)(x, out) }, "get_dtype")
}

/// The first element.
pub fn data(x: *mut C_tensor) -> Result<*mut c_void> {
    get(ptr::null_mut(), |t, out| unsafe { (t.aoti_torch_get_data_ptr)(x, out) }, "get_data_ptr")
}

/// True if the elements lie one after the other, the last dimension first.
pub fn is_contiguous(x: *mut C_tensor) -> Result<bool> {
    get(false, |t, out| unsafe { (t.aoti_torch_is_contiguous)(x, out) }, "is_contiguous")
}

/// A place for tensors, in libtorch's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Kind of device.
    pub kind: i32,
    /// Which of them; -1 where there is one.
    pub index: i32,
}

/// Where a tensor is.
pub fn place(x: *mut C_tensor) -> Result<Place> {
    Ok(Place {
        kind: get(0, |t, out| unsafe { (t.aoti_torch_get_device_type)(x, out) }, "get_device_type")?,
        index: get(0, |t, out| unsafe { (t.aoti_torch_get_device_index)(x, out) }, "get_device_index")?,
    })
}

/// A device by tch's number: -1 the CPU, -2 MPS, others CUDA's.
pub fn place_of(device: c_int) -> Result<Place> {
    let torch = torch()?;
    // SAFETY: functions that return a constant.
    unsafe {
        Ok(match device {
            -1 => Place { kind: (torch.aoti_torch_device_type_cpu)(), index: -1 },
            -2 => Place { kind: (torch.aoti_torch_device_type_mps)(), index: 0 },
            0.. => Place { kind: (torch.aoti_torch_device_type_cuda)(), index: device },
            _ => return Err(format!("device {device} of tch is not supported")),
        })
    }
}
