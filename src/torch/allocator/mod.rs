//! Memory of CPU tensors: [`arena`] places buffers, [`pool`] gives them to libtorch, through `vtable`.

pub mod arena;
#[cfg(target_os = "linux")]
pub mod pool;
#[cfg(target_os = "linux")]
mod vtable;
