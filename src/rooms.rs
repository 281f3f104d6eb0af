//! Tests that imports between the folders ("rooms") of this crate run one way, without circles in a room.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// The other rooms that a room may import.
const ALLOWED: [(&str, &[&str]); 10] = [
    ("base", &[]),
    ("checkpoint", &["base", "quant"]),
    ("cuda", &["base"]),
    ("data", &["base"]),
    ("head", &["base"]),
    ("lib", &["base", "checkpoint", "cuda", "data", "head", "optim", "python", "quant", "torch"]),
    ("optim", &["base"]),
    ("python", &["base", "checkpoint", "cuda", "data", "head", "optim", "quant", "torch"]),
    ("quant", &["base"]),
    ("torch", &["base", "checkpoint", "cuda", "head", "optim", "quant"]),
];

fn sources(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").path());
    let (folders, files): (Vec<_>, Vec<_>) = entries.partition(|path| path.is_dir());
    let files = files.into_iter().filter(|path| path.extension().is_some_and(|end| end == "rs"));
    files.chain(folders.iter().flat_map(|folder| sources(folder))).collect()
}

/// The code of a file, without its tests and comments.
fn code(path: &Path) -> String {
    let text = fs::read_to_string(path).expect("text");
    let text = text.split("#[cfg(test)]\nmod ").next().unwrap_or_default();
    let text = text.split("#[cfg(test)]\npub(super) mod ").next().unwrap_or_default();
    text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n")
}

/// The module of a file, such as `quant::nf4`; for a `mod.rs`, the module of its folder.
fn module(path: &Path, root: &Path) -> String {
    let inside = path.strip_prefix(root).expect("a file of src").with_extension("");
    let names: Vec<_> = inside.iter().map(|name| name.to_string_lossy().into_owned()).collect();
    names.join("::").trim_end_matches("::mod").to_owned()
}

/// Full paths of all imports of a file, by `use` or by a path in the code.
fn imports(path: &Path, root: &Path) -> BTreeSet<String> {
    let (own, code) = (module(path, root), code(path));
    let parent =
        if path.ends_with("mod.rs") { own.as_str() } else { own.rsplit_once("::").map_or("", |x| x.0) };
    let mut found = BTreeSet::new();
    for (start, prefix) in [("crate::", ""), ("super::", parent), ("self::", own.as_str())] {
        for (at, _) in code.match_indices(start) {
            // In a `mod.rs`, `super` is the folder above.
            let prefix = if start == "super::" && path.ends_with("mod.rs") {
                parent.rsplit_once("::").map_or("", |x| x.0)
            } else {
                prefix
            };
            let rest = &code[at + start.len()..];
            let word = |text: &str| {
                text.split(|c: char| !c.is_alphanumeric() && c != '_' && c != ':')
                    .next()
                    .unwrap_or_default()
                    .to_owned()
            };
            let head = word(rest);
            let join = |tail: &str| {
                [prefix, &head, tail]
                    .iter()
                    .filter(|x| !x.is_empty())
                    .map(|x| x.trim_matches(':'))
                    .collect::<Vec<_>>()
                    .join("::")
            };
            match rest[head.len()..].strip_prefix('{') {
                Some(list) => {
                    let list = list.split('}').next().unwrap_or_default();
                    found.extend(list.split(',').map(|name| join(&word(name.trim()))));
                }
                None => {
                    found.insert(join(""));
                }
            }
        }
    }
    found
}

#[test]
fn rooms_import_one_way() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let allowed: BTreeMap<_, _> = ALLOWED.into_iter().collect();
    let mut checked = 0;
    for path in sources(&root) {
        let own = module(&path, &root);
        let room = own.split("::").next().unwrap_or_default();
        if room == "rooms" {
            continue;
        }
        for import in imports(&path, &root) {
            let other = import.split("::").next().unwrap_or_default();
            if allowed.contains_key(other) && other != room {
                assert!(allowed[room].contains(&other), "{own} imports {import}");
                checked += 1;
            }
        }
    }
    assert!(checked > 200, "{checked} imports were found");
}

#[test]
fn no_files_import_each_other_in_a_circle() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let files = sources(&root);
    let modules: BTreeSet<String> = files.iter().map(|path| module(path, &root)).collect();
    // The longest module that a path begins with; a `mod.rs` only for its own items.
    let target = |import: &str| {
        let mut name = import;
        loop {
            if modules.contains(name) {
                return Some(name.to_owned());
            }
            name = name.rsplit_once("::")?.0;
        }
    };
    let mut arrows: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for path in &files {
        let own = module(path, &root);
        let others = imports(path, &root).iter().filter_map(|import| target(import)).collect::<BTreeSet<_>>();
        arrows.insert(own.clone(), others.into_iter().filter(|other| *other != own).collect());
    }
    // Constants at the top of a room are below its files.
    let is_top = |name: &str| root.join(name.replace("::", "/")).join("mod.rs").exists();
    arrows.retain(|name, _| !is_top(name) || name.starts_with("torch::"));
    while let Some(leaf) = arrows
        .iter()
        .find(|(_, others)| others.iter().all(|other| !arrows.contains_key(other)))
        .map(|(name, _)| name.clone())
    {
        arrows.remove(&leaf);
    }
    assert!(arrows.is_empty(), "in a circle: {arrows:#?}");
}

#[test]
fn vector_instructions_are_looked_for_in_one_place() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    // bf16 units matter only for libtorch's products, which have a separate limit of oneDNN.
    let allowed = ["base::simd", "torch::quant::linear"];
    let files = sources(&root).into_iter().filter(|path| !path.ends_with("rooms.rs"));
    let looking = files.filter(|path| code(path).contains("is_x86_feature_detected!("));
    let looking: BTreeSet<_> = looking.map(|path| module(&path, &root)).collect();
    assert_eq!(looking, allowed.map(str::to_owned).into());
}
