//! Rows of a dataset.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::pybacked::{PyBackedBytes, PyBackedStr};
use pyo3::types::{PyBytes, PyDict};

use super::error::detached;
use crate::data::text::Texts;
use crate::data::tokenize::{Batch, RowEncoder};
use crate::data::triplet::Marks;
use crate::data::truncate::{Keep, Limits};

/// Data and offsets of an Arrow `large_string` column.
type Column = (PyBackedBytes, PyBackedBytes);

/// A tokenizer together with the rules for rows.
#[pyclass(name = "RowEncoder", module = "oddsmith._core", frozen)]
struct PyRowEncoder(RowEncoder);

#[allow(clippy::needless_pass_by_value)] // pyo3 passes extracted values by value
#[pymethods]
impl PyRowEncoder {
    #[new]
    #[pyo3(signature = (json, *, split_special_tokens, bos, eos, label_pad, max_length, max_prompt_length,
        truncation_mode))]
    #[allow(clippy::too_many_arguments)] // named in Python, and called from one place
    fn new(
        py: Python<'_>,
        json: PyBackedStr,
        split_special_tokens: bool,
        bos: Option<u32>,
        eos: Option<u32>,
        label_pad: i32,
        max_length: usize,
        max_prompt_length: Option<usize>,
        truncation_mode: &str,
    ) -> PyResult<Self> {
        let keep = match truncation_mode {
            "keep_start" => Keep::Start,
            "keep_end" => Keep::End,
            other => {
                let words = "must be \"keep_end\" or \"keep_start\"";
                return Err(PyValueError::new_err(format!("truncation_mode is {other:?}; {words}")));
            }
        };
        let marks = Marks { bos, eos, label_pad };
        let limits = Limits { max_length, max_prompt_length, keep };
        detached(py, move || RowEncoder::new(&json, split_special_tokens, marks, limits)).map(Self)
    }

    /// The columns of a batch of rows, as the bytes of Arrow buffers.
    #[pyo3(signature = (prompts, chosen, rejected, *, name, first_row, parallel))]
    #[allow(clippy::too_many_arguments)] // named in Python, and called from one place
    fn columns<'py>(
        &self,
        py: Python<'py>,
        prompts: Column,
        chosen: Column,
        rejected: Column,
        name: PyBackedStr,
        first_row: u64,
        parallel: bool,
    ) -> PyResult<Bound<'py, PyDict>> {
        let made = detached(py, || {
            let batch = Batch {
                prompts: Texts::new("prompts", &prompts.0, &prompts.1)?,
                answers: [
                    Texts::new("chosen", &chosen.0, &chosen.1)?,
                    Texts::new("rejected", &rejected.0, &rejected.1)?,
                ],
                name: &name,
                first_row,
            };
            self.0.columns(&batch, parallel)
        })?;
        let columns = PyDict::new(py);
        for (part, lists) in ["prompt", "chosen", "rejected"].into_iter().zip(&made.ids) {
            columns.set_item(format!("{part}_input_ids"), words(py, &lists.values)?)?;
            columns.set_item(format!("{part}_offsets"), words(py, &lists.offsets)?)?;
        }
        for (side, labels) in ["chosen", "rejected"].into_iter().zip(&made.labels) {
            columns.set_item(format!("{side}_labels"), words(py, labels)?)?;
        }
        columns.set_item("overlength", PyBytes::new(py, &made.overlength))?;
        columns.set_item("empty", PyBytes::new(py, &made.empty))?;
        Ok(columns)
    }
}

/// 32-bit integers as bytes in the machine's order.
fn words<'py>(py: Python<'py>, values: &[i32]) -> PyResult<Bound<'py, PyBytes>> {
    PyBytes::new_with(py, size_of_val(values), |bytes| {
        for (to, value) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(values) {
            *to = value.to_ne_bytes();
        }
        Ok(())
    })
}

/// Adds the classes of this file to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PyRowEncoder>()
}
