//! Which kernels are used on a GPU: thin functions around [`crate::cuda::trust`].

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use super::error::{detached, kept};
use crate::base::error::Result;
use crate::cuda::kernels::{ALL, KernelSource};
use crate::cuda::trust::{self, Family};
use crate::cuda::{self, is_emulated};

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
    Ok(format!("{:032x}", detached(py, move || cuda::identity(gpu))?))
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

/// Adds the functions to the module, and the trial of a GPU to the core.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    trust::on_first_use(trial);
    module.add_function(wrap_pyfunction!(kernel_families, module)?)?;
    module.add_function(wrap_pyfunction!(kernel_identity, module)?)?;
    module.add_function(wrap_pyfunction!(load_kernels, module)?)?;
    module.add_function(wrap_pyfunction!(trust_kernels, module)?)?;
    module.add_function(wrap_pyfunction!(trusted_kernels, module)?)?;
    module.add_function(wrap_pyfunction!(emulates_cuda, module)?)
}
