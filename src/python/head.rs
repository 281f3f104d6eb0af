//! The head's ops.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use tch::Tensor;

use super::error::detached;
use super::tensor::PyTensor;
use crate::head::odds_ratio::{Link, NllScope};
use crate::head::scores::Objective;
use crate::torch::device;
use crate::torch::head;
use crate::torch::head::args::{Args, Pairs, Wants};

/// The tensors and numbers that every op of the head starts with.
struct Inputs {
    hidden: PyTensor,
    weight: PyTensor,
    bias: Option<PyTensor>,
    targets: PyTensor,
    softcap: Option<f64>,
    logit_scale: f64,
}

impl Inputs {
    fn args(&self, op: &'static str) -> Args<'_> {
        Args {
            op,
            hidden: &self.hidden.0,
            weight: &self.weight.0,
            bias: self.bias.as_ref().map(|bias| &bias.0),
            targets: &self.targets.0,
            softcap: self.softcap,
            logit_scale: self.logit_scale,
        }
    }
}

fn wants((hidden, weight, bias): (bool, bool, bool)) -> Wants {
    Wants { hidden, weight, bias }
}

fn list(tensors: impl IntoIterator<Item = Tensor>) -> Vec<PyTensor> {
    tensors.into_iter().map(PyTensor).collect()
}

fn one_of<T: Copy>(argument: &str, got: &str, choices: &[(&str, T)]) -> PyResult<T> {
    if let Some((_, value)) = choices.iter().find(|(name, _)| *name == got) {
        return Ok(*value);
    }
    let names: Vec<String> = choices.iter().map(|(name, _)| format!("\"{name}\"")).collect();
    let allowed = names.join(" or ");
    Err(PyValueError::new_err(format!("linear_orpo: {argument} is \"{got}\"; must be {allowed}")))
}

#[pyfunction]
#[allow(clippy::too_many_arguments)] // the op's schema, called from one place
fn linear_logps(
    py: Python<'_>,
    hidden: PyTensor,
    weight: PyTensor,
    bias: Option<PyTensor>,
    targets: PyTensor,
    softcap: Option<f64>,
    logit_scale: f64,
    expectation: bool,
) -> PyResult<Vec<PyTensor>> {
    let inputs = Inputs { hidden, weight, bias, targets, softcap, logit_scale };
    Ok(list(detached(py, move || head::logps(&inputs.args("linear_logps"), expectation))?))
}

#[pyfunction]
#[allow(clippy::too_many_arguments)] // the op's schema, called from one place
fn linear_logps_backward(
    py: Python<'_>,
    hidden: PyTensor,
    weight: PyTensor,
    bias: Option<PyTensor>,
    targets: PyTensor,
    softcap: Option<f64>,
    logit_scale: f64,
    lse: PyTensor,
    upstream: PyTensor,
    needs: (bool, bool, bool),
) -> PyResult<Vec<PyTensor>> {
    let inputs = Inputs { hidden, weight, bias, targets, softcap, logit_scale };
    let run = move || head::logps_backward(&inputs.args("linear_logps"), &lse.0, &upstream.0, wants(needs));
    Ok(list(detached(py, run)?))
}

#[pyfunction]
#[allow(clippy::too_many_arguments)] // the op's schema, called from one place
fn linear_orpo(
    py: Python<'_>,
    hidden: PyTensor,
    weight: PyTensor,
    bias: Option<PyTensor>,
    targets: PyTensor,
    softcap: Option<f64>,
    logit_scale: f64,
    sequence: PyTensor,
    completion: PyTensor,
    num_pairs: Option<i64>,
    num_scored: Option<i64>,
    beta: f64,
    nll_scope: &str,
    odds_ratio_link: &str,
    logits_budget: Option<i64>,
    needs: (bool, bool, bool),
) -> PyResult<Vec<PyTensor>> {
    let scopes = [("full", NllScope::Full), ("completion", NllScope::Completion)];
    let links = [("logsigmoid", Link::LogSigmoid), ("identity", Link::Identity)];
    let negative =
        |_| PyValueError::new_err("linear_orpo: logits_budget is negative; must be a number of bytes");
    let budget = logits_budget.map(usize::try_from).transpose().map_err(negative)?;
    let objective = Objective {
        beta,
        scope: one_of("nll_scope", nll_scope, &scopes)?,
        link: one_of("odds_ratio_link", odds_ratio_link, &links)?,
        budget,
    };
    let inputs = Inputs { hidden, weight, bias, targets, softcap, logit_scale };
    let run = move || {
        let pairs =
            Pairs { sequence: &sequence.0, completion: &completion.0, count: num_pairs, scored: num_scored };
        head::orpo(&inputs.args("linear_orpo"), &pairs, objective, wants(needs))
    };
    Ok(list(detached(py, run)?))
}

/// `gradient *= factor` in place, on a card; false where nothing has been done.
#[pyfunction]
fn scale_gradient(py: Python<'_>, gradient: PyTensor, factor: PyTensor) -> PyResult<bool> {
    detached(py, move || head::cuda::scale(&gradient.0, &factor.0))
}

/// Makes CPU tensors take the path of other devices, for tests.
#[pyfunction]
fn use_tensor_ops(on: bool) {
    device::use_tensor_ops(on);
}

/// Adds the head's functions to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(linear_logps, module)?)?;
    module.add_function(wrap_pyfunction!(linear_logps_backward, module)?)?;
    module.add_function(wrap_pyfunction!(linear_orpo, module)?)?;
    module.add_function(wrap_pyfunction!(scale_gradient, module)?)?;
    module.add_function(wrap_pyfunction!(use_tensor_ops, module)?)
}
