//! Memory of CPU tensors: [`arena`] says where a buffer goes, [`pool`] hands buffers to libtorch.

pub mod arena;
#[cfg(target_os = "linux")]
pub mod pool;
