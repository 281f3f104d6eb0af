//! NF4 on a GPU: the kernels of kernels/nf4.cu, with checked arguments.

use tch::{Kind, Tensor};

use super::args::{Size, Weight};
use super::ops;
use crate::base::error::Result;
use crate::cuda::kernels::{NF4, WARP, constant};
use crate::cuda::{Arg, Device, Launch};
use crate::torch::device::{grid, pointer};
use crate::torch::dtype::named;

const QUANTIZE_THREADS: i64 = constant(NF4.text, "QUANTIZE_THREADS");
const DEQUANTIZE_THREADS: i64 = constant(NF4.text, "DEQUANTIZE_THREADS");
const DEQUANTIZE_STEPS: i64 = constant(NF4.text, "DEQUANTIZE_STEPS");
const MULTIPLY_THREADS: i64 = constant(NF4.text, "MULTIPLY_THREADS");
const MULTIPLY_ROWS: i64 = constant(NF4.text, "ROWS");
const CODES: i64 = constant(NF4.text, "CODES");

/// Most tokens that are multiplied directly with the codes. A product by the library also writes and reads
/// the full weight, eight times the bytes of the codes, for any number of tokens.
const FEW: i64 = 8;

/// As [`super::quantize_nf4`], of a contiguous tensor.
pub(super) fn quantize(device: Device, x: &Tensor, blocksize: i64) -> Result<[Tensor; 2]> {
    let (count, kind) = (x.numel() as i64, x.f_kind()?);
    let blocks = (count as u64).div_ceil(blocksize as u64) as i64;
    let packed = Tensor::f_empty([(count + 1) / 2, 1], (Kind::Uint8, x.device()))?;
    let absmax = Tensor::f_empty([blocks], (Kind::Float, x.device()))?;
    let launch = Launch {
        source: &NF4,
        kernel: named(kind, ["nf4_quantize_f32", "nf4_quantize_bf16", "nf4_quantize_f16"]),
        grid: grid(blocks, QUANTIZE_THREADS / WARP)?,
        block: [QUANTIZE_THREADS as u32, 1, 1],
        shared: 0,
    };
    let args = [
        pointer(x, kind)?,
        pointer(&packed, Kind::Uint8)?,
        pointer(&absmax, Kind::Float)?,
        Arg::i64(count),
        Arg::i32(blocksize as i32),
    ];
    device.launch(&launch, &args)?;
    Ok([packed, absmax])
}

/// Codes and scales as arguments of every kernel, and `log2` of the block size, the last argument.
struct Arguments {
    parts: [Arg; 6],
    block_shift: Arg,
    /// Owns the scales behind the pointers, if they had to be computed.
    _scales: Option<Tensor>,
}

fn shift(size: i64) -> Arg {
    Arg::i32(size.trailing_zeros() as i32)
}

fn arguments(weight: &Weight) -> Result<Arguments> {
    let packed = pointer(&weight.packed, Kind::Uint8)?;
    let block_shift = shift(weight.blocksize);
    let plain = |scales: Option<Tensor>, absmax: Arg| {
        let none = Arg::ptr(0);
        Arguments { parts: [packed, absmax, none, none, none, Arg::i32(0)], block_shift, _scales: scales }
    };
    let Some(nested) = &weight.nested else {
        return Ok(plain(None, pointer(&weight.absmax, Kind::Float)?));
    };
    if !(nested.blocksize as u64).is_power_of_two() {
        // No library writes such states; a division in the kernels would slow down all others.
        let scales = ops::scales(weight)?;
        let absmax = pointer(&scales, Kind::Float)?;
        return Ok(plain(Some(scales), absmax));
    }
    let parts = [
        packed,
        pointer(&weight.absmax, Kind::Uint8)?,
        pointer(&nested.map, Kind::Float)?,
        pointer(&nested.absmax, Kind::Float)?,
        pointer(&nested.offset, Kind::Float)?,
        shift(nested.blocksize),
    ];
    Ok(Arguments { parts, block_shift, _scales: None })
}

/// As [`super::dequantize_nf4`], in memory of torch's allocator.
pub(super) fn dequantize(device: Device, weight: &Weight, shape: &[i64], kind: Kind) -> Result<Tensor> {
    let arguments = arguments(weight)?;
    let values = Tensor::f_empty(shape, (kind, weight.packed.device()))?;
    let count = values.numel() as i64;
    let group = 16 / kind.elt_size_in_bytes() as i64;
    let launch = Launch {
        source: &NF4,
        kernel: named(kind, ["nf4_dequantize_f32", "nf4_dequantize_bf16", "nf4_dequantize_f16"]),
        grid: grid(count, DEQUANTIZE_THREADS * DEQUANTIZE_STEPS * group)?,
        block: [DEQUANTIZE_THREADS as u32, 1, 1],
        shared: 0,
    };
    let rest = [pointer(&values, kind)?, Arg::i64(count), arguments.block_shift];
    device.launch(&launch, &[&arguments.parts[..], &rest].concat())?;
    Ok(values)
}

/// Writes `x weight^T + bias` of `(tokens, columns)` to `out`, directly from the codes, for at most [`FEW`]
/// tokens; `false` for more, or if rows are not full words of codes.
pub(super) fn few_tokens(
    device: Device,
    weight: &Weight,
    size: Size,
    x: &Tensor,
    bias: Option<&Tensor>,
    out: &Tensor,
) -> Result<bool> {
    let (tokens, kind) = (x.size()[0], x.f_kind()?);
    let (Ok(rows), Ok(columns)) = (i32::try_from(size.rows), i32::try_from(size.columns)) else {
        return Ok(false);
    };
    if !(1..=FEW).contains(&tokens) || columns % CODES as i32 != 0 {
        return Ok(false);
    }
    let x = x.f_contiguous()?;
    let aligned = |tensor: &Tensor, bytes: usize| (tensor.data_ptr() as usize).is_multiple_of(bytes);
    if !aligned(&x, 16) || !aligned(&weight.packed, 4) {
        return Ok(false);
    }
    let kernels = match tokens {
        1 => ["nf4_multiply1_f32", "nf4_multiply1_bf16", "nf4_multiply1_f16"],
        2..=4 => ["nf4_multiply4_f32", "nf4_multiply4_bf16", "nf4_multiply4_f16"],
        _ => ["nf4_multiply8_f32", "nf4_multiply8_bf16", "nf4_multiply8_f16"],
    };
    let arguments = arguments(weight)?;
    let bias = bias.map(|bias| bias.f_to_kind(kind)?.f_contiguous()).transpose()?;
    let launch = Launch {
        source: &NF4,
        kernel: named(kind, kernels),
        grid: grid(size.rows, MULTIPLY_THREADS / WARP * MULTIPLY_ROWS)?,
        block: [MULTIPLY_THREADS as u32, 1, 1],
        shared: 0,
    };
    let rest = [
        bias.as_ref().map_or_else(|| Ok(Arg::ptr(0)), |bias| pointer(bias, kind))?,
        pointer(out, kind)?,
        Arg::i32(tokens as i32),
        Arg::i32(rows),
        Arg::i32(columns),
        arguments.block_shift,
    ];
    device.launch(&launch, &[&[pointer(&x, kind)?], &arguments.parts[..], &rest].concat())?;
    Ok(true)
}
