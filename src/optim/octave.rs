//! The 8-bit format of the moments: a number whose precision grows with its size.
//!
//! A magnitude is a code `q` below `2^k`, `k` being 7 beside a sign and 8 without. With `P` the largest
//! power of two up to `q`, its value is
//!
//! ```text
//! value(q) = (7 q - 6 P) P^2,    value(0) = 0
//! ```
//!
//! in units of `8^-k`: the codes from `P` to `2 P` divide the three octaves from `P^3` to `8 P^3` evenly.
//! The dynamic maps of Dettmers et al. 2022 (arXiv 2110.02861) do this with decades instead of octaves, for
//! the same reason: most of a block is within a decade of its largest magnitude, and the rest must not become
//! zero. With powers of two instead of ten, encoding and decoding are a few additions, multiplications and
//! shifts without a table: vector code, with the same bits on CPU and GPU.
//!
//! The second moment is stored as its root, which spans half the decades: otherwise an element with a small
//! gradient, relative to its block, would have a nonzero first moment and a second moment of zero.

use super::adamw::BLOCK;
#[cfg(target_arch = "x86_64")]
use crate::base::simd::Level;

/// Bits of a magnitude with a sign.
const SIGNED: u32 = 7;
/// Bits of a magnitude without a sign.
const UNSIGNED: u32 = 8;

/// Code of zero in codes with a sign.
pub const SIGNED_ZERO: u8 = 128;

/// Value of the largest code of `bits`: the code of a block's largest magnitude.
const fn top(bits: u32) -> f32 {
    (((1u64 << (bits + 2)) - 7) << (2 * bits - 2)) as f32
}

/// Block maxima below this count as zero: their inverse is too large.
const LEAST: f32 = 1e-30;

/// Factor on magnitudes before they are encoded.
#[inline(always)]
const fn inverse(bits: u32, absmax: f32) -> f32 {
    if absmax > LEAST { top(bits) / absmax } else { 0.0 }
}

/// Factor for [`signed_code`].
#[inline(always)]
#[must_use]
pub const fn signed_inverse(absmax: f32) -> f32 {
    inverse(SIGNED, absmax)
}

/// Factor for [`root_code`], of the largest root.
#[inline(always)]
#[must_use]
pub const fn root_inverse(absmax: f32) -> f32 {
    inverse(UNSIGNED, absmax)
}

/// The code of the value nearest to `y`, which is not negative and at most [`top`], as a float.
#[inline(always)]
fn code(y: f32) -> f32 {
    // The octave of y from its exponent, divided by three.
    let octave = (y.to_bits() >> 23).wrapping_sub(127);
    let third = octave.wrapping_mul(171) >> 9;
    let power = f32::from_bits((third.wrapping_add(127)) << 23);
    // y / power^2 by its exponent is exact; adding 6 * power rounds once.
    let scaled = f32::from_bits(y.to_bits().wrapping_sub(third << 24));
    let linear = power.mul_add(6.0, scaled) * (1.0 / 7.0);
    // From 1 on this is below y; between the values 0 and 1 the code is y itself.
    if linear < y { linear } else { y }
}

/// A float whose last eight bits are `q` rounded to the nearest integer (ties to even), plus `zero`.
#[inline(always)]
fn nearest(q: f32, zero: u8) -> f32 {
    // Adding 1.5 * 2^23 leaves no bits for the fraction.
    q + (12_582_912.0 + f32::from(zero))
}

/// The codes of a block, from what [`signed_code`] or [`root_code`] returned.
#[inline(always)]
pub fn pack<const LEVEL: u8>(sums: &[f32; BLOCK], codes: &mut [u8; BLOCK]) {
    #[cfg(target_arch = "x86_64")]
    if LEVEL == Level::Avx2 as u8 {
        // SAFETY: `level` is one that this machine has.
        #[allow(unsafe_code)]
        return unsafe { pack_avx2(sums, codes) };
    }
    for (code, sum) in codes.iter_mut().zip(sums) {
        *code = sum.to_bits() as u8;
    }
}

/// 32 codes at a time: compilers use four times as many shuffles for the plain loop.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
#[inline]
#[allow(clippy::cast_ptr_alignment)] // the load and the store need no alignment
fn pack_avx2(sums: &[f32; BLOCK], codes: &mut [u8; BLOCK]) {
    use std::arch::x86_64::{
        __m256i, _mm256_and_si256, _mm256_loadu_si256, _mm256_packus_epi16, _mm256_packus_epi32,
        _mm256_permutevar8x32_epi32, _mm256_set1_epi32, _mm256_setr_epi32, _mm256_storeu_si256,
    };
    // Packing works on each half of a register.
    let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    for (codes, sums) in codes.as_chunks_mut::<32>().0.iter_mut().zip(sums.as_chunks::<32>().0) {
        let part = |i: usize| {
            // SAFETY: 8 of the 32 floats.
            #[allow(unsafe_code)]
            let bits = unsafe { _mm256_loadu_si256(sums.as_ptr().add(8 * i).cast::<__m256i>()) };
            _mm256_and_si256(bits, _mm256_set1_epi32(0xff))
        };
        let pairs = [_mm256_packus_epi32(part(0), part(1)), _mm256_packus_epi32(part(2), part(3))];
        let bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(pairs[0], pairs[1]), order);
        // SAFETY: 32 bytes.
        #[allow(unsafe_code)]
        unsafe {
            _mm256_storeu_si256(codes.as_mut_ptr().cast::<__m256i>(), bytes);
        }
    }
}

/// The value of a code that is an integer in a float, with its sign.
#[inline(always)]
fn value(q: f32) -> f32 {
    // The sign and exponent only; 0 for 0.
    let power = f32::from_bits(q.to_bits() & 0xff80_0000);
    q.mul_add(7.0, -6.0 * power) * (power * power)
}

const SIGN: u32 = 1 << 31;

/// Code of `x` with its sign, where `inverse` is the block's [`signed_inverse`], for [`pack`].
#[inline(always)]
#[must_use]
pub fn signed_code(x: f32, inverse: f32) -> f32 {
    let q = code(f32::from_bits(x.to_bits() & !SIGN) * inverse);
    nearest(f32::from_bits(q.to_bits() | (x.to_bits() & SIGN)), SIGNED_ZERO)
}

/// Code of a root, where `inverse` is the block's [`root_inverse`], for [`pack`].
#[inline(always)]
#[must_use]
pub fn root_code(root: f32, inverse: f32) -> f32 {
    nearest(code(root * inverse), 0)
}

/// Value of a code with a sign, in units of its block's largest magnitude.
#[inline(always)]
#[must_use]
pub fn signed_value(code: u8) -> f32 {
    value((i32::from(code) - i32::from(SIGNED_ZERO)) as f32) * (1.0 / top(SIGNED))
}

/// Root of a code, in units of its block's largest root.
#[inline(always)]
#[must_use]
pub fn root_value(code: u8) -> f32 {
    value(f32::from(code)) * (1.0 / top(UNSIGNED))
}

/// Values of all codes with a sign, ascending: what bitsandbytes calls `qmap1`.
#[must_use]
pub fn signed_map() -> [f32; 256] {
    std::array::from_fn(|code| signed_value(code as u8))
}

/// Squares of the roots of all codes, ascending: `qmap2`, for scales that are squares too.
#[must_use]
pub fn square_map() -> [f32; 256] {
    std::array::from_fn(|code| {
        let root = root_value(code as u8);
        root * root
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The code of one number.
    fn signed(x: f32, absmax: f32) -> u8 {
        signed_code(x, signed_inverse(absmax)).to_bits() as u8
    }

    fn root(x: f32, absmax: f32) -> u8 {
        root_code(x, root_inverse(absmax)).to_bits() as u8
    }

    #[test]
    fn all_ways_to_pack_are_the_same() {
        let sums: [f32; BLOCK] = std::array::from_fn(|i| signed_code((i as f32 * 0.37).sin(), 2e6));
        let (mut plain, mut packed) = ([0; BLOCK], [1; BLOCK]);
        pack::<{ Level::Baseline as u8 }>(&sums, &mut plain);
        if Level::available().contains(&Level::Avx2) {
            pack::<{ Level::Avx2 as u8 }>(&sums, &mut packed);
            assert_eq!(plain, packed);
        }
        assert!(plain.iter().zip(sums).all(|(code, sum)| *code == sum.to_bits().to_le_bytes()[0]));
    }

    /// The formula of the module's documentation in `f64`.
    fn plain(bits: u32, q: u32) -> f64 {
        let power = if q == 0 { 0.0 } else { f64::from(1u32 << q.ilog2()) };
        let unit = |q: f64, power: f64| (7.0 * q - 6.0 * power) * power * power;
        unit(f64::from(q), power) / unit(f64::from((1u32 << bits) - 1), f64::from(1u32 << (bits - 1)))
    }

    #[test]
    fn values_are_those_of_the_formula() {
        for code in 0..=255u8 {
            let root = plain(UNSIGNED, u32::from(code));
            assert!((f64::from(root_value(code)) - root).abs() <= 1e-7 * root, "{code}");
            let signed = i32::from(code) - 128;
            let expected = plain(SIGNED, signed.unsigned_abs()) * f64::from(signed.signum());
            assert!((f64::from(signed_value(code)) - expected).abs() <= 1e-7 * expected.abs(), "{code}");
        }
        assert_eq!([signed_value(SIGNED_ZERO), root_value(0)], [0.0; 2]);
        assert_eq!([signed_value(255), signed_value(1), root_value(255)], [1.0, -1.0, 1.0]);
        // 8^-7 = 4.8e-7 and 8^-8 = 6e-8, over the largest.
        assert!(signed_value(129) < 4.9e-7 && root_value(1) < 6.1e-8);
        for map in [signed_map(), square_map()] {
            assert!(map.windows(2).all(|pair| pair[0] < pair[1]));
        }
    }

    #[test]
    fn codes_are_the_nearest() {
        let steps = (0..200_000).map(|i| 10f32.powf(-8.0 * i as f32 / 200_000.0));
        for x in steps.chain([0.0, 1.0, 1e-9, f32::MIN_POSITIVE]) {
            // A code is off by one only within 1e-4 of the gap around a midpoint.
            let check = |found: f64, values: &dyn Fn(u8) -> f32| {
                let distance = |code: u8| (f64::from(values(code)) - f64::from(x)).abs();
                let nearest = (0..=255u8).min_by(|&a, &b| distance(a).total_cmp(&distance(b))).unwrap();
                let gap = f64::from(values(nearest.saturating_add(1))) - f64::from(values(nearest));
                let error = (found - f64::from(x)).abs();
                assert!(error <= distance(nearest) + 1e-4 * gap.max(1e-3), "{x} {found}");
            };
            check(f64::from(root_value(root(x, 1.0))), &root_value);
            check(f64::from(signed_value(signed(x, 1.0))), &signed_value);
            let mirrored = signed_value(signed(-x, 1.0));
            assert_eq!(mirrored, -signed_value(signed(x, 1.0)));
        }
    }

    #[test]
    fn every_code_comes_back() {
        for absmax in [1.0, 3.7e-9, 0.1, 812.5, 3e20, 2e-30] {
            for code in 1..=255u8 {
                assert_eq!(signed(signed_value(code) * absmax, absmax), code);
                assert_eq!(root(root_value(code) * absmax, absmax), code);
            }
        }
    }

    #[test]
    fn what_is_too_small_for_an_inverse_is_zero() {
        for absmax in [0.0, f32::MIN_POSITIVE, 1e-40] {
            assert_eq!(signed(-absmax, absmax), SIGNED_ZERO);
            assert_eq!(root(absmax, absmax), 0);
        }
    }
}
