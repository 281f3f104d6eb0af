//! For tests only, with the cargo feature `testing`: switches between the paths of an op, and the kernels'
//! binaries.

use std::collections::{BTreeMap, HashMap};
use std::ffi::c_void;
use std::mem::transmute;

use pyo3::prelude::*;

use super::error::detached;
use crate::base::error::Error;
use crate::cuda::nvrtc::{SMALL_ARGUMENTS, nvrtc};
use crate::cuda::{self, kernels};
use crate::torch::{abi, device};

/// Names of the sources of kernels.
#[pyfunction]
fn kernel_sources() -> Vec<&'static str> {
    kernels::ALL.iter().map(|source| source.name).collect()
}

/// Compiles a source for an architecture such as `sm_90`, and returns the binary and the compiler's report of
/// every kernel. The cache on disk is not used. With `small_arguments`, for a driver before CUDA 12.1.
#[pyfunction]
#[pyo3(signature = (source, architecture, small_arguments=false))]
fn compile_kernels(
    py: Python<'_>,
    source: &str,
    architecture: &str,
    small_arguments: bool,
) -> PyResult<(Vec<u8>, String)> {
    let known: HashMap<_, _> = kernels::ALL.iter().map(|source| (source.name, *source)).collect();
    let compiled = detached(py, || {
        let failed = |message| Error::Cuda { kernel: String::new(), launch: String::new(), message };
        let Some(code) = known.get(source) else {
            return Err(failed(format!("no kernel source is named {source:?}")));
        };
        let options = ["--ptxas-options=-v", SMALL_ARGUMENTS];
        let options = &options[..=usize::from(small_arguments)];
        nvrtc().and_then(|nvrtc| nvrtc.compile(code, architecture, options)).map_err(failed)
    })?;
    Ok((compiled.cubin, compiled.log))
}

/// Makes CPU tensors take the path of other devices.
#[pyfunction]
fn use_tensor_ops(on: bool) {
    device::use_tensor_ops(on);
}

/// Makes CPU tensors take the path of CUDA tensors, with the driver in `ODDSMITH_CUDA_DRIVER`.
#[pyfunction]
fn emulate_cuda(on: bool) {
    cuda::emulate(on);
}

/// CPU tensors are on the emulated GPU of this index from now on.
#[pyfunction]
fn emulate_gpu(gpu: i32) {
    device::emulate_gpu(gpu);
}

/// How often the core made the host wait for a GPU or copied between the two since the last call, by what.
#[pyfunction]
fn host_waits() -> BTreeMap<&'static str, u64> {
    abi::waits::taken()
}

/// Asks the C function at `address`, which is as `aoti_torch_get_current_cuda_stream`, for the current stream of
/// the emulated GPU; 0 for the default stream.
#[pyfunction]
#[allow(unsafe_code)] // an address from Python
fn emulate_streams(address: usize) {
    let pointer = std::ptr::with_exposed_provenance::<c_void>(address);
    // SAFETY: null, or a function of this signature, as tests promise.
    device::emulate_streams(unsafe { transmute::<*const c_void, Option<device::StreamOf>>(pointer) });
}

/// Adds the functions to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(kernel_sources, module)?)?;
    module.add_function(wrap_pyfunction!(compile_kernels, module)?)?;
    module.add_function(wrap_pyfunction!(use_tensor_ops, module)?)?;
    module.add_function(wrap_pyfunction!(emulate_cuda, module)?)?;
    module.add_function(wrap_pyfunction!(emulate_gpu, module)?)?;
    module.add_function(wrap_pyfunction!(host_waits, module)?)?;
    module.add_function(wrap_pyfunction!(emulate_streams, module)?)
}
