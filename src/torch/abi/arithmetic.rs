//! Sums and differences. Their operators have a factor that is a scalar, which has no stable form: for real
//! numbers libtorch has one function in C, and integers are added up as a sum of two rows.

use torch_sys::{C_scalar, C_tensor};

use super::call::{Value, call};
use super::error::Result;
use super::handle::{Handle, dtype, put, share, sizes};
use super::scalar::{Scalar, is_integral};
use super::tensor::copy;

type Tensor = *mut C_tensor;

/// What is done with the second argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sign {
    Plus,
    Minus,
}

fn combine(x: Tensor, sign: Sign, y: Tensor) -> Result<Handle> {
    if is_integral(dtype(x)?) && is_integral(dtype(y)?) {
        return combine_integers(x, sign, y);
    }
    let factor = if sign == Sign::Minus { 1.0 } else { -1.0 };
    Handle::from("aten::subtract.Tensor", |torch, out| unsafe {
        (torch.aoti_torch_aten_subtract_Tensor)(x, y, factor, out)
    })
}

/// In the dtype of `x`, to whose shape `y` is expanded.
fn combine_integers(x: Tensor, sign: Sign, y: Tensor) -> Result<Handle> {
    let y = if sign == Sign::Minus { call(c"aten::neg", c"", [Value::Tensor(y)])? } else { share(y)? };
    let y = super::views::to_dtype(y.raw(), dtype(x)?)?;
    // SAFETY: a live handle, which does not change.
    let shape = unsafe { sizes(x)? };
    let arguments = [Value::Tensor(y.raw()), Value::Ints(shape), Value::Bool(false)];
    let y = call(c"aten::expand", c"", arguments)?;
    let rows = call(c"aten::stack", c"", [Value::Tensors(&[x, y.raw()]), Value::Int(0)])?;
    let arguments = [
        Value::Tensor(rows.raw()),
        Value::Some(&Value::Ints(&[0])),
        Value::Bool(false),
        Value::Some(&Value::dtype(dtype(x)?)),
    ];
    call(c"aten::sum", c"dim_IntList", arguments)
}

/// The result, written into `x`.
fn in_place(x: Tensor, result: &Handle) -> Result<Handle> {
    copy(x, result.raw())?;
    share(x)
}

fn with_scalar(x: Tensor, sign: Sign, scalar: Scalar) -> Result<Handle> {
    combine(x, sign, scalar.beside(x)?.raw())
}

#[unsafe(no_mangle)]
unsafe extern "C" fn atg_add(out: *mut Tensor, x: Tensor, y: Tensor) {
    // SAFETY: tch's arguments, here and below.
    unsafe { put(out, combine(x, Sign::Plus, y)) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn atg_sub(out: *mut Tensor, x: Tensor, y: Tensor) {
    unsafe { put(out, combine(x, Sign::Minus, y)) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn atg_add_(out: *mut Tensor, x: Tensor, y: Tensor) {
    unsafe { put(out, combine(x, Sign::Plus, y).and_then(|sum| in_place(x, &sum))) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn atg_add_scalar(out: *mut Tensor, x: Tensor, y: *mut C_scalar) {
    unsafe { put(out, with_scalar(x, Sign::Plus, Scalar::read(y))) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn atg_sub_scalar(out: *mut Tensor, x: Tensor, y: *mut C_scalar) {
    unsafe { put(out, with_scalar(x, Sign::Minus, Scalar::read(y))) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn atg_add_scalar_(out: *mut Tensor, x: Tensor, y: *mut C_scalar) {
    unsafe { put(out, with_scalar(x, Sign::Plus, Scalar::read(y)).and_then(|sum| in_place(x, &sum))) }
}

/// `to = x + y`.
pub fn add_into(to: Tensor, x: Tensor, y: Tensor) -> Result<()> {
    copy(to, combine(x, Sign::Plus, y)?.raw())
}
