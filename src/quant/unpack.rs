//! Codes to values: every byte holds two codes, the high half first, and 16 values are looked up in
//! a register.
//!
//! A block's values are its 16 code values times its scale, so each block needs 16 multiplications and
//! roundings, whatever its length; the rest is look-ups. The vector code takes 32 codes at a time, spreads
//! them over lanes and shifts each so that its four bits come last.
#![allow(unsafe_code)] // vector instructions, behind their run-time check, on pointers of checked length

use super::packed::Packed;
use crate::base::float::Float;
use crate::base::simd::Level;

/// Values that the vector code takes at a time.
#[cfg(target_arch = "x86_64")]
const STEP: usize = 32;

/// Fills `values` with those from `start` on.
///
/// # Panics
/// If there are not that many.
pub fn read<T: Float>(level: Level, packed: &Packed<'_>, start: usize, values: &mut [T]) {
    let end = start + values.len();
    assert!(end <= 2 * packed.bytes.len() && end <= packed.scales.len() * packed.blocksize);
    assert!(packed.scales.is_whole() && packed.blocksize.is_power_of_two());
    match level {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `level` is one that this machine has; the lengths were compared above.
        Level::Avx512 => unsafe { x86::read_avx512(packed, start, values) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Level::Avx2 => unsafe { x86::read_avx2(packed, start, values) },
        _ => read_plain(packed, start, values),
    }
}

fn read_plain<T: Float>(packed: &Packed<'_>, start: usize, values: &mut [T]) {
    let (mut at, mut rest) = (start, values);
    while !rest.is_empty() {
        let block = at / packed.blocksize;
        let (part, others) = rest.split_at_mut(rest.len().min((block + 1) * packed.blocksize - at));
        rest = others;
        let table = packed.table(block);
        look_up(packed.bytes, &table, at, part);
        at += part.len();
    }
}

/// Looks up one value after another.
#[inline]
fn look_up<T: Copy>(bytes: &[u8], table: &[T; 16], start: usize, values: &mut [T]) {
    for (i, value) in (start..).zip(values) {
        let byte = bytes[i / 2];
        *value = table[usize::from(if i % 2 == 0 { byte >> 4 } else { byte & 15 })];
    }
}

#[cfg(target_arch = "x86_64")]
#[allow(clippy::cast_ptr_alignment)] // the loads and stores here need no alignment
mod x86 {
    #[allow(clippy::wildcard_imports)] // dozens of names otherwise
    use std::arch::x86_64::*;

    use super::{STEP, look_up};
    use crate::base::float::{Dtype, Float};
    use crate::quant::codebook::NF4;
    use crate::quant::packed::Packed;

    const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

    /// Shifts that bring each of the eight, or four, codes of a word to its lowest bits, first code first.
    const IN_32: [u32; 8] = [4, 0, 12, 8, 20, 16, 28, 24];
    const IN_16: [u16; 4] = [4, 0, 12, 8];

    /// The next part of `at..end` within one block: its end, and how much of it the vector code takes in full
    /// steps (nothing at an odd index or at the end).
    #[inline(always)]
    fn segment(at: usize, end: usize, shift: u32) -> (usize, usize) {
        if at % 2 == 1 {
            return (at + 1, 0);
        }
        let stop = end.min(((at >> shift) + 1) << shift);
        (stop, (stop - at) / STEP * STEP)
    }

    /// Rounds to a dtype and converts back.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    fn round_512(dtype: Dtype, values: __m512) -> __m512 {
        match dtype {
            Dtype::F32 => values,
            Dtype::F16 => _mm512_cvtph_ps(_mm512_cvtps_ph::<NEAREST>(values)),
            Dtype::Bf16 => {
                let bits = _mm512_castps_si512(values);
                let last = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
                let half = _mm512_add_epi32(last, _mm512_set1_epi32(0x7fff));
                let kept = _mm512_set1_epi32(0xffff_0000_u32 as i32);
                let rounded = _mm512_castsi512_ps(_mm512_and_si512(_mm512_add_epi32(bits, half), kept));
                let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(values, values);
                _mm512_mask_mov_ps(rounded, nan, _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc0_0000)))
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn round_256(dtype: Dtype, values: __m256) -> __m256 {
        match dtype {
            Dtype::F32 => values,
            Dtype::F16 => _mm256_cvtph_ps(_mm256_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT }>(values)),
            Dtype::Bf16 => {
                let bits = _mm256_castps_si256(values);
                let last = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
                let half = _mm256_add_epi32(last, _mm256_set1_epi32(0x7fff));
                let kept = _mm256_set1_epi32(0xffff_0000_u32 as i32);
                let rounded = _mm256_castsi256_ps(_mm256_and_si256(_mm256_add_epi32(bits, half), kept));
                let nan = _mm256_cmp_ps::<_CMP_UNORD_Q>(values, values);
                _mm256_blendv_ps(rounded, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc0_0000)), nan)
            }
        }
    }

    /// # Safety
    /// The machine has the features, and `packed` has all values from `start` on and their scales.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    pub unsafe fn read_avx512<T: Float>(packed: &Packed<'_>, start: usize, values: &mut [T]) {
        let (shift, end) = (packed.blocksize.trailing_zeros(), start + values.len());
        let mut scales = packed.scales.cursor();
        let mut at = start;
        // SAFETY: by the contract above; pointers stay within `at..at + whole` of bytes and values.
        unsafe {
            let code = _mm512_loadu_ps(NF4.as_ptr());
            while at < end {
                let (stop, whole) = segment(at, end, shift);
                let table = _mm512_mul_ps(code, _mm512_set1_ps(scales.get(at >> shift)));
                let table = round_512(packed.via[1], round_512(packed.via[0], table));
                let part = &mut values[at - start..stop - start];
                let (bytes, out) = (packed.bytes.as_ptr().add(at / 2), part.as_mut_ptr());
                match T::DTYPE {
                    Dtype::F32 => wide_512(bytes, table, out.cast(), whole),
                    Dtype::F16 => {
                        half_512(bytes, _mm512_cvtps_ph::<NEAREST>(table), out.cast(), whole);
                    }
                    Dtype::Bf16 => {
                        let bits = _mm512_castps_si512(round_512(Dtype::Bf16, table));
                        let table = _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(bits));
                        half_512(bytes, table, out.cast(), whole);
                    }
                }
                if whole < part.len() {
                    let mut exact = [0.0f32; 16];
                    _mm512_storeu_ps(exact.as_mut_ptr(), table);
                    look_up(packed.bytes, &T::narrow(&exact), at + whole, &mut part[whole..]);
                }
                at = stop;
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn wide_512(bytes: *const u8, table: __m512, out: *mut f32, count: usize) {
        // SAFETY: `count` values have that many half-bytes.
        unsafe {
            let shifts = _mm512_broadcast_i64x4(_mm256_loadu_si256(IN_32.as_ptr().cast()));
            let first = _mm512_inserti64x4::<1>(_mm512_setzero_si512(), _mm256_set1_epi32(1));
            let second = _mm512_add_epi32(first, _mm512_set1_epi32(2));
            for i in (0..count).step_by(STEP) {
                let words = _mm512_castsi128_si512(_mm_loadu_si128(bytes.add(i / 2).cast()));
                let low = _mm512_srlv_epi32(_mm512_permutexvar_epi32(first, words), shifts);
                let high = _mm512_srlv_epi32(_mm512_permutexvar_epi32(second, words), shifts);
                let (low, high) = (_mm512_permutexvar_ps(low, table), _mm512_permutexvar_ps(high, table));
                _mm512_storeu_ps(out.add(i), low);
                _mm512_storeu_ps(out.add(i + 16), high);
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn half_512(bytes: *const u8, table: __m256i, out: *mut u16, count: usize) {
        // SAFETY: as above.
        unsafe {
            // Five bits are read; with the table stored twice, the fifth has no effect.
            let table = _mm512_broadcast_i64x4(table);
            let shifts = _mm512_set1_epi64(IN_16.as_ptr().cast::<i64>().read_unaligned());
            let eight = _mm512_cvtepu16_epi64(_mm_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7));
            // Every word four times.
            let spread = _mm512_mullo_epi64(eight, _mm512_set1_epi64(0x0001_0001_0001_0001));
            for i in (0..count).step_by(STEP) {
                let words = _mm512_castsi128_si512(_mm_loadu_si128(bytes.add(i / 2).cast()));
                let index = _mm512_srlv_epi16(_mm512_permutexvar_epi16(spread, words), shifts);
                let values = _mm512_permutexvar_epi16(index, table);
                _mm512_storeu_si512(out.add(i).cast(), values);
            }
        }
    }

    /// # Safety
    /// As [`read_avx512`].
    #[target_feature(enable = "avx2,fma,f16c")]
    pub unsafe fn read_avx2<T: Float>(packed: &Packed<'_>, start: usize, values: &mut [T]) {
        let (shift, end) = (packed.blocksize.trailing_zeros(), start + values.len());
        let mut scales = packed.scales.cursor();
        let mut at = start;
        // SAFETY: by the contract above; pointers stay within `at..at + whole` of bytes and values.
        unsafe {
            let code = [_mm256_loadu_ps(NF4.as_ptr()), _mm256_loadu_ps(NF4.as_ptr().add(8))];
            while at < end {
                let (stop, whole) = segment(at, end, shift);
                let scale = _mm256_set1_ps(scales.get(at >> shift));
                let mut table = [_mm256_mul_ps(code[0], scale), _mm256_mul_ps(code[1], scale)];
                for half in &mut table {
                    *half = round_256(packed.via[1], round_256(packed.via[0], *half));
                }
                let part = &mut values[at - start..stop - start];
                let (bytes, out) = (packed.bytes.as_ptr().add(at / 2), part.as_mut_ptr());
                match T::DTYPE {
                    Dtype::F32 => wide_256(bytes, table, out.cast(), whole),
                    Dtype::F16 => {
                        let table = table.map(|half| _mm256_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT }>(half));
                        half_256(bytes, table, out.cast(), whole);
                    }
                    Dtype::Bf16 => {
                        let table = table.map(|half| {
                            let bits = _mm256_castps_si256(round_256(Dtype::Bf16, half));
                            let words = _mm256_srli_epi32::<16>(bits);
                            _mm_packus_epi32(
                                _mm256_castsi256_si128(words),
                                _mm256_extracti128_si256::<1>(words),
                            )
                        });
                        half_256(bytes, table, out.cast(), whole);
                    }
                }
                if whole < part.len() {
                    let mut exact = [0.0f32; 16];
                    _mm256_storeu_ps(exact.as_mut_ptr(), table[0]);
                    _mm256_storeu_ps(exact.as_mut_ptr().add(8), table[1]);
                    look_up(packed.bytes, &T::narrow(&exact), at + whole, &mut part[whole..]);
                }
                at = stop;
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn wide_256(bytes: *const u8, table: [__m256; 2], out: *mut f32, count: usize) {
        // SAFETY: `count` values have that many half-bytes.
        unsafe {
            let shifts = _mm256_loadu_si256(IN_32.as_ptr().cast());
            for i in (0..count).step_by(8) {
                let four = bytes.add(i / 2).cast::<i32>().read_unaligned();
                let index = _mm256_srlv_epi32(_mm256_set1_epi32(four), shifts);
                // Three bits select within a half of the table; the fourth, as the sign, selects the half.
                let upper = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(index));
                let low = _mm256_permutevar8x32_ps(table[0], index);
                let high = _mm256_permutevar8x32_ps(table[1], index);
                let value = _mm256_blendv_ps(low, high, upper);
                _mm256_storeu_ps(out.add(i), value);
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn half_256(bytes: *const u8, table: [__m128i; 2], out: *mut u16, count: usize) {
        // SAFETY: as above.
        unsafe {
            // The low and the high bytes of the 16 values, as two tables of bytes.
            let byte_mask = _mm_set1_epi16(0xff);
            let low =
                _mm_packus_epi16(_mm_and_si128(table[0], byte_mask), _mm_and_si128(table[1], byte_mask));
            let high = _mm_packus_epi16(_mm_srli_epi16::<8>(table[0]), _mm_srli_epi16::<8>(table[1]));
            let code_mask = _mm_set1_epi8(15);
            for i in (0..count).step_by(STEP) {
                let byte = _mm_loadu_si128(bytes.add(i / 2).cast());
                let even = _mm_and_si128(_mm_srli_epi16::<4>(byte), code_mask);
                let odd = _mm_and_si128(byte, code_mask);
                let codes = [_mm_unpacklo_epi8(even, odd), _mm_unpackhi_epi8(even, odd)];
                for (half, code) in codes.into_iter().enumerate() {
                    let (low, high) = (_mm_shuffle_epi8(low, code), _mm_shuffle_epi8(high, code));
                    let out = out.add(i + 16 * half).cast::<__m128i>();
                    let (first, second) = (_mm_unpacklo_epi8(low, high), _mm_unpackhi_epi8(low, high));
                    _mm_storeu_si128(out, first);
                    _mm_storeu_si128(out.add(1), second);
                }
            }
        }
    }
}
