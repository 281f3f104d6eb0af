//! Other shapes, places and dtypes of a tensor.

use std::ffi::c_int;

use torch_sys::C_tensor;

use super::call::{Value, call, operators};
use super::error::Result;
use super::handle::{Handle, Place, dtype, is_contiguous, place, place_of, put, share};
use super::symbols::torch;
use super::waits::note;

type Tensor = *mut C_tensor;

operators! {
    atg_detach(x: Tensor) => c"aten::detach", c"", [Tensor(x)];
    atg_narrow(x: Tensor, dim: i64, start: i64, len: i64) =>
        c"aten::narrow", c"", [Tensor(x), Int(dim), Int(start), Int(len)];
    atg_reshape(x: Tensor, shape: *const i64, len: c_int) =>
        c"aten::reshape", c"", [Tensor(x), Ints(ints(shape, len))];
    atg_select(x: Tensor, dim: i64, index: i64) =>
        c"aten::select", c"int", [Tensor(x), Int(dim), Int(index)];
    atg_squeeze(x: Tensor) => c"aten::squeeze", c"", [Tensor(x)];
    atg_squeeze_dim(x: Tensor, dim: i64) => c"aten::squeeze", c"dim", [Tensor(x), Int(dim)];
    atg_t(x: Tensor) => c"aten::t", c"", [Tensor(x)];
    atg_unsqueeze(x: Tensor, dim: i64) => c"aten::unsqueeze", c"", [Tensor(x), Int(dim)];
    atg_view(x: Tensor, shape: *const i64, len: c_int) =>
        c"aten::view", c"", [Tensor(x), Ints(ints(shape, len))];
    atg_view_dtype(x: Tensor, dtype: c_int) => c"aten::view", c"dtype", [Tensor(x), Int(dtype.into())];
}

/// `x` itself where it is contiguous, or a copy that is.
pub fn contiguous(x: Tensor) -> Result<Handle> {
    if is_contiguous(x)? {
        return share(x);
    }
    // SAFETY: a function that returns a constant.
    let format = unsafe { (torch()?.aoti_torch_memory_format_contiguous_format)() };
    call(c"aten::contiguous", c"", [Value::Tensor(x), Value::Int(format.into())])
}

#[unsafe(no_mangle)]
unsafe extern "C" fn atg_contiguous(out: *mut Tensor, x: Tensor) {
    // SAFETY: tch's arguments.
    unsafe { put(out, contiguous(x)) }
}

/// `x` in another dtype; itself where it has it.
pub fn to_dtype(x: Tensor, wanted: c_int) -> Result<Handle> {
    if dtype(x)? == wanted {
        return share(x);
    }
    let arguments =
        [Value::Tensor(x), Value::dtype(wanted), Value::Bool(false), Value::Bool(false), Value::None];
    call(c"aten::to", c"dtype", arguments)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn atg_totype(out: *mut Tensor, x: Tensor, wanted: c_int) {
    // SAFETY: tch's arguments.
    unsafe { put(out, to_dtype(x, wanted)) }
}

/// `x` on another device; itself where it is there.
pub fn to_place(x: Tensor, wanted: Place) -> Result<Handle> {
    // With an emulated GPU the devices are the same.
    note("to");
    let now = place(x)?;
    if now.kind == wanted.kind && (wanted.index < 0 || now.index == wanted.index) {
        return share(x);
    }
    let arguments = [
        Value::Tensor(x),
        Value::Device(wanted),
        Value::dtype(dtype(x)?),
        Value::Bool(false),
        Value::Bool(false),
        Value::None,
    ];
    call(c"aten::to", c"device", arguments)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn atg_to(out: *mut Tensor, x: Tensor, device: c_int) {
    // SAFETY: tch's arguments.
    unsafe { put(out, place_of(device).and_then(|wanted| to_place(x, wanted))) }
}
