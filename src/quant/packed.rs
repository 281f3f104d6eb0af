//! A tensor of 4-bit codes.

use super::codebook::NF4;
use super::scales::Scales;
use crate::base::float::{Dtype, Float};

/// A flat 4-bit tensor.
#[derive(Clone, Copy, Debug)]
pub struct Packed<'a> {
    /// Two codes per byte.
    pub bytes: &'a [u8],
    /// One scale per block.
    pub scales: Scales<'a>,
    /// Values in a block.
    pub blocksize: usize,
    /// Dtypes that a product of code and scale is rounded to before the element type, in this order.
    pub via: [Dtype; 2],
}

impl Packed<'_> {
    /// The 16 values of a block.
    #[inline]
    pub(super) fn table<T: Float>(&self, block: usize) -> [T; 16] {
        let scale = self.scales.get(block);
        let values = NF4.map(|code| code * scale);
        T::narrow(&self.via[1].round(self.via[0].round(values)))
    }
}
