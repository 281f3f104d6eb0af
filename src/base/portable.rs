//! Threads and matrix products without torch, for tests and for builds without it.

use rayon::prelude::*;

use super::error::Result;
use super::gemm::{Dims, Gemm};
use super::real::Real;
use super::threads::Threads;

/// Plain loops on rayon.
#[derive(Clone, Copy, Debug, Default)]
pub struct Portable;

impl Threads for Portable {
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
