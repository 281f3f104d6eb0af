//! The table of libtorch's functions, read once.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::OnceLock;

use torch_sys::C_tensor;

use super::library::{self, Fault};

/// What the dispatcher's stack has in each place: a number, or a pointer that is owned.
pub type StableValue = u64;
/// Zero, or something went wrong.
pub type Code = i32;
/// A list on the dispatcher's stack.
pub type List = *mut c_void;

type Tensor = *mut C_tensor;
type Out<T> = *mut T;

/// A table of functions: those that every torch from 2.10 on has, and those that a newer one has, or one
/// with CUDA.
macro_rules! table {
    (
        required { $( $name:ident($($arg:ty),*) $(-> $ret:ty)?; )* }
        optional { $( $maybe:ident($($maybe_arg:ty),*) $(-> $maybe_ret:ty)?; )* }
    ) => {
        /// Functions of libtorch.
        #[allow(missing_docs, non_snake_case)] // libtorch's names
        #[derive(Debug)]
        pub struct Torch {
            $( pub $name: unsafe extern "C" fn($($arg),*) $(-> $ret)?, )*
            $( pub $maybe: Option<unsafe extern "C" fn($($maybe_arg),*) $(-> $maybe_ret)?>, )*
        }

        impl Torch {
            /// Looks the functions up.
            ///
            /// # Errors
            /// The names of those that are missing.
            #[allow(non_snake_case)] // as above
            fn read(find: &dyn Fn(&CStr) -> Option<NonNull<c_void>>) -> Result<Self, Vec<&'static str>> {
                let mut missing = Vec::new();
                let name = |text: &'static str| {
                    CStr::from_bytes_with_nul(text.as_bytes()).unwrap_or_default()
                };
                $(
                    let $name = find(name(concat!(stringify!($name), "\0")));
                    if $name.is_none() {
                        missing.push(stringify!($name));
                    }
                    let $name = $name.unwrap_or(NonNull::dangling());
                )*
                if !missing.is_empty() {
                    return Err(missing);
                }
                // SAFETY: each address is that of the function of this name, whose signature is part of
                // the stable interface.
                Ok(unsafe {
                    Self {
                        $( $name: std::mem::transmute::<
                            NonNull<c_void>,
                            unsafe extern "C" fn($($arg),*) $(-> $ret)?
                        >($name), )*
                        $( $maybe: std::mem::transmute::<
                            Option<NonNull<c_void>>,
                            Option<unsafe extern "C" fn($($maybe_arg),*) $(-> $maybe_ret)?>
                        >(find(name(concat!(stringify!($maybe), "\0")))), )*
                    }
                })
            }
        }
    };
}

table! {
    required {
        aoti_torch_delete_tensor_object(Tensor) -> Code;
        aoti_torch_new_tensor_handle(Tensor, Out<Tensor>) -> Code;
        aoti_torch_new_uninitialized_tensor(Out<Tensor>) -> Code;
        aoti_torch_is_defined(Tensor, Out<bool>) -> Code;
        aoti_torch_is_contiguous(Tensor, Out<bool>) -> Code;
        aoti_torch_get_data_ptr(Tensor, Out<*mut c_void>) -> Code;
        aoti_torch_get_dim(Tensor, Out<i64>) -> Code;
        aoti_torch_get_numel(Tensor, Out<i64>) -> Code;
        aoti_torch_get_sizes(Tensor, Out<*const i64>) -> Code;
        aoti_torch_get_strides(Tensor, Out<*const i64>) -> Code;
        aoti_torch_get_dtype(Tensor, Out<i32>) -> Code;
        aoti_torch_get_device_type(Tensor, Out<i32>) -> Code;
        aoti_torch_get_device_index(Tensor, Out<i32>) -> Code;
        aoti_torch_empty_strided(i64, *const i64, *const i64, i32, i32, i32, Out<Tensor>) -> Code;
        aoti_torch_create_tensor_from_blob(
            *mut c_void, i64, *const i64, *const i64, i64, i32, i32, i32, Out<Tensor>
        ) -> Code;
        aoti_torch_copy_(Tensor, Tensor, i32) -> Code;
        aoti_torch_zero_(Tensor) -> Code;
        aoti_torch_item_float64(Tensor, Out<f64>) -> Code;
        aoti_torch_item_int64(Tensor, Out<i64>) -> Code;
        aoti_torch_scalar_to_tensor_float64(f64, Out<Tensor>) -> Code;
        aoti_torch_scalar_to_tensor_int64(i64, Out<Tensor>) -> Code;
        aoti_torch_grad_mode_is_enabled() -> bool;
        aoti_torch_grad_mode_set_enabled(bool);
        aoti_torch_aten_subtract_Tensor(Tensor, Tensor, f64, Out<Tensor>) -> Code;
        aoti_torch_aten_pad(Tensor, *const i64, i64, *const c_char, *const f64, Out<Tensor>) -> Code;
        aoti_torch_cpu_addmm_out(Tensor, Tensor, Tensor, Tensor, f64, f64) -> Code;
        aoti_torch_dtype_element_size(i32) -> usize;
        aoti_torch_dtype_uint8() -> i32;
        aoti_torch_dtype_int8() -> i32;
        aoti_torch_dtype_int16() -> i32;
        aoti_torch_dtype_int32() -> i32;
        aoti_torch_dtype_int64() -> i32;
        aoti_torch_dtype_float16() -> i32;
        aoti_torch_dtype_float32() -> i32;
        aoti_torch_dtype_float64() -> i32;
        aoti_torch_dtype_bool() -> i32;
        aoti_torch_dtype_bfloat16() -> i32;
        aoti_torch_device_type_cpu() -> i32;
        aoti_torch_device_type_cuda() -> i32;
        aoti_torch_device_type_mps() -> i32;
        aoti_torch_memory_format_contiguous_format() -> i32;
        torch_call_dispatcher(*const c_char, *const c_char, *mut StableValue, u64) -> Code;
        torch_new_list_reserve_size(usize, Out<List>) -> Code;
        torch_list_push_back(List, StableValue) -> Code;
        torch_delete_list(List) -> Code;
        torch_get_num_threads(Out<u32>) -> Code;
    }
    optional {
        aoti_torch_cuda_addmm_out(Tensor, Tensor, Tensor, Tensor, f64, f64) -> Code;
        aoti_torch_get_current_cuda_stream(i32, Out<*mut c_void>) -> Code;
        torch_exception_get_what_without_backtrace() -> *const c_char;
        torch_new_stable_ivalue(Out<*mut StableValue>) -> Code;
        torch_tensor_from_pyobject(*mut c_void, Out<Tensor>) -> Code;
        torch_tensor_to_pyobject(Tensor, *mut c_void, Out<*mut c_void>) -> Code;
    }
}

/// A name of the stable interface, and the number that tch gives to it.
type Number = (&'static str, i32, c_int);

impl Torch {
    /// Checks that dtypes have the numbers that tch gives to them.
    fn check_numbers(&self) -> Result<(), String> {
        // SAFETY: functions that return a constant.
        let numbers: [Number; 10] = unsafe {
            [
                ("uint8", (self.aoti_torch_dtype_uint8)(), 0),
                ("int8", (self.aoti_torch_dtype_int8)(), 1),
                ("int16", (self.aoti_torch_dtype_int16)(), 2),
                ("int32", (self.aoti_torch_dtype_int32)(), 3),
                ("int64", (self.aoti_torch_dtype_int64)(), 4),
                ("float16", (self.aoti_torch_dtype_float16)(), 5),
                ("float32", (self.aoti_torch_dtype_float32)(), 6),
                ("float64", (self.aoti_torch_dtype_float64)(), 7),
                ("bool", (self.aoti_torch_dtype_bool)(), 11),
                ("bfloat16", (self.aoti_torch_dtype_bfloat16)(), 15),
            ]
        };
        match numbers.iter().find(|(_, found, wanted)| found != wanted) {
            None => Ok(()),
            Some((name, found, wanted)) => Err(format!("numbers {name} {found} instead of {wanted}")),
        }
    }
}

static TORCH: OnceLock<Result<Torch, String>> = OnceLock::new();

fn read() -> Result<Torch, String> {
    let torch = Torch::read(&library::find).map_err(|missing| format!("lacks {}", missing.join(", ")))?;
    torch.check_numbers()?;
    Ok(torch)
}

/// Reads the table from the torch whose folder `lib` this is.
///
/// # Errors
/// What this torch lacks, or the other one that is loaded.
pub fn load(folder: &Path) -> Result<(), Fault> {
    library::open_all(folder)?;
    TORCH.get_or_init(read).as_ref().map(|_| ()).map_err(|lack| Fault::Incomplete(lack.clone()))
}

/// The table.
///
/// # Errors
/// What [`load`] found missing, or that it was not called.
pub fn torch() -> Result<&'static Torch, String> {
    #[cfg(test)]
    tests::load_torch();
    match TORCH.get() {
        Some(Ok(torch)) => Ok(torch),
        Some(Err(error)) => Err(format!("this torch {error}")),
        None => Err("libtorch is not loaded".into()),
    }
}

/// The table of a torch that lacks these functions.
///
/// # Errors
/// Those of them that every torch has.
///
/// # Panics
/// If there is no torch.
#[cfg(test)]
pub fn without(hidden: &[&str]) -> Result<Torch, Vec<&'static str>> {
    torch().expect("torch");
    Torch::read(&|name| {
        let hide = hidden.iter().any(|hidden| hidden.as_bytes() == name.to_bytes());
        if hide { None } else { library::find(name) }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Finds the torch of the Python that is built for, without Python in this process.
    pub(super) fn load_torch() {
        static ONCE: OnceLock<()> = OnceLock::new();
        ONCE.get_or_init(|| {
            let python = std::env::var("PYO3_PYTHON").unwrap_or_else(|_| "python3".into());
            let script = "import torch, os; print(os.path.join(os.path.dirname(torch.__file__), 'lib'))";
            let output = std::process::Command::new(&python).args(["-c", script]).output();
            let output = output.expect("Python runs");
            let folder = String::from_utf8(output.stdout).expect("a path");
            load(Path::new(folder.trim())).expect("torch");
        });
    }

    #[test]
    fn missing_functions_are_named() {
        let error = without(&["torch_delete_list", "aoti_torch_zero_"]).expect_err("hidden");
        assert_eq!(error, ["aoti_torch_zero_", "torch_delete_list"]);
        let older = without(&["torch_tensor_to_pyobject"]).expect("an optional one");
        assert!(older.torch_tensor_to_pyobject.is_none());
    }
}
