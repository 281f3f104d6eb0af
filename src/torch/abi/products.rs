//! Products of matrices.

use std::ffi::c_int;

use torch_sys::C_tensor;

use super::call::{Value, call, operators};
use super::error::{Result, check};
use super::handle::{place, place_of, put, share};
use super::symbols::torch;

type Tensor = *mut C_tensor;

operators! {
    atg_matmul(x: Tensor, y: Tensor) => c"aten::matmul", c"", [Tensor(x), Tensor(y)];
    atg_mm(x: Tensor, y: Tensor) => c"aten::mm", c"", [Tensor(x), Tensor(y)];
    atg_mm_out(to: Tensor, x: Tensor, y: Tensor) => c"aten::mm", c"out", [Tensor(x), Tensor(y), Tensor(to)];
    atg_mm_dtype(x: Tensor, y: Tensor, dtype: c_int) =>
        c"aten::mm", c"dtype", [Tensor(x), Tensor(y), Int(dtype.into())];
    atg_mm_dtype_out(to: Tensor, x: Tensor, y: Tensor, dtype: c_int) =>
        c"aten::mm", c"dtype_out", [Tensor(x), Tensor(y), Int(dtype.into()), Tensor(to)];
    atg_mv(x: Tensor, y: Tensor) => c"aten::mv", c"", [Tensor(x), Tensor(y)];
}

/// `to = base + x y`. The operator has two scalars, which have no stable form; the functions in C are those
/// of the CPU and of CUDA. Elsewhere the product is added to `base` by itself.
fn addmm(to: Tensor, base: Tensor, x: Tensor, y: Tensor) -> Result<()> {
    let torch = torch()?;
    let place = place(to)?;
    let function = if place.kind == place_of(-1)?.kind {
        Some(torch.aoti_torch_cpu_addmm_out)
    } else if place.kind == place_of(0)?.kind {
        torch.aoti_torch_cuda_addmm_out
    } else {
        None
    };
    let Some(function) = function else { return addmm_in_two(to, base, x, y) };
    // SAFETY: live handles.
    let code = unsafe { function(to, base, x, y, 1.0, 1.0) };
    check(torch, code, &|| "aten::addmm.out".into())
}

fn addmm_in_two(to: Tensor, base: Tensor, x: Tensor, y: Tensor) -> Result<()> {
    let product = call(c"aten::mm", c"", [Value::Tensor(x), Value::Tensor(y)])?;
    super::arithmetic::add_into(to, base, product.raw())
}

#[unsafe(no_mangle)]
unsafe extern "C" fn atg_addmm_out(out: *mut Tensor, to: Tensor, base: Tensor, x: Tensor, y: Tensor) {
    // SAFETY: tch's arguments, here and below.
    unsafe { put(out, addmm(to, base, x, y).and_then(|()| share(to))) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn atg_addmm_(out: *mut Tensor, to: Tensor, x: Tensor, y: Tensor) {
    unsafe { put(out, addmm(to, to, x, y).and_then(|()| share(to))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_product_is_added_without_the_function_of_a_device() {
        let matrix = |values: &[f32]| tch::Tensor::f_from_slice(values).expect("a tensor").view([2, 2]);
        let (mut x, mut y) = (matrix(&[1.0, 2.0, 3.0, 4.0]), matrix(&[5.0, 6.0, 7.0, 8.0]));
        let (mut to, mut base) = (matrix(&[f32::NAN; 4]), matrix(&[0.5, 0.0, 0.0, -0.5]));
        let (to_handle, base_handle) = (to.as_mut_ptr(), base.as_mut_ptr());
        addmm_in_two(to_handle, base_handle, x.as_mut_ptr(), y.as_mut_ptr()).expect("a sum");
        let expected = [19.5, 22.0, 43.0, 49.5];
        assert_eq!(Vec::<f32>::try_from(to.view([4])).expect("values"), expected);
        // Onto itself, as `addmm_` does.
        addmm_in_two(base_handle, base_handle, x.as_mut_ptr(), y.as_mut_ptr()).expect("a sum");
        assert_eq!(Vec::<f32>::try_from(base.view([4])).expect("values"), expected);
    }
}
