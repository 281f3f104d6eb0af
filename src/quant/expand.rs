//! Codes to values: every byte holds two codes, the high half first, and 16 values are looked up in
//! a register.
//!
//! A block's values are its 16 code values times its scale, so a block is multiplied and rounded 16
//! times however long it is; the rest is look-ups, which compilers do not find by themselves.
#![allow(unsafe_code)] // vector instructions, behind their run-time check, on pointers of checked length

use super::storage::Storage;

/// Instruction sets that the vector code of quantisation is written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// AVX-512 with byte and word instructions.
    Avx512,
    /// AVX2 with fused multiply-add and half-precision conversions.
    Avx2,
    /// Plain loops.
    Baseline,
}

impl Level {
    /// The best that this machine has.
    #[must_use]
    pub fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            use std::sync::OnceLock;
            static LEVEL: OnceLock<Level> = OnceLock::new();
            *LEVEL.get_or_init(|| {
                let avx2 = is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c");
                let avx512 = is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl");
                match (avx2, avx512) {
                    (true, true) => Level::Avx512,
                    (true, false) => Level::Avx2,
                    _ => Level::Baseline,
                }
            })
        }
        #[cfg(not(target_arch = "x86_64"))]
        Level::Baseline
    }

    /// Every level that this machine has.
    #[cfg(test)]
    #[must_use]
    pub fn available() -> &'static [Level] {
        match Self::best() {
            Level::Avx512 => &[Level::Avx512, Level::Avx2, Level::Baseline],
            Level::Avx2 => &[Level::Avx2, Level::Baseline],
            Level::Baseline => &[Level::Baseline],
        }
    }
}

/// Looks both codes of every byte up in `table`.
///
/// # Panics
/// If `values` is not twice as long as `bytes`.
#[inline]
pub fn expand<T: Storage>(level: Level, bytes: &[u8], table: &[T; 16], values: &mut [T]) {
    assert_eq!(values.len(), 2 * bytes.len());
    let done = match level {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `Level` says that the machine has the features; the pointers are of the slices whose
        // lengths were compared above; T is as wide as the integers that stand for it.
        Level::Avx512 | Level::Avx2 => unsafe {
            let (table, out) = (table.as_ptr(), values.as_mut_ptr());
            match (size_of::<T>(), level) {
                (4, Level::Avx512) => x86::wide_avx512(bytes, table.cast(), out.cast()),
                (2, Level::Avx512) => x86::half_avx512(bytes, table.cast(), out.cast()),
                (4, _) => x86::wide_avx2(bytes, table.cast(), out.cast()),
                (2, _) => x86::half_avx2(bytes, table.cast(), out.cast()),
                _ => 0,
            }
        },
        _ => 0,
    };
    for (pair, &byte) in values[2 * done..].chunks_exact_mut(2).zip(&bytes[done..]) {
        pair[0] = table[usize::from(byte >> 4)];
        pair[1] = table[usize::from(byte & 15)];
    }
}

/// Each function expands as many whole vectors as there are and returns the number of bytes done.
///
/// # Safety
/// All: `table` has 16 elements, `out` room for twice the bytes.
#[cfg(target_arch = "x86_64")]
mod x86 {
    #[allow(clippy::wildcard_imports)] // a page of names otherwise
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub unsafe fn wide_avx512(bytes: &[u8], table: *const u32, out: *mut u32) -> usize {
        let whole = bytes.len() / 8 * 8;
        // SAFETY: by the contract above; `i` stays below `whole`.
        unsafe {
            let table = _mm512_loadu_si512(table.cast());
            for i in (0..whole).step_by(8) {
                let byte = _mm512_cvtepu8_epi64(_mm_loadl_epi64(bytes.as_ptr().add(i).cast()));
                // Lane 2j gets the high half of byte j, lane 2j + 1 the byte, of which the look-up
                // reads four bits.
                let index = _mm512_or_si512(_mm512_srli_epi64::<4>(byte), _mm512_slli_epi64::<32>(byte));
                _mm512_storeu_si512(out.add(2 * i).cast(), _mm512_permutexvar_epi32(index, table));
            }
        }
        whole
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub unsafe fn half_avx512(bytes: &[u8], table: *const u16, out: *mut u16) -> usize {
        let whole = bytes.len() / 16 * 16;
        // SAFETY: by the contract above; `i` stays below `whole`.
        unsafe {
            // Five bits are read: the table twice makes the fifth irrelevant.
            let table = _mm512_broadcast_i64x4(_mm256_loadu_si256(table.cast()));
            for i in (0..whole).step_by(16) {
                let byte = _mm512_cvtepu8_epi32(_mm_loadu_si128(bytes.as_ptr().add(i).cast()));
                let index = _mm512_or_si512(_mm512_srli_epi32::<4>(byte), _mm512_slli_epi32::<16>(byte));
                _mm512_storeu_si512(out.add(2 * i).cast(), _mm512_permutexvar_epi16(index, table));
            }
        }
        whole
    }

    #[target_feature(enable = "avx2")]
    pub unsafe fn wide_avx2(bytes: &[u8], table: *const u32, out: *mut u32) -> usize {
        let whole = bytes.len() / 4 * 4;
        // SAFETY: by the contract above; `i` stays below `whole`.
        unsafe {
            let low = _mm256_loadu_ps(table.cast());
            let high = _mm256_loadu_ps(table.add(8).cast());
            for i in (0..whole).step_by(4) {
                let four = bytes.as_ptr().add(i).cast::<i32>().read_unaligned();
                let byte = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
                let index = _mm256_or_si256(_mm256_srli_epi64::<4>(byte), _mm256_slli_epi64::<32>(byte));
                // Three bits choose within a half of the table, the fourth the half: as a sign.
                let upper = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(index));
                let value = _mm256_blendv_ps(
                    _mm256_permutevar8x32_ps(low, index),
                    _mm256_permutevar8x32_ps(high, index),
                    upper,
                );
                _mm256_storeu_ps(out.add(2 * i).cast(), value);
            }
        }
        whole
    }

    #[target_feature(enable = "avx2")]
    pub unsafe fn half_avx2(bytes: &[u8], table: *const u16, out: *mut u16) -> usize {
        let whole = bytes.len() / 16 * 16;
        // SAFETY: by the contract above; `i` stays below `whole`.
        unsafe {
            // The low and the high bytes of the 16 values, as two tables of bytes.
            let (first, second) = (_mm_loadu_si128(table.cast()), _mm_loadu_si128(table.add(8).cast()));
            let byte_mask = _mm_set1_epi16(0xff);
            let low = _mm_packus_epi16(_mm_and_si128(first, byte_mask), _mm_and_si128(second, byte_mask));
            let high = _mm_packus_epi16(_mm_srli_epi16::<8>(first), _mm_srli_epi16::<8>(second));
            let code_mask = _mm_set1_epi8(15);
            for i in (0..whole).step_by(16) {
                let byte = _mm_loadu_si128(bytes.as_ptr().add(i).cast());
                let even = _mm_and_si128(_mm_srli_epi16::<4>(byte), code_mask);
                let odd = _mm_and_si128(byte, code_mask);
                let codes = [_mm_unpacklo_epi8(even, odd), _mm_unpackhi_epi8(even, odd)];
                for (half, code) in codes.into_iter().enumerate() {
                    let (low, high) = (_mm_shuffle_epi8(low, code), _mm_shuffle_epi8(high, code));
                    let out = out.add(2 * i + 16 * half).cast::<__m128i>();
                    _mm_storeu_si128(out, _mm_unpacklo_epi8(low, high));
                    _mm_storeu_si128(out.add(1), _mm_unpackhi_epi8(low, high));
                }
            }
        }
        whole
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    #[test]
    fn every_level_looks_up_the_same_values() {
        let bytes: Vec<u8> = (0..1000u32).map(|i| (i * 167 % 256) as u8).collect();
        let wide: [f32; 16] = std::array::from_fn(|i| (i as f32 - 6.5) * 1.37);
        let half = wide.map(bf16::from_f32);
        for n in [0, 1, 3, 4, 7, 8, 15, 16, 17, 33, 256, 1000] {
            let codes = bytes[..n].iter().flat_map(|&b| [b >> 4, b & 15]).map(usize::from);
            let (mut a, mut b) = (vec![0.0f32; 2 * n], vec![bf16::ZERO; 2 * n]);
            for &level in Level::available() {
                expand(level, &bytes[..n], &wide, &mut a);
                expand(level, &bytes[..n], &half, &mut b);
                assert_eq!(a, codes.clone().map(|code| wide[code]).collect::<Vec<_>>(), "{level:?} {n}");
                assert_eq!(b, codes.clone().map(|code| half[code]).collect::<Vec<_>>(), "{level:?} {n}");
            }
        }
    }
}
