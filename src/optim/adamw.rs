//! `AdamW` (Loshchilov and Hutter 2019, arXiv 1711.05101): the rule, and its form with `f32` moments.
//!
//! `mul_add` is a fused multiply-add on every processor and every other operation is rounded, so that all
//! vector code and the CUDA kernel give the same bits.

use crate::base::float::{Dtype, Float};
use crate::base::simd::on_levels;

/// Elements of a block: its 8-bit moments share a scale, and the passes work block by block.
pub const BLOCK: usize = 256;

/// Smallest value added to a root, so that a gradient of zero is not divided by zero, and one whose square is
/// zero in `f32` (2e-23) is not divided by something smaller than itself.
pub const LEAST_EPS: f32 = 1e-20;

/// What is the same for all elements of a parameter in step `t`, counted from 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rule {
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second.
    pub beta2: f32,
    /// `eps * sqrt(1 - beta2^t)`: added to the root before the bias correction. At least
    /// [`LEAST_EPS`].
    pub eps: f32,
    /// `-lr * sqrt(1 - beta2^t) / (1 - beta1^t)`.
    pub step_size: f32,
    /// `1 - lr * weight_decay`.
    pub keep: f32,
    /// Seed of stochastic rounding, for `bf16`; none: round to nearest.
    pub seed: Option<u32>,
}

/// The moments and the value of an element after a step, from those before. If the gradient, or its square,
/// is not finite, the element is kept and its moments are reset.
///
/// Also returns the root of the second moment.
#[inline(always)]
pub(super) fn element(rule: &Rule, value: f32, grad: f32, m: f32, v: f32) -> AdamUpdate {
    let square = grad * grad;
    // A mask of all bits or none, because a branch would prevent vector code. NaN compares as false too.
    let finite = u32::from(square < f32::INFINITY).wrapping_neg();
    let masked = |x: f32| f32::from_bits(x.to_bits() & finite);
    let m = masked(rule.beta1.mul_add(m, (1.0 - rule.beta1) * grad));
    let v = masked(rule.beta2.mul_add(v, (1.0 - rule.beta2) * square));
    let root = v.sqrt();
    // Zero over eps where the moments are reset. The factor is selected, not the value: storing a value in
    // some lanes only is a masked store, which takes tens of cycles on some processors.
    let keep = f32::from_bits((rule.keep.to_bits() & finite) | (1.0f32.to_bits() & !finite));
    let value = rule.step_size.mul_add(m / (root + rule.eps), value) * keep;
    AdamUpdate { value, m, v, root, bad: finite.wrapping_add(1) }
}

/// See [`element`].
#[derive(Clone, Copy, Debug)]
pub(super) struct AdamUpdate {
    pub value: f32,
    pub m: f32,
    pub v: f32,
    pub root: f32,
    pub bad: u32,
}

/// Rounds a block's values to the dtype of the parameter.
///
/// With a seed, `bf16` is rounded up with the probability that keeps the mean. The random bits depend only on
/// the seed and the element's index, so that a run can be repeated.
#[inline(always)]
pub(super) fn store<T: Float>(wide: &[f32; BLOCK], seed: Option<u32>, first: u64, values: &mut [T]) {
    if let (Some(seed), Dtype::Bf16) = (seed, T::DTYPE) {
        let start = (first as u32) ^ ((first >> 32) as u32).wrapping_mul(0x9e37_79b9);
        for (i, (value, wide)) in values.iter_mut().zip(wide).enumerate() {
            *value = T::narrow_one(nudged(*wide, noise(start.wrapping_add(i as u32), seed)));
        }
        return;
    }
    let (groups, rest) = values.as_chunks_mut::<16>();
    let (wide_groups, _) = wide.as_chunks::<16>();
    for (values, wide) in groups.iter_mut().zip(wide_groups) {
        *values = T::narrow(wide);
    }
    for (value, wide) in rest.iter_mut().zip(&wide[groups.len() * 16..]) {
        *value = T::narrow_one(*wide);
    }
}

/// 16 uniform bits from an index (the finaliser of `MurmurHash3`).
#[inline(always)]
fn noise(place: u32, seed: u32) -> u32 {
    let mut bits = place ^ seed;
    bits = (bits ^ (bits >> 16)).wrapping_mul(0x85eb_ca6b);
    bits = (bits ^ (bits >> 13)).wrapping_mul(0xc2b2_ae35);
    (bits ^ (bits >> 16)) & 0xffff
}

/// Rounds `x` to the upper of its two `bf16` neighbours if the noise is less than its distance from the
/// lower.
#[inline(always)]
fn nudged(x: f32, noise: u32) -> f32 {
    // Infinity and NaN are kept; a mask, as in `element`.
    let finite = u32::from(x.abs() < f32::INFINITY).wrapping_neg();
    f32::from_bits(x.to_bits().wrapping_add(noise & finite) & (0xffff_0000 | !finite))
}

on_levels! {
    /// One step on some elements with `f32` moments; `first` is the index of the first one in its parameter.
    /// Returns how many gradients were not finite.
    ///
    /// # Panics
    /// If the slices are not equally long.
    pub fn update<P: Float, G: Float>(
        rule: &Rule,
        first: u64,
        values: &mut [P],
        grads: &[G],
        m: &mut [f32],
        v: &mut [f32],
    ) -> u64 = blocks
}

#[inline(always)]
fn blocks<P: Float, G: Float, const LEVEL: u8>(
    rule: &Rule,
    first: u64,
    values: &mut [P],
    grads: &[G],
    m: &mut [f32],
    v: &mut [f32],
) -> u64 {
    assert!(grads.len() == values.len() && m.len() == values.len() && v.len() == values.len());
    if let (Some(values), Some(grads)) = (P::as_f32_mut(values), G::as_f32(grads)) {
        return elements(rule, values, grads, m, v);
    }
    let mut bad = 0;
    let (mut wide, mut grad) = ([0.0; BLOCK], [0.0; BLOCK]);
    let parts =
        values.chunks_mut(BLOCK).zip(grads.chunks(BLOCK)).zip(m.chunks_mut(BLOCK)).zip(v.chunks_mut(BLOCK));
    for (number, (((values, grads), m), v)) in parts.enumerate() {
        let n = values.len();
        P::widen(values, &mut wide[..n]);
        G::widen(grads, &mut grad[..n]);
        bad += elements(rule, &mut wide[..n], &grad[..n], m, v);
        store(&wide, rule.seed, first + (number * BLOCK) as u64, values);
    }
    bad
}

#[inline(always)]
fn elements(rule: &Rule, values: &mut [f32], grads: &[f32], m: &mut [f32], v: &mut [f32]) -> u64 {
    let mut bad = 0;
    for (((value, grad), m), v) in values.iter_mut().zip(grads).zip(m).zip(v) {
        let after = element(rule, *value, *grad, *m, *v);
        (*value, *m, *v) = (after.value, after.m, after.v);
        bad += after.bad;
    }
    u64::from(bad)
}

#[cfg(test)]
pub(super) mod tests {
    use half::bf16;

    use super::*;
    use crate::base::simd::Level;

    /// The rule of step `t` without default values.
    pub fn rule(t: i32) -> Rule {
        let (beta1, beta2, lr) = (0.85f64, 0.97f64, 3e-2);
        let (first, second) = (1.0 - beta1.powi(t), (1.0 - beta2.powi(t)).sqrt());
        Rule {
            beta1: beta1 as f32,
            beta2: beta2 as f32,
            eps: (1e-6 * second) as f32,
            step_size: (-lr * second / first) as f32,
            keep: 1.0 - 0.03 * 0.1,
            seed: None,
        }
    }

    pub fn wave(n: usize, phase: f32) -> Vec<f32> {
        (0..n).map(|i| (i as f32 * 0.71 + phase).sin() * (1.0 + (i % 13) as f32)).collect()
    }

    #[test]
    fn the_first_step_is_the_sign() {
        // m = (1 - b1) g, v = (1 - b2) g^2: corrected, m / sqrt(v) is the sign of g.
        let (mut values, mut m, mut v) = ([1.0f32, 1.0, 1.0], [0.0; 3], [0.0; 3]);
        update(Level::Baseline, &rule(1), 0, &mut values, &[2.0f32, -5.0, 0.0], &mut m, &mut v);
        for (value, sign) in values.iter().zip([1.0, -1.0, 0.0]) {
            assert!((value - (1.0 - 0.03 * sign) * 0.997).abs() < 1e-6, "{value}");
        }
        assert!((m[0] - 0.3).abs() < 1e-6 && (v[1] - 0.75).abs() < 1e-5);
    }

    #[test]
    fn all_levels_have_the_same_bits() {
        let grads = wave(1003, 0.4);
        let runs = Level::available().iter().map(|&level| {
            let (mut values, mut m, mut v) = (wave(1003, 0.0), vec![0.0; 1003], vec![0.0; 1003]);
            for t in 1..5 {
                assert_eq!(update(level, &rule(t), 7, &mut values, &grads, &mut m, &mut v), 0);
            }
            [values, m, v]
        });
        let runs: Vec<_> = runs.collect();
        assert!(runs.iter().all(|run| *run == runs[0]));
    }

    #[test]
    fn what_is_not_finite_stays_and_is_counted() {
        for &level in Level::available() {
            let mut values = wave(300, 0.0);
            let (before, mut m, mut v) = (values.clone(), vec![0.5; 300], vec![0.5; 300]);
            let mut grads = wave(300, 1.0);
            // The square of the last overflows.
            for (i, bad) in [(3, f32::NAN), (17, f32::INFINITY), (280, -f32::INFINITY), (299, 1e20)] {
                grads[i] = bad;
            }
            assert_eq!(update(level, &rule(3), 0, &mut values, &grads, &mut m, &mut v), 4);
            for i in 0..300 {
                let bad = [3, 17, 280, 299].contains(&i);
                assert_eq!((values[i] == before[i], m[i] == 0.0, v[i] == 0.0), (bad, bad, bad), "{i}");
            }
        }
    }

    #[test]
    fn nothing_moves_without_a_gradient() {
        let still = Rule { eps: LEAST_EPS, keep: 1.0, ..rule(1) };
        let (mut values, mut m, mut v) = (wave(20, 0.0), vec![0.0; 20], vec![0.0; 20]);
        update(Level::Baseline, &still, 0, &mut values, &[0.0f32; 20], &mut m, &mut v);
        assert_eq!(values, wave(20, 0.0));
    }

    #[test]
    fn stochastic_rounding_keeps_the_mean_and_repeats() {
        // 1 + 1/512 lies a quarter of the way from 1 to the next bf16.
        let wide = [1.0 + 1.0 / 512.0; BLOCK];
        let mut sum = 0.0;
        for block in 0..400u64 {
            let (mut values, mut again) = ([bf16::ZERO; BLOCK], [bf16::ZERO; BLOCK]);
            store(&wide, Some(5), block * 256, &mut values);
            store(&wide, Some(5), block * 256, &mut again);
            assert_eq!(values, again);
            sum += values.iter().map(|value| value.to_f32() - 1.0).sum::<f32>();
        }
        let mean = sum / (400.0 * 256.0) * 512.0;
        assert!((mean - 1.0).abs() < 0.03, "{mean}");
        // Values of bf16 are kept; so are infinity and NaN.
        let mut values = [bf16::ZERO; 3];
        let mut wide = [0.0; BLOCK];
        (wide[0], wide[1], wide[2]) = (1.5, f32::NEG_INFINITY, f32::NAN);
        store(&wide, Some(9), 0, &mut values);
        assert!(values[0].to_f32() == 1.5 && values[1] == bf16::NEG_INFINITY && values[2].is_nan());
    }
}
