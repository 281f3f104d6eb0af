//! The Python module `oddsmith._core`: conversions and thin functions.

mod allocator;
mod checkpoint;
mod data;
mod error;
mod head;
mod kernels;
mod optim;
mod quant;
mod tensor;
#[cfg(feature = "testing")]
mod testing;

use std::path::PathBuf;

use pyo3::prelude::*;

use crate::torch::abi::Fault;

/// Looks up what is used of the torch that Python imports.
fn load_torch(py: Python<'_>) -> PyResult<()> {
    let torch = py.import("torch")?;
    // A build for AMD's GPUs calls them CUDA devices.
    let hip = torch.getattr("version").and_then(|version| version.getattr("hip"));
    crate::cuda::set_foreign(hip.is_ok_and(|hip| !hip.is_none()));
    let package: PathBuf = torch.getattr("__path__")?.get_item(0)?.extract()?;
    crate::torch::abi::load(&package.join("lib")).map_err(|fault| {
        let version = torch.getattr("__version__").map_or_else(|_| "?".into(), |version| version.to_string());
        let text = match fault {
            Fault::Incomplete(lack) => {
                format!("oddsmith needs torch {OLDEST_TORCH} or newer, complete; torch {version} {lack}")
            }
            Fault::Elsewhere(file) => format!(
                "oddsmith found two torches: Python imports torch {version} from {}, and this process has loaded \
                 {}; remove one, or take the second off LD_PRELOAD",
                package.display(),
                file.display()
            ),
        };
        match py.import("oddsmith.errors").and_then(|errors| errors.getattr("TorchError")?.call1((text,))) {
            Ok(error) => PyErr::from_value(error),
            Err(error) => error,
        }
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
    kernels::register(module)?;
    checkpoint::register(module)?;
    #[cfg(feature = "testing")]
    testing::register(module)?;
    Ok(())
}
