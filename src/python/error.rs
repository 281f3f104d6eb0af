//! Errors as Python exceptions.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};

use pyo3::exceptions::{PyOSError, PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;

use crate::base::error::{Error, Result};

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        let message = error.to_string();
        match error {
            Error::Shape { .. } | Error::Value { .. } | Error::Row { .. } | Error::File { .. } => {
                PyValueError::new_err(message)
            }
            Error::Dtype { .. } => PyTypeError::new_err(message),
            // Python derives FileNotFoundError and similar classes from the number.
            Error::Io { path, code: Some(code), message } => PyOSError::new_err((code, message, path)),
            Error::Io { .. } => PyOSError::new_err(message),
            Error::Tokenizer(_)
            | Error::Stopped
            | Error::Torch(_)
            | Error::Cuda { .. }
            | Error::Internal(_) => PyRuntimeError::new_err(message),
        }
    }
}

/// Runs `f` without the GIL. A panic becomes an ordinary exception: pyo3's `PanicException` is not an
/// `Exception`, so `except Exception` would not catch it.
pub fn detached<R: Send>(py: Python<'_>, f: impl FnOnce() -> Result<R> + Send) -> PyResult<R> {
    let run = move || catch_unwind(AssertUnwindSafe(f));
    let result = py.detach(run).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("panic");
        Err(Error::Internal(text.to_owned()))
    });
    result.map_err(|error| match error {
        Error::Stopped => RAISED.take().unwrap_or_else(|| error.into()),
        Error::Torch(_) => of_libtorch(py, &error.to_string()).unwrap_or_else(|| error.into()),
        error => error.into(),
    })
}

/// The exception for an error of libtorch, which may be one of memory.
fn of_libtorch(py: Python<'_>, message: &str) -> Option<PyErr> {
    // An exception of Python within libtorch may be left.
    let _ = PyErr::take(py);
    let made = py.import("oddsmith.errors").and_then(|errors| errors.call_method1("of_libtorch", (message,)));
    made.ok().map(PyErr::from_value)
}

thread_local! {
    /// The exception of a call back into Python, while the core returns to the caller.
    static RAISED: Cell<Option<PyErr>> = const { Cell::new(None) };
}

/// Keeps an exception for the [`detached`] call of this thread, which raises it.
pub fn kept(error: PyErr) -> Error {
    RAISED.set(Some(error));
    Error::Stopped
}

#[cfg(test)]
mod tests {
    use pyo3::exceptions::{
        PyException, PyKeyboardInterrupt, PyOSError, PyRuntimeError, PyTypeError, PyValueError,
    };
    use pyo3::prelude::*;

    use super::{detached, kept};
    use crate::base::error::Error;

    /// The Python exception that `run` ends in.
    fn raised(py: Python<'_>, run: impl FnOnce() -> Result<(), Error> + Send) -> Bound<'_, PyException> {
        let error = detached(py, run).expect_err("an error");
        error.into_value(py).into_bound(py).cast_into().expect("an ordinary exception")
    }

    #[test]
    fn each_variant_has_its_exception() {
        let parts = || ("op", "x", String::from("wanted"), String::from("come"));
        Python::initialize();
        Python::attach(|py| {
            let (op, argument, expected, got) = parts();
            let shape = raised(py, move || Err(Error::Shape { op, argument, expected, got }));
            assert!(shape.is_instance_of::<PyValueError>());
            assert_eq!(shape.to_string(), "op: x has shape come; must be wanted");
            let (op, argument, expected, got) = parts();
            let value = raised(py, move || Err(Error::Value { op, argument, expected, got }));
            assert!(value.is_instance_of::<PyValueError>());
            assert_eq!(value.to_string(), "op: x is come; must be wanted");
            let (op, argument, expected, got) = parts();
            let dtype = raised(py, move || Err(Error::Dtype { op, argument, expected, got }));
            assert!(dtype.is_instance_of::<PyTypeError>());
            assert_eq!(dtype.to_string(), "op: x has dtype come; must be wanted");
            let row = raised(py, || Err(Error::Row { row: "mine row 3".into(), fault: "bad".into() }));
            assert!(row.is_instance_of::<PyValueError>());
            assert_eq!(row.to_string(), "mine row 3: bad");
            let tokenizer = raised(py, || Err(Error::Tokenizer("no model".into())));
            assert!(tokenizer.is_instance_of::<PyRuntimeError>());
            let file = || Error::File { path: "x.safetensors".into(), problem: "is truncated".into() };
            let damaged = raised(py, move || Err(file()));
            assert!(damaged.is_instance_of::<PyValueError>());
            assert_eq!(damaged.to_string(), "x.safetensors: is truncated");
            let full = || std::io::Error::from_raw_os_error(28);
            let disk = raised(py, move || Err(Error::io("out/x".as_ref(), &full())));
            assert!(disk.is_instance_of::<PyOSError>());
            assert_eq!(disk.to_string(), "[Errno 28] No space left on device: 'out/x'");
            let other = std::io::Error::other("failed to write whole buffer");
            let disk = raised(py, move || Err(Error::io("out/x".as_ref(), &other)));
            assert!(disk.is_instance_of::<PyOSError>());
            assert_eq!(disk.to_string(), "out/x: failed to write whole buffer");
            let torch = raised(py, || Err(Error::Torch("no memory".into())));
            assert!(torch.is_instance_of::<PyRuntimeError>());
            assert_eq!(torch.to_string(), "libtorch: no memory");
            let cuda = raised(py, || {
                let (kernel, launch) = ("k".into(), "grid (1, 1, 1)".into());
                Err(Error::Cuda { kernel, launch, message: "no driver".into() })
            });
            assert!(cuda.is_instance_of::<PyRuntimeError>());
            assert_eq!(cuda.to_string(), "CUDA kernel k, grid (1, 1, 1): no driver");
        });
    }

    #[test]
    fn an_exception_of_a_call_back_is_raised_as_it_is() {
        Python::initialize();
        Python::attach(|py| {
            let stop = || Err::<(), _>(kept(PyKeyboardInterrupt::new_err("now")));
            let error = detached(py, stop).expect_err("an error");
            assert!(error.is_instance_of::<PyKeyboardInterrupt>(py));
            let error = detached(py, || Err::<(), _>(Error::Stopped)).expect_err("an error");
            assert!(error.is_instance_of::<PyRuntimeError>(py));
        });
    }

    #[test]
    fn a_panic_is_an_ordinary_exception_with_its_text() {
        Python::initialize();
        Python::attach(|py| {
            for with_arguments in [false, true] {
                let panicked =
                    raised(py, move || if with_arguments { panic!("row {}", 7) } else { panic!("row 7") });
                assert!(panicked.is_instance_of::<PyRuntimeError>());
                assert_eq!(panicked.to_string(), "internal error, please report it: row 7");
            }
        });
    }
}
