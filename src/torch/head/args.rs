//! Arguments and results of the head's ops, which all backends share.

use tch::{Device, Kind, Tensor};

use crate::base::error::{Error, Result};
use crate::head::odds_ratio::NllScope;
use crate::head::scores::{Objective, Outcome};
use crate::torch::device::{check_devices, on_host};
use crate::torch::dtype::{check_kind, dtype_name};
use crate::torch::view::slice;

/// The label of rows without a target.
pub const IGNORE: i64 = -100;

/// The arguments that every op of the head shares.
#[derive(Debug)]
pub struct Args<'a> {
    /// Name of the op, for messages.
    pub op: &'static str,
    /// `(N, D)`.
    pub hidden: &'a Tensor,
    /// `(V, D)`, same dtype.
    pub weight: &'a Tensor,
    /// `(V,)`, same dtype.
    pub bias: Option<&'a Tensor>,
    /// `(N,)` int64: tokens, or [`IGNORE`].
    pub targets: &'a Tensor,
    /// Bound on the logits.
    pub softcap: Option<f64>,
    /// Factor on the raw products.
    pub logit_scale: f64,
}

/// Which gradients to compute.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wants {
    /// Of the hidden states.
    pub hidden: bool,
    /// Of the weight.
    pub weight: bool,
    /// Of the bias.
    pub bias: bool,
}

impl Args<'_> {
    fn shape(&self, argument: &'static str, tensor: &Tensor, expected: &str, fits: bool) -> Result<()> {
        if fits {
            return Ok(());
        }
        Err(Error::Shape {
            op: self.op,
            argument,
            expected: expected.into(),
            got: format!("{:?}", tensor.size()),
        })
    }

    fn like_hidden(&self, argument: &'static str, tensor: &Tensor, kind: Option<Kind>) -> Result<()> {
        let expected = kind.map_or_else(|| self.hidden.f_kind(), Ok)?;
        if tensor.f_kind()? != expected {
            let expected = match kind {
                Some(kind) => dtype_name(kind).to_owned(),
                None => format!("the dtype of hidden, {}", dtype_name(expected)),
            };
            return Err(Error::Dtype {
                op: self.op,
                argument,
                expected,
                got: dtype_name(tensor.f_kind()?).into(),
            });
        }
        Ok(())
    }

    /// Checks devices, shapes, dtypes and values, before anything is allocated.
    ///
    /// # Errors
    /// The first invalid argument, by name.
    pub fn check(&self) -> Result<()> {
        let others = [("weight", Some(self.weight)), ("targets", Some(self.targets)), ("bias", self.bias)];
        check_devices(self.op, ("hidden", self.hidden), others)?;
        let kind = self.hidden.f_kind()?;
        if !matches!(kind, Kind::Float | Kind::Double | Kind::BFloat16 | Kind::Half) {
            let expected = "float32, bfloat16, float16 or float64".into();
            return Err(Error::Dtype {
                op: self.op,
                argument: "hidden",
                expected,
                got: dtype_name(kind).into(),
            });
        }
        self.shape("hidden", self.hidden, "(rows, hidden size)", self.hidden.dim() == 2)?;
        let (rows, width) = self.hidden.size2()?;
        let columns = format!("(vocabulary, {width}), with the columns of hidden");
        let fits = self.weight.dim() == 2 && self.weight.size()[1] == width && self.weight.size()[0] > 0;
        self.shape("weight", self.weight, &columns, fits && width > 0)?;
        self.like_hidden("weight", self.weight, None)?;
        let vocab = self.weight.size()[0];
        if let Some(bias) = self.bias {
            self.shape("bias", bias, &format!("({vocab},)"), bias.size() == [vocab])?;
            self.like_hidden("bias", bias, None)?;
        }
        self.row_argument("targets", self.targets, rows, Kind::Int64)?;
        self.range(
            "targets",
            self.targets,
            vocab,
            &format!("tokens in 0..{vocab}, or {IGNORE} for none"),
            true,
        )?;
        // A number that is 0 or infinite in the dtype of the computation makes every logit NaN.
        let softcap = self.softcap.unwrap_or(1.0);
        // Its reciprocal is used too, which is infinite for a subnormal number.
        let computed = self.computed(softcap)?;
        if !(computed.is_finite() && computed >= f64::from(f32::MIN_POSITIVE)) {
            let expected = "a positive finite number, and a normal one in float32";
            return Err(self.value("softcap", expected, softcap.to_string()));
        }
        let scale = self.logit_scale;
        let computed = self.computed(scale)?;
        if !computed.is_finite() || (scale != 0.0 && computed == 0.0) {
            let expected = "a finite number, and neither infinite nor 0 in the dtype of the computation";
            return Err(self.value("logit_scale", expected, scale.to_string()));
        }
        Ok(())
    }

    /// Checks an argument with one entry per row.
    fn row_argument(&self, argument: &'static str, tensor: &Tensor, rows: i64, kind: Kind) -> Result<()> {
        self.shape(
            argument,
            tensor,
            &format!("({rows},), one value per row of hidden"),
            tensor.size() == [rows],
        )?;
        self.like_hidden(argument, tensor, Some(kind))
    }

    /// Checks that values are in `0..end`, only on the CPU: elsewhere the host would wait for the device.
    fn range(
        &self,
        argument: &'static str,
        tensor: &Tensor,
        end: i64,
        expected: &str,
        ignore: bool,
    ) -> Result<()> {
        if !on_host(tensor) {
            return Ok(());
        }
        let values = tensor.f_contiguous()?;
        let right = |x: i64| (0..end).contains(&x) || (ignore && x == IGNORE);
        match slice::<i64>(&values)?.iter().find(|&&x| !right(x)) {
            Some(wrong) => Err(self.value(argument, expected, wrong.to_string())),
            None => Ok(()),
        }
    }

    /// Checks the additional arguments of a backward pass, which have one number per row.
    ///
    /// # Errors
    /// The first invalid argument, by name.
    pub fn check_backward(&self, lse: &Tensor, upstream: &Tensor) -> Result<()> {
        let rows = self.hidden.size()[0];
        for (argument, tensor) in [("lse", lse), ("upstream", upstream)] {
            check_devices(self.op, ("hidden", self.hidden), [(argument, Some(tensor))])?;
            check_kind(self.op, argument, tensor.f_kind()?, &[Kind::Float, Kind::Double])?;
            let expected = format!("({rows},), one value per row of hidden");
            self.shape(argument, tensor, &expected, tensor.size() == [rows])?;
        }
        Ok(())
    }

    fn at_least_zero(&self, argument: &'static str, value: f64) -> Result<()> {
        if self.computed(value)?.is_finite() && value >= 0.0 {
            return Ok(());
        }
        Err(self.value(argument, "at least 0, and finite in the dtype of the computation", value.to_string()))
    }

    /// A number as the computation has it: `float64` for `float64`, else `float32`.
    fn computed(&self, value: f64) -> Result<f64> {
        Ok(if self.hidden.f_kind()? == Kind::Double { value } else { f64::from(value as f32) })
    }

    fn value(&self, argument: &'static str, expected: &str, got: String) -> Error {
        Error::Value { op: self.op, argument, expected: expected.into(), got }
    }
}

/// The sequence and role of each row of the batch.
#[derive(Debug)]
pub struct Pairs<'a> {
    /// `(N,)` int64 in `0..2 * count`.
    pub sequence: &'a Tensor,
    /// `(N,)` bool.
    pub completion: &'a Tensor,
    /// Number of pairs; none: read from `sequence`.
    pub count: Option<i64>,
    /// Number of rows in the loss; none: counted.
    pub scored: Option<i64>,
}

impl Pairs<'_> {
    /// Checks the batch against the rows and returns the number of pairs.
    ///
    /// # Errors
    /// The first invalid argument, by name.
    pub fn check(&self, args: &Args<'_>, objective: Objective) -> Result<i64> {
        let rows = args.hidden.size()[0];
        let others = [("sequence", Some(self.sequence)), ("completion", Some(self.completion))];
        check_devices(args.op, ("hidden", args.hidden), others)?;
        args.row_argument("sequence", self.sequence, rows, Kind::Int64)?;
        args.row_argument("completion", self.completion, rows, Kind::Bool)?;
        args.at_least_zero("beta", objective.beta)?;
        // Results are allocated by it: a pair without rows is for batches without any.
        let most = rows.max(1);
        let pairs = match self.count {
            Some(count) if (1..=most).contains(&count) => count,
            Some(count) => {
                let expected = format!("in 1..={most}, at most the rows of hidden");
                return Err(args.value("num_pairs", &expected, count.to_string()));
            }
            None if rows == 0 => 0,
            None => match self.sequence.f_max()?.f_int64_value(&[])? {
                last if last < 2 * most => last / 2 + 1,
                last => {
                    let expected = format!("sequences in 0..{}, two for each row of hidden", 2 * most);
                    return Err(args.value("sequence", &expected, last.to_string()));
                }
            },
        };
        args.range("sequence", self.sequence, 2 * pairs, &format!("sequences in 0..{}", 2 * pairs), false)?;
        self.check_scored(args, pairs, objective.scope)?;
        Ok(pairs)
    }

    /// On the CPU only, as [`Args::range`]; elsewhere the loss is NaN if the number is wrong.
    fn check_scored(&self, args: &Args<'_>, pairs: i64, scope: NllScope) -> Result<()> {
        let Some(scored) = self.scored else { return Ok(()) };
        let rows = args.hidden.size()[0];
        if !(0..=rows).contains(&scored) {
            return Err(args.value("num_scored", &format!("in 0..={rows}"), scored.to_string()));
        }
        if !on_host(self.sequence) {
            return Ok(());
        }
        let in_loss = self.sequence.f_lt(pairs)?.f_logical_and_(&Tensor::from(scope == NllScope::Full))?;
        let found = in_loss.f_logical_or(self.completion)?.f_logical_and(&args.targets.f_ge(0)?)?;
        let found = found.f_sum(Kind::Int64)?.f_int64_value(&[])?;
        if found == scored {
            return Ok(());
        }
        Err(args.value("num_scored", &format!("{found}, the rows in the loss"), scored.to_string()))
    }
}

/// What [`super::orpo`] returns, as tensors.
#[derive(Debug)]
pub struct Report {
    /// `nll - beta * mean(link(log_odds))`, `()`.
    pub loss: Tensor,
    /// Token mean of the negative log-likelihood, `()`.
    pub nll: Tensor,
    /// Mean completion log-probabilities of the chosen sequences, `(B,)`.
    pub chosen: Tensor,
    /// Of the rejected ones, `(B,)`.
    pub rejected: Tensor,
    /// `(B,)`.
    pub log_odds: Tensor,
    /// Its log-sigmoid, `(B,)`.
    pub log_sigmoid: Tensor,
    /// Mean logit of the chosen side, `()`.
    pub chosen_logits: Tensor,
    /// Of the rejected side, `()`.
    pub rejected_logits: Tensor,
    /// Pairs with an empty side, `()` int64.
    pub empty: Tensor,
    /// Of hidden, weight and bias, empty if not needed.
    pub gradients: [Tensor; 3],
}

impl Report {
    /// From its parts before the gradients, in their order.
    #[must_use]
    pub fn new(parts: [Tensor; 9], gradients: [Tensor; 3]) -> Self {
        let [loss, nll, chosen, rejected, log_odds, log_sigmoid, chosen_logits, rejected_logits, empty] =
            parts;
        Self {
            loss,
            nll,
            chosen,
            rejected,
            log_odds,
            log_sigmoid,
            chosen_logits,
            rejected_logits,
            empty,
            gradients,
        }
    }
}

/// The outcome as tensors.
///
/// # Errors
/// Errors of libtorch.
pub fn report(outcome: &Outcome, kind: Kind, device: Device, grads: [Tensor; 3]) -> Result<Report> {
    let many = |values: &[f64]| -> Result<Tensor> {
        Ok(Tensor::f_from_slice(values)?.f_to_kind(kind)?.f_to_device(device)?)
    };
    let one = |value: f64| -> Result<Tensor> { Ok(many(&[value])?.f_squeeze()?) };
    let log_odds: Vec<f64> = outcome.pairs.iter().map(|pair| pair.log_odds).collect();
    let log_sigmoid: Vec<f64> = outcome.pairs.iter().map(|pair| pair.log_sigmoid).collect();
    let empty = Tensor::f_from_slice(&[outcome.empty as i64])?.f_squeeze()?.f_to_device(device)?;
    Ok(Report {
        loss: one(outcome.loss)?,
        nll: one(outcome.nll)?,
        chosen: many(&outcome.chosen)?,
        rejected: many(&outcome.rejected)?,
        log_odds: many(&log_odds)?,
        log_sigmoid: many(&log_sigmoid)?,
        chosen_logits: one(outcome.mean_logits[0])?,
        rejected_logits: one(outcome.mean_logits[1])?,
        empty,
        gradients: grads,
    })
}
