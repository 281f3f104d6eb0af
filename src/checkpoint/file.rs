//! A safetensors file, read through the page cache.
//!
//! Mapped pages count as memory of the process until they are unmapped, so a tensor is mapped window by
//! window, never all at once.
#![allow(unsafe_code)] // a file as memory

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};

use memmap2::{Mmap, MmapOptions};
use safetensors::SafeTensors;
pub use safetensors::tensor::Dtype as Kind;
use safetensors::tensor::SafeTensorError;

use crate::base::error::{Error, Result};

/// Size of the length field before the header.
const LENGTH: usize = 8;

/// A tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorEntry {
    /// Its dtype.
    pub kind: Kind,
    /// Its sizes.
    pub shape: Vec<usize>,
    /// Bytes that it takes.
    pub len: usize,
    /// Offset of its first byte in the file.
    start: usize,
}

impl TensorEntry {
    /// Number of values.
    #[must_use]
    pub fn count(&self) -> usize {
        self.shape.iter().product()
    }
}

/// Mapped bytes of a file, valid while this lives.
#[derive(Debug)]
pub struct Window(Option<Mmap>);

impl Deref for Window {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.0.as_deref().unwrap_or(&[])
    }
}

/// An open file whose header has been checked: the tensors follow each other without gaps to the end of the
/// file, and their lengths match dtype and shape.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    file: File,
    entries: BTreeMap<String, TensorEntry>,
}

impl TensorFile {
    /// Opens a file and reads its header.
    ///
    /// # Errors
    /// A file that cannot be read, or is not a complete safetensors file.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|error| Error::io(path, &error))?;
        let mut opened = Self { path: path.to_owned(), file, entries: BTreeMap::new() };
        let len = opened.len()?;
        if len < LENGTH {
            return Err(opened.wrong(format!("has {len} bytes, too few for a safetensors file")));
        }
        let whole = opened.map(0..len)?;
        let (header, metadata) = SafeTensors::read_metadata(&whole).map_err(|error| {
            let problem = match error {
                SafeTensorError::MetadataIncompleteBuffer => {
                    format!("is truncated or too long: the header does not describe its {len} bytes")
                }
                SafeTensorError::InvalidHeaderLength => {
                    format!("is truncated or not a safetensors file: its header would end after byte {len}")
                }
                error => format!("is not a safetensors file: {error}"),
            };
            opened.wrong(problem)
        })?;
        let data = LENGTH + header;
        let entries = metadata.tensors().into_iter().map(|(name, info)| {
            let (start, end) = info.data_offsets;
            let (kind, shape) = (info.dtype, info.shape.clone());
            (name, TensorEntry { kind, shape, len: end - start, start: data + start })
        });
        opened.entries = entries.collect();
        Ok(opened)
    }

    /// The path of the file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its tensors by name.
    #[must_use]
    pub fn entries(&self) -> &BTreeMap<String, TensorEntry> {
        &self.entries
    }

    /// Names of its tensors in the order of their bytes.
    #[must_use]
    pub fn in_order(&self) -> Vec<&str> {
        let mut names: Vec<_> = self.entries.iter().collect();
        names.sort_by_key(|(name, entry)| (entry.start, entry.len, *name));
        names.into_iter().map(|(name, _)| name.as_str()).collect()
    }

    /// An error about the contents of this file.
    #[must_use]
    pub fn wrong(&self, problem: String) -> Error {
        Error::File { path: self.path.display().to_string(), problem }
    }

    fn len(&self) -> Result<usize> {
        let metadata = self.file.metadata().map_err(|error| Error::io(&self.path, &error))?;
        usize::try_from(metadata.len()).map_err(|error| self.wrong(error.to_string()))
    }

    fn map(&self, range: Range<usize>) -> Result<Window> {
        if range.is_empty() {
            return Ok(Window(None));
        }
        let mut options = MmapOptions::new();
        options.offset(range.start as u64).len(range.len());
        // SAFETY: the map is only read. If another program writes to the file meanwhile, other values are
        // read, all of which are valid; if it truncates the file, the process ends with SIGBUS, as with every
        // reader that maps files.
        let map = unsafe { options.map(&self.file) };
        Ok(Window(Some(map.map_err(|error| Error::io(&self.path, &error))?)))
    }

    fn checked(&self, entry: &TensorEntry, range: &Range<usize>) -> Result<Range<usize>> {
        let (start, end) = (entry.start + range.start, entry.start + range.end);
        let len = self.len()?;
        if range.start > range.end || range.end > entry.len || end > len {
            return Err(self.wrong(format!("has {len} bytes now, fewer than when it was opened")));
        }
        Ok(start..end)
    }

    /// Bytes of a tensor.
    ///
    /// # Errors
    /// If the file has shrunk, and errors of the system.
    pub fn window(&self, entry: &TensorEntry, range: Range<usize>) -> Result<Window> {
        let range = self.checked(entry, &range)?;
        self.map(range)
    }

    /// All bytes of a small tensor.
    ///
    /// # Errors
    /// As [`TensorFile::window`].
    pub fn whole(&self, entry: &TensorEntry) -> Result<Window> {
        self.window(entry, 0..entry.len)
    }

    /// Asks the system to read ahead the bytes that are needed next.
    pub fn prefetch(&self, entry: &TensorEntry, range: Range<usize>) {
        let range = range.start.min(entry.len)..range.end.min(entry.len);
        #[cfg(unix)]
        if let Ok(Window(Some(map))) = self.window(entry, range) {
            // Only a hint.
            let _ = map.advise(memmap2::Advice::WillNeed);
        }
        #[cfg(not(unix))]
        drop(range);
    }
}
