//! Compares the head with a naive one that materialises every logit, in `f64`.

use super::engine::{Engine, Gradients};
use super::layout::Batch;
use super::logps;
use super::odds_ratio::{self, Link, NllScope};
use super::orpo::orpo;
use super::scores::{Objective, Outcome};
use super::weight::{Head, Matrix};
use crate::base::gemm::Gemm;
use crate::base::portable::Portable;
use crate::base::real::Real;

const SCOPES: [NllScope; 2] = [NllScope::Full, NllScope::Completion];
const LINKS: [Link; 2] = [Link::LogSigmoid, Link::Identity];

/// A batch with odd sizes: a multi-tile vocabulary, prompts, rows without targets, an empty side.
#[derive(Clone)]
struct Case {
    width: usize,
    vocab: usize,
    hidden: Vec<f64>,
    weight: Vec<f64>,
    bias: Option<Vec<f64>>,
    softcap: Option<f64>,
    logit_scale: f64,
    targets: Vec<i64>,
    sequence: Vec<i64>,
    completion: Vec<bool>,
    pairs: usize,
}

/// Deterministic numbers in (-1, 1) with an uneven spread.
fn noise(n: usize, seed: u64) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    };
    std::iter::repeat_with(next).take(n).collect()
}

impl Case {
    fn new(bias: bool, softcap: Option<f64>, logit_scale: f64) -> Self {
        let (width, vocab, pairs) = (5, 300, 3);
        let lengths = [(4, 7), (1, 3), (6, 2), (4, 5), (2, 9), (6, 0)];
        let (mut targets, mut sequence, mut completion) = (vec![], vec![], vec![]);
        for (s, (prompt, answer)) in lengths.into_iter().enumerate() {
            for i in 0..prompt + answer {
                let answer = i >= prompt;
                let scored = s < pairs || answer;
                targets.push(if scored { ((s * 131 + i * 37) % vocab) as i64 } else { -100 });
                sequence.push(s as i64);
                completion.push(answer);
            }
        }
        let rows = targets.len();
        Self {
            width,
            vocab,
            hidden: noise(rows * width, 1).iter().map(|x| 2.0 * x).collect(),
            weight: noise(vocab * width, 2).iter().map(|x| 1.5 * x).collect(),
            bias: bias.then(|| noise(vocab, 3)),
            softcap,
            logit_scale,
            targets,
            sequence,
            completion,
            pairs,
        }
    }

    fn batch(&self) -> Batch<'_> {
        Batch {
            targets: &self.targets,
            sequence: &self.sequence,
            completion: &self.completion,
            pairs: self.pairs,
        }
    }

    fn logits(&self, row: usize) -> Vec<f64> {
        let h = &self.hidden[row * self.width..(row + 1) * self.width];
        let rows = self.weight.chunks_exact(self.width).enumerate();
        let logit = |(v, w): (usize, &[f64])| {
            let dot: f64 = h.iter().zip(w).map(|(h, w)| h * w).sum();
            let z = self.logit_scale * (dot + self.bias.as_ref().map_or(0.0, |b| b[v]));
            self.softcap.map_or(z, |cap| cap * (z / cap).tanh())
        };
        rows.map(logit).collect()
    }

    fn naive_logp(&self, row: usize) -> f64 {
        let logits = self.logits(row);
        logits[self.targets[row] as usize] - logits.iter().map(|l| l.exp()).sum::<f64>().ln()
    }

    /// The loss by its definition.
    fn naive_loss(&self, objective: Objective) -> f64 {
        let rows = 0..self.targets.len();
        let mean = |rows: Vec<usize>| {
            let n = rows.len() as f64;
            rows.into_iter().map(|row| self.naive_logp(row)).sum::<f64>() / n
        };
        let side = |s: usize| {
            rows.clone()
                .filter(move |&r| self.sequence[r] == s as i64 && self.completion[r])
                .collect::<Vec<_>>()
        };
        let scored = rows.clone().filter(|&r| {
            (self.sequence[r] as usize) < self.pairs
                && (objective.scope == NllScope::Full || self.completion[r])
        });
        let mut loss = -mean(scored.collect());
        for p in 0..self.pairs {
            let (c, r) = (side(p), side(p + self.pairs));
            if !c.is_empty() && !r.is_empty() {
                let term = odds_ratio::pair(mean(c), mean(r), objective.link).value;
                loss -= objective.beta / self.pairs as f64 * term;
            }
        }
        loss
    }

    fn naive_mean_logits(&self, side: usize) -> f64 {
        let rows =
            (0..self.targets.len()).filter(|&r| (self.sequence[r] as usize >= self.pairs) == (side == 1));
        let all: Vec<f64> = rows.flat_map(|row| self.logits(row)).collect();
        all.iter().sum::<f64>() / all.len() as f64
    }
}

/// What a run returns, widened.
struct Ran {
    outcome: Outcome,
    hidden: Vec<f64>,
    weight: Vec<f64>,
    bias: Vec<f64>,
}

fn run<T: Real>(case: &Case, objective: Objective, trained: bool) -> Ran
where
    Portable: Gemm<T>,
{
    let cast = |x: &[f64]| x.iter().map(|&x| T::from_f64(x)).collect::<Vec<_>>();
    let (hidden, weight) = (cast(&case.hidden), cast(&case.weight));
    let bias = case.bias.as_deref().map(cast);
    let bias_view = bias.as_deref().map(Matrix::Native);
    let head =
        Head::new(Matrix::Native(&weight), bias_view, case.softcap, case.logit_scale, case.vocab, case.width);
    let engine = Engine { head: &head, gemm: &Portable, threads: &Portable };
    let mut d_hidden = vec![T::ZERO; hidden.len()];
    let mut d_weight = vec![T::from_f64(f64::NAN); weight.len()];
    let mut d_bias = vec![T::from_f64(f64::NAN); case.vocab];
    let mut grads = Gradients {
        hidden: Some(&mut d_hidden),
        weight: trained.then_some(&mut d_weight[..]),
        bias: (trained && bias.is_some()).then_some(&mut d_bias[..]),
        accumulate: false,
    };
    let outcome = orpo(&engine, Matrix::Native(&hidden), case.batch(), objective, &mut grads).unwrap();
    let widen = |x: Vec<T>| x.into_iter().map(Real::to_f64).collect();
    Ran { outcome, hidden: widen(d_hidden), weight: widen(d_weight), bias: widen(d_bias) }
}

fn objective(scope: NllScope, link: Link, budget: usize) -> Objective {
    Objective { beta: 0.37, scope, link, budget: Some(budget) }
}

fn close(a: f64, b: f64, tolerance: f64) -> bool {
    (a - b).abs() <= tolerance * (1.0 + b.abs())
}

/// Largest difference, NaN on either side included.
fn worst(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .map(|(a, b)| if (a - b).is_nan() { f64::INFINITY } else { (a - b).abs() })
        .fold(0.0, f64::max)
}

fn cases() -> Vec<Case> {
    vec![
        Case::new(false, None, 1.0),
        Case::new(true, None, 0.7),
        Case::new(false, Some(2.0), 1.0),
        Case::new(true, Some(3.0), 1.6),
    ]
}

#[test]
fn loss_and_reports_equal_the_definition() {
    for case in cases() {
        for scope in SCOPES {
            for link in LINKS {
                let objective = objective(scope, link, 1 << 20);
                for trained in [false, true] {
                    let out = run::<f64>(&case, objective, trained).outcome;
                    assert!(close(out.loss, case.naive_loss(objective), 1e-12), "{out:?}");
                    assert!(close(out.mean_logits[0], case.naive_mean_logits(0), 1e-12));
                    assert!(close(out.mean_logits[1], case.naive_mean_logits(1), 1e-12));
                    assert_eq!((out.empty, out.rejected[2]), (1, 0.0));
                }
            }
        }
    }
}

#[test]
fn gradients_are_slopes_of_the_loss() {
    for case in cases() {
        for (scope, link) in SCOPES.into_iter().zip(LINKS) {
            let objective = objective(scope, link, 1 << 20);
            let ran = run::<f64>(&case, objective, true);
            let slope = |bump: &dyn Fn(&mut Case, f64)| {
                let at = |h: f64| {
                    let mut case = case.clone();
                    bump(&mut case, h);
                    case.naive_loss(objective)
                };
                (at(1e-5) - at(-1e-5)) / 2e-5
            };
            for i in (0..case.hidden.len()).step_by(7) {
                let truth = slope(&|case, h| case.hidden[i] += h);
                assert!(close(ran.hidden[i], truth, 1e-8), "hidden {i}: {} {truth}", ran.hidden[i]);
            }
            for i in (0..case.weight.len()).step_by(41) {
                let truth = slope(&|case, h| case.weight[i] += h);
                assert!(close(ran.weight[i], truth, 1e-8), "weight {i}: {} {truth}", ran.weight[i]);
            }
            for i in (0..case.bias.as_ref().map_or(0, Vec::len)).step_by(17) {
                let truth = slope(&|case, h| case.bias.as_mut().unwrap()[i] += h);
                assert!(close(ran.bias[i], truth, 1e-8), "bias {i}: {} {truth}", ran.bias[i]);
            }
        }
    }
}

#[test]
fn variants_agree() {
    for mut case in cases() {
        // The pair is long enough, relative to the width, for the accumulators variant.
        case.width = 2;
        case.hidden.truncate(case.targets.len() * 2);
        case.weight.truncate(case.vocab * 2);
        let element = size_of::<f64>();
        let row = case.vocab * element;
        // Keep everything; a pair at a time (12 rows at most); some tiles of a pair; recompute.
        let accumulators = case.vocab * (2 * case.width + super::plan::BLOCK) * element;
        assert!(accumulators > 12 * row);
        let at = |budget| run::<f64>(&case, objective(NllScope::Full, Link::LogSigmoid, budget), true);
        let reference = at(1 << 24);
        for budget in [12 * row, 11 * row, 0] {
            let ran = at(budget);
            assert!(worst(&ran.hidden, &reference.hidden) < 1e-13);
            assert!(worst(&ran.weight, &reference.weight) < 1e-13);
            assert!(close(ran.outcome.loss, reference.outcome.loss, 1e-13));
            assert!(worst(&ran.outcome.mean_logits, &reference.outcome.mean_logits) < 1e-12);
        }
        let frozen = run::<f64>(&case, objective(NllScope::Full, Link::LogSigmoid, 0), false);
        assert!(worst(&frozen.hidden, &reference.hidden) < 1e-13);
    }
}

/// Budgets at every fraction of a pair's logits, so that the last, smaller tile of the vocabulary
/// would fit where one before it did not.
#[test]
fn any_budget_gives_the_same() {
    let case = Case::new(true, None, 1.3);
    let row = case.vocab * size_of::<f64>();
    let at = |budget| run::<f64>(&case, objective(NllScope::Full, Link::LogSigmoid, budget), true);
    let reference = at(1 << 24);
    for budget in (row..=40 * row).step_by(row / 3) {
        let ran = at(budget);
        assert!(worst(&ran.hidden, &reference.hidden) < 1e-13, "{budget}");
        assert!(worst(&ran.weight, &reference.weight) < 1e-13, "{budget}");
    }
}

#[test]
fn accumulators_agree_on_long_pairs() {
    // Two pairs of 400 and 530 completion rows at width 2: over the budget of one pair's logits.
    let lengths = [(3, 200), (5, 300), (2, 200), (5, 230)];
    let mut case = Case::new(true, Some(3.0), 0.9);
    let (mut targets, mut sequence, mut completion) = (vec![], vec![], vec![]);
    for (s, (prompt, answer)) in lengths.into_iter().enumerate() {
        for i in 0..prompt + answer {
            targets.push(if s < 2 || i >= prompt { ((s * 31 + i * 7) % case.vocab) as i64 } else { -100 });
            sequence.push(s as i64);
            completion.push(i >= prompt);
        }
    }
    case.width = 2;
    case.hidden = noise(targets.len() * 2, 5);
    case.weight.truncate(case.vocab * 2);
    (case.targets, case.sequence, case.completion, case.pairs) = (targets, sequence, completion, 2);
    let budget = case.vocab * (2 * case.width + super::plan::BLOCK) * size_of::<f64>();
    assert!(530 * case.vocab * size_of::<f64>() > budget);
    let at = |budget| run::<f64>(&case, objective(NllScope::Full, Link::LogSigmoid, budget), true);
    let (reference, ran) = (at(1 << 30), at(budget));
    assert!(worst(&ran.hidden, &reference.hidden) < 1e-13);
    assert!(worst(&ran.weight, &reference.weight) < 1e-13);
    assert!(worst(&ran.bias, &reference.bias) < 1e-13);
}

#[test]
fn single_precision_is_near_double() {
    for case in cases() {
        let objective = objective(NllScope::Full, Link::LogSigmoid, 1 << 20);
        for trained in [false, true] {
            let (single, double) =
                (run::<f32>(&case, objective, trained), run::<f64>(&case, objective, trained));
            assert!(close(single.outcome.loss, double.outcome.loss, 1e-6));
            assert!(worst(&single.hidden, &double.hidden) < 2e-6);
            if trained {
                assert!(worst(&single.weight, &double.weight) < 2e-6);
            }
        }
    }
}

#[test]
fn half_precision_weights_are_widened_exactly() {
    let case = Case::new(false, None, 1.0);
    let stored: Vec<half::bf16> = case.weight.iter().map(|&w| half::bf16::from_f64(w)).collect();
    let hidden: Vec<half::f16> = case.hidden.iter().map(|&h| half::f16::from_f64(h)).collect();
    let mut widened = case.clone();
    widened.weight = stored.iter().map(|w| w.to_f64()).collect();
    widened.hidden = hidden.iter().map(|h| h.to_f64()).collect();
    let objective = objective(NllScope::Full, Link::LogSigmoid, 1 << 20);
    let truth = run::<f32>(&widened, objective, true);
    let head = Head::new(Matrix::Bf16(&stored), None, None, 1.0, case.vocab, case.width);
    let engine = Engine::<f32> { head: &head, gemm: &Portable, threads: &Portable };
    let (mut d_hidden, mut d_weight) = (vec![0.0; case.hidden.len()], vec![0.0; case.weight.len()]);
    let mut grads =
        Gradients { hidden: Some(&mut d_hidden), weight: Some(&mut d_weight), bias: None, accumulate: false };
    let out = orpo(&engine, Matrix::F16(&hidden), case.batch(), objective, &mut grads).unwrap();
    assert!((out.loss - truth.outcome.loss).abs() == 0.0);
    assert!(d_weight.iter().zip(&truth.weight).all(|(a, b)| (f64::from(*a) - b).abs() == 0.0));
}

#[test]
fn log_probabilities_and_their_gradients() {
    for case in cases() {
        let bias = case.bias.as_deref().map(Matrix::Native);
        let head = Head::new(
            Matrix::Native(&case.weight),
            bias,
            case.softcap,
            case.logit_scale,
            case.vocab,
            case.width,
        );
        let engine = Engine::<f64> { head: &head, gemm: &Portable, threads: &Portable };
        let hidden = Matrix::Native(&case.hidden[..]);
        let upstream = noise(case.targets.len(), 9);
        let mut expectation = vec![0.0; case.hidden.len()];
        let out = logps::forward(&engine, hidden, &case.targets, Some(&mut expectation)).unwrap();
        for row in 0..case.targets.len() {
            let truth = if case.targets[row] < 0 { 0.0 } else { case.naive_logp(row) };
            assert!(close(out.logps[row], truth, 1e-12));
        }
        let (mut d_hidden, mut d_weight) = (vec![0.0; case.hidden.len()], vec![f64::NAN; case.weight.len()]);
        let mut grads = Gradients {
            hidden: Some(&mut d_hidden),
            weight: Some(&mut d_weight),
            bias: None,
            accumulate: false,
        };
        logps::backward(&engine, hidden, &case.targets, &out.lse, &upstream, &mut grads).unwrap();
        let scaled: Vec<f64> =
            expectation.iter().enumerate().map(|(i, e)| -e * upstream[i / case.width]).collect();
        assert!(worst(&scaled, &d_hidden) < 1e-12);
        let value = |case: &Case| {
            let rows = (0..case.targets.len()).filter(|&row| case.targets[row] >= 0);
            rows.map(|row| upstream[row] * case.naive_logp(row)).sum::<f64>()
        };
        for i in (0..case.weight.len()).step_by(53) {
            let at = |h: f64| {
                let mut case = case.clone();
                case.weight[i] += h;
                value(&case)
            };
            assert!(close(d_weight[i], (at(1e-5) - at(-1e-5)) / 2e-5, 1e-8));
        }
    }
}

#[test]
fn nan_reaches_the_loss() {
    for trained in [false, true] {
        let mut case = Case::new(false, None, 1.0);
        case.hidden[7] = f64::NAN;
        let objective = objective(NllScope::Full, Link::LogSigmoid, 1 << 20);
        assert!(run::<f32>(&case, objective, trained).outcome.loss.is_nan());
    }
}

#[test]
fn batches_without_scored_rows() {
    let mut case = Case::new(true, None, 1.0);
    case.targets.fill(-100);
    let ran = run::<f64>(&case, objective(NllScope::Full, Link::LogSigmoid, 1 << 20), true);
    assert!(ran.outcome.loss.abs() == 0.0 && ran.outcome.empty == 3);
    assert!(ran.weight.iter().chain(&ran.hidden).chain(&ran.bias).all(|g| g.abs() == 0.0));
    assert!(close(ran.outcome.mean_logits[1], case.naive_mean_logits(1), 1e-12));
}
