//! Folders and files that nobody but their user can change.
//!
//! What is loaded into a driver must come from this user. A folder is looked at each time before it is used, and a
//! file of it is opened without following links, then looked at: a folder that is put in its place in between
//! cannot have files of this user.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

/// Why a folder is not used, and what its user can do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// A sentence without its end, which begins with the path.
    pub what: String,
    /// What to do.
    pub remedy: String,
}

/// Why a folder is not used; none if it is not there yet.
#[must_use]
pub fn fault(folder: &Path) -> Option<Fault> {
    let metadata = fs::symlink_metadata(folder).ok()?;
    let (what, remedy) = judge(folder, &metadata)?;
    Some(Fault { what: format!("{} {what}", folder.display()), remedy })
}

#[cfg(unix)]
fn judge(folder: &Path, metadata: &fs::Metadata) -> Option<(String, String)> {
    use std::os::unix::fs::MetadataExt;
    const OTHER: &str = "name a folder of your own with ODDSMITH_CACHE_DIR";
    if metadata.is_symlink() {
        return Some(("is a link".into(), "name what it leads to with ODDSMITH_CACHE_DIR".into()));
    }
    if !metadata.is_dir() {
        return Some(("is no folder".into(), OTHER.into()));
    }
    if metadata.uid() != user() {
        return Some((format!("belongs to user {}, and you are {}", metadata.uid(), user()), OTHER.into()));
    }
    let open = metadata.mode() & OTHERS_WRITE != 0;
    open.then(|| ("can be changed by others".into(), format!("chmod go-w {}", folder.display())))
}

#[cfg(not(unix))]
fn judge(_: &Path, metadata: &fs::Metadata) -> Option<(String, String)> {
    let other = "name a folder of your own with ODDSMITH_CACHE_DIR";
    (!metadata.is_dir()).then(|| ("is no folder".into(), other.into()))
}

/// Bits of the group and of all others.
#[cfg(unix)]
const OTHERS_WRITE: u32 = 0o022;

#[cfg(unix)]
#[allow(unsafe_code)]
fn user() -> u32 {
    // SAFETY: reads a number, and cannot fail.
    unsafe { libc::geteuid() }
}

/// Makes a folder, and those above it, for this user alone.
///
/// # Errors
/// Those of the file system.
pub fn make(folder: &Path) -> io::Result<()> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(folder)
}

/// The content of a file; none if there is none.
///
/// # Errors
/// Why its content is not used.
pub fn read(path: &Path, most: u64) -> Result<Option<Vec<u8>>, String> {
    let mut options = File::options();
    options.read(true);
    // A pipe would wait for its other end.
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_NOFOLLOW | libc::O_NONBLOCK);
    let file = match options.open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        #[cfg(unix)]
        Err(error) if error.raw_os_error() == Some(libc::ELOOP) => return Err("is a link".into()),
        Err(error) => return Err(format!("cannot be read: {error}")),
    };
    let metadata = file.metadata().map_err(|error| error.to_string())?;
    if !metadata.is_file() {
        return Err("is no file".into());
    }
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        if metadata.uid() != user() {
            return Err(format!("belongs to user {}, and you are {}", metadata.uid(), user()));
        }
        if metadata.mode() & OTHERS_WRITE != 0 {
            return Err("can be changed by others".into());
        }
    }
    let mut bytes = Vec::new();
    // One byte more than there may be; a file can grow while it is read.
    file.take(most.saturating_add(1))
        .read_to_end(&mut bytes)
        .map_err(|error| format!("cannot be read: {error}"))?;
    if bytes.len() as u64 > most { Err(format!("has more than {most} bytes")) } else { Ok(Some(bytes)) }
}

/// Writes a file under another name, brings it to disk, and gives it its name.
///
/// # Errors
/// Those of the file system.
pub fn write(path: &Path, parts: &[&[u8]]) -> io::Result<()> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let (process, count) = (std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    let part = path.with_extension(format!("{process}.{count}.part"));
    let mut options = File::options();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let written = options
        .open(&part)
        .and_then(|mut file| {
            parts.iter().try_for_each(|part| file.write_all(part))?;
            file.sync_all()
        })
        .and_then(|()| fs::rename(&part, path));
    if written.is_err() {
        let _ = fs::remove_file(&part);
    }
    written?;
    // The name too. Where folders cannot be opened, the system looks after it.
    match path.parent().map(File::open) {
        Some(Ok(folder)) if cfg!(unix) => folder.sync_all(),
        _ => Ok(()),
    }
}

#[cfg(all(test, unix))]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use super::*;

    fn chmod(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("own");
    }

    #[test]
    fn a_folder_that_is_made_is_private() {
        let outer = tempfile::tempdir().expect("a folder");
        let folder = outer.path().join("a").join("b");
        assert_eq!(fault(&folder), None);
        make(&folder).expect("made");
        assert_eq!(fs::metadata(&folder).expect("there").mode() & 0o777, 0o700);
        assert_eq!(fault(&folder), None);
        make(&folder).expect("it may be there");
    }

    #[test]
    fn faults_say_what_to_do() {
        let outer = tempfile::tempdir().expect("a folder");
        let folder = outer.path().join("kernels");
        make(&folder).expect("made");
        for mode in [0o755, 0o700, 0o750] {
            chmod(&folder, mode);
            assert_eq!(fault(&folder), None, "{mode:o}");
        }
        for mode in [0o775, 0o702, 0o1777] {
            chmod(&folder, mode);
            let found = fault(&folder).expect("a fault");
            assert_eq!(found.what, format!("{} can be changed by others", folder.display()));
            assert_eq!(found.remedy, format!("chmod go-w {}", folder.display()));
        }
        chmod(&folder, 0o700);
        let link = outer.path().join("link");
        symlink(&folder, &link).expect("a link");
        let found = fault(&link).expect("a fault");
        assert!(found.what.ends_with("is a link") && found.remedy.contains("what it leads to"));
        fs::write(outer.path().join("file"), b"").expect("written");
        assert!(fault(&outer.path().join("file")).expect("a fault").what.ends_with("is no folder"));
    }

    #[test]
    fn a_folder_of_another_user_is_not_used() {
        let folder = tempfile::tempdir().expect("a folder");
        // Only the superuser can give a folder away; others look at one of the superuser's.
        let given = std::os::unix::fs::chown(folder.path(), Some(12_345), None).is_ok();
        let path = if given { folder.path() } else { Path::new("/usr") };
        let found = fault(path).expect("a fault");
        let owner = if given { 12_345 } else { 0 };
        assert!(
            found.what.contains(&format!("belongs to user {owner}, and you are {}", user())),
            "{found:?}"
        );
        assert!(found.remedy.contains("ODDSMITH_CACHE_DIR"));
    }

    #[test]
    fn files_of_others_are_not_read() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a.cubin");
        assert_eq!(read(&path, 9), Ok(None));
        write(&path, &[b"ker", b"nel"]).expect("written");
        assert_eq!(fs::metadata(&path).expect("there").mode() & 0o777, 0o600);
        assert_eq!(read(&path, 6), Ok(Some(b"kernel".to_vec())));
        assert_eq!(read(&path, 5), Err("has more than 5 bytes".into()));
        chmod(&path, 0o620);
        assert_eq!(read(&path, 9), Err("can be changed by others".into()));
        chmod(&path, 0o600);
        let link = folder.path().join("link");
        symlink(&path, &link).expect("a link");
        assert_eq!(read(&link, 9), Err("is a link".into()));
        assert_eq!(read(folder.path(), 9), Err("is no file".into()));
        if std::os::unix::fs::chown(&path, Some(12_345), None).is_ok() {
            assert!(read(&path, 9).expect_err("foreign").starts_with("belongs to user 12345"));
        }
        assert_eq!(fs::read_dir(folder.path()).expect("there").count(), 2);
    }

    #[test]
    fn a_pipe_does_not_wait() {
        let folder = tempfile::tempdir().expect("a folder");
        let pipe = folder.path().join("pipe");
        let made = std::process::Command::new("mkfifo").arg(&pipe).status();
        if made.is_ok_and(|status| status.success()) {
            assert_eq!(read(&pipe, 9), Err("is no file".into()));
        }
    }

    #[test]
    fn what_cannot_be_written_leaves_nothing() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("taken");
        fs::create_dir(&path).expect("made");
        fs::write(path.join("x"), b"").expect("written");
        assert!(write(&path, &[b"x"]).is_err());
        assert_eq!(fs::read_dir(folder.path()).expect("there").count(), 1);
    }
}
