//! The Python module `oddsmith._core`: conversions and thin functions.

mod allocator;
mod checkpoint;
mod cuda;
mod data;
mod error;
mod head;
mod optim;
mod quant;
mod tensor;

use pyo3::prelude::*;

/// The compiled core of oddsmith. Use the public functions of `oddsmith.functional` instead.
#[pymodule]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add("TORCH_BUILD_VERSION", env!("TORCH_BUILD_VERSION"))?;
    data::register(module)?;
    allocator::register(module)?;
    head::register(module)?;
    quant::register(module)?;
    optim::register(module)?;
    checkpoint::register(module)?;
    cuda::register(module)
}
