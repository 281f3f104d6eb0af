//! Rules: how each tensor is converted.

use crate::base::float::Dtype;

/// How a tensor is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// In this dtype.
    Float(Dtype),
    /// As 4-bit codes, with the entries of bitsandbytes.
    Nf4 {
        /// Dtype that values are rounded to before quantisation: the dtype of the model in memory.
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
    /// Use its transpose.
    pub transposed: bool,
}

/// The update of an adapter to a matrix: `scale * left right`.
#[derive(Clone, Debug, PartialEq)]
pub struct MergeUpdate {
    /// `(rows, rank)`.
    pub left: Factor,
    /// `(rank, columns)`; one column for a vector.
    pub right: Option<Factor>,
    /// Factor on the product.
    pub scale: f32,
    /// Norms that the rows of the sum are scaled to (`DoRA`), by name in the adapter.
    pub magnitude: Option<String>,
}

/// How a tensor is converted; tensors without a rule are copied.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorRule {
    /// Its name, before and after.
    pub name: String,
    /// A tensor of the adapter that replaces it.
    pub replacement: Option<String>,
    /// The update that is added.
    pub update: Option<MergeUpdate>,
    /// Written as its transpose.
    pub transposed: bool,
    /// How it is written.
    pub target: Target,
}
