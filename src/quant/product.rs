//! Products of a few tokens with a 4-bit matrix, straight from the codes.
//!
//! One token reads every weight once, so unpacking the matrix to memory would cost more than the
//! product. Here a weight is looked up in a register and multiplied at once.
#![allow(unsafe_code)] // vector instructions, behind their run-time check, on pointers of checked length

use super::level::Level;
use super::nf4::Packed;
use super::{expand, for_each};
use crate::head::backend::Team;

/// Tokens up to which looking every weight up once is faster than a matrix product.
pub const FEW: usize = 16;

/// Tokens that a look-up is shared by: what the registers hold sums for.
const SHARED: usize = 4;

/// Rows of the matrix in a task.
const ROWS: usize = 16;

/// Columns that the vector code takes at a time.
const STEP: usize = 128;

/// `out[t, n] = sum_k x[t, k] weight[n, k]` for at most [`FEW`] tokens; `out` is `[tokens, rows]`.
///
/// With AVX-512 the weights are `f32(code)` times scale whatever `via` says: the scale is multiplied
/// in after the values of a block are added up, and nothing is rounded that need not be stored.
///
/// # Panics
/// If there are more tokens, or lengths that do not belong together.
pub fn few_tokens(team: &dyn Team, weight: &Packed<'_>, width: usize, x: &[f32], out: &mut [f32]) {
    let tokens = x.len() / width;
    assert!((1..=FEW).contains(&tokens) && x.len() == tokens * width && out.len() % tokens == 0);
    let rows = out.len() / tokens;
    assert!(weight.bytes.len() * 2 >= rows * width);
    assert!(weight.scales.is_whole() && weight.scales.len() * weight.blocksize >= rows * width);
    let level = Level::best();
    let from_codes = level == Level::Avx512 && width % weight.blocksize == 0;
    let padded = width.next_multiple_of(STEP);
    let turned = if from_codes { turn(x, width, padded) } else { Vec::new() };
    // The products of a row of the matrix lie apart in `out`, so they are collected transposed.
    let mut columns = vec![0.0f32; out.len()];
    for_each(team, columns.chunks_mut(ROWS * tokens).enumerate(), |(task, columns)| {
        // Scales of a row and what a step may read beyond them, or its values.
        let blocks = width / weight.blocksize;
        let mut row_values = vec![0.0f32; if from_codes { blocks + 4 } else { width }];
        let mut scales = weight.scales.cursor();
        for (i, sums) in columns.chunks_exact_mut(tokens).enumerate() {
            let row = task * ROWS + i;
            if from_codes {
                for (block, scale) in row_values[..blocks].iter_mut().enumerate() {
                    *scale = scales.get(row * blocks + block);
                }
                #[cfg(target_arch = "x86_64")]
                for (sums, x) in sums.chunks_mut(SHARED).zip(turned.chunks(SHARED * padded)) {
                    let bytes = &weight.bytes[row * width / 2..(row + 1) * width / 2];
                    // SAFETY: `level` says that the machine has the features; `x` has `sums.len()`
                    // vectors of `padded` values, and the scales were made four longer above.
                    unsafe {
                        match sums.len() {
                            1 => x86::row::<1>(bytes, &row_values, weight.blocksize, x, sums),
                            2 => x86::row::<2>(bytes, &row_values, weight.blocksize, x, sums),
                            3 => x86::row::<3>(bytes, &row_values, weight.blocksize, x, sums),
                            _ => x86::row::<4>(bytes, &row_values, weight.blocksize, x, sums),
                        }
                    }
                }
            } else {
                expand::read(level, weight, row * width, &mut row_values, false);
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

/// Each 128 values in the order in which their weights leave 16 words of eight codes: first what
/// belongs to the lowest four bits of every word, then the next. Zeros fill the last step.
fn turn(x: &[f32], width: usize, padded: usize) -> Vec<f32> {
    let mut turned = vec![0.0; x.len() / width * padded];
    for (turned, x) in turned.chunks_exact_mut(padded).zip(x.chunks_exact(width)) {
        for (i, value) in x.iter().enumerate() {
            let (step, word, code) = (i / STEP, i % STEP / 8, i % 8);
            // Of a byte's two codes the first is the higher.
            turned[step * STEP + (code ^ 1) * 16 + word] = *value;
        }
    }
    turned
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

    use super::{STEP, dot_body};
    use crate::quant::codebook::NF4;

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    pub fn dot_avx512(x: &[f32], y: &[f32]) -> f32 {
        dot_body::<true>(x, y)
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub fn dot_avx2(x: &[f32], y: &[f32]) -> f32 {
        dot_body::<true>(x, y)
    }

    /// A row of the matrix times `TOKENS` vectors that [`super::turn`] has made.
    ///
    /// # Safety
    /// `bytes` are whole blocks, `scales` theirs and four more, `turned` has `TOKENS` vectors of as many
    /// values as `bytes` have codes, filled up to whole steps, and `sums` as many elements.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    pub unsafe fn row<const TOKENS: usize>(
        bytes: &[u8],
        scales: &[f32],
        blocksize: usize,
        turned: &[f32],
        sums: &mut [f32],
    ) {
        let shift = blocksize.trailing_zeros();
        let width = 2 * bytes.len();
        let padded = width.next_multiple_of(STEP);
        // SAFETY: by the contract above; a mask leaves out what is no longer in the row.
        unsafe {
            let code = _mm512_loadu_ps(NF4.as_ptr());
            // The block, within a step, of each word of eight codes.
            let words = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            let block = _mm512_srl_epi32(_mm512_slli_epi32::<3>(words), _mm_cvtsi32_si128(shift as i32));
            let mut totals = [_mm512_setzero_ps(); TOKENS];
            for at in (0..width).step_by(STEP) {
                let left = (width - at) / 8;
                let mask = if left >= 16 { 0xffff } else { (1u16 << left) - 1 };
                let mut codes = _mm512_maskz_loadu_epi32(mask, bytes.as_ptr().add(at / 2).cast());
                let scale = _mm_loadu_ps(scales.as_ptr().add(at >> shift));
                let scale = _mm512_permutexvar_ps(block, _mm512_castps128_ps512(scale));
                let mut parts = [_mm512_setzero_ps(); TOKENS];
                for i in 0..8 {
                    // The look-up reads four bits.
                    let weight = _mm512_permutexvar_ps(codes, code);
                    codes = _mm512_srli_epi32::<4>(codes);
                    for (t, part) in parts.iter_mut().enumerate() {
                        let x = _mm512_loadu_ps(turned.as_ptr().add(t * padded + at + 16 * i));
                        *part = _mm512_fmadd_ps(weight, x, *part);
                    }
                }
                for (total, part) in totals.iter_mut().zip(parts) {
                    *total = _mm512_fmadd_ps(part, scale, *total);
                }
            }
            for (sum, total) in sums.iter_mut().zip(totals) {
                *sum = _mm512_reduce_add_ps(total);
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
            [(1, 64, 64), (37, 128, 64), (19, 96, 32), (23, 67, 64), (17, 256, 128), (9, 4096, 2048)]
        {
            let values = wave(rows * width, 0.37);
            let (mut bytes, mut absmax) =
                (vec![0; values.len().div_ceil(2)], vec![0.0; values.len().div_ceil(blocksize)]);
            nf4::quantize(&Portable, &values, blocksize, &mut bytes, &mut absmax);
            for via in [[Dtype::F32; 2], [Dtype::Bf16, Dtype::F32], [Dtype::F16, Dtype::Bf16]] {
                let weight = Packed { bytes: &bytes, scales: Scales::Plain(&absmax), blocksize, via };
                // A weight that is rounded first is off by half a last place.
                let rounded = if via == [Dtype::F32; 2] { 0.0 } else { 2f64.powi(-9) };
                let mut matrix = vec![0.0f32; rows * width];
                nf4::dequantize(&Portable, &weight, &mut matrix);
                for tokens in 1..=FEW {
                    let x = wave(tokens * width, 0.11);
                    let mut out = vec![f32::NAN; tokens * rows];
                    few_tokens(&Portable, &weight, width, &x, &mut out);
                    for (i, &y) in out.iter().enumerate() {
                        let (x, w) = (&x[i / rows * width..], &matrix[i % rows * width..]);
                        let products = x[..width].iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w));
                        let truth: f64 = products.clone().sum();
                        let size: f64 = products.map(f64::abs).sum();
                        let most = 1e-5 * (width as f64).sqrt() + rounded * size;
                        assert!((f64::from(y) - truth).abs() < most, "{y} {truth}");
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
