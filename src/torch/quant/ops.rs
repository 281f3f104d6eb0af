//! NF4 and 8-bit blocks with libtorch's ops, on any device.

use tch::{Kind, Tensor};

use super::args::{Nested, Weight};
use crate::base::error::Result;
use crate::quant::blockwise8::Map;
use crate::quant::codebook::{MIDPOINTS, NF4};

/// As [`crate::quant::nf4::quantize`].
pub(super) fn quantize_nf4(x: &Tensor, blocksize: i64) -> Result<[Tensor; 2]> {
    const LEAST: f64 = 1e-38;
    let flat = x.f_reshape([-1])?.f_to_kind(Kind::Float)?;
    let n = flat.size()[0];
    let whole = n - n % blocksize;
    let blocks = flat.f_narrow(0, 0, whole)?.f_view([whole / blocksize, blocksize])?;
    // amax and clamp_min propagate NaN.
    let mut absmax = blocks.f_abs()?.f_amax([1], false)?;
    let inverse = absmax.f_clamp_min(LEAST)?.f_reciprocal()?;
    let mut scaled = blocks.f_mul(&inverse.f_unsqueeze(1)?)?.f_reshape([-1])?;
    if whole < n {
        let rest = flat.f_narrow(0, whole, n - whole)?;
        let largest = rest.f_abs()?.f_amax([0], true)?.f_clamp_min(LEAST)?;
        scaled = Tensor::f_cat(&[scaled, rest.f_div(&largest)?], 0)?;
        absmax = Tensor::f_cat(&[absmax, largest], 0)?;
    }
    if n % 2 == 1 {
        scaled = scaled.f_constant_pad_nd([0, 1])?;
    }
    let midpoints = Tensor::f_from_slice(&MIDPOINTS)?.f_to_device(x.device())?;
    let codes = scaled.f_bucketize(&midpoints, true, false)?.f_to_kind(Kind::Uint8)?.f_view([-1, 2])?;
    let high = codes.f_select(1, 0)?.f_bitwise_left_shift_tensor_scalar(4)?;
    let packed = high.f_bitwise_or_tensor(&codes.f_select(1, 1)?)?.f_unsqueeze(1)?;
    Ok([packed, absmax])
}

/// As [`crate::quant::nf4::dequantize`].
pub(super) fn dequantize_nf4(weight: &Weight, shape: &[i64], kind: Kind) -> Result<Tensor> {
    let device = weight.packed.device();
    let code = Tensor::f_from_slice(&NF4)?.f_to_device(device)?;
    let bytes = weight.packed.f_reshape([-1])?;
    let pairs = [bytes.f_bitwise_right_shift_tensor_scalar(4)?, bytes.f_bitwise_and(15)?];
    let codes = Tensor::f_stack(&pairs, 1)?.f_reshape([-1])?.f_to_kind(Kind::Int)?;
    let n: i64 = shape.iter().product();
    let values = code.f_index_select(0, &codes.f_narrow(0, 0, n)?)?;
    times_scales(&values, &scales(weight)?, weight.blocksize, kind, shape)
}

/// Flat values times the scale of their block, rounded to `kind`; the last block may be shorter.
fn times_scales(
    values: &Tensor,
    scales: &Tensor,
    blocksize: i64,
    kind: Kind,
    shape: &[i64],
) -> Result<Tensor> {
    let n = values.size()[0];
    let whole = n - n % blocksize;
    let blocks = whole / blocksize;
    let first = values.f_narrow(0, 0, whole)?.f_view([blocks, blocksize])?;
    let mut out = first.f_mul(&scales.f_narrow(0, 0, blocks)?.f_unsqueeze(1)?)?.f_reshape([-1])?;
    if whole < n {
        let rest = values.f_narrow(0, whole, n - whole)?.f_mul(&scales.f_narrow(0, blocks, 1)?)?;
        out = Tensor::f_cat(&[out, rest], 0)?;
    }
    Ok(out.f_to_kind(kind)?.f_reshape(shape)?)
}

/// The scales in `f32`, one per block.
pub(super) fn scales(weight: &Weight) -> Result<Tensor> {
    let absmax = weight.absmax.f_reshape([-1])?;
    let Some(Nested { absmax: nested, map, offset, blocksize }) = &weight.nested else {
        return Ok(absmax);
    };
    let codes = absmax.f_to_kind(Kind::Int)?;
    let spread = nested.f_repeat_interleave_self_int(*blocksize, 0, None)?;
    let spread = spread.f_narrow(0, 0, codes.size()[0])?;
    Ok(map.f_index_select(0, &codes)?.f_mul(&spread)?.f_add(&offset.f_reshape([1])?)?)
}

/// As [`crate::quant::blockwise8::quantize`].
pub(super) fn quantize_blockwise(x: &Tensor, map: &Map, blocksize: i64) -> Result<[Tensor; 2]> {
    const LEAST: f64 = f32::from_bits(1) as f64;
    let flat = x.f_reshape([-1])?.f_to_kind(Kind::Float)?;
    let n = flat.size()[0];
    let whole = n - n % blocksize;
    let one = |value: f64| Tensor::f_full([1], value, (Kind::Float, x.device()));
    // The inverse of a subnormal overflows, so the values are divided.
    let divisor = |absmax: &Tensor| one(1.0)?.f_where_self(&absmax.f_lt(LEAST)?, absmax);
    let blocks = flat.f_narrow(0, 0, whole)?.f_view([whole / blocksize, blocksize])?;
    // amax propagates NaN.
    let mut absmax = blocks.f_abs()?.f_amax([1], false)?;
    let mut scaled = blocks.f_div(&divisor(&absmax)?.f_unsqueeze(1)?)?.f_reshape([-1])?;
    if whole < n {
        let rest = flat.f_narrow(0, whole, n - whole)?;
        let largest = rest.f_abs()?.f_amax([0], true)?;
        scaled = Tensor::f_cat(&[scaled, rest.f_div(&divisor(&largest)?)?], 0)?;
        absmax = Tensor::f_cat(&[absmax, largest], 0)?;
    }
    let bounds = Tensor::f_from_slice(&map.bounds())?.f_to_device(x.device())?;
    // NaN has the lowest code on the CPU.
    let known = scaled.f_where_self(&scaled.f_ge(-1.0)?, &one(-1.0)?)?;
    let codes = known.f_bucketize(&bounds, true, false)?.f_to_kind(Kind::Uint8)?;
    Ok([codes.f_reshape(x.size())?, absmax])
}

/// As [`crate::quant::blockwise8::dequantize`].
pub(super) fn dequantize_blockwise(
    codes: &Tensor,
    map: &Tensor,
    absmax: &Tensor,
    blocksize: i64,
    kind: Kind,
) -> Result<Tensor> {
    let values = map.f_index_select(0, &codes.f_reshape([-1])?.f_to_kind(Kind::Int)?)?;
    times_scales(&values, &absmax.f_reshape([-1])?, blocksize, kind, &codes.size())
}
