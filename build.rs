//! Finds the torch that the library is linked against, and remembers its version.

use std::env;
use std::process::Command;

/// What the Python that is built for knows of torch and itself.
struct Found {
    torch_version: String,
    torch_libraries: String,
    torch_headers: String,
    python_folder: String,
}

const SCRIPT: &str = "
import os, sysconfig, torch
print(torch.__version__)
folder = os.path.dirname(torch.__file__)
print(os.path.join(folder, 'lib'))
print(os.path.join(folder, 'include'))
print(sysconfig.get_config_var('LIBDIR'))
";

fn find() -> Found {
    let in_environment = |root: String| format!("{root}/bin/python");
    let python = env::var("PYO3_PYTHON")
        .ok()
        .or_else(|| env::var("VIRTUAL_ENV").ok().map(in_environment))
        .unwrap_or_else(|| "python3".into());
    let output = Command::new(&python).args(["-c", SCRIPT]).output();
    let output = output.unwrap_or_else(|error| panic!("{python} does not run: {error}"));
    let text = String::from_utf8_lossy(&output.stdout);
    let mut lines = text.lines().map(str::to_owned);
    let (Some(torch_version), Some(torch_libraries), Some(torch_headers), Some(python_folder)) =
        (lines.next(), lines.next(), lines.next(), lines.next())
    else {
        panic!("{python} has no torch: {}", String::from_utf8_lossy(&output.stderr));
    };
    Found { torch_version, torch_libraries, torch_headers, python_folder }
}

fn main() {
    for variable in ["PYO3_PYTHON", "VIRTUAL_ENV", "PYO3_BUILD_EXTENSION_MODULE"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    println!("cargo:rerun-if-changed=build.rs");
    let has = |feature: &str| env::var_os(format!("CARGO_FEATURE_{feature}")).is_some();
    if !has("TORCH") || has("LINT") {
        println!("cargo:rustc-env=TORCH_BUILD_VERSION=");
        return;
    }
    let found = find();
    println!("cargo:rustc-env=TORCH_BUILD_VERSION={}", found.torch_version);
    // torch-sys remembers the folder it was built with, which for an isolated build is gone by the
    // next one.
    println!("cargo:rustc-link-search=native={}", found.torch_libraries);
    if env::var("CARGO_CFG_TARGET_OS").is_ok_and(|system| system == "linux") {
        let mut shim = cc::Build::new();
        shim.cpp(true).std("c++17");
        for source in ["src/torch/allocator/pool.cpp", "src/torch/stream.cpp"] {
            println!("cargo:rerun-if-changed={source}");
            shim.file(source);
        }
        // libtorch's headers have warnings of their own.
        shim.flag("-isystem").flag(&found.torch_headers).compile("oddsmith_torch");
        println!("cargo:rustc-link-lib=c10");
    }
    if env::var_os("PYO3_BUILD_EXTENSION_MODULE").is_none() {
        // Rust tests load libtorch and libpython by themselves; inside Python they are loaded
        // already.
        for folder in [found.torch_libraries, found.python_folder] {
            println!("cargo:rustc-link-arg=-Wl,-rpath,{folder}");
        }
    }
}
