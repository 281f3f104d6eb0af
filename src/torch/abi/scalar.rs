//! Scalars, which the stable interface knows as tensors without dimensions alone.

use std::ffi::c_int;

use torch_sys::{C_scalar, C_tensor};

use super::call::{Value, call};
use super::error::Result;
use super::handle::{Handle, dim, dtype};

/// What is behind tch's pointers to scalars.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scalar {
    /// An integer.
    Int(i64),
    /// A real number.
    Float(f64),
}

#[unsafe(no_mangle)]
extern "C" fn ats_int(value: i64) -> *mut C_scalar {
    Box::into_raw(Box::new(Scalar::Int(value))).cast()
}

#[unsafe(no_mangle)]
extern "C" fn ats_float(value: f64) -> *mut C_scalar {
    Box::into_raw(Box::new(Scalar::Float(value))).cast()
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ats_free(scalar: *mut C_scalar) {
    // SAFETY: made by `ats_int` or `ats_float`, and freed once.
    drop(unsafe { Box::from_raw(scalar.cast::<Scalar>()) });
    super::error::hold();
}

/// libtorch's numbers of integral dtypes end here, those of real ones begin.
const LAST_INTEGRAL: c_int = 4;
const BOOL: c_int = 11;
const FLOAT: c_int = 6;

/// True for integers that can be added; a boolean is none.
pub fn is_integral(dtype: c_int) -> bool {
    (0..=LAST_INTEGRAL).contains(&dtype)
}

impl Scalar {
    /// The scalar behind one of tch's pointers.
    ///
    /// # Safety
    /// Made by `ats_int` or `ats_float`, and not freed.
    pub unsafe fn read(scalar: *mut C_scalar) -> Self {
        // SAFETY: as the caller says.
        unsafe { *scalar.cast::<Self>() }
    }

    /// A tensor on the CPU that stands for the number.
    pub fn alone(self) -> Result<Handle> {
        match self {
            Self::Int(value) => Handle::from("scalar", |torch, out| unsafe {
                (torch.aoti_torch_scalar_to_tensor_int64)(value, out)
            }),
            Self::Float(value) => Handle::from("scalar", |torch, out| unsafe {
                (torch.aoti_torch_scalar_to_tensor_float64)(value, out)
            }),
        }
    }

    /// As [`Scalar::alone`], such that an operator on `x` and it has the dtype of the operator on `x` and
    /// the number. A tensor without dimensions yields to one with dimensions, unless it is real and the other
    /// is integral; between two without, the wider dtype wins.
    pub fn beside(self, x: *mut C_tensor) -> Result<Handle> {
        let alone = self.alone()?;
        let x_dtype = dtype(x)?;
        let whole = is_integral(x_dtype) || x_dtype == BOOL;
        let dtype = match self {
            Self::Float(_) if whole => FLOAT, // torch's default dtype
            Self::Int(_) if x_dtype == BOOL => return Ok(alone),
            _ if dim(x)? == 0 => x_dtype,
            _ => return Ok(alone),
        };
        call(
            c"aten::to",
            c"dtype",
            [
                Value::Tensor(alone.raw()),
                Value::dtype(dtype),
                Value::Bool(false),
                Value::Bool(false),
                Value::None,
            ],
        )
    }
}
