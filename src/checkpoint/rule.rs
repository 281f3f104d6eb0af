//! What becomes of a tensor.

use crate::base::float::Dtype;

/// How a tensor is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Under this dtype.
    Float(Dtype),
    /// As 4-bit codes, with the entries of bitsandbytes.
    Nf4 {
        /// Dtype that values are rounded to before they are quantised: that of the model in memory.
        dtype: Dtype,
        /// Values that share a scale.
        blocksize: usize,
        /// Quantise the scales to 8 bits.
        double: bool,
    },
}

impl Target {
    /// The dtype that values are rounded to.
    #[must_use]
    pub fn dtype(self) -> Dtype {
        match self {
            Target::Float(dtype) | Target::Nf4 { dtype, .. } => dtype,
        }
    }
}

/// A small matrix of an adapter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Factor {
    /// Its name in the adapter.
    pub name: String,
    /// Its transpose is meant.
    pub transposed: bool,
}

/// What an adapter adds to a matrix: `scale * left right`.
#[derive(Clone, Debug, PartialEq)]
pub struct MergeUpdate {
    /// `(rows, rank)`.
    pub left: Factor,
    /// `(rank, columns)`; a single one for a vector.
    pub right: Option<Factor>,
    /// Factor on the product.
    pub scale: f32,
    /// Lengths that the rows of the sum are brought to (`DoRA`), by name in the adapter.
    pub magnitude: Option<String>,
}

/// What becomes of a tensor that is not copied as it is.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorRule {
    /// Its name, before and after.
    pub name: String,
    /// A tensor of the adapter that takes its place.
    pub replacement: Option<String>,
    /// What is added.
    pub update: Option<MergeUpdate>,
    /// Written as its transpose.
    pub transposed: bool,
    /// How it is written.
    pub target: Target,
}
