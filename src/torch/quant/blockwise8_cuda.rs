//! 8-bit blockwise quantisation on a GPU: the kernels of kernels/blockwise8.cu, with checked arguments.

use tch::{Kind, Tensor};

use crate::base::error::Result;
use crate::cuda::kernels::{BLOCKWISE8, WARP, constant};
use crate::cuda::{Arg, Device, Launch};
use crate::quant::blockwise8::MAP_LEN;
use crate::torch::device::{grid, pointer};
use crate::torch::dtype::named;

const THREADS: i64 = constant(BLOCKWISE8.text, "THREADS");
const _: () = assert!(constant(BLOCKWISE8.text, "MAP_LEN") == MAP_LEN as i64);

/// As [`super::quantize_blockwise`] with the nearest code, of a contiguous tensor.
pub(super) fn quantize(device: Device, x: &Tensor, map: &Tensor, blocksize: i64) -> Result<[Tensor; 2]> {
    let (count, kind) = (x.numel() as i64, x.f_kind()?);
    let blocks = (count as u64).div_ceil(blocksize as u64) as i64;
    let codes = Tensor::f_empty(x.size(), (Kind::Uint8, x.device()))?;
    let absmax = Tensor::f_empty([blocks], (Kind::Float, x.device()))?;
    let kernels = ["blockwise8_quantize_f32", "blockwise8_quantize_bf16", "blockwise8_quantize_f16"];
    let launch = Launch {
        source: &BLOCKWISE8,
        kernel: named(kind, kernels),
        grid: grid(blocks, THREADS / WARP)?,
        block: [THREADS as u32, 1, 1],
        shared: 0,
    };
    let args = [
        pointer(x, kind)?,
        pointer(map, Kind::Float)?,
        pointer(&codes, Kind::Uint8)?,
        pointer(&absmax, Kind::Float)?,
        Arg::i64(count),
        Arg::i64(blocksize),
    ];
    device.launch(&launch, &args)?;
    Ok([codes, absmax])
}

/// As [`super::dequantize_blockwise`], of contiguous tensors.
pub(super) fn dequantize(
    device: Device,
    codes: &Tensor,
    absmax: &Tensor,
    map: &Tensor,
    blocksize: i64,
    kind: Kind,
) -> Result<Tensor> {
    let values = Tensor::f_empty(codes.size(), (kind, codes.device()))?;
    let count = values.numel() as i64;
    let kernels = ["blockwise8_dequantize_f32", "blockwise8_dequantize_bf16", "blockwise8_dequantize_f16"];
    let launch = Launch {
        source: &BLOCKWISE8,
        kernel: named(kind, kernels),
        grid: grid(count, THREADS * (16 / kind.elt_size_in_bytes() as i64))?,
        block: [THREADS as u32, 1, 1],
        shared: 0,
    };
    let args = [
        pointer(codes, Kind::Uint8)?,
        pointer(map, Kind::Float)?,
        pointer(absmax, Kind::Float)?,
        pointer(&values, kind)?,
        Arg::i64(count),
        Arg::i64(blocksize),
    ];
    device.launch(&launch, &args)?;
    Ok(values)
}
