//! The libraries of the torch that is loaded.

use std::ffi::{CStr, c_void};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::OnceLock;

use libloading::Library;
#[cfg(unix)]
use libloading::os::unix as os;
#[cfg(windows)]
use libloading::os::windows as os;

use crate::cuda::reason;

/// Open libraries, never closed: pointers into them stay valid.
static LIBRARIES: OnceLock<Vec<Library>> = OnceLock::new();

/// Parts of libtorch whose functions are used. On Linux and macOS a look-up in the first sees what it
/// depends on; Windows asks each by itself. A torch without CUDA has no `torch_cuda`.
const NAMES: [&str; 3] = ["torch_cpu", "c10", "torch_cuda"];

#[cfg(unix)]
const FLAGS: libc::c_int = os::RTLD_LAZY | os::RTLD_LOCAL;

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

/// Why the libraries of a torch cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It lacks something: the end of a sentence that begins with its version.
    Incomplete(String),
    /// The process runs on the library of another torch, which this file is.
    Elsewhere(PathBuf),
}

/// A library of torch, if Python has loaded it.
fn loaded(path: &Path) -> Option<Library> {
    // SAFETY: opening a library that is already loaded runs no code.
    #[cfg(unix)]
    let library = unsafe { os::Library::open(Some(path), FLAGS | libc::RTLD_NOLOAD) };
    #[cfg(windows)]
    let library = os::Library::open_already_loaded(path);
    library.ok().map(Library::from)
}

fn open(path: &Path) -> Result<Library, String> {
    if let Some(library) = loaded(path) {
        return Ok(library);
    }
    // Python loads the CUDA part where there is one and it is needed.
    if path.file_name().is_some_and(|name| name == libloading::library_filename("torch_cuda").as_os_str()) {
        return Err("not loaded".into());
    }
    // SAFETY: libraries of torch, whose initialisers run when Python imports it.
    #[cfg(unix)]
    let library = unsafe { os::Library::open(Some(path), FLAGS) };
    #[cfg(windows)]
    // SAFETY: as above.
    let library = unsafe { os::Library::new(path) };
    library.map(Library::from).map_err(|error| reason(&error))
}

/// The files of this process's libraries.
#[cfg(target_os = "linux")]
fn loaded_files() -> Vec<PathBuf> {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    unsafe extern "C" fn add(info: *mut libc::dl_phdr_info, _: usize, files: *mut c_void) -> libc::c_int {
        // SAFETY: the vector below, and a name that stays for the call.
        let (files, name) = unsafe { (&mut *files.cast::<Vec<PathBuf>>(), (*info).dlpi_name) };
        if !name.is_null() {
            // SAFETY: a C string.
            files.push(OsStr::from_bytes(unsafe { CStr::from_ptr(name) }.to_bytes()).into());
        }
        0
    }
    let mut files: Vec<PathBuf> = Vec::new();
    // SAFETY: `add` is called before this returns.
    unsafe { libc::dl_iterate_phdr(Some(add), (&raw mut files).cast()) };
    files
}

/// The files of this process's libraries.
#[cfg(target_os = "macos")]
fn loaded_files() -> Vec<PathBuf> {
    use std::ffi::{OsStr, c_char};
    use std::os::unix::ffi::OsStrExt;

    unsafe extern "C" {
        fn _dyld_image_count() -> u32;
        fn _dyld_get_image_name(index: u32) -> *const c_char;
    }
    // SAFETY: a plain question.
    let count = unsafe { _dyld_image_count() };
    (0..count)
        .filter_map(|index| {
            // SAFETY: null for an index that is gone.
            let name = unsafe { _dyld_get_image_name(index) };
            // SAFETY: a C string otherwise.
            (!name.is_null()).then(|| OsStr::from_bytes(unsafe { CStr::from_ptr(name) }.to_bytes()).into())
        })
        .collect()
}

/// Not asked here: a second torch is not noticed.
#[cfg(not(any(target_os = "linux", target_os = "macos")))]
fn loaded_files() -> Vec<PathBuf> {
    Vec::new()
}

/// True for two names of one file.
fn is_same(path: &Path, other: &Path) -> bool {
    #[cfg(unix)]
    if let (Ok(path), Ok(other)) = (path.metadata(), other.metadata()) {
        use std::os::unix::fs::MetadataExt;
        return (path.dev(), path.ino()) == (other.dev(), other.ino());
    }
    matches!((path.canonicalize(), other.canonicalize()), (Ok(path), Ok(other)) if path == other)
}

/// The folder to open libraries in: `folder` of the installed torch, or, where a distribution keeps them
/// elsewhere, the one of the library that is loaded.
fn place(folder: &Path, first: &str, loaded: &[PathBuf]) -> Result<PathBuf, Fault> {
    let wanted = folder.join(first);
    let mut others = loaded.iter().filter(|path| path.file_name().is_some_and(|name| name == first));
    if others.clone().any(|path| is_same(path, &wanted)) {
        return Ok(folder.to_owned());
    }
    match others.next() {
        Some(other) if wanted.exists() => Err(Fault::Elsewhere(other.clone())),
        Some(other) => Ok(other.parent().unwrap_or(folder).to_owned()),
        None => Ok(folder.to_owned()),
    }
}

/// Opens the libraries in the folder `lib` of the installed torch, which Python has loaded.
///
/// # Errors
/// The file that cannot be opened, or the one of another torch that is loaded in its place.
pub fn open_all(folder: &Path) -> Result<(), Fault> {
    if LIBRARIES.get().is_some() {
        return Ok(());
    }
    let name = libloading::library_filename;
    let folder = place(folder, &name(NAMES[0]).to_string_lossy(), &loaded_files())?;
    let first = folder.join(name(NAMES[0]));
    open(&first).map_err(|why| Fault::Incomplete(format!("has no {} that opens: {why}", first.display())))?;
    LIBRARIES.get_or_init(|| NAMES.iter().filter_map(|each| open(&folder.join(name(each))).ok()).collect());
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loaded_torch_is_the_imported_one() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = |name: &str| folder.path().join(name);
        for name in ["mine", "other"] {
            std::fs::create_dir(file(name)).expect("a folder");
            std::fs::write(file(name).join("t.so"), "").expect("a file");
        }
        let (mine, other) = (file("mine"), file("other"));
        let loaded = |folders: &[&Path]| -> Vec<PathBuf> {
            folders.iter().map(|folder| folder.join("t.so")).chain([PathBuf::from("/lib/u.so")]).collect()
        };
        assert_eq!(place(&mine, "t.so", &loaded(&[])), Ok(mine.clone()));
        assert_eq!(place(&mine, "t.so", &loaded(&[&mine])), Ok(mine.clone()));
        assert_eq!(place(&mine, "t.so", &loaded(&[&other, &mine])), Ok(mine.clone()));
        assert_eq!(place(&mine, "t.so", &loaded(&[&other])), Err(Fault::Elsewhere(other.join("t.so"))));
        // A distribution may keep the libraries outside the package.
        assert_eq!(place(&file("empty"), "t.so", &loaded(&[&other])), Ok(other.clone()));
        #[cfg(unix)]
        {
            std::os::unix::fs::symlink(&mine, file("link")).expect("a link");
            assert_eq!(place(&file("link"), "t.so", &loaded(&[&mine])), Ok(file("link")));
        }
    }

    #[cfg(any(target_os = "linux", target_os = "macos"))]
    #[test]
    fn libraries_of_this_process_are_listed() {
        assert!(loaded_files().iter().any(|path| path.is_absolute() && path.is_file()));
    }
}
