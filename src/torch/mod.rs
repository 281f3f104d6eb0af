//! The algorithms on libtorch's tensors: checks, views, and one file per op.

pub mod adamw;
mod adamw_cuda;
mod blockwise8_cuda;
pub mod checkpoint;
pub mod cuda;
pub mod gemm;
pub mod head;
mod head_batch;
pub mod head_cuda;
mod head_kernels;
pub mod head_ops;
pub mod linear4bit;
mod nf4_cuda;
pub mod pages;
#[cfg(target_os = "linux")]
pub mod pool;
pub mod quant;
pub mod quant_ops;
pub mod team;
pub mod view;
