//! 4-bit `NormalFloat` (NF4) and 8-bit blockwise quantisation on slices.
//!
//! Dettmers et al. 2023 (arXiv 2305.14314): blocks of a flat tensor share a scale, and every value is
//! the nearest of 16 numbers times that scale. [`codebook`] has the numbers, [`nf4`] turns values into
//! codes and back, [`packed`] is a tensor of codes, [`blockwise8`] is the 8-bit form that compresses the
//! scales, [`scales`] reads them plain or compressed, and [`product`] multiplies by a 4-bit matrix without
//! unpacking it. `unpack` has the vector code from codes to values, `pack` from values to codes.

pub mod blockwise8;
pub mod codebook;
pub mod nf4;
mod pack;
pub mod packed;
pub mod product;
pub mod scales;
mod unpack;

/// Block sizes of the format.
pub const BLOCK_SIZES: [usize; 8] = [32, 64, 128, 256, 512, 1024, 2048, 4096];

/// Elements of a task: a multiple of every block size, and small enough for the L2 cache.
const GRAIN: usize = 16_384;
