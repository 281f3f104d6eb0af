//! Thin functions around [`crate::torch::optim`].

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use super::error::detached;
use super::tensor::PyTensor;
use crate::torch::optim;
use crate::torch::optim::args::{self, Item};

/// `oddsmith.optim.adamw.arguments.Rule`.
#[derive(FromPyObject)]
struct RuleParts {
    beta1: f64,
    beta2: f64,
    eps: f64,
    step_size: f64,
    keep: f64,
}

/// `oddsmith.optim.adamw.arguments.Item`.
#[derive(FromPyObject)]
struct ItemParts {
    value: PyTensor,
    grad: PyTensor,
    state1: PyTensor,
    state2: PyTensor,
    absmax1: Option<PyTensor>,
    absmax2: Option<PyTensor>,
    first: i64,
    rule: RuleParts,
    seed: Option<u32>,
}

impl ItemParts {
    fn item(self) -> PyResult<Item> {
        let RuleParts { beta1, beta2, eps, step_size, keep } = self.rule;
        let rule = args::rule([beta1, beta2, eps, step_size, keep], self.seed)?;
        let absmax = match (self.absmax1, self.absmax2) {
            (Some(m), Some(v)) => Some([m.0, v.0]),
            (None, None) => None,
            _ => {
                let message = "adamw_step: one of absmax1 and absmax2 is None; must be both or none";
                return Err(PyValueError::new_err(message));
            }
        };
        let moments = [self.state1.0, self.state2.0];
        Ok(Item { value: self.value.0, grad: self.grad.0, moments, absmax, first: self.first, rule })
    }
}

#[pyfunction]
fn adamw_step(py: Python<'_>, items: Vec<ItemParts>, bad: PyTensor) -> PyResult<()> {
    let items = items.into_iter().map(ItemParts::item).collect::<PyResult<Vec<_>>>()?;
    detached(py, move || optim::adamw_step(items, &bad.0))
}

/// True if [`adamw_step`] serves values on the device of this one, with moments of 8 or of 32 bits.
#[pyfunction]
fn adamw_serves(py: Python<'_>, value: PyTensor, eight_bits: bool) -> PyResult<bool> {
    detached(py, move || optim::serves(&value.0, eight_bits))
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
    module.add_function(wrap_pyfunction!(adamw_serves, module)?)?;
    module.add_function(wrap_pyfunction!(moment_maps, module)?)
}
