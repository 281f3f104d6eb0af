//! The head's ops.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use tch::Tensor;

use super::error::detached;
use super::tensor::PyTensor;
use crate::head::odds_ratio::{Link, NllScope};
use crate::head::scores::Objective;
use crate::torch::head;
use crate::torch::head::args::{Args, Pairs, Report, Wants};

/// `oddsmith.head.arguments.HeadArguments`: the common arguments of the head's ops.
#[derive(FromPyObject)]
struct HeadArguments {
    hidden: PyTensor,
    weight: PyTensor,
    bias: Option<PyTensor>,
    targets: PyTensor,
    softcap: Option<f64>,
    logit_scale: f64,
}

/// `oddsmith.head.arguments.PairArguments`.
#[derive(FromPyObject)]
struct PairArguments {
    sequence: PyTensor,
    completion: PyTensor,
    num_pairs: Option<i64>,
    num_scored: Option<i64>,
}

/// `oddsmith.head.arguments.ObjectiveArguments`.
#[derive(FromPyObject)]
struct ObjectiveArguments {
    beta: f64,
    nll_scope: String,
    odds_ratio_link: String,
    logits_budget: Option<i64>,
}

/// `oddsmith.head.arguments.Needs`.
#[derive(FromPyObject)]
struct Needs {
    hidden: bool,
    weight: bool,
    bias: bool,
}

/// Log-probabilities, as a dictionary.
#[derive(IntoPyObject)]
struct ForwardParts {
    logps: PyTensor,
    lse: PyTensor,
    expectation: PyTensor,
}

/// Gradients, as a dictionary; empty if not needed.
#[derive(IntoPyObject)]
struct GradientParts {
    hidden: PyTensor,
    weight: PyTensor,
    bias: PyTensor,
}

/// The loss and the reported metrics, as a dictionary, with the names of `LinearORPOOutput`.
#[derive(IntoPyObject)]
struct ReportParts {
    loss: PyTensor,
    nll_loss: PyTensor,
    chosen_logps: PyTensor,
    rejected_logps: PyTensor,
    log_odds_chosen: PyTensor,
    log_odds_ratio: PyTensor,
    chosen_logits: PyTensor,
    rejected_logits: PyTensor,
    empty_completions: PyTensor,
    gradients: GradientParts,
}

impl HeadArguments {
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

impl From<Needs> for Wants {
    fn from(Needs { hidden, weight, bias }: Needs) -> Self {
        Self { hidden, weight, bias }
    }
}

impl From<[Tensor; 3]> for GradientParts {
    fn from(gradients: [Tensor; 3]) -> Self {
        let [hidden, weight, bias] = gradients.map(PyTensor);
        Self { hidden, weight, bias }
    }
}

impl From<Report> for ReportParts {
    fn from(report: Report) -> Self {
        Self {
            loss: PyTensor(report.loss),
            nll_loss: PyTensor(report.nll),
            chosen_logps: PyTensor(report.chosen),
            rejected_logps: PyTensor(report.rejected),
            log_odds_chosen: PyTensor(report.log_odds),
            log_odds_ratio: PyTensor(report.log_sigmoid),
            chosen_logits: PyTensor(report.chosen_logits),
            rejected_logits: PyTensor(report.rejected_logits),
            empty_completions: PyTensor(report.empty),
            gradients: report.gradients.into(),
        }
    }
}

impl TryFrom<ObjectiveArguments> for Objective {
    type Error = PyErr;

    fn try_from(arguments: ObjectiveArguments) -> PyResult<Self> {
        let scopes = [("full", NllScope::Full), ("completion", NllScope::Completion)];
        let links = [("logsigmoid", Link::LogSigmoid), ("identity", Link::Identity)];
        let negative =
            |_| PyValueError::new_err("linear_orpo: logits_budget is negative; must be a number of bytes");
        Ok(Self {
            beta: arguments.beta,
            scope: one_of("nll_scope", &arguments.nll_scope, &scopes)?,
            link: one_of("odds_ratio_link", &arguments.odds_ratio_link, &links)?,
            budget: arguments.logits_budget.map(usize::try_from).transpose().map_err(negative)?,
        })
    }
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
fn linear_logps(py: Python<'_>, head: HeadArguments, expectation: bool) -> PyResult<ForwardParts> {
    let run = move || head::logps(&head.args("linear_logps"), expectation);
    let [logps, lse, expectation] = detached(py, run)?.map(PyTensor);
    Ok(ForwardParts { logps, lse, expectation })
}

#[pyfunction]
fn linear_logps_backward(
    py: Python<'_>,
    head: HeadArguments,
    lse: PyTensor,
    upstream: PyTensor,
    needs: Needs,
) -> PyResult<GradientParts> {
    let run = move || head::logps_backward(&head.args("linear_logps"), &lse.0, &upstream.0, needs.into());
    Ok(detached(py, run)?.into())
}

#[pyfunction]
fn linear_orpo(
    py: Python<'_>,
    head: HeadArguments,
    pairs: PairArguments,
    objective: ObjectiveArguments,
    needs: Needs,
) -> PyResult<ReportParts> {
    let objective = objective.try_into()?;
    let run = move || {
        let pairs = Pairs {
            sequence: &pairs.sequence.0,
            completion: &pairs.completion.0,
            count: pairs.num_pairs,
            scored: pairs.num_scored,
        };
        head::orpo(&head.args("linear_orpo"), &pairs, objective, needs.into())
    };
    Ok(detached(py, run)?.into())
}

/// `gradient *= factor` in place, on a GPU; false if nothing was done.
#[pyfunction]
fn scale_gradient(py: Python<'_>, gradient: PyTensor, factor: PyTensor) -> PyResult<bool> {
    detached(py, move || head::cuda::scale(&gradient.0, &factor.0))
}

/// Adds the head's functions to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(linear_logps, module)?)?;
    module.add_function(wrap_pyfunction!(linear_logps_backward, module)?)?;
    module.add_function(wrap_pyfunction!(linear_orpo, module)?)?;
    module.add_function(wrap_pyfunction!(scale_gradient, module)?)
}
