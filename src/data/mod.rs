//! Rows of a preference dataset: token ids of a prompt with a chosen and a rejected answer.
//!
//! [`triplet`] builds a row, [`truncate`] decides what is cut from it, and `tokenize` (feature
//! `tokenize`, the only importer of the tokenizer library) encodes the text of batches.

#[cfg(feature = "tokenize")]
mod pool;
#[cfg(feature = "tokenize")]
pub mod text;
#[cfg(feature = "tokenize")]
pub mod tokenize;
pub mod triplet;
pub mod truncate;
pub mod words;
