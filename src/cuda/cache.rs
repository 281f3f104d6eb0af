//! Compiled kernels on disk.
//!
//! A file is written under a temporary name and renamed, so that processes that start at the same time find a
//! complete file or none. A file whose digest is wrong is compiled again.

use std::ffi::OsString;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::SystemTime;

/// Most bytes of all files together.
const MOST: u64 = 64 << 20;

const MAGIC: &[u8; 16] = b"oddsmith cubin 1";
/// The magic, the key, the length and the digest of the rest.
const HEADER: usize = 16 + 16 + 8 + 16;

/// FNV-1a with 128 bits, which is the same on every machine and in every build.
#[must_use]
pub fn digest<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> u128 {
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    const START: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    let step = |hash: u128, &byte: &u8| (hash ^ u128::from(byte)).wrapping_mul(PRIME);
    parts.into_iter().fold(START, |hash, part| {
        // With its length, so that moving a byte from one part to the next changes the digest.
        let hash = part.iter().fold(hash, step);
        (part.len() as u64).to_le_bytes().iter().fold(hash, step)
    })
}

/// A folder of compiled kernels.
#[derive(Clone, Debug)]
pub struct Cache {
    folder: Option<PathBuf>,
    most: u64,
}

impl Cache {
    /// The folder that `ODDSMITH_CACHE_DIR` names, else `oddsmith/kernels` in `XDG_CACHE_HOME` or
    /// `~/.cache`.
    #[must_use]
    pub fn of_environment() -> Self {
        Self { folder: folder(|name| std::env::var_os(name)), most: MOST }
    }

    /// The file of the key, or the result of `make`, which is stored. If the folder cannot be written to, it
    /// is made again each time.
    ///
    /// # Errors
    /// The errors of `make`.
    pub fn get_or_make<E>(
        &self,
        name: &str,
        key: u128,
        make: impl FnOnce() -> Result<Vec<u8>, E>,
    ) -> Result<Vec<u8>, E> {
        let path = self.folder.as_ref().map(|folder| folder.join(format!("{name}-{key:032x}.cubin")));
        if let Some(bytes) = path.as_ref().and_then(|path| read(path, key)) {
            return Ok(bytes);
        }
        let bytes = make()?;
        if let Some(path) = path {
            let _ = write(&path, key, &bytes).and_then(|()| self.trim(&path));
        }
        Ok(bytes)
    }

    /// Removes the oldest files until the rest fits, but never `kept`.
    fn trim(&self, kept: &Path) -> io::Result<()> {
        let Some(folder) = &self.folder else { return Ok(()) };
        let mut files: Vec<(SystemTime, u64, PathBuf)> = Vec::new();
        for entry in fs::read_dir(folder)?.flatten() {
            let path = entry.path();
            // Files that a process did not finish count too.
            let ours = path.extension().is_some_and(|kind| kind == "cubin" || kind == "part");
            if let (true, Ok(metadata)) = (ours, entry.metadata()) {
                files.push((metadata.modified()?, metadata.len(), path));
            }
        }
        files.sort();
        let mut total: u64 = files.iter().map(|(_, size, _)| size).sum();
        for (_, size, path) in files {
            if total <= self.most {
                break;
            }
            if path != kept {
                let _ = fs::remove_file(path);
                total -= size;
            }
        }
        Ok(())
    }
}

fn folder(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let set = |name| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let shared = || set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")));
    set("ODDSMITH_CACHE_DIR").or_else(|| Some(shared()?.join("oddsmith").join("kernels")))
}

fn read(path: &Path, key: u128) -> Option<Vec<u8>> {
    let mut bytes = fs::read(path).ok()?;
    let content = bytes.get(HEADER..)?;
    (header(key, content) == bytes[..HEADER]).then(|| bytes.split_off(HEADER))
}

fn header(key: u128, content: &[u8]) -> Vec<u8> {
    let (length, digest) = ((content.len() as u64).to_le_bytes(), digest([content]).to_le_bytes());
    [&MAGIC[..], &key.to_le_bytes(), &length, &digest].concat()
}

fn write(path: &Path, key: u128, content: &[u8]) -> io::Result<()> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let (process, count) = (std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    let part = path.with_extension(format!("{process}.{count}.part"));
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let written = fs::File::create_new(&part)
        .and_then(|mut file| {
            file.write_all(&header(key, content))?;
            file.write_all(content)
        })
        .and_then(|()| fs::rename(&part, path));
    if written.is_err() {
        let _ = fs::remove_file(&part);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache(folder: &Path) -> Cache {
        Cache { folder: Some(folder.join("kernels")), most: MOST }
    }

    /// Asks for a key; returns the bytes and whether they were made.
    fn ask(cache: &Cache, key: u128, content: &[u8]) -> (Vec<u8>, bool) {
        let mut made = false;
        let make = || -> Result<_, ()> {
            made = true;
            Ok(content.to_vec())
        };
        (cache.get_or_make("op", key, make).expect("made"), made)
    }

    fn only_file(folder: &Path) -> PathBuf {
        let files: Vec<_> =
            fs::read_dir(folder.join("kernels")).expect("there").map(|x| x.expect("read").path()).collect();
        assert_eq!(files.len(), 1, "{files:?}");
        files[0].clone()
    }

    #[test]
    fn the_digest_is_that_of_the_published_function() {
        // The 128-bit FNV-1a of "a" is d228cb696f1a8caf78912b704e4a8964; then come eight bytes of length.
        let step = |hash: u128, byte: u8| {
            (hash ^ u128::from(byte)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b)
        };
        let expected =
            [1u8, 0, 0, 0, 0, 0, 0, 0].into_iter().fold(0xd228_cb69_6f1a_8caf_7891_2b70_4e4a_8964, step);
        assert_eq!(digest([&b"a"[..]]), expected);
        assert_ne!(digest([&b"ab"[..], b"c"]), digest([&b"a"[..], b"bc"]));
    }

    #[test]
    fn the_folder_is_where_caches_are() {
        let among = |set: &[(&str, &str)]| {
            let value =
                |name: &str| set.iter().find(|(known, _)| *known == name).map(|(_, value)| value.into());
            folder(value).map(|folder| folder.display().to_string())
        };
        let all = [("ODDSMITH_CACHE_DIR", "/k"), ("XDG_CACHE_HOME", "/x"), ("HOME", "/h")];
        assert_eq!(among(&all).as_deref(), Some("/k"));
        assert_eq!(among(&all[1..]).as_deref(), Some("/x/oddsmith/kernels"));
        assert_eq!(among(&all[2..]).as_deref(), Some("/h/.cache/oddsmith/kernels"));
        assert_eq!(among(&[("ODDSMITH_CACHE_DIR", ""), ("HOME", "/h")]), among(&all[2..]));
        assert_eq!(among(&[]), None);
    }

    #[test]
    fn what_was_made_once_is_found() {
        let folder = tempfile::tempdir().expect("a folder");
        let cache = cache(folder.path());
        assert_eq!(ask(&cache, 1, b"one"), (b"one".to_vec(), true));
        assert_eq!(ask(&cache, 1, b"other"), (b"one".to_vec(), false));
        assert_eq!(ask(&cache, 2, b""), (Vec::new(), true));
        assert_eq!(ask(&cache, 2, b"other"), (Vec::new(), false));
        assert_eq!(cache.get_or_make("op", 3, || Err("no compiler")), Err("no compiler"));
    }

    #[test]
    fn damaged_files_are_compiled_again() {
        let damages: [fn(&mut Vec<u8>); 6] = [
            |bytes| bytes.truncate(HEADER + 2),
            |bytes| bytes.truncate(HEADER - 1),
            |bytes| bytes.clear(),
            |bytes| bytes.push(0),
            |bytes| bytes[HEADER + 1] ^= 4,
            |bytes| bytes[17] ^= 1, // the key
        ];
        for damage in damages {
            let folder = tempfile::tempdir().expect("a folder");
            let cache = cache(folder.path());
            ask(&cache, 7, b"kernel");
            let path = only_file(folder.path());
            let mut bytes = fs::read(&path).expect("written");
            damage(&mut bytes);
            fs::write(&path, bytes).expect("damaged");
            assert_eq!(ask(&cache, 7, b"kernel"), (b"kernel".to_vec(), true));
            assert_eq!(ask(&cache, 7, b"other"), (b"kernel".to_vec(), false));
        }
    }

    #[test]
    fn the_oldest_go_first() {
        let folder = tempfile::tempdir().expect("a folder");
        let size = HEADER as u64 + 100;
        let cache = Cache { most: 3 * size, ..cache(folder.path()) };
        for key in 0..5 {
            ask(&cache, key, &[key as u8; 100]);
            let path = folder.path().join("kernels").join(format!("op-{key:032x}.cubin"));
            // File times have a low resolution.
            let time = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(100 + key as u64);
            fs::File::options()
                .append(true)
                .open(path)
                .and_then(|file| file.set_modified(time))
                .expect("set");
        }
        // Storing the fifth removed the oldest; the fifth is the newest.
        let there = [0, 1, 2, 3, 4]
            .map(|key| folder.path().join("kernels").join(format!("op-{key:032x}.cubin")).exists());
        assert_eq!(there, [false, false, true, true, true]);
    }

    #[test]
    fn a_folder_that_cannot_be_made_only_costs_time() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("file");
        fs::write(&file, b"").expect("written");
        for cache in [cache(&file), Cache { folder: None, most: MOST }] {
            assert_eq!(ask(&cache, 1, b"one"), (b"one".to_vec(), true));
            assert_eq!(ask(&cache, 1, b"two"), (b"two".to_vec(), true));
        }
    }

    #[test]
    fn processes_that_start_at_once_find_whole_files() {
        let folder = tempfile::tempdir().expect("a folder");
        let cache = &cache(folder.path());
        let content = &vec![3u8; 1 << 20];
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(move || {
                    for key in 0..4 {
                        assert_eq!(ask(cache, key, content).0, *content);
                    }
                });
            }
        });
        assert!((0..4).all(|key| !ask(cache, key, b"other").1));
    }
}
