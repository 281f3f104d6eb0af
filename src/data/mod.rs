//! Rows of a preference dataset: the token ids of a prompt with each of two answers.
//!
//! [`triplet`] puts a row together, [`truncate`] says what is cut from it, and `tokenize` (feature
//! `tokenize`, the only importer of the tokenizer library) encodes the text of whole batches.

#[cfg(feature = "tokenize")]
mod pool;
#[cfg(feature = "tokenize")]
pub mod text;
#[cfg(feature = "tokenize")]
pub mod tokenize;
pub mod triplet;
pub mod truncate;
pub mod words;
