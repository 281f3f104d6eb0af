//! Products of a few tokens with a 4-bit matrix, directly from the codes.
//!
//! One token reads every weight once, so unpacking the matrix to memory would cost more than the
//! product. Here each weight is looked up in a register and multiplied immediately.
#![allow(unsafe_code)] // vector instructions, behind their run-time check, on pointers of checked length
#![cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] // what only vector code uses

use super::packed::Packed;
use super::unpack;
use crate::base::simd::Level;
use crate::base::threads::{Threads, for_each};

/// Maximum number of tokens.
pub const FEW: usize = 32;

/// Up to this many tokens, looking up every weight once is faster than a product in `f32`.
#[must_use]
pub fn worth_it() -> usize {
    if Level::best() == Level::Avx512 { FEW } else { 16 }
}

/// Tokens that share a look-up: as many as have their sums in registers.
const SHARED: usize = 4;

/// Rows of the matrix that share a load of the tokens.
const TOGETHER: usize = 2;

/// Rows of the matrix in a task.
const ROWS: usize = 16;

/// Columns that the vector code takes at a time.
const STEP: usize = 128;

/// `out[t, n] = sum_k x[t, k] weight[n, k]` for at most [`FEW`] tokens; `out` is `[tokens, rows]`.
///
/// With AVX-512 the weights are `f32(code)` times scale and `via` has no effect: the sum over a block is
/// multiplied by the scale, and no weight is rounded to a storage type.
///
/// # Panics
/// If there are more tokens, or the lengths do not match.
pub fn few_tokens(threads: &dyn Threads, weight: &Packed<'_>, width: usize, x: &[f32], out: &mut [f32]) {
    let tokens = x.len() / width;
    assert!((1..=FEW).contains(&tokens) && x.len() == tokens * width && out.len().is_multiple_of(tokens));
    let rows = out.len() / tokens;
    assert!(weight.bytes.len() * 2 >= rows * width);
    assert!(weight.scales.is_whole() && weight.scales.len() * weight.blocksize >= rows * width);
    let level = Level::best();
    #[cfg(target_arch = "x86_64")]
    let turned = (level == Level::Avx512 && width.is_multiple_of(weight.blocksize))
        .then(|| turn(x, width, width.next_multiple_of(STEP)));
    // The products of a matrix row are far apart in `out`, so they are collected transposed.
    let mut columns = vec![0.0f32; out.len()];
    for_each(threads, columns.chunks_mut(ROWS * tokens).enumerate(), |(task, columns)| {
        #[cfg(target_arch = "x86_64")]
        if let Some(turned) = &turned {
            return few_rows(weight, width, task * ROWS, turned, tokens, columns);
        }
        let mut row_values = vec![0.0f32; width];
        for (i, sums) in columns.chunks_exact_mut(tokens).enumerate() {
            unpack::read(level, weight, (task * ROWS + i) * width, &mut row_values);
            for (sum, x) in sums.iter_mut().zip(x.chunks_exact(width)) {
                *sum = dot(level, x, &row_values);
            }
        }
    });
    for (t, out) in out.chunks_exact_mut(rows).enumerate() {
        for (out, sums) in out.iter_mut().zip(columns.chunks_exact(tokens)) {
            *out = sums[t];
        }
    }
}

/// Products of the rows of a task with AVX-512; several rows at a time share the loads of the tokens.
#[cfg(target_arch = "x86_64")]
fn few_rows(
    weight: &Packed<'_>,
    width: usize,
    first: usize,
    turned: &[f32],
    tokens: usize,
    columns: &mut [f32],
) {
    let blocks = width / weight.blocksize;
    // The scales of each row, and those that a step may read beyond them.
    let mut scales = vec![0.0f32; TOGETHER * (blocks + 4)];
    let mut cursor = weight.scales.cursor();
    let vector = turned.len() / tokens;
    let mut row = first;
    for columns in columns.chunks_mut(TOGETHER * tokens) {
        let rows = columns.len() / tokens;
        for i in 0..rows {
            let scales = &mut scales[i * (blocks + 4)..][..blocks];
            for (block, scale) in scales.iter_mut().enumerate() {
                *scale = cursor.get((row + i) * blocks + block);
            }
        }
        let bytes = &weight.bytes[row * width / 2..(row + rows) * width / 2];
        for (group, turned) in turned.chunks(SHARED * vector).enumerate() {
            let shared = turned.len() / vector;
            let mut sums = [0.0f32; TOGETHER * SHARED];
            let job = x86::Rows { bytes, scales: &scales, blocksize: weight.blocksize, turned };
            // SAFETY: the machine has the features; `bytes` are `rows` rows of full blocks, `turned` has
            // `shared` vectors, and the scales have four extra values (above).
            unsafe {
                match (rows, shared) {
                    (TOGETHER, 1) => job.sums::<TOGETHER, 1>(&mut sums),
                    (TOGETHER, 2) => job.sums::<TOGETHER, 2>(&mut sums),
                    (TOGETHER, 3) => job.sums::<TOGETHER, 3>(&mut sums),
                    (TOGETHER, _) => job.sums::<TOGETHER, 4>(&mut sums),
                    _ => job.one_by_one(rows, shared, &mut sums),
                }
            }
            for (columns, sums) in columns.chunks_exact_mut(tokens).zip(sums.chunks_exact(shared)) {
                columns[group * SHARED..][..shared].copy_from_slice(sums);
            }
        }
        row += rows;
    }
}

/// Reorders each 128 values in the order in which the weights come out of 16 words of eight codes: first
/// those of the lowest four bits of every word, then of the next. The last step is padded with zeros.
fn turn(x: &[f32], width: usize, padded: usize) -> Vec<f32> {
    let mut turned = vec![0.0; x.len() / width * padded];
    for (turned, x) in turned.chunks_exact_mut(padded).zip(x.chunks_exact(width)) {
        for (i, value) in x.iter().enumerate() {
            let (step, word, code) = (i / STEP, i % STEP / 8, i % 8);
            // The first code of a byte is in its high half.
            turned[step * STEP + (code ^ 1) * 16 + word] = *value;
        }
    }
    turned
}

fn dot(level: Level, x: &[f32], y: &[f32]) -> f32 {
    match level {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `level` is one that this machine has.
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
    #[allow(clippy::wildcard_imports)] // dozens of names otherwise
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

    /// Rows of the matrix, and tokens that [`super::turn`] has made.
    pub struct Rows<'a> {
        pub bytes: &'a [u8],
        /// For each row its scales and four more values.
        pub scales: &'a [f32],
        pub blocksize: usize,
        pub turned: &'a [f32],
    }

    impl Rows<'_> {
        /// As [`Rows::sums`], for sizes without specialised code.
        ///
        /// # Safety
        /// As [`Rows::sums`], with `rows` and `tokens` for its constants.
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
        pub unsafe fn one_by_one(&self, rows: usize, tokens: usize, sums: &mut [f32]) {
            let (width, vector) = (self.bytes.len() / rows, self.turned.len() / tokens);
            let stride = 2 * width / self.blocksize + 4;
            for (i, sum) in sums[..rows * tokens].iter_mut().enumerate() {
                let (row, token) = (i / tokens, i % tokens);
                let one = Rows {
                    bytes: &self.bytes[row * width..(row + 1) * width],
                    scales: &self.scales[row * stride..],
                    blocksize: self.blocksize,
                    turned: &self.turned[token * vector..(token + 1) * vector],
                };
                // SAFETY: a row and a token that the caller guarantees.
                unsafe { one.sums::<1, 1>(std::slice::from_mut(sum)) };
            }
        }

        /// The product of each row with each token.
        ///
        /// # Safety
        /// The machine has the features. `bytes` are `ROWS` rows of full blocks; `scales` has those of each
        /// row and four more; `turned` has `TOKENS` vectors of as many values as a row has codes, padded to
        /// full steps; `sums` has room for `ROWS * TOKENS`.
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
        pub unsafe fn sums<const ROWS: usize, const TOKENS: usize>(&self, sums: &mut [f32]) {
            let shift = self.blocksize.trailing_zeros();
            let bytes = self.bytes.len() / ROWS;
            let width = 2 * bytes;
            let padded = width.next_multiple_of(STEP);
            let stride = (width >> shift) + 4;
            // SAFETY: by the contract above; a mask excludes what is past the end of the row.
            unsafe {
                let code = _mm512_loadu_ps(NF4.as_ptr());
                // The block, within a step, of each word of eight codes.
                let words = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
                let block = _mm512_srl_epi32(_mm512_slli_epi32::<3>(words), _mm_cvtsi32_si128(shift as i32));
                let mut totals = [[_mm512_setzero_ps(); TOKENS]; ROWS];
                for at in (0..width).step_by(STEP) {
                    let left = (width - at) / 8;
                    let mask = if left >= 16 { 0xffff } else { (1u16 << left) - 1 };
                    let mut codes = [_mm512_setzero_si512(); ROWS];
                    for (row, codes) in codes.iter_mut().enumerate() {
                        let from = self.bytes.as_ptr().add(row * bytes + at / 2);
                        *codes = _mm512_maskz_loadu_epi32(mask, from.cast());
                    }
                    let mut parts = [[_mm512_setzero_ps(); TOKENS]; ROWS];
                    for i in 0..8 {
                        let mut weights = [_mm512_setzero_ps(); ROWS];
                        for (weight, codes) in weights.iter_mut().zip(&mut codes) {
                            // The look-up reads four bits.
                            *weight = _mm512_permutexvar_ps(*codes, code);
                            *codes = _mm512_srli_epi32::<4>(*codes);
                        }
                        for t in 0..TOKENS {
                            let x = _mm512_loadu_ps(self.turned.as_ptr().add(t * padded + at + 16 * i));
                            for (part, weight) in parts.iter_mut().zip(weights) {
                                part[t] = _mm512_fmadd_ps(weight, x, part[t]);
                            }
                        }
                    }
                    for row in 0..ROWS {
                        let scale = _mm_loadu_ps(self.scales.as_ptr().add(row * stride + (at >> shift)));
                        let scale = _mm512_permutexvar_ps(block, _mm512_castps128_ps512(scale));
                        for t in 0..TOKENS {
                            totals[row][t] = _mm512_fmadd_ps(parts[row][t], scale, totals[row][t]);
                        }
                    }
                }
                for (sum, total) in sums.iter_mut().zip(totals.iter().flatten()) {
                    *sum = _mm512_reduce_add_ps(*total);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::float::Dtype;
    use crate::base::portable::Portable;
    use crate::quant::nf4;
    use crate::quant::scales::Scales;

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
                // A weight that was rounded before has an error of half a unit in the last place.
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
