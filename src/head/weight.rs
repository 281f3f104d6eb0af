//! The head's parameters, read tile by tile in the type that the head computes in.

use std::ops::Range;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::row::{self, Transform};
use crate::base::real::Real;
use crate::base::threads::{Threads, for_rows};

/// A row-major matrix in the type it is stored in.
#[derive(Clone, Copy, Debug)]
pub enum Matrix<'a, T> {
    /// Stored as computed.
    Native(&'a [T]),
    /// Stored in bfloat16, computed in `f32`.
    Bf16(&'a [bf16]),
    /// Stored in float16, computed in `f32`.
    F16(&'a [f16]),
}

impl<T: Real> Matrix<'_, T> {
    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Matrix::Native(x) => x.len(),
            Matrix::Bf16(x) => x.len(),
            Matrix::F16(x) => x.len(),
        }
    }

    /// True if there are no elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Widens the elements of `range` into `out`.
    pub fn read(&self, range: Range<usize>, out: &mut [T]) {
        match self {
            Matrix::Native(x) => out.copy_from_slice(&x[range]),
            Matrix::Bf16(x) => widen(&x[range], out),
            Matrix::F16(x) => widen(&x[range], out),
        }
    }
}

/// Widens through a block on the stack, which the `half` crate converts with vector instructions.
fn widen<H, T: Real>(x: &[H], out: &mut [T])
where
    [H]: HalfFloatSliceExt,
{
    const BLOCK: usize = 256;
    let mut block = [0f32; BLOCK];
    for (x, out) in x.chunks(BLOCK).zip(out.chunks_mut(BLOCK)) {
        let block = &mut block[..x.len()];
        x.convert_to_f32_slice(block);
        for (out, x) in out.iter_mut().zip(block) {
            *out = T::from_f64(f64::from(*x));
        }
    }
}

/// An output head: `logits = cap(logit_scale * (hidden weight^T + bias))`.
#[derive(Debug)]
pub struct Head<'a, T> {
    weight: Matrix<'a, T>,
    bias: Option<Vec<T>>,
    softcap: Option<T>,
    logit_scale: T,
    vocab: usize,
    width: usize,
}

impl<'a, T: Real> Head<'a, T> {
    /// A head of `vocab` tokens on hidden states of `width`. The caller has checked the shapes: the
    /// weight has `vocab * width` elements, the bias `vocab`.
    #[must_use]
    pub fn new(
        weight: Matrix<'a, T>,
        bias: Option<Matrix<'_, T>>,
        softcap: Option<f64>,
        logit_scale: f64,
        vocab: usize,
        width: usize,
    ) -> Self {
        debug_assert_eq!(weight.len(), vocab * width);
        let bias = bias.map(|bias| {
            let mut scaled = vec![T::ZERO; vocab];
            bias.read(0..vocab, &mut scaled);
            row::scale(&mut scaled, T::from_f64(logit_scale));
            scaled
        });
        Self {
            weight,
            bias,
            softcap: softcap.map(T::from_f64),
            logit_scale: T::from_f64(logit_scale),
            vocab,
            width,
        }
    }

    /// Vocabulary size.
    #[must_use]
    pub fn vocab(&self) -> usize {
        self.vocab
    }

    /// Hidden size.
    #[must_use]
    pub fn width(&self) -> usize {
        self.width
    }

    /// Factor on the raw products. It is folded into the hidden states when they are gathered,
    /// and into the bias: with `h' = scale * h`, logits and `d_weight` are correct directly, and only
    /// `d_hidden` and `d_bias` need the factor again.
    #[must_use]
    pub fn logit_scale(&self) -> T {
        self.logit_scale
    }

    /// Bound on the logits, if any.
    #[must_use]
    pub fn softcap(&self) -> Option<T> {
        self.softcap
    }

    /// Sum of the (scaled) bias.
    #[must_use]
    pub fn bias_sum(&self) -> f64 {
        self.bias.iter().flatten().map(|b| b.to_f64()).sum()
    }

    /// From raw products to logits for the tokens in `tile`.
    #[must_use]
    pub fn transform(&self, tile: Range<usize>) -> Transform<'_, T> {
        Transform { bias: self.bias.as_ref().map(|b| &b[tile]), softcap: self.softcap }
    }

    /// Weight rows of the tokens in `tile`; `scratch` holds them if they have to be widened.
    pub fn tile<'s>(&'s self, threads: &dyn Threads, tile: Range<usize>, scratch: &'s mut Vec<T>) -> &'s [T] {
        let (first, width) = (tile.start, self.width);
        if let Matrix::Native(weight) = self.weight {
            return &weight[first * width..tile.end * width];
        }
        scratch.resize(tile.len() * width, T::ZERO);
        let mut none = vec![(); tile.len()];
        for_rows(threads, scratch, width, &mut none, |row, out, ()| self.weight_row(first + row, out));
        scratch
    }

    /// Copies the weight row of one token.
    pub fn weight_row(&self, token: usize, out: &mut [T]) {
        self.weight.read(token * self.width..(token + 1) * self.width, out);
    }
}
