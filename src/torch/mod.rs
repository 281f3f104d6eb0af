//! The algorithms on libtorch's tensors: checks, views, and one folder of ops per folder of algorithms.
//!
//! A folder has the arguments of all its backends in `args`; `mod` checks them and picks the backend:
//! slices on the CPU, kernels on NVIDIA GPUs (`cuda`), libtorch's ops elsewhere (`ops`).

pub mod abi;
pub mod allocator;
pub mod checkpoint;
pub mod device;
pub mod dtype;
pub mod gemm;
pub mod head;
pub mod large;
pub mod optim;
pub mod quant;
pub mod threads;
pub mod view;
