//! Thin functions around [`crate::torch::quant`].

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use tch::Kind;

use super::error::detached;
use super::tensor::PyTensor;
use crate::torch::quant;
use crate::torch::quant::args::{Nested, Size, Weight};
use crate::torch::quant::linear;

/// `oddsmith.quant.arguments.NestedScales`.
#[derive(FromPyObject)]
struct NestedScales {
    absmax: PyTensor,
    code: PyTensor,
    offset: PyTensor,
    blocksize: i64,
}

/// `oddsmith.quant.arguments.PackedWeight`.
#[derive(FromPyObject)]
struct PackedWeight {
    packed: PyTensor,
    absmax: PyTensor,
    nested: Option<NestedScales>,
    blocksize: i64,
}

impl PackedWeight {
    fn of(self, op: &'static str) -> Weight {
        let nested = self.nested.map(|nested| Nested {
            absmax: nested.absmax.0,
            map: nested.code.0,
            offset: nested.offset.0,
            blocksize: nested.blocksize,
        });
        Weight { op, packed: self.packed.0, absmax: self.absmax.0, nested, blocksize: self.blocksize }
    }
}

fn kind(op: &str, dtype: &str) -> PyResult<Kind> {
    match dtype {
        "float32" => Ok(Kind::Float),
        "bfloat16" => Ok(Kind::BFloat16),
        "float16" => Ok(Kind::Half),
        _ => {
            let allowed = "float32, bfloat16, float16";
            Err(PyTypeError::new_err(format!("{op}: dtype is {dtype}; must be {allowed}")))
        }
    }
}

/// The 16 values of the NF4 code.
#[pyfunction]
fn nf4_code(py: Python<'_>) -> PyResult<PyTensor> {
    Ok(PyTensor(detached(py, quant::code)?))
}

#[pyfunction]
fn quantize_nf4(py: Python<'_>, tensor: PyTensor, blocksize: i64) -> PyResult<(PyTensor, PyTensor)> {
    let [packed, absmax] = detached(py, move || quant::quantize_nf4(&tensor.0, blocksize))?;
    Ok((PyTensor(packed), PyTensor(absmax)))
}

#[pyfunction]
fn dequantize_nf4(py: Python<'_>, weight: PackedWeight, shape: Vec<i64>, dtype: &str) -> PyResult<PyTensor> {
    const OP: &str = "dequantize_nf4";
    let kind = kind(OP, dtype)?;
    let weight = weight.of(OP);
    Ok(PyTensor(detached(py, move || quant::dequantize_nf4(weight, &shape, kind))?))
}

#[pyfunction]
fn linear_nf4(
    py: Python<'_>,
    x: PyTensor,
    weight: PackedWeight,
    shape: (i64, i64),
    bias: Option<PyTensor>,
) -> PyResult<PyTensor> {
    let weight = weight.of("linear_nf4");
    let size = Size { rows: shape.0, columns: shape.1 };
    let run = move || linear::forward(weight, size, &x.0, bias.as_ref().map(|bias| &bias.0));
    Ok(PyTensor(detached(py, run)?))
}

#[pyfunction]
fn linear_nf4_input_gradient(
    py: Python<'_>,
    grad: PyTensor,
    weight: PackedWeight,
    shape: (i64, i64),
    weight_dtype: &str,
) -> PyResult<PyTensor> {
    const OP: &str = "linear_nf4";
    let kind = kind(OP, weight_dtype)?;
    let weight = weight.of(OP);
    let size = Size { rows: shape.0, columns: shape.1 };
    Ok(PyTensor(detached(py, move || linear::input_gradient(weight, size, &grad.0, kind))?))
}

#[pyfunction]
fn quantize_blockwise(
    py: Python<'_>,
    tensor: PyTensor,
    code: PyTensor,
    blocksize: i64,
) -> PyResult<(PyTensor, PyTensor)> {
    let run = move || quant::quantize_blockwise(&tensor.0, &code.0, blocksize);
    let [codes, absmax] = detached(py, run)?;
    Ok((PyTensor(codes), PyTensor(absmax)))
}

#[pyfunction]
fn dequantize_blockwise(
    py: Python<'_>,
    codes: PyTensor,
    absmax: PyTensor,
    code: PyTensor,
    blocksize: i64,
    dtype: &str,
) -> PyResult<PyTensor> {
    let kind = kind("dequantize_blockwise", dtype)?;
    let run = move || quant::dequantize_blockwise(&codes.0, &absmax.0, &code.0, blocksize, kind);
    Ok(PyTensor(detached(py, run)?))
}

/// Adds the functions of quantisation to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(nf4_code, module)?)?;
    module.add_function(wrap_pyfunction!(quantize_nf4, module)?)?;
    module.add_function(wrap_pyfunction!(dequantize_nf4, module)?)?;
    module.add_function(wrap_pyfunction!(linear_nf4, module)?)?;
    module.add_function(wrap_pyfunction!(linear_nf4_input_gradient, module)?)?;
    module.add_function(wrap_pyfunction!(quantize_blockwise, module)?)?;
    module.add_function(wrap_pyfunction!(dequantize_blockwise, module)?)
}
