//! The scales of the blocks, plain or themselves quantised (double quantisation).

use super::blockwise8::MAP_LEN;

/// Where the scale of a block comes from.
#[derive(Clone, Copy, Debug)]
pub enum Scales<'a> {
    /// One `f32` per block.
    Plain(&'a [f32]),
    /// One byte per block: `map[code] * absmax[block / blocksize] + offset`, each step rounded to `f32`.
    Nested {
        /// One code per block.
        codes: &'a [u8],
        /// The 256 values of the codes.
        map: &'a [f32],
        /// Largest magnitude of each block of scales.
        absmax: &'a [f32],
        /// Scales in a block.
        blocksize: usize,
        /// Mean that was subtracted before the scales were quantised.
        offset: f32,
    },
}

impl Scales<'_> {
    /// Number of blocks that have a scale.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Scales::Plain(absmax) => absmax.len(),
            Scales::Nested { codes, .. } => codes.len(),
        }
    }

    /// True if there are no blocks.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// True if the length of every part matches the number of scales.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        match self {
            Scales::Plain(_) => true,
            Scales::Nested { codes, map, absmax, blocksize, .. } => {
                map.len() == MAP_LEN && *blocksize > 0 && absmax.len() == codes.len().div_ceil(*blocksize)
            }
        }
    }

    /// The scale of a block.
    ///
    /// # Panics
    /// If there is no such block.
    #[inline(always)]
    #[must_use]
    pub fn get(&self, block: usize) -> f32 {
        match self {
            Scales::Plain(absmax) => absmax[block],
            Scales::Nested { codes, map, absmax, blocksize, offset } => {
                map[usize::from(codes[block])] * absmax[block / blocksize] + offset
            }
        }
    }
}

/// Reads scales in order, with one division per group instead of one per block.
#[derive(Clone, Copy, Debug)]
pub struct Cursor<'a> {
    scales: Scales<'a>,
    /// Blocks that `group` is the scale of.
    first: usize,
    end: usize,
    group: f32,
}

impl Cursor<'_> {
    /// As [`Scales::get`].
    ///
    /// # Panics
    /// As [`Scales::get`].
    #[inline(always)]
    pub fn get(&mut self, block: usize) -> f32 {
        match self.scales {
            Scales::Plain(absmax) => absmax[block],
            Scales::Nested { codes, map, absmax, blocksize, offset } => {
                if block < self.first || block >= self.end {
                    let group = block / blocksize;
                    (self.first, self.end) = (group * blocksize, (group + 1).saturating_mul(blocksize));
                    self.group = absmax[group];
                }
                map[usize::from(codes[block])] * self.group + offset
            }
        }
    }
}

impl<'a> Scales<'a> {
    /// For reading many scales in order.
    #[must_use]
    pub fn cursor(self) -> Cursor<'a> {
        Cursor { scales: self, first: 0, end: 0, group: 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nested_scales_are_restored_in_two_roundings() {
        let map: Vec<f32> = (0..256).map(|i| (i as f32 - 127.0) / 128.0).collect();
        let scales = Scales::Nested {
            codes: &[127, 255, 0],
            map: &map,
            absmax: &[0.3, 0.7],
            blocksize: 2,
            offset: 0.1,
        };
        assert!(scales.is_whole() && !scales.is_empty());
        // 0 * 0.3 + 0.1; 1 * 0.3 + 0.1; -127/128 * 0.7 + 0.1
        assert_eq!(
            (0..3).map(|i| scales.get(i)).collect::<Vec<_>>(),
            [0.1, 0.3 + 0.1, -0.992_187_5 * 0.7 + 0.1]
        );
        let mut cursor = scales.cursor();
        for block in [2, 0, 1, 2, 1] {
            assert_eq!(cursor.get(block), scales.get(block));
        }
        let short =
            Scales::Nested { codes: &[1, 2, 3], map: &map, absmax: &[0.3], blocksize: 2, offset: 0.1 };
        assert!(!short.is_whole());
    }
}
