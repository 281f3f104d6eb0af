//! The pool of CPU tensors.

use pyo3::prelude::*;

#[pyfunction]
fn install_pool() -> bool {
    #[cfg(target_os = "linux")]
    return crate::torch::allocator::pool::install();
    #[cfg(not(target_os = "linux"))]
    false
}

#[pyfunction]
fn uninstall_pool() {
    #[cfg(target_os = "linux")]
    crate::torch::allocator::pool::uninstall();
}

pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(install_pool, module)?)?;
    module.add_function(wrap_pyfunction!(uninstall_pool, module)?)
}
