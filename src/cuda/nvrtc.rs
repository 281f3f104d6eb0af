//! NVRTC: CUDA C++ to a cubin for one architecture. Needs no GPU and no driver.
#![allow(unsafe_code)] // calls into the library, with the types of nvrtc.h

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::OnceLock;

use libloading::Library;

use super::kernels::{COMMON, KernelSource};
use super::library::{library, reason};

type Program = *mut c_void;

library! {
    /// The functions of NVRTC.
    struct Nvrtc {
        fn version = nvrtcVersion(*mut c_int, *mut c_int) -> c_int;
        fn error_string = nvrtcGetErrorString(c_int) -> *const c_char;
        fn create = nvrtcCreateProgram(
            *mut Program, *const c_char, *const c_char, c_int, *const *const c_char, *const *const c_char,
        ) -> c_int;
        fn destroy = nvrtcDestroyProgram(*mut Program) -> c_int;
        fn compile = nvrtcCompileProgram(Program, c_int, *const *const c_char) -> c_int;
        fn log_size = nvrtcGetProgramLogSize(Program, *mut usize) -> c_int;
        fn log = nvrtcGetProgramLog(Program, *mut c_char) -> c_int;
        fn cubin_size = nvrtcGetCUBINSize(Program, *mut usize) -> c_int;
        fn cubin = nvrtcGetCUBIN(Program, *mut c_char) -> c_int;
    }
}

/// Options for all kernels, in addition to the architecture. No fast arithmetic and no implicit fused
/// multiply-add, so that results are bit-identical to the CPU algorithms.
pub const OPTIONS: [&str; 2] = ["-std=c++17", "--fmad=false"];

/// The option for kernels whose arguments have 4 KB at most.
pub const SMALL_ARGUMENTS: &str = "--define-macro=SMALL_ARGUMENTS";

/// Releases of the library, the newest first, with their folders in NVIDIA's wheels.
#[cfg(target_os = "linux")]
const NAMES: [(&str, &str); 2] =
    [("libnvrtc.so.13", "nvidia/cu13/lib"), ("libnvrtc.so.12", "nvidia/cuda_nvrtc/lib")];

/// The library, opened on first use: the one in `ODDSMITH_NVRTC`, or the one that torch has loaded, or the
/// one of NVIDIA's wheels, or the system's.
///
/// # Errors
/// The places that were searched.
pub fn nvrtc() -> Result<&'static Nvrtc, String> {
    static NVRTC: OnceLock<Nvrtc> = OnceLock::new();
    if let Some(nvrtc) = NVRTC.get() {
        return Ok(nvrtc);
    }
    let opened = Nvrtc::load(open()?)?;
    Ok(NVRTC.get_or_init(|| opened))
}

fn open() -> Result<Library, String> {
    if let Some(path) = std::env::var_os("ODDSMITH_NVRTC") {
        let path = PathBuf::from(path);
        return open_path(&path)
            .map_err(|error| format!("ODDSMITH_NVRTC is {}: {}", path.display(), reason(&error)));
    }
    find().ok_or_else(|| {
        "no libnvrtc.so.13 or .12: torch has loaded none, there is none in the nvidia wheels beside torch, and \
         the system has none; ODDSMITH_NVRTC may name one"
            .to_owned()
    })
}

/// torch loads every library in its folder, this one too.
#[cfg(windows)]
fn find() -> Option<Library> {
    use libloading::os::windows;
    let names = ["nvrtc64_130_0.dll", "nvrtc64_120_0.dll"];
    let loaded = names.iter().find_map(|name| windows::Library::open_already_loaded(*name).ok());
    loaded.map(Library::from).or_else(|| names.iter().find_map(|name| open_path(Path::new(name)).ok()))
}

#[cfg(not(any(target_os = "linux", windows)))]
fn find() -> Option<Library> {
    None
}

#[cfg(target_os = "linux")]
fn find() -> Option<Library> {
    use libloading::os::unix;
    // A release other than torch's may make cubins that the driver cannot read.
    let loaded = NAMES.iter().find_map(|&(name, _)| {
        // SAFETY: opening a library that is already loaded runs no code.
        unsafe { unix::Library::open(Some(name), libc::RTLD_NOLOAD | libc::RTLD_NOW) }.ok()
    });
    let beside = || {
        let packages = packages(&std::fs::read_to_string("/proc/self/maps").ok()?)?;
        NAMES.iter().find_map(|(name, folder)| open_path(&packages.join(folder).join(name)).ok())
    };
    let of_system = || NAMES.iter().find_map(|(name, _)| open_path(Path::new(name)).ok());
    loaded.map(Library::from).or_else(beside).or_else(of_system)
}

/// The folder that torch is installed in, if it is among the mapped files of this process.
#[cfg(target_os = "linux")]
fn packages(maps: &str) -> Option<PathBuf> {
    let folder = maps.lines().find_map(|line| line.strip_suffix("/torch/lib/libc10.so"))?;
    Some(PathBuf::from(&folder[folder.find('/')?..]))
}

/// NVRTC opens its library of built-in functions by name only, so the one in the same folder is loaded first.
fn open_path(path: &Path) -> Result<Library, libloading::Error> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let entries = folder.and_then(|folder| folder.read_dir().ok());
    for entry in entries.into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with("libnvrtc-builtins.so") {
            // SAFETY: a library of constants without initialisers.
            if let Ok(library) = unsafe { Library::new(entry.path()) } {
                std::mem::forget(library);
            }
        }
    }
    // SAFETY: NVIDIA's library, whose initialisers have no precondition.
    unsafe { Library::new(path) }
}

/// The result of a compilation.
#[derive(Clone, Debug)]
pub struct Compiled {
    /// The binary, an ELF file.
    pub cubin: Vec<u8>,
    /// The compiler's log.
    pub log: String,
}

impl Nvrtc {
    /// The release, such as `(13, 0)`.
    ///
    /// # Errors
    /// Errors of the library.
    pub fn release(&self) -> Result<(i32, i32), String> {
        let (mut major, mut minor) = (0, 0);
        // SAFETY: writes two numbers.
        self.check(unsafe { (self.version)(&raw mut major, &raw mut minor) }, "nvrtcVersion")?;
        Ok((major, minor))
    }

    fn check(&self, code: c_int, call: &str) -> Result<(), String> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: a constant string for every number.
        let text = unsafe { CStr::from_ptr((self.error_string)(code)) };
        Err(format!("NVRTC {call}: {}", text.to_string_lossy()))
    }

    /// Compiles a source for an architecture such as `sm_90`, with [`OPTIONS`] and `extra` ones.
    ///
    /// # Errors
    /// Errors of the compiler, with the line.
    pub fn compile(
        &self,
        source: &KernelSource,
        architecture: &str,
        extra: &[&str],
    ) -> Result<Compiled, String> {
        let text = |text: &str| CString::new(text).map_err(|error| error.to_string());
        let (code, name) = (text(source.text)?, text(source.name)?);
        let (header, header_name) = (text(COMMON)?, text("common.cuh")?);
        let (headers, header_names) = ([header.as_ptr()], [header_name.as_ptr()]);
        let mut program = ptr::null_mut();
        // SAFETY: the strings outlive the call; one header with its name.
        let created = unsafe {
            (self.create)(
                &raw mut program,
                code.as_ptr(),
                name.as_ptr(),
                1,
                headers.as_ptr(),
                header_names.as_ptr(),
            )
        };
        self.check(created, "nvrtcCreateProgram")?;
        let compiled = self.compile_program(program, architecture, extra);
        // SAFETY: created above, not used afterwards.
        unsafe { (self.destroy)(&raw mut program) };
        compiled
    }

    fn compile_program(
        &self,
        program: Program,
        architecture: &str,
        extra: &[&str],
    ) -> Result<Compiled, String> {
        let architecture = format!("--gpu-architecture={architecture}");
        let options = [architecture.as_str()].into_iter().chain(OPTIONS).chain(extra.iter().copied());
        let options = options.map(CString::new).collect::<Result<Vec<_>, _>>();
        let options = options.map_err(|error| error.to_string())?;
        let pointers: Vec<_> = options.iter().map(|option| option.as_ptr()).collect();
        // SAFETY: the number of strings is correct and they outlive the call.
        let code = unsafe { (self.compile)(program, pointers.len() as c_int, pointers.as_ptr()) };
        let log = self.text_of(program, self.log_size, self.log, "nvrtcGetProgramLog")?;
        let log = String::from_utf8_lossy(&log).trim_end_matches(['\0', '\n']).to_owned();
        self.check(code, "nvrtcCompileProgram").map_err(|error| format!("{error}\n{log}"))?;
        let cubin = self.text_of(program, self.cubin_size, self.cubin, "nvrtcGetCUBIN")?;
        Ok(Compiled { cubin, log })
    }

    /// Reads a result whose size the library returns first.
    fn text_of(
        &self,
        program: Program,
        size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
        get: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
        call: &str,
    ) -> Result<Vec<u8>, String> {
        let mut len = 0;
        // SAFETY: writes a number.
        self.check(unsafe { size(program, &raw mut len) }, call)?;
        let mut bytes = vec![0u8; len];
        // SAFETY: writes as many bytes as the size says.
        self.check(unsafe { get(program, bytes.as_mut_ptr().cast()) }, call)?;
        Ok(bytes)
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::path::PathBuf;

    use super::packages;

    #[test]
    fn packages_are_where_torch_is() {
        let maps = "7f00-7f01 r-xp 00000000 08:01 5  /usr/lib/libc.so.6\n7f02-7f03 rw-p 00000000 00:00 0\n\
                    7f04-7f05 r-xp 00000000 08:01 7  /my env/site-packages/torch/lib/libc10.so\n";
        assert_eq!(packages(maps), Some(PathBuf::from("/my env/site-packages")));
        assert_eq!(packages("7f00-7f01 r-xp 00000000 08:01 5  /usr/lib/libc10.so\n"), None);
    }
}
