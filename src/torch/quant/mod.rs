//! Quantisation of tensors: checks the arguments and picks the path.
//!
//! On the CPU the slice algorithms of [`crate::quant`] run on views of the tensors, on NVIDIA's GPUs the
//! kernels of [`nf4_cuda`] and [`blockwise8_cuda`]; on any other device, and where kernels are not trusted,
//! [`ops`] uses libtorch's ops.

pub mod args;
mod blockwise8_cuda;
pub mod linear;
mod nf4_cuda;
mod ops;

use half::{bf16, f16};
use tch::{Device, Kind, Tensor};

use super::device::{self, check_devices, tensor_ops};
use super::dtype::{FLOATS, check_kind};
use super::large;
use super::threads::TorchThreads;
use super::view::{Element, slice, slice_mut};
use crate::base::error::{Error, Result};
use crate::base::float::{Dtype, Float};
use crate::cuda::trust::Family;
use crate::quant::blockwise8::{self, Map};
use crate::quant::{codebook, nf4};
use args::{Weight, blocks_of, check_blocksize, check_len, check_map, count, map};

/// The 16 values of the code.
///
/// # Errors
/// Errors of libtorch.
pub fn code() -> Result<Tensor> {
    Ok(Tensor::f_from_slice(&codebook::NF4)?)
}

/// Packed codes `((n + 1) / 2, 1)` and scales, one per block of the flat tensor.
///
/// # Errors
/// An invalid dtype or block size, and errors of libtorch.
pub fn quantize_nf4(x: &Tensor, blocksize: i64) -> Result<[Tensor; 2]> {
    const OP: &str = "quantize_nf4";
    check_kind(OP, "tensor", x.f_kind()?, &FLOATS)?;
    let block = check_blocksize(OP, blocksize)?;
    let _guard = tch::no_grad_guard();
    let x = x.f_contiguous()?;
    if let Some(device) = device::of(&x, &[Family::Nf4Quantize])? {
        return nf4_cuda::quantize(device, &x, blocksize);
    }
    if x.device() != Device::Cpu || tensor_ops() {
        return ops::quantize_nf4(&x, blocksize);
    }
    match x.f_kind()? {
        Kind::BFloat16 => quantize_as::<bf16>(&x, block),
        Kind::Half => quantize_as::<f16>(&x, block),
        _ => quantize_as::<f32>(&x, block),
    }
}

fn quantize_as<T: Float + Element>(x: &Tensor, blocksize: usize) -> Result<[Tensor; 2]> {
    let n = x.numel();
    let mut packed = large::empty(&[n.div_ceil(2) as i64, 1], Kind::Uint8)?;
    let mut absmax = large::empty(&[n.div_ceil(blocksize) as i64], Kind::Float)?;
    nf4::quantize(&TorchThreads, slice::<T>(x)?, blocksize, slice_mut(&mut packed)?, slice_mut(&mut absmax)?);
    Ok([packed, absmax])
}

/// The values, `f32(code * scale)` rounded to `kind`, in `shape`.
///
/// # Errors
/// Invalid arguments, and errors of libtorch.
pub fn dequantize_nf4(weight: Weight, shape: &[i64], kind: Kind) -> Result<Tensor> {
    check_kind(weight.op, "dtype", kind, &FLOATS)?;
    let count = count(weight.op, shape)?;
    let _guard = tch::no_grad_guard();
    let weight = weight.checked(count)?;
    if let Some(device) = device::of(&weight.packed, &[Family::Nf4Dequantize])? {
        return nf4_cuda::dequantize(device, &weight, shape, kind);
    }
    if weight.packed.device() != Device::Cpu || tensor_ops() {
        return ops::dequantize_nf4(&weight, shape, kind);
    }
    let mut values = large::empty(shape, kind)?;
    let view = weight.view([Dtype::F32; 2])?;
    match kind {
        Kind::BFloat16 => nf4::dequantize::<bf16>(&TorchThreads, &view, slice_mut(&mut values)?),
        Kind::Half => nf4::dequantize::<f16>(&TorchThreads, &view, slice_mut(&mut values)?),
        _ => nf4::dequantize::<f32>(&TorchThreads, &view, slice_mut(&mut values)?),
    }
    Ok(values)
}

/// One byte per value, in the shape of `x`, and the largest magnitude per block. On a GPU this waits for the
/// values of `code`, to check that they are ascending.
///
/// # Errors
/// Invalid arguments, and errors of libtorch.
pub fn quantize_blockwise(x: &Tensor, code: &Tensor, blocksize: i64) -> Result<[Tensor; 2]> {
    const OP: &str = "quantize_blockwise";
    check_kind(OP, "tensor", x.f_kind()?, &FLOATS)?;
    if blocksize <= 0 {
        return Err(Error::value(OP, "blocksize", "a positive number", &blocksize));
    }
    check_devices(OP, ("tensor", x), [("code", Some(code))])?;
    let map = Map::new(&map(OP, code)?);
    let _guard = tch::no_grad_guard();
    let device = x.device();
    if let Some(gpu) = device::of(x, &[Family::Blockwise8])? {
        let code = code.f_contiguous()?;
        return blockwise8_cuda::quantize(gpu, &x.f_contiguous()?, &code, blocksize);
    }
    if device != Device::Cpu || tensor_ops() {
        return ops::quantize_blockwise(x, &map, blocksize);
    }
    let x = x.f_contiguous()?;
    let blocks = blocks_of(x.numel() as i64, blocksize);
    let mut codes = Tensor::f_empty(x.size(), (Kind::Uint8, Device::Cpu))?;
    let mut absmax = Tensor::f_empty([blocks], (Kind::Float, Device::Cpu))?;
    let (block, out, largest) = (blocksize as usize, slice_mut(&mut codes)?, slice_mut(&mut absmax)?);
    match x.f_kind()? {
        Kind::BFloat16 => blockwise8::quantize::<bf16>(&TorchThreads, slice(&x)?, &map, block, out, largest),
        Kind::Half => blockwise8::quantize::<f16>(&TorchThreads, slice(&x)?, &map, block, out, largest),
        _ => blockwise8::quantize::<f32>(&TorchThreads, slice(&x)?, &map, block, out, largest),
    }
    Ok([codes, absmax])
}

/// `code[x] * absmax`, rounded to `kind`, in the shape of `codes`.
///
/// # Errors
/// Invalid arguments, and errors of libtorch.
pub fn dequantize_blockwise(
    codes: &Tensor,
    absmax: &Tensor,
    code: &Tensor,
    blocksize: i64,
    kind: Kind,
) -> Result<Tensor> {
    const OP: &str = "dequantize_blockwise";
    check_kind(OP, "codes", codes.f_kind()?, &[Kind::Uint8])?;
    check_kind(OP, "absmax", absmax.f_kind()?, &[Kind::Float])?;
    check_kind(OP, "dtype", kind, &FLOATS)?;
    if blocksize <= 0 {
        return Err(Error::value(OP, "blocksize", "a positive number", &blocksize));
    }
    check_devices(OP, ("codes", codes), [("absmax", Some(absmax)), ("code", Some(code))])?;
    let count = codes.numel() as i64;
    check_len(OP, "absmax", absmax, blocks_of(count, blocksize), &format!("for {count} codes"))?;
    let _guard = tch::no_grad_guard();
    let device = codes.device();
    // On a GPU no check that the values are ascending: it would wait for the device.
    check_map(OP, code)?;
    let gpu = device::of(codes, &[Family::Blockwise8])?;
    let (codes, absmax, code) = (codes.f_contiguous()?, absmax.f_contiguous()?, code.f_contiguous()?);
    if let Some(gpu) = gpu {
        return blockwise8_cuda::dequantize(gpu, &codes, &absmax, &code, blocksize, kind);
    }
    if device != Device::Cpu || tensor_ops() {
        return ops::dequantize_blockwise(&codes, &code, &absmax, blocksize, kind);
    }
    let map = map(OP, &code)?;
    let mut values = large::empty(&codes.size(), kind)?;
    let (codes, absmax, block) = (slice::<u8>(&codes)?, slice::<f32>(&absmax)?, blocksize as usize);
    match kind {
        Kind::BFloat16 => {
            blockwise8::dequantize::<bf16>(
                &TorchThreads,
                codes,
                &map,
                absmax,
                block,
                slice_mut(&mut values)?,
            );
        }
        Kind::Half => {
            blockwise8::dequantize::<f16>(&TorchThreads, codes, &map, absmax, block, slice_mut(&mut values)?);
        }
        _ => {
            blockwise8::dequantize::<f32>(&TorchThreads, codes, &map, absmax, block, slice_mut(&mut values)?);
        }
    }
    Ok(values)
}
