//! Converts `torch.Tensor` to a `tch::Tensor` that shares its storage and autograd state.
//!
//! From torch 2.14 on libtorch has functions for it; before, `torch._C._aoti` passes handles as capsules.
#![allow(unsafe_code)] // libtorch's bridge to Python objects

use std::ffi::c_void;
use std::ptr;

use pyo3::exceptions::{PyRuntimeError, PyTypeError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyType;
use tch::Tensor;

use crate::torch::abi::symbols::torch;

/// A tensor argument or result.
#[derive(Debug)]
pub struct PyTensor(pub Tensor);

/// What is imported from Python once.
struct Names {
    /// `torch.Tensor`.
    tensor: Py<PyType>,
    /// A handle of a tensor, as a capsule that owns nothing.
    handle_of: Py<PyAny>,
    /// The tensors of handles in capsules, which are taken over. The function for one handle is no use: it
    /// copies the handle and leaves it behind.
    tensors_of: Py<PyAny>,
}

fn names(py: Python<'_>) -> PyResult<&Names> {
    static NAMES: PyOnceLock<Names> = PyOnceLock::new();
    NAMES.get_or_try_init(py, || {
        let torch = py.import("torch")?;
        let aoti = torch.getattr("_C")?.getattr("_aoti")?;
        Ok(Names {
            tensor: torch.getattr("Tensor")?.cast_into::<PyType>()?.unbind(),
            handle_of: aoti.getattr("unsafe_alloc_void_ptr_from_tensor")?.unbind(),
            tensors_of: aoti.getattr("alloc_tensors_by_stealing_from_void_ptrs")?.unbind(),
        })
    })
}

fn failed(text: impl Into<String>) -> PyErr {
    PyRuntimeError::new_err(text.into())
}

impl<'a, 'py> FromPyObject<'a, 'py> for PyTensor {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        let py = object.py();
        let names = names(py)?;
        // Not by `isinstance`, which classes of torch answer in Python.
        // SAFETY: two live types.
        let is_tensor = unsafe {
            ffi::PyType_IsSubtype(ffi::Py_TYPE(object.as_ptr()), names.tensor.as_ptr().cast()) != 0
        };
        if !is_tensor {
            let name = object.get_type().name()?;
            return Err(PyTypeError::new_err(format!("expected a torch.Tensor, got {name}")));
        }
        let mut handle = ptr::null_mut();
        if let Some(from) = torch().map_err(failed)?.torch_tensor_from_pyobject {
            // SAFETY: a live tensor object, borrowed for the call, and the GIL is held.
            if unsafe { from(object.as_ptr().cast(), &raw mut handle) } != 0 {
                return Err(failed("libtorch gives no handle of a tensor"));
            }
        } else {
            let capsule = names.handle_of.bind(py).call1((object,))?;
            // SAFETY: a capsule without a name; a null pointer comes with an exception.
            handle = unsafe { ffi::PyCapsule_GetPointer(capsule.as_ptr(), ptr::null()) }.cast();
        }
        if handle.is_null() {
            return Err(PyErr::take(py).unwrap_or_else(|| failed("libtorch gives an empty handle")));
        }
        // SAFETY: a new handle, which is ours.
        Ok(Self(unsafe { Tensor::from_ptr(handle) }))
    }
}

impl<'py> IntoPyObject<'py> for PyTensor {
    type Target = PyAny;
    type Output = Bound<'py, PyAny>;
    type Error = PyErr;

    fn into_pyobject(mut self, py: Python<'py>) -> PyResult<Self::Output> {
        let handle = self.0.as_mut_ptr();
        if let Some(to) = torch().map_err(failed)?.torch_tensor_to_pyobject {
            let mut object: *mut c_void = ptr::null_mut();
            // SAFETY: a live handle, which stays ours, and the GIL is held.
            if unsafe { to(handle, ptr::null_mut(), &raw mut object) } != 0 {
                return Err(failed("libtorch makes no object of a tensor"));
            }
            // SAFETY: a new reference, which the `Bound` takes over.
            return unsafe { Bound::from_owned_ptr_or_err(py, object.cast()) };
        }
        // SAFETY: a capsule without name and destructor, around a handle that is not null.
        let capsule = unsafe {
            let capsule = ffi::PyCapsule_New(handle.cast(), ptr::null(), None);
            Bound::from_owned_ptr_or_err(py, capsule)?
        };
        let tensors = names(py)?.tensors_of.bind(py).call1(([capsule],))?;
        // The handle is now the list's.
        std::mem::forget(self);
        tensors.get_item(0)
    }
}
