//! Where tensors go in a file that is written out of order.
//!
//! The header comes first and its length depends on all sizes. Those of tensors are known in advance; those
//! of JSON texts are not, because they contain numbers that are computed last. So texts come last, and the
//! header has the largest size it may need, padded with spaces, which the format allows. Tensors are sorted
//! by the size of their elements, as safetensors' own writer does, so that each is aligned.

use std::collections::HashMap;

use serde_json::Value;

use super::file::Kind;
use crate::base::error::{Error, Result};

/// A tensor to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayoutEntry {
    /// Its name.
    pub name: String,
    /// Its dtype.
    pub kind: Kind,
    /// Its sizes.
    pub shape: Vec<usize>,
    /// Bytes that it takes; an upper bound for a text.
    pub len: usize,
    /// A text, whose length is not known yet.
    pub text: bool,
}

impl LayoutEntry {
    /// A tensor whose bits fill full bytes.
    #[must_use]
    pub fn new(name: String, kind: Kind, shape: Vec<usize>) -> Self {
        let len = shape.iter().product::<usize>() * kind.bitsize() / 8;
        Self { name, kind, shape, len, text: false }
    }

    /// A text of at most `len` bytes.
    #[must_use]
    pub fn text(name: String, len: usize) -> Self {
        Self { name, kind: Kind::U8, shape: vec![len], len, text: true }
    }
}

/// The places of all tensors of a file.
#[derive(Debug)]
pub struct Layout {
    /// Entries in the order of the file, texts last.
    items: Vec<LayoutEntry>,
    /// Offsets of the entries that are not texts.
    starts: HashMap<String, usize>,
    header: usize,
}

impl Layout {
    /// Places the tensors.
    ///
    /// # Errors
    /// If two have the same name.
    pub fn new(mut items: Vec<LayoutEntry>) -> Result<Self> {
        items.sort_by(|a, b| (a.text, b.kind.bitsize(), &a.name).cmp(&(b.text, a.kind.bitsize(), &b.name)));
        let mut names: Vec<_> = items.iter().map(|item| &item.name).collect();
        names.sort();
        let mut pairs = names.iter().zip(names.iter().skip(1));
        if let Some((name, _)) = pairs.find(|(a, b)| a == b) {
            return Err(Error::Internal(format!("two tensors of a file are called {name:?}")));
        }
        let mut layout = Self { items, starts: HashMap::new(), header: 0 };
        let header = layout.text(|item| item.len).len();
        layout.header = header.next_multiple_of(8);
        let mut at = 8 + layout.header;
        for item in layout.items.iter().filter(|item| !item.text) {
            layout.starts.insert(item.name.clone(), at);
            at += item.len;
        }
        Ok(layout)
    }

    /// The most bytes that the file can have.
    #[must_use]
    pub fn len(&self) -> usize {
        8 + self.header + self.items.iter().map(|item| item.len).sum::<usize>()
    }

    /// True if there are no tensors.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// Names of all tensors.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.items.iter().map(|item| item.name.as_str())
    }

    /// Where the bytes of a tensor go.
    ///
    /// # Errors
    /// If it is not in this file, or is a text.
    pub fn start(&self, name: &str) -> Result<u64> {
        let start = self.starts.get(name);
        start.map(|&start| start as u64).ok_or_else(|| Error::Internal(format!("no place for {name:?}")))
    }

    /// The header, and the offset and bytes of the texts; `texts` has one text for every text entry.
    ///
    /// # Errors
    /// If a text is missing or longer than its bound.
    pub fn finish(&self, texts: &[(String, String)]) -> Result<(Vec<u8>, u64, Vec<u8>)> {
        let find =
            |item: &LayoutEntry| texts.iter().find(|(name, _)| *name == item.name).map(|(_, text)| text);
        let (mut start, mut all) = (8 + self.header, Vec::new());
        for item in &self.items {
            match find(item) {
                _ if !item.text => start += item.len,
                Some(text) if text.len() <= item.len => all.extend_from_slice(text.as_bytes()),
                _ => return Err(Error::Internal(format!("no text that fits {:?}", item.name))),
            }
        }
        let mut header = self.text(|item| find(item).filter(|_| item.text).map_or(item.len, String::len));
        header.extend(std::iter::repeat_n(' ', self.header.saturating_sub(header.len())));
        let mut bytes = (self.header as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        Ok((bytes, start as u64, all))
    }

    fn text(&self, len: impl Fn(&LayoutEntry) -> usize) -> String {
        let (mut at, mut parts) = (0, vec![r#""__metadata__":{"format":"pt"}"#.to_owned()]);
        for item in &self.items {
            let end = at + len(item);
            let name = Value::from(item.name.as_str());
            let shape = if item.text { vec![len(item)] } else { item.shape.clone() };
            let sizes = shape.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
            let kind = item.kind;
            parts.push(format!(
                r#"{name}:{{"dtype":"{kind}","shape":[{sizes}],"data_offsets":[{at},{end}]}}"#
            ));
            at = end;
        }
        format!("{{{}}}", parts.join(","))
    }
}

#[cfg(test)]
mod tests {
    use safetensors::SafeTensors;

    use super::*;

    #[test]
    fn wide_elements_come_first_and_texts_last() {
        let items = vec![
            LayoutEntry::new("codes".into(), Kind::U8, vec![3, 1]),
            LayoutEntry::text("state".into(), 40),
            LayoutEntry::new("scale".into(), Kind::F32, vec![2]),
            LayoutEntry::new("b".into(), Kind::BF16, vec![1, 3]),
            LayoutEntry::new("a".into(), Kind::BF16, vec![]),
        ];
        let layout = Layout::new(items).expect("a layout");
        assert_eq!(layout.names().collect::<Vec<_>>(), ["scale", "a", "b", "codes", "state"]);
        let texts = [("state".to_owned(), "{\"x\": 1}".to_owned())];
        let (mut file, start, text) = layout.finish(&texts).expect("a header");
        assert_eq!(file.len() % 8, 0);
        assert_eq!(file.len() as u64, layout.start("scale").expect("a place"));
        let data = file.len();
        file.resize(start as usize, 5);
        file.extend(text);
        assert!(file.len() < layout.len());
        let read = SafeTensors::deserialize(&file).expect("a whole file");
        assert_eq!(read.tensor("state").expect("it").data(), b"{\"x\": 1}");
        assert_eq!(read.tensor("b").expect("it").shape(), [1, 3]);
        for name in ["scale", "a", "b", "codes"] {
            let place = read.tensor(name).expect("it").data().as_ptr() as usize - file.as_ptr() as usize;
            assert_eq!(place as u64, layout.start(name).expect("a place"));
            assert!(place >= data);
        }
    }

    #[test]
    fn names_are_escaped_and_texts_have_to_fit() {
        let layout = Layout::new(vec![LayoutEntry::text("a\"\\\n".into(), 3)]).expect("a layout");
        let (file, _, text) = layout.finish(&[("a\"\\\n".into(), "é".into())]).expect("a header");
        let file = [file, text].concat();
        let read = SafeTensors::deserialize(&file).expect("a whole file");
        assert_eq!(read.tensor("a\"\\\n").expect("it").data(), "é".as_bytes());
        assert!(layout.finish(&[("a\"\\\n".into(), "four".into())]).is_err());
        assert!(layout.finish(&[]).is_err());
        let twice = || LayoutEntry::new("x".into(), Kind::U8, vec![1]);
        assert!(Layout::new(vec![twice(), twice()]).is_err());
    }
}
