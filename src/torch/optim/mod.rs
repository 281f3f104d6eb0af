//! A step of `AdamW` on tensors: checks all parameters, then updates them in place.

mod adamw_cuda;
pub mod args;

use tch::{Device, Kind, Tensor};

use super::device::{self, check_devices, device_name, tensor_ops};
use super::dtype::check_kind;
use super::threads::TorchThreads;
use super::view::{slice, slice_in_place};
use crate::base::error::{Error, Result};
use crate::cuda::trust::Family;
use crate::optim::adamw8bit::Codes;
use crate::optim::octave;
use crate::optim::step::{Moments, Parameter, Values, step};
use args::{Item, OP};

fn parameter(item: &mut Item) -> Result<Parameter<'_>> {
    let Item { value, grad, moments: [m, v], absmax, first, rule } = item;
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

/// The family of kernels that update with moments of 8 or of 32 bits.
fn family(eight: bool) -> Family {
    if eight { Family::Adamw8 } else { Family::Adamw32 }
}

/// True if [`adamw_step`] serves values on the device of this one, with moments of 8 or of 32 bits.
///
/// # Errors
/// Those of the trial of a GPU.
pub fn serves(value: &Tensor, eight: bool) -> Result<bool> {
    let on_cpu = value.device() == Device::Cpu && !tensor_ops();
    Ok(on_cpu || device::of(value, &[family(eight)])?.is_some())
}

/// Updates values and moments in place, and adds to `bad`, `(1,)` int64 on their device, how many gradients
/// were not finite.
///
/// # Errors
/// The first invalid argument, before anything is changed.
pub fn adamw_step(mut items: Vec<Item>, bad: &Tensor) -> Result<()> {
    check_kind(OP, "bad", bad.f_kind()?, &[Kind::Int64])?;
    for item in &items {
        item.check()?;
        check_devices(OP, ("value", &item.value), [("bad", Some(bad))])?;
    }
    if bad.numel() != 1 {
        let (expected, got) = ("(1,)".into(), format!("{:?}", bad.size()));
        return Err(Error::Shape { op: OP, argument: "bad", expected, got });
    }
    let _guard = tch::no_grad_guard();
    let Some(first) = items.first() else { return Ok(()) };
    let families: Vec<_> = items.iter().map(|item| family(item.absmax.is_some())).collect();
    if let Some(gpu) = device::of(&first.value, &families)? {
        return adamw_cuda::update(gpu, &items, bad);
    }
    if first.value.device() != Device::Cpu {
        let got = format!("on {}", device_name(first.value.device()));
        let expected = "on cpu, or on a GPU whose kernels are trusted".into();
        return Err(Error::Value { op: OP, argument: "value", expected, got });
    }
    let parameters = items.iter_mut().map(parameter).collect::<Result<Vec<_>>>()?;
    let found = step(&TorchThreads, parameters);
    if found > 0 {
        let _ = bad.f_detach()?.f_add_scalar_(found as i64)?;
    }
    Ok(())
}

/// The values of the 8-bit codes of the first and the second moment.
///
/// # Errors
/// Errors of libtorch.
pub fn maps() -> Result<[Tensor; 2]> {
    Ok([Tensor::f_from_slice(&octave::signed_map())?, Tensor::f_from_slice(&octave::square_map())?])
}
