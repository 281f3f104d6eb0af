//! Matrix products, which the caller of an algorithm supplies.
//!
//! Inside torch this is libtorch's GEMM (`crate::torch::gemm`); without it [`super::portable`] has plain
//! loops.

use super::error::Result;

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
    /// Errors of the implementation.
    fn logits(&self, dims: Dims, hidden: &[T], weight: &[T], logits: &mut [T]) -> Result<()>;

    /// `d_hidden[rows, width] += grad[rows, tile] weight[tile, width]`.
    ///
    /// # Errors
    /// Errors of the implementation.
    fn d_hidden(&self, dims: Dims, grad: &[T], weight: &[T], d_hidden: &mut [T]) -> Result<()>;

    /// `d_weight[tile, width] (+)= grad[rows, tile]^T hidden[rows, width]`; adds to the old values if
    /// `accumulate`.
    ///
    /// # Errors
    /// Errors of the implementation.
    fn d_weight(
        &self,
        dims: Dims,
        grad: &[T],
        hidden: &[T],
        d_weight: &mut [T],
        accumulate: bool,
    ) -> Result<()>;
}
