//! Bytes of a file as values, and values as bytes of a file.
#![allow(unsafe_code)] // the functions that reinterpret one type as another

use std::borrow::Cow;

use half::{bf16, f16};

use crate::base::float::{Dtype, Float};

/// A type of which every bit pattern is a value, in the byte order of the machine: little-endian wherever
/// torch runs.
///
/// # Safety
/// The type has no padding and no invalid bit patterns.
pub unsafe trait Plain: Float {
    /// Its name.
    const DTYPE: Dtype;
}

// SAFETY: 32 bits without padding.
unsafe impl Plain for f32 {
    const DTYPE: Dtype = Dtype::F32;
}

// SAFETY: a transparent `u16`.
unsafe impl Plain for f16 {
    const DTYPE: Dtype = Dtype::F16;
}

// SAFETY: a transparent `u16`.
unsafe impl Plain for bf16 {
    const DTYPE: Dtype = Dtype::Bf16;
}

/// Bytes as values. Copied if the first byte is not aligned, as in files of some other programs.
#[must_use]
pub fn values<T: Plain>(bytes: &[u8]) -> Cow<'_, [T]> {
    let whole = bytes.len() / size_of::<T>();
    // SAFETY: every bit pattern is a T.
    let (before, values, _) = unsafe { bytes.align_to::<T>() };
    if before.is_empty() {
        return Cow::Borrowed(&values[..whole]);
    }
    let mut copy = vec![T::default(); whole];
    bytes_mut(&mut copy).copy_from_slice(&bytes[..whole * size_of::<T>()]);
    Cow::Owned(copy)
}

/// The bytes of values.
#[must_use]
pub fn bytes<T: Plain>(values: &[T]) -> &[u8] {
    // SAFETY: a T has no padding, and bytes need no alignment.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

fn bytes_mut<T: Plain>(values: &mut [T]) -> &mut [u8] {
    // SAFETY: as for `bytes`; any bytes written are a T.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_come_back_from_any_address() {
        let numbers: Vec<f32> = (0..9).map(|i| i as f32 * 0.3 - 1.0).collect();
        let mut shifted = vec![7];
        shifted.extend_from_slice(bytes(&numbers));
        shifted.push(9);
        assert_eq!(values::<f32>(bytes(&numbers)).as_ref(), numbers);
        assert_eq!(values::<f32>(&shifted[1..]).as_ref(), numbers);
        let odd = values::<bf16>(&shifted[2..7]);
        assert_eq!(odd.len(), 2);
        assert_eq!(odd[0].to_bits(), u16::from_le_bytes([shifted[2], shifted[3]]));
    }
}
