//! NF4: values to codes and back, bit-equal to bitsandbytes 0.50 on a CPU.
//!
//! The rules that are not obvious: a full block is multiplied by the inverse of its scale, a partial last
//! block is divided by it; a scale below 1e-38 counts as 1e-38, and only a partial block stores 1e-38 as its
//! scale, so a block of zeros has scale 0 and codes of zero. A NaN makes the scale NaN and all codes 15, so
//! every value of the block is NaN. An infinity makes the scale infinite, gives finite values the code of
//! zero (which decodes to NaN, `0 * inf`) and both infinities code 15.

use super::codebook::{MIDPOINTS, ZERO, nearest};
use super::pack::LEAST;
use super::packed::Packed;
use super::{BLOCK_SIZES, GRAIN, pack, unpack};
use crate::base::float::Float;
use crate::base::simd::Level;
use crate::base::threads::{Threads, for_each};

/// Longest block.
const LONGEST: usize = 4096;

/// Quantises `values` in blocks: two codes per byte, the first in the high half, and one scale per block.
///
/// # Panics
/// If `blocksize` is none of [`super::BLOCK_SIZES`], or the lengths of `packed` or `absmax` do not match
/// `values`.
pub fn quantize<T: Float>(
    threads: &dyn Threads,
    values: &[T],
    blocksize: usize,
    packed: &mut [u8],
    absmax: &mut [f32],
) {
    assert!(BLOCK_SIZES.contains(&blocksize));
    assert!(packed.len() == values.len().div_ceil(2) && absmax.len() == values.len().div_ceil(blocksize));
    let level = Level::best();
    let items =
        values.chunks(GRAIN).zip(packed.chunks_mut(GRAIN / 2)).zip(absmax.chunks_mut(GRAIN / blocksize));
    for_each(threads, items, |((values, packed), absmax)| {
        blocks_at(level, values, blocksize, packed, absmax);
    });
}

fn blocks_at<T: Float>(level: Level, values: &[T], blocksize: usize, packed: &mut [u8], absmax: &mut [f32]) {
    match level {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `level` is one that this machine has.
        #[allow(unsafe_code)]
        Level::Avx512 => unsafe { blocks_avx512(values, blocksize, packed, absmax) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        #[allow(unsafe_code)]
        Level::Avx2 => unsafe { blocks_avx2(values, blocksize, packed, absmax) },
        _ => blocks(Level::Baseline, values, blocksize, packed, absmax),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn blocks_avx512<T: Float>(values: &[T], blocksize: usize, packed: &mut [u8], absmax: &mut [f32]) {
    blocks(Level::Avx512, values, blocksize, packed, absmax);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn blocks_avx2<T: Float>(values: &[T], blocksize: usize, packed: &mut [u8], absmax: &mut [f32]) {
    blocks(Level::Avx2, values, blocksize, packed, absmax);
}

#[inline(always)]
fn blocks<T: Float>(level: Level, values: &[T], blocksize: usize, packed: &mut [u8], absmax: &mut [f32]) {
    let blocks = values.chunks(blocksize).zip(packed.chunks_mut(blocksize / 2)).zip(absmax);
    for ((values, packed), absmax) in blocks {
        let whole = values.len() == blocksize;
        let quick = if whole { pack::whole_block(level, values, packed) } else { None };
        *absmax = quick.unwrap_or_else(|| any_block(values, whole, packed));
    }
}

/// Quantises a block of any length, NaN and infinity included, and returns its scale.
#[inline(never)]
fn any_block<T: Float>(values: &[T], whole: bool, packed: &mut [u8]) -> f32 {
    let mut wide = [0.0f32; LONGEST];
    let wide = &mut wide[..values.len()];
    T::widen(values, wide);
    // Compared as integers, so that NaN is above every number.
    let bits = wide.iter().map(|x| x.to_bits() & 0x7fff_ffff).fold(0, u32::max);
    let largest = f32::from_bits(bits);
    let scale = if largest < LEAST { LEAST } else { largest };
    if whole {
        let inverse = 1.0 / scale;
        for x in wide.iter_mut() {
            *x *= inverse;
        }
    } else {
        for x in wide.iter_mut() {
            *x /= scale;
        }
    }
    if whole && scale.is_finite() {
        pack_finite(wide, packed);
    } else {
        pack_any(wide, packed);
    }
    if whole { largest } else { scale }
}

/// 32 values at a time, by counting midpoints: 15 comparisons become vector code, a binary search does not.
#[inline(always)]
fn pack_finite(scaled: &[f32], packed: &mut [u8]) {
    for (scaled, packed) in scaled.chunks_exact(32).zip(packed.chunks_exact_mut(16)) {
        let mut codes = [0u32; 32];
        for midpoint in MIDPOINTS {
            for i in 0..32 {
                codes[i] += u32::from(scaled[i] > midpoint);
            }
        }
        for i in 0..16 {
            packed[i] = (codes[2 * i] << 4 | codes[2 * i + 1]) as u8;
        }
    }
}

/// Any number of values, NaN included.
fn pack_any(scaled: &[f32], packed: &mut [u8]) {
    for (pair, packed) in scaled.chunks(2).zip(packed) {
        *packed = nearest(pair[0]) << 4 | pair.get(1).map_or(ZERO, |&x| nearest(x));
    }
}

/// All values: `f32(code * scale)`, rounded to the element type.
///
/// # Panics
/// If `packed` has too few bytes or scales.
pub fn dequantize<T: Float>(threads: &dyn Threads, packed: &Packed<'_>, values: &mut [T]) {
    let level = Level::best();
    for_each(threads, values.chunks_mut(GRAIN).enumerate(), |(i, values)| {
        unpack::read(level, packed, i * GRAIN, values);
    });
}

/// A rectangle of a row-major matrix: `columns` columns starting at `column`, and the rows from `row` on.
#[derive(Clone, Copy, Debug)]
pub struct Tile {
    /// Columns of the matrix.
    pub width: usize,
    /// First row.
    pub row: usize,
    /// First column.
    pub column: usize,
    /// Columns of the tile.
    pub columns: usize,
}

/// Fills `values`, row-major, with the tile; it has as many rows as fit.
///
/// # Panics
/// If the tile is not within the matrix.
pub fn dequantize_tile<T: Float>(threads: &dyn Threads, packed: &Packed<'_>, tile: Tile, values: &mut [T]) {
    let level = Level::best();
    // Tiles can be narrow: a task has several rows.
    let rows = (GRAIN / tile.columns).max(1);
    for_each(threads, values.chunks_mut(rows * tile.columns).enumerate(), |(i, values)| {
        for (j, values) in values.chunks_exact_mut(tile.columns).enumerate() {
            let start = (tile.row + i * rows + j) * tile.width + tile.column;
            unpack::read(level, packed, start, values);
        }
    });
}

#[cfg(test)]
mod tests;
