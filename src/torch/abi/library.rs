//! The libraries of the torch that is loaded.

use std::ffi::{CStr, c_void};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::OnceLock;

use libloading::Library;

/// Open libraries, never closed: pointers into them stay valid.
static LIBRARIES: OnceLock<Vec<Library>> = OnceLock::new();

/// Parts of libtorch whose functions are used. On Linux and macOS a look-up in the first sees what it
/// depends on; Windows asks each by itself. A torch without CUDA has no `torch_cuda`.
const NAMES: [&str; 3] = ["torch_cpu", "c10", "torch_cuda"];

/// True for a function that a test of the fall-backs treats as missing.
#[cfg(feature = "testing")]
fn is_hidden(name: &CStr) -> bool {
    let hidden = std::env::var("ODDSMITH_HIDE_TORCH_FUNCTIONS").unwrap_or_default();
    hidden.split(',').any(|hidden| name.to_bytes() == hidden.as_bytes())
}

#[cfg(not(feature = "testing"))]
fn is_hidden(_: &CStr) -> bool {
    false
}

#[cfg(unix)]
fn open(path: &Path) -> Option<Library> {
    use libloading::os::unix;
    // Without RTLD_NOLOAD the CUDA part would be loaded where Python has not done so.
    let loaded = |flags| unsafe { unix::Library::open(Some(path), flags) }.ok();
    let flags = unix::RTLD_LAZY | unix::RTLD_LOCAL;
    let already = loaded(flags | libc::RTLD_NOLOAD);
    let needed = || path.file_stem().is_some_and(|name| name != "libtorch_cuda").then(|| loaded(flags));
    already.or_else(|| needed().flatten()).map(Library::from)
}

#[cfg(windows)]
fn open(path: &Path) -> Option<Library> {
    // SAFETY: libraries of torch, whose initialisers run when Python imports it.
    unsafe { Library::new(path) }.ok()
}

/// Opens the libraries in the folder `lib` of the installed torch, which Python has loaded.
///
/// # Errors
/// The file that cannot be opened.
pub fn open_all(folder: &Path) -> Result<(), String> {
    if LIBRARIES.get().is_some() {
        return Ok(());
    }
    let file = |name: &str| -> PathBuf { folder.join(libloading::library_filename(name)) };
    if open(&file(NAMES[0])).is_none() {
        return Err(format!("{} cannot be opened", file(NAMES[0]).display()));
    }
    LIBRARIES.get_or_init(|| NAMES.iter().filter_map(|name| open(&file(name))).collect());
    Ok(())
}

/// The address of a function of libtorch, or of a library that it depends on.
#[must_use]
pub fn find(name: &CStr) -> Option<NonNull<c_void>> {
    if is_hidden(name) {
        return None;
    }
    LIBRARIES.get()?.iter().find_map(|library| {
        // SAFETY: the address alone is taken.
        let symbol = unsafe { library.get::<*mut c_void>(name.to_bytes_with_nul()) }.ok()?;
        // SAFETY: as above.
        NonNull::new(unsafe { symbol.try_as_raw_ptr() }?)
    })
}
