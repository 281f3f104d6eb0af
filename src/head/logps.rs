//! Log-probabilities of target tokens, and their gradients.

use std::ops::Range;

use super::engine::{Engine, Gradients, MAX_ROWS, Rows};
use super::weight::Matrix;
use crate::base::error::Result;
use crate::base::real::Real;

/// Log-probabilities, one per row; rows without a target have zeros.
#[derive(Debug, Default)]
pub struct Logps {
    /// `log softmax(logits)[target]`.
    pub logps: Vec<f64>,
    /// Log-sum-exp of the logits: what the backward sweep needs.
    pub lse: Vec<f64>,
}

/// Index of the rows that have a target, in blocks that share a sweep.
fn blocks(targets: &[i64]) -> Vec<Vec<usize>> {
    let index: Vec<usize> = (0..targets.len()).filter(|&i| targets[i] >= 0).collect();
    index.chunks(MAX_ROWS).map(<[usize]>::to_vec).collect()
}

/// Tokens to score in the rows `index`.
fn tokens(targets: &[i64], index: &[usize]) -> Vec<Option<usize>> {
    index.iter().map(|&i| usize::try_from(targets[i]).ok()).collect()
}

/// Adds the rows of `block` to the rows `index` of `out`, each times its factor.
pub(super) fn scatter<T: Real>(
    out: &mut [T],
    width: usize,
    index: &[usize],
    block: &[T],
    factor: impl Fn(usize) -> T,
) {
    for (i, (&row, block)) in index.iter().zip(block.chunks_exact(width)).enumerate() {
        super::row::axpy(&mut out[row * width..(row + 1) * width], factor(i), block);
    }
}

/// Log-probabilities of `targets` (negative: none). With `expectation`, `[rows, width]` and zero
/// at the start, it also receives `-d logp / d hidden`.
///
/// # Errors
/// Errors of the matrix products.
pub fn forward<T: Real>(
    engine: &Engine<'_, T>,
    hidden: Matrix<'_, T>,
    targets: &[i64],
    mut expectation: Option<&mut [T]>,
) -> Result<Logps> {
    let width = engine.head.width();
    let mut out = Logps { logps: vec![0.0; targets.len()], lse: vec![0.0; targets.len()] };
    for index in blocks(targets) {
        let rows = Rows::gather(engine.threads, engine.head, hidden, &index, tokens(targets, &index));
        let stats = if let Some(expectation) = expectation.as_deref_mut() {
            let mut block = vec![T::ZERO; rows.len() * width];
            let stats = engine.expectation(&rows, &mut block)?;
            scatter(expectation, width, &index, &block, |_| T::ONE);
            stats
        } else {
            engine.forward(&rows, None)?
        };
        for (&row, stats) in index.iter().zip(&stats) {
            out.logps[row] = stats.logp();
            out.lse[row] = stats.lse();
        }
    }
    Ok(out)
}

/// Gradients of `sum(upstream * logps)`, where `lse` comes from [`forward`].
///
/// # Errors
/// Errors of the matrix products.
pub fn backward<T: Real>(
    engine: &Engine<'_, T>,
    hidden: Matrix<'_, T>,
    targets: &[i64],
    lse: &[f64],
    upstream: &[f64],
    grads: &mut Gradients<'_, T>,
) -> Result<()> {
    let width = engine.head.width();
    for index in blocks(targets) {
        let rows = Rows::gather(engine.threads, engine.head, hidden, &index, tokens(targets, &index));
        let pick = |x: &[f64], sign: f64| index.iter().map(|&i| sign * x[i]).collect::<Vec<_>>();
        let mut block = vec![T::ZERO; if grads.hidden.is_some() { rows.len() * width } else { 0 }];
        let mut part = Gradients {
            hidden: grads.hidden.is_some().then_some(&mut block[..]),
            weight: grads.weight.as_deref_mut(),
            bias: grads.bias.as_deref_mut(),
            accumulate: grads.accumulate,
        };
        engine.backward(&rows, &pick(lse, 1.0), &pick(upstream, -1.0), None, &mut part)?;
        if let Some(d_hidden) = grads.hidden.as_deref_mut() {
            scatter(d_hidden, width, &index, &block, |_| T::ONE);
        }
        grads.accumulate = true;
    }
    zero_if_untouched(grads);
    Ok(())
}

/// Without any target, the sweep does not write the weight's gradient: set it to zero.
pub(super) fn zero_if_untouched<T: Real>(grads: &mut Gradients<'_, T>) {
    if !grads.accumulate {
        for part in [grads.weight.as_deref_mut(), grads.bias.as_deref_mut()].into_iter().flatten() {
            part.fill(T::ZERO);
        }
        grads.accumulate = true;
    }
}

/// Splits `0..items` into ranges of at most `size`.
pub(super) fn ranges(items: usize, size: usize) -> impl Iterator<Item = Range<usize>> {
    (0..items).step_by(size.max(1)).map(move |first| first..(first + size).min(items))
}
