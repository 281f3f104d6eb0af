//! The two element types the head computes in.

use std::iter::Sum;
use std::ops::{Add, AddAssign, Div, Mul, MulAssign, Neg, Sub};

/// A floating-point type that the head computes in: `f32` for every model, `f64` for checks.
pub trait Real:
    Copy
    + Send
    + Sync
    + 'static
    + Default
    + PartialOrd
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
    + MulAssign
    + Sum
{
    /// 0.
    const ZERO: Self;
    /// 1.
    const ONE: Self;
    /// Below every logit.
    const LOWEST: Self;

    /// Rounds from `f64`.
    fn from_f64(x: f64) -> Self;
    /// Widens to `f64`.
    fn to_f64(self) -> f64;
    /// `e^self`. `FMA` says that the caller was compiled for a machine that has fused
    /// multiply-add; without it `mul_add` would be a library call.
    #[must_use]
    fn exp<const FMA: bool>(self) -> Self;
    /// `tanh(self)`; `FMA` as for [`Real::exp`].
    #[must_use]
    fn tanh<const FMA: bool>(self) -> Self;
}

impl Real for f64 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    const LOWEST: Self = f64::NEG_INFINITY;

    fn from_f64(x: f64) -> Self {
        x
    }
    fn to_f64(self) -> f64 {
        self
    }
    fn exp<const FMA: bool>(self) -> Self {
        f64::exp(self)
    }
    fn tanh<const FMA: bool>(self) -> Self {
        f64::tanh(self)
    }
}

#[inline(always)]
fn fma<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

impl Real for f32 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    const LOWEST: Self = f32::NEG_INFINITY;

    #[inline(always)]
    fn from_f64(x: f64) -> Self {
        x as f32
    }

    #[inline(always)]
    fn to_f64(self) -> f64 {
        f64::from(self)
    }

    /// `2^n * p(x - n ln 2)` with a minimax polynomial: within 2 units in the last place on
    /// `[-87.3, 88.3]`, saturating outside it (about 1e-38 for `-inf`). Branch-free, so that the
    /// compiler turns loops over it into vector code. NaN stays NaN.
    #[inline(always)]
    #[allow(clippy::excessive_precision)]
    fn exp<const FMA: bool>(self) -> Self {
        const LOG2_E: f32 = std::f32::consts::LOG2_E;
        // ln 2 in two parts: the first has trailing zeros, so that n * LN2_HI is exact.
        const LN2_HI: f32 = 0.693_359_375;
        const LN2_LO: f32 = -2.121_944_4e-4;
        // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low mantissa bits.
        const ROUND: f32 = 12_582_912.0;
        let x = if self < -87.3 { -87.3 } else { self };
        let x = if x > 88.3 { 88.3 } else { x };
        let shifted = fma::<FMA>(x, LOG2_E, ROUND);
        let n = shifted - ROUND;
        let r = fma::<FMA>(n, -LN2_LO, fma::<FMA>(n, -LN2_HI, x));
        let q = fma::<FMA>(0.001_381_453_9, r, 0.008_368_745_4);
        let q = fma::<FMA>(q, r, 0.041_668_389);
        let q = fma::<FMA>(q, r, 0.166_665_211);
        let q = fma::<FMA>(q, r, 0.499_999_940);
        let p = fma::<FMA>(r * r, q, r) + 1.0;
        let two_n = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000));
        p * two_n
    }

    /// Odd minimax polynomial below 0.625, `1 - 2 / (e^2x + 1)` above: a few units in the last
    /// place everywhere.
    #[inline(always)]
    #[allow(clippy::excessive_precision)]
    fn tanh<const FMA: bool>(self) -> Self {
        let x = self;
        let y = x * x;
        let q = fma::<FMA>(-0.005_704_910_96, y, 0.020_639_022_8);
        let q = fma::<FMA>(q, y, -0.053_739_696_7);
        let q = fma::<FMA>(q, y, 0.133_314_416);
        let q = fma::<FMA>(q, y, -0.333_332_807);
        let small = fma::<FMA>(x * y, q, x);
        let large = 1.0 - 2.0 / (Real::exp::<FMA>(x + x) + 1.0);
        if x.abs() < 0.625 { small } else { large }
    }
}

#[cfg(test)]
mod tests {
    use super::Real;

    fn worst(f: impl Fn(f32) -> f32, truth: impl Fn(f64) -> f64, lo: f32, hi: f32) -> f64 {
        (0..=200_000)
            .map(|i| lo + (hi - lo) * i as f32 / 200_000.0)
            .map(|x| ((f64::from(f(x)) - truth(f64::from(x))) / truth(f64::from(x)).abs().max(1e-37)).abs())
            .fold(0.0, f64::max)
    }

    #[test]
    fn exp_is_accurate() {
        assert!(worst(Real::exp::<false>, f64::exp, -87.0, 88.0) < 2.5e-7);
        assert!(worst(Real::exp::<true>, f64::exp, -87.0, 88.0) < 2.5e-7);
        assert!(Real::exp::<false>(f32::NEG_INFINITY) < 2e-38);
        assert!((Real::exp::<false>(0.0f32) - 1.0).abs() == 0.0);
        assert!(Real::exp::<false>(f32::NAN).is_nan() && Real::exp::<true>(f32::NAN).is_nan());
    }

    #[test]
    fn tanh_is_accurate() {
        for (lo, hi) in [(1e-6, 0.7), (0.6, 30.0), (-30.0, -1e-3)] {
            assert!(worst(Real::tanh::<false>, f64::tanh, lo, hi) < 5e-7);
            assert!(worst(Real::tanh::<true>, f64::tanh, lo, hi) < 5e-7);
        }
        assert!((Real::tanh::<false>(1e30f32) - 1.0).abs() == 0.0);
        assert!(Real::tanh::<false>(f32::NAN).is_nan());
    }
}
