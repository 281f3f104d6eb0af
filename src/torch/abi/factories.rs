//! New tensors.

use std::ffi::{c_int, c_void};
use std::ptr;

use torch_sys::{C_scalar, C_tensor};

use super::call::{Value, call, ints, operators};
use super::error::{Result, check, or_set};
use super::handle::{Handle, Place, data, place_of, put};
use super::scalar::Scalar;
use super::symbols::torch;

/// Strides of a contiguous tensor; in one without elements, as libtorch has them.
fn strides(shape: &[i64]) -> Vec<i64> {
    let mut strides = vec![1; shape.len()];
    for at in (1..shape.len()).rev() {
        strides[at - 1] = strides[at] * shape[at].max(1);
    }
    strides
}

/// A tensor whose values are not set.
fn empty(shape: &[i64], dtype: c_int, place: Place) -> Result<Handle> {
    if shape.iter().any(|&size| size < 0) {
        return Err(format!("aten::empty: a negative dimension in {shape:?}"));
    }
    let count = shape.iter().try_fold(1i64, |count, &size| count.checked_mul(size.max(1)));
    if count.is_none() {
        return Err(format!("aten::empty: {shape:?} has more elements than there are numbers"));
    }
    let torch = torch()?;
    let strides = strides(shape);
    let mut new = ptr::null_mut();
    // SAFETY: as many sizes and strides as dimensions.
    let code = unsafe {
        (torch.aoti_torch_empty_strided)(
            shape.len() as i64,
            shape.as_ptr(),
            strides.as_ptr(),
            dtype,
            place.kind,
            place.index,
            &raw mut new,
        )
    };
    check(torch, code, &|| {
        // SAFETY: a function of a number.
        let bytes = unsafe { (torch.aoti_torch_dtype_element_size)(dtype) };
        let count: i64 = shape.iter().product();
        format!("aten::empty: {} bytes for a tensor of shape {shape:?}", i128::from(count) * bytes as i128)
    })?;
    // SAFETY: the new tensor.
    Ok(unsafe { Handle::from_raw(new) })
}

/// As [`empty`], with tch's arguments.
///
/// # Safety
/// `len` sizes.
unsafe fn new(shape: *const i64, len: c_int, dtype: c_int, device: c_int) -> Result<Handle> {
    empty(unsafe { ints(shape, len) }, dtype, place_of(device)?)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn atg_empty(
    out: *mut *mut C_tensor,
    shape: *const i64,
    len: c_int,
    dtype: c_int,
    device: c_int,
) {
    // SAFETY: tch's arguments.
    unsafe { put(out, new(shape, len, dtype, device)) }
}

fn zero(x: Handle) -> Result<Handle> {
    let torch = torch()?;
    // SAFETY: a live handle.
    check(torch, unsafe { (torch.aoti_torch_zero_)(x.raw()) }, &|| "aten::zero_".into())?;
    Ok(x)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn atg_zeros(
    out: *mut *mut C_tensor,
    shape: *const i64,
    len: c_int,
    dtype: c_int,
    device: c_int,
) {
    // SAFETY: tch's arguments.
    unsafe { put(out, new(shape, len, dtype, device).and_then(zero)) }
}

/// Sets all values; the result is another handle of `x`.
fn fill(x: *mut C_tensor, value: Scalar) -> Result<Handle> {
    let value = value.alone()?;
    call(c"aten::fill_", c"Tensor", [Value::Tensor(x), Value::Tensor(value.raw())])
}

#[unsafe(no_mangle)]
unsafe extern "C" fn atg_fill_(out: *mut *mut C_tensor, x: *mut C_tensor, value: *mut C_scalar) {
    // SAFETY: tch's arguments.
    unsafe { put(out, fill(x, Scalar::read(value))) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn atg_full(
    out: *mut *mut C_tensor,
    shape: *const i64,
    len: c_int,
    value: *mut C_scalar,
    dtype: c_int,
    device: c_int,
) {
    // SAFETY: tch's arguments.
    unsafe {
        let filled = |new: Handle| fill(new.raw(), Scalar::read(value));
        put(out, new(shape, len, dtype, device).and_then(filled));
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn atg_ones(
    out: *mut *mut C_tensor,
    shape: *const i64,
    len: c_int,
    dtype: c_int,
    device: c_int,
) {
    // SAFETY: tch's arguments.
    unsafe { put(out, new(shape, len, dtype, device).and_then(|new| fill(new.raw(), Scalar::Int(1)))) }
}

operators! {
    atg_zeros_like(x: *mut C_tensor) =>
        c"aten::zeros_like", c"", [Tensor(x), None, None, None, None, None];
}

#[unsafe(no_mangle)]
unsafe extern "C" fn at_tensor_of_data(
    values: *const c_void,
    shape: *const i64,
    dims: usize,
    element_size: usize,
    dtype: c_int,
) -> *mut C_tensor {
    let make = || {
        let torch = torch()?;
        // SAFETY: a function of a number.
        if element_size != unsafe { (torch.aoti_torch_dtype_element_size)(dtype) } {
            return Err(format!("elements of {element_size} bytes for dtype {dtype}"));
        }
        // SAFETY: tch's arguments.
        let shape = unsafe { ints(shape, dims as c_int) };
        let new = empty(shape, dtype, place_of(-1)?)?;
        let bytes = shape.iter().product::<i64>() as usize * element_size;
        if bytes > 0 {
            // SAFETY: tch passes as many values as the shape has; the tensor is new and contiguous.
            unsafe { ptr::copy_nonoverlapping(values.cast::<u8>(), data(new.raw())?.cast(), bytes) };
        }
        Ok(new.into_raw())
    };
    or_set(make(), ptr::null_mut())
}

#[unsafe(no_mangle)]
unsafe extern "C" fn at_tensor_of_blob(
    values: *const c_void,
    shape: *const i64,
    dims: usize,
    steps: *const i64,
    count: usize,
    dtype: c_int,
    device: c_int,
) -> *mut C_tensor {
    let make = || {
        // SAFETY: tch's arguments.
        let shape = unsafe { ints(shape, dims as c_int) };
        // SAFETY: as above.
        let steps = unsafe { ints(steps, count as c_int) };
        let contiguous = strides(shape);
        let steps = if steps.len() == shape.len() { steps } else { &contiguous };
        let place = place_of(device)?;
        Handle::from("from_blob", |torch, out| unsafe {
            (torch.aoti_torch_create_tensor_from_blob)(
                values.cast_mut(),
                dims as i64,
                shape.as_ptr(),
                steps.as_ptr(),
                0,
                dtype,
                place.kind,
                place.index,
                out,
            )
        })
    };
    or_set(make().map(Handle::into_raw), ptr::null_mut())
}
