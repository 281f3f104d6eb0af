//! libtorch's matrix products on slices.

use super::view::{Element, borrow};
use crate::base::error::Result;
use crate::base::gemm::{Dims, Gemm};
use crate::base::real::Real;

/// Products through libtorch: on the CPU that is the BLAS it was built with.
#[derive(Clone, Copy, Debug)]
pub struct LibTorch;

impl<T: Real + Element> Gemm<T> for LibTorch {
    fn logits(&self, dims: Dims, hidden: &[T], weight: &[T], logits: &mut [T]) -> Result<()> {
        let out = borrow(logits, dims.rows, dims.tile)?;
        let weight = borrow(weight, dims.tile, dims.width)?.f_tr()?;
        let _ = borrow(hidden, dims.rows, dims.width)?.f_mm_out(&out, &weight)?;
        Ok(())
    }

    fn d_hidden(&self, dims: Dims, grad: &[T], weight: &[T], d_hidden: &mut [T]) -> Result<()> {
        let mut out = borrow(d_hidden, dims.rows, dims.width)?;
        let grad = borrow(grad, dims.rows, dims.tile)?;
        let _ = out.f_addmm_(&grad, &borrow(weight, dims.tile, dims.width)?)?;
        Ok(())
    }

    fn d_weight(
        &self,
        dims: Dims,
        grad: &[T],
        hidden: &[T],
        d_weight: &mut [T],
        accumulate: bool,
    ) -> Result<()> {
        let mut out = borrow(d_weight, dims.tile, dims.width)?;
        let grad = borrow(grad, dims.rows, dims.tile)?.f_tr()?;
        let hidden = borrow(hidden, dims.rows, dims.width)?;
        if accumulate {
            let _ = out.f_addmm_(&grad, &hidden)?;
        } else {
            let _ = grad.f_mm_out(&out, &hidden)?;
        }
        Ok(())
    }
}
