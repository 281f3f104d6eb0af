//! Checkpoints with libtorch's arithmetic.

use tch::{Kind, Tensor};

use super::gemm::LibTorch;
use super::quant::args::map;
use super::threads::TorchThreads;
use super::view::borrow;
use crate::base::error::Result;
use crate::checkpoint::CHUNK;
use crate::checkpoint::convert::{Job, Progress, Written, convert};
use crate::checkpoint::engine::ConvertEngine;

/// The mean of scales, as `Tensor.mean` of the flat tensor computes it.
fn mean(values: &[f32]) -> Result<f32> {
    let tensor = borrow(values, 1, values.len())?.f_view([values.len() as i64])?;
    Ok(tensor.f_mean(Kind::Float)?.f_double_value(&[])? as f32)
}

/// Runs a job; `code` has the 256 values of 8-bit codes.
///
/// # Errors
/// A code of another form, and as [`convert`].
pub fn run(job: &Job<'_>, code: &Tensor, progress: &mut Progress<'_>) -> Result<Vec<Written>> {
    let _guard = tch::no_grad_guard();
    let map = map("convert_checkpoint", code)?;
    let engine =
        ConvertEngine { threads: &TorchThreads, gemm: &LibTorch, mean: &mean, map: &map, chunk: CHUNK };
    convert(job, &engine, progress)
}
