//! The ORPO loss and its gradients from hidden states, without the batch's logits.
//!
//! A row's gradient with respect to its logits is a scalar times a vector, `a_t * (softmax_t -
//! onehot(y_t))`, with
//!
//! ```text
//! chosen prompt      a = 1 / N
//! chosen completion  a = 1 / N + (beta / B) * d_chosen / len(chosen)
//! rejected           a =         (beta / B) * d_rejected / len(rejected)
//! ```
//!
//! `N` tokens in the negative log-likelihood, `B` pairs, slopes from [`super::odds_ratio`]. So the
//! coefficient can be applied later, and the variants of [`super::plan`] differ in how they wait for it.

use std::iter::zip;

use super::engine::{Engine, Gradients, Kept, MAX_ROWS, Rows, Stats};
use super::layout::{Batch, Role};
use super::logps::{ranges, scatter, zero_if_untouched};
use super::plan::{self, Variant};
use super::row;
use super::scores::{Objective, Outcome, Scores};
use super::weight::Matrix;
use crate::base::error::Result;
use crate::base::real::Real;
use crate::base::threads::for_rows;

/// The state of one computation.
struct Run<'a, 'e, T> {
    engine: &'a Engine<'e, T>,
    hidden: Matrix<'a, T>,
    batch: Batch<'a>,
    budget: Option<usize>,
    scores: Scores,
    /// Log-sum-exp of the rows swept so far.
    lse: Vec<f64>,
    /// The sums of each side's rows have not been swept yet.
    sums_pending: bool,
}

/// Computes the loss of a batch and, where `grads` has room, its gradients. `grads.hidden` covers
/// all rows of the batch and is zero at the start.
///
/// # Errors
/// Errors of the matrix products.
pub fn orpo<T: Real>(
    engine: &Engine<'_, T>,
    hidden: Matrix<'_, T>,
    batch: Batch<'_>,
    objective: Objective,
    grads: &mut Gradients<'_, T>,
) -> Result<Outcome> {
    let mut run = Run {
        engine,
        hidden,
        batch,
        budget: objective.budget,
        scores: Scores::new(batch, objective),
        lse: vec![0.0; batch.targets.len()],
        sums_pending: true,
    };
    if grads.weight.is_some() || grads.bias.is_some() {
        run.trained(grads)?;
    } else if let Some(d_hidden) = grads.hidden.as_deref_mut() {
        run.frozen(d_hidden)?;
    } else {
        run.forward()?;
    }
    run.finish_totals()?;
    Ok(run.scores.outcome(engine.head.vocab()))
}

impl<T: Real> Run<'_, '_, T> {
    fn width(&self) -> usize {
        self.engine.head.width()
    }

    /// Gathers a block. The first one also carries the sum of each side's rows: without a softcap
    /// logits are linear, so the sum of all logits is that of two more rows.
    fn gather(&mut self, index: &[usize]) -> Rows<T> {
        let head = self.engine.head;
        let target = |&row: &usize| match self.scores.layout.roles[row] {
            Role::None => None,
            _ => usize::try_from(self.batch.targets[row]).ok(),
        };
        let targets = index.iter().map(target).collect();
        let mut rows = Rows::gather(self.engine.threads, head, self.hidden, index, targets);
        if head.softcap().is_none() && std::mem::take(&mut self.sums_pending) {
            rows.hidden.extend(self.side_sums());
            rows.targets.extend([None, None]);
        }
        rows
    }

    /// Sum of the hidden states of each side, `[2, width]`, times the logit scale.
    fn side_sums(&self) -> Vec<T> {
        let width = self.width();
        let mut sums = vec![0f64; 2 * width];
        for_rows(self.engine.threads, &mut sums, width, &mut [0, 1], |_, sums, side| {
            let mut hidden = vec![T::ZERO; width];
            for (row, &sequence) in self.batch.sequence.iter().enumerate() {
                if (sequence >= self.batch.pairs as i64) == (*side == 1) {
                    self.hidden.read(row * width..(row + 1) * width, &mut hidden);
                    zip(&mut *sums, &hidden).for_each(|(sum, h)| *sum += h.to_f64());
                }
            }
        });
        sums.into_iter().map(|sum| T::from_f64(sum) * self.engine.head.logit_scale()).collect()
    }

    /// Stores the results of a sweep for the rows `index`.
    fn record(&mut self, index: &[usize], stats: &[Stats]) {
        let capped = self.engine.head.softcap().is_some();
        for (&row, stats) in zip(index, stats) {
            if self.scores.layout.roles[row] != Role::None {
                self.scores.logps[row] = stats.logp();
                self.lse[row] = stats.lse();
            }
            if capped {
                self.scores.totals[usize::from(self.batch.sequence[row] >= self.batch.pairs as i64)] +=
                    stats.total;
            }
        }
        // The two rows of sums, if the block had them.
        for (side, stats) in stats[index.len()..].iter().enumerate() {
            let bias = self.engine.head.bias_sum();
            self.scores.totals[side] = stats.total - bias + self.scores.layout.side_rows[side] as f64 * bias;
        }
    }

    /// The logits that no other sweep has summed: under a softcap those of rows without a role.
    fn finish_totals(&mut self) -> Result<()> {
        let rest: Vec<usize> = if self.engine.head.softcap().is_some() {
            (0..self.scores.layout.roles.len())
                .filter(|&row| self.scores.layout.roles[row] == Role::None)
                .collect()
        } else if self.sums_pending && !self.scores.layout.roles.is_empty() {
            return self.sweep(&[]);
        } else {
            Vec::new()
        };
        rest.chunks(MAX_ROWS).try_for_each(|index| self.sweep(index))
    }

    /// A separate forward sweep.
    fn sweep(&mut self, index: &[usize]) -> Result<()> {
        let rows = self.gather(index);
        let stats = self.engine.forward(&rows, None)?;
        self.record(index, &stats);
        Ok(())
    }

    fn forward(&mut self) -> Result<()> {
        let index: Vec<usize> = self.scores.layout.scored().collect();
        index.chunks(MAX_ROWS).try_for_each(|index| self.sweep(index))
    }

    /// 2 U: `d_hidden` holds the expectations until the coefficients are known.
    fn frozen(&mut self, d_hidden: &mut [T]) -> Result<()> {
        let width = self.width();
        let index: Vec<usize> = self.scores.layout.scored().collect();
        for index in index.chunks(MAX_ROWS) {
            let rows = self.gather(index);
            let mut block = vec![T::ZERO; rows.len() * width];
            let stats = self.engine.expectation(&rows, &mut block)?;
            self.record(index, &stats);
            scatter(d_hidden, width, index, &block, |_| T::ONE);
        }
        self.apply_coefficients(d_hidden, &index);
        Ok(())
    }

    /// Multiplies the rows `index` of `d_hidden` by their coefficients.
    fn apply_coefficients(&self, d_hidden: &mut [T], index: &[usize]) {
        let width = self.width();
        for (&row, a) in zip(index, self.scores.coefficients(index)) {
            row::scale(&mut d_hidden[row * width..(row + 1) * width], T::from_f64(a));
        }
    }

    fn trained(&mut self, grads: &mut Gradients<'_, T>) -> Result<()> {
        let sizes = plan::Sizes {
            vocab: self.engine.head.vocab(),
            width: self.width(),
            element: size_of::<T>(),
            longest_pair: self.scores.layout.longest_pair(),
        };
        let rows = self.batch.targets.len();
        let default = || plan::default_budget(rows, sizes.vocab, sizes.element);
        match plan::choose(sizes, self.budget.unwrap_or_else(default)) {
            Variant::Keep { rows, elements } => self.keep(rows, elements, grads)?,
            Variant::Accumulators => self.accumulators(grads)?,
            Variant::Recompute => self.recompute(grads)?,
        }
        zero_if_untouched(grads);
        Ok(())
    }

    /// 3 U, or more if not all logits fit: blocks of complete pairs, filled up with prompt rows.
    fn keep(&mut self, limit: usize, elements: usize, grads: &mut Gradients<'_, T>) -> Result<()> {
        // The first block carries two more rows.
        let mut kept = Kept::new(elements + 2 * self.engine.head.vocab());
        let mut items: Vec<Vec<usize>> = (0..self.batch.pairs).map(|p| self.scores.layout.pair(p)).collect();
        // Without a completion the limit can be 0.
        let prompt_rows = limit.div_ceil(16).max(1);
        items.extend(self.scores.layout.prompt.chunks(prompt_rows).map(<[usize]>::to_vec));
        let sizes: Vec<usize> = items.iter().map(Vec::len).collect();
        let mut first = 0;
        for end in plan::pack(&sizes, limit) {
            let index = items[first..end].concat();
            first = end;
            if !index.is_empty() {
                self.kept_block(&index, &mut kept, grads)?;
            }
        }
        Ok(())
    }

    /// Forward and backward over rows whose coefficients depend on this block only.
    fn kept_block(
        &mut self,
        index: &[usize],
        kept: &mut Kept<T>,
        grads: &mut Gradients<'_, T>,
    ) -> Result<()> {
        let rows = self.gather(index);
        let stats = self.engine.forward(&rows, Some(kept))?;
        self.record(index, &stats);
        let coefficients = self.scores.coefficients(index);
        self.backward(index, &rows, &coefficients, Some(kept), grads)
    }

    fn backward(
        &self,
        index: &[usize],
        rows: &Rows<T>,
        coefficients: &[f64],
        kept: Option<&mut Kept<T>>,
        grads: &mut Gradients<'_, T>,
    ) -> Result<()> {
        let width = self.width();
        // The rows of sums have a coefficient of zero.
        let padded = |x: Vec<f64>| x.into_iter().chain([0.0; 2]).take(rows.len()).collect::<Vec<_>>();
        let lse = padded(index.iter().map(|&row| self.lse[row]).collect());
        let scale = padded(coefficients.to_vec());
        let mut block = vec![T::ZERO; if grads.hidden.is_some() { rows.len() * width } else { 0 }];
        let mut part = Gradients {
            hidden: grads.hidden.is_some().then_some(&mut block[..]),
            weight: grads.weight.as_deref_mut(),
            bias: grads.bias.as_deref_mut(),
            accumulate: grads.accumulate,
        };
        self.engine.backward(rows, &lse, &scale, kept, &mut part)?;
        grads.accumulate = true;
        if let Some(d_hidden) = grads.hidden.as_deref_mut() {
            scatter(d_hidden, width, index, &block, |_| T::ONE);
        }
        Ok(())
    }

    /// 4 U: a complete forward, then a complete backward that recomputes the logits.
    fn recompute(&mut self, grads: &mut Gradients<'_, T>) -> Result<()> {
        self.forward()?;
        let index: Vec<usize> = self.scores.layout.scored().collect();
        for index in index.chunks(MAX_ROWS) {
            let rows = self.gather(index);
            let coefficients = self.scores.coefficients(index);
            self.backward(index, &rows, &coefficients, None, grads)?;
        }
        Ok(())
    }

    /// 3 U in small blocks: the weight gradient of each side of a pair is accumulated with coefficient one,
    /// and added when the pair's slopes are known.
    fn accumulators(&mut self, grads: &mut Gradients<'_, T>) -> Result<()> {
        let (vocab, width) = (self.engine.head.vocab(), self.width());
        let (wants_weight, wants_bias) = (grads.weight.is_some(), grads.bias.is_some());
        let room = |wanted: bool, len: usize| vec![T::ZERO; if wanted { len } else { 0 }];
        let mut kept = Kept::new((plan::BLOCK + 2) * vocab);
        zero_if_untouched(grads);
        for pair in 0..self.batch.pairs {
            let mut sides = Vec::new();
            for index in [self.scores.layout.chosen[pair].clone(), self.scores.layout.rejected[pair].clone()]
            {
                let (mut weight, mut bias) = (room(wants_weight, vocab * width), room(wants_bias, vocab));
                let mut side = Gradients {
                    hidden: grads.hidden.as_deref_mut(),
                    weight: wants_weight.then_some(&mut weight[..]),
                    bias: wants_bias.then_some(&mut bias[..]),
                    accumulate: false,
                };
                for range in ranges(index.len(), plan::BLOCK) {
                    let index = &index[range];
                    let rows = self.gather(index);
                    let stats = self.engine.forward(&rows, Some(&mut kept))?;
                    self.record(index, &stats);
                    self.backward(index, &rows, &vec![1.0; index.len()], Some(&mut kept), &mut side)?;
                }
                sides.push((index, weight, bias));
            }
            for (index, weight, bias) in sides {
                let Some(&a) = self.scores.coefficients(&index).first() else { continue };
                let add = |to: Option<&mut [T]>, from: &[T], width: usize| {
                    if let Some(to) = to {
                        let mut rows: Vec<&[T]> = from.chunks_exact(width).collect();
                        for_rows(self.engine.threads, to, width, &mut rows, |_, to, from| {
                            row::axpy(to, T::from_f64(a), from);
                        });
                    }
                };
                add(grads.weight.as_deref_mut(), &weight, width);
                add(grads.bias.as_deref_mut(), &bias, 1);
                if let Some(d_hidden) = grads.hidden.as_deref_mut() {
                    self.apply_coefficients(d_hidden, &index);
                }
            }
        }
        let prompt = self.scores.layout.prompt.clone();
        prompt.chunks(plan::BLOCK).try_for_each(|index| self.kept_block(index, &mut kept, grads))
    }
}
