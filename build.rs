//! Finds the torch that the library is linked against, and remembers its version.

use std::env;
use std::process::Command;

/// Folder of torch's libraries and its version, as the environment's Python reports them.
fn torch() -> Option<(String, String)> {
    let in_environment = |root: String| format!("{root}/bin/python");
    let python = env::var("PYO3_PYTHON")
        .ok()
        .or_else(|| env::var("VIRTUAL_ENV").ok().map(in_environment))
        .unwrap_or_else(|| "python3".into());
    let script = "import os, torch; print(os.path.dirname(torch.__file__)); print(torch.__version__)";
    let output = Command::new(python).args(["-c", script]).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let (folder, version) = text.trim().split_once('\n')?;
    Some((format!("{folder}/lib"), version.to_owned()))
}

fn main() {
    for variable in ["PYO3_PYTHON", "VIRTUAL_ENV", "PYO3_BUILD_EXTENSION_MODULE"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    println!("cargo:rerun-if-changed=build.rs");
    let wanted = env::var_os("CARGO_FEATURE_TORCH").is_some() && env::var_os("CARGO_FEATURE_LINT").is_none();
    let found = if wanted { torch() } else { None };
    let version = found.as_ref().map_or("", |(_, version)| version);
    println!("cargo:rustc-env=TORCH_BUILD_VERSION={version}");
    if let Some((folder, _)) = &found {
        // torch-sys remembers the folder it was built with, which for an isolated build is gone by
        // the next one.
        println!("cargo:rustc-link-search=native={folder}");
        if env::var_os("PYO3_BUILD_EXTENSION_MODULE").is_none() {
            // Rust tests load libtorch by themselves; inside Python it is loaded already.
            println!("cargo:rustc-link-arg=-Wl,-rpath,{folder}");
        }
    }
}
