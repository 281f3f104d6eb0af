//! The head on a GPU: the variants of [`crate::head::plan`], without synchronisation with the host.
//!
//! The host only needs the number of scored rows, because shapes depend on it. If the caller gives it, loss
//! and gradients are computed without waiting for the GPU; otherwise it is read back.
//!
//! `U` is one product of all scored rows with the full weight; passes between the products have this traffic
//! in bytes per logit:
//!
//! | variant | head | products | passes | extra memory |
//! |---|---|---|---|---|
//! | forward only | no gradient | 1 U | 4 | a tile |
//! | frozen | frozen | 2 U | 4 + 2 (16-bit) or 4 (`f32`) | a tile, 2048 rows in `f32` |
//! | trained | trained | 3 U, plus one product per tile that is not kept | 8 + 2 or 4 | tiles that the budget keeps, a tile, all rows in `f32` |
//!
//! A frozen head of 128,256 tokens and hidden size 4,096 in `bf16` takes 85 MB, besides the gradient of the
//! hidden states, for any number of rows.

use tch::{Kind, Tensor};

use super::args::{Args, Pairs, Report, Wants};
use super::cuda_batch::{Batch, blocks, gather};
use super::cuda_tiles::{self, GpuHead, Room, Rows, Stats};
use super::ops::scored;
use crate::base::error::Result;
use crate::cuda;
use crate::cuda::trust::Family;
use crate::head::plan::default_budget;
use crate::head::scores::Objective;
use crate::torch::device;

/// Elements of a tile: as many as fit in the L2 cache of an A100 or H100, so that a pass reads the product
/// from the cache.
const TILE: i64 = 1 << 23;

/// Elements of a tile if there is a weight's gradient, which is much larger. All rows share the tile, and
/// narrow tiles need many passes over the gradient of the hidden states.
const TRAINED_TILE: i64 = 1 << 25;

/// The GPU of a head's arguments, if there are kernels for their dtype and these families are trusted.
///
/// # Errors
/// Errors of libtorch, and of the trial of a GPU.
pub fn device(args: &Args<'_>, families: &[Family]) -> Result<Option<cuda::Device>> {
    if args.hidden.f_kind()? == Kind::Double {
        return Ok(None);
    }
    device::of(args.hidden, families)
}

/// The families of kernels that [`orpo`] launches.
#[must_use]
pub fn orpo_families(args: &Args<'_>, wants: Wants) -> &'static [Family] {
    use Family::{HeadBatch, HeadExpectation, HeadForward, HeadGradient};
    match (wants.weight || wants.bias, wants.hidden, args.softcap.is_some()) {
        (true, ..) => &[HeadBatch, HeadForward, HeadGradient],
        // With a softcap, rows that are not scored are swept forward.
        (false, true, true) => &[HeadBatch, HeadExpectation, HeadForward],
        (false, true, false) => &[HeadBatch, HeadExpectation],
        (false, false, _) => &[HeadBatch, HeadForward],
    }
}

/// Statistics of all rows, without gradients.
fn forward(gpu: &GpuHead<'_>, rows: &Rows, stats: &Stats) -> Result<()> {
    let columns = gpu.columns(rows.len(), TILE);
    let room = Room::new(rows.len(), columns, gpu.place())?;
    for tile in gpu.tiles(columns) {
        gpu.products(rows, &tile, &room)?;
        gpu.forward(rows, &tile, &room, stats)?;
    }
    Ok(())
}

/// Both sweeps of a trained head. They share a buffer for tiles, except the first `kept` tiles of a sweep,
/// which have separate buffers.
struct Trained<'a> {
    gpu: &'a GpuHead<'a>,
    columns: i64,
    kept: Vec<Room>,
    keep: usize,
    scratch: Room,
}

impl<'a> Trained<'a> {
    /// Allocates buffers for tiles of `rows` rows, and for `elements` kept elements.
    fn new(gpu: &'a GpuHead<'a>, rows: i64, elements: usize) -> Result<Self> {
        let columns = gpu.columns(rows, TRAINED_TILE);
        let keep = elements / (rows.max(1) * columns) as usize;
        let all = keep as i64 * columns >= gpu.vocab();
        let scratch = Room::new(if all { 0 } else { rows }, columns, gpu.place())?;
        Ok(Self { gpu, columns, kept: Vec::new(), keep, scratch })
    }

    fn forward(&mut self, rows: &Rows, stats: &Stats) -> Result<()> {
        for tile in self.gpu.tiles(self.columns) {
            if self.kept.len() < self.keep {
                self.kept.push(Room::new(rows.len(), self.columns, self.gpu.place())?);
            }
            let index = (tile.start / self.columns) as usize;
            let room = self.kept.get(index).unwrap_or(&self.scratch);
            self.gpu.products(rows, &tile, room)?;
            self.gpu.forward(rows, &tile, room, stats)?;
        }
        Ok(())
    }

    /// Gradients of hidden, in `f32`, weight and bias, empty if not needed.
    fn backward(
        self,
        rows: &Rows,
        stats: &Stats,
        coefficients: &Tensor,
        wants: Wants,
    ) -> Result<[Tensor; 3]> {
        let (gpu, count) = (self.gpu, rows.len());
        let room = |wanted: bool, size: &[i64], kind| {
            Tensor::f_empty(if wanted { size } else { &[0] }, (kind, gpu.place()))
        };
        let d_hidden = room(wants.hidden, &rows.hidden.size(), Kind::Float)?;
        let d_weight = room(wants.weight, &gpu.weight.size(), gpu.kind)?;
        let d_bias = room(wants.bias, &[gpu.vocab()], gpu.kind)?;
        let scratch = self.scratch.first(count)?;
        let mut kept = self.kept.into_iter();
        for tile in gpu.tiles(self.columns) {
            let own = kept.next().map(|room| room.first(count)).transpose()?;
            let room = own.as_ref().unwrap_or(&scratch);
            if own.is_none() {
                gpu.products(rows, &tile, room)?;
            }
            let gradients = gpu.gradient(rows, &tile, room, stats, coefficients)?;
            let part = |whole: &Tensor| whole.f_narrow(0, tile.start, tile.end - tile.start);
            if wants.hidden {
                gpu.d_hidden(&d_hidden, &gradients, &tile)?;
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

/// Scatters the rows of `(R, ..)` to the rows `index` of a zero tensor `(N, ..)`.
fn spread(rows: &Tensor, index: &Tensor, count: i64, kind: Kind) -> Result<Tensor> {
    let mut size = rows.size();
    size[0] = count;
    Ok(Tensor::f_zeros(size, (kind, rows.device()))?.f_index_copy(0, index, &rows.f_to_kind(kind)?)?)
}

/// [`super::logps`] on a GPU.
///
/// # Errors
/// Errors of libtorch and the driver.
pub fn logps(args: &Args<'_>, device: cuda::Device, expectation: bool) -> Result<[Tensor; 3]> {
    let (gpu, index) = (GpuHead::new(args, device)?, scored(args.targets)?);
    let (count, all) = (index.size()[0], args.targets.size()[0]);
    let stats = Stats::new(count, gpu.place())?;
    let out = if expectation { gpu.hidden.f_zeros_like()? } else { gpu.nothing()? };
    for (first, len) in blocks(count) {
        let (index, stats) = (index.f_narrow(0, first, len)?, stats.part(first, len)?);
        let rows = gather(&gpu, args.targets, &index)?;
        if expectation {
            let accumulated = gpu.expectation(&rows, gpu.columns(len, TILE), &stats)?;
            gpu.finish(&accumulated, &rows, &index, &stats, None, &out)?;
        } else {
            forward(&gpu, &rows, &stats)?;
        }
    }
    let log_sum = stats.sum.f_log()?;
    let lse = stats.max.f_to_kind(Kind::Double)?.f_add(&log_sum)?;
    // Subtract the large numbers first: the difference is exact if the log-probability is small.
    let logps = stats.label.f_sub(&stats.max)?.f_to_kind(Kind::Double)?.f_sub(&log_sum)?;
    Ok([spread(&logps, &index, all, Kind::Float)?, spread(&lse, &index, all, Kind::Float)?, out])
}

/// [`super::logps_backward`] on a GPU.
///
/// # Errors
/// Errors of libtorch and the driver.
pub fn logps_backward(
    args: &Args<'_>,
    device: cuda::Device,
    lse: &Tensor,
    upstream: &Tensor,
    wants: Wants,
) -> Result<[Tensor; 3]> {
    let (gpu, index) = (GpuHead::new(args, device)?, scored(args.targets)?);
    let rows = gather(&gpu, args.targets, &index)?;
    let pick = |x: &Tensor| -> Result<Tensor> { Ok(x.f_to_kind(Kind::Float)?.f_index_select(0, &index)?) };
    // As statistics of rows whose exponentials sum to one.
    let stats = Stats { max: pick(lse)?, ..Stats::new(rows.len(), gpu.place())? };
    let _ = stats.sum.shallow_clone().f_fill_(1.0)?;
    let coefficients = pick(upstream)?.f_neg()?;
    let [d_hidden, d_weight, d_bias] =
        Trained::new(&gpu, rows.len(), 0)?.backward(&rows, &stats, &coefficients, wants)?;
    let all = args.targets.size()[0];
    let d_hidden = if wants.hidden { spread(&d_hidden, &index, all, gpu.kind)? } else { gpu.nothing()? };
    Ok([d_hidden, d_weight, d_bias])
}

/// Sweeps the scored rows of a batch without the weight's gradient, block by block.
fn frozen(gpu: &GpuHead<'_>, batch: &Batch<'_>, objective: Objective) -> Result<Report> {
    let d_hidden = gpu.hidden.f_zeros_like()?;
    let mut waiting = None;
    for (first, len) in batch.blocks() {
        let (rows, stats) = batch.block(first, len)?;
        let accumulated = gpu.expectation(&rows, gpu.columns(len, TILE), &stats)?;
        if len == batch.scored {
            waiting = Some((accumulated, rows, stats));
        } else {
            gpu.finish(&accumulated, &rows, &batch.index(first, len)?, &stats, None, &d_hidden)?;
        }
    }
    sweep_others(gpu, batch)?;
    let (coefficients, parts) = batch.scores(objective)?;
    let index = batch.index(0, batch.scored)?;
    if let Some((accumulated, rows, stats)) = waiting {
        gpu.finish(&accumulated, &rows, &index, &stats, Some(&coefficients), &d_hidden)?;
    } else {
        gpu.scale_rows(&d_hidden, &index, &coefficients)?;
    }
    let [d_weight, d_bias] = [gpu.nothing()?, gpu.nothing()?];
    Ok(Report::new(parts, [d_hidden, d_weight, d_bias]))
}

fn trained(gpu: &GpuHead<'_>, batch: &Batch<'_>, objective: Objective, wants: Wants) -> Result<Report> {
    let (rows, stats) = batch.block(0, batch.scored)?;
    let budget = || default_budget(batch.rows() as usize, gpu.vocab() as usize, size_of::<f32>());
    let elements = objective.budget.unwrap_or_else(budget) / size_of::<f32>();
    let mut sweeps = Trained::new(gpu, rows.len(), elements)?;
    sweeps.forward(&rows, &stats)?;
    sweep_others(gpu, batch)?;
    let (coefficients, parts) = batch.scores(objective)?;
    let (rows, stats) = (rows.first(batch.scored)?, stats.part(0, batch.scored)?);
    let [d_hidden, d_weight, d_bias] = sweeps.backward(&rows, &stats, &coefficients, wants)?;
    let d_hidden = if wants.hidden {
        spread(&d_hidden, &batch.index(0, batch.scored)?, batch.rows(), gpu.kind)?
    } else {
        gpu.nothing()?
    };
    Ok(Report::new(parts, [d_hidden, d_weight, d_bias]))
}

/// Without gradients.
fn scores(gpu: &GpuHead<'_>, batch: &Batch<'_>, objective: Objective) -> Result<Report> {
    for (first, len) in batch.blocks() {
        let (rows, stats) = batch.block(first, len)?;
        forward(gpu, &rows, &stats)?;
    }
    sweep_others(gpu, batch)?;
    let (_, parts) = batch.scores(objective)?;
    Ok(Report::new(parts, [gpu.nothing()?, gpu.nothing()?, gpu.nothing()?]))
}

/// Sums the logits of rows that need no score too; with a softcap by a separate sweep.
fn sweep_others(gpu: &GpuHead<'_>, batch: &Batch<'_>) -> Result<()> {
    for (first, len) in batch.others() {
        let (rows, stats) = batch.block(first, len)?;
        forward(gpu, &rows, &stats)?;
    }
    Ok(())
}

/// Multiplies a gradient of the head by a number on the GPU, in place and without waiting for it; false if
/// there is no kernel for it.
///
/// # Errors
/// Errors of the driver, and of the trial of a GPU.
pub fn scale(gradient: &Tensor, factor: &Tensor) -> Result<bool> {
    let device = match gradient.f_kind()? {
        Kind::Float | Kind::BFloat16 | Kind::Half if factor.f_kind()? == Kind::Float => {
            device::of(gradient, &[Family::HeadBatch])?
        }
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

/// [`super::orpo`] on a GPU.
///
/// # Errors
/// Errors of libtorch and the driver.
pub fn orpo(
    args: &Args<'_>,
    device: cuda::Device,
    pairs: &Pairs<'_>,
    count: i64,
    objective: Objective,
    wants: Wants,
) -> Result<Report> {
    let gpu = GpuHead::new(args, device)?;
    let batch = Batch::new(&gpu, args, pairs, count, objective.scope)?;
    if wants.weight || wants.bias {
        trained(&gpu, &batch, objective, wants)
    } else if wants.hidden {
        frozen(&gpu, &batch, objective)
    } else {
        scores(&gpu, &batch, objective)
    }
}
