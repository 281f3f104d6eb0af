//! 8-bit blockwise quantisation with a map of 256 values.
//!
//! Dettmers et al. 2022 (arXiv 2110.02861). The dynamic maps of that paper are built from libtorch's
//! `linspace`, whose bits differ between processors, so a map is always an argument here.

use super::GRAIN;
use crate::base::float::Float;
use crate::base::threads::{Threads, for_each};

/// Values of a map.
pub const MAP_LEN: usize = 256;

/// A map, prepared for searching.
#[derive(Debug)]
pub struct Map {
    /// Exact midpoints between consecutive values.
    midpoints: [f64; MAP_LEN - 1],
}

impl Map {
    /// Prepares a map of ascending values.
    #[must_use]
    pub fn new(values: &[f32; MAP_LEN]) -> Self {
        let wide = |i: usize| f64::from(values[i]);
        Self { midpoints: std::array::from_fn(|i| f64::midpoint(wide(i), wide(i + 1))) }
    }

    /// What lies between consecutive codes for `f32` values: `x` has the code of the number of them that are
    /// below it. The midpoints, rounded down, between which and the midpoints there is no `f32`.
    #[must_use]
    pub fn bounds(&self) -> [f32; MAP_LEN - 1] {
        self.midpoints.map(|midpoint| {
            let nearest = midpoint as f32;
            if f64::from(nearest) > midpoint { nearest.next_down() } else { nearest }
        })
    }

    /// The code whose value is nearest to `x`, in `[-1, 1]`; of two, the lower.
    fn code(&self, x: f32) -> u8 {
        self.midpoints.partition_point(|&midpoint| midpoint < f64::from(x)) as u8
    }

    fn block(&self, wide: &[f32], codes: &mut [u8]) -> f32 {
        let absmax =
            wide.iter().fold(0.0f32, |max, x| if x.abs() > max || x.is_nan() { x.abs() } else { max });
        // The inverse of a subnormal overflows.
        let divisor = if absmax == 0.0 { 1.0 } else { absmax };
        for (code, x) in codes.iter_mut().zip(wide) {
            *code = self.code(x / divisor);
        }
        absmax
    }
}

/// Quantises blocks of `blocksize` values: one code per value and the largest magnitude per block. A NaN
/// makes all of its block NaN.
///
/// # Panics
/// If the lengths of `codes` or `absmax` do not match `values`.
pub fn quantize<T: Float>(
    threads: &dyn Threads,
    values: &[T],
    map: &Map,
    blocksize: usize,
    codes: &mut [u8],
    absmax: &mut [f32],
) {
    assert!(codes.len() == values.len() && absmax.len() == values.len().div_ceil(blocksize));
    let blocks = (GRAIN / blocksize).max(1);
    let grain = blocks * blocksize;
    let items = values.chunks(grain).zip(codes.chunks_mut(grain)).zip(absmax.chunks_mut(blocks));
    for_each(threads, items, |((values, codes), absmax)| {
        let mut wide = vec![0.0; blocksize.min(values.len())];
        let blocks = values.chunks(blocksize).zip(codes.chunks_mut(blocksize)).zip(absmax);
        for ((values, codes), absmax) in blocks {
            let wide = &mut wide[..values.len()];
            T::widen(values, wide);
            *absmax = map.block(wide, codes);
        }
    });
}

/// `map[code] * absmax` in `f32`, rounded to the element type.
///
/// # Panics
/// If the lengths of `values` or `absmax` do not match `codes`.
pub fn dequantize<T: Float>(
    threads: &dyn Threads,
    codes: &[u8],
    map: &[f32; MAP_LEN],
    absmax: &[f32],
    blocksize: usize,
    values: &mut [T],
) {
    assert!(codes.len() == values.len() && absmax.len() == values.len().div_ceil(blocksize));
    let blocks = (GRAIN / blocksize).max(1);
    let grain = blocks * blocksize;
    let items = codes.chunks(grain).zip(values.chunks_mut(grain)).zip(absmax.chunks(blocks));
    for_each(threads, items, |((codes, values), absmax)| {
        let blocks = codes.chunks(blocksize).zip(values.chunks_mut(blocksize)).zip(absmax);
        for ((codes, values), absmax) in blocks {
            for (value, &code) in values.iter_mut().zip(codes) {
                *value = T::narrow_one(map[usize::from(code)] * absmax);
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::portable::Portable;

    /// Uneven, ascending, with zero and one, like the dynamic maps.
    fn map() -> [f32; MAP_LEN] {
        std::array::from_fn(|i| {
            let t = (i as f32 - 127.0) / 128.0;
            t * t.abs()
        })
    }

    fn wave(n: usize) -> Vec<f32> {
        (0..n).map(|i| (i as f32 * 0.71).sin() * (1.0 + (i % 13) as f32)).collect()
    }

    #[test]
    fn codes_are_the_nearest() {
        let (values, map) = (wave(1003), map());
        let (mut codes, mut absmax) = (vec![0; 1003], vec![0.0; 4]);
        quantize(&Portable, &values, &Map::new(&map), 256, &mut codes, &mut absmax);
        for (i, (&x, &code)) in values.iter().zip(&codes).enumerate() {
            let scaled = x / absmax[i / 256];
            let distance = |v: f32| (f64::from(v) - f64::from(scaled)).abs();
            let least = map.iter().map(|&v| distance(v)).fold(f64::INFINITY, f64::min);
            assert!(distance(map[usize::from(code)]) <= least);
        }
        let mut back = vec![0.0f32; 1003];
        dequantize(&Portable, &codes, &map, &absmax, 256, &mut back);
        for (i, (x, y)) in back.iter().zip(&codes).enumerate() {
            assert_eq!(*x, map[usize::from(*y)] * absmax[i / 256]);
        }
    }

    #[test]
    fn zero_stays_zero() {
        let (zeros, map) = ([0.0f32; 40], map());
        let (mut codes, mut absmax) = ([9; 40], [9.0; 2]);
        quantize(&Portable, &zeros, &Map::new(&map), 32, &mut codes, &mut absmax);
        assert!(codes.iter().all(|&code| map[usize::from(code)] == 0.0) && absmax == [0.0; 2]);
    }

    #[test]
    fn nan_poisons_its_block_alone() {
        let mut values = wave(96);
        values[40] = f32::NAN;
        let (mut codes, mut absmax) = (vec![0; 96], vec![0.0; 3]);
        let nearest = Map::new(&map());
        quantize(&Portable, &values, &nearest, 32, &mut codes, &mut absmax);
        assert_eq!([false, true, false], [0, 1, 2].map(|i: usize| absmax[i].is_nan()));
    }
}
