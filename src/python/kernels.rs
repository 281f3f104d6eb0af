//! Which kernels are used on a GPU: thin functions around [`crate::cuda::trust`].

use std::path::PathBuf;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::error::{detached, kept};
use crate::base::error::Result;
use crate::cuda::kernels::{ALL, KernelSource};
use crate::cuda::trust::{self, Family};
use crate::cuda::{self, cache, is_emulated, private_folder};

/// Tries the kernels of a GPU, and settles which are used; what it finds is no exception.
fn trial(gpu: i32) -> Result<()> {
    Python::attach(|py| {
        let settle = py.import("oddsmith.check.kernels")?.getattr("settle")?;
        settle.call1((gpu,)).map(|_| ())
    })
    .map_err(kept)
}

fn family(name: &str) -> PyResult<Family> {
    let found = Family::ALL.into_iter().find(|family| family.name() == name);
    found.ok_or_else(|| PyValueError::new_err(format!("no family of kernels is named {name:?}")))
}

fn source(name: &str) -> PyResult<&'static KernelSource> {
    let found = ALL.into_iter().find(|source| source.name == name);
    found.ok_or_else(|| PyValueError::new_err(format!("no kernel source is named {name:?}")))
}

/// Names of the families of kernels, each with the names of its sources.
#[pyfunction]
fn kernel_families() -> Vec<(&'static str, Vec<&'static str>)> {
    let sources = |family: Family| family.sources().iter().map(|source| source.name).collect();
    Family::ALL.into_iter().map(|family| (family.name(), sources(family))).collect()
}

/// A digest of the sources, the compiler, the driver's interface and the architecture of a GPU.
#[pyfunction]
fn kernel_identity(py: Python<'_>, gpu: i32) -> PyResult<String> {
    Ok(detached(py, move || cuda::identity(gpu))?.to_string())
}

/// Compiles a source for a GPU and loads it.
#[pyfunction]
fn load_kernels(py: Python<'_>, gpu: i32, source: &str) -> PyResult<()> {
    let source = self::source(source)?;
    detached(py, move || cuda::load(gpu, source))
}

/// Uses these families on a GPU and no others; with None, the next call tries the GPU's kernels.
#[pyfunction]
#[pyo3(signature = (gpu, families))]
fn trust_kernels(gpu: i32, families: Option<Vec<String>>) -> PyResult<()> {
    let named = |names: Vec<String>| names.iter().map(|name| family(name)).collect::<PyResult<Vec<_>>>();
    let families = families.map(named).transpose()?;
    Ok(trust::settle(gpu, families.as_deref())?)
}

/// The families that are used on a GPU; None before its trial.
#[pyfunction]
fn trusted_kernels(gpu: i32) -> Option<Vec<&'static str>> {
    Some(trust::trusted(gpu)?.into_iter().map(Family::name).collect())
}

/// Whether CPU tensors take the path of a GPU.
#[pyfunction]
fn emulates_cuda() -> bool {
    is_emulated()
}

/// Says a line in Python's log.
fn notice(line: &str) {
    Python::attach(|py| {
        let logger = || py.import("logging")?.call_method1("getLogger", ("oddsmith.check.kernels",));
        // The line is not worth an exception, of a handler of the user's.
        let _ = logger().and_then(|logger| logger.call_method1("warning", ("%s", line)));
    });
}

/// Why files of a folder are not used, and what to do; None if they are, or the folder is not there yet.
#[pyfunction]
#[allow(clippy::needless_pass_by_value)] // pyo3 passes extracted values by value
fn kernel_folder_fault(path: PathBuf) -> Option<(String, String)> {
    private_folder::fault(&path).map(|fault| (fault.what, fault.remedy))
}

/// The content of a file that nobody but this user can change; None if there is none.
#[pyfunction]
#[allow(clippy::needless_pass_by_value)] // as above
fn read_private(py: Python<'_>, path: PathBuf, most: u64) -> PyResult<Option<Bound<'_, PyBytes>>> {
    let read = py.detach(|| private_folder::read(&path, most));
    let content = read.map_err(|why| PyValueError::new_err(format!("{} {why}", path.display())))?;
    Ok(content.map(|content| PyBytes::new(py, &content)))
}

/// Adds the functions to the module, and the trial of a GPU to the core.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    trust::on_first_use(trial);
    cache::on_notice(notice);
    module.add_function(wrap_pyfunction!(kernel_folder_fault, module)?)?;
    module.add_function(wrap_pyfunction!(read_private, module)?)?;
    module.add_function(wrap_pyfunction!(kernel_families, module)?)?;
    module.add_function(wrap_pyfunction!(kernel_identity, module)?)?;
    module.add_function(wrap_pyfunction!(load_kernels, module)?)?;
    module.add_function(wrap_pyfunction!(trust_kernels, module)?)?;
    module.add_function(wrap_pyfunction!(trusted_kernels, module)?)?;
    module.add_function(wrap_pyfunction!(emulates_cuda, module)?)
}
