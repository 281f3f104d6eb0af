//! The linear layer with a 4-bit weight: product and input gradient, without a full copy of the weight.
//!
//! On the CPU a tile of the weight is dequantised, multiplied by libtorch and discarded. Products run in
//! `f32` for all dtypes of the tokens, because libtorch's half-precision products are a hundred times slower
//! on processors without instructions for them; on a processor with `bf16` instructions, they run in `bf16`.
//! In both cases a weight is rounded to the dtype of the tokens before it is multiplied, and every result is
//! the sum over a full row or column, rounded once. A few tokens are multiplied directly with the codes,
//! always in `f32`.
//!
//! On other devices the full weight is dequantised, into memory that torch's allocator reuses for the next
//! layer, and multiplied by libtorch in the dtype of the tokens; NVIDIA GPUs also multiply a few tokens
//! directly with the codes.

use std::sync::OnceLock;

use half::bf16;
use tch::{Device, Kind, Tensor};

use super::args::{Size, Weight};
use super::{dequantize_nf4, nf4_cuda};
use crate::base::error::{Error, Result};
use crate::base::float::{Dtype, Float};
use crate::cuda::trust::Family;
use crate::quant::nf4::{Tile, dequantize_tile};
use crate::quant::packed::Packed;
use crate::quant::product::{few_tokens, worth_it};
use crate::torch::device::{self, check_devices, tensor_ops};
use crate::torch::dtype::{FLOATS, check_kind, dtype};
use crate::torch::large;
use crate::torch::threads::TorchThreads;
use crate::torch::view::{Element, slice, slice_mut};

/// Smallest and largest size of a tile in bytes. The library repacks all tokens for every tile.
const TILE: [i64; 2] = [16 << 20, 32 << 20];

/// Up to this many tokens, products directly with the codes are faster than `bf16` instructions.
const FEW_WITH_UNITS: usize = 12;

/// Tokens that are converted at a time if a product runs in another dtype.
const ROWS: i64 = 2048;

/// True if the processor has `bf16` instructions, and the environment does not disable them in oneDNN, which
/// libtorch uses.
fn has_bf16_units() -> bool {
    static UNITS: OnceLock<bool> = OnceLock::new();
    *UNITS.get_or_init(|| {
        let without = ["SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"];
        let limit = std::env::var("ONEDNN_MAX_CPU_ISA").or_else(|_| std::env::var("DNNL_MAX_CPU_ISA"));
        let limited = limit.is_ok_and(|limit| without.contains(&limit.to_ascii_uppercase().as_str()));
        #[cfg(target_arch = "x86_64")]
        let there = is_x86_feature_detected!("avx512bf16");
        #[cfg(not(target_arch = "x86_64"))]
        let there = false;
        there && !limited
    })
}

/// The dtype that products run in.
fn product_kind(tokens: Kind) -> Kind {
    if tokens == Kind::BFloat16 && has_bf16_units() { Kind::BFloat16 } else { Kind::Float }
}

fn check_tokens(op: &'static str, argument: &'static str, tokens: &Tensor, width: i64) -> Result<i64> {
    check_kind(op, argument, tokens.f_kind()?, &FLOATS)?;
    let shape = tokens.size();
    if shape.last() != Some(&width) || width == 0 {
        let expected = format!("(.., {width}), with the columns of the weight");
        return Err(Error::Shape { op, argument, expected, got: format!("{shape:?}") });
    }
    Ok(tokens.numel() as i64 / width)
}

fn with_width(tokens: &Tensor, width: i64) -> Vec<i64> {
    let mut shape = tokens.size();
    if let Some(last) = shape.last_mut() {
        *last = width;
    }
    shape
}

/// `x weight^T + bias`, in the dtype of `x`.
///
/// # Errors
/// Invalid arguments, and errors of libtorch.
pub fn forward(weight: Weight, size: Size, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let op = weight.op;
    check_devices(op, ("x", x), [("packed", Some(&weight.packed)), ("bias", bias)])?;
    let tokens = check_tokens(op, "x", x, size.columns)?;
    if let Some(bias) = bias {
        check_kind(op, "bias", bias.f_kind()?, &FLOATS)?;
        if bias.size() != [size.rows] {
            let (expected, got) = (format!("({},)", size.rows), format!("{:?}", bias.size()));
            return Err(Error::Shape { op, argument: "bias", expected, got });
        }
    }
    let _guard = tch::no_grad_guard();
    let kind = x.f_kind()?;
    // Results are allocated in their final shape: autograd forbids in-place changes of a view that an
    // autograd function returns, and some adapters add in place.
    let shape = with_width(x, size.rows);
    if x.device() != Device::Cpu || tensor_ops() {
        let weight = weight.checked(size.count(op)?)?;
        let flat = x.f_reshape([tokens, size.columns])?;
        let out = Tensor::f_empty(&shape[..], (kind, x.device()))?;
        let rows = out.f_view([tokens, size.rows])?;
        if let Some(gpu) = device::of(x, &[Family::Nf4Product])?
            && nf4_cuda::few_tokens(gpu, &weight, size, &flat, bias, &rows)?
        {
            return Ok(out);
        }
        let weight = dequantize_nf4(weight, &[size.rows, size.columns], kind)?.f_tr()?;
        let _ = match bias {
            Some(bias) => bias.f_to_kind(kind)?.f_addmm_out(&rows, &flat, &weight)?,
            None => flat.f_mm_out(&rows, &weight)?,
        };
        return Ok(out);
    }
    let weight = weight.checked(size.count(op)?)?;
    let view = weight.view([dtype(kind), Dtype::F32])?;
    let x = x.f_contiguous()?.f_view([tokens, size.columns])?;
    let most = if product_kind(kind) == Kind::BFloat16 { FEW_WITH_UNITS } else { worth_it() };
    if tokens > 0 && size.rows > 0 && tokens as usize <= most {
        return Ok(few(&view, size, &x, bias, &shape)?.f_to_kind(kind)?);
    }
    let out = large::empty(&shape, kind)?;
    if tokens > 0 && size.rows > 0 {
        let rows = out.f_view([tokens, size.rows])?;
        match product_kind(kind) {
            Kind::BFloat16 => tiles::<bf16>(&view, size, &x, bias, &rows)?,
            _ => tiles::<f32>(&view, size, &x, bias, &rows)?,
        }
    }
    Ok(out)
}

fn few(weight: &Packed<'_>, size: Size, x: &Tensor, bias: Option<&Tensor>, shape: &[i64]) -> Result<Tensor> {
    let x = x.f_to_kind(Kind::Float)?;
    let mut out = Tensor::f_empty(shape, (Kind::Float, Device::Cpu))?;
    few_tokens(&TorchThreads, weight, size.columns as usize, slice(&x)?, slice_mut(&mut out)?);
    Ok(match bias {
        Some(bias) => out.f_add_(bias)?,
        None => out,
    })
}

/// Writes a product to a part of `out`, converted if the dtypes differ.
fn into_part(part: &Tensor, kind: Kind, product: impl FnOnce(&Tensor) -> Result<()>) -> Result<()> {
    if part.f_kind()? == kind {
        return product(part);
    }
    let scratch = Tensor::f_empty(part.size(), (kind, Device::Cpu))?;
    product(&scratch)?;
    part.f_detach()?.f_copy_(&scratch)?;
    Ok(())
}

/// Ranges of the tokens that are multiplied at a time: all if nothing is converted.
fn row_ranges(tokens: i64, converted: bool) -> impl Iterator<Item = (i64, i64)> {
    let step = if converted { ROWS } else { tokens };
    (0..tokens).step_by(step.max(1) as usize).map(move |first| (first, step.min(tokens - first)))
}

/// A step from one to `end`, near `wanted`, and a multiple of 64 if it is larger than that.
fn tile_step(wanted: i64, end: i64) -> i64 {
    let even = if wanted > 64 { wanted / 64 * 64 } else { wanted };
    even.clamp(1, end)
}

/// Half of the weight, within the limits of a tile.
fn tile_elements<T>(size: Size) -> i64 {
    let bytes = size_of::<T>() as i64;
    (size.rows * size.columns / 2 * bytes).clamp(TILE[0], TILE[1]) / bytes
}

fn tiles<T: Float + Element>(
    weight: &Packed<'_>,
    size: Size,
    x: &Tensor,
    bias: Option<&Tensor>,
    out: &Tensor,
) -> Result<()> {
    let step = tile_step(tile_elements::<T>(size) / size.columns, size.rows);
    let mut buffer = large::empty(&[step, size.columns], T::KIND)?;
    let bias = bias.map(|bias| bias.f_to_kind(T::KIND)).transpose()?;
    for (first, tokens) in row_ranges(x.size()[0], x.f_kind()? != T::KIND) {
        let x = x.f_narrow(0, first, tokens)?.f_to_kind(T::KIND)?;
        let out = out.f_narrow(0, first, tokens)?;
        for row in (0..size.rows).step_by(step as usize) {
            let rows = step.min(size.rows - row);
            let width = size.columns as usize;
            let tile = Tile { width, row: row as usize, column: 0, columns: width };
            let values = &mut slice_mut::<T>(&mut buffer)?[..rows as usize * width];
            dequantize_tile(&TorchThreads, weight, tile, values);
            let transposed = buffer.f_narrow(0, 0, rows)?.f_tr()?;
            into_part(&out.f_narrow(1, row, rows)?, T::KIND, |part| {
                let _ = match &bias {
                    Some(bias) => bias.f_narrow(0, row, rows)?.f_addmm_out(part, &x, &transposed)?,
                    None => x.f_mm_out(part, &transposed)?,
                };
                Ok(())
            })?;
        }
    }
    Ok(())
}

/// `grad weight`: the gradient of the input, in the dtype of `grad`. The weight is rounded to
/// `weight_kind`, the dtype it was quantised from, and then to that of `grad`.
///
/// # Errors
/// Invalid arguments, and errors of libtorch.
pub fn input_gradient(weight: Weight, size: Size, grad: &Tensor, weight_kind: Kind) -> Result<Tensor> {
    let op = weight.op;
    check_devices(op, ("grad", grad), [("packed", Some(&weight.packed))])?;
    let tokens = check_tokens(op, "grad", grad, size.rows)?;
    check_kind(op, "weight_dtype", weight_kind, &FLOATS)?;
    let _guard = tch::no_grad_guard();
    let kind = grad.f_kind()?;
    let shape = with_width(grad, size.columns);
    if grad.device() != Device::Cpu || tensor_ops() {
        let weight = dequantize_nf4(weight, &[size.rows, size.columns], weight_kind)?.f_to_kind(kind)?;
        let out = Tensor::f_empty(&shape[..], (kind, grad.device()))?;
        let rows = out.f_view([tokens, size.columns])?;
        let _ = grad.f_reshape([tokens, size.rows])?.f_mm_out(&rows, &weight)?;
        return Ok(out);
    }
    let weight = weight.checked(size.count(op)?)?;
    let view = weight.view([dtype(weight_kind), dtype(kind)])?;
    let grad = grad.f_contiguous()?.f_view([tokens, size.rows])?;
    let out = large::empty(&shape, kind)?;
    if tokens > 0 && size.columns > 0 {
        let rows = out.f_view([tokens, size.columns])?;
        match product_kind(kind) {
            Kind::BFloat16 => strips::<bf16>(&view, size, &grad, &rows)?,
            _ => strips::<f32>(&view, size, &grad, &rows)?,
        }
    }
    Ok(out)
}

/// Strips of columns: each product sums over all rows of the weight, so the output is not accumulated.
fn strips<T: Float + Element>(weight: &Packed<'_>, size: Size, grad: &Tensor, out: &Tensor) -> Result<()> {
    let step = tile_step(tile_elements::<T>(size) / size.rows, size.columns);
    let mut buffer = large::empty(&[size.rows * step], T::KIND)?;
    for (first, tokens) in row_ranges(grad.size()[0], grad.f_kind()? != T::KIND) {
        let grad = grad.f_narrow(0, first, tokens)?.f_to_kind(T::KIND)?;
        let out = out.f_narrow(0, first, tokens)?;
        for column in (0..size.columns).step_by(step as usize) {
            let columns = step.min(size.columns - column);
            let count = size.rows * columns;
            let (width, narrow) = (size.columns as usize, columns as usize);
            let tile = Tile { width, row: 0, column: column as usize, columns: narrow };
            dequantize_tile(&TorchThreads, weight, tile, &mut slice_mut::<T>(&mut buffer)?[..count as usize]);
            let matrix = buffer.f_narrow(0, 0, count)?.f_view([size.rows, columns])?;
            into_part(&out.f_narrow(1, column, columns)?, T::KIND, |part| {
                let _ = grad.f_mm_out(part, &matrix)?;
                Ok(())
            })?;
        }
    }
    Ok(())
}
