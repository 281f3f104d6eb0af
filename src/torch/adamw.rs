//! A step of `AdamW` on tensors: checks all parameters, then updates them in place.

use tch::{Device, Kind, Tensor};

use super::quant::{FLOATS, check_kind};
use super::team::Torch;
use super::view::{slice, slice_in_place};
use super::{adamw_cuda, cuda};
use crate::error::{Error, Result};
use crate::optim::adamw::{BLOCK, LEAST_EPS, Rule};
use crate::optim::adamw8bit::Codes;
use crate::optim::octave;
use crate::optim::step::{Moments, Parameter, Values, step};

const OP: &str = "adamw_step";

/// A parameter and its state as they came from Python.
#[derive(Debug)]
pub struct Item {
    /// Values, changed in place.
    pub value: Tensor,
    /// Their gradients, of the same dtype or `f32`.
    pub grad: Tensor,
    /// First and second moments: `f32`, or `uint8` codes.
    pub moments: [Tensor; 2],
    /// Scales of the codes, `f32`, one a block of 256.
    pub absmax: Option<[Tensor; 2]>,
    /// Place of the first element, for stochastic rounding of a part of a parameter.
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
    fn check(&self) -> Result<()> {
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
            if tensor.device() != self.value.device() {
                let (expected, got) =
                    (format!("{:?}", self.value.device()), format!("{:?}", tensor.device()));
                return Err(Error::Value { op: OP, argument, expected, got });
            }
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

    fn parameter(&mut self) -> Result<Parameter<'_>> {
        let Item { value, grad, moments: [m, v], absmax, first, rule } = self;
        let moments = match absmax {
            None => Moments::Full(slice_in_place(m)?, slice_in_place(v)?),
            Some([m_absmax, v_absmax]) => Moments::Eight(Codes {
                m: slice_in_place(m)?,
                m_absmax: slice_in_place(m_absmax)?,
                v: slice_in_place(v)?,
                v_absmax: slice_in_place(v_absmax)?,
            }),
        };
        let values = match (value.f_kind()?, grad.f_kind()?) {
            (Kind::BFloat16, Kind::BFloat16) => Values::Bf16(slice_in_place(value)?, slice(grad)?),
            (Kind::BFloat16, _) => Values::Bf16WithF32(slice_in_place(value)?, slice(grad)?),
            (Kind::Half, Kind::Half) => Values::F16(slice_in_place(value)?, slice(grad)?),
            (Kind::Half, _) => Values::F16WithF32(slice_in_place(value)?, slice(grad)?),
            _ => Values::F32(slice_in_place(value)?, slice(grad)?),
        };
        Ok(Parameter { values, moments, rule: *rule, first: *first as u64 })
    }
}

/// Updates values and moments in place, and adds to `bad`, `(1,)` int64 on their device, how many
/// elements had a gradient that is not finite.
///
/// # Errors
/// The first argument that does not fit, before anything has changed.
pub fn adamw_step(mut items: Vec<Item>, bad: &Tensor) -> Result<()> {
    check_kind(OP, "bad", bad.f_kind()?, &[Kind::Int64])?;
    for item in &items {
        item.check()?;
    }
    let _guard = tch::no_grad_guard();
    let Some(first) = items.first() else { return Ok(()) };
    if let Some(card) = cuda::device(&first.value)? {
        let others: Vec<_> = items.iter().map(|item| ("value", &item.value)).collect();
        cuda::check_devices(OP, bad, &others)?;
        return items.iter().try_for_each(|item| adamw_cuda::update(card, item, bad));
    }
    if first.value.device() != Device::Cpu {
        let got = format!("{:?}", first.value.device());
        return Err(Error::Value { op: OP, argument: "device", expected: "the CPU or CUDA".into(), got });
    }
    let parameters = items.iter_mut().map(Item::parameter).collect::<Result<Vec<_>>>()?;
    let found = step(&Torch, parameters);
    if found > 0 {
        let _ = bad.f_detach()?.f_add_scalar_(found as i64)?;
    }
    Ok(())
}

/// The values that 8-bit moments stand for: the first, and the second.
///
/// # Errors
/// What libtorch reports.
pub fn maps() -> Result<[Tensor; 2]> {
    Ok([Tensor::f_from_slice(&octave::signed_map())?, Tensor::f_from_slice(&octave::square_map())?])
}
