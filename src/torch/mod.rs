//! The algorithms on libtorch's tensors: checks, views, and one file per op.

pub mod gemm;
pub mod head;
pub mod head_ops;
#[cfg(target_os = "linux")]
pub mod pool;
pub mod team;
pub mod view;
