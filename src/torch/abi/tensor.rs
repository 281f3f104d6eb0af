//! What a tensor is, its copies, and the switches of a thread.

use std::ffi::{c_char, c_int, c_void};
use std::ptr;

use torch_sys::C_tensor;

use super::call::{Value, call};
use super::error::{Result, check, or_set};
use super::handle::{self, Handle, get, share};
use super::symbols::torch;

#[unsafe(no_mangle)]
extern "C" fn at_new_tensor() -> *mut C_tensor {
    let new = Handle::from("new tensor", |t, out| unsafe { (t.aoti_torch_new_uninitialized_tensor)(out) });
    or_set(new.map(Handle::into_raw), ptr::null_mut())
}

#[unsafe(no_mangle)]
unsafe extern "C" fn at_free(x: *mut C_tensor) {
    if !x.is_null() {
        // SAFETY: tch owns the handle, and gives it up.
        drop(unsafe { Handle::from_raw(x) });
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn at_shallow_clone(x: *mut C_tensor) -> *mut C_tensor {
    or_set(share(x).map(Handle::into_raw), ptr::null_mut())
}

#[unsafe(no_mangle)]
unsafe extern "C" fn at_defined(x: *mut C_tensor) -> c_int {
    let defined = get(false, |t, out| unsafe { (t.aoti_torch_is_defined)(x, out) }, "is_defined");
    or_set(defined.map(c_int::from), -1)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn at_is_contiguous(x: *mut C_tensor) -> c_int {
    or_set(handle::is_contiguous(x).map(c_int::from), -1)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn at_data_ptr(x: *mut C_tensor) -> *mut c_void {
    or_set(handle::data(x), ptr::null_mut())
}

#[unsafe(no_mangle)]
unsafe extern "C" fn at_dim(x: *mut C_tensor) -> usize {
    or_set(handle::dim(x), 0)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn at_shape(x: *mut C_tensor, out: *mut i64) {
    // SAFETY: tch has room for as many numbers as the tensor has dimensions.
    let copy = unsafe { handle::sizes(x) };
    or_set(copy.map(|sizes| unsafe { ptr::copy_nonoverlapping(sizes.as_ptr(), out, sizes.len()) }), ());
}

#[unsafe(no_mangle)]
unsafe extern "C" fn at_stride(x: *mut C_tensor, out: *mut i64) {
    // SAFETY: as in `at_shape`.
    let copy = unsafe { handle::strides(x) };
    or_set(copy.map(|strides| unsafe { ptr::copy_nonoverlapping(strides.as_ptr(), out, strides.len()) }), ());
}

#[unsafe(no_mangle)]
unsafe extern "C" fn at_scalar_type(x: *mut C_tensor) -> c_int {
    or_set(handle::dtype(x), -1)
}

/// The CPU is -1 and CUDA its index, MPS -2; what tch has no number for is -3.
#[unsafe(no_mangle)]
unsafe extern "C" fn at_device(x: *mut C_tensor) -> c_int {
    let number = || {
        let (place, torch) = (handle::place(x)?, torch()?);
        // SAFETY: functions that return a constant.
        let (cpu, cuda, mps) = unsafe {
            (
                (torch.aoti_torch_device_type_cpu)(),
                (torch.aoti_torch_device_type_cuda)(),
                (torch.aoti_torch_device_type_mps)(),
            )
        };
        Ok(match place.kind {
            kind if kind == cpu => -1,
            kind if kind == cuda => place.index.max(0),
            kind if kind == mps => -2,
            _ => -3,
        })
    };
    or_set(number(), -3)
}

/// For `{:?}` of a tensor: its form, since nothing stable prints its values.
#[unsafe(no_mangle)]
unsafe extern "C" fn at_to_string(x: *mut C_tensor, _line_size: c_int) -> *mut c_char {
    // SAFETY: a live handle.
    let text = unsafe { handle::sizes(x) }.map(|sizes| format!("values of {sizes:?}"));
    let text = std::ffi::CString::new(or_set(text, String::new())).unwrap_or_default();
    // SAFETY: copies a C string, which tch frees.
    unsafe { libc::strdup(text.as_ptr()) }
}

/// Copies the first `count` values out.
#[unsafe(no_mangle)]
unsafe extern "C" fn at_copy_data(x: *mut C_tensor, out: *mut c_void, count: usize, element_size: usize) {
    let read = || {
        let torch = torch()?;
        // SAFETY: a function of a number.
        if element_size != unsafe { (torch.aoti_torch_dtype_element_size)(handle::dtype(x)?) } {
            return Err(format!("values of {element_size} bytes of a tensor of another dtype"));
        }
        let numel = get(0, |t, out| unsafe { (t.aoti_torch_get_numel)(x, out) }, "get_numel")?;
        if count as i64 > numel {
            return Err(format!("{count} values of a tensor that has {numel}"));
        }
        let host = super::views::contiguous(super::views::to_place(x, handle::place_of(-1)?)?.raw())?;
        if count > 0 {
            let from = handle::data(host.raw())?.cast::<u8>();
            // SAFETY: tch has room for as many values as it asks for; the tensor has them in a row.
            unsafe { ptr::copy_nonoverlapping(from, out.cast(), count * element_size) };
        }
        Ok(())
    };
    or_set(read(), ());
}

#[unsafe(no_mangle)]
unsafe extern "C" fn at_copy_(to: *mut C_tensor, from: *mut C_tensor) {
    or_set(copy(to, from), ());
}

/// Copies the values of `from` into `to`.
pub fn copy(to: *mut C_tensor, from: *mut C_tensor) -> Result<()> {
    let torch = torch()?;
    // SAFETY: live handles.
    let code = unsafe { (torch.aoti_torch_copy_)(to, from, 0) };
    check(torch, code, &|| "aten::copy_".into())
}

/// The one element at `indices`.
///
/// # Safety
/// A live handle, and `len` indices.
unsafe fn element(x: *mut C_tensor, indices: *const i64, len: c_int) -> Result<Handle> {
    super::waits::note("item");
    let mut element = share(x)?;
    for &index in unsafe { super::call::ints(indices, len) } {
        let arguments = [Value::Tensor(element.raw()), Value::Int(0), Value::Int(index)];
        element = call(c"aten::select", c"int", arguments)?;
    }
    Ok(element)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn at_double_value_at_indexes(x: *mut C_tensor, indices: *const i64, len: c_int) -> f64 {
    let read = |x: Handle| get(0.0, |t, out| unsafe { (t.aoti_torch_item_float64)(x.raw(), out) }, "item");
    // SAFETY: as tch says.
    or_set(unsafe { element(x, indices, len) }.and_then(read), 0.0)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn at_int64_value_at_indexes(x: *mut C_tensor, indices: *const i64, len: c_int) -> i64 {
    let read = |x: Handle| get(0, |t, out| unsafe { (t.aoti_torch_item_int64)(x.raw(), out) }, "item");
    // SAFETY: as tch says.
    or_set(unsafe { element(x, indices, len) }.and_then(read), 0)
}

/// Switches the recording of gradients on this thread, and returns what it was.
#[unsafe(no_mangle)]
extern "C" fn at_grad_set_enabled(on: c_int) -> c_int {
    let set = |torch: &super::symbols::Torch| {
        // SAFETY: a flag of this thread.
        unsafe {
            let before = (torch.aoti_torch_grad_mode_is_enabled)();
            (torch.aoti_torch_grad_mode_set_enabled)(on != 0);
            c_int::from(before)
        }
    };
    or_set(torch().map(set), -1)
}

#[unsafe(no_mangle)]
extern "C" fn at_get_num_threads() -> c_int {
    let threads = get(1u32, |t, out| unsafe { (t.torch_get_num_threads)(out) }, "get_num_threads");
    or_set(threads.map(|threads| threads as c_int), 1)
}
