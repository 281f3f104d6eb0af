//! From log-probabilities to the loss: the part after the sweeps over the vocabulary.

use super::layout::{Batch, Layout, Role};
use super::odds_ratio::{self, Link, NllScope, Pair};

/// Hyperparameters of the loss.
#[derive(Clone, Copy, Debug)]
pub struct Objective {
    /// Weight of the odds-ratio term.
    pub beta: f64,
    /// Tokens that the negative log-likelihood covers.
    pub scope: NllScope,
    /// How the log odds enter.
    pub link: Link,
    /// Bytes of logits that may be kept; none: [`super::plan::default_budget`].
    pub budget: Option<usize>,
}

/// The loss and the reported metrics.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// `nll - beta * mean(value)`.
    pub loss: f64,
    /// Token mean over the chosen sequences.
    pub nll: f64,
    /// Mean completion log-probability of each chosen sequence.
    pub chosen: Vec<f64>,
    /// Mean completion log-probability of each rejected sequence.
    pub rejected: Vec<f64>,
    /// The odds-ratio term of each pair.
    pub pairs: Vec<Pair>,
    /// Mean logit over the rows of each side and the vocabulary.
    pub mean_logits: [f64; 2],
    /// Pairs with an empty side.
    pub empty: usize,
}

/// A batch's rows and their results so far.
#[derive(Debug)]
pub struct Scores {
    /// Rows by role.
    pub layout: Layout,
    /// Log-probability of every row that has been swept.
    pub logps: Vec<f64>,
    /// Sum of each side's logits.
    pub totals: [f64; 2],
    objective: Objective,
    pairs: usize,
}

impl Scores {
    /// No results yet.
    #[must_use]
    pub fn new(batch: Batch<'_>, objective: Objective) -> Self {
        Self {
            layout: Layout::new(batch, objective.scope),
            logps: vec![0.0; batch.targets.len()],
            totals: [0.0; 2],
            objective,
            pairs: batch.pairs,
        }
    }

    /// The mean completion log-probabilities of a pair and its odds-ratio term; none for a pair with an empty
    /// side.
    fn pair(&self, pair: usize) -> (f64, f64, Option<Pair>) {
        let (chosen, rejected) = (&self.layout.chosen[pair], &self.layout.rejected[pair]);
        let mean = |index: &[usize]| match index.len() {
            0 => 0.0,
            n => index.iter().map(|&row| self.logps[row]).sum::<f64>() / n as f64,
        };
        let (c, r) = (mean(chosen), mean(rejected));
        let whole = !chosen.is_empty() && !rejected.is_empty();
        (c, r, whole.then(|| odds_ratio::pair(c, r, self.objective.link)))
    }

    /// The coefficients of rows whose pairs have been swept.
    #[must_use]
    pub fn coefficients(&self, index: &[usize]) -> Vec<f64> {
        let nll = 1.0 / self.layout.nll_tokens.max(1) as f64;
        let weight = self.objective.beta / self.pairs.max(1) as f64;
        let mut last = (usize::MAX, Pair::default());
        let mut slopes = |pair: usize| {
            if last.0 != pair {
                last = (pair, self.pair(pair).2.unwrap_or_default());
            }
            last.1
        };
        let coefficient = |&row: &usize| match self.layout.roles[row] {
            Role::None => 0.0,
            Role::Prompt => nll,
            Role::Chosen(p) => nll + weight * slopes(p).d_chosen / self.layout.chosen[p].len() as f64,
            Role::Rejected(p) => weight * slopes(p).d_rejected / self.layout.rejected[p].len() as f64,
        };
        index.iter().map(coefficient).collect()
    }

    /// The loss and its parts, when every row has been swept.
    #[must_use]
    pub fn outcome(&self, vocab: usize) -> Outcome {
        let mut out = Outcome::default();
        let scored = self.layout.prompt.iter().chain(self.layout.chosen.iter().flatten());
        out.nll = -scored.map(|&row| self.logps[row]).sum::<f64>() / self.layout.nll_tokens.max(1) as f64;
        for pair in 0..self.pairs {
            let (chosen, rejected, term) = self.pair(pair);
            out.chosen.push(chosen);
            out.rejected.push(rejected);
            out.empty += usize::from(term.is_none());
            out.pairs.push(term.unwrap_or_default());
        }
        let values = out.pairs.iter().map(|pair| pair.value).sum::<f64>();
        out.loss = out.nll - self.objective.beta * values / self.pairs.max(1) as f64;
        for side in 0..2 {
            let logits = self.layout.side_rows[side] as f64 * vocab as f64;
            out.mean_logits[side] = if logits > 0.0 { self.totals[side] / logits } else { 0.0 };
        }
        out
    }
}
