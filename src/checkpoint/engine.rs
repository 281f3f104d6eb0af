//! What the caller of a conversion supplies.

use crate::base::error::Result;
use crate::base::gemm::Gemm;
use crate::base::threads::Threads;
use crate::quant::blockwise8::MAP_LEN;

/// Threads and arithmetic of a conversion.
pub struct ConvertEngine<'a> {
    /// Threads.
    pub threads: &'a dyn Threads,
    /// Matrix products.
    pub gemm: &'a dyn Gemm<f32>,
    /// The mean of scales. The order of its additions decides the last bits; the format uses libtorch's.
    pub mean: &'a dyn Fn(&[f32]) -> Result<f32>,
    /// Values of 8-bit codes, ascending.
    pub map: &'a [f32; MAP_LEN],
    /// Values in a chunk: a multiple of every block size.
    pub chunk: usize,
}

impl std::fmt::Debug for ConvertEngine<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ConvertEngine").field("chunk", &self.chunk).finish_non_exhaustive()
    }
}
