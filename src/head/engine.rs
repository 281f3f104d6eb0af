//! The two sweeps over the vocabulary that every variant of the head is made of.
//!
//! A sweep goes over the vocabulary in tiles: the product of the rows with the tile's tokens, then a pass
//! over the product while it is in the cache. The variants differ only in what a sweep keeps:
//!
//! - [`Engine::forward`] keeps per-row statistics, and the logits if asked;
//! - [`Engine::expectation`] accumulates `E_softmax[w]`, rescaling when a row's maximum
//!   moves (online softmax: Milakov and Gimelshein 2018, arXiv 1805.02867), so that a frozen head
//!   needs one sweep;
//! - [`Engine::backward`] turns logits, kept or recomputed, into gradients.

use std::ops::Range;

use super::row;
use super::weight::{Head, Matrix};
use crate::base::error::Result;
use crate::base::gemm::{Dims, Gemm};
use crate::base::huge_pages;
use crate::base::real::Real;
use crate::base::threads::{Threads, for_rows};

/// Elements of a tile of logits: small enough to be read back from the cache by the pass that
/// follows the product, large enough for the product to run at full speed. Tests cut their small
/// vocabularies into several tiles.
const TILE: usize = if cfg!(test) { 1 << 12 } else { 1 << 21 };

/// Most rows that share one sweep, which bounds the tile for long batches.
pub const MAX_ROWS: usize = 4096;

/// Gathered rows: hidden states times the head's logit scale, and the token to score in each.
#[derive(Debug)]
pub struct Rows<T> {
    /// Row-major, `[len, width]`.
    pub hidden: Vec<T>,
    /// Token whose log-probability is needed; none for rows that only need the sum of their logits.
    pub targets: Vec<Option<usize>>,
}

impl<T: Real> Rows<T> {
    /// Gathers the rows `index` of `hidden`.
    pub fn gather(
        threads: &dyn Threads,
        head: &Head<'_, T>,
        hidden: Matrix<'_, T>,
        index: &[usize],
        targets: Vec<Option<usize>>,
    ) -> Self {
        let width = head.width();
        let mut rows = vec![T::ZERO; index.len() * width];
        for_rows(threads, &mut rows, width, &mut vec![(); index.len()], |i, row, ()| {
            hidden.read(index[i] * width..(index[i] + 1) * width, row);
            if head.logit_scale() != T::ONE {
                row::scale(row, head.logit_scale());
            }
        });
        Self { hidden: rows, targets }
    }

    /// Number of rows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.targets.len()
    }

    /// True if there are no rows.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.targets.is_empty()
    }
}

/// Running statistics of a row's softmax.
#[derive(Clone, Copy, Debug)]
pub struct Stats {
    max: f64,
    /// Sum of `exp(logit - max)`.
    sum: f64,
    /// The target's logit.
    label: f64,
    /// Sum of the logits, if needed.
    pub total: f64,
    /// Factor by which this tile's new maximum shrinks what was accumulated before.
    rescale: f64,
}

impl Default for Stats {
    fn default() -> Self {
        Self { max: f64::NEG_INFINITY, sum: 0.0, label: 0.0, total: 0.0, rescale: 1.0 }
    }
}

impl Stats {
    /// Log-sum-exp of the logits.
    #[must_use]
    pub fn lse(&self) -> f64 {
        self.max + self.sum.ln()
    }

    /// Log-probability of the target.
    #[must_use]
    pub fn logp(&self) -> f64 {
        self.label - self.lse()
    }

    /// Moves the maximum to cover `max`; returns the shift for this tile's exponentials, or none
    /// if every logit so far is `-inf`.
    fn raise(&mut self, max: f64) -> Option<f64> {
        self.rescale = 1.0;
        if max.is_nan() {
            self.max = f64::NAN;
        } else if max > self.max {
            self.rescale = (self.max - max).exp();
            self.sum *= self.rescale;
            self.max = max;
        }
        (self.max != f64::NEG_INFINITY).then_some(self.max)
    }
}

/// Memory for logits that the forward sweep keeps for the backward sweep, which recomputes what did not fit.
/// Tiles are contiguous, so that both sweeps run on dense matrices; the memory is reused from block to block,
/// because touching new pages costs as much as a pass.
#[derive(Debug)]
pub struct Kept<T> {
    room: Vec<T>,
    /// End of each kept tile; the first tiles of a sweep are kept.
    ends: Vec<usize>,
    /// A tile did not fit; later tiles are not kept either.
    full: bool,
}

impl<T: Real> Kept<T> {
    /// Allocates room for `elements` elements.
    #[must_use]
    pub fn new(elements: usize) -> Self {
        let mut room = vec![T::ZERO; elements];
        huge_pages::advise(&mut room);
        Self { room, ends: Vec::new(), full: false }
    }

    fn clear(&mut self) {
        self.ends.clear();
        self.full = false;
    }

    /// The memory of the next tile, if it fits.
    fn push(&mut self, size: usize) -> Option<&mut [T]> {
        let start = self.ends.last().copied().unwrap_or(0);
        self.full |= start + size > self.room.len();
        if self.full {
            return None;
        }
        self.ends.push(start + size);
        self.room.get_mut(start..start + size)
    }

    /// A tile of the last forward sweep, if it was kept.
    fn tile(&mut self, index: usize) -> Option<&mut [T]> {
        let end = *self.ends.get(index)?;
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        self.room.get_mut(start..end)
    }
}

/// Outputs for the gradients. Absent ones are not computed.
#[derive(Debug, Default)]
pub struct Gradients<'a, T> {
    /// `[rows, width]`, zero at the start.
    pub hidden: Option<&'a mut [T]>,
    /// `[vocab, width]`.
    pub weight: Option<&'a mut [T]>,
    /// `[vocab]`.
    pub bias: Option<&'a mut [T]>,
    /// Add to `weight` and `bias` instead of overwriting them.
    pub accumulate: bool,
}

/// The first `size` elements of `scratch`, uninitialised.
fn room<T: Real>(scratch: &mut Vec<T>, size: usize) -> &mut [T] {
    if scratch.len() < size {
        *scratch = vec![T::ZERO; size];
        huge_pages::advise(scratch);
    }
    &mut scratch[..size]
}

/// A head with its GEMM and threads.
pub struct Engine<'a, T> {
    /// The head.
    pub head: &'a Head<'a, T>,
    /// Matrix products.
    pub gemm: &'a dyn Gemm<T>,
    /// Threads.
    pub threads: &'a dyn Threads,
}

impl<T: Real> Engine<'_, T> {
    /// The vocabulary's tiles for a sweep of `rows` rows.
    fn tiles(&self, rows: usize) -> impl Iterator<Item = Range<usize>> + use<T> {
        let (vocab, wide) = (self.head.vocab(), (TILE / rows.max(1)).clamp(256, 8192) & !63);
        (0..vocab).step_by(wide).map(move |first| first..(first + wide).min(vocab))
    }

    /// Statistics of every row; `keep` receives the logits as far as they fit.
    ///
    /// # Errors
    /// Errors of the matrix products.
    pub fn forward(&self, rows: &Rows<T>, mut keep: Option<&mut Kept<T>>) -> Result<Vec<Stats>> {
        let mut stats = vec![Stats::default(); rows.len()];
        let (mut scratch, mut widened) = (Vec::new(), Vec::new());
        if let Some(kept) = keep.as_deref_mut() {
            kept.clear();
        }
        for tile in self.tiles(rows.len()) {
            let weight = self.head.tile(self.threads, tile.clone(), &mut widened);
            let size = rows.len() * tile.len();
            let place = keep.as_deref_mut().and_then(|kept| kept.push(size));
            let logits = place.unwrap_or_else(|| room(&mut scratch, size));
            self.logits(rows, weight, &tile, logits, &mut stats, |x, shift| match shift {
                Some(shift) => row::exp_sum(x, shift),
                None => 0.0,
            })?;
        }
        Ok(stats)
    }

    /// Statistics of every row and `d logp / d hidden`, negated: `E_softmax[w] - w_target` (times
    /// the softcap's slope and the logit scale), so that a row's gradient is this times one factor.
    /// Rows without a target get zeros.
    ///
    /// # Errors
    /// Errors of the matrix products.
    pub fn expectation(&self, rows: &Rows<T>, out: &mut [T]) -> Result<Vec<Stats>> {
        let width = self.head.width();
        let mut stats = vec![Stats::default(); rows.len()];
        let (mut scratch, mut widened) = (Vec::new(), Vec::new());
        let softcap = self.head.softcap();
        out.fill(T::ZERO);
        for tile in self.tiles(rows.len()) {
            let weight = self.head.tile(self.threads, tile.clone(), &mut widened);
            let logits = room(&mut scratch, rows.len() * tile.len());
            self.logits(rows, weight, &tile, logits, &mut stats, |x, shift| {
                let Some(shift) = shift else {
                    x.fill(T::ZERO);
                    return 0.0;
                };
                row::exp_in_place(x, shift, softcap)
            })?;
            if tile.start > 0 && stats.iter().any(|s| s.rescale != 1.0) {
                for_rows(self.threads, out, width, &mut stats, |_, row, s| {
                    if s.rescale != 1.0 {
                        row::scale(row, T::from_f64(s.rescale));
                    }
                });
            }
            self.gemm.d_hidden(self.dims(rows.len(), &tile), logits, weight, out)?;
        }
        for_rows(self.threads, out, width, &mut stats, |i, row, s| {
            let Some(token) = rows.targets[i] else {
                return row.fill(T::ZERO);
            };
            let scale = self.head.logit_scale();
            row::scale(row, T::from_f64(1.0 / s.sum) * scale);
            let slope = self.label_slope(s.label);
            let mut target = vec![T::ZERO; width];
            self.head.weight_row(token, &mut target);
            row::axpy(row, -(scale * T::from_f64(slope)), &target);
        });
        Ok(stats)
    }

    /// Gradients of `sum_i -scale_i * logp_i`: every row's softmax minus its target's one-hot,
    /// times `scale`. `kept` has logits of a forward sweep over the same rows, which are overwritten; the
    /// rest are recomputed.
    ///
    /// # Errors
    /// Errors of the matrix products.
    pub fn backward(
        &self,
        rows: &Rows<T>,
        lse: &[f64],
        scale: &[f64],
        mut kept: Option<&mut Kept<T>>,
        grads: &mut Gradients<'_, T>,
    ) -> Result<()> {
        let width = self.head.width();
        let softcap = self.head.softcap();
        let (mut scratch, mut widened) = (Vec::new(), Vec::new());
        let mut labels = vec![Stats::default(); rows.len()];
        let ones = if grads.bias.is_some() { vec![self.head.logit_scale(); rows.len()] } else { vec![] };
        for (index, tile) in self.tiles(rows.len()).enumerate() {
            let dims = self.dims(rows.len(), &tile);
            let weight = self.head.tile(self.threads, tile.clone(), &mut widened);
            let logits = if let Some(logits) = kept.as_deref_mut().and_then(|kept| kept.tile(index)) {
                logits
            } else {
                let logits = room(&mut scratch, rows.len() * tile.len());
                self.logits(rows, weight, &tile, logits, &mut labels, |_, _| 0.0)?;
                logits
            };
            for_rows(self.threads, logits, tile.len(), &mut labels, |i, x, _| {
                let column = rows.targets[i].and_then(|token| token.checked_sub(tile.start));
                let label = column.filter(|&c| c < x.len()).map(|c| (c, x[c].to_f64()));
                if scale[i] == 0.0 {
                    return x.fill(T::ZERO);
                }
                row::softmax_gradient(x, T::from_f64(lse[i]), T::from_f64(scale[i]), softcap);
                if let Some((column, logit)) = label {
                    x[column] += T::from_f64(-scale[i] * self.label_slope(logit));
                }
            });
            if let Some(d_hidden) = grads.hidden.as_deref_mut() {
                self.gemm.d_hidden(dims, logits, weight, d_hidden)?;
            }
            if let Some(d_weight) = grads.weight.as_deref_mut() {
                let d_tile = &mut d_weight[tile.start * width..tile.end * width];
                self.gemm.d_weight(dims, logits, &rows.hidden, d_tile, grads.accumulate)?;
            }
            if let Some(d_bias) = grads.bias.as_deref_mut() {
                let dims = Dims { width: 1, ..dims };
                self.gemm.d_weight(dims, logits, &ones, &mut d_bias[tile], grads.accumulate)?;
            }
        }
        if let Some(d_hidden) = grads.hidden.as_deref_mut().filter(|_| self.head.logit_scale() != T::ONE) {
            row::scale(d_hidden, self.head.logit_scale());
        }
        Ok(())
    }

    fn dims(&self, rows: usize, tile: &Range<usize>) -> Dims {
        Dims { rows, tile: tile.len(), width: self.head.width() }
    }

    /// `d l / d z` at a target's logit.
    fn label_slope(&self, logit: f64) -> f64 {
        self.head.softcap().map_or(1.0, |cap| row::softcap_slope(logit, 1.0 / cap.to_f64()))
    }

    /// One tile of logits and the statistics it adds; `exp` sees each row with the shift for its
    /// exponentials and returns their sum.
    fn logits(
        &self,
        rows: &Rows<T>,
        weight: &[T],
        tile: &Range<usize>,
        logits: &mut [T],
        stats: &mut [Stats],
        exp: impl Fn(&mut [T], Option<T>) -> f64 + Sync,
    ) -> Result<()> {
        let dims = self.dims(rows.len(), tile);
        self.gemm.logits(dims, &rows.hidden, weight, logits)?;
        let transform = self.head.transform(tile.clone());
        for_rows(self.threads, logits, dims.tile, stats, |i, x, s| {
            let max = row::to_logits(x, transform).to_f64();
            let target = rows.targets[i];
            let column = target.and_then(|token| token.checked_sub(tile.start));
            if let Some(logit) = column.and_then(|column| x.get(column)) {
                s.label = logit.to_f64();
            }
            if target.is_none() || transform.softcap.is_some() {
                s.total += row::sum(x);
            }
            let shift = s.raise(max).map(T::from_f64);
            s.sum += exp(x, shift);
        });
        Ok(())
    }
}
