//! Arguments of a step, which all backends share.

use tch::{Kind, Tensor};

use crate::base::error::{Error, Result};
use crate::optim::adamw::{BLOCK, LEAST_EPS, Rule};
use crate::torch::device::check_devices;
use crate::torch::dtype::{FLOATS, check_kind};

/// The op, for messages.
pub(super) const OP: &str = "adamw_step";

/// A parameter and its state from Python.
#[derive(Debug)]
pub struct Item {
    /// Values, changed in place.
    pub value: Tensor,
    /// Their gradients, of the same dtype or `f32`.
    pub grad: Tensor,
    /// First and second moments: `f32`, or `uint8` codes.
    pub moments: [Tensor; 2],
    /// Scales of the codes, `f32`, one per block of 256.
    pub absmax: Option<[Tensor; 2]>,
    /// Index of the first element, for stochastic rounding of a part of a parameter.
    pub first: i64,
    /// The rule of the parameter's group at its step.
    pub rule: Rule,
}

/// The rule of a step, from numbers in `f64`.
///
/// # Errors
/// A number that is not finite.
pub fn rule([beta1, beta2, eps, step_size, keep]: [f64; 5], seed: Option<u32>) -> Result<Rule> {
    if ![beta1, beta2, eps, step_size, keep].iter().all(|x| x.is_finite()) {
        let got = format!("{:?}", [beta1, beta2, eps, step_size, keep]);
        return Err(Error::Value { op: OP, argument: "rule", expected: "finite numbers".into(), got });
    }
    Ok(Rule {
        beta1: beta1 as f32,
        beta2: beta2 as f32,
        eps: (eps as f32).max(LEAST_EPS),
        step_size: step_size as f32,
        keep: keep as f32,
        seed,
    })
}

impl Item {
    /// Checks dtypes, sizes, devices and strides.
    ///
    /// # Errors
    /// The first invalid argument, by name.
    pub fn check(&self) -> Result<()> {
        let kind = self.value.f_kind()?;
        check_kind(OP, "value", kind, &FLOATS)?;
        check_kind(OP, "grad", self.grad.f_kind()?, &[kind, Kind::Float])?;
        let count = self.value.numel();
        let moments = if self.absmax.is_some() { Kind::Uint8 } else { Kind::Float };
        let blocks = count.div_ceil(BLOCK);
        let lengths = [("grad", &self.grad, count, None)]
            .into_iter()
            .chain([("state1", &self.moments[0], count, Some(moments))])
            .chain([("state2", &self.moments[1], count, Some(moments))])
            .chain(self.absmax.iter().flat_map(|[first, second]| {
                let kind = Some(Kind::Float);
                [("absmax1", first, blocks, kind), ("absmax2", second, blocks, kind)]
            }));
        for (argument, tensor, length, kind) in lengths {
            if let Some(kind) = kind {
                check_kind(OP, argument, tensor.f_kind()?, &[kind])?;
            }
            if tensor.numel() != length {
                let expected = format!("{length} elements, for a value of {count}");
                let got = format!("{:?}", tensor.size());
                return Err(Error::Shape { op: OP, argument, expected, got });
            }
            check_devices(OP, ("value", &self.value), [(argument, Some(tensor))])?;
            if !tensor.is_contiguous() {
                let got = "strided".to_owned();
                return Err(Error::Value { op: OP, argument, expected: "contiguous".into(), got });
            }
        }
        if !self.value.is_contiguous() {
            let (argument, expected) = ("value", "contiguous".into());
            return Err(Error::Value { op: OP, argument, expected, got: "strided".into() });
        }
        Ok(())
    }
}
