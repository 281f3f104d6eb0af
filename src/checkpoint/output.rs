//! A safetensors file while it is written.

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;

use super::layout::Layout;
use crate::base::error::{Error, Result};

/// A new file, written in any order. It is not a valid safetensors file before [`Output::finish`].
#[derive(Debug)]
pub struct Output {
    path: PathBuf,
    file: File,
    layout: Layout,
    texts: Vec<(String, String)>,
}

impl Output {
    /// Creates the file.
    ///
    /// # Errors
    /// If it exists or cannot be created.
    pub fn create(path: &Path, layout: Layout) -> Result<Self> {
        let file = OpenOptions::new().write(true).create_new(true).open(path);
        let file = file.map_err(|error| Error::io(path, &error))?;
        Ok(Self { path: path.to_owned(), file, layout, texts: Vec::new() })
    }

    /// Writes bytes of a tensor, `at` bytes after its first.
    ///
    /// # Errors
    /// If there is no such tensor, and errors of the system, such as a full disk.
    pub fn write(&self, name: &str, at: usize, bytes: &[u8]) -> Result<()> {
        let start = self.layout.start(name)? + at as u64;
        self.write_at(bytes, start)
    }

    fn write_at(&self, bytes: &[u8], start: u64) -> Result<()> {
        write_all_at(&self.file, bytes, start).map_err(|error| Error::io(&self.path, &error))
    }

    /// Keeps a text until the end.
    pub fn text(&mut self, name: String, text: String) {
        self.texts.push((name, text));
    }

    /// Writes texts and header. The file is complete, but may not be on the disk yet: see [`Disk`].
    ///
    /// # Errors
    /// If a text is missing, and errors of the system.
    pub fn finish(&self) -> Result<()> {
        let (header, start, texts) = self.layout.finish(&self.texts)?;
        self.write_at(&texts, start)?;
        self.write_at(&header, 0)
    }
}

/// A request to write a file to the disk.
type Request = (PathBuf, File);

/// A thread that waits for the disk, so that the other threads do not.
#[derive(Debug)]
pub struct Disk {
    requests: SyncSender<Request>,
    thread: JoinHandle<Result<()>>,
}

impl Disk {
    /// Starts the thread.
    #[must_use]
    pub fn start() -> Self {
        let (requests, waiting) = sync_channel::<Request>(1);
        let thread = std::thread::spawn(move || {
            let mut result = Ok(());
            for (path, file) in waiting {
                let synced = file.sync_all().map_err(|error| Error::io(&path, &error));
                result = result.and(synced);
            }
            result
        });
        Self { requests, thread }
    }

    fn request(output: &Output) -> Result<Request> {
        let file = output.file.try_clone().map_err(|error| Error::io(&output.path, &error))?;
        Ok((output.path.clone(), file))
    }

    /// Starts to flush what is written so far to the disk, unless the disk is busy.
    ///
    /// # Errors
    /// Errors of the system.
    pub fn begin(&self, output: &Output) -> Result<()> {
        // A full channel means that the thread is busy.
        let _ = self.requests.try_send(Self::request(output)?);
        Ok(())
    }

    /// Flushes a complete file to the disk.
    ///
    /// # Errors
    /// Errors of the system.
    pub fn complete(&self, output: &Output) -> Result<()> {
        let gone = |_| Error::Internal("the thread that waits for the disk is gone".into());
        self.requests.send(Self::request(output)?).map_err(gone)
    }

    /// Waits until everything is on the disk.
    ///
    /// # Errors
    /// The first error of the disk.
    pub fn wait(self) -> Result<()> {
        drop(self.requests);
        let gone = |_| Error::Internal("the thread that waits for the disk has panicked".into());
        self.thread.join().map_err(gone)?
    }
}

#[cfg(unix)]
fn write_all_at(file: &File, bytes: &[u8], start: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, start)
}

#[cfg(not(unix))]
fn write_all_at(mut file: &File, bytes: &[u8], start: u64) -> std::io::Result<()> {
    use std::io::{Seek, SeekFrom, Write};
    file.seek(SeekFrom::Start(start))?;
    file.write_all(bytes)
}

#[cfg(test)]
mod tests {
    use super::super::file::{Kind, TensorFile};
    use super::super::layout::LayoutEntry;
    use super::*;

    #[test]
    fn parts_may_come_in_any_order() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("x.safetensors");
        let items = vec![
            LayoutEntry::new("a".into(), Kind::U8, vec![4]),
            LayoutEntry::new("b".into(), Kind::BF16, vec![1]),
            LayoutEntry::text("t".into(), 9),
        ];
        let layout = || Layout::new(items.clone()).expect("a layout");
        let mut output = Output::create(&path, layout()).expect("a file");
        output.write("a", 2, &[3, 4]).expect("room");
        output.write("b", 0, &[5, 6]).expect("room");
        output.write("a", 0, &[1, 2]).expect("room");
        assert!(output.write("c", 0, &[1]).is_err());
        assert!(output.write("t", 0, &[1]).is_err());
        assert!(output.finish().is_err());
        output.text("t".into(), "text".into());
        let disk = Disk::start();
        disk.begin(&output).expect("a disk");
        output.finish().expect("a file");
        disk.complete(&output).expect("a disk");
        disk.wait().expect("a disk");
        let file = TensorFile::open(&path).expect("a whole file");
        let read = |name: &str| file.whole(&file.entries()[name]).expect("bytes").to_vec();
        assert_eq!((read("a"), read("b"), read("t")), (vec![1, 2, 3, 4], vec![5, 6], b"text".to_vec()));

        let error = Output::create(&path, layout()).expect_err("the file is there");
        assert!(matches!(error, Error::Io { code: Some(17), .. }), "{error}");
    }
}
