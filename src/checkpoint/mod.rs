//! Quantises checkpoints on disk and merges adapters into them, without a model in memory.
//!
//! A checkpoint is a set of safetensors files. [`file`] reads one through the page cache, a window at a
//! time, and [`collection`] several as one; [`state`] has the entries that bitsandbytes stores with a 4-bit
//! weight; [`layout`] and [`output`] write a file whose sizes are known before its values. [`convert`]
//! goes through the tensors with rules of [`rule`]: each is copied, cast, updated by an adapter
//! ([`low_rank`]) or quantised ([`sink`]), a chunk at a time ([`source`]).

pub mod bytes;
pub mod collection;
pub mod convert;
pub mod engine;
pub mod file;
pub mod layout;
pub mod low_rank;
pub mod output;
pub mod rule;
pub mod sink;
pub mod source;
pub mod state;

#[cfg(test)]
mod tests;

/// Values in a chunk: 16 MiB of `bf16`. A multiple of every block size.
pub const CHUNK: usize = 8 << 20;
