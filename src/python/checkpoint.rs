//! Thin functions around [`crate::checkpoint`].

use std::path::PathBuf;
use std::sync::Mutex;

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;

use super::error::detached;
use super::tensor::PyTensor;
use crate::base::error::Error;
use crate::checkpoint::collection::Collection;
use crate::checkpoint::convert::{Job, size};
use crate::checkpoint::file::TensorFile;
use crate::checkpoint::rule::{Factor, MergeUpdate, Target, TensorRule};
use crate::checkpoint::state::{State, dtype_name, dtype_of};
use crate::torch::checkpoint::run;

/// `oddsmith.checkpoint.rules.Factor`.
#[derive(FromPyObject)]
struct FactorParts {
    name: String,
    transposed: bool,
}

/// `oddsmith.checkpoint.rules.MergeUpdate`.
#[derive(FromPyObject)]
struct UpdateParts {
    left: FactorParts,
    right: Option<FactorParts>,
    scale: f64,
    magnitude: Option<String>,
}

/// `oddsmith.checkpoint.rules.TensorRule`.
#[derive(FromPyObject)]
struct RuleParts {
    name: String,
    replacement: Option<String>,
    update: Option<UpdateParts>,
    transposed: bool,
    quantize: bool,
    dtype: String,
    blocksize: usize,
    double_quant: bool,
}

impl From<FactorParts> for Factor {
    fn from(parts: FactorParts) -> Self {
        Self { name: parts.name, transposed: parts.transposed }
    }
}

impl From<UpdateParts> for MergeUpdate {
    fn from(parts: UpdateParts) -> Self {
        let (left, right) = (parts.left.into(), parts.right.map(Into::into));
        Self { left, right, scale: parts.scale as f32, magnitude: parts.magnitude }
    }
}

fn rules(parts: Vec<RuleParts>) -> PyResult<Vec<TensorRule>> {
    let rule = |parts: RuleParts| {
        let RuleParts { name, replacement, update, transposed, quantize, dtype, blocksize, double_quant } =
            parts;
        let Some(dtype) = dtype_of(&dtype) else {
            let allowed = "float32, bfloat16, float16";
            return Err(PyTypeError::new_err(format!("checkpoint: dtype is {dtype}; must be {allowed}")));
        };
        let target = if quantize {
            Target::Nf4 { dtype, blocksize, double: double_quant }
        } else {
            Target::Float(dtype)
        };
        Ok(TensorRule { name, replacement, update: update.map(Into::into), transposed, target })
    };
    parts.into_iter().map(rule).collect()
}

/// A tensor of a file, as a dictionary.
#[derive(IntoPyObject)]
struct TensorParts {
    name: String,
    kind: String,
    shape: Vec<usize>,
}

/// The state of a 4-bit weight, as a dictionary.
#[derive(IntoPyObject)]
struct StateParts {
    shape: Vec<usize>,
    dtype: &'static str,
    blocksize: usize,
    double_quant: bool,
}

/// A file that was written, as a dictionary.
#[derive(IntoPyObject)]
struct WrittenParts {
    names: Vec<String>,
    len: usize,
}

/// All tensors of a file, in its order.
#[pyfunction]
fn checkpoint_tensors(py: Python<'_>, path: PathBuf) -> PyResult<Vec<TensorParts>> {
    detached(py, move || {
        let file = TensorFile::open(&path)?;
        let entry = |name: &str| {
            let entry = &file.entries()[name];
            TensorParts { name: name.to_owned(), kind: entry.kind.to_string(), shape: entry.shape.clone() }
        };
        Ok(file.in_order().into_iter().map(entry).collect())
    })
}

/// The states of 4-bit weights; `None` for others.
#[pyfunction]
fn checkpoint_states(
    py: Python<'_>,
    base: Vec<PathBuf>,
    names: Vec<String>,
) -> PyResult<Vec<Option<StateParts>>> {
    detached(py, move || {
        let base = Collection::open(&base)?;
        let state = |name: &String| {
            let state = State::read(&base, name)?;
            Ok(state.map(|state| {
                let (dtype, double_quant) = (dtype_name(state.dtype), state.double());
                StateParts { shape: state.shape, dtype, blocksize: state.blocksize, double_quant }
            }))
        };
        names.iter().map(state).collect()
    })
}

fn with_job<R>(
    (base, adapter): (Vec<PathBuf>, Option<PathBuf>),
    rules: Vec<TensorRule>,
    outputs: Vec<PathBuf>,
    f: impl FnOnce(&Job<'_>) -> Result<R, Error>,
) -> Result<R, Error> {
    let base = Collection::open(&base)?;
    let adapter = adapter.map(|path| Collection::open(&[path])).transpose()?;
    f(&Job { base: &base, adapter: adapter.as_ref(), rules, outputs })
}

/// Checks all rules before writing, and returns the number of bytes to write.
#[pyfunction]
fn converted_size(
    py: Python<'_>,
    base: Vec<PathBuf>,
    adapter: Option<PathBuf>,
    rules: Vec<RuleParts>,
) -> PyResult<usize> {
    let rules = self::rules(rules)?;
    // The names of these outputs are not used.
    let outputs = base.clone();
    detached(py, move || with_job((base, adapter), rules, outputs, size))
}

#[pyfunction]
#[allow(clippy::too_many_arguments, clippy::needless_pass_by_value)] // called from one place
fn convert_checkpoint(
    py: Python<'_>,
    base: Vec<PathBuf>,
    adapter: Option<PathBuf>,
    rules: Vec<RuleParts>,
    outputs: Vec<PathBuf>,
    code: PyTensor,
    progress: Py<PyAny>,
) -> PyResult<Vec<WrittenParts>> {
    if base.is_empty() {
        return Err(PyValueError::new_err("checkpoint: base has no files"));
    }
    let rules = self::rules(rules)?;
    // The exception of the callback; the core is only told to stop.
    let raised = Mutex::new(None);
    let mut tell = |bytes: usize| {
        let told = Python::attach(|py| {
            py.check_signals()?;
            progress.call1(py, (bytes,)).map(|_| ())
        });
        told.map_err(|error| {
            if let Ok(mut slot) = raised.lock() {
                *slot = Some(error);
            }
            Error::Stopped
        })
    };
    let (code, tell) = (code.0, &mut tell);
    let written =
        detached(py, move || with_job((base, adapter), rules, outputs, |job| run(job, &code, tell)));
    if let Some(error) = raised.into_inner().ok().flatten() {
        return Err(error);
    }
    Ok(written?.into_iter().map(|file| WrittenParts { names: file.names, len: file.len }).collect())
}

/// Adds the functions of checkpoints to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(checkpoint_tensors, module)?)?;
    module.add_function(wrap_pyfunction!(checkpoint_states, module)?)?;
    module.add_function(wrap_pyfunction!(converted_size, module)?)?;
    module.add_function(wrap_pyfunction!(convert_checkpoint, module)?)
}
