//! `c10::Allocator` without C++: its table of virtual functions by hand.
//!
//! libtorch offers no stable way to replace the allocator of CPU tensors. Its class has had the same virtual
//! functions from torch 2.8 to 2.15; whether this libtorch has them is checked in its own table of that
//! class, before anything is called, and on one allocation. Where something differs there is no pool.
#![allow(unsafe_code)] // an object of C++ by hand

use std::ffi::{CStr, c_void};
use std::mem::transmute;
use std::ptr::{self, NonNull};
use std::sync::OnceLock;

use crate::torch::abi::find;

/// A function that frees what an allocator has made.
pub type Deleter = unsafe extern "C-unwind" fn(*mut c_void);

/// `c10::DataPtr`: where the data is, what owns it and how it is freed, and its device. The tuple inside
/// of libstdc++'s `unique_ptr` has its last member first.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct DataPtr {
    data: *mut c_void,
    deleter: Option<Deleter>,
    context: *mut c_void,
    /// Type and index, a byte each: the CPU is 0, and -1 stands for the one that there is.
    device: [i8; 8],
}

const CPU: [i8; 8] = [0, -1, 0, 0, 0, 0, 0, 0];

impl DataPtr {
    /// Data on the CPU that `deleter` frees.
    pub fn new(data: *mut c_void, deleter: Deleter) -> Self {
        Self { data, deleter: Some(deleter), context: data, device: CPU }
    }
}

/// An allocator: a pointer to its functions comes first, and the rest is its own.
#[repr(C)]
pub struct Allocator {
    functions: *const Functions,
}

// SAFETY: never written after it is made, and so are the functions.
unsafe impl Sync for Allocator {}

/// The virtual functions in their order. libtorch throws from `allocate` if there is no memory: that
/// passes through us.
#[repr(C)]
pub struct Functions {
    destroy: unsafe extern "C-unwind" fn(*mut Allocator),
    delete: unsafe extern "C-unwind" fn(*mut Allocator),
    allocate: unsafe extern "C-unwind" fn(*mut Allocator, usize) -> DataPtr,
    is_simple: unsafe extern "C-unwind" fn(*const Allocator, *const DataPtr) -> bool,
    raw_deleter: unsafe extern "C-unwind" fn(*const Allocator) -> Option<Deleter>,
    copy: unsafe extern "C-unwind" fn(*const Allocator, *mut c_void, *const c_void, usize),
}

/// What GCC and Clang put before the functions: the offset to the whole object, and the class.
const BEFORE: usize = 2;
const COUNT: usize = size_of::<Functions>() / size_of::<usize>();

/// libtorch's two functions.
struct Setting {
    get: unsafe extern "C-unwind" fn() -> *mut Allocator,
    set: unsafe extern "C-unwind" fn(*mut Allocator, u8),
}

/// The size of the object in a library that begins at `address`.
fn size_of_symbol(address: NonNull<c_void>) -> Option<usize> {
    type DlAddr1 =
        unsafe extern "C" fn(*const c_void, *mut libc::Dl_info, *mut *mut c_void, libc::c_int) -> libc::c_int;
    const SYMBOL: libc::c_int = 1; // RTLD_DL_SYMENT
    // SAFETY: looks up glibc's function.
    let function = NonNull::new(unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"dladdr1".as_ptr()) })?;
    // SAFETY: the signature in glibc's manual.
    let function = unsafe { transmute::<NonNull<c_void>, DlAddr1>(function) };
    let (mut info, mut entry) = (std::mem::MaybeUninit::<libc::Dl_info>::uninit(), ptr::null_mut());
    // SAFETY: writes both.
    let found = unsafe { function(address.as_ptr(), info.as_mut_ptr(), &raw mut entry, SYMBOL) };
    if found == 0 || entry.is_null() {
        return None;
    }
    // SAFETY: an entry of the library's table of symbols.
    usize::try_from(unsafe { (*entry.cast::<libc::Elf64_Sym>()).st_size }).ok()
}

/// True if libtorch's class has the functions of [`Functions`] and no others: its own table has the one
/// that it defines in its place, and the same placeholder for those that it leaves to others.
fn same_functions(find: &dyn Fn(&CStr) -> Option<NonNull<c_void>>) -> Option<bool> {
    let table = find(c"_ZTVN3c109AllocatorE")?;
    if size_of_symbol(table)? != (BEFORE + COUNT) * size_of::<usize>() {
        return Some(false);
    }
    // SAFETY: the table has this many entries, as was just seen.
    let entries = unsafe { std::slice::from_raw_parts(table.cast::<usize>().as_ptr(), BEFORE + COUNT) };
    let is_simple = find(c"_ZNK3c109Allocator18is_simple_data_ptrERKNS_7DataPtrE")?.as_ptr() as usize;
    let left = find(c"__cxa_pure_virtual")?.as_ptr() as usize;
    let functions = &entries[BEFORE..];
    Some([functions[2], functions[3], functions[5]] == [left, is_simple, left])
}

/// True if what libtorch's allocator makes is laid out as [`DataPtr`].
///
/// # Safety
/// Its functions are those of [`Functions`].
unsafe fn same_data(allocator: *mut Allocator) -> bool {
    /// Room for a larger one.
    #[repr(C)]
    struct Large(DataPtr, [usize; 12]);
    type AllocateLarge = unsafe extern "C-unwind" fn(*mut Allocator, usize) -> Large;
    // SAFETY: a function that writes its result where it is told to.
    unsafe {
        let functions = &*(*allocator).functions;
        let allocate = transmute::<
            unsafe extern "C-unwind" fn(*mut Allocator, usize) -> DataPtr,
            AllocateLarge,
        >(functions.allocate);
        let Large(made, _) = allocate(allocator, 64);
        let Some(deleter) = (functions.raw_deleter)(allocator) else { return false };
        let same = !made.data.is_null()
            && made.data == made.context
            && made.deleter.is_some_and(|own| ptr::fn_addr_eq(own, deleter))
            && made.device[..2] == CPU[..2];
        if same {
            deleter(made.context);
        }
        same
    }
}

fn setting() -> Option<&'static Setting> {
    static SETTING: OnceLock<Option<Setting>> = OnceLock::new();
    let read = || {
        let (get, set) =
            (find(c"_ZN3c1015GetCPUAllocatorEv")?, find(c"_ZN3c1015SetCPUAllocatorEPNS_9AllocatorEh")?);
        // SAFETY: the functions of these names; a name has the arguments in it.
        let setting = unsafe {
            Setting {
                get: transmute::<NonNull<c_void>, unsafe extern "C-unwind" fn() -> *mut Allocator>(get),
                set: transmute::<NonNull<c_void>, unsafe extern "C-unwind" fn(*mut Allocator, u8)>(set),
            }
        };
        // SAFETY: the functions were compared.
        let same = same_functions(&find)? && unsafe { same_data((setting.get)()) };
        same.then_some(setting)
    };
    SETTING.get_or_init(read).as_ref()
}

/// What hands out memory and takes it back; set before ours is installed.
pub struct Hooks {
    /// A place of this size, or null where the allocator below is to make it.
    pub allocate: fn(usize) -> *mut c_void,
    /// Takes a place back; false if it is none of ours.
    pub free: fn(*mut c_void) -> bool,
}

static HOOKS: OnceLock<Hooks> = OnceLock::new();

/// The allocator below, which was there first.
struct Below(*mut Allocator, Deleter);
// SAFETY: libtorch's allocator is used from every thread.
unsafe impl Sync for Below {}
unsafe impl Send for Below {}
static BELOW: OnceLock<Below> = OnceLock::new();

unsafe extern "C-unwind" fn destroy(_: *mut Allocator) {}

unsafe extern "C-unwind" fn allocate(_: *mut Allocator, size: usize) -> DataPtr {
    let data = HOOKS.get().map_or(ptr::null_mut(), |hooks| (hooks.allocate)(size));
    match BELOW.get() {
        // SAFETY: the allocator that was there before, with its own function.
        Some(below) if data.is_null() => unsafe { ((*(*below.0).functions).allocate)(below.0, size) },
        _ => DataPtr::new(data, release),
    }
}

unsafe extern "C-unwind" fn release(data: *mut c_void) {
    let ours = HOOKS.get().is_some_and(|hooks| (hooks.free)(data));
    if let (false, Some(below)) = (ours, BELOW.get()) {
        // SAFETY: made by the allocator below, raw.
        unsafe { (below.1)(data) }
    }
}

unsafe extern "C-unwind" fn is_simple(_: *const Allocator, data: *const DataPtr) -> bool {
    // SAFETY: libtorch passes a live one.
    unsafe { (*data).data == (*data).context }
}

#[allow(clippy::unnecessary_wraps)] // the signature in C++
unsafe extern "C-unwind" fn raw_deleter(_: *const Allocator) -> Option<Deleter> {
    Some(release)
}

unsafe extern "C-unwind" fn copy(_: *const Allocator, to: *mut c_void, from: *const c_void, size: usize) {
    // SAFETY: libtorch passes two ranges of this size, apart.
    unsafe { ptr::copy_nonoverlapping(from.cast::<u8>(), to.cast::<u8>(), size) }
}

static FUNCTIONS: TableWithHead = TableWithHead {
    head: [0; BEFORE],
    functions: Functions { destroy, delete: destroy, allocate, is_simple, raw_deleter, copy },
};

/// A table as C++ lays it out. Nothing asks for the class of an allocator.
#[repr(C)]
struct TableWithHead {
    head: [usize; BEFORE],
    functions: Functions,
}

/// Never destroyed: tensors may outlive every other static.
static OURS: Allocator = Allocator { functions: &raw const FUNCTIONS.functions };

fn ours() -> *mut Allocator {
    (&raw const OURS).cast_mut()
}

/// Puts `hooks` before the allocator of CPU tensors. False if this libtorch has no such place.
pub fn install(hooks: Hooks) -> bool {
    let Some(setting) = setting() else { return false };
    HOOKS.get_or_init(|| hooks);
    // SAFETY: libtorch's functions; swaps a pointer that it reads for each tensor.
    unsafe {
        let current = (setting.get)();
        if current == ours() {
            return true;
        }
        // Without a deleter of its own, what it hands out raw could not be given back.
        let Some(deleter) = ((*(*current).functions).raw_deleter)(current) else { return false };
        if BELOW.get_or_init(|| Below(current, deleter)).0 != current {
            return false;
        }
        (setting.set)(ours(), 0);
    }
    true
}

/// Takes the hooks away from new tensors.
pub fn uninstall() {
    if let (Some(setting), Some(below)) = (setting(), BELOW.get()) {
        // SAFETY: as in `install`.
        unsafe {
            if (setting.get)() == ours() {
                (setting.set)(below.0, 0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::torch::abi::symbols::torch;

    #[test]
    fn this_libtorch_has_the_same_functions_and_data() {
        torch().expect("torch");
        assert_eq!(same_functions(&find), Some(true));
        assert!(setting().is_some());
    }

    #[test]
    fn another_class_is_refused() {
        torch().expect("torch");
        let hide = |hidden: &'static CStr| move |name: &CStr| if name == hidden { None } else { find(name) };
        assert_eq!(same_functions(&hide(c"_ZTVN3c109AllocatorE")), None);
        // A table of another size, and one with another function in the place.
        let swap = |from: &'static CStr, to: &'static CStr| {
            move |name: &CStr| find(if name == from { to } else { name })
        };
        assert_eq!(same_functions(&swap(c"_ZTVN3c109AllocatorE", c"_ZTSN3c109AllocatorE")), Some(false));
        let other = c"_ZN3c1015GetCPUAllocatorEv";
        let is_simple = c"_ZNK3c109Allocator18is_simple_data_ptrERKNS_7DataPtrE";
        assert_eq!(same_functions(&swap(is_simple, other)), Some(false));
    }
}
