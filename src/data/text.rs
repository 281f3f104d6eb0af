//! Columns of text in Arrow's format.

use crate::base::error::{Error, Result};

/// Concatenated strings.
#[derive(Debug)]
pub struct Texts<'a> {
    data: &'a str,
    offsets: Vec<usize>,
}

impl<'a> Texts<'a> {
    /// Wraps the buffers of an Arrow `large_string` column.
    ///
    /// `data`: UTF-8; `offsets`: 64-bit integers in the machine's byte order, one more than strings.
    ///
    /// # Errors
    ///
    /// [`Error::Value`] if the bytes are not UTF-8, or the offsets are not ascending positions in them.
    pub fn new(argument: &'static str, data: &'a [u8], offsets: &[u8]) -> Result<Self> {
        let wrong = |expected: &str, got: String| Error::Value {
            op: "tokenize",
            argument,
            expected: expected.into(),
            got,
        };
        let data = std::str::from_utf8(data).map_err(|error| wrong("UTF-8", error.to_string()))?;
        let (words, rest) = offsets.as_chunks::<8>();
        if words.is_empty() || !rest.is_empty() {
            return Err(wrong("8 bytes of offset for each end", format!("{} bytes", offsets.len())));
        }
        let offsets: Vec<usize> = words.iter().map(|word| i64::from_ne_bytes(*word) as usize).collect();
        for pair in offsets.windows(2) {
            if data.get(pair[0]..pair[1]).is_none() {
                let got = format!("a string from {} to {} of {} bytes", pair[0], pair[1], data.len());
                return Err(wrong("strings within the data", got));
            }
        }
        Ok(Self { data, offsets })
    }

    /// Number of strings.
    #[must_use]
    pub fn len(&self) -> usize {
        self.offsets.len() - 1
    }

    /// True if there are no strings.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The string at an index, which must be below [`Self::len`].
    #[must_use]
    pub fn get(&self, index: usize) -> &'a str {
        &self.data[self.offsets[index]..self.offsets[index + 1]]
    }
}

#[cfg(test)]
mod tests {
    use super::Texts;

    fn bytes(offsets: &[i64]) -> Vec<u8> {
        offsets.iter().flat_map(|offset| offset.to_ne_bytes()).collect()
    }

    #[test]
    fn strings_lie_between_offsets() {
        let texts = Texts::new("prompts", "aéb".as_bytes(), &bytes(&[0, 1, 1, 4])).unwrap();
        assert_eq!((texts.len(), texts.get(0), texts.get(1), texts.get(2)), (3, "a", "", "éb"));
        assert!(Texts::new("prompts", b"", &bytes(&[0])).unwrap().is_empty());
    }

    #[test]
    fn buffers_that_do_not_fit_are_refused() {
        let refused =
            |data: &[u8], offsets: &[u8]| Texts::new("prompts", data, offsets).unwrap_err().to_string();
        assert!(refused(b"\xff", &bytes(&[0, 1])).starts_with("tokenize: prompts is invalid utf-8"));
        assert!(refused(b"a", &[]).contains("0 bytes; must be 8 bytes of offset"));
        assert!(refused(b"a", &bytes(&[0, 1])[..9]).contains("9 bytes"));
        for offsets in [[0, 2, 2], [1, 0, 1], [-1, 0, 1]] {
            assert!(refused(b"a", &bytes(&offsets)).contains("must be strings within the data"));
        }
        // Between the two bytes of a character.
        assert!(refused("é".as_bytes(), &bytes(&[0, 1, 2])).contains("from 0 to 1 of 2 bytes"));
    }
}
