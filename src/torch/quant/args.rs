//! Arguments of the ops of quantisation, which all backends share.

use tch::{Device, Kind, Tensor};

use crate::base::error::{Error, Result};
use crate::base::float::Dtype;
use crate::quant::BLOCK_SIZES;
use crate::quant::blockwise8::MAP_LEN;
use crate::quant::packed::Packed;
use crate::quant::scales::Scales;
use crate::torch::device::check_devices;
use crate::torch::dtype::check_kind;
use crate::torch::view::slice;

pub(super) fn check_len(
    op: &'static str,
    argument: &'static str,
    tensor: &Tensor,
    len: i64,
    why: &str,
) -> Result<()> {
    if tensor.numel() as i64 == len {
        return Ok(());
    }
    let expected = format!("{len} elements, {why}");
    Err(Error::Shape { op, argument, expected, got: format!("{:?}", tensor.size()) })
}

pub(super) fn check_blocksize(op: &'static str, blocksize: i64) -> Result<usize> {
    let size = usize::try_from(blocksize).unwrap_or(0);
    if BLOCK_SIZES.contains(&size) {
        return Ok(size);
    }
    Err(Error::value(op, "blocksize", "32, 64, 128, 256, 512, 1024, 2048 or 4096", &blocksize))
}

/// Number of blocks of `count` values, the last of which may be partial; both are not negative.
pub(super) fn blocks_of(count: i64, blocksize: i64) -> i64 {
    (count as u64).div_ceil(blocksize as u64) as i64
}

/// The parts of quantised scales other than their codes.
#[derive(Debug)]
pub struct Nested {
    /// `f32`, one per block of scales.
    pub absmax: Tensor,
    /// `(256,)` `f32`.
    pub map: Tensor,
    /// One `f32`.
    pub offset: Tensor,
    /// Scales in a block.
    pub blocksize: i64,
}

/// A 4-bit tensor from Python.
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
    /// Checks devices, dtypes and lengths for a tensor of `count` values, and makes the parts contiguous.
    ///
    /// # Errors
    /// The first invalid argument, by name.
    pub fn checked(mut self, count: i64) -> Result<Self> {
        let op = self.op;
        let nested = self.nested.as_ref();
        let others = [
            ("absmax", Some(&self.absmax)),
            ("nested absmax", nested.map(|nested| &nested.absmax)),
            ("nested code", nested.map(|nested| &nested.map)),
            ("offset", nested.map(|nested| &nested.offset)),
        ];
        check_devices(op, ("packed", &self.packed), others)?;
        check_kind(op, "packed", self.packed.f_kind()?, &[Kind::Uint8])?;
        let block = check_blocksize(op, self.blocksize)? as i64;
        check_len(op, "packed", &self.packed, (count + 1) / 2, &format!("for {count} values"))?;
        let kind = if self.nested.is_some() { Kind::Uint8 } else { Kind::Float };
        check_kind(op, "absmax", self.absmax.f_kind()?, &[kind])?;
        let blocks = blocks_of(count, block);
        check_len(op, "absmax", &self.absmax, blocks, &format!("for {count} values in blocks of {block}"))?;
        if let Some(nested) = &mut self.nested {
            if nested.blocksize <= 0 {
                return Err(Error::value(op, "nested blocksize", "a positive number", &nested.blocksize));
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

    /// The weight as slices, for values that are first rounded to `via`.
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

/// Sizes of the weight.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Rows of the weight: output features.
    pub rows: i64,
    /// Columns of the weight: input features.
    pub columns: i64,
}

impl Size {
    /// Number of its elements.
    ///
    /// # Errors
    /// Sizes that a tensor cannot have.
    pub fn count(self, op: &'static str) -> Result<i64> {
        count(op, &[self.rows, self.columns])
    }
}

/// Number of elements of a tensor of this shape.
pub(super) fn count(op: &'static str, shape: &[i64]) -> Result<i64> {
    let sizes = shape.iter().all(|&size| size >= 0);
    let product = shape.iter().try_fold(1i64, |product, &size| product.checked_mul(size));
    match product {
        Some(product) if sizes && product < i64::MAX => Ok(product), // plus one must not overflow
        _ => Err(Error::value(op, "shape", "sizes of a tensor", &format!("{shape:?}"))),
    }
}

pub(super) fn check_map(op: &'static str, code: &Tensor) -> Result<()> {
    check_kind(op, "code", code.f_kind()?, &[Kind::Float])?;
    check_len(op, "code", code, MAP_LEN as i64, "one per code")
}

/// The 256 values of 8-bit codes, on the CPU.
pub(in crate::torch) fn map(op: &'static str, code: &Tensor) -> Result<[f32; MAP_LEN]> {
    check_map(op, code)?;
    let code = code.f_to_device(Device::Cpu)?.f_contiguous()?;
    let values = slice::<f32>(&code)?;
    if values.windows(2).any(|pair| pair[0] > pair[1] || pair[0].is_nan() || pair[1].is_nan()) {
        return Err(Error::value(op, "code", "in ascending order", &"not"));
    }
    <[f32; MAP_LEN]>::try_from(values).map_err(|error| Error::Internal(error.to_string()))
}
