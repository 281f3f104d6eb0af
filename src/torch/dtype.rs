//! Dtypes of tensors: their names, what an op allows, and the kernels for them.

use tch::Kind;

use crate::base::error::{Error, Result};
use crate::base::float::Dtype;

/// The dtype's name in Python.
#[must_use]
pub fn dtype_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Float => "float32",
        Kind::Double => "float64",
        Kind::Half => "float16",
        Kind::BFloat16 => "bfloat16",
        Kind::Int64 => "int64",
        Kind::Int => "int32",
        Kind::Int16 => "int16",
        Kind::Int8 => "int8",
        Kind::Uint8 => "uint8",
        Kind::Bool => "bool",
        _ => "another dtype",
    }
}

/// Checks that a dtype is one of those that an op takes.
///
/// # Errors
/// If it is not allowed; the error names the argument.
pub fn check_kind(op: &'static str, argument: &'static str, got: Kind, allowed: &[Kind]) -> Result<()> {
    if allowed.contains(&got) {
        return Ok(());
    }
    let expected = allowed.iter().map(|&kind| dtype_name(kind)).collect::<Vec<_>>().join(", ");
    Err(Error::Dtype { op, argument, expected, got: dtype_name(got).into() })
}

/// The dtypes that can be quantised from and dequantised to.
pub const FLOATS: [Kind; 3] = [Kind::Float, Kind::BFloat16, Kind::Half];

/// The dtype in the slice algorithms.
#[must_use]
pub fn dtype(kind: Kind) -> Dtype {
    match kind {
        Kind::BFloat16 => Dtype::Bf16,
        Kind::Half => Dtype::F16,
        _ => Dtype::F32,
    }
}

/// Selects the kernel of a dtype from those for `float32`, `bfloat16` and `float16`.
#[must_use]
pub fn named(kind: Kind, [f32, bf16, f16]: [&'static str; 3]) -> &'static str {
    match kind {
        Kind::BFloat16 => bf16,
        Kind::Half => f16,
        _ => f32,
    }
}

/// The names of an op's kernels by dtype, for [`named`].
macro_rules! names {
    ($op:literal) => {
        [concat!($op, "_f32"), concat!($op, "_bf16"), concat!($op, "_f16")]
    };
}
pub(super) use names;
