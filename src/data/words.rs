//! Words of a text, and the tokens of the words seen before.
//!
//! A BPE model of `SentencePiece`'s kind takes a whole text as one word: its merges run through a heap
//! of all neighbours, and no part of a text is ever met again. Most such models cannot merge over the
//! beginning of a word, because no token has a mark of a space behind another character. Then each
//! word is merged by itself with the same result, and frequent words need to be merged once.

use std::collections::HashMap;

/// A space, in the alphabet of `SentencePiece`.
const MARK: char = '▁';

/// Words that are remembered; of longer or more words the memory is not worth it.
const MOST_WORDS: usize = 1 << 16;
const LONGEST_WORD: usize = 64;

/// Cuts a text before each mark of a space that another character precedes.
#[derive(Clone, Debug)]
pub struct Words<'a>(&'a str);

impl<'a> Words<'a> {
    /// The words of a text.
    #[must_use]
    pub fn of(text: &'a str) -> Self {
        Self(text)
    }
}

impl<'a> Iterator for Words<'a> {
    type Item = &'a str;

    fn next(&mut self) -> Option<&'a str> {
        let mut inside = false;
        let end = self.0.char_indices().find_map(|(index, character)| {
            let cut = inside && character == MARK;
            inside |= character != MARK;
            cut.then_some(index)
        });
        let (word, rest) = self.0.split_at(end.unwrap_or(self.0.len()));
        self.0 = rest;
        (!word.is_empty()).then_some(word)
    }
}

/// Whether no token reaches over the beginning of a word, and the mark itself is one.
#[must_use]
pub fn are_separate<'a>(mut tokens: impl Iterator<Item = &'a str>) -> bool {
    let mut marked = false;
    tokens.all(|token| {
        marked |= token == "▁";
        Words::of(token).nth(1).is_none()
    }) && marked
}

/// Tokens of words seen before.
#[derive(Debug, Default)]
pub struct Memory {
    known: HashMap<Box<str>, Box<[u32]>>,
}

impl Memory {
    /// Appends the ids of a word, from memory or by `encode`.
    ///
    /// # Errors
    ///
    /// What `encode` returns.
    pub fn recall<E>(
        &mut self,
        word: &str,
        to: &mut Vec<u32>,
        encode: impl FnOnce(&str, &mut Vec<u32>) -> Result<(), E>,
    ) -> Result<(), E> {
        if let Some(ids) = self.known.get(word) {
            to.extend_from_slice(ids);
            return Ok(());
        }
        let start = to.len();
        encode(word, to)?;
        if word.len() <= LONGEST_WORD && self.known.len() < MOST_WORDS {
            self.known.insert(word.into(), to[start..].into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{Memory, Words, are_separate};

    #[test]
    fn words_begin_with_their_spaces() {
        let words = |text| Words::of(text).collect::<Vec<_>>();
        assert_eq!(words("▁a▁▁bc▁é▁"), ["▁a", "▁▁bc", "▁é", "▁"]);
        assert_eq!(words("ab"), ["ab"]);
        assert_eq!(words("▁▁"), ["▁▁"]);
        assert!(words("").is_empty());
    }

    #[test]
    fn a_token_that_reaches_over_a_word_joins_all() {
        let separate = |tokens: &[&str]| are_separate(tokens.iter().copied());
        assert!(separate(&["▁", "▁▁", "▁a", "ab"]));
        assert!(!separate(&["▁", "a▁"]));
        assert!(!separate(&["▁", "▁a▁b"]));
        assert!(!separate(&["a", "b"]));
    }

    #[test]
    fn a_word_is_encoded_once() {
        let (mut memory, mut calls, mut ids) = (Memory::default(), 0, vec![9]);
        let long = "x".repeat(65);
        for word in ["ab", "c", "ab", &long, &long] {
            let encode = |word: &str, to: &mut Vec<u32>| {
                calls += 1;
                to.extend([word.len() as u32, 7]);
                Ok::<(), ()>(())
            };
            memory.recall(word, &mut ids, encode).unwrap();
        }
        assert_eq!(ids, [9, 2, 7, 1, 7, 2, 7, 65, 7, 65, 7]);
        assert_eq!(calls, 4); // the long one twice
        assert_eq!(memory.recall("d", &mut ids, |_, _| Err("no")), Err("no"));
        assert_eq!(ids.len(), 11);
    }
}
