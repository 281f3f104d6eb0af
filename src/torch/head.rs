//! The ORPO head on tensors: checks the arguments, picks the path, returns tensors.
//!
//! On the CPU the slice algorithm of [`crate::head`] runs on views of the tensors, whatever their
//! dtype, in `f32` (`f64` for `f64`). On NVIDIA's cards [`super::head_cuda`] runs the same chunks
//! through kernels; on any other device, and there for `f64`, [`super::head_ops`] does through
//! libtorch's ops.

use std::sync::atomic::{AtomicBool, Ordering};

use half::{bf16, f16};
use tch::{Device, Kind, Tensor};

use super::gemm::LibTorch;
use super::team::Torch;
use super::view::{Element, slice, slice_mut};
use super::{head_cuda, head_ops};
use crate::cuda;
use crate::error::{Error, Result};
use crate::head::engine::{Engine, Gradients};
use crate::head::layout::Batch;
use crate::head::orpo::orpo as orpo_slices;
use crate::head::real::Real;
use crate::head::scores::{Objective, Outcome};
use crate::head::weight::{Head, Matrix};
use crate::head::{backend, logps};
use crate::huge_pages;
use crate::odds_ratio::NllScope;

/// Makes CPU tensors take the path of other devices, so that a machine without one can test it.
static TENSOR_OPS: AtomicBool = AtomicBool::new(false);

/// Switches the path of other devices on or off for CPU tensors, for tests.
pub fn use_tensor_ops(on: bool) {
    TENSOR_OPS.store(on, Ordering::Relaxed);
}

/// True while CPU tensors take the path of other devices.
pub(super) fn tensor_ops() -> bool {
    TENSOR_OPS.load(Ordering::Relaxed)
}

/// The label that means "no row".
pub const IGNORE: i64 = -100;

/// The arguments that every op of the head shares.
#[derive(Debug)]
pub struct Args<'a> {
    /// Name of the op, for messages.
    pub op: &'static str,
    /// `(N, D)`.
    pub hidden: &'a Tensor,
    /// `(V, D)`, same dtype.
    pub weight: &'a Tensor,
    /// `(V,)`, same dtype.
    pub bias: Option<&'a Tensor>,
    /// `(N,)` int64: words, or [`IGNORE`].
    pub targets: &'a Tensor,
    /// Bound on the logits.
    pub softcap: Option<f64>,
    /// Factor on the raw products.
    pub logit_scale: f64,
}

/// Which gradients are wanted.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wants {
    /// Of the hidden states.
    pub hidden: bool,
    /// Of the weight.
    pub weight: bool,
    /// Of the bias.
    pub bias: bool,
}

impl Args<'_> {
    fn shape(&self, argument: &'static str, tensor: &Tensor, expected: &str, fits: bool) -> Result<()> {
        if fits {
            return Ok(());
        }
        Err(Error::Shape {
            op: self.op,
            argument,
            expected: expected.into(),
            got: format!("{:?}", tensor.size()),
        })
    }

    fn like_hidden(&self, argument: &'static str, tensor: &Tensor, kind: Option<Kind>) -> Result<()> {
        let expected = kind.map_or_else(|| self.hidden.f_kind(), Ok)?;
        if tensor.f_kind()? != expected {
            let expected = match kind {
                Some(kind) => dtype_name(kind).to_owned(),
                None => format!("the dtype of hidden, {}", dtype_name(expected)),
            };
            return Err(Error::Dtype {
                op: self.op,
                argument,
                expected,
                got: dtype_name(tensor.f_kind()?).into(),
            });
        }
        Ok(())
    }

    /// Checks shapes, dtypes and values, before anything is allocated. (Devices are checked in Python,
    /// before dispatch.)
    ///
    /// # Errors
    /// The first argument that does not fit, by name.
    pub fn check(&self) -> Result<()> {
        let kind = self.hidden.f_kind()?;
        if !matches!(kind, Kind::Float | Kind::Double | Kind::BFloat16 | Kind::Half) {
            let expected = "float32, bfloat16, float16 or float64".into();
            return Err(Error::Dtype {
                op: self.op,
                argument: "hidden",
                expected,
                got: dtype_name(kind).into(),
            });
        }
        self.shape("hidden", self.hidden, "(rows, hidden size)", self.hidden.dim() == 2)?;
        let (rows, width) = self.hidden.size2()?;
        let columns = format!("(vocabulary, {width}), with the columns of hidden");
        let fits = self.weight.dim() == 2 && self.weight.size()[1] == width && self.weight.size()[0] > 0;
        self.shape("weight", self.weight, &columns, fits && width > 0)?;
        self.like_hidden("weight", self.weight, None)?;
        let vocab = self.weight.size()[0];
        if let Some(bias) = self.bias {
            self.shape("bias", bias, &format!("({vocab},)"), bias.size() == [vocab])?;
            self.like_hidden("bias", bias, None)?;
        }
        self.row_argument("targets", self.targets, rows, Kind::Int64)?;
        self.range(
            "targets",
            self.targets,
            vocab,
            &format!("words in 0..{vocab}, or {IGNORE} for no row"),
            true,
        )?;
        self.positive("softcap", self.softcap.unwrap_or(1.0))?;
        if !self.logit_scale.is_finite() {
            return Err(self.value("logit_scale", "a finite number", self.logit_scale.to_string()));
        }
        Ok(())
    }

    /// Checks an argument with one entry a row.
    fn row_argument(&self, argument: &'static str, tensor: &Tensor, rows: i64, kind: Kind) -> Result<()> {
        self.shape(
            argument,
            tensor,
            &format!("({rows},), a value a row of hidden"),
            tensor.size() == [rows],
        )?;
        self.like_hidden(argument, tensor, Some(kind))
    }

    /// Checks that values lie in `0..end`. Only on the CPU: elsewhere the check would make the
    /// host wait for the device.
    fn range(
        &self,
        argument: &'static str,
        tensor: &Tensor,
        end: i64,
        expected: &str,
        ignore: bool,
    ) -> Result<()> {
        if !on_host(tensor) {
            return Ok(());
        }
        let values = tensor.f_contiguous()?;
        let right = |x: i64| (0..end).contains(&x) || (ignore && x == IGNORE);
        match slice::<i64>(&values)?.iter().find(|&&x| !right(x)) {
            Some(wrong) => Err(self.value(argument, expected, wrong.to_string())),
            None => Ok(()),
        }
    }

    fn positive(&self, argument: &'static str, value: f64) -> Result<()> {
        if value.is_finite() && value > 0.0 {
            return Ok(());
        }
        Err(self.value(argument, "a positive finite number", value.to_string()))
    }

    fn value(&self, argument: &'static str, expected: &str, got: String) -> Error {
        Error::Value { op: self.op, argument, expected: expected.into(), got }
    }

    fn on_cpu(&self) -> bool {
        self.hidden.device() == Device::Cpu && !tensor_ops()
    }
}

/// True if values can be read without waiting for a device.
fn on_host(tensor: &Tensor) -> bool {
    tensor.device() == Device::Cpu && !cuda::is_emulated()
}

/// The dtype's name in Python.
pub(super) fn dtype_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Float => "float32",
        Kind::Double => "float64",
        Kind::Half => "float16",
        Kind::BFloat16 => "bfloat16",
        Kind::Int64 => "int64",
        Kind::Int => "int32",
        Kind::Int16 => "int16",
        Kind::Int8 => "int8",
        Kind::Uint8 => "uint8",
        Kind::Bool => "bool",
        _ => "another dtype",
    }
}

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

/// Gradient tensors in the type they are computed in; those not wanted are empty.
struct Buffers {
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    wants: Wants,
}

impl Buffers {
    fn new<T: Element>(args: &Args<'_>, wants: Wants) -> Result<Self> {
        let options = (T::KIND, Device::Cpu);
        // Tiles cover the weight's gradient, so it is written in full; d_hidden is added to.
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
    LibTorch: backend::Gemm<T>,
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
    let engine = Engine { head: &head, gemm: &LibTorch, team: &Torch };
    f(&engine, matrix(&owned.hidden)?, slice(&owned.targets)?)
}

/// A tensor of statistics in the type that was computed in.
fn stats<T: Real + Element>(values: impl IntoIterator<Item = f64>) -> Result<Tensor> {
    let values: Vec<f64> = values.into_iter().collect();
    Ok(Tensor::f_from_slice(&values)?.f_to_kind(T::KIND)?)
}

/// Log-probabilities of the targets: `(N,)` logps, `(N,)` log-sum-exps, and the expectation
/// `-d logps / d hidden` `(N, D)`, empty unless asked for. Statistics are `float32` (`float64` for
/// `float64`), the expectation has the dtype of `hidden`.
///
/// # Errors
/// Arguments that do not fit, and what libtorch reports.
pub fn logps(args: &Args<'_>, expectation: bool) -> Result<[Tensor; 3]> {
    args.check()?;
    if let Some(device) = head_cuda::device(args)? {
        return head_cuda::logps(args, device, expectation);
    }
    if !args.on_cpu() {
        return head_ops::logps(args, expectation);
    }
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

/// Gradients of `sum(upstream * logps)`: of hidden, weight and bias, empty where not wanted.
///
/// # Errors
/// Arguments that do not fit, and what libtorch reports.
pub fn logps_backward(args: &Args<'_>, lse: &Tensor, upstream: &Tensor, wants: Wants) -> Result<[Tensor; 3]> {
    args.check()?;
    if let Some(device) = head_cuda::device(args)? {
        return head_cuda::logps_backward(args, device, lse, upstream, wants);
    }
    if !args.on_cpu() {
        return head_ops::logps_backward(args, lse, upstream, wants);
    }
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

/// Who is who in the batch.
#[derive(Debug)]
pub struct Pairs<'a> {
    /// `(N,)` int64 in `0..2 * count`.
    pub sequence: &'a Tensor,
    /// `(N,)` bool.
    pub completion: &'a Tensor,
    /// Number of pairs; none: as many as `sequence` names.
    pub count: Option<i64>,
    /// Number of rows in the loss; none: those that there are.
    pub scored: Option<i64>,
}

impl Pairs<'_> {
    /// Checks the batch against the rows and returns the number of pairs.
    fn check(&self, args: &Args<'_>, objective: Objective) -> Result<i64> {
        let rows = args.hidden.size()[0];
        args.row_argument("sequence", self.sequence, rows, Kind::Int64)?;
        args.row_argument("completion", self.completion, rows, Kind::Bool)?;
        args.positive("beta", objective.beta)?;
        let pairs = match self.count {
            Some(count) if count > 0 => count,
            Some(count) => return Err(args.value("num_pairs", "a positive number", count.to_string())),
            None if rows == 0 => 0,
            None => self.sequence.f_max()?.f_int64_value(&[])? / 2 + 1,
        };
        args.range("sequence", self.sequence, 2 * pairs, &format!("sequences in 0..{}", 2 * pairs), false)?;
        self.check_scored(args, pairs, objective.scope)?;
        Ok(pairs)
    }

    /// As [`Args::range`]: elsewhere the loss is NaN if the number is not that of the rows.
    fn check_scored(&self, args: &Args<'_>, pairs: i64, scope: NllScope) -> Result<()> {
        let Some(scored) = self.scored else { return Ok(()) };
        let rows = args.hidden.size()[0];
        if !(0..=rows).contains(&scored) {
            return Err(args.value("num_scored", &format!("in 0..={rows}"), scored.to_string()));
        }
        if !on_host(self.sequence) {
            return Ok(());
        }
        let in_loss = self.sequence.f_lt(pairs)?.f_logical_and_(&Tensor::from(scope == NllScope::Full))?;
        let found = in_loss.f_logical_or(self.completion)?.f_logical_and(&args.targets.f_ge(0)?)?;
        let found = found.f_sum(Kind::Int64)?.f_int64_value(&[])?;
        if found == scored {
            return Ok(());
        }
        Err(args.value("num_scored", &format!("{found}, the rows in the loss"), scored.to_string()))
    }
}

/// What [`orpo`] returns, as tensors: loss, nll, chosen and rejected log-probabilities, log odds,
/// their log-sigmoid, mean logits of both sides, pairs with an empty side; then the gradients of
/// hidden, weight and bias, empty where not wanted.
pub type Report = [Tensor; 12];

/// The fused loss.
///
/// # Errors
/// Arguments that do not fit, and what libtorch reports.
pub fn orpo(args: &Args<'_>, pairs: &Pairs<'_>, objective: Objective, wants: Wants) -> Result<Report> {
    args.check()?;
    let count = pairs.check(args, objective)?;
    if let Some(device) = head_cuda::device(args)? {
        return head_cuda::orpo(args, device, pairs, count, objective, wants);
    }
    if !args.on_cpu() {
        return head_ops::orpo(args, pairs, count, objective, wants);
    }
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

/// The outcome as tensors.
pub(super) fn report(outcome: &Outcome, kind: Kind, device: Device, grads: [Tensor; 3]) -> Result<Report> {
    let many = |values: &[f64]| -> Result<Tensor> {
        Ok(Tensor::f_from_slice(values)?.f_to_kind(kind)?.f_to_device(device)?)
    };
    let one = |value: f64| -> Result<Tensor> { Ok(many(&[value])?.f_squeeze()?) };
    let log_odds: Vec<f64> = outcome.pairs.iter().map(|pair| pair.log_odds).collect();
    let log_sigmoid: Vec<f64> = outcome.pairs.iter().map(|pair| pair.log_sigmoid).collect();
    let [d_hidden, d_weight, d_bias] = grads;
    Ok([
        one(outcome.loss)?,
        one(outcome.nll)?,
        many(&outcome.chosen)?,
        many(&outcome.rejected)?,
        many(&log_odds)?,
        many(&log_sigmoid)?,
        one(outcome.mean_logits[0])?,
        one(outcome.mean_logits[1])?,
        Tensor::f_from_slice(&[outcome.empty as i64])?.f_squeeze()?.f_to_device(device)?,
        d_hidden,
        d_weight,
        d_bias,
    ])
}
