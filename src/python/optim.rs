//! Thin functions around [`crate::torch::optim`].

use pyo3::prelude::*;

use super::error::detached;
use super::tensor::PyTensor;
use crate::torch::optim;
use crate::torch::optim::args::{self, Item};

/// Value, gradient, both moments, the scales of 8-bit moments, and the place of the first element.
type Parts = (PyTensor, PyTensor, (PyTensor, PyTensor), Option<(PyTensor, PyTensor)>, i64);

/// `beta1, beta2, eps, step_size, keep`, and the seed of stochastic rounding.
type Numbers = ([f64; 5], Option<u32>);

#[pyfunction]
fn adamw_step(py: Python<'_>, items: Vec<(Parts, Numbers)>, bad: PyTensor) -> PyResult<()> {
    let items = items.into_iter().map(|((value, grad, (m, v), absmax, first), (numbers, seed))| {
        let absmax = absmax.map(|(m, v)| [m.0, v.0]);
        let rule = args::rule(numbers, seed)?;
        Ok(Item { value: value.0, grad: grad.0, moments: [m.0, v.0], absmax, first, rule })
    });
    let items = items.collect::<PyResult<Vec<_>>>()?;
    detached(py, move || optim::adamw_step(items, &bad.0))
}

/// Values of the codes of first and second moments.
#[pyfunction]
fn moment_maps(py: Python<'_>) -> PyResult<(PyTensor, PyTensor)> {
    let [first, second] = detached(py, optim::maps)?;
    Ok((PyTensor(first), PyTensor(second)))
}

/// Adds the functions of optimisers to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(adamw_step, module)?)?;
    module.add_function(wrap_pyfunction!(moment_maps, module)?)
}
