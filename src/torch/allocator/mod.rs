//! Memory of CPU tensors: [`arena`] says where a buffer goes, [`pool`] hands buffers to libtorch, which
//! `vtable` puts it into.

pub mod arena;
#[cfg(target_os = "linux")]
pub mod pool;
#[cfg(target_os = "linux")]
mod vtable;
