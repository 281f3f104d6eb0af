//! Memory of CPU tensors: [`arena`] places buffers, [`pool`] gives them to libtorch.

pub mod arena;
#[cfg(target_os = "linux")]
pub mod pool;
