//! The head on the CPU: the slice algorithm of [`crate::head`] on views of tensors of any dtype, computed in
//! `f32` (`f64` for `f64`).

use half::{bf16, f16};
use tch::{Device, Kind, Tensor};

use super::args::{Args, Pairs, Report, Wants, report};
use crate::base::error::Result;
use crate::base::gemm::Gemm;
use crate::base::huge_pages;
use crate::base::real::Real;
use crate::head::engine::{Engine, Gradients};
use crate::head::layout::Batch;
use crate::head::logps;
use crate::head::orpo::orpo as orpo_slices;
use crate::head::scores::Objective;
use crate::head::weight::{Head, Matrix};
use crate::torch::gemm::LibTorch;
use crate::torch::threads::TorchThreads;
use crate::torch::view::{Element, slice, slice_mut};

/// Contiguous tensors that the slices are views of.
struct Owned {
    hidden: Tensor,
    weight: Tensor,
    bias: Option<Tensor>,
    targets: Tensor,
}

impl Owned {
    fn new(args: &Args<'_>) -> Result<Self> {
        Ok(Self {
            hidden: args.hidden.f_contiguous()?,
            weight: args.weight.f_contiguous()?,
            bias: args.bias.map(Tensor::f_contiguous).transpose()?,
            targets: args.targets.f_contiguous()?,
        })
    }
}

/// The matrix of a tensor of any float dtype, for computing in `T`.
fn matrix<T: Element>(tensor: &Tensor) -> Result<Matrix<'_, T>> {
    Ok(match tensor.f_kind()? {
        Kind::BFloat16 => Matrix::Bf16(slice::<bf16>(tensor)?),
        Kind::Half => Matrix::F16(slice::<f16>(tensor)?),
        _ => Matrix::Native(slice::<T>(tensor)?),
    })
}

/// Gradient tensors in the type they are computed in; empty if not needed.
struct Buffers {
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    wants: Wants,
}

impl Buffers {
    fn new<T: Element>(args: &Args<'_>, wants: Wants) -> Result<Self> {
        let options = (T::KIND, Device::Cpu);
        // Tiles cover the weight's gradient, so it is overwritten; d_hidden is accumulated.
        let new = |wanted: bool, like: &[i64]| Tensor::f_empty(if wanted { like } else { &[0] }, options);
        let mut weight = new(wants.weight, &args.weight.size())?;
        huge_pages::advise(slice_mut::<T>(&mut weight)?);
        Ok(Self {
            hidden: if wants.hidden {
                Tensor::f_zeros(args.hidden.size(), options)?
            } else {
                Tensor::f_empty([0], options)?
            },
            weight,
            bias: new(wants.bias, &args.weight.size()[..1])?,
            wants,
        })
    }

    fn gradients<T: Element>(&mut self) -> Result<Gradients<'_, T>> {
        let wants = self.wants;
        let view = |wanted: bool, tensor| if wanted { slice_mut::<T>(tensor).map(Some) } else { Ok(None) };
        Ok(Gradients {
            hidden: view(wants.hidden, &mut self.hidden)?,
            weight: view(wants.weight, &mut self.weight)?,
            bias: view(wants.bias, &mut self.bias)?,
            accumulate: false,
        })
    }

    /// The gradients in the arguments' dtype.
    fn finish(self, args: &Args<'_>) -> Result<[Tensor; 3]> {
        let kind = args.hidden.f_kind()?;
        Ok([self.hidden.f_to_kind(kind)?, self.weight.f_to_kind(kind)?, self.bias.f_to_kind(kind)?])
    }
}

/// Runs `f` on the slice engine in type `T`.
fn with_engine<T, R>(
    args: &Args<'_>,
    owned: &Owned,
    f: impl FnOnce(&Engine<'_, T>, Matrix<'_, T>, &[i64]) -> Result<R>,
) -> Result<R>
where
    T: Real + Element,
    LibTorch: Gemm<T>,
{
    let (vocab, width) = args.weight.size2()?;
    let bias = owned.bias.as_ref().map(matrix::<T>).transpose()?;
    let head = Head::new(
        matrix(&owned.weight)?,
        bias,
        args.softcap,
        args.logit_scale,
        vocab as usize,
        width as usize,
    );
    let engine = Engine { head: &head, gemm: &LibTorch, threads: &TorchThreads };
    f(&engine, matrix(&owned.hidden)?, slice(&owned.targets)?)
}

/// A tensor of statistics in the type of the computation.
fn stats<T: Real + Element>(values: impl IntoIterator<Item = f64>) -> Result<Tensor> {
    let values: Vec<f64> = values.into_iter().collect();
    Ok(Tensor::f_from_slice(&values)?.f_to_kind(T::KIND)?)
}

/// [`super::logps`] on the CPU, with checked arguments.
///
/// # Errors
/// Errors of libtorch.
pub fn logps(args: &Args<'_>, expectation: bool) -> Result<[Tensor; 3]> {
    match args.hidden.f_kind()? {
        Kind::Double => logps_as::<f64>(args, expectation),
        _ => logps_as::<f32>(args, expectation),
    }
}

fn logps_as<T: Real + Element>(args: &Args<'_>, expectation: bool) -> Result<[Tensor; 3]> {
    let wants = Wants { hidden: expectation, ..Wants::default() };
    let (owned, mut buffers) = (Owned::new(args)?, Buffers::new::<T>(args, wants)?);
    let room = buffers.gradients::<T>()?.hidden;
    let out = with_engine::<T, _>(args, &owned, |engine, hidden, targets| {
        logps::forward(engine, hidden, targets, room)
    })?;
    let [expectation, ..] = buffers.finish(args)?;
    Ok([stats::<T>(out.logps)?, stats::<T>(out.lse)?, expectation])
}

/// [`super::logps_backward`] on the CPU, with checked arguments.
///
/// # Errors
/// Errors of libtorch.
pub fn logps_backward(args: &Args<'_>, lse: &Tensor, upstream: &Tensor, wants: Wants) -> Result<[Tensor; 3]> {
    match args.hidden.f_kind()? {
        Kind::Double => logps_backward_as::<f64>(args, lse, upstream, wants),
        _ => logps_backward_as::<f32>(args, lse, upstream, wants),
    }
}

fn logps_backward_as<T: Real + Element>(
    args: &Args<'_>,
    lse: &Tensor,
    upstream: &Tensor,
    wants: Wants,
) -> Result<[Tensor; 3]> {
    let (owned, mut buffers) = (Owned::new(args)?, Buffers::new::<T>(args, wants)?);
    let wide = |x: &Tensor| -> Result<Tensor> { Ok(x.f_to_kind(Kind::Double)?.f_contiguous()?) };
    let (lse, upstream) = (wide(lse)?, wide(upstream)?);
    let mut grads = buffers.gradients::<T>()?;
    with_engine::<T, _>(args, &owned, |engine, hidden, targets| {
        logps::backward(engine, hidden, targets, slice(&lse)?, slice(&upstream)?, &mut grads)
    })?;
    buffers.finish(args)
}

/// [`super::orpo`] on the CPU, with checked arguments.
///
/// # Errors
/// Errors of libtorch.
pub fn orpo(
    args: &Args<'_>,
    pairs: &Pairs<'_>,
    count: i64,
    objective: Objective,
    wants: Wants,
) -> Result<Report> {
    match args.hidden.f_kind()? {
        Kind::Double => orpo_as::<f64>(args, pairs, count, objective, wants),
        _ => orpo_as::<f32>(args, pairs, count, objective, wants),
    }
}

fn orpo_as<T: Real + Element>(
    args: &Args<'_>,
    pairs: &Pairs<'_>,
    count: i64,
    objective: Objective,
    wants: Wants,
) -> Result<Report> {
    let (owned, mut buffers) = (Owned::new(args)?, Buffers::new::<T>(args, wants)?);
    let (sequence, completion) = (pairs.sequence.f_contiguous()?, pairs.completion.f_contiguous()?);
    let mut grads = buffers.gradients::<T>()?;
    let outcome = with_engine::<T, _>(args, &owned, |engine, hidden, targets| {
        let (sequence, completion) = (slice(&sequence)?, slice(&completion)?);
        let batch = Batch { targets, sequence, completion, pairs: count as usize };
        orpo_slices(engine, hidden, batch, objective, &mut grads)
    })?;
    report(&outcome, T::KIND, Device::Cpu, buffers.finish(args)?)
}
