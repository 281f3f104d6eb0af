//! Sums, means and maxima.

use std::ffi::c_int;

use torch_sys::C_tensor;

use super::call::operators;

type Tensor = *mut C_tensor;

operators! {
    atg_amax(x: Tensor, dims: *const i64, len: c_int, keep: c_int) =>
        c"aten::amax", c"", [Tensor(x), Ints(ints(dims, len)), Bool(keep != 0)];
    atg_max(x: Tensor) => c"aten::max", c"", [Tensor(x)];
    atg_mean(x: Tensor, dtype: c_int) => c"aten::mean", c"", [Tensor(x), Some(&Int(dtype.into()))];
    atg_sum(x: Tensor, dtype: c_int) => c"aten::sum", c"", [Tensor(x), Some(&Int(dtype.into()))];
    atg_sum_dim_intlist(x: Tensor, dims: *const i64, len: c_int, keep: c_int, dtype: c_int) =>
        c"aten::sum", c"dim_IntList",
        [Tensor(x), Some(&Ints(ints(dims, len))), Bool(keep != 0), Some(&Int(dtype.into()))];
}
