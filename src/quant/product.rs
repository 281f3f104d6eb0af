//! Products of a few tokens with a 4-bit matrix, straight from the codes.
//!
//! One token reads every weight once, so unpacking the matrix to memory would cost more than the
//! product. Here a weight is looked up in a register and multiplied at once.
#![allow(unsafe_code)] // vector instructions, behind their run-time check, on pointers of checked length

use super::expand::Level;
use super::for_each;
use super::nf4::Packed;
use crate::head::backend::Team;

/// Tokens up to which looking every weight up once is faster than a matrix product.
pub const FEW: usize = 16;

/// Tokens that a look-up is shared by: what the registers hold sums for.
const SHARED: usize = 4;

/// Rows of the matrix in a task.
const ROWS: usize = 16;

/// `out[t, n] = sum_k x[t, k] weight[n, k]` for at most [`FEW`] tokens; `out` is `[tokens, rows]`.
///
/// # Panics
/// If there are more tokens, or lengths that do not belong together.
pub fn few_tokens(team: &dyn Team, weight: &Packed<'_>, width: usize, x: &[f32], out: &mut [f32]) {
    let tokens = x.len() / width;
    assert!((1..=FEW).contains(&tokens) && x.len() == tokens * width && out.len() % tokens == 0);
    let rows = out.len() / tokens;
    assert!(weight.bytes.len() * 2 >= rows * width);
    assert!(weight.scales.len() * weight.blocksize >= rows * width);
    let level = Level::best();
    // Every look-up turns a vector of bytes into two vectors of weights, of even and of odd columns.
    let by_halves = level == Level::Avx512 && width % weight.blocksize == 0;
    let halves = if by_halves { split_pairs(x) } else { Vec::new() };
    // The products of a row of the matrix lie apart in `out`, so they are collected transposed.
    let mut columns = vec![0.0f32; out.len()];
    for_each(team, columns.chunks_mut(ROWS * tokens).enumerate(), |(task, columns)| {
        let mut row_values = if by_halves { Vec::new() } else { vec![0.0f32; width] };
        for (i, sums) in columns.chunks_exact_mut(tokens).enumerate() {
            let row = task * ROWS + i;
            if by_halves {
                // SAFETY: `level` says that the machine has the features; the lengths were compared
                // above, rows are whole blocks, and blocks are whole vectors.
                #[cfg(target_arch = "x86_64")]
                for (sums, x) in sums.chunks_mut(SHARED).zip(halves.chunks(SHARED * width)) {
                    unsafe {
                        match sums.len() {
                            1 => x86::row::<1>(weight, width, row, x, sums),
                            2 => x86::row::<2>(weight, width, row, x, sums),
                            3 => x86::row::<3>(weight, width, row, x, sums),
                            _ => x86::row::<4>(weight, width, row, x, sums),
                        }
                    }
                }
            } else {
                weight.read(level, row * width, &mut row_values);
                for (sum, x) in sums.iter_mut().zip(x.chunks_exact(width)) {
                    *sum = dot(level, x, &row_values);
                }
            }
        }
    });
    for (t, out) in out.chunks_exact_mut(rows).enumerate() {
        for (out, sums) in out.iter_mut().zip(columns.chunks_exact(tokens)) {
            *out = sums[t];
        }
    }
}

/// Each 32 values as 16 of even and 16 of odd place.
fn split_pairs(x: &[f32]) -> Vec<f32> {
    let mut halves = vec![0.0; x.len()];
    for (halves, x) in halves.chunks_exact_mut(32).zip(x.chunks_exact(32)) {
        for i in 0..16 {
            (halves[i], halves[16 + i]) = (x[2 * i], x[2 * i + 1]);
        }
    }
    halves
}

fn dot(level: Level, x: &[f32], y: &[f32]) -> f32 {
    match level {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a level is only ever one that this machine has.
        Level::Avx512 => unsafe { x86::dot_avx512(x, y) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Level::Avx2 => unsafe { x86::dot_avx2(x, y) },
        _ => dot_body::<{ cfg!(target_arch = "aarch64") }>(x, y),
    }
}

/// `FMA` says that the caller was compiled for a machine that has it.
#[inline(always)]
fn dot_body<const FMA: bool>(x: &[f32], y: &[f32]) -> f32 {
    const LANES: usize = 32;
    let mut lanes = [0.0f32; LANES];
    let (xs, ys) = (x.chunks_exact(LANES), y.chunks_exact(LANES));
    let tail: f32 = xs.remainder().iter().zip(ys.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in xs.zip(ys) {
        for i in 0..LANES {
            lanes[i] = if FMA { x[i].mul_add(y[i], lanes[i]) } else { x[i] * y[i] + lanes[i] };
        }
    }
    lanes.into_iter().sum::<f32>() + tail
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    #[allow(clippy::wildcard_imports)] // a page of names otherwise
    use std::arch::x86_64::*;

    use super::{Packed, dot_body};
    use crate::quant::codebook::NF4;
    use crate::quant::storage::Dtype;

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    pub fn dot_avx512(x: &[f32], y: &[f32]) -> f32 {
        dot_body::<true>(x, y)
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub fn dot_avx2(x: &[f32], y: &[f32]) -> f32 {
        dot_body::<true>(x, y)
    }

    /// A row of the matrix times `TOKENS` vectors whose pairs are split.
    ///
    /// # Safety
    /// Rows are whole blocks, blocks whole vectors of 32, and `halves` and `sums` have `TOKENS`
    /// vectors and values.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    pub unsafe fn row<const TOKENS: usize>(
        weight: &Packed<'_>,
        width: usize,
        row: usize,
        halves: &[f32],
        sums: &mut [f32],
    ) {
        let blocksize = weight.blocksize;
        let first = row * width / blocksize;
        let code = NF4;
        // SAFETY: by the contract above.
        unsafe {
            let code = _mm512_loadu_ps(code.as_ptr());
            let mut even = [_mm512_setzero_ps(); TOKENS];
            let mut odd = [_mm512_setzero_ps(); TOKENS];
            let mut bytes = weight.bytes.as_ptr().add(row * width / 2);
            let mut x = halves.as_ptr();
            for block in first..first + width / blocksize {
                let mut table = _mm512_mul_ps(code, _mm512_set1_ps(weight.scales.get(block)));
                for via in weight.via {
                    table = round(via, table);
                }
                for _ in 0..blocksize / 32 {
                    let byte = _mm512_cvtepu8_epi32(_mm_loadu_si128(bytes.cast()));
                    // The look-up reads four bits.
                    let high = _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(byte), table);
                    let low = _mm512_permutexvar_ps(byte, table);
                    for t in 0..TOKENS {
                        let x = x.add(t * width);
                        even[t] = _mm512_fmadd_ps(high, _mm512_loadu_ps(x), even[t]);
                        odd[t] = _mm512_fmadd_ps(low, _mm512_loadu_ps(x.add(16)), odd[t]);
                    }
                    bytes = bytes.add(16);
                    x = x.add(32);
                }
            }
            for t in 0..TOKENS {
                sums[t] = _mm512_reduce_add_ps(_mm512_add_ps(even[t], odd[t]));
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    fn round(dtype: Dtype, values: __m512) -> __m512 {
        match dtype {
            Dtype::F32 => values,
            Dtype::F16 => {
                _mm512_cvtph_ps(_mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(values))
            }
            Dtype::Bf16 => {
                let bits = _mm512_castps_si512(values);
                let last = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
                let half = _mm512_add_epi32(last, _mm512_set1_epi32(0x7fff));
                let kept = _mm512_set1_epi32(0xffff_0000_u32 as i32);
                let rounded = _mm512_castsi512_ps(_mm512_and_si512(_mm512_add_epi32(bits, half), kept));
                let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(values, values);
                _mm512_mask_mov_ps(rounded, nan, values)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::head::backend::Portable;
    use crate::quant::nf4;
    use crate::quant::scales::Scales;
    use crate::quant::storage::Dtype;

    #[test]
    fn products_equal_those_with_the_unpacked_matrix() {
        let wave = |n: usize, f: f32| -> Vec<f32> { (0..n).map(|i| (i as f32 * f).sin()).collect() };
        for (rows, width, blocksize) in
            [(1, 64, 64), (37, 128, 64), (19, 96, 32), (23, 67, 64), (17, 256, 128)]
        {
            let values = wave(rows * width, 0.37);
            let (mut bytes, mut absmax) =
                (vec![0; values.len().div_ceil(2)], vec![0.0; values.len().div_ceil(blocksize)]);
            nf4::quantize(&Portable, &values, blocksize, &mut bytes, &mut absmax);
            for via in [[Dtype::F32; 2], [Dtype::Bf16, Dtype::F32], [Dtype::F16, Dtype::Bf16]] {
                let weight = Packed { bytes: &bytes, scales: Scales::Plain(&absmax), blocksize, via };
                let mut matrix = vec![0.0f32; rows * width];
                nf4::dequantize(&Portable, &weight, &mut matrix);
                for tokens in 1..=FEW {
                    let x = wave(tokens * width, 0.11);
                    let mut out = vec![f32::NAN; tokens * rows];
                    few_tokens(&Portable, &weight, width, &x, &mut out);
                    for (i, &y) in out.iter().enumerate() {
                        let (x, w) = (&x[i / rows * width..], &matrix[i % rows * width..]);
                        let truth: f64 =
                            x[..width].iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
                        assert!((f64::from(y) - truth).abs() < 1e-5 * (width as f64).sqrt(), "{y} {truth}");
                    }
                }
            }
        }
    }

    #[test]
    fn dots_have_any_length() {
        for n in [0, 1, 31, 32, 33, 100] {
            let x: Vec<f32> = (0..n).map(|i| i as f32).collect();
            let truth: f32 = x.iter().map(|x| 0.5 * x).sum();
            for &level in Level::available() {
                assert!((dot(level, &x, &vec![0.5; n]) - truth).abs() <= 1e-6 * truth);
            }
        }
    }
}
