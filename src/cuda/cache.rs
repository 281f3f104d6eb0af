//! Compiled kernels on disk.
//!
//! The folder belongs to this user and nobody else can change it, or it is not used. A file is known by a SHA-256 of
//! what it was compiled from, by what, for which GPU, and of its content; one that is not what it should be is
//! compiled again, with a line that says so. Files get their names when they are on disk, so that processes that
//! start at the same time find a complete file or none.

use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};

use sha2::{Digest as _, Sha256};

use super::private_folder;

/// Most bytes of all files together.
const MOST: u64 = 64 << 20;

/// Longer than a file takes to be written.
const PART_LIFE: Duration = Duration::from_secs(3600);

const MAGIC: &[u8; 16] = b"oddsmith cubin 2";
/// The magic and the digest of the key and of the rest.
const HEADER: usize = 16 + 32;

/// SHA-256 of some parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Digest([u8; 32]);

/// Digest of some parts, each with its length: moving a byte from one part to the next changes it.
#[must_use]
pub fn digest<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> Digest {
    let hash = parts.into_iter().fold(Sha256::new(), |hash, part| {
        hash.chain_update((part.len() as u64).to_le_bytes()).chain_update(part)
    });
    Digest(hash.finalize().into())
}

/// As 32 hexadecimal digits: half of it, enough for a name.
impl fmt::Display for Digest {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[..16].iter().try_for_each(|byte| write!(to, "{byte:02x}"))
    }
}

/// What the user is told.
type Notice = fn(&str);

static NOTICE: OnceLock<Notice> = OnceLock::new();

/// Registers who is told of folders and files that are not used; the error stream, if nobody is. Only the first
/// call counts.
pub fn on_notice(notice: Notice) {
    let _ = NOTICE.set(notice);
}

/// Says a line, once in a process.
fn say(line: &str) {
    static SAID: Mutex<Vec<String>> = Mutex::new(Vec::new());
    let mut said = SAID.lock().unwrap_or_else(PoisonError::into_inner);
    if said.iter().any(|known| known == line) {
        return;
    }
    said.push(line.to_owned());
    drop(said);
    match NOTICE.get() {
        Some(notice) => notice(line),
        None => eprintln!("oddsmith: {line}"),
    }
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

    /// The file of the key, or the result of `make`, which is stored. If the folder cannot be written to, or
    /// others can, it is made again each time.
    ///
    /// # Errors
    /// The errors of `make`.
    pub fn get_or_make<E>(
        &self,
        name: &str,
        key: Digest,
        make: impl FnOnce() -> Result<Vec<u8>, E>,
    ) -> Result<Vec<u8>, E> {
        let Some(folder) = self.usable() else { return make() };
        let path = folder.join(format!("{name}-{key}.cubin"));
        match read(&path, key) {
            Ok(Some(bytes)) => return Ok(bytes),
            Ok(None) => {}
            Err(why) => say(&format!("{} {why}; it is compiled again", path.display())),
        }
        let bytes = make()?;
        let _ = private_folder::make(folder)
            .and_then(|()| if self.usable().is_some() { write(&path, key, &bytes) } else { Ok(()) })
            .and_then(|()| self.trim(&path));
        Ok(bytes)
    }

    /// The folder, if nobody else can change it.
    fn usable(&self) -> Option<&Path> {
        let folder = self.folder.as_deref()?;
        let Some(fault) = private_folder::fault(folder) else { return Some(folder) };
        say(&format!("{}: kernels are compiled in memory, by each process; {}", fault.what, fault.remedy));
        None
    }

    /// Removes the oldest files until the rest fits, but never `kept`.
    fn trim(&self, kept: &Path) -> io::Result<()> {
        let Some(folder) = &self.folder else { return Ok(()) };
        let mut files: Vec<(SystemTime, u64, PathBuf)> = Vec::new();
        for entry in fs::read_dir(folder)?.flatten() {
            let path = entry.path();
            let is = |kind| path.extension().is_some_and(|found| found == kind);
            let Ok(metadata) = entry.metadata() else { continue };
            let changed = metadata.modified()?;
            if is("part") && changed.elapsed().is_ok_and(|age| age > PART_LIFE) {
                // Its process was killed.
                let _ = fs::remove_file(path);
            } else if is("part") || is("cubin") {
                files.push((changed, metadata.len(), path));
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

fn read(path: &Path, key: Digest) -> Result<Option<Vec<u8>>, String> {
    let Some(mut bytes) = private_folder::read(path, MOST)? else { return Ok(None) };
    match bytes.get(HEADER..) {
        Some(content) if header(key, content) == bytes[..HEADER] => Ok(Some(bytes.split_off(HEADER))),
        _ => Err("is damaged or was changed".into()),
    }
}

fn header(key: Digest, content: &[u8]) -> Vec<u8> {
    [&MAGIC[..], &digest([&key.0[..], content]).0].concat()
}

fn write(path: &Path, key: Digest, content: &[u8]) -> io::Result<()> {
    private_folder::write(path, &[&header(key, content), content])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache(folder: &Path) -> Cache {
        Cache { folder: Some(folder.join("kernels")), most: MOST }
    }

    fn key(number: u8) -> Digest {
        digest([&[number][..]])
    }

    /// Asks for a key; returns the bytes and whether they were made.
    fn ask(cache: &Cache, number: u8, content: &[u8]) -> (Vec<u8>, bool) {
        let mut made = false;
        let make = || -> Result<_, ()> {
            made = true;
            Ok(content.to_vec())
        };
        (cache.get_or_make("op", key(number), make).expect("made"), made)
    }

    fn only_file(folder: &Path) -> PathBuf {
        let files: Vec<_> =
            fs::read_dir(folder.join("kernels")).expect("there").map(|x| x.expect("read").path()).collect();
        assert_eq!(files.len(), 1, "{files:?}");
        files[0].clone()
    }

    #[test]
    fn the_digest_is_that_of_the_published_function() {
        // SHA-256 of eight bytes of length and of "abc".
        let expected = "ce91dc5eec0139adf091900d225971d6";
        assert_eq!(digest([&b"abc"[..]]).to_string(), expected);
        assert_ne!(digest([&b"ab"[..], b"c"]), digest([&b"a"[..], b"bc"]));
        assert_ne!(digest([&b""[..]]), digest([&b""[..], b""]));
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
        assert_eq!(cache.get_or_make("op", key(3), || Err("no compiler")), Err("no compiler"));
    }

    #[test]
    fn damaged_files_are_compiled_again() {
        let damages: [fn(&mut Vec<u8>); 6] = [
            |bytes| bytes.truncate(HEADER + 2),
            |bytes| bytes.truncate(HEADER - 1),
            |bytes| bytes.clear(),
            |bytes| bytes.push(0),
            |bytes| bytes[HEADER + 1] ^= 4,
            |bytes| bytes[17] ^= 1, // the digest
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

    /// A file of another key, under this key's name: as it was, it is what somebody compiled of something else.
    #[test]
    fn the_file_of_another_key_is_not_used() {
        let folder = tempfile::tempdir().expect("a folder");
        let cache = cache(folder.path());
        ask(&cache, 7, b"kernel");
        let name = |number| folder.path().join("kernels").join(format!("op-{}.cubin", key(number)));
        fs::rename(name(7), name(8)).expect("renamed");
        assert_eq!(ask(&cache, 8, b"other"), (b"other".to_vec(), true));
        assert_eq!(ask(&cache, 8, b"third"), (b"other".to_vec(), false));
    }

    #[cfg(unix)]
    #[test]
    fn a_folder_that_others_can_change_is_neither_read_nor_written() {
        use std::os::unix::fs::{PermissionsExt, symlink};
        let folder = tempfile::tempdir().expect("a folder");
        let cache = cache(folder.path());
        ask(&cache, 7, b"kernel");
        let kernels = folder.path().join("kernels");
        let chmod = |mode| fs::set_permissions(&kernels, fs::Permissions::from_mode(mode)).expect("own");
        for mode in [0o770, 0o707, 0o777] {
            chmod(mode);
            assert_eq!(ask(&cache, 7, b"mine"), (b"mine".to_vec(), true));
            assert_eq!(ask(&cache, 8, b"mine"), (b"mine".to_vec(), true));
        }
        chmod(0o700);
        assert_eq!(ask(&cache, 7, b"other"), (b"kernel".to_vec(), false));
        only_file(folder.path());
        // A link is not followed, even to a folder that could be used.
        fs::rename(&kernels, folder.path().join("elsewhere")).expect("renamed");
        symlink(folder.path().join("elsewhere"), &kernels).expect("a link");
        assert_eq!(ask(&cache, 7, b"mine"), (b"mine".to_vec(), true));
    }

    #[cfg(unix)]
    #[test]
    fn a_link_to_a_file_is_not_followed() {
        let folder = tempfile::tempdir().expect("a folder");
        let cache = cache(folder.path());
        ask(&cache, 7, b"kernel");
        let (path, moved) = (only_file(folder.path()), folder.path().join("moved"));
        fs::rename(&path, &moved).expect("renamed");
        std::os::unix::fs::symlink(&moved, &path).expect("a link");
        assert_eq!(ask(&cache, 7, b"mine"), (b"mine".to_vec(), true));
        assert!(path.symlink_metadata().expect("there").is_file());
        assert_eq!(fs::read(&moved).expect("there")[HEADER..], b"kernel"[..]);
    }

    #[test]
    fn the_oldest_go_first() {
        let folder = tempfile::tempdir().expect("a folder");
        let size = HEADER as u64 + 100;
        let cache = Cache { most: 3 * size, ..cache(folder.path()) };
        for key in 0..5 {
            ask(&cache, key, &[key; 100]);
            let path = folder.path().join("kernels").join(format!("op-{}.cubin", self::key(key)));
            // File times have a low resolution.
            let time = SystemTime::UNIX_EPOCH + Duration::from_secs(100 + u64::from(key));
            fs::File::options()
                .append(true)
                .open(path)
                .and_then(|file| file.set_modified(time))
                .expect("set");
        }
        // Storing the fifth removed the oldest; the fifth is the newest.
        let there = [0, 1, 2, 3, 4]
            .map(|number| folder.path().join("kernels").join(format!("op-{}.cubin", key(number))).exists());
        assert_eq!(there, [false, false, true, true, true]);
    }

    #[test]
    fn what_killed_processes_have_left_goes() {
        let folder = tempfile::tempdir().expect("a folder");
        let cache = cache(folder.path());
        ask(&cache, 1, b"one");
        let part = |name| folder.path().join("kernels").join(name);
        let old = SystemTime::now() - 2 * PART_LIFE;
        fs::write(part("op-1.9.0.part"), b"half").expect("written");
        let file = fs::File::create(part("op-2.9.0.part")).expect("written");
        file.set_modified(old).expect("set");
        ask(&cache, 2, b"two");
        assert!(part("op-1.9.0.part").exists() && !part("op-2.9.0.part").exists());
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

    proptest::proptest! {
        /// The file of another version, user or program, or a damaged one: never what is loaded into the driver.
        #[test]
        fn any_file_in_the_place_of_a_kernel_is_compiled_again(
            other: Vec<u8>,
            changes in proptest::collection::vec((proptest::prelude::any::<proptest::sample::Index>(), 1u8..), 0..4),
            cut: Option<proptest::sample::Index>,
            replaced: bool,
        ) {
            let folder = tempfile::tempdir().expect("a folder");
            let cache = cache(folder.path());
            ask(&cache, 7, b"kernel");
            let path = only_file(folder.path());
            let whole = fs::read(&path).expect("written");
            let mut content = if replaced { other } else { whole.clone() };
            for (place, change) in changes {
                if !content.is_empty() {
                    let place = place.index(content.len());
                    content[place] ^= change;
                }
            }
            if let Some(cut) = cut {
                content.truncate(cut.index(content.len() + 1));
            }
            fs::write(&path, &content).expect("damaged");
            let (found, made) = ask(&cache, 7, b"mine");
            let expected = if content == whole { b"kernel".to_vec() } else { b"mine".to_vec() };
            assert_eq!((&found, made), (&expected, content != whole));
            assert_eq!(ask(&cache, 7, b"third"), (expected, false));
        }
    }
}
