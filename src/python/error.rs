//! Errors as Python exceptions.

use std::panic::{AssertUnwindSafe, catch_unwind};

use pyo3::exceptions::{PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;

use crate::error::{Error, Result};

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        let message = error.to_string();
        match error {
            Error::Shape { .. } | Error::Value { .. } => PyValueError::new_err(message),
            Error::Dtype { .. } => PyTypeError::new_err(message),
            Error::Torch(_) | Error::Internal(_) => PyRuntimeError::new_err(message),
        }
    }
}

/// Runs `f` without the GIL. A panic becomes an ordinary exception: pyo3's own `PanicException`
/// is no `Exception`, and would pass through handlers that expect one.
pub fn detached<R: Send>(py: Python<'_>, f: impl FnOnce() -> Result<R> + Send) -> PyResult<R> {
    let run = move || catch_unwind(AssertUnwindSafe(f));
    let result = py.detach(run).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("panic");
        Err(Error::Internal(text.to_owned()))
    });
    Ok(result?)
}
