//! A batch of pairs on a GPU: which rows are scored, and the loss from their statistics.

use std::iter;

use tch::{Kind, Tensor};

use super::args::{Args, IGNORE, Pairs};
use super::cuda_tiles::{GpuHead, Rows, Stats, round_up};
use crate::base::error::Result;
use crate::cuda::Arg;
use crate::cuda::kernels::{HEAD_BATCH, WARP, constant};
use crate::head::odds_ratio::{Link, NllScope};
use crate::head::scores::Objective;
use crate::torch::device::pointer;
use crate::torch::dtype::names;

/// Rows of a block, chosen so that the expectations of a frozen head are as large as its tile.
const BLOCK_ROWS: i64 = 2048;

/// Counts of a batch before those of its sequences.
const COUNTS: i64 = constant(HEAD_BATCH.text, "COUNTS");

/// `0..count` in blocks of about the same size, as first and length.
pub(super) fn blocks(count: i64) -> impl Iterator<Item = (i64, i64)> {
    let size = match round_up(count, BLOCK_ROWS) / BLOCK_ROWS {
        0 | 1 => BLOCK_ROWS,
        // Matrix products are faster on multiples of their block size.
        parts => round_up(round_up(count, parts) / parts, 128),
    };
    (0..count).step_by(size as usize).map(move |first| (first, size.min(count - first)))
}

/// The rows `index` of a batch.
pub(super) fn gather(gpu: &GpuHead<'_>, targets: &Tensor, index: &Tensor) -> Result<Rows> {
    Ok(Rows { hidden: gpu.hidden.f_index_select(0, index)?, targets: targets.f_index_select(0, index)? })
}

/// The rows of a batch by their role in the loss, and their statistics.
///
/// Statistics come in the order of `index`: the scored rows, then, with a softcap, the others. Without a
/// softcap logits are linear in the hidden states, so the mean of each side replaces the others, in the last
/// block.
#[derive(Debug)]
pub(super) struct Batch<'a> {
    gpu: &'a GpuHead<'a>,
    targets: Tensor,
    sequence: Tensor,
    pairs: i64,
    capped: bool,
    /// Number of scored rows.
    pub scored: i64,
    /// `(N,)`: indices of the scored rows, then of the others.
    index: Tensor,
    owners: Tensor,
    counts: Tensor,
    stats: Stats,
}

impl<'a> Batch<'a> {
    /// # Errors
    /// An impossible number of scored rows, and errors of libtorch and the driver.
    pub fn new(
        gpu: &'a GpuHead<'a>,
        args: &Args<'_>,
        pairs: &Pairs<'_>,
        count: i64,
        scope: NllScope,
    ) -> Result<Self> {
        let rows = args.targets.size()[0];
        let new = |size: i64, kind| Tensor::f_empty([size], (kind, gpu.place()));
        let (index, owners) = (new(rows, Kind::Int64)?, new(rows, Kind::Int)?);
        let counts = new(COUNTS + 2 * count, Kind::Int)?;
        let (targets, sequence) = (args.targets.f_contiguous()?, pairs.sequence.f_contiguous()?);
        let completion = pairs.completion.f_contiguous()?;
        let arguments = [
            pointer(&targets, Kind::Int64)?,
            pointer(&sequence, Kind::Int64)?,
            pointer(&completion, Kind::Bool)?,
            Arg::i32(rows as i32),
            Arg::i32(count as i32),
            Arg::i64(gpu.vocab()),
            Arg::i32((scope == NllScope::Full).into()),
            pointer(&index, Kind::Int64)?,
            pointer(&owners, Kind::Int)?,
            pointer(&counts, Kind::Int)?,
        ];
        gpu.launch_batch("head_layout", 1, &arguments)?;
        let scored = pairs.scored.map_or_else(|| counts.f_int64_value(&[0]), Ok)?;
        let capped = args.softcap.is_some();
        let others = if capped { rows - scored } else { gpu.side_rows() };
        let stats = Stats::new(scored + others, gpu.place())?;
        Ok(Self { gpu, targets, sequence, pairs: count, capped, scored, index, owners, counts, stats })
    }

    /// Number of rows.
    pub fn rows(&self) -> i64 {
        self.targets.size()[0]
    }

    /// Blocks of scored rows, as first and length; an empty one if there are none.
    pub fn blocks(&self) -> impl Iterator<Item = (i64, i64)> + use<> {
        blocks(self.scored).chain(iter::once((0, 0)).filter({
            let none = self.scored == 0;
            move |_| none
        }))
    }

    /// Blocks of rows that are swept although they are not scored.
    pub fn others(&self) -> impl Iterator<Item = (i64, i64)> + use<> {
        let (scored, others) = (self.scored, if self.capped { self.rows() - self.scored } else { 0 });
        blocks(others).map(move |(first, len)| (scored + first, len))
    }

    /// Indices of `len` rows.
    pub fn index(&self, first: i64, len: i64) -> Result<Tensor> {
        Ok(self.index.f_narrow(0, first, len)?)
    }

    /// A block of rows and its part of the statistics.
    pub fn block(&self, first: i64, len: i64) -> Result<(Rows, Stats)> {
        let (gpu, index) = (self.gpu, self.index(first, len)?);
        if self.capped || first + len < self.scored {
            return Ok((gather(gpu, &self.targets, &index)?, self.stats.part(first, len)?));
        }
        let (total, place) = (len + gpu.side_rows(), gpu.place());
        let rows = Rows {
            hidden: Tensor::f_empty([total, gpu.width()], (gpu.kind, place))?,
            targets: Tensor::f_full([total], IGNORE, (Kind::Int64, place))?,
        };
        let own = rows.first(len)?;
        let _ = gpu.hidden.f_index_select_out(&own.hidden, 0, &index)?;
        let _ = self.targets.f_index_select_out(&own.targets, 0, &index)?;
        self.side_means(&rows.hidden.f_narrow(0, len, gpu.side_rows())?)?;
        Ok((rows, self.stats.part(first, total)?))
    }

    fn side_means(&self, out: &Tensor) -> Result<()> {
        let gpu = self.gpu;
        let arguments = [
            pointer(&gpu.hidden, gpu.kind)?,
            Arg::i64(gpu.width()),
            pointer(&self.sequence, Kind::Int64)?,
            Arg::i32(self.rows() as i32),
            Arg::i32(self.pairs as i32),
            pointer(&self.counts, Kind::Int)?,
            pointer(out, gpu.kind)?,
        ];
        gpu.launch_batch(
            gpu.name(names!("head_side_means")),
            // A block of threads handles one column per thread of a warp.
            round_up(gpu.width(), WARP) / WARP,
            &arguments,
        )
    }

    /// The coefficients of the scored rows, `(R,)` in `f32`, and the outcome: the parts of
    /// [`super::args::Report::new`]. All rows must have been swept.
    pub fn scores(&self, objective: Objective) -> Result<(Tensor, [Tensor; 9])> {
        let (gpu, pairs) = (self.gpu, self.pairs);
        let new = |size: &[i64], kind| Tensor::f_empty(size, (kind, gpu.place()));
        let one = || new(&[], Kind::Float);
        let each = || new(&[pairs], Kind::Float);
        let outcome =
            [one()?, one()?, each()?, each()?, each()?, each()?, one()?, one()?, new(&[], Kind::Int64)?];
        let coefficients = new(&[self.scored], Kind::Float)?;
        let scratch = new(&[self.scored + 4 * pairs], Kind::Double)?;
        let bias_sum = gpu.bias_sum()?;
        let mut arguments: Vec<Arg> = self.stats.args()?.into();
        arguments.extend([
            pointer(&self.owners, Kind::Int)?,
            pointer(&self.counts, Kind::Int)?,
            Arg::i32(self.rows() as i32),
            Arg::i32(self.scored as i32),
            Arg::i32(pairs as i32),
            Arg::i64(gpu.vocab()),
            Arg::f64(objective.beta),
            Arg::i32((objective.link == Link::Identity).into()),
            Arg::i32(self.capped.into()),
            Arg::i32((gpu.side_rows() / 2) as i32),
            bias_sum.as_ref().map_or(Ok(Arg::ptr(0)), |sum| pointer(sum, Kind::Float))?,
            pointer(&scratch, Kind::Double)?,
            pointer(&coefficients, Kind::Float)?,
        ]);
        for part in &outcome {
            arguments.push(pointer(part, part.f_kind()?)?);
        }
        gpu.launch_batch("head_scores", 1, &arguments)?;
        Ok((coefficients, outcome))
    }
}
