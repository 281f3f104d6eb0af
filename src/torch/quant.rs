//! Quantisation of tensors: checks the arguments and picks the path.
//!
//! On the CPU the slice algorithms of [`crate::quant`] run on views of the tensors, on NVIDIA's cards the
//! kernels of [`super::nf4_cuda`] and [`super::blockwise8_cuda`]; on any other device
//! [`super::quant_ops`] does the same through libtorch's ops.

use half::{bf16, f16};
use tch::{Device, Kind, Tensor};

use super::head::{dtype_name, tensor_ops};
use super::team::Torch;
use super::view::{Element, slice, slice_mut};
use super::{blockwise8_cuda, cuda, nf4_cuda, pages, quant_ops};
use crate::error::{Error, Result};
use crate::quant::blockwise8::{self, Choice, MAP_LEN, Map};
use crate::quant::nf4::{self, Packed};
use crate::quant::scales::Scales;
use crate::quant::storage::{Dtype, Storage};
use crate::quant::{BLOCK_SIZES, codebook};

pub(super) fn value(op: &'static str, argument: &'static str, expected: &str, got: &impl ToString) -> Error {
    Error::Value { op, argument, expected: expected.into(), got: got.to_string() }
}

pub(super) fn check_kind(
    op: &'static str,
    argument: &'static str,
    got: Kind,
    allowed: &[Kind],
) -> Result<()> {
    if allowed.contains(&got) {
        return Ok(());
    }
    let expected = allowed.iter().map(|&kind| dtype_name(kind)).collect::<Vec<_>>().join(", ");
    Err(Error::Dtype { op, argument, expected, got: dtype_name(got).into() })
}

fn check_len(op: &'static str, argument: &'static str, tensor: &Tensor, len: i64, why: &str) -> Result<()> {
    if tensor.numel() as i64 == len {
        return Ok(());
    }
    let expected = format!("{len} elements, {why}");
    Err(Error::Shape { op, argument, expected, got: format!("{:?}", tensor.size()) })
}

fn check_blocksize(op: &'static str, blocksize: i64) -> Result<usize> {
    let size = usize::try_from(blocksize).unwrap_or(0);
    if BLOCK_SIZES.contains(&size) {
        return Ok(size);
    }
    Err(value(op, "blocksize", "32, 64, 128, 256, 512, 1024, 2048 or 4096", &blocksize))
}

/// Blocks that `count` values make, the last of which may be partial; both are not negative.
fn blocks_of(count: i64, blocksize: i64) -> i64 {
    (count as u64).div_ceil(blocksize as u64) as i64
}

/// The dtypes that quantised values come from and go to.
pub(super) const FLOATS: [Kind; 3] = [Kind::Float, Kind::BFloat16, Kind::Half];

pub(super) fn dtype(kind: Kind) -> Dtype {
    match kind {
        Kind::BFloat16 => Dtype::Bf16,
        Kind::Half => Dtype::F16,
        _ => Dtype::F32,
    }
}

/// The 16 values of the code.
///
/// # Errors
/// What libtorch reports.
pub fn code() -> Result<Tensor> {
    Ok(Tensor::f_from_slice(&codebook::NF4)?)
}

/// Packed codes `((n + 1) / 2, 1)` and scales, one a block of the flat tensor.
///
/// # Errors
/// A dtype or block size that does not fit, and what libtorch reports.
pub fn quantize_nf4(x: &Tensor, blocksize: i64) -> Result<[Tensor; 2]> {
    const OP: &str = "quantize_nf4";
    check_kind(OP, "tensor", x.f_kind()?, &FLOATS)?;
    let block = check_blocksize(OP, blocksize)?;
    let _guard = tch::no_grad_guard();
    let x = x.f_contiguous()?;
    if let Some(device) = cuda::device(&x)? {
        return nf4_cuda::quantize(device, &x, blocksize);
    }
    if x.device() != Device::Cpu || tensor_ops() {
        return quant_ops::quantize_nf4(&x, blocksize);
    }
    match x.f_kind()? {
        Kind::BFloat16 => quantize_as::<bf16>(&x, block),
        Kind::Half => quantize_as::<f16>(&x, block),
        _ => quantize_as::<f32>(&x, block),
    }
}

fn quantize_as<T: Storage + Element>(x: &Tensor, blocksize: usize) -> Result<[Tensor; 2]> {
    let n = x.numel();
    let mut packed = pages::empty(&[n.div_ceil(2) as i64, 1], Kind::Uint8)?;
    let mut absmax = pages::empty(&[n.div_ceil(blocksize) as i64], Kind::Float)?;
    nf4::quantize(&Torch, slice::<T>(x)?, blocksize, slice_mut(&mut packed)?, slice_mut(&mut absmax)?);
    Ok([packed, absmax])
}

/// What quantised scales need beside their codes.
#[derive(Debug)]
pub struct Nested {
    /// `f32`, one a block of scales.
    pub absmax: Tensor,
    /// `(256,)` `f32`.
    pub map: Tensor,
    /// One `f32`.
    pub offset: Tensor,
    /// Scales in a block.
    pub blocksize: i64,
}

/// A 4-bit tensor as it came from Python.
#[derive(Debug)]
pub struct Weight {
    /// Name of the op, for messages.
    pub op: &'static str,
    /// `uint8`, two codes each.
    pub packed: Tensor,
    /// `f32` scales, or `uint8` codes of them.
    pub absmax: Tensor,
    /// Present if the scales are quantised.
    pub nested: Option<Nested>,
    /// Values in a block.
    pub blocksize: i64,
}

impl Weight {
    /// Checks dtypes and lengths for a tensor of `count` values, and makes the parts contiguous.
    ///
    /// # Errors
    /// The first argument that does not fit, by name.
    pub fn checked(mut self, count: i64) -> Result<Self> {
        let op = self.op;
        check_kind(op, "packed", self.packed.f_kind()?, &[Kind::Uint8])?;
        let block = check_blocksize(op, self.blocksize)? as i64;
        check_len(op, "packed", &self.packed, (count + 1) / 2, &format!("for {count} values"))?;
        let kind = if self.nested.is_some() { Kind::Uint8 } else { Kind::Float };
        check_kind(op, "absmax", self.absmax.f_kind()?, &[kind])?;
        let blocks = blocks_of(count, block);
        check_len(op, "absmax", &self.absmax, blocks, &format!("for {count} values in blocks of {block}"))?;
        if let Some(nested) = &mut self.nested {
            if nested.blocksize <= 0 {
                return Err(value(op, "nested blocksize", "a positive number", &nested.blocksize));
            }
            let groups = blocks_of(blocks, nested.blocksize);
            let parts = [
                ("nested absmax", &mut nested.absmax, groups),
                ("nested code", &mut nested.map, MAP_LEN as i64),
                ("offset", &mut nested.offset, 1),
            ];
            for (argument, tensor, len) in parts {
                check_kind(op, argument, tensor.f_kind()?, &[Kind::Float])?;
                check_len(op, argument, tensor, len, &format!("for {blocks} scales"))?;
                *tensor = tensor.f_contiguous()?;
            }
        }
        self.packed = self.packed.f_contiguous()?;
        self.absmax = self.absmax.f_contiguous()?;
        Ok(self)
    }

    /// The weight as slices, for values that are rounded to `via` on their way.
    pub(super) fn view(&self, via: [Dtype; 2]) -> Result<Packed<'_>> {
        let scales = match &self.nested {
            None => Scales::Plain(slice(&self.absmax)?),
            Some(nested) => Scales::Nested {
                codes: slice(&self.absmax)?,
                map: slice(&nested.map)?,
                absmax: slice(&nested.absmax)?,
                blocksize: nested.blocksize as usize,
                offset: slice::<f32>(&nested.offset)?[0],
            },
        };
        Ok(Packed { bytes: slice(&self.packed)?, scales, blocksize: self.blocksize as usize, via })
    }
}

/// Number of elements of a tensor of this shape.
pub(super) fn count(op: &'static str, shape: &[i64]) -> Result<i64> {
    let sizes = shape.iter().all(|&size| size >= 0);
    let product = shape.iter().try_fold(1i64, |product, &size| product.checked_mul(size));
    match product {
        Some(product) if sizes && product < i64::MAX => Ok(product), // plus one, it is halved
        _ => Err(value(op, "shape", "sizes of a tensor", &format!("{shape:?}"))),
    }
}

/// The values, `f32(code * scale)` rounded to `kind`, in `shape`.
///
/// # Errors
/// Arguments that do not fit, and what libtorch reports.
pub fn dequantize_nf4(weight: Weight, shape: &[i64], kind: Kind) -> Result<Tensor> {
    check_kind(weight.op, "dtype", kind, &FLOATS)?;
    let count = count(weight.op, shape)?;
    let _guard = tch::no_grad_guard();
    let weight = weight.checked(count)?;
    if let Some(device) = cuda::device(&weight.packed)? {
        return nf4_cuda::dequantize(device, &weight, shape, kind);
    }
    if weight.packed.device() != Device::Cpu || tensor_ops() {
        return quant_ops::dequantize_nf4(&weight, shape, kind);
    }
    let mut values = pages::empty(shape, kind)?;
    let view = weight.view([Dtype::F32; 2])?;
    match kind {
        Kind::BFloat16 => nf4::dequantize::<bf16>(&Torch, &view, slice_mut(&mut values)?),
        Kind::Half => nf4::dequantize::<f16>(&Torch, &view, slice_mut(&mut values)?),
        _ => nf4::dequantize::<f32>(&Torch, &view, slice_mut(&mut values)?),
    }
    Ok(values)
}

fn check_map(op: &'static str, code: &Tensor) -> Result<()> {
    check_kind(op, "code", code.f_kind()?, &[Kind::Float])?;
    check_len(op, "code", code, MAP_LEN as i64, "a value a code")
}

pub(super) fn map(op: &'static str, code: &Tensor) -> Result<[f32; MAP_LEN]> {
    check_map(op, code)?;
    let code = code.f_to_device(Device::Cpu)?.f_contiguous()?;
    let values = slice::<f32>(&code)?;
    if values.windows(2).any(|pair| pair[0] > pair[1] || pair[0].is_nan() || pair[1].is_nan()) {
        return Err(value(op, "code", "in ascending order", &"not"));
    }
    <[f32; MAP_LEN]>::try_from(values).map_err(|error| Error::Internal(error.to_string()))
}

/// A byte a value, in the shape of `x`, and the largest magnitude a block. On a card the values of `code`
/// are waited for, to see that they ascend.
///
/// # Errors
/// Arguments that do not fit, and what libtorch reports.
pub fn quantize_blockwise(x: &Tensor, code: &Tensor, blocksize: i64, choice: Choice) -> Result<[Tensor; 2]> {
    const OP: &str = "quantize_blockwise";
    check_kind(OP, "tensor", x.f_kind()?, &FLOATS)?;
    if blocksize <= 0 {
        return Err(value(OP, "blocksize", "a positive number", &blocksize));
    }
    let map = Map::new(&map(OP, code)?, choice);
    let _guard = tch::no_grad_guard();
    let device = x.device();
    if let (Choice::Nearest, Some(card)) = (choice, cuda::device(x)?) {
        let code = code.f_to_device(device)?.f_contiguous()?;
        return blockwise8_cuda::quantize(card, &x.f_contiguous()?, &code, blocksize);
    }
    // Scales are few: other devices send them here.
    let x = x.f_to_device(Device::Cpu)?.f_contiguous()?;
    let blocks = blocks_of(x.numel() as i64, blocksize);
    let mut codes = Tensor::f_empty(x.size(), (Kind::Uint8, Device::Cpu))?;
    let mut absmax = Tensor::f_empty([blocks], (Kind::Float, Device::Cpu))?;
    let (block, out, largest) = (blocksize as usize, slice_mut(&mut codes)?, slice_mut(&mut absmax)?);
    match x.f_kind()? {
        Kind::BFloat16 => blockwise8::quantize::<bf16>(&Torch, slice(&x)?, &map, block, out, largest),
        Kind::Half => blockwise8::quantize::<f16>(&Torch, slice(&x)?, &map, block, out, largest),
        _ => blockwise8::quantize::<f32>(&Torch, slice(&x)?, &map, block, out, largest),
    }
    Ok([codes.f_to_device(device)?, absmax.f_to_device(device)?])
}

/// `code[x] * absmax`, rounded to `kind`, in the shape of `codes`.
///
/// # Errors
/// Arguments that do not fit, and what libtorch reports.
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
        return Err(value(OP, "blocksize", "a positive number", &blocksize));
    }
    let count = codes.numel() as i64;
    check_len(OP, "absmax", absmax, blocks_of(count, blocksize), &format!("for {count} codes"))?;
    let _guard = tch::no_grad_guard();
    let device = codes.device();
    if let Some(card) = cuda::device(codes)? {
        // Whether the values ascend is not asked: the answer would have to be waited for.
        check_map(OP, code)?;
        let (codes, absmax) = (codes.f_contiguous()?, absmax.f_contiguous()?);
        let code = code.f_to_device(device)?.f_contiguous()?;
        return blockwise8_cuda::dequantize(card, &codes, &absmax, &code, blocksize, kind);
    }
    let map = map(OP, code)?;
    let host = |tensor: &Tensor| -> Result<Tensor> { Ok(tensor.f_to_device(Device::Cpu)?.f_contiguous()?) };
    let (codes, absmax) = (host(codes)?, host(absmax)?);
    let mut values = pages::empty(&codes.size(), kind)?;
    let (codes, absmax, block) = (slice::<u8>(&codes)?, slice::<f32>(&absmax)?, blocksize as usize);
    match kind {
        Kind::BFloat16 => {
            blockwise8::dequantize::<bf16>(&Torch, codes, &map, absmax, block, slice_mut(&mut values)?);
        }
        Kind::Half => {
            blockwise8::dequantize::<f16>(&Torch, codes, &map, absmax, block, slice_mut(&mut values)?);
        }
        _ => blockwise8::dequantize::<f32>(&Torch, codes, &map, absmax, block, slice_mut(&mut values)?),
    }
    Ok(values.f_to_device(device)?)
}
