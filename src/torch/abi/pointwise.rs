//! Operators on each element.

use torch_sys::{C_scalar, C_tensor};

use super::call::{Value, call, operators};
use super::handle::{Handle, put};
use super::scalar::Scalar;

type Tensor = *mut C_tensor;

operators! {
    atg_abs(x: Tensor) => c"aten::abs", c"", [Tensor(x)];
    atg_exp(x: Tensor) => c"aten::exp", c"", [Tensor(x)];
    atg_log(x: Tensor) => c"aten::log", c"", [Tensor(x)];
    atg_neg(x: Tensor) => c"aten::neg", c"", [Tensor(x)];
    atg_reciprocal(x: Tensor) => c"aten::reciprocal", c"", [Tensor(x)];
    atg_square(x: Tensor) => c"aten::square", c"", [Tensor(x)];
    atg_tanh(x: Tensor) => c"aten::tanh", c"", [Tensor(x)];

    atg_bitwise_or_tensor(x: Tensor, y: Tensor) => c"aten::bitwise_or", c"Tensor", [Tensor(x), Tensor(y)];
    atg_div(x: Tensor, y: Tensor) => c"aten::div", c"Tensor", [Tensor(x), Tensor(y)];
    atg_logical_and(x: Tensor, y: Tensor) => c"aten::logical_and", c"", [Tensor(x), Tensor(y)];
    atg_logical_and_(x: Tensor, y: Tensor) => c"aten::logical_and_", c"", [Tensor(x), Tensor(y)];
    atg_logical_or(x: Tensor, y: Tensor) => c"aten::logical_or", c"", [Tensor(x), Tensor(y)];
    atg_maximum(x: Tensor, y: Tensor) => c"aten::maximum", c"", [Tensor(x), Tensor(y)];
    atg_mul(x: Tensor, y: Tensor) => c"aten::mul", c"Tensor", [Tensor(x), Tensor(y)];
    atg_mul_(x: Tensor, y: Tensor) => c"aten::mul_", c"Tensor", [Tensor(x), Tensor(y)];
    atg_where_self(condition: Tensor, x: Tensor, y: Tensor) =>
        c"aten::where", c"self", [Tensor(condition), Tensor(x), Tensor(y)];
}

/// Defines functions of tch on a tensor and a scalar by the operators on two tensors.
macro_rules! with_scalar {
    ($( $name:ident => $op:literal, $overload:literal; )*) => { $(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name(out: *mut Tensor, x: Tensor, scalar: *mut C_scalar) {
            let make = |scalar: Handle| {
                call($op, $overload, [Value::Tensor(x), Value::Tensor(scalar.raw())])
            };
            // SAFETY: tch's arguments.
            unsafe { put(out, Scalar::read(scalar).beside(x).and_then(make)) }
        }
    )* };
}

with_scalar! {
    atg_bitwise_and => c"aten::bitwise_and", c"Tensor";
    atg_bitwise_left_shift_tensor_scalar => c"aten::bitwise_left_shift", c"Tensor";
    atg_bitwise_right_shift_tensor_scalar => c"aten::bitwise_right_shift", c"Tensor";
    // NaN stays NaN, as in `clamp_min`.
    atg_clamp_min => c"aten::maximum", c"";
    atg_div_scalar => c"aten::div", c"Tensor";
    atg_ge => c"aten::ge", c"Tensor";
    atg_lt => c"aten::lt", c"Tensor";
    atg_mul_scalar => c"aten::mul", c"Tensor";
}

/// By the larger of `x` and the least, then the smaller: `clamp` wants its bounds on the device of `x`.
#[unsafe(no_mangle)]
unsafe extern "C" fn atg_clamp(out: *mut Tensor, x: Tensor, least: *mut C_scalar, most: *mut C_scalar) {
    let make = || {
        // SAFETY: tch's arguments.
        let (least, most) = unsafe { (Scalar::read(least).beside(x)?, Scalar::read(most).beside(x)?) };
        let larger = call(c"aten::maximum", c"", [Value::Tensor(x), Value::Tensor(least.raw())])?;
        call(c"aten::minimum", c"", [Value::Tensor(larger.raw()), Value::Tensor(most.raw())])
    };
    // SAFETY: tch's arguments.
    unsafe { put(out, make()) }
}
