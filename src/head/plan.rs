//! Which variant of the head runs, from a byte budget.
//!
//! `U` is one product of all rows with the full weight.
//!
//! | variant | head | products | extra memory |
//! |---|---|---|---|
//! | forward only | no gradient wanted | 1 U | a tile |
//! | frozen | frozen | 2 U | a tile, `rows * width` |
//! | keep | trained | 3 U, plus the share of the logits that does not fit | logits of a block of pairs |
//! | accumulators | trained | 3 U | `2 * vocab * width`, logits of 256 rows |
//! | recompute | trained | 4 U | a tile |

/// Bytes of logits that may be kept when the caller sets no budget: an eighth of what the batch's
/// logits would take, and never less than 140 MiB. A loss on materialised logits needs at least six times as
/// much, without its gradients.
#[must_use]
pub fn default_budget(rows: usize, vocab: usize, element: usize) -> usize {
    (rows * vocab * element / 8).max(140 << 20)
}

/// Rows at which a product runs at full speed: blocks of pairs are not merged beyond it, because
/// that would cost memory without a gain.
const FULL_SPEED: usize = 512;

/// Rows of a block whose logits the accumulators variant keeps.
pub const BLOCK: usize = 256;

/// How a trained head is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
    /// Blocks of pairs whose logits are kept, as far as they fit, until the pairs' coefficients are
    /// known.
    Keep {
        /// Rows of a block, at most.
        rows: usize,
        /// Elements that are kept.
        elements: usize,
    },
    /// Each side's weight gradient is accumulated separately and added with its coefficient.
    Accumulators,
    /// Logits are computed twice.
    Recompute,
}

/// What the choice depends on.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Vocabulary size.
    pub vocab: usize,
    /// Hidden size.
    pub width: usize,
    /// Bytes of an element in the type the head computes in.
    pub element: usize,
    /// Completion rows of the longest pair, both sides.
    pub longest_pair: usize,
}

/// Chooses the variant with the fewest products that fits `budget` bytes.
#[must_use]
pub fn choose(sizes: Sizes, budget: usize) -> Variant {
    let Sizes { vocab, width, element, longest_pair } = sizes;
    let fits = budget / (vocab * element).max(1);
    let keep = |rows: usize| Variant::Keep { rows, elements: rows.min(fits) * vocab };
    if longest_pair <= fits {
        return keep(fits.min(longest_pair.max(FULL_SPEED)));
    }
    let accumulators = vocab.saturating_mul(2 * width + BLOCK).saturating_mul(element);
    if longest_pair > 2 * width && accumulators <= budget {
        return Variant::Accumulators;
    }
    // Sweeping pair by pair reads the weight once per pair: not worth it for a few kept tiles.
    if longest_pair <= 8 * fits { keep(longest_pair) } else { Variant::Recompute }
}

/// Packs consecutive items of the given sizes into blocks of at most `limit` rows; a larger item gets a
/// separate block. Returns the end of each block.
#[must_use]
pub fn pack(sizes: &[usize], limit: usize) -> Vec<usize> {
    let (mut ends, mut filled) = (Vec::new(), 0);
    for (i, &size) in sizes.iter().enumerate() {
        if filled > 0 && filled + size > limit {
            ends.push(i);
            filled = 0;
        }
        filled += size;
    }
    if !sizes.is_empty() {
        ends.push(sizes.len());
    }
    ends
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: Sizes = Sizes { vocab: 1000, width: 16, element: 4, longest_pair: 100 };

    #[test]
    fn the_budget_decides() {
        // One row of logits is 4,000 bytes; a pair is 400,000.
        let keep = |rows: usize, kept: usize| Variant::Keep { rows, elements: kept * 1000 };
        assert_eq!(choose(SIZES, 400_000), keep(100, 100));
        assert_eq!(choose(SIZES, 800_000), keep(200, 200));
        assert_eq!(choose(SIZES, 1 << 30), keep(512, 512));
        assert_eq!(choose(SIZES, 399_999), keep(100, 99));
        assert_eq!(choose(SIZES, 52_000), keep(100, 13));
        assert_eq!(choose(SIZES, 51_999), Variant::Recompute);
        // Accumulators: 1000 * (2 * 16 + 256) * 4 = 1,152,000 bytes, for pairs over 32 rows.
        let long = Sizes { longest_pair: 1000, ..SIZES };
        assert_eq!(choose(long, 1_152_000), Variant::Accumulators);
        assert_eq!(choose(long, 1_151_999), keep(1000, 287));
        assert_eq!(choose(long, 0), Variant::Recompute);
        let wide = Sizes { width: 600, ..long };
        assert_eq!(choose(wide, 3_999_999), keep(1000, 999));
    }

    #[test]
    fn the_default_grows_with_the_batch() {
        assert_eq!(default_budget(100, 1000, 4), 140 << 20);
        assert_eq!(default_budget(10_000, 150_000, 4), 750_000_000);
    }

    #[test]
    fn packing_keeps_order_and_limit() {
        assert_eq!(pack(&[3, 3, 3, 9, 1], 6), vec![2, 3, 4, 5]);
        assert_eq!(pack(&[1, 1, 1], 6), vec![3]);
        assert!(pack(&[], 6).is_empty());
    }
}
