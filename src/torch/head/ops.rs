//! The head with libtorch's ops, on any device.
//!
//! The same sweeps as [`crate::head::engine`], tile by tile, with a tensor op for each step. The few numbers
//! per sequence go to the host, where [`crate::head::scores`] turns them into loss and coefficients.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use tch::{Device, Kind, Tensor};

use super::args::{Args, Pairs, Report, Wants, report};
use crate::base::error::Result;
use crate::head::layout::{Batch, Role};
use crate::head::plan::default_budget;
use crate::head::scores::{Objective, Scores};
use crate::torch::view::slice;

/// Elements of a tile of logits: a device needs larger tiles than a CPU's cache.
const TILE: i64 = 1 << 25;

/// Below every logit, and finite: `exp(LOWEST - max)` is zero and never NaN.
const LOWEST: f64 = -3e38;

/// Set where libtorch could not multiply 16-bit matrices into `f32`: on AMD's GPUs, and `bf16` on NVIDIA's before
/// Ampere. There both are widened first.
static NOT_MIXED: AtomicBool = AtomicBool::new(false);

/// The rows that need scores, on the device.
struct Sweep<'a> {
    args: &'a Args<'a>,
    /// Type of logits and sums.
    kind: Kind,
    /// `(R, D)`, times the logit scale.
    hidden: Tensor,
    /// `(R,)`.
    targets: Tensor,
}

/// Statistics of the rows, each `(R,)`.
struct Stats {
    max: Tensor,
    sum: Tensor,
    label: Tensor,
    total: Tensor,
}

impl Stats {
    fn lse(&self) -> Result<Tensor> {
        Ok(self.max.f_add(&self.sum.f_log()?)?)
    }

    fn logps(&self) -> Result<Tensor> {
        Ok(self.label.f_sub(&self.lse()?)?)
    }
}

impl<'a> Sweep<'a> {
    fn new(args: &'a Args<'a>, index: &Tensor) -> Result<Self> {
        let kind = if args.hidden.f_kind()? == Kind::Double { Kind::Double } else { Kind::Float };
        let hidden = args.hidden.f_detach()?.f_index_select(0, index)?;
        let hidden = if args.logit_scale == 1.0 { hidden } else { hidden.f_mul_scalar(args.logit_scale)? };
        Ok(Self { args, kind, hidden, targets: args.targets.f_index_select(0, index)? })
    }

    fn rows(&self) -> i64 {
        self.targets.size()[0]
    }

    fn tiles(&self) -> impl Iterator<Item = Range<i64>> + use<> {
        let vocab = self.args.weight.size()[0];
        let wide = (TILE / self.rows().max(1)).clamp(256, vocab.max(256));
        (0..vocab).step_by(wide as usize).map(move |first| first..(first + wide).min(vocab))
    }

    fn weight(&self, tile: &Range<i64>) -> Result<Tensor> {
        Ok(self.args.weight.f_detach()?.f_narrow(0, tile.start, tile.end - tile.start)?)
    }

    /// `a b` with a result in `kind`: half-precision logits would lose more accuracy than their inputs.
    fn product(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        if a.f_kind()? == self.kind {
            return Ok(a.f_mm(b)?);
        }
        let widened = || -> Result<Tensor> { Ok(a.f_to_kind(self.kind)?.f_mm(&b.f_to_kind(self.kind)?)?) };
        if !matches!(a.device(), Device::Cuda(_)) || NOT_MIXED.load(Ordering::Relaxed) {
            return widened();
        }
        if let Ok(product) = a.f_mm_dtype(b, self.kind) {
            return Ok(product);
        }
        let product = widened()?;
        NOT_MIXED.store(true, Ordering::Relaxed);
        Ok(product)
    }

    /// A tensor with one number per row.
    fn full(&self, value: f64) -> Result<Tensor> {
        Ok(Tensor::f_full([self.rows()], value, (self.kind, self.args.hidden.device()))?)
    }

    fn logits(&self, tile: &Range<i64>) -> Result<Tensor> {
        let mut z = self.product(&self.hidden, &self.weight(tile)?.f_tr()?)?;
        if let Some(bias) = self.args.bias {
            let bias =
                bias.f_detach()?.f_narrow(0, tile.start, tile.end - tile.start)?.f_to_kind(self.kind)?;
            let _ = z.f_add_(&bias.f_mul_scalar(self.args.logit_scale)?)?;
        }
        if let Some(cap) = self.args.softcap {
            z = z.f_div_scalar(cap)?.f_tanh()?.f_mul_scalar(cap)?;
        }
        Ok(z)
    }

    /// `d logit / d product`, or none if it is one.
    fn slope(&self, logits: &Tensor) -> Result<Option<Tensor>> {
        let Some(cap) = self.args.softcap else { return Ok(None) };
        Ok(Some(logits.f_div_scalar(cap)?.f_square()?.f_neg()?.f_add_scalar(1.0)?))
    }

    /// Column of each row's target in the tile, `(R, 1)`, and whether it is in the tile.
    fn label(&self, tile: &Range<i64>) -> Result<(Tensor, Tensor)> {
        let column = self.targets.f_sub_scalar(tile.start)?;
        let inside = self.targets.f_ge(tile.start)?.f_logical_and(&self.targets.f_lt(tile.end)?)?;
        Ok((column.f_clamp(0, tile.end - tile.start - 1)?.f_unsqueeze(1)?, inside))
    }

    /// The forward sweep. `visit` sees every tile's logits, the new maxima, and the factor on earlier sums.
    fn forward(
        &self,
        mut visit: impl FnMut(&Range<i64>, &Tensor, &Tensor, &Tensor) -> Result<()>,
    ) -> Result<Stats> {
        let mut s = Stats {
            max: self.full(LOWEST)?,
            sum: self.full(0.0)?,
            label: self.full(0.0)?,
            total: self.full(0.0)?,
        };
        for tile in self.tiles() {
            let z = self.logits(&tile)?;
            let max = s.max.f_maximum(&z.f_amax([1i64].as_slice(), false)?)?;
            let shrink = s.max.f_sub(&max)?.f_exp()?;
            let sums = z.f_sub(&max.f_unsqueeze(1)?)?.f_exp()?.f_sum_dim_intlist(
                [1i64].as_slice(),
                false,
                self.kind,
            )?;
            s.sum = s.sum.f_mul(&shrink)?.f_add(&sums)?;
            let (column, inside) = self.label(&tile)?;
            s.label = z.f_gather(1, &column, false)?.f_squeeze_dim(1)?.f_where_self(&inside, &s.label)?;
            let _ = s.total.f_add_(&z.f_sum_dim_intlist([1i64].as_slice(), false, self.kind)?)?;
            visit(&tile, &z, &max, &shrink)?;
            s.max = max;
        }
        Ok(s)
    }

    /// As `Engine::expectation`.
    fn expectation(&self) -> Result<(Stats, Tensor)> {
        let native = self.hidden.f_kind()?;
        let mut acc = Tensor::f_zeros(self.hidden.size(), (self.kind, self.hidden.device()))?;
        let mut slopes = self.full(1.0)?;
        let s = self.forward(|tile, z, max, shrink| {
            let mut p = z.f_sub(&max.f_unsqueeze(1)?)?.f_exp()?;
            if let Some(slope) = self.slope(z)? {
                p = p.f_mul(&slope)?;
                let (column, inside) = self.label(tile)?;
                slopes =
                    slope.f_gather(1, &column, false)?.f_squeeze_dim(1)?.f_where_self(&inside, &slopes)?;
            }
            let part = self.product(&p.f_to_kind(native)?, &self.weight(tile)?)?;
            acc = acc.f_mul(&shrink.f_unsqueeze(1)?)?.f_add(&part)?;
            Ok(())
        })?;
        let words = self.args.weight.f_detach()?.f_index_select(0, &self.targets)?.f_to_kind(self.kind)?;
        let expected = acc.f_div(&s.sum.f_unsqueeze(1)?)?;
        let out =
            expected.f_sub(&words.f_mul(&slopes.f_unsqueeze(1)?)?)?.f_mul_scalar(self.args.logit_scale)?;
        Ok((s, out))
    }

    /// As `Engine::backward`: gradients of hidden, weight and bias, empty if not needed.
    fn backward(
        &self,
        lse: &Tensor,
        scale: &Tensor,
        mut kept: Vec<Tensor>,
        wants: Wants,
    ) -> Result<[Tensor; 3]> {
        let (device, native) = (self.hidden.device(), self.hidden.f_kind()?);
        let room = |wanted: bool, size: &[i64], kind| {
            Tensor::f_zeros(if wanted { size } else { &[0] }, (kind, device))
        };
        let d_hidden = room(wants.hidden, &self.hidden.size(), self.kind)?;
        let d_weight = room(wants.weight, &self.args.weight.size(), native)?;
        let d_bias = room(wants.bias, &self.args.weight.size()[..1], native)?;
        let mut d_hidden = d_hidden;
        kept.reverse();
        for tile in self.tiles() {
            let z = kept.pop().map_or_else(|| self.logits(&tile), Ok)?;
            let (column, inside) = self.label(&tile)?;
            let mut g = z.f_sub(&lse.f_unsqueeze(1)?)?.f_exp()?;
            let one = inside.f_to_kind(self.kind)?.f_neg()?.f_unsqueeze(1)?;
            let _ = g.f_scatter_add_(1, &column, &one)?;
            let _ = g.f_mul_(&scale.f_unsqueeze(1)?)?;
            if let Some(slope) = self.slope(&z)? {
                let _ = g.f_mul_(&slope)?;
            }
            let size = tile.end - tile.start;
            if wants.bias {
                let sums = g.f_sum_dim_intlist([0i64].as_slice(), false, self.kind)?;
                let scaled = sums.f_mul_scalar(self.args.logit_scale)?.f_to_kind(native)?;
                d_bias.f_narrow(0, tile.start, size)?.f_copy_(&scaled)?;
            }
            let g = g.f_to_kind(native)?;
            if wants.hidden {
                let part = self.product(&g, &self.weight(&tile)?)?;
                let _ = d_hidden.f_add_(&part)?;
            }
            if wants.weight {
                let _ = g.f_tr()?.f_mm_out(&d_weight.f_narrow(0, tile.start, size)?, &self.hidden)?;
            }
        }
        if wants.hidden && self.args.logit_scale != 1.0 {
            d_hidden = d_hidden.f_mul_scalar(self.args.logit_scale)?;
        }
        Ok([d_hidden, d_weight, d_bias])
    }

    /// Scatters `(R, D)` to the rows `index` of `(N, D)`, in the dtype of hidden.
    fn scatter(&self, index: &Tensor, rows: &Tensor) -> Result<Tensor> {
        let rows = rows.f_to_kind(self.hidden.f_kind()?)?;
        let all = Tensor::f_zeros(self.args.hidden.size(), (rows.f_kind()?, rows.device()))?;
        Ok(all.f_index_copy(0, index, &rows)?)
    }

    /// Scatters `(R,)` to `(N,)` zeros.
    fn spread(&self, index: &Tensor, values: &Tensor) -> Result<Tensor> {
        let all = Tensor::f_zeros(self.args.targets.size(), (self.kind, self.args.hidden.device()))?;
        Ok(all.f_index_copy(0, index, values)?)
    }
}

/// Indices of the rows that have a target.
pub(super) fn scored(targets: &Tensor) -> Result<Tensor> {
    Ok(targets.f_ge(0)?.f_nonzero()?.f_squeeze_dim(1)?)
}

fn empty(args: &Args<'_>) -> Result<Tensor> {
    Ok(Tensor::f_empty([0], (args.hidden.f_kind()?, args.hidden.device()))?)
}

/// [`super::logps`] on any device.
///
/// # Errors
/// Errors of libtorch.
pub fn logps(args: &Args<'_>, expectation: bool) -> Result<[Tensor; 3]> {
    let index = scored(args.targets)?;
    let sweep = Sweep::new(args, &index)?;
    let (stats, expectation) = if expectation {
        let (stats, rows) = sweep.expectation()?;
        (stats, sweep.scatter(&index, &rows)?)
    } else {
        (sweep.forward(|_, _, _, _| Ok(()))?, empty(args)?)
    };
    let spread = |x: &Tensor| sweep.spread(&index, x);
    Ok([spread(&stats.logps()?)?, spread(&stats.lse()?)?, expectation])
}

/// [`super::logps_backward`] on any device.
///
/// # Errors
/// Errors of libtorch.
pub fn logps_backward(args: &Args<'_>, lse: &Tensor, upstream: &Tensor, wants: Wants) -> Result<[Tensor; 3]> {
    let index = scored(args.targets)?;
    let sweep = Sweep::new(args, &index)?;
    let pick = |x: &Tensor| -> Result<Tensor> { Ok(x.f_index_select(0, &index)?.f_to_kind(sweep.kind)?) };
    let [rows, d_weight, d_bias] =
        sweep.backward(&pick(lse)?, &pick(upstream)?.f_neg()?, Vec::new(), wants)?;
    let d_hidden = if wants.hidden { sweep.scatter(&index, &rows)? } else { empty(args)? };
    Ok([d_hidden, d_weight, d_bias])
}

/// [`super::orpo`] on any device.
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
    let host = |x: &Tensor| -> Result<Tensor> { Ok(x.f_to_device(Device::Cpu)?.f_contiguous()?) };
    let (targets, sequence) = (host(args.targets)?, host(pairs.sequence)?);
    let completion = host(pairs.completion)?;
    let batch = Batch {
        targets: slice(&targets)?,
        sequence: slice(&sequence)?,
        completion: slice(&completion)?,
        pairs: count as usize,
    };
    let mut scores = Scores::new(batch, objective);
    let rows: Vec<usize> = scores.layout.scored().collect();
    let to_device = |rows: &[usize]| -> Result<Tensor> {
        let rows: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
        Ok(Tensor::f_from_slice(&rows)?.f_to_device(args.hidden.device())?)
    };
    let index = to_device(&rows)?;
    let sweep = Sweep::new(args, &index)?;
    let trained = wants.weight || wants.bias;
    let bytes = if sweep.kind == Kind::Double { 8 } else { 4 };
    let vocab = args.weight.size()[0] as usize;
    let budget = objective.budget.unwrap_or_else(|| default_budget(batch.targets.len(), vocab, bytes));
    let fits = rows.len() * vocab * bytes <= budget;
    let mut kept = Vec::new();
    let (stats, expectation) = if wants.hidden && !trained {
        let (stats, expectation) = sweep.expectation()?;
        (stats, Some(expectation))
    } else {
        let keep = |_: &Range<i64>, z: &Tensor, _: &Tensor, _: &Tensor| {
            if trained && fits {
                kept.push(z.shallow_clone());
            }
            Ok(())
        };
        (sweep.forward(keep)?, None)
    };
    let logps = host(&stats.logps()?.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double)?)?;
    rows.iter().zip(slice::<f64>(&logps)?).for_each(|(&row, &logp)| scores.logps[row] = logp);
    scores.totals = totals(args, pairs, count, &scores, (&sweep, &stats), &to_device)?;

    let scale = Tensor::f_from_slice(&scores.coefficients(&rows))?.f_to_kind(sweep.kind)?;
    let scale = scale.f_to_device(args.hidden.device())?;
    let [d_hidden, d_weight, d_bias] = match expectation {
        Some(expectation) => [expectation.f_mul(&scale.f_unsqueeze(1)?)?, empty(args)?, empty(args)?],
        None if trained => sweep.backward(&stats.lse()?, &scale, kept, wants)?,
        None => [empty(args)?, empty(args)?, empty(args)?],
    };
    let d_hidden = if wants.hidden { sweep.scatter(&index, &d_hidden)? } else { empty(args)? };
    let outcome = scores.outcome(vocab);
    let (device, kind) = (args.hidden.device(), sweep.kind);
    report(&outcome, kind, device, [d_hidden, d_weight, d_bias])
}

/// Sum of each side's logits. Without a softcap they are linear in the hidden states; with one, the
/// rows that need no score are swept for it.
fn totals(
    args: &Args<'_>,
    pairs: &Pairs<'_>,
    count: i64,
    scores: &Scores,
    (sweep, stats): (&Sweep<'_>, &Stats),
    to_device: &dyn Fn(&[usize]) -> Result<Tensor>,
) -> Result<[f64; 2]> {
    let kind = sweep.kind;
    let side = pairs.sequence.f_ge(count)?.f_to_kind(Kind::Int64)?;
    let mut totals = Tensor::f_zeros([2], (kind, args.hidden.device()))?;
    if args.softcap.is_some() {
        let unscored: Vec<usize> =
            (0..scores.layout.roles.len()).filter(|&row| scores.layout.roles[row] == Role::None).collect();
        let (scored, unscored) = (scores.layout.scored().collect::<Vec<_>>(), to_device(&unscored)?);
        let rest = Sweep::new(args, &unscored)?.forward(|_, _, _, _| Ok(()))?;
        for (index, total) in [(to_device(&scored)?, &stats.total), (unscored, &rest.total)] {
            totals = totals.f_index_add(0, &side.f_index_select(0, &index)?, total)?;
        }
    } else {
        let words = args.weight.f_detach()?.f_sum_dim_intlist([0i64].as_slice(), false, kind)?;
        let rows = args.hidden.f_detach()?.f_to_kind(kind)?.f_mv(&words)?;
        totals = totals.f_index_add(0, &side, &rows)?.f_mul_scalar(args.logit_scale)?;
        if let Some(bias) = args.bias {
            let bias = bias.f_detach()?.f_sum(kind)?.f_mul_scalar(args.logit_scale)?;
            let rows: Vec<f64> = scores.layout.side_rows.iter().map(|&n| n as f64).collect();
            let rows = Tensor::f_from_slice(&rows)?.f_to_kind(kind)?.f_to_device(args.hidden.device())?;
            totals = totals.f_add(&rows.f_mul(&bias)?)?;
        }
    }
    let totals = totals.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double)?;
    Ok([totals.f_double_value(&[0])?, totals.f_double_value(&[1])?])
}
