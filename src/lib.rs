//! The hot path of oddsmith: ORPO (odds-ratio preference optimisation) without the logits.
//!
//! Algorithms work on slices and know neither torch nor Python: [`odds_ratio`], [`head`], [`data`],
//! [`quant`], [`optim`], [`checkpoint`]. Adapters carry them to tensors (`torch`), to NVIDIA's cards (`cuda`)
//! and to Python (`python`), each behind a cargo feature of its name, so that an import in the wrong
//! direction does not compile.

pub mod arena;
pub mod checkpoint;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod data;
pub mod error;
pub mod head;
mod huge_pages;
pub mod odds_ratio;
pub mod optim;
pub mod quant;
#[cfg(feature = "torch")]
pub mod torch;

#[cfg(feature = "python")]
mod python;
