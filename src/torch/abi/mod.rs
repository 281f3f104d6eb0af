//! libtorch by its stable C interface: the functions that `tch` lacks when it is built without libtorch.
//!
//! `tch` declares `at_*`, `atg_*` and `ats_*`, which torch-sys would compile in C++ against the headers of
//! one release of torch. Here those that this crate reaches are defined in Rust over functions that libtorch
//! keeps from release to release (`aoti_torch_*`, `torch_*`), looked up in the libtorch that Python has
//! loaded. So one library serves every torch, and needs none to be built. A function of `tch` that is newly
//! used and not defined here is an undefined symbol of the library, which a test reports.
//!
//! Ownership: a `C_tensor` is a handle that its holder deletes. A handle put on the dispatcher's stack is
//! taken over by libtorch, whether the operator fails or not; results come back owned.
#![allow(unsafe_code)] // the C interface of libtorch, and that which tch expects

mod arithmetic;
mod call;
mod error;
mod factories;
mod handle;
mod indexing;
mod library;
mod pointwise;
mod products;
mod reductions;
mod scalar;
mod tensor;
mod views;
pub mod waits;

pub mod symbols;
pub use library::{Fault, find};
pub use symbols::load;
