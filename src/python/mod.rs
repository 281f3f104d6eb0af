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

use pyo3::prelude::*;

/// The compiled core of oddsmith. Use the public functions of `oddsmith.functional` instead.
#[pymodule]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    crate::base::threads::remember_process();
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add("TORCH_BUILD_VERSION", env!("TORCH_BUILD_VERSION"))?;
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
