//! Converts `torch.Tensor` to a `tch::Tensor` that shares its storage and autograd state.
#![allow(unsafe_code)] // tch's bridge to Python objects

use pyo3::exceptions::{PyRuntimeError, PyTypeError};
use pyo3::prelude::*;
use tch::Tensor;

/// A tensor argument or result.
#[derive(Debug)]
pub struct PyTensor(pub Tensor);

impl<'a, 'py> FromPyObject<'a, 'py> for PyTensor {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        // SAFETY: the pointer is a live Python object, borrowed for the call, and the GIL is held.
        let unpacked = unsafe { Tensor::pyobject_unpack(object.as_ptr().cast()) };
        match unpacked {
            Ok(Some(tensor)) => Ok(Self(tensor)),
            Ok(None) => {
                let name = object.get_type().name()?;
                Err(PyTypeError::new_err(format!("expected a torch.Tensor, got {name}")))
            }
            Err(error) => Err(PyRuntimeError::new_err(error.to_string())),
        }
    }
}

impl<'py> IntoPyObject<'py> for PyTensor {
    type Target = PyAny;
    type Output = Bound<'py, PyAny>;
    type Error = PyErr;

    fn into_pyobject(self, py: Python<'py>) -> PyResult<Self::Output> {
        let object = self.0.pyobject_wrap().map_err(|error| PyRuntimeError::new_err(error.to_string()))?;
        // SAFETY: `pyobject_wrap` returns a new reference, which the `Bound` takes over.
        unsafe { Bound::from_owned_ptr_or_err(py, object.cast()) }
    }
}
