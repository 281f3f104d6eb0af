//! The Python module `oddsmith._core`: conversions and thin functions.

mod allocator;
mod checkpoint;
mod data;
mod error;
mod head;
mod optim;
mod quant;
mod tensor;
#[cfg(feature = "testing")]
mod testing;

use std::path::PathBuf;

use pyo3::exceptions::PyImportError;
use pyo3::prelude::*;

/// Looks up what is used of the torch that Python imports.
fn load_torch(py: Python<'_>) -> PyResult<()> {
    let torch = py.import("torch")?;
    let folder: PathBuf = torch.getattr("__path__")?.get_item(0)?.extract()?;
    crate::torch::abi::load(&folder.join("lib")).map_err(|lack| {
        let version = torch.getattr("__version__").map_or_else(|_| "?".into(), |version| version.to_string());
        PyImportError::new_err(format!(
            "oddsmith needs torch {OLDEST_TORCH} or newer, complete; torch {version} {lack}"
        ))
    })
}

/// The first torch whose stable interface has what is used.
const OLDEST_TORCH: &str = "2.10";

/// The compiled core of oddsmith. Use the public functions of `oddsmith.functional` instead.
#[pymodule]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    crate::base::threads::remember_process();
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    load_torch(module.py())?;
    data::register(module)?;
    allocator::register(module)?;
    head::register(module)?;
    quant::register(module)?;
    optim::register(module)?;
    checkpoint::register(module)?;
    #[cfg(feature = "testing")]
    testing::register(module)?;
    Ok(())
}
