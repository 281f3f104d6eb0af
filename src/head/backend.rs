//! What the head borrows from its surroundings: matrix products and a team of threads.
//!
//! Inside torch these are libtorch's GEMM and torch's own OpenMP team (`crate::torch`); without it
//! [`Portable`] runs the same algorithm on plain loops and rayon.

use std::ops::Range;
use std::sync::Mutex;

use rayon::prelude::*;

use super::real::Real;
use crate::error::Result;

/// Sizes of a matrix product: `m` rows of the left operand as stored, `n` and `k` as named by the
/// method.
#[derive(Clone, Copy, Debug)]
pub struct Dims {
    /// Rows of the tokens.
    pub rows: usize,
    /// Columns of the vocabulary tile.
    pub tile: usize,
    /// Hidden size.
    pub width: usize,
}

/// The three matrix products of the head, on row-major slices.
pub trait Gemm<T>: Sync {
    /// `logits[rows, tile] = hidden[rows, width] weight[tile, width]^T`.
    ///
    /// # Errors
    /// What the implementation reports.
    fn logits(&self, dims: Dims, hidden: &[T], weight: &[T], logits: &mut [T]) -> Result<()>;

    /// `d_hidden[rows, width] += grad[rows, tile] weight[tile, width]`.
    ///
    /// # Errors
    /// What the implementation reports.
    fn d_hidden(&self, dims: Dims, grad: &[T], weight: &[T], d_hidden: &mut [T]) -> Result<()>;

    /// `d_weight[tile, width] (+)= grad[rows, tile]^T hidden[rows, width]`; adds to what is there
    /// if `accumulate`.
    ///
    /// # Errors
    /// What the implementation reports.
    fn d_weight(
        &self,
        dims: Dims,
        grad: &[T],
        hidden: &[T],
        d_weight: &mut [T],
        accumulate: bool,
    ) -> Result<()>;
}

/// A fixed team of threads.
pub trait Team: Sync {
    /// Number of members.
    fn size(&self) -> usize;

    /// Runs `task(0), .., task(tasks - 1)`, in parallel where it can, and returns when all are done.
    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync));
}

/// Splits `0..items` evenly over the team and hands each member its range.
pub fn split(team: &dyn Team, items: usize, f: impl Fn(Range<usize>) + Sync) {
    let parts = team.size().clamp(1, items.max(1));
    team.run(parts, &|part| f(items * part / parts..items * (part + 1) / parts));
}

/// Calls `f(row, columns, state)` for every row of a row-major matrix in parallel, where `states`
/// has an entry a row.
pub fn for_rows<T: Send, S: Send>(
    team: &dyn Team,
    matrix: &mut [T],
    width: usize,
    states: &mut [S],
    f: impl Fn(usize, &mut [T], &mut S) + Sync,
) {
    let rows = states.len();
    debug_assert_eq!(matrix.len(), rows * width);
    let parts = team.size().clamp(1, rows.max(1));
    // Each member takes its own disjoint chunk out of its slot; the lock is never contended.
    let mut slots = Vec::with_capacity(parts);
    let (mut matrix, mut states) = (matrix, states);
    for part in 0..parts {
        let (first, end) = (rows * part / parts, rows * (part + 1) / parts);
        let (chunk, rest) = matrix.split_at_mut((end - first) * width);
        let (state, others) = states.split_at_mut(end - first);
        slots.push(Mutex::new(Some((first, chunk, state))));
        (matrix, states) = (rest, others);
    }
    team.run(parts, &|part| {
        let taken = slots[part].lock().ok().and_then(|mut slot| slot.take());
        if let Some((first, chunk, state)) = taken {
            for (i, (row, state)) in chunk.chunks_exact_mut(width).zip(state).enumerate() {
                f(first + i, row, state);
            }
        }
    });
}

/// Plain loops on rayon: for tests, and for builds without torch.
#[derive(Clone, Copy, Debug, Default)]
pub struct Portable;

impl Team for Portable {
    fn size(&self) -> usize {
        rayon::current_num_threads()
    }

    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        (0..tasks).into_par_iter().for_each(task);
    }
}

impl<T: Real> Gemm<T> for Portable {
    fn logits(&self, dims: Dims, hidden: &[T], weight: &[T], logits: &mut [T]) -> Result<()> {
        let rows = logits.par_chunks_exact_mut(dims.tile).zip(hidden.par_chunks_exact(dims.width));
        rows.for_each(|(out, h)| {
            for (out, w) in out.iter_mut().zip(weight.chunks_exact(dims.width)) {
                *out = h.iter().zip(w).map(|(h, w)| *h * *w).sum();
            }
        });
        Ok(())
    }

    fn d_hidden(&self, dims: Dims, grad: &[T], weight: &[T], d_hidden: &mut [T]) -> Result<()> {
        let rows = d_hidden.par_chunks_exact_mut(dims.width).zip(grad.par_chunks_exact(dims.tile));
        rows.for_each(|(out, g)| {
            for (g, w) in g.iter().zip(weight.chunks_exact(dims.width)) {
                for (out, w) in out.iter_mut().zip(w) {
                    *out += *g * *w;
                }
            }
        });
        Ok(())
    }

    fn d_weight(
        &self,
        dims: Dims,
        grad: &[T],
        hidden: &[T],
        d_weight: &mut [T],
        accumulate: bool,
    ) -> Result<()> {
        d_weight.par_chunks_exact_mut(dims.width).enumerate().for_each(|(column, out)| {
            if !accumulate {
                out.fill(T::ZERO);
            }
            for (g, h) in grad.chunks_exact(dims.tile).zip(hidden.chunks_exact(dims.width)) {
                for (out, h) in out.iter_mut().zip(h) {
                    *out += g[column] * *h;
                }
            }
        });
        Ok(())
    }
}
