//! Elements by their places, and tensors put together.

use std::ffi::{c_char, c_int};

use torch_sys::C_tensor;

use super::call::{Value, call, operators};
use super::error::Result;
use super::handle::{Handle, dim, put, sizes};

type Tensor = *mut C_tensor;

operators! {
    atg_bucketize(x: Tensor, boundaries: Tensor, narrow: c_int, right: c_int) =>
        c"aten::bucketize", c"Tensor", [Tensor(x), Tensor(boundaries), Bool(narrow != 0), Bool(right != 0)];
    atg_cat(parts: *const Tensor, len: c_int, dim: i64) =>
        c"aten::cat", c"", [Tensors(tensors(parts, len)), Int(dim)];
    atg_gather(x: Tensor, dim: i64, index: Tensor, sparse: c_int) =>
        c"aten::gather", c"", [Tensor(x), Int(dim), Tensor(index), Bool(sparse != 0)];
    atg_index_copy(x: Tensor, dim: i64, index: Tensor, source: Tensor) =>
        c"aten::index_copy", c"", [Tensor(x), Int(dim), Tensor(index), Tensor(source)];
    atg_index_select(x: Tensor, dim: i64, index: Tensor) =>
        c"aten::index_select", c"", [Tensor(x), Int(dim), Tensor(index)];
    atg_index_select_out(to: Tensor, x: Tensor, dim: i64, index: Tensor) =>
        c"aten::index_select", c"out", [Tensor(x), Int(dim), Tensor(index), Tensor(to)];
    atg_nonzero(x: Tensor) => c"aten::nonzero", c"", [Tensor(x)];
    atg_scatter_add_(x: Tensor, dim: i64, index: Tensor, source: Tensor) =>
        c"aten::scatter_add_", c"", [Tensor(x), Int(dim), Tensor(index), Tensor(source)];
    atg_stack(parts: *const Tensor, len: c_int, dim: i64) =>
        c"aten::stack", c"", [Tensors(tensors(parts, len)), Int(dim)];
}

/// By `scatter_add`, as the operator has a scalar factor: the index is spread over the other dimensions.
fn index_add(x: Tensor, along: i64, index: Tensor, source: Tensor) -> Result<Handle> {
    let dims = dim(source)? as i64;
    let along = if along < 0 { along + dims } else { along };
    // SAFETY: live handles, which do not change.
    let (shape, count) = unsafe { (sizes(source)?, sizes(index)?) };
    let ([count], true) = (count, (0..dims).contains(&along)) else {
        return Err("aten::index_add: the index must have one dimension, and the dimension exist".into());
    };
    let mut row = vec![1; shape.len()];
    row[along as usize] = *count;
    let index = call(c"aten::view", c"", [Value::Tensor(index), Value::Ints(&row)])?;
    let arguments = [Value::Tensor(index.raw()), Value::Ints(shape), Value::Bool(false)];
    let index = call(c"aten::expand", c"", arguments)?;
    let arguments = [Value::Tensor(x), Value::Int(along), Value::Tensor(index.raw()), Value::Tensor(source)];
    call(c"aten::scatter_add", c"", arguments)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn atg_index_add(out: *mut Tensor, x: Tensor, dim: i64, index: Tensor, source: Tensor) {
    // SAFETY: tch's arguments, here and below.
    unsafe { put(out, index_add(x, dim, index, source)) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn atg_repeat_interleave_self_int(
    out: *mut Tensor,
    x: Tensor,
    repeats: i64,
    dim: i64,
    no_dim: i8,
    size: i64,
    no_size: i8,
) {
    let (dim, size) = (Value::Int(dim), Value::Int(size));
    let dim = if no_dim == 0 { Value::Some(&dim) } else { Value::None };
    let size = if no_size == 0 { Value::Some(&size) } else { Value::None };
    let arguments = [Value::Tensor(x), Value::Int(repeats), dim, size];
    unsafe { put(out, call(c"aten::repeat_interleave", c"self_int", arguments)) }
}

/// Zeros at the ends; by the function in C, as the operator has a scalar.
#[unsafe(no_mangle)]
unsafe extern "C" fn atg_constant_pad_nd(out: *mut Tensor, x: Tensor, pad: *const i64, len: c_int) {
    let constant: *const c_char = c"constant".as_ptr();
    let padded = Handle::from("aten::pad", |torch, to| unsafe {
        (torch.aoti_torch_aten_pad)(x, pad, len.into(), constant, std::ptr::null(), to)
    });
    unsafe { put(out, padded) }
}
