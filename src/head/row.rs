//! Passes over one row of a logits tile: the vector code of the head.
//!
//! Every pass has one body, generic over the element type and compiled three times for `f32`: for
//! AVX-512, for AVX2 with fused multiply-add, and for the baseline. The machine picks at run time.
//! A row of a tile is a few kilobytes, so passes after the first read it from the L1 cache.
#![allow(unsafe_code)] // calls of #[target_feature] functions, each behind its run-time check

use crate::base::real::Real;
#[cfg(target_arch = "x86_64")]
use crate::base::simd::Level;

/// Accumulators that a reduction runs in parallel: one AVX-512 register of `f32`, and enough
/// independent chains to hide the latency of an addition.
const LANES: usize = 16;

/// From a raw product `x` to a logit `l`, with `z = x + bias`: `l = softcap * tanh(z / softcap)`, or `l = z`.
#[derive(Clone, Copy, Debug)]
pub struct Transform<'a, T> {
    /// Bias of the tile's columns, if the head has one.
    pub bias: Option<&'a [T]>,
    /// Bound on the magnitude of a logit, if the model caps them (Gemma 2).
    pub softcap: Option<T>,
}

/// Defines a public pass from its body `fn body::<T, FMA>(..)`, with run-time dispatch.
macro_rules! pass {
    ($(#[$doc:meta])* $name:ident($($arg:ident: $ty:ty),*) $(-> $ret:ty)? = $body:ident) => {
        $(#[$doc])*
        #[cfg(target_arch = "x86_64")]
        pub fn $name<T: Real>($($arg: $ty),*) $(-> $ret)? {
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
            fn avx512<T: Real>($($arg: $ty),*) $(-> $ret)? { $body::<T, true>($($arg),*) }
            #[target_feature(enable = "avx2,fma,f16c")]
            fn avx2<T: Real>($($arg: $ty),*) $(-> $ret)? { $body::<T, true>($($arg),*) }
            match Level::best() {
                // SAFETY: a level is only ever one that this machine has.
                Level::Avx512 => unsafe { avx512($($arg),*) },
                // SAFETY: as above.
                Level::Avx2 => unsafe { avx2($($arg),*) },
                Level::Baseline => $body::<T, false>($($arg),*),
            }
        }
        $(#[$doc])*
        #[cfg(not(target_arch = "x86_64"))]
        pub fn $name<T: Real>($($arg: $ty),*) $(-> $ret)? {
            // Fused multiply-add is part of the baseline on 64-bit ARM.
            $body::<T, { cfg!(target_arch = "aarch64") }>($($arg),*)
        }
    };
}

pass! {
    /// Turns raw products into logits, in place, and returns the largest; NaN if any is NaN.
    to_logits(x: &mut [T], transform: Transform<'_, T>) -> T = to_logits_body
}
pass! {
    /// `sum(exp(x - shift))`.
    exp_sum(x: &[T], shift: T) -> f64 = exp_sum_body
}
pass! {
    /// Replaces `x` by `exp(x - shift)` and returns their sum. With a softcap the stored values are `exp(x -
    /// shift) * (1 - (x / softcap)^2)`, which include its slope for the gradient; the sum is still that of
    /// the exponentials.
    exp_in_place(x: &mut [T], shift: T, softcap: Option<T>) -> f64 = exp_in_place_body
}
pass! {
    /// Replaces logits by `scale * exp(x - shift)`, times the softcap's slope if there is one:
    /// with `shift` the log-sum-exp, the gradient of the row's loss except for its label.
    softmax_gradient(x: &mut [T], shift: T, scale: T, softcap: Option<T>) = softmax_gradient_body
}
pass! {
    /// `sum(x)`.
    sum(x: &[T]) -> f64 = sum_body
}
pass! {
    /// `x *= factor`.
    scale(x: &mut [T], factor: T) = scale_body
}
pass! {
    /// `y += factor * x`.
    axpy(y: &mut [T], factor: T, x: &[T]) = axpy_body
}

/// Slope of the softcap at a logit `l`: `d l / d z = 1 - (l / softcap)^2`.
#[inline(always)]
pub fn softcap_slope<T: Real>(logit: T, inverse: T) -> T {
    let u = logit * inverse;
    T::ONE - u * u
}

#[inline(always)]
fn to_logits_body<T: Real, const FMA: bool>(x: &mut [T], transform: Transform<'_, T>) -> T {
    if let Some(bias) = transform.bias {
        for (x, b) in x.iter_mut().zip(bias) {
            *x += *b;
        }
    }
    if let Some(cap) = transform.softcap {
        let inverse = T::ONE / cap;
        for x in x.iter_mut() {
            *x = cap * (*x * inverse).tanh::<FMA>();
        }
    }
    let larger = |a: T, b: T| if a > b { a } else { b };
    let mut lanes = [T::LOWEST; LANES];
    // A maximum by comparison drops NaN; x - x is 0 for a finite number and NaN for NaN (and for infinity,
    // which is not a valid logit).
    let mut poison = [T::ZERO; LANES];
    let chunks = x.chunks_exact(LANES);
    let tail = chunks.remainder();
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] = larger(chunk[i], lanes[i]);
            poison[i] += chunk[i] * T::ZERO;
        }
    }
    let mut max = lanes.into_iter().fold(T::LOWEST, larger);
    let mut poisoned: T = poison.into_iter().sum();
    for &v in tail {
        max = larger(v, max);
        poisoned += v * T::ZERO;
    }
    // -inf is a valid logit (a masked token); only NaN and +inf must reach the loss.
    if poisoned.partial_cmp(&T::ZERO).is_none() && x.iter().any(|v| v.to_f64().is_nan()) {
        return T::from_f64(f64::NAN);
    }
    max
}

/// Sums in lanes, then in `f64`.
#[inline(always)]
fn reduce<T: Real>(lanes: [T; LANES], tail: f64) -> f64 {
    lanes.into_iter().map(Real::to_f64).sum::<f64>() + tail
}

#[inline(always)]
fn exp_sum_body<T: Real, const FMA: bool>(x: &[T], shift: T) -> f64 {
    let mut lanes = [T::ZERO; LANES];
    let chunks = x.chunks_exact(LANES);
    let tail = chunks.remainder();
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] += (chunk[i] - shift).exp::<FMA>();
        }
    }
    reduce(lanes, tail.iter().map(|&v| (v - shift).exp::<FMA>().to_f64()).sum())
}

#[inline(always)]
fn exp_in_place_body<T: Real, const FMA: bool>(x: &mut [T], shift: T, softcap: Option<T>) -> f64 {
    let mut lanes = [T::ZERO; LANES];
    let mut tail_sum = 0.0;
    let mut chunks = x.chunks_exact_mut(LANES);
    if let Some(cap) = softcap {
        let inverse = T::ONE / cap;
        for chunk in &mut chunks {
            for i in 0..LANES {
                let e = (chunk[i] - shift).exp::<FMA>();
                lanes[i] += e;
                chunk[i] = e * softcap_slope(chunk[i], inverse);
            }
        }
        for v in chunks.into_remainder() {
            let e = (*v - shift).exp::<FMA>();
            tail_sum += e.to_f64();
            *v = e * softcap_slope(*v, inverse);
        }
    } else {
        for chunk in &mut chunks {
            for i in 0..LANES {
                let e = (chunk[i] - shift).exp::<FMA>();
                lanes[i] += e;
                chunk[i] = e;
            }
        }
        for v in chunks.into_remainder() {
            *v = (*v - shift).exp::<FMA>();
            tail_sum += v.to_f64();
        }
    }
    reduce(lanes, tail_sum)
}

#[inline(always)]
fn softmax_gradient_body<T: Real, const FMA: bool>(x: &mut [T], shift: T, scale: T, softcap: Option<T>) {
    if let Some(cap) = softcap {
        let inverse = T::ONE / cap;
        for v in x {
            *v = scale * (*v - shift).exp::<FMA>() * softcap_slope(*v, inverse);
        }
    } else {
        for v in x {
            *v = scale * (*v - shift).exp::<FMA>();
        }
    }
}

#[inline(always)]
fn sum_body<T: Real, const FMA: bool>(x: &[T]) -> f64 {
    let mut lanes = [T::ZERO; LANES];
    let chunks = x.chunks_exact(LANES);
    let tail = chunks.remainder();
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] += chunk[i];
        }
    }
    reduce(lanes, tail.iter().map(|v| v.to_f64()).sum())
}

#[inline(always)]
fn scale_body<T: Real, const FMA: bool>(x: &mut [T], factor: T) {
    for v in x {
        *v *= factor;
    }
}

#[inline(always)]
fn axpy_body<T: Real, const FMA: bool>(y: &mut [T], factor: T, x: &[T]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += factor * *x;
    }
}

#[cfg(test)]
mod tests {
    #[cfg(target_arch = "x86_64")]
    use std::process::Command;

    use super::*;

    fn wave(n: usize) -> Vec<f32> {
        (0..n).map(|i| 9.0 * (i as f32 * 0.37).sin() - (i % 7) as f32).collect()
    }

    #[test]
    fn dispatched_passes_equal_the_plain_bodies() {
        for n in [1, 15, 16, 17, 333, 1024] {
            for softcap in [None, Some(5.0f32)] {
                let bias: Vec<f32> = wave(n).iter().map(|v| 0.1 * v).collect();
                let transform = Transform { bias: Some(&bias), softcap };
                let (mut a, mut b) = (wave(n), wave(n));
                let (ma, mb) =
                    (to_logits(&mut a, transform), to_logits_body::<f32, false>(&mut b, transform));
                assert!((ma - mb).abs() <= 4e-6 * mb.abs());
                assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 2e-6 * (1.0 + b.abs())));
                let (sa, sb) = (exp_sum(&a, ma), exp_sum_body::<f32, false>(&b, ma));
                assert!((sa - sb).abs() < 2e-6 * sb);
                let (mut ga, mut gb) = (a.clone(), a.clone());
                softmax_gradient(&mut ga, ma, 0.7, softcap);
                softmax_gradient_body::<f32, false>(&mut gb, ma, 0.7, softcap);
                assert!(ga.iter().zip(&gb).all(|(a, b)| (a - b).abs() < 1e-6));
                let s = exp_in_place(&mut a, ma, softcap);
                assert!((s - sa).abs() < 1e-6 * sa);
                assert!(a.iter().zip(&ga).all(|(e, g)| (0.7 * e - g).abs() < 1e-6));
            }
        }
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    #[ignore = "run by the test below, in an environment that limits the level"]
    fn the_plain_bodies_run() {
        assert_eq!(Level::best(), Level::Baseline);
        let mut x = wave(333);
        let mut plain = x.clone();
        let sum = exp_in_place(&mut x, 2.0, None);
        assert_eq!(sum, exp_in_place_body::<f32, false>(&mut plain, 2.0, None));
        assert_eq!(x, plain, "not to the bit");
        // Where fused multiply-add is there, its bits are others.
        let mut fused = wave(333);
        exp_in_place_body::<f32, true>(&mut fused, 2.0, None);
        assert_ne!(fused, plain);
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn the_environment_limits_the_level() {
        let test = "head::row::tests::the_plain_bodies_run";
        let mut child = Command::new(std::env::current_exe().expect("this program"));
        child.args(["--exact", "--include-ignored", test]).env("ATEN_CPU_CAPABILITY", "default");
        let output = child.output().expect("it starts");
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains("1 passed"), "{text}");
    }

    #[test]
    fn sums_and_scales() {
        let x = wave(101);
        let truth: f64 = x.iter().map(|&v| f64::from(v)).sum();
        assert!((sum(&x) - truth).abs() < 1e-4);
        let mut y = vec![1.0f32; 101];
        axpy(&mut y, 2.0, &x);
        scale(&mut y, 0.5);
        assert!(y.iter().zip(&x).all(|(y, x)| (y - (0.5 + x)).abs() < 1e-6));
    }

    #[test]
    fn nan_wins_and_masked_words_do_not() {
        let none = Transform { bias: None, softcap: None };
        for n in [3, 16, 40] {
            let mut x = wave(n);
            x[n / 2] = f32::NEG_INFINITY;
            assert!(to_logits(&mut x, none).is_finite());
            x[n - 1] = f32::NAN;
            assert!(to_logits(&mut x, none).is_nan());
        }
    }
}
