//! A step of `AdamW` on a GPU: a launch of kernels/adamw.cu for each checked parameter.

use tch::{Kind, Tensor};

use super::args::Item;
use crate::base::error::Result;
use crate::cuda::kernels::{ADAMW, WARP, constant};
use crate::cuda::{Arg, Device, Launch};
use crate::optim::adamw;
use crate::torch::device::{grid, pointer};

const THREADS: i64 = constant(ADAMW.text, "THREADS");
/// Elements per warp: those that share a scale.
const BLOCK: i64 = constant(ADAMW.text, "BLOCK");
const _: () = assert!(BLOCK == adamw::BLOCK as i64);

/// Kernels with moments of 8 and of 32 bits.
fn kernels(value: Kind, grad: Kind) -> [&'static str; 2] {
    match (value, grad) {
        (Kind::BFloat16, Kind::BFloat16) => ["adamw8bit_bf16", "adamw_bf16"],
        (Kind::BFloat16, _) => ["adamw8bit_bf16_f32", "adamw_bf16_f32"],
        (Kind::Half, Kind::Half) => ["adamw8bit_f16", "adamw_f16"],
        (Kind::Half, _) => ["adamw8bit_f16_f32", "adamw_f16_f32"],
        _ => ["adamw8bit_f32", "adamw_f32"],
    }
}

/// Launches one update.
pub(super) fn update(device: Device, item: &Item, bad: &Tensor) -> Result<()> {
    let (kind, grad_kind) = (item.value.f_kind()?, item.grad.f_kind()?);
    let [eight, full] = kernels(kind, grad_kind);
    let count = item.value.numel() as i64;
    let [m, v] = &item.moments;
    let mut args = vec![pointer(&item.value, kind)?, pointer(&item.grad, grad_kind)?];
    let kernel = if let Some([m_absmax, v_absmax]) = &item.absmax {
        args.extend([pointer(m, Kind::Uint8)?, pointer(v, Kind::Uint8)?]);
        args.extend([pointer(m_absmax, Kind::Float)?, pointer(v_absmax, Kind::Float)?]);
        eight
    } else {
        args.extend([pointer(m, Kind::Float)?, pointer(v, Kind::Float)?]);
        full
    };
    args.extend([pointer(bad, Kind::Int64)?, Arg::i64(count), Arg::i64(item.first)]);
    let rule = &item.rule;
    args.extend([rule.beta1, rule.beta2, rule.eps, rule.step_size, rule.keep].map(Arg::f32));
    args.push(Arg::i64(rule.seed.map_or(-1, i64::from)));
    let each = BLOCK * (THREADS / WARP);
    let launch =
        Launch { source: &ADAMW, kernel, grid: grid(count, each)?, block: [THREADS as u32, 1, 1], shared: 0 };
    device.launch(&launch, &args)
}
