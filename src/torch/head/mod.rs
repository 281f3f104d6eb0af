//! The ORPO head on tensors: checks the arguments, picks the path, returns tensors.
//!
//! On the CPU [`slices`] runs the algorithm of [`crate::head`] on views of the tensors. On NVIDIA GPUs
//! [`cuda`] runs the same chunks through kernels; on any other device, and on GPUs for `f64` and where kernels
//! are not trusted, [`ops`] uses libtorch's ops.

pub mod args;
pub mod cuda;
mod cuda_batch;
mod cuda_tiles;
pub mod ops;
pub mod slices;

use tch::{Device, Tensor};

use super::device::tensor_ops;
use crate::base::error::Result;
use crate::cuda::trust::Family;
use crate::head::scores::Objective;
use args::{Args, Pairs, Report, Wants};

fn on_cpu(args: &Args<'_>) -> bool {
    args.hidden.device() == Device::Cpu && !tensor_ops()
}

/// Log-probabilities of the targets: `(N,)` logps, `(N,)` log-sum-exps, and the expectation
/// `-d logps / d hidden` `(N, D)`, empty unless asked for. Statistics are `float32` (`float64` for
/// `float64`), the expectation has the dtype of `hidden`.
///
/// # Errors
/// Invalid arguments, and errors of libtorch.
pub fn logps(args: &Args<'_>, expectation: bool) -> Result<[Tensor; 3]> {
    args.check()?;
    let family = if expectation { Family::HeadExpectation } else { Family::HeadForward };
    if let Some(device) = cuda::device(args, &[family])? {
        return cuda::logps(args, device, expectation);
    }
    if !on_cpu(args) {
        return ops::logps(args, expectation);
    }
    slices::logps(args, expectation)
}

/// Gradients of `sum(upstream * logps)`: of hidden, weight and bias, empty if not needed.
///
/// # Errors
/// Invalid arguments, and errors of libtorch.
pub fn logps_backward(args: &Args<'_>, lse: &Tensor, upstream: &Tensor, wants: Wants) -> Result<[Tensor; 3]> {
    args.check()?;
    args.check_backward(lse, upstream)?;
    if let Some(device) = cuda::device(args, &[Family::HeadGradient])? {
        return cuda::logps_backward(args, device, lse, upstream, wants);
    }
    if !on_cpu(args) {
        return ops::logps_backward(args, lse, upstream, wants);
    }
    slices::logps_backward(args, lse, upstream, wants)
}

/// The fused loss.
///
/// # Errors
/// Invalid arguments, and errors of libtorch.
pub fn orpo(args: &Args<'_>, pairs: &Pairs<'_>, objective: Objective, wants: Wants) -> Result<Report> {
    args.check()?;
    let count = pairs.check(args, objective)?;
    if let Some(device) = cuda::device(args, cuda::orpo_families(args, wants))? {
        return cuda::orpo(args, device, pairs, count, objective, wants);
    }
    if !on_cpu(args) {
        return ops::orpo(args, pairs, count, objective, wants);
    }
    slices::orpo(args, pairs, count, objective, wants)
}
