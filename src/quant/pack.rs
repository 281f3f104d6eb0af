//! Values to codes, one full block at a time.
//!
//! With AVX-512 a value finds its code in two look-ups: 32 equal buckets over `[-1, 1]` are narrower than the
//! distance between midpoints, so the table has for each bucket the number of midpoints below it and the one
//! midpoint, at most, inside it. With AVX2 it is a binary search of four comparisons.
#![allow(unsafe_code)] // vector instructions, behind their run-time check, on pointers of checked length
#![cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] // what only vector code uses

use super::codebook::MIDPOINTS;
use crate::base::float::Float;
use crate::base::simd::Level;

/// Below this the inverse of a scale is not usable.
pub(super) const LEAST: f32 = 1e-38;

/// Packs a block, a multiple of 32 values, and returns its largest magnitude; `None` without vector
/// code, or if a value is NaN or infinite.
///
/// # Panics
/// If `packed` does not have half as many bytes.
#[inline(always)]
pub fn whole_block<T: Float>(level: Level, values: &[T], packed: &mut [u8]) -> Option<f32> {
    assert!(values.len().is_multiple_of(32) && packed.len() * 2 == values.len());
    let largest: Option<f32> = match level {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `level` is one that this machine has; the lengths were compared above.
        Level::Avx512 => Some(unsafe { x86::block_avx512(values, packed) }),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Level::Avx2 => Some(unsafe { x86::block_avx2(values, packed) }),
        _ => None,
    };
    largest.filter(|largest| largest.is_finite())
}

/// Factor on a block.
#[inline(always)]
fn inverse(largest: f32) -> f32 {
    1.0 / if largest < LEAST { LEAST } else { largest }
}

/// `SLOPE * x + MIDDLE` is in `[0.25, 31.25]` for `x` in `[-1, 1]`.
const SLOPE: f32 = 15.5;
const MIDDLE: f32 = 15.75;

/// The midpoint in each bucket, and the number of midpoints below it.
const BUCKETS: ([f32; 32], [u32; 32]) = {
    let (mut midpoints, mut below) = ([f32::INFINITY; 32], [0; 32]);
    let mut bucket = 0;
    while bucket < 32 {
        let mut i = 0;
        while i < 15 {
            // No midpoint is near the edge of a bucket, where rounding could move it.
            let place = SLOPE * MIDPOINTS[i] + MIDDLE;
            if place >= bucket as f32 && place < (bucket + 1) as f32 {
                midpoints[bucket] = MIDPOINTS[i];
            } else if place < bucket as f32 {
                below[bucket] += 1;
            }
            i += 1;
        }
        bucket += 1;
    }
    (midpoints, below)
};

#[cfg(target_arch = "x86_64")]
mod x86 {
    #[allow(clippy::wildcard_imports)] // dozens of names otherwise
    use std::arch::x86_64::*;

    use super::{BUCKETS, MIDDLE, SLOPE, inverse};
    use crate::base::float::{Dtype, Float};
    use crate::quant::codebook::MIDPOINTS;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn load_512<T: Float>(values: *const T) -> __m512 {
        // SAFETY: the callers guarantee 16 values.
        unsafe {
            match T::DTYPE {
                Dtype::F32 => _mm512_loadu_ps(values.cast()),
                Dtype::F16 => _mm512_cvtph_ps(_mm256_loadu_si256(values.cast())),
                Dtype::Bf16 => {
                    let words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(values.cast()));
                    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(words))
                }
            }
        }
    }

    /// # Safety
    /// The machine has the features, the number of values is a multiple of 32, and `packed` has half as many
    /// bytes.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    pub unsafe fn block_avx512<T: Float>(values: &[T], packed: &mut [u8]) -> f32 {
        let from = values.as_ptr();
        // SAFETY: by the contract above.
        unsafe {
            // Compared as integers, so that NaN is above every number.
            let magnitude = _mm512_set1_epi32(0x7fff_ffff);
            let mut largest = _mm512_setzero_si512();
            for i in (0..values.len()).step_by(16) {
                let bits = _mm512_castps_si512(load_512(from.add(i)));
                largest = _mm512_max_epu32(largest, _mm512_and_si512(bits, magnitude));
            }
            let largest = f32::from_bits(_mm512_reduce_max_epu32(largest));
            let scale = _mm512_set1_ps(inverse(largest));
            let midpoints =
                [_mm512_loadu_ps(BUCKETS.0.as_ptr()), _mm512_loadu_ps(BUCKETS.0.as_ptr().add(16))];
            let below = [
                _mm512_loadu_si512(BUCKETS.1.as_ptr().cast()),
                _mm512_loadu_si512(BUCKETS.1.as_ptr().add(16).cast()),
            ];
            let (slope, middle) = (_mm512_set1_ps(SLOPE), _mm512_set1_ps(MIDDLE));
            let one = _mm512_set1_epi32(1);
            for i in (0..values.len()).step_by(16) {
                let x = _mm512_mul_ps(load_512(from.add(i)), scale);
                let bucket = _mm512_cvttps_epi32(_mm512_fmadd_ps(x, slope, middle));
                let midpoint = _mm512_permutex2var_ps(midpoints[0], bucket, midpoints[1]);
                let code = _mm512_permutex2var_epi32(below[0], bucket, below[1]);
                let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(x, midpoint);
                let code = _mm512_mask_add_epi32(code, above, code, one);
                // The first of two lanes goes to the high half of a byte, the second to the low.
                let pair = _mm512_or_si512(_mm512_slli_epi64::<4>(code), _mm512_srli_epi64::<32>(code));
                _mm_storel_epi64(packed.as_mut_ptr().add(i / 2).cast(), _mm512_cvtepi64_epi8(pair));
            }
            largest
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load_256<T: Float>(values: *const T) -> __m256 {
        // SAFETY: the callers guarantee 8 values.
        unsafe {
            match T::DTYPE {
                Dtype::F32 => _mm256_loadu_ps(values.cast()),
                Dtype::F16 => _mm256_cvtph_ps(_mm_loadu_si128(values.cast())),
                Dtype::Bf16 => {
                    let words = _mm256_cvtepu16_epi32(_mm_loadu_si128(values.cast()));
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words))
                }
            }
        }
    }

    /// # Safety
    /// As [`block_avx512`].
    #[target_feature(enable = "avx2,fma,f16c")]
    pub unsafe fn block_avx2<T: Float>(values: &[T], packed: &mut [u8]) -> f32 {
        let from = values.as_ptr();
        // SAFETY: by the contract above.
        unsafe {
            let magnitude = _mm256_set1_epi32(0x7fff_ffff);
            let mut largest = _mm256_setzero_si256();
            for i in (0..values.len()).step_by(8) {
                let bits = _mm256_castps_si256(load_256(from.add(i)));
                largest = _mm256_max_epu32(largest, _mm256_and_si256(bits, magnitude));
            }
            let mut lanes = [0u32; 8];
            _mm256_storeu_si256(lanes.as_mut_ptr().cast(), largest);
            let largest = f32::from_bits(lanes.into_iter().fold(0, u32::max));
            let scale = _mm256_set1_ps(inverse(largest));
            let m = MIDPOINTS;
            let root = _mm256_set1_ps(m[7]);
            let two = _mm256_setr_ps(m[3], m[11], 0.0, 0.0, 0.0, 0.0, 0.0, 0.0);
            let four = _mm256_setr_ps(m[1], m[5], m[9], m[13], 0.0, 0.0, 0.0, 0.0);
            let eight = _mm256_setr_ps(m[0], m[2], m[4], m[6], m[8], m[10], m[12], m[14]);
            let weights = _mm256_set1_epi16(0x0110);
            for i in (0..values.len()).step_by(32) {
                let mut codes = [_mm256_setzero_si256(); 4];
                for (j, code) in codes.iter_mut().enumerate() {
                    let x = _mm256_mul_ps(load_256(from.add(i + 8 * j)), scale);
                    // All bits are set if x is above: minus one.
                    let above = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_GT_OQ>(x, root));
                    *code = _mm256_sub_epi32(_mm256_setzero_si256(), above);
                    for table in [two, four, eight] {
                        let midpoint = _mm256_permutevar8x32_ps(table, *code);
                        let above = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_GT_OQ>(x, midpoint));
                        *code = _mm256_sub_epi32(_mm256_add_epi32(*code, *code), above);
                    }
                }
                // Within each half: four codes of each vector, alternating.
                let words =
                    [_mm256_packus_epi32(codes[0], codes[1]), _mm256_packus_epi32(codes[2], codes[3])];
                let bytes = _mm256_packus_epi16(words[0], words[1]);
                let pairs = _mm256_maddubs_epi16(bytes, weights);
                let pairs = _mm256_packus_epi16(pairs, pairs);
                let (low, high) = (_mm256_castsi256_si128(pairs), _mm256_extracti128_si256::<1>(pairs));
                _mm_storeu_si128(packed.as_mut_ptr().add(i / 2).cast(), _mm_unpacklo_epi16(low, high));
            }
            largest
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::codebook::nearest;

    #[test]
    fn no_midpoint_is_near_the_edge_of_a_bucket() {
        for midpoint in MIDPOINTS {
            let place = SLOPE * midpoint + MIDDLE;
            assert!((place - place.round()).abs() > 0.01, "{midpoint} {place}");
        }
        assert_eq!(BUCKETS.0.iter().filter(|x| x.is_finite()).count(), 15);
    }

    #[test]
    fn codes_are_the_nearest_around_every_midpoint_and_edge() {
        let mut values = vec![1.0f32, -1.0, 0.0, -0.0, f32::MIN_POSITIVE, 1e-40, -1e-40];
        let edges = (0..32).map(|bucket| (bucket as f32 - MIDDLE) / SLOPE);
        for x in MIDPOINTS.into_iter().chain(edges).filter(|x| x.abs() < 1.0) {
            values.extend([x, x.next_up(), x.next_down(), x.next_up().next_up()]);
        }
        values.extend((0..4000).map(|i| (i as f32 * 0.77).sin()));
        for level in Level::available() {
            for chunk in values.chunks(31) {
                // A value of one makes the scale one.
                let mut block = vec![1.0; 32];
                block[1..=chunk.len()].copy_from_slice(chunk);
                let mut packed = [0; 16];
                let Some(largest) = whole_block(*level, &block, &mut packed) else {
                    assert_eq!(*level, Level::Baseline);
                    continue;
                };
                assert_eq!(largest, 1.0);
                for (pair, byte) in block.chunks(2).zip(packed) {
                    assert_eq!(byte, nearest(pair[0]) << 4 | nearest(pair[1]), "{level:?} {pair:?}");
                }
            }
        }
    }
}
