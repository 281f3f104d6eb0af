//! The ORPO objective on per-sequence mean log-probabilities.
//!
//! Hong, Lee and Thorne 2024, *ORPO: Monolithic Preference Optimization without Reference Model*
//! (arXiv 2403.07691), equations 4 to 7. With `c` and `r` the mean completion log-probabilities of
//! the chosen and the rejected sequence,
//!
//! ```text
//! log_odds = (c - r) - (log1mexp(c) - log1mexp(r))
//! loss     = nll - beta * mean(log_sigmoid(log_odds))
//! ```
//!
//! Everything is evaluated in `f64`: a step has a handful of sequences, and the differences below
//! are where single precision loses its digits.

/// Smallest magnitude a mean log-probability is taken to have: the smallest positive `f32`.
/// A probability of exactly one has infinite odds; this keeps the value finite (about 103).
const SMALLEST: f64 = 1.401_298_464_324_817e-45;

/// Bound on the slope of the log odds. `1 - p` is not resolved below `2^-24` in single precision,
/// so a steeper slope would be rounding noise that overflows the gradient.
const STEEPEST: f64 = 16_777_216.0;

/// How the log odds enter the loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// `log_sigmoid(log_odds)`: the paper and TRL.
    LogSigmoid,
    /// `log_odds` itself: unbounded, so confident pairs keep pulling.
    Identity,
}

/// Which tokens of the chosen sequence the negative log-likelihood covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NllScope {
    /// Prompt and completion: TRL.
    Full,
    /// Completion only.
    Completion,
}

/// The odds-ratio term of one pair, and its slopes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Pair {
    /// `log(odds(chosen) / odds(rejected))`.
    pub log_odds: f64,
    /// `log_sigmoid(log_odds)`: what TRL logs as `log_odds_ratio`.
    pub log_sigmoid: f64,
    /// The value that enters the loss, by [`Link`].
    pub value: f64,
    /// `d value / d chosen`.
    pub d_chosen: f64,
    /// `d value / d rejected`.
    pub d_rejected: f64,
}

/// `log(1 - exp(x))` for `x <= 0`, without cancellation on either side of `-ln 2`.
///
/// Maechler 2012, *Accurately computing log(1 - exp(-|a|))*.
#[must_use]
pub fn log1mexp(x: f64) -> f64 {
    if x < -std::f64::consts::LN_2 { (-x.exp()).ln_1p() } else { (-x.exp_m1()).ln() }
}

/// `log(1 / (1 + exp(-x)))` without overflow.
#[must_use]
pub fn log_sigmoid(x: f64) -> f64 {
    x.min(0.0) - (-x.abs()).exp().ln_1p()
}

/// `1 / (1 + exp(-x))` without overflow.
fn sigmoid(x: f64) -> f64 {
    let e = (-x.abs()).exp();
    if x >= 0.0 { 1.0 / (1.0 + e) } else { e / (1.0 + e) }
}

/// Evaluates the odds-ratio term of a pair from its mean log-probabilities.
///
/// Finite in value and slope for every `chosen, rejected <= 0`, zero included; NaN stays NaN.
/// A positive argument, which rounding can produce, counts as zero.
#[must_use]
pub fn pair(chosen: f64, rejected: f64, link: Link) -> Pair {
    let clamp = |x: f64| if x > -SMALLEST { -SMALLEST } else { x };
    let (chosen, rejected) = (clamp(chosen), clamp(rejected));
    let log_odds = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected));
    let log_sigmoid = log_sigmoid(log_odds);
    let (value, slope) = match link {
        Link::LogSigmoid => (log_sigmoid, sigmoid(-log_odds)),
        Link::Identity => (log_odds, 1.0),
    };
    // d log_odds / d x = 1 / (1 - exp(x)). Dividing the sigmoid first keeps its smallness: near
    // x = 0 the two factors are 1e-45 and 1e45, and their product is of order one.
    let steepness = |x: f64| {
        let d = slope / -x.exp_m1();
        if d > STEEPEST { STEEPEST } else { d }
    };
    Pair { log_odds, log_sigmoid, value, d_chosen: steepness(chosen), d_rejected: -steepness(rejected) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RANGE: [f64; 14] =
        [-1e-45, -1e-30, -1e-12, -1e-8, -3e-8, -1e-4, -0.1, -0.69, -0.70, -1.0, -5.0, -80.0, -1e3, -1e4];

    /// Central difference of `f` at `x`, relative step.
    fn slope(f: impl Fn(f64) -> f64, x: f64) -> f64 {
        let h = x.abs() * 1e-5;
        (f(x + h) - f(x - h)) / (2.0 * h)
    }

    #[test]
    fn hand_computed_pair() {
        // p = 1/2 has odds 1, p = 1/3 has odds 1/2: the log odds ratio is ln 2, and
        // sigmoid(ln 2) = 2/3; d value / d chosen = (1/3) / (1/2), d rejected = -(1/3) / (2/3).
        let p = pair(0.5f64.ln(), (1.0f64 / 3.0).ln(), Link::LogSigmoid);
        assert!((p.log_odds - 2f64.ln()).abs() < 1e-15);
        assert!((p.log_sigmoid - (2.0f64 / 3.0).ln()).abs() < 1e-15);
        assert!((p.d_chosen - 2.0 / 3.0).abs() < 1e-15);
        assert!((p.d_rejected + 0.5).abs() < 1e-15);
        let p = pair(0.5f64.ln(), (1.0f64 / 3.0).ln(), Link::Identity);
        assert!((p.value - 2f64.ln()).abs() < 1e-15);
        assert!((p.d_chosen - 2.0).abs() < 1e-15 && (p.d_rejected + 1.5).abs() < 1e-15);
    }

    #[test]
    fn gradient_is_the_slope_of_the_value() {
        for link in [Link::LogSigmoid, Link::Identity] {
            for c in [-1e-4, -0.3, -0.7, -2.5, -40.0] {
                for r in [-1e-4, -0.2, -0.9, -3.5, -60.0] {
                    let p = pair(c, r, link);
                    let dc = slope(|x| pair(x, r, link).value, c);
                    let dr = slope(|x| pair(c, x, link).value, r);
                    let close = |a: f64, b: f64| (a - b).abs() <= 1e-6 * a.abs().max(b.abs()) + 1e-9;
                    assert!(close(p.d_chosen, dc), "{link:?} {c} {r}: {} {dc}", p.d_chosen);
                    assert!(close(p.d_rejected, dr), "{link:?} {c} {r}: {} {dr}", p.d_rejected);
                }
            }
        }
    }

    #[test]
    fn finite_over_the_whole_range() {
        let edges = RANGE.into_iter().chain([0.0, -0.0, 1e-9]);
        for c in edges.clone() {
            for r in edges.clone() {
                for link in [Link::LogSigmoid, Link::Identity] {
                    let p = pair(c, r, link);
                    for x in [p.log_odds, p.log_sigmoid, p.value, p.d_chosen, p.d_rejected] {
                        assert!((x as f32).is_finite(), "{link:?} {c} {r}: {p:?}");
                    }
                    assert!(p.d_chosen >= 0.0 && p.d_rejected <= 0.0);
                }
            }
        }
    }

    #[test]
    fn chosen_slope_survives_certainty() {
        // With p_c -> 1 the slope tends to 1: odds_r / (p_c + odds_r (1 - p_c)) -> odds_r,
        // here odds(-ln 2) = 1.
        for c in [-1e-45, -1e-30, -1e-12] {
            let p = pair(c, -std::f64::consts::LN_2, Link::LogSigmoid);
            assert!((p.d_chosen - 1.0).abs() < 1e-6, "{c}: {p:?}");
        }
    }

    #[test]
    fn log1mexp_against_series() {
        // log(1 - e^x) = log(-x) + x/2 + x^2/24 - ... for small |x|.
        for x in [-1e-3f64, -1e-6, -1e-12, -1e-45] {
            let series = (-x).ln() + x / 2.0 + x * x / 24.0;
            assert!((log1mexp(x) - series).abs() < 1e-13 * series.abs(), "{x}");
        }
        assert!((log1mexp(-50.0) + (-50.0f64).exp()).abs() < 1e-30);
    }

    #[test]
    fn nan_is_not_hidden() {
        assert!(pair(f64::NAN, -1.0, Link::LogSigmoid).value.is_nan());
        assert!(pair(-1.0, f64::NAN, Link::LogSigmoid).d_chosen.is_nan());
    }
}
