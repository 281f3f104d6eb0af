//! Several files as one set of tensors.

use std::collections::BTreeMap;
use std::path::Path;

use super::file::{TensorEntry, TensorFile};
use crate::base::error::{Error, Result};

/// A tensor and the file it is in.
#[derive(Clone, Copy, Debug)]
pub struct Found<'a> {
    /// The file.
    pub file: &'a TensorFile,
    /// The tensor in it.
    pub entry: &'a TensorEntry,
}

/// Open files; no tensor is in two of them.
#[derive(Debug)]
pub struct Collection {
    files: Vec<TensorFile>,
    places: BTreeMap<String, usize>,
}

impl Collection {
    /// Opens all files.
    ///
    /// # Errors
    /// The first file that cannot be read or is not a safetensors file, and a tensor that two files have.
    pub fn open<P: AsRef<Path>>(paths: &[P]) -> Result<Self> {
        let (mut files, mut places) = (Vec::with_capacity(paths.len()), BTreeMap::new());
        for (place, path) in paths.iter().enumerate() {
            let file = TensorFile::open(path.as_ref())?;
            for name in file.entries().keys() {
                if let Some(other) = places.insert(name.clone(), place) {
                    let other: &TensorFile = &files[other];
                    return Err(
                        file.wrong(format!("has a tensor {name:?} that {} has too", other.path().display()))
                    );
                }
            }
            files.push(file);
        }
        Ok(Self { files, places })
    }

    /// The files, in the order they were given.
    #[must_use]
    pub fn files(&self) -> &[TensorFile] {
        &self.files
    }

    /// A tensor by name.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<Found<'_>> {
        let file = &self.files[*self.places.get(name)?];
        Some(Found { file, entry: &file.entries()[name] })
    }

    /// A tensor that must exist.
    ///
    /// # Errors
    /// If it does not exist.
    pub fn get(&self, name: &str) -> Result<Found<'_>> {
        self.find(name).ok_or_else(|| {
            let path = self.files.first().map(|file| file.path().display().to_string());
            let (path, more) = (path.unwrap_or_default(), self.files.len().saturating_sub(1));
            let others =
                if more > 0 { format!(" ({more} other files do not have it either)") } else { String::new() };
            Error::File { path, problem: format!("has no tensor {name:?}{others}") }
        })
    }

    /// True if a name begins with `prefix`.
    pub fn names_from<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = &'a str> + 'a {
        let range =
            self.places.range::<str, _>((std::ops::Bound::Included(prefix), std::ops::Bound::Unbounded));
        range.map(|(name, _)| name.as_str()).take_while(move |name| name.starts_with(prefix))
    }
}
