//! Operators through libtorch's dispatcher.

use std::ffi::{CStr, c_int, c_void};
use std::ptr::{self, NonNull};
use std::sync::OnceLock;

use torch_sys::C_tensor;

use super::error::{Result, check};
use super::handle::{Handle, Place, share};
use super::library::find;
use super::symbols::{List, StableValue, Torch, torch};
use super::waits::note_operator;

/// The release whose schemas the calls of this crate follow: the oldest that is supported.
const VERSION: u64 = (2 << 56) | (10 << 48);

/// An argument of an operator.
#[derive(Debug)]
pub enum Value<'a> {
    /// A tensor, of which the dispatcher gets a handle of its own.
    Tensor(*mut C_tensor),
    /// An integer, a dtype or a memory format.
    Int(i64),
    /// A boolean.
    Bool(bool),
    /// A device.
    Device(Place),
    /// Integers.
    Ints(&'a [i64]),
    /// Tensors.
    Tensors(&'a [*mut C_tensor]),
    /// An optional argument that is given.
    Some(&'a Value<'a>),
    /// An optional argument that is not.
    None,
}

impl Value<'_> {
    /// A dtype, by tch's number.
    pub fn dtype(number: c_int) -> Self {
        Self::Int(number.into())
    }

    /// The value as the dispatcher takes it over. What was made for a call that is then not made is
    /// lost: that takes an error of the memory allocator.
    fn stacked(&self, torch: &Torch) -> Result<StableValue> {
        Ok(match *self {
            Self::Tensor(x) => share(x)?.into_raw() as StableValue,
            Self::Int(value) => value as StableValue,
            Self::Bool(value) => value.into(),
            Self::Device(place) => {
                u64::from(place.kind.cast_unsigned()) << 32 | u64::from(place.index.cast_unsigned())
            }
            Self::Ints(values) => list(torch, values.iter().map(|&value| Ok(value as StableValue)))?,
            Self::Tensors(tensors) => {
                list(torch, tensors.iter().map(|&x| Ok(share(x)?.into_raw() as StableValue)))?
            }
            Self::Some(value) => optional(torch, value.stacked(torch)?)?,
            Self::None => 0,
        })
    }
}

fn list(torch: &Torch, values: impl ExactSizeIterator<Item = Result<StableValue>>) -> Result<StableValue> {
    let mut list: List = ptr::null_mut();
    // SAFETY: writes a new list.
    let code = unsafe { (torch.torch_new_list_reserve_size)(values.len(), &raw mut list) };
    check(torch, code, &|| "new list".into())?;
    for value in values {
        // SAFETY: a list of our own, which takes the value over.
        let code = unsafe { (torch.torch_list_push_back)(list, value?) };
        if code != 0 {
            // SAFETY: the list was not given away.
            unsafe { (torch.torch_delete_list)(list) };
        }
        check(torch, code, &|| "list".into())?;
    }
    Ok(list as StableValue)
}

/// `operator new` of the C++ library below libtorch.
fn operator_new() -> Option<unsafe extern "C" fn(usize) -> *mut c_void> {
    type New = unsafe extern "C" fn(usize) -> *mut c_void;
    static NEW: OnceLock<Option<New>> = OnceLock::new();
    // SAFETY: the function of this name; a name has the arguments in it.
    let read = || find(c"_Znwm").map(|new| unsafe { std::mem::transmute::<NonNull<c_void>, New>(new) });
    *NEW.get_or_init(read)
}

/// A value on the heap, which libtorch frees with its `operator delete`.
fn optional(torch: &Torch, value: StableValue) -> Result<StableValue> {
    let mut place: *mut StableValue = ptr::null_mut();
    match (torch.torch_new_stable_ivalue, operator_new()) {
        (Some(new), _) => {
            // SAFETY: writes a pointer.
            let code = unsafe { new(&raw mut place) };
            check(torch, code, &|| "new optional".into())?;
        }
        // SAFETY: `operator new`, of the library that libtorch uses.
        (None, Some(new)) => place = unsafe { new(size_of::<StableValue>()) }.cast(),
        // SAFETY: what `operator delete` frees where the C library is below it.
        (None, None) => place = unsafe { libc::malloc(size_of::<StableValue>()) }.cast(),
    }
    if place.is_null() {
        return Err("no memory for an optional argument".into());
    }
    // SAFETY: room for one value.
    unsafe { place.write(value) };
    Ok(place as StableValue)
}

/// Calls an operator with one tensor as its result.
///
/// # Errors
/// What libtorch reports, after the operator's name.
#[allow(clippy::needless_pass_by_value)] // made for the call
pub fn call<const N: usize>(op: &CStr, overload: &CStr, arguments: [Value<'_>; N]) -> Result<Handle> {
    let torch = torch()?;
    note_operator(op);
    let mut stack = [0; N];
    for (place, value) in stack.iter_mut().zip(&arguments) {
        *place = value.stacked(torch)?;
    }
    // SAFETY: the stack has the arguments of the schema, which has one result; handles on it are the
    // dispatcher's from here on.
    let code =
        unsafe { (torch.torch_call_dispatcher)(op.as_ptr(), overload.as_ptr(), stack.as_mut_ptr(), VERSION) };
    check(torch, code, &|| name(op, overload))?;
    // SAFETY: the result, which is ours.
    Ok(unsafe { Handle::from_raw(stack[0] as *mut C_tensor) })
}

fn name(op: &CStr, overload: &CStr) -> String {
    let (op, overload) = (op.to_string_lossy(), overload.to_string_lossy());
    if overload.is_empty() { op.into_owned() } else { format!("{op}.{overload}") }
}

/// The numbers that tch passes as a pointer and a length.
///
/// # Safety
/// `len` numbers are there.
pub unsafe fn ints<'a>(start: *const i64, len: c_int) -> &'a [i64] {
    if len <= 0 { &[] } else { unsafe { std::slice::from_raw_parts(start, len as usize) } }
}

/// The tensors that tch passes as a pointer and a length.
///
/// # Safety
/// `len` handles are there.
pub unsafe fn tensors<'a>(start: *const *mut C_tensor, len: c_int) -> &'a [*mut C_tensor] {
    if len <= 0 { &[] } else { unsafe { std::slice::from_raw_parts(start, len as usize) } }
}

/// Defines functions of tch as operators: `name(arguments) => operator, overload, [values];`. What tch
/// declares has a place for the result as its first argument.
macro_rules! operators {
    ($( $name:ident($($arg:ident: $ty:ty),*) => $op:literal, $overload:literal, [$($value:expr),* $(,)?]; )*) => { $(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name(out: *mut *mut torch_sys::C_tensor, $($arg: $ty),*) {
            #[allow(unused_imports)]
            use $crate::torch::abi::call::{Value::*, call, ints, tensors};
            // SAFETY: tch passes live handles, and pointers with their lengths.
            unsafe { $crate::torch::abi::handle::put(out, call($op, $overload, [$($value),*])) }
        }
    )* };
}
pub(super) use operators;

#[cfg(test)]
mod tests {
    use tch::Tensor;

    use super::*;
    use crate::torch::abi::handle::place_of;

    fn owned(handle: Handle) -> Tensor {
        // SAFETY: the handle is given up.
        unsafe { Tensor::from_ptr(handle.into_raw()) }
    }

    #[test]
    fn every_kind_of_argument_arrives() {
        let mut x = Tensor::f_from_slice(&[1.0f32, 2.0, 3.0, 4.0]).expect("a tensor");
        let handle = x.as_mut_ptr();
        let cpu = place_of(-1).expect("the CPU");
        let (double, copy) = (Value::dtype(7), Value::Bool(true));
        let arguments =
            [Value::Tensor(handle), Value::Device(cpu), double, Value::Bool(false), copy, Value::None];
        let moved = owned(call(c"aten::to", c"device", arguments).expect("a copy"));
        assert_ne!(moved.data_ptr(), x.data_ptr());
        assert_eq!(Vec::<f64>::try_from(&moved).expect("values"), [1.0, 2.0, 3.0, 4.0]);

        let rows = [handle, handle];
        let stacked = call(c"aten::stack", c"", [Value::Tensors(&rows), Value::Int(0)]).expect("rows");
        let dims = Value::Ints(&[0]);
        let arguments = [Value::Tensor(stacked.raw()), Value::Some(&dims), Value::Bool(true), Value::None];
        let sums = owned(call(c"aten::sum", c"dim_IntList", arguments).expect("sums"));
        assert_eq!(sums.size(), [1, 4]);
        assert_eq!(Vec::<f32>::try_from(sums.view([4])).expect("values"), [2.0, 4.0, 6.0, 8.0]);
    }

    #[test]
    fn an_operator_that_is_not_there_is_an_error() {
        let mut x = Tensor::f_from_slice(&[1i64]).expect("a tensor");
        let error = call(c"aten::no_such", c"overload", [Value::Tensor(x.as_mut_ptr())]);
        assert!(error.expect_err("none").starts_with("aten::no_such.overload: "));
    }
}
