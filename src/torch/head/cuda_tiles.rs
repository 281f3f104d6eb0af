//! The head on a GPU: tiles of products by libtorch, and the kernels of `kernels/head_tiles.cu` on them.
//!
//! Products are in `f32` for all dtypes. Rounding logits to `bf16` would save a third of the passes' traffic,
//! but lose accuracy: with 16,000 tokens and logits with a spread of 8, the error of a log-probability is up
//! to 0.1 instead of 4e-6, and that of a row's gradient 8e-3 of its norm instead of 3e-4.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use super::args::Args;
use crate::base::error::{Error, Result};
use crate::cuda::kernels::{HEAD_BATCH, HEAD_TILES, WARP, constant};
use crate::cuda::{self, Arg, Launch};
use crate::torch::device::pointer;
use crate::torch::dtype::{named, names};

/// Columns of a row per thread, most threads of a block, and so the widest tile.
const GROUP: i64 = constant(HEAD_TILES.text, "GROUP");
const COLUMNS: i64 = GROUP * constant(HEAD_TILES.text, "GROUPS");
const MAX_THREADS: i64 = constant(HEAD_TILES.text, "MAX_THREADS");
const MAX_COLUMNS: i64 = COLUMNS * MAX_THREADS;

/// Threads of the kernels on a complete batch.
const BATCH_THREADS: i64 = constant(HEAD_BATCH.text, "BLOCK");

/// Threads of the kernels on rows of any width.
const ROW_THREADS: i64 = 256;
const _: () = assert!(ROW_THREADS <= MAX_THREADS);

/// `gradient *= factor` in place, without reading the factor.
pub(super) fn scale(device: cuda::Device, gradient: &Tensor, factor: &Tensor) -> Result<()> {
    const BLOCKS: u32 = 8; // per multiprocessor: all its threads
    let kind = gradient.f_kind()?;
    let kernel = named(kind, names!("head_scale"));
    let count = gradient.numel() as i64;
    let enough = round_up(count, COLUMNS * ROW_THREADS) / (COLUMNS * ROW_THREADS);
    let grid = [(BLOCKS * device.multiprocessors()?).min(enough as u32), 1, 1];
    let args = [pointer(gradient, kind)?, Arg::i64(count), pointer(factor, Kind::Float)?];
    device.launch(
        &Launch { source: &HEAD_TILES, kernel, grid, block: [ROW_THREADS as u32, 1, 1], shared: 0 },
        &args,
    )
}

pub(super) fn round_up(x: i64, step: i64) -> i64 {
    (x + step - 1) / step * step
}

/// The head's parameters, ready for kernels.
#[derive(Debug)]
pub(super) struct GpuHead<'a> {
    args: &'a Args<'a>,
    device: cuda::Device,
    /// `(N, D)`.
    pub hidden: Tensor,
    /// `(V, D)`.
    pub weight: Tensor,
    /// `(V,)` in `f32`.
    bias: Option<Tensor>,
    /// Dtype of hidden and weight.
    pub kind: Kind,
    /// Whether libtorch multiplies 16-bit matrices into `f32` here: on GPUs, `bf16` from Ampere on.
    mixed: bool,
}

/// Rows that are swept together.
#[derive(Debug)]
pub(super) struct Rows {
    /// `(R, D)`.
    pub hidden: Tensor,
    /// `(R,)`; negative in rows that only need the sum of their logits.
    pub targets: Tensor,
}

impl Rows {
    pub fn len(&self) -> i64 {
        self.targets.size()[0]
    }

    /// The first `len` rows.
    pub fn first(&self, len: i64) -> Result<Self> {
        Ok(Self { hidden: self.hidden.f_narrow(0, 0, len)?, targets: self.targets.f_narrow(0, 0, len)? })
    }
}

/// Statistics of the rows from sweeps, each `(R,)`.
#[derive(Debug)]
pub(super) struct Stats {
    /// `f32`.
    pub max: Tensor,
    /// `sum(exp(logit - max))`, `f64`.
    pub sum: Tensor,
    /// The target's logit, `f32`.
    pub label: Tensor,
    /// Sum of the logits, `f64`, with a softcap and in rows without a target.
    pub total: Tensor,
}

impl Stats {
    pub fn new(rows: i64, device: Device) -> Result<Self> {
        let new = |kind| Tensor::f_empty([rows], (kind, device));
        Ok(Self {
            max: new(Kind::Float)?,
            sum: new(Kind::Double)?,
            label: new(Kind::Float)?,
            total: new(Kind::Double)?,
        })
    }

    /// The statistics of `len` rows.
    pub fn part(&self, first: i64, len: i64) -> Result<Self> {
        let part = |x: &Tensor| x.f_narrow(0, first, len);
        Ok(Self {
            max: part(&self.max)?,
            sum: part(&self.sum)?,
            label: part(&self.label)?,
            total: part(&self.total)?,
        })
    }

    pub fn args(&self) -> Result<[Arg; 4]> {
        Ok([
            pointer(&self.max, Kind::Float)?,
            pointer(&self.sum, Kind::Double)?,
            pointer(&self.label, Kind::Float)?,
            pointer(&self.total, Kind::Double)?,
        ])
    }
}

/// A buffer for tiles of the same rows, `(R, stride)` in `f32`.
#[derive(Debug)]
pub(super) struct Room(Tensor);

impl Room {
    pub fn new(rows: i64, columns: i64, device: Device) -> Result<Self> {
        Ok(Self(Tensor::f_empty([rows, columns], (Kind::Float, device))?))
    }

    /// The buffer of the first `len` rows, or of all if it has fewer.
    pub fn first(&self, len: i64) -> Result<Self> {
        Ok(Self(self.0.f_narrow(0, 0, len.min(self.0.size()[0]))?))
    }

    /// The result of a kernel in the rows: elements of the head's dtype, at the start of each row.
    fn results(&self, kind: Kind, columns: i64) -> Result<Tensor> {
        let elements =
            if kind == Kind::Float { self.0.shallow_clone() } else { self.0.f_view_dtype(kind)? };
        Ok(elements.f_narrow(1, 0, columns)?)
    }
}

impl<'a> GpuHead<'a> {
    pub fn new(args: &'a Args<'a>, device: cuda::Device) -> Result<Self> {
        let bias = args.bias.map(|bias| bias.f_detach()?.f_to_kind(Kind::Float)?.f_contiguous());
        let kind = args.hidden.f_kind()?;
        let on_card = matches!(args.hidden.device(), Device::Cuda(_));
        Ok(Self {
            args,
            device,
            hidden: args.hidden.f_detach()?.f_contiguous()?,
            weight: args.weight.f_detach()?.f_contiguous()?,
            bias: bias.transpose()?,
            kind,
            mixed: on_card && (kind == Kind::Half || device.capability()?.0 >= 8),
        })
    }

    /// The device of its tensors.
    pub fn place(&self) -> Device {
        self.hidden.device()
    }

    pub fn vocab(&self) -> i64 {
        self.weight.size()[0]
    }

    pub fn width(&self) -> i64 {
        self.weight.size()[1]
    }

    /// Rows of the means of the two sides. A 16-bit type has 8 or 11 bits, and the rounding error becomes
    /// another row.
    pub fn side_rows(&self) -> i64 {
        if self.kind == Kind::Float { 2 } else { 4 }
    }

    /// Sum of the scaled bias, `()` in `f32`.
    pub fn bias_sum(&self) -> Result<Option<Tensor>> {
        let sum = |bias: &Tensor| bias.f_sum(Kind::Float)?.f_mul_scalar(self.args.logit_scale);
        Ok(self.bias.as_ref().map(sum).transpose()?)
    }

    /// The empty gradient, if not needed.
    pub fn nothing(&self) -> Result<Tensor> {
        Ok(Tensor::f_empty([0], (self.kind, self.place()))?)
    }

    pub fn name(&self, names: [&'static str; 3]) -> &'static str {
        named(self.kind, names)
    }

    fn launch(&self, kernel: &'static str, blocks: i64, threads: i64, args: &[Arg]) -> Result<()> {
        let (grid, block) = ([blocks as u32, 1, 1], [threads as u32, 1, 1]);
        self.device.launch(&Launch { source: &HEAD_TILES, kernel, grid, block, shared: 0 }, args)
    }

    /// Launches a kernel of `kernels/head_batch.cu`.
    pub fn launch_batch(&self, kernel: &'static str, blocks: i64, args: &[Arg]) -> Result<()> {
        let (grid, block) = ([blocks as u32, 1, 1], [BATCH_THREADS as u32, 1, 1]);
        self.device.launch(&Launch { source: &HEAD_BATCH, kernel, grid, block, shared: 0 }, args)
    }

    /// Columns of a tile of `rows` rows and about `elements` elements.
    pub fn columns(&self, rows: i64, elements: i64) -> i64 {
        // Matrix products are faster on multiples of their block size; kernels need a multiple of 8.
        let columns = (elements / rows.max(1)).clamp(128, MAX_COLUMNS) & !127;
        columns.min(round_up(self.vocab(), GROUP))
    }

    /// The ranges of the vocabulary's tiles.
    pub fn tiles(&self, columns: i64) -> impl Iterator<Item = Range<i64>> + use<> {
        let vocab = self.vocab();
        (0..vocab).step_by(columns as usize).map(move |first| first..(first + columns).min(vocab))
    }

    fn words(&self, tile: &Range<i64>) -> Result<Tensor> {
        Ok(self.weight.f_narrow(0, tile.start, tile.end - tile.start)?)
    }

    /// `out (+)= a b`, with `out` in `f32`. libtorch adds to what is there where both factors are `f32`.
    fn product(&self, out: &Tensor, a: &Tensor, b: &Tensor, accumulate: bool) -> Result<()> {
        let _ = match (self.kind, accumulate) {
            (Kind::Float, false) => a.f_mm_out(out, b)?,
            (Kind::Float, true) => out.f_addmm_out(out, a, b)?,
            (_, false) => self.widened(out, a, b)?,
            (_, true) => {
                let part = Tensor::f_empty(out.size(), (Kind::Float, self.place()))?;
                return self.add(out, &self.widened(&part, a, b)?);
            }
        };
        Ok(())
    }

    /// `out = a b` of halves, with `out` in `f32`.
    fn widened(&self, out: &Tensor, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        if self.mixed {
            return Ok(a.f_mm_dtype_out(out, b, Kind::Float)?);
        }
        Ok(a.f_to_kind(Kind::Float)?.f_mm_out(out, &b.f_to_kind(Kind::Float)?)?)
    }

    /// `sums += part`, in place; the rows of `sums` may be apart.
    fn add(&self, sums: &Tensor, part: &Tensor) -> Result<()> {
        let (&[rows, width], &[stride, 1]) = (&sums.size()[..], &sums.stride()[..]) else {
            return Err(Error::Internal(format!("rows in one piece are added to, not {sums:?}")));
        };
        let (to, part) = (Arg::ptr(sums.data_ptr() as u64), pointer(part, Kind::Float)?);
        self.launch("head_add", rows, ROW_THREADS, &[to, Arg::i64(stride), part, Arg::i64(width)])
    }

    /// Computes the products of a tile.
    pub fn products(&self, rows: &Rows, tile: &Range<i64>, room: &Room) -> Result<()> {
        let out = room.0.f_narrow(1, 0, tile.end - tile.start)?;
        self.product(&out, &rows.hidden, &self.words(tile)?.f_tr()?, false)
    }

    fn transform(&self) -> [Arg; 2] {
        [Arg::f32(self.args.logit_scale as f32), Arg::f32(self.args.softcap.unwrap_or(0.0) as f32)]
    }

    /// The first arguments of every kernel on a tile.
    fn tile_args(&self, rows: &Rows, tile: &Range<i64>, room: &Room) -> Result<Vec<Arg>> {
        let bias = match &self.bias {
            Some(bias) => pointer(&bias.f_narrow(0, tile.start, tile.end - tile.start)?, Kind::Float)?,
            None => Arg::ptr(0),
        };
        let mut args = vec![
            pointer(&room.0, Kind::Float)?,
            Arg::i64(room.0.size()[1]),
            Arg::i64(tile.start),
            Arg::i32((tile.end - tile.start) as i32),
            bias,
        ];
        args.extend(self.transform());
        args.push(pointer(&rows.targets, Kind::Int64)?);
        Ok(args)
    }

    /// Runs a kernel on every row of a tile.
    fn on_tile(&self, kernel: &'static str, rows: &Rows, tile: &Range<i64>, args: &[Arg]) -> Result<()> {
        let threads = round_up(tile.end - tile.start, WARP * COLUMNS) / COLUMNS;
        self.launch(kernel, rows.len(), threads, args)
    }

    /// Adds a tile of products to the statistics.
    pub fn forward(&self, rows: &Rows, tile: &Range<i64>, room: &Room, stats: &Stats) -> Result<()> {
        let mut args = self.tile_args(rows, tile, room)?;
        args.extend(stats.args()?);
        self.on_tile("head_forward", rows, tile, &args)
    }

    /// Statistics, and `sum(exp(logit - max) * slope * w)` of every row, `(R, D)` with a stride that is a
    /// multiple of 4: two products per tile.
    pub fn expectation(&self, rows: &Rows, columns: i64, stats: &Stats) -> Result<Tensor> {
        let room = Room::new(rows.len(), columns, self.place())?;
        let size = [rows.len(), round_up(self.width(), 4)];
        let accumulated = Tensor::f_empty(size, (Kind::Float, self.place()))?;
        let out = accumulated.f_narrow(1, 0, self.width())?;
        for tile in self.tiles(columns) {
            self.products(rows, &tile, &room)?;
            let mut args = self.tile_args(rows, &tile, &room)?;
            args.extend(stats.args()?);
            args.extend([pointer(&accumulated, Kind::Float)?, Arg::i64(size[1])]);
            self.on_tile(self.name(names!("head_expectation")), rows, &tile, &args)?;
            let powers = room.results(self.kind, tile.end - tile.start)?;
            self.product(&out, &powers, &self.words(&tile)?, tile.start > 0)?;
        }
        Ok(accumulated)
    }

    /// Turns a tile of products into gradients, in place; returns them, `(R, columns)`.
    pub fn gradient(
        &self,
        rows: &Rows,
        tile: &Range<i64>,
        room: &Room,
        stats: &Stats,
        coefficients: &Tensor,
    ) -> Result<Tensor> {
        let mut args = self.tile_args(rows, tile, room)?;
        args.extend(&stats.args()?[..2]);
        args.push(pointer(coefficients, Kind::Float)?);
        self.on_tile(self.name(names!("head_gradient")), rows, tile, &args)?;
        room.results(self.kind, tile.end - tile.start)
    }

    /// `d_hidden (+)= gradients weight`, in `f32`.
    pub fn d_hidden(&self, out: &Tensor, gradients: &Tensor, tile: &Range<i64>) -> Result<()> {
        self.product(out, gradients, &self.words(tile)?, tile.start > 0)
    }

    /// Writes `coefficient * (E_softmax[w] - w_target)` into the rows `index` of `d_hidden`, from what
    /// [`Self::expectation`] returned. Without coefficients they are one.
    pub fn finish(
        &self,
        accumulated: &Tensor,
        rows: &Rows,
        index: &Tensor,
        stats: &Stats,
        coefficients: Option<&Tensor>,
        d_hidden: &Tensor,
    ) -> Result<()> {
        let mut args = vec![
            pointer(accumulated, Kind::Float)?,
            Arg::i64(accumulated.size()[1]),
            pointer(&self.weight, self.kind)?,
            Arg::i64(self.width()),
        ];
        args.extend(self.transform());
        let [_, sum, label, _] = stats.args()?;
        args.extend([pointer(&rows.targets, Kind::Int64)?, pointer(index, Kind::Int64)?, sum, label]);
        args.push(coefficients.map_or_else(|| Ok(Arg::ptr(0)), |a| pointer(a, Kind::Float))?);
        args.push(pointer(d_hidden, self.kind)?);
        self.launch(self.name(names!("head_finish")), index.size()[0], self.row_threads(), &args)
    }

    /// Multiplies the rows `index` of `d_hidden` by their coefficients.
    pub fn scale_rows(&self, d_hidden: &Tensor, index: &Tensor, coefficients: &Tensor) -> Result<()> {
        let args = [
            pointer(d_hidden, self.kind)?,
            Arg::i64(self.width()),
            pointer(index, Kind::Int64)?,
            pointer(coefficients, Kind::Float)?,
        ];
        self.launch(self.name(names!("head_scale_rows")), index.size()[0], self.row_threads(), &args)
    }

    fn row_threads(&self) -> i64 {
        round_up(self.width(), WARP).min(ROW_THREADS)
    }
}
