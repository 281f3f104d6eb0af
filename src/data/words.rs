//! Splits a text into words, and caches the tokens of words.
//!
//! A BPE model of `SentencePiece`'s kind takes a complete text as one word: its merges use a heap of all
//! neighbours, and nothing can be cached. Most such models cannot merge across the beginning of a word,
//! because no token has a space mark after another character. Then merging each word separately gives the
//! same result, and frequent words are merged once.

use std::collections::HashMap;

/// A space, in the alphabet of `SentencePiece`.
const MARK: char = '▁';

/// Limits of the cache: longer or more words are not worth the memory.
const MOST_WORDS: usize = 1 << 16;
const LONGEST_WORD: usize = 64;

/// Cuts a text before each space mark that follows another character.
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

/// Whether no token crosses the beginning of a word, and the space mark is a token.
#[must_use]
pub fn are_separate<'a>(mut tokens: impl Iterator<Item = &'a str>) -> bool {
    let mut marked = false;
    tokens.all(|token| {
        marked |= token == "▁";
        Words::of(token).nth(1).is_none()
    }) && marked
}

/// A cache of the tokens of words.
#[derive(Debug, Default)]
pub struct WordCache {
    known: HashMap<Box<str>, Box<[u32]>>,
}

impl WordCache {
    /// Appends the ids of a word, from the cache or by `encode`.
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
    use super::{WordCache, Words, are_separate};

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
        let (mut cache, mut calls, mut ids) = (WordCache::default(), 0, vec![9]);
        let long = "x".repeat(65);
        for word in ["ab", "c", "ab", &long, &long] {
            let encode = |word: &str, to: &mut Vec<u32>| {
                calls += 1;
                to.extend([word.len() as u32, 7]);
                Ok::<(), ()>(())
            };
            cache.recall(word, &mut ids, encode).unwrap();
        }
        assert_eq!(ids, [9, 2, 7, 1, 7, 2, 7, 65, 7, 65, 7]);
        assert_eq!(calls, 4); // the long one twice
        assert_eq!(cache.recall("d", &mut ids, |_, _| Err("no")), Err("no"));
        assert_eq!(ids.len(), 11);
    }
}
