//! The hot path of oddsmith: ORPO (odds-ratio preference optimisation) without the logits.
//!
//! Algorithms work on slices, without torch and Python: [`head`], [`data`], [`quant`], [`optim`],
//! [`checkpoint`], with shared code in [`base`]. Adapters carry them to tensors (`torch`), to NVIDIA GPUs
//! (`cuda`) and to Python (`python`), each behind a cargo feature of its name, so that an import in the
//! wrong direction does not compile.

pub mod base;
pub mod checkpoint;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod data;
pub mod head;
pub mod optim;
pub mod quant;
#[cfg(feature = "torch")]
pub mod torch;

#[cfg(feature = "python")]
mod python;
#[cfg(test)]
mod rooms;
