//! The algorithms on libtorch's tensors: checks, views, and one file per op.

pub mod gemm;
pub mod head;
pub mod head_ops;
pub mod linear4bit;
pub mod pages;
pub mod quant;
pub mod quant_ops;
pub mod team;
pub mod view;
