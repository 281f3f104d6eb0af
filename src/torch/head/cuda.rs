//! The head on a card: the variants of [`crate::head::plan`] without a word from the host.
//!
//! What the host has to know of a batch is the number of its scored rows, since shapes depend on it. A
//! caller who says it gets loss and gradients without waiting for the card; for others it is read back.
//!
//! `U` is one product of all scored rows with the whole weight; traffic of the passes between the
//! products, in bytes a logit:
//!
//! | variant | head | products | passes | extra memory |
//! |---|---|---|---|---|
//! | forward only | no gradient wanted | 1 U | 4 | a tile |
//! | frozen | frozen | 2 U | 4 + 2 (halves) or 4 (`f32`) | a tile, 2048 rows in `f32` |
//! | trained | trained | 3 U, and a product again for each tile that is not kept | 8 + 2 or 4 | tiles that the budget keeps, a tile, all rows in `f32` |
//!
//! A frozen head of 128,256 words of 4,096 in `bf16` takes 85 MB beside the gradient of the hidden
//! states for any number of rows.

use tch::{Kind, Tensor};

use super::args::{Args, Pairs, Report, Wants};
use super::cuda_batch::{Batch, blocks, gather};
use super::cuda_tiles::{self, GpuHead, Room, Rows, Stats};
use super::ops::scored;
use crate::base::error::Result;
use crate::cuda;
use crate::head::plan::default_budget;
use crate::head::scores::Objective;
use crate::torch::device;

/// Elements of a tile: as many as an A100's or H100's second-level cache holds, so that a pass finds
/// there what the product has written.
const TILE: i64 = 1 << 23;

/// Elements of a tile beside a weight's gradient, which is larger by far. All rows share it, and
/// narrow tiles make for many passes over the gradient of the hidden states.
const TRAINED_TILE: i64 = 1 << 25;

/// The card that a head's arguments are on, if its kernels have their dtype.
///
/// # Errors
/// What libtorch reports.
pub fn device(args: &Args<'_>) -> Result<Option<cuda::Device>> {
    if args.hidden.f_kind()? == Kind::Double {
        return Ok(None);
    }
    device::of(args.hidden)
}

/// Statistics of all rows, without gradients.
fn forward(card: &GpuHead<'_>, rows: &Rows, stats: &Stats) -> Result<()> {
    let columns = card.columns(rows.len(), TILE);
    let room = Room::new(rows.len(), columns, card.place())?;
    for tile in card.tiles(columns) {
        card.products(rows, &tile, &room)?;
        card.forward(rows, &tile, &room, stats)?;
    }
    Ok(())
}

/// Both sweeps of a trained head. What they share is the room for tiles: the first `kept` of a sweep
/// have one of their own.
struct Trained<'a> {
    card: &'a GpuHead<'a>,
    columns: i64,
    kept: Vec<Room>,
    keep: usize,
    scratch: Room,
}

impl<'a> Trained<'a> {
    /// With room for rows of `rows`, and for `elements` that are kept.
    fn new(card: &'a GpuHead<'a>, rows: i64, elements: usize) -> Result<Self> {
        let columns = card.columns(rows, TRAINED_TILE);
        let keep = elements / (rows.max(1) * columns) as usize;
        let all = keep as i64 * columns >= card.vocab();
        let scratch = Room::new(if all { 0 } else { rows }, columns, card.place())?;
        Ok(Self { card, columns, kept: Vec::new(), keep, scratch })
    }

    fn forward(&mut self, rows: &Rows, stats: &Stats) -> Result<()> {
        for tile in self.card.tiles(self.columns) {
            if self.kept.len() < self.keep {
                self.kept.push(Room::new(rows.len(), self.columns, self.card.place())?);
            }
            let index = (tile.start / self.columns) as usize;
            let room = self.kept.get(index).unwrap_or(&self.scratch);
            self.card.products(rows, &tile, room)?;
            self.card.forward(rows, &tile, room, stats)?;
        }
        Ok(())
    }

    /// Gradients of hidden, in `f32`, weight and bias, empty where not wanted.
    fn backward(
        self,
        rows: &Rows,
        stats: &Stats,
        coefficients: &Tensor,
        wants: Wants,
    ) -> Result<[Tensor; 3]> {
        let (card, count) = (self.card, rows.len());
        let room = |wanted: bool, size: &[i64], kind| {
            Tensor::f_empty(if wanted { size } else { &[0] }, (kind, card.place()))
        };
        let d_hidden = room(wants.hidden, &rows.hidden.size(), Kind::Float)?;
        let d_weight = room(wants.weight, &card.weight.size(), card.kind)?;
        let d_bias = room(wants.bias, &[card.vocab()], card.kind)?;
        let scratch = self.scratch.first(count)?;
        let mut kept = self.kept.into_iter();
        for tile in card.tiles(self.columns) {
            let own = kept.next().map(|room| room.first(count)).transpose()?;
            let room = own.as_ref().unwrap_or(&scratch);
            if own.is_none() {
                card.products(rows, &tile, room)?;
            }
            let gradients = card.gradient(rows, &tile, room, stats, coefficients)?;
            let part = |whole: &Tensor| whole.f_narrow(0, tile.start, tile.end - tile.start);
            if wants.hidden {
                card.d_hidden(&d_hidden, &gradients, &tile)?;
            }
            if wants.weight {
                let _ = gradients.f_tr()?.f_mm_out(&part(&d_weight)?, &rows.hidden)?;
            }
            if wants.bias {
                let sums = gradients.f_sum_dim_intlist([0i64].as_slice(), false, Kind::Float)?;
                part(&d_bias)?.f_copy_(&sums)?;
            }
        }
        Ok([d_hidden, d_weight, d_bias])
    }
}

/// Spreads the rows of `(R, ..)` over the places `index` of zeros, `(N, ..)`.
fn spread(rows: &Tensor, index: &Tensor, count: i64, kind: Kind) -> Result<Tensor> {
    let mut size = rows.size();
    size[0] = count;
    Ok(Tensor::f_zeros(size, (kind, rows.device()))?.f_index_copy(0, index, &rows.f_to_kind(kind)?)?)
}

/// [`super::logps`] on a card.
///
/// # Errors
/// What libtorch and the driver report.
pub fn logps(args: &Args<'_>, device: cuda::Device, expectation: bool) -> Result<[Tensor; 3]> {
    let (card, index) = (GpuHead::new(args, device)?, scored(args.targets)?);
    let (count, all) = (index.size()[0], args.targets.size()[0]);
    let stats = Stats::new(count, card.place())?;
    let out = if expectation { card.hidden.f_zeros_like()? } else { card.nothing()? };
    for (first, len) in blocks(count) {
        let (index, stats) = (index.f_narrow(0, first, len)?, stats.part(first, len)?);
        let rows = gather(&card, args.targets, &index)?;
        if expectation {
            let accumulated = card.expectation(&rows, card.columns(len, TILE), &stats)?;
            card.finish(&accumulated, &rows, &index, &stats, None, &out)?;
        } else {
            forward(&card, &rows, &stats)?;
        }
    }
    let log_sum = stats.sum.f_log()?;
    let lse = stats.max.f_to_kind(Kind::Double)?.f_add(&log_sum)?;
    // The large numbers first: their difference is exact where the log-probability is small.
    let logps = stats.label.f_sub(&stats.max)?.f_to_kind(Kind::Double)?.f_sub(&log_sum)?;
    Ok([spread(&logps, &index, all, Kind::Float)?, spread(&lse, &index, all, Kind::Float)?, out])
}

/// [`super::logps_backward`] on a card.
///
/// # Errors
/// What libtorch and the driver report.
pub fn logps_backward(
    args: &Args<'_>,
    device: cuda::Device,
    lse: &Tensor,
    upstream: &Tensor,
    wants: Wants,
) -> Result<[Tensor; 3]> {
    let (card, index) = (GpuHead::new(args, device)?, scored(args.targets)?);
    let rows = gather(&card, args.targets, &index)?;
    let pick = |x: &Tensor| -> Result<Tensor> { Ok(x.f_to_kind(Kind::Float)?.f_index_select(0, &index)?) };
    // As statistics of rows whose exponentials sum to one.
    let stats = Stats { max: pick(lse)?, ..Stats::new(rows.len(), card.place())? };
    let _ = stats.sum.shallow_clone().f_fill_(1.0)?;
    let coefficients = pick(upstream)?.f_neg()?;
    let [d_hidden, d_weight, d_bias] =
        Trained::new(&card, rows.len(), 0)?.backward(&rows, &stats, &coefficients, wants)?;
    let all = args.targets.size()[0];
    let d_hidden = if wants.hidden { spread(&d_hidden, &index, all, card.kind)? } else { card.nothing()? };
    Ok([d_hidden, d_weight, d_bias])
}

/// Scored rows of a batch that is swept without its weight's gradient, block by block.
fn frozen(card: &GpuHead<'_>, batch: &Batch<'_>, objective: Objective) -> Result<Report> {
    let d_hidden = card.hidden.f_zeros_like()?;
    let mut waiting = None;
    for (first, len) in batch.blocks() {
        let (rows, stats) = batch.block(first, len)?;
        let accumulated = card.expectation(&rows, card.columns(len, TILE), &stats)?;
        if len == batch.scored {
            waiting = Some((accumulated, rows, stats));
        } else {
            card.finish(&accumulated, &rows, &batch.index(first, len)?, &stats, None, &d_hidden)?;
        }
    }
    sweep_others(card, batch)?;
    let (coefficients, parts) = batch.scores(objective)?;
    let index = batch.index(0, batch.scored)?;
    if let Some((accumulated, rows, stats)) = waiting {
        card.finish(&accumulated, &rows, &index, &stats, Some(&coefficients), &d_hidden)?;
    } else {
        card.scale_rows(&d_hidden, &index, &coefficients)?;
    }
    let [d_weight, d_bias] = [card.nothing()?, card.nothing()?];
    Ok(Report::new(parts, [d_hidden, d_weight, d_bias]))
}

fn trained(card: &GpuHead<'_>, batch: &Batch<'_>, objective: Objective, wants: Wants) -> Result<Report> {
    let (rows, stats) = batch.block(0, batch.scored)?;
    let budget = || default_budget(batch.rows() as usize, card.vocab() as usize, size_of::<f32>());
    let elements = objective.budget.unwrap_or_else(budget) / size_of::<f32>();
    let mut sweeps = Trained::new(card, rows.len(), elements)?;
    sweeps.forward(&rows, &stats)?;
    sweep_others(card, batch)?;
    let (coefficients, parts) = batch.scores(objective)?;
    let (rows, stats) = (rows.first(batch.scored)?, stats.part(0, batch.scored)?);
    let [d_hidden, d_weight, d_bias] = sweeps.backward(&rows, &stats, &coefficients, wants)?;
    let d_hidden = if wants.hidden {
        spread(&d_hidden, &batch.index(0, batch.scored)?, batch.rows(), card.kind)?
    } else {
        card.nothing()?
    };
    Ok(Report::new(parts, [d_hidden, d_weight, d_bias]))
}

/// Without gradients.
fn scores(card: &GpuHead<'_>, batch: &Batch<'_>, objective: Objective) -> Result<Report> {
    for (first, len) in batch.blocks() {
        let (rows, stats) = batch.block(first, len)?;
        forward(card, &rows, &stats)?;
    }
    sweep_others(card, batch)?;
    let (_, parts) = batch.scores(objective)?;
    Ok(Report::new(parts, [card.nothing()?, card.nothing()?, card.nothing()?]))
}

/// The logits of rows that need no score are summed too; under a softcap by a sweep of their own.
fn sweep_others(card: &GpuHead<'_>, batch: &Batch<'_>) -> Result<()> {
    for (first, len) in batch.others() {
        let (rows, stats) = batch.block(first, len)?;
        forward(card, &rows, &stats)?;
    }
    Ok(())
}

/// Multiplies a gradient of the head by a number on the GPU, in place and without waiting for it; false
/// where there is no kernel for that.
///
/// # Errors
/// What the driver reports.
pub fn scale(gradient: &Tensor, factor: &Tensor) -> Result<bool> {
    let device = match gradient.f_kind()? {
        Kind::Float | Kind::BFloat16 | Kind::Half if factor.f_kind()? == Kind::Float => device::of(gradient)?,
        _ => None,
    };
    let Some(device) = device
        .filter(|_| gradient.is_contiguous() && factor.device() == gradient.device() && factor.numel() == 1)
    else {
        return Ok(false);
    };
    cuda_tiles::scale(device, gradient, factor)?;
    Ok(true)
}

/// [`super::orpo`] on a card.
///
/// # Errors
/// What libtorch and the driver report.
pub fn orpo(
    args: &Args<'_>,
    device: cuda::Device,
    pairs: &Pairs<'_>,
    count: i64,
    objective: Objective,
    wants: Wants,
) -> Result<Report> {
    let card = GpuHead::new(args, device)?;
    let batch = Batch::new(&card, args, pairs, count, objective.scope)?;
    if wants.weight || wants.bias {
        trained(&card, &batch, objective, wants)
    } else if wants.hidden {
        frozen(&card, &batch, objective)
    } else {
        scores(&card, &batch, objective)
    }
}
