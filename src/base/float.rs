//! The element types of models, which are quantised from and dequantised to.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// `f32`, `f16` or `bf16`.
pub trait Float: Copy + Default + Send + Sync + 'static {
    /// The type's name.
    const DTYPE: Dtype;

    /// Converts to `f32`, which is exact.
    fn widen(values: &[Self], wide: &mut [f32]);

    /// Rounds to the nearest, ties to even; NaN stays NaN.
    fn narrow(wide: &[f32; 16]) -> [Self; 16];

    /// Rounds a single value, as [`Float::narrow`].
    fn narrow_one(wide: f32) -> Self;

    /// The values themselves if they are `f32`.
    #[must_use]
    fn as_f32(_values: &[Self]) -> Option<&[f32]> {
        None
    }

    /// As [`Float::as_f32`], mutable.
    #[must_use]
    fn as_f32_mut(_values: &mut [Self]) -> Option<&mut [f32]> {
        None
    }
}

/// A dtype as a value, for rounding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// `f32`: nothing to round.
    F32,
    /// `f16`.
    F16,
    /// `bf16`.
    Bf16,
}

impl Dtype {
    /// Rounds to the dtype and converts back.
    #[inline(always)]
    #[must_use]
    pub fn round(self, values: [f32; 16]) -> [f32; 16] {
        match self {
            Dtype::F32 => values,
            Dtype::F16 => {
                let mut wide = [0.0; 16];
                f16::widen(&f16::narrow(&values), &mut wide);
                wide
            }
            Dtype::Bf16 => values.map(|x| f32::from_bits(u32::from(bf16_bits(x)) << 16)),
        }
    }
}

/// `bf16::from_f32` without a branch, so that loops over it become vector code.
#[inline(always)]
fn bf16_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    if x.is_nan() { 0x7fc0 } else { rounded as u16 }
}

impl Float for f32 {
    const DTYPE: Dtype = Dtype::F32;

    #[inline(always)]
    fn widen(values: &[Self], wide: &mut [f32]) {
        wide.copy_from_slice(values);
    }

    #[inline(always)]
    fn narrow(wide: &[f32; 16]) -> [Self; 16] {
        *wide
    }

    #[inline(always)]
    fn narrow_one(wide: f32) -> Self {
        wide
    }

    #[inline(always)]
    fn as_f32(values: &[Self]) -> Option<&[f32]> {
        Some(values)
    }

    #[inline(always)]
    fn as_f32_mut(values: &mut [Self]) -> Option<&mut [f32]> {
        Some(values)
    }
}

impl Float for bf16 {
    const DTYPE: Dtype = Dtype::Bf16;

    #[inline(always)]
    fn widen(values: &[Self], wide: &mut [f32]) {
        for (wide, value) in wide.iter_mut().zip(values) {
            *wide = f32::from_bits(u32::from(value.to_bits()) << 16);
        }
    }

    #[inline(always)]
    fn narrow(wide: &[f32; 16]) -> [Self; 16] {
        wide.map(|x| bf16::from_bits(bf16_bits(x)))
    }

    #[inline(always)]
    fn narrow_one(wide: f32) -> Self {
        bf16::from_bits(bf16_bits(wide))
    }
}

impl Float for f16 {
    const DTYPE: Dtype = Dtype::F16;

    // The slice forms use the processor's conversion instructions if it has them.
    #[inline(always)]
    fn widen(values: &[Self], wide: &mut [f32]) {
        values.convert_to_f32_slice(wide);
    }

    #[inline(always)]
    fn narrow(wide: &[f32; 16]) -> [Self; 16] {
        let mut values = [f16::ZERO; 16];
        values.convert_from_f32_slice(wide);
        values
    }

    #[inline(always)]
    fn narrow_one(wide: f32) -> Self {
        f16::from_f32(wide)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_rounds_as_half_does() {
        for bits in (0..=u32::MAX).step_by(9973).chain([0x7f80_0000, 0x7f7f_ffff, 0x3f80_8000, 0x3f81_8000]) {
            let x = f32::from_bits(bits);
            let (ours, theirs) = (bf16::narrow_one(x), bf16::from_f32(x));
            assert!(ours.to_bits() == theirs.to_bits() || (ours.is_nan() && theirs.is_nan()), "{x:e}");
        }
    }

    #[test]
    fn rounding_is_narrowing_and_widening() {
        let values: [f32; 16] = std::array::from_fn(|i| (i as f32 - 7.3) * 0.137);
        assert_eq!(Dtype::F32.round(values), values);
        assert_eq!(Dtype::F16.round(values), values.map(|x| f16::from_f32(x).to_f32()));
        assert_eq!(Dtype::Bf16.round(values), values.map(|x| bf16::from_f32(x).to_f32()));
    }
}
