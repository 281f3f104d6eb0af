//! Encodes batches of text to rows of token ids, in parallel. The only module that uses `tokenizers`.

use std::str::FromStr;
use std::sync::{Mutex, PoisonError};
use std::thread;

use rayon::prelude::*;
use tokenizers::models::bpe::BPE;
use tokenizers::{
    Encoding, Model, ModelWrapper, OffsetReferential, OffsetType, PreTokenizer, Token, Tokenizer,
};

use super::pool::Pool;
use super::text::Texts;
use super::triplet::{Columns, Marks, Row, SIDES, Triplet};
use super::truncate::Limits;
use super::words::{WordCache, Words, are_separate};
use crate::base::error::{Error, Result};

/// Text of a batch of rows.
#[derive(Debug)]
pub struct Batch<'a> {
    /// Prompts.
    pub prompts: Texts<'a>,
    /// Chosen and rejected answers, as many as prompts.
    pub answers: [Texts<'a>; 2],
    /// The dataset's name, for errors.
    pub name: &'a str,
    /// Index of the first row in the dataset, for errors.
    pub first_row: u64,
}

/// A tokenizer together with the rules for rows.
#[derive(Debug)]
pub struct RowEncoder {
    tokenizer: Tokenizer,
    marks: Marks,
    limits: Limits,
    pool: Pool,
    /// Word cache of each thread; none if the library encodes complete texts.
    word_caches: Vec<Mutex<WordCache>>,
    /// Whether words can be encoded one by one.
    separate: bool,
}

/// Whether merging each word separately gives the same result; see [`super::words`].
fn has_separate_words(model: &BPE) -> bool {
    let vocabulary = model.get_vocab();
    // A character without a token would let its neighbours merge.
    let bytes = || (0..=255u8).all(|byte| vocabulary.contains_key(&format!("<0x{byte:02X}>")));
    let unknown = match &model.unk_token {
        Some(token) => !token.contains('▁'),
        None => model.byte_fallback && bytes(),
    };
    // These settings apply to a complete word.
    let whole = model.ignore_merges
        || model.continuing_subword_prefix.is_some()
        || model.end_of_word_suffix.is_some();
    unknown && !whole && are_separate(vocabulary.keys().map(String::as_str))
}

/// Whether the post-processor keeps tokens unchanged if it may not add special tokens.
fn keeps_tokens(tokenizer: &Tokenizer) -> bool {
    let ids = [0, 1, 2];
    let tokens = ids.map(|id| Token::new(id, "a".into(), (id as usize, id as usize + 1)));
    let encoding = Encoding::from_tokens(tokens.into(), 0);
    tokenizer.post_process(encoding, None, false).is_ok_and(|after| after.get_ids() == ids)
}

impl RowEncoder {
    /// Reads a `tokenizer.json`; its truncation and padding are not used.
    ///
    /// `split_special_tokens`: encode special tokens in the text as any other text.
    ///
    /// # Errors
    ///
    /// [`Error::Tokenizer`] if the library cannot read the tokenizer, or an id is 2^31 or more.
    pub fn new(json: &str, split_special_tokens: bool, marks: Marks, limits: Limits) -> Result<Self> {
        let mut tokenizer = Tokenizer::from_str(json).map_err(|error| Error::Tokenizer(error.to_string()))?;
        let marked = [marks.bos, marks.eos];
        let highest = tokenizer.get_vocab(true).into_values().chain(marked.into_iter().flatten()).max();
        if let Some(id) = highest.filter(|&id| i32::try_from(id).is_err()) {
            return Err(Error::Tokenizer(format!(
                "the token id {id} is too large; must be below 2147483648"
            )));
        }
        tokenizer.with_truncation(None).map_err(|error| Error::Tokenizer(error.to_string()))?;
        tokenizer.with_padding(None);
        tokenizer.set_encode_special_tokens(split_special_tokens);
        let (mut word_caches, mut separate) = (Vec::new(), false);
        if let ModelWrapper::BPE(model) = tokenizer.get_model()
            && model.dropout.is_none()
            && keeps_tokens(&tokenizer)
        {
            separate = has_separate_words(model);
            let threads = thread::available_parallelism().map_or(1, usize::from);
            word_caches.resize_with(threads, Mutex::default);
        }
        Ok(Self { tokenizer, marks, limits, pool: Pool::default(), word_caches, separate })
    }

    /// Appends the ids of a text without special tokens, the same as the library's `encode`.
    fn encode(&self, text: &str, cache: Option<&mut WordCache>, to: &mut Vec<u32>) -> tokenizers::Result<()> {
        let Some(cache) = cache else {
            to.extend_from_slice(self.tokenizer.encode_fast(text, false)?.get_ids());
            return Ok(());
        };
        let model = self.tokenizer.get_model();
        let mut recall = |word: &str, to: &mut Vec<u32>| -> tokenizers::Result<()> {
            cache.recall(word, to, |word, to| {
                to.extend(model.tokenize(word)?.into_iter().map(|token| token.id));
                Ok(())
            })
        };
        let added = self.tokenizer.get_added_vocabulary();
        let mut pieces = added.extract_and_normalize(self.tokenizer.get_normalizer(), text);
        if let Some(pre_tokenizer) = self.tokenizer.get_pre_tokenizer() {
            pre_tokenizer.pre_tokenize(&mut pieces)?;
        }
        for (piece, _, tokens) in pieces.get_splits(OffsetReferential::Normalized, OffsetType::None) {
            match tokens {
                Some(tokens) => to.extend(tokens.iter().map(|token| token.id)),
                None if self.separate => Words::of(piece).try_for_each(|word| recall(word, to))?,
                None => recall(piece, to)?,
            }
        }
        Ok(())
    }

    /// The word cache of this thread, if texts are encoded word by word.
    fn cache(&self) -> Option<&Mutex<WordCache>> {
        let thread = rayon::current_thread_index().unwrap_or(0);
        self.word_caches.get(thread % self.word_caches.len().max(1))
    }

    /// The columns of a batch: each prompt is encoded once alone and once with each answer.
    ///
    /// `parallel`: use every core; otherwise only the calling thread.
    ///
    /// # Errors
    ///
    /// [`Error::Row`] for the first row that cannot be encoded, [`Error::Value`] if the columns of text
    /// have different lengths or a column has more than 2^31 - 1 tokens.
    pub fn columns(&self, batch: &Batch<'_>, parallel: bool) -> Result<Columns> {
        let count = batch.prompts.len();
        for (argument, texts) in SIDES.into_iter().zip(&batch.answers) {
            if texts.len() != count {
                let (expected, got) = (format!("{count}, as prompts"), format!("{} texts", texts.len()));
                return Err(Error::Value { op: "tokenize", argument, expected, got });
            }
        }
        let rows: Vec<Result<Row>> = if parallel {
            let each =
                || (0..count).into_par_iter().map_init(String::new, |text, row| self.row(batch, row, text));
            self.pool.get()?.install(|| each().collect())
        } else {
            let mut text = String::new();
            (0..count).map(|row| self.row(batch, row, &mut text)).collect()
        };
        // Not collected as a `Result` above: that would return any of several errors, not the first.
        let rows = rows.into_iter().collect::<Result<Vec<Row>>>()?;
        Columns::of(&rows, &self.marks).ok_or_else(|| Error::Value {
            op: "tokenize",
            argument: "batch",
            expected: "fewer rows".into(),
            got: format!("{count} rows of more than 2^31 - 1 tokens"),
        })
    }

    fn row(&self, batch: &Batch<'_>, row: usize, text: &mut String) -> Result<Row> {
        let fault = |fault: String| Error::Row {
            row: format!("{} row {}", batch.name, batch.first_row + row as u64),
            fault,
        };
        let mut cache = self.cache().map(|cache| cache.lock().unwrap_or_else(PoisonError::into_inner));
        let mut encode = |text: &str, field: &str| -> Result<Vec<u32>> {
            let mut ids = Vec::with_capacity(text.len() / 2);
            let done = self.encode(text, cache.as_deref_mut(), &mut ids);
            done.map_err(|error| fault(format!("{field} cannot be tokenised: {error}")))?;
            Ok(ids)
        };
        let prompt = batch.prompts.get(row);
        let alone = encode(prompt, "prompt")?;
        let mut with = |side: usize| -> Result<Vec<u32>> {
            text.clear();
            text.push_str(prompt);
            text.push_str(batch.answers[side].get(row));
            encode(text, SIDES[side])
        };
        let full = [with(0)?, with(1)?];
        let triplet = Triplet { prompt: &alone, full: [&full[0], &full[1]] };
        triplet.row(&self.marks, &self.limits).map_err(|misfit| fault(misfit.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::{Batch, RowEncoder};
    use crate::base::error::{Error, Result};
    use crate::data::text::Texts;
    use crate::data::triplet::{Columns, Marks};
    use crate::data::truncate::{Keep, Limits};
    use crate::data::words::WordCache;

    const MARKS: Marks = Marks { bos: Some(1), eos: Some(2), label_pad: -100 };
    const LIMITS: Limits = Limits { max_length: 20, max_prompt_length: None, keep: Keep::End };

    /// Letters, of which "a" and "b" merge; the file asks for truncation to 1 token and padding to 9.
    const LETTERS: &str = r#"{
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": null,
                    "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"},
        "added_tokens": [{"id": 2, "content": "</s>", "single_word": false, "lstrip": false,
                          "rstrip": false, "normalized": false, "special": true}],
        "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": null,
        "model": {"type": "BPE", "dropout": null, "unk_token": null,
                  "continuing_subword_prefix": null, "end_of_word_suffix": null,
                  "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                  "vocab": {"<pad>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4, "c": 5, "ab": 6, "s": 7},
                  "merges": [["a", "b"]]}
    }"#;

    fn encoder(split_special_tokens: bool) -> RowEncoder {
        RowEncoder::new(LETTERS, split_special_tokens, MARKS, LIMITS).unwrap()
    }

    /// Data and offsets of an Arrow column.
    fn column(texts: &[&str]) -> (String, Vec<u8>) {
        let ends = texts.iter().scan(0, |end, text| {
            *end += text.len() as i64;
            Some(*end)
        });
        (texts.concat(), std::iter::once(0).chain(ends).flat_map(i64::to_ne_bytes).collect())
    }

    fn columns(encoder: &RowEncoder, rows: &[[&str; 3]], parallel: bool) -> Result<Columns> {
        let parts = [0, 1, 2].map(|part| column(&rows.iter().map(|row| row[part]).collect::<Vec<_>>()));
        let [prompts, chosen, rejected] =
            parts.each_ref().map(|(data, offsets)| Texts::new("texts", data.as_bytes(), offsets).unwrap());
        encoder
            .columns(&Batch { prompts, answers: [chosen, rejected], name: "mine", first_row: 40 }, parallel)
    }

    #[test]
    fn rows_are_encoded_whole_and_without_padding() {
        let made = columns(&encoder(false), &[["ca", "c", "bb"], ["c", "a", "</s>"]], true).unwrap();
        // "a" and "b" merge over the boundary, so the "a" belongs to the rejected answer.
        assert_eq!(made.ids[0].values, [1, 5, 1, 5]);
        assert_eq!(made.ids[1].values, [1, 5, 3, 5, 2, 1, 5, 3, 2]);
        assert_eq!(made.ids[2].values, [1, 5, 6, 4, 2, 1, 5, 2]);
        assert_eq!(made.labels[1], [-100, -100, 6, 4, 2, -100, -100, 2]);
    }

    #[test]
    fn special_tokens_may_be_split() {
        let made = columns(&encoder(true), &[["c", "</s>", "a"]], true).unwrap();
        assert_eq!(made.ids[1].values, [1, 5, 7, 2]); // only the "s" is known
    }

    #[test]
    fn threads_change_nothing() {
        let texts = ["", "a", "b", "ab", "cab", "abc", "bca", "</s>"];
        let rows: Vec<[&str; 3]> =
            (0..512).map(|case| [texts[case / 64], texts[case / 8 % 8], texts[case % 8]]).collect();
        let encoder = encoder(false);
        assert_eq!(columns(&encoder, &rows, true).unwrap(), columns(&encoder, &rows, false).unwrap());
    }

    #[test]
    fn the_first_bad_row_is_named() {
        // Three merges: "a", "b", "c" become one, so prompt and answer have fewer tokens than "ab".
        let json = LETTERS.replace(r#""s": 7"#, r#""s": 7, "bc": 8, "abc": 9"#);
        let json = json.replace(r#"[["a", "b"]]"#, r#"[["b", "c"], ["a", "bc"]]"#);
        let encoder = RowEncoder::new(&json, false, MARKS, LIMITS).unwrap();
        let mut rows = vec![["c", "a", "b"]; 50];
        rows[31] = ["ab", "a", "c"];
        rows[47] = ["ab", "c", "a"];
        let error = columns(&encoder, &rows, true).unwrap_err().to_string();
        let words =
            "mine row 71: prompt and rejected together have 1 tokens, fewer than the prompt alone (2)";
        assert!(error.starts_with(words), "{error}");
    }

    /// [`LETTERS`] with other settings of the model, and spaces as `SentencePiece` marks them.
    fn marked(settings: &[(&str, &str)], vocabulary: &str, merges: &str) -> RowEncoder {
        let pre = r#""pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first",
                     "split": false}"#;
        let mut json = LETTERS.replace(r#""pre_tokenizer": null"#, pre);
        json = json.replace(r#""s": 7"#, &format!(r#""s": 7, "▁": 8, "▁▁": 9, "▁a": 10{vocabulary}"#));
        let common = r#"["▁", "▁"], ["a", "b"], ["▁", "a"]"#;
        json = json.replace(r#"["a", "b"]"#, &format!("{common}{merges}"));
        for (from, to) in settings {
            assert!(json.contains(from), "{from}");
            json = json.replace(from, to);
        }
        RowEncoder::new(&json, false, MARKS, LIMITS).unwrap()
    }

    #[test]
    fn words_one_by_one_are_the_whole_text() {
        let unknown = (r#""unk_token": null"#, r#""unk_token": "<pad>""#);
        let fused = (r#""fuse_unk": false"#, r#""fuse_unk": true"#);
        let ignoring = (r#""ignore_merges": false"#, r#""ignore_merges": true"#);
        let over = (r#", "b▁": 11, "b▁a": 12"#, r#", ["b", "▁"], ["b▁", "a"]"#);
        // The last three would have other ids if they were cut into words.
        let cases = [
            (true, marked(&[unknown], "", "")),
            (true, marked(&[unknown, fused], "", "")),
            (false, marked(&[], "", "")),
            (false, marked(&[unknown], over.0, over.1)),
            (false, marked(&[unknown, ignoring], r#", "▁ab": 13"#, "")),
        ];
        let letters = [' ', 'a', 'b', 'é', ' '];
        for (separate, encoder) in &cases {
            assert_eq!(encoder.separate, *separate);
            let mut cache = WordCache::default();
            for case in 0..5_usize.pow(6) {
                let text: String = (0..6).map(|place| letters[case / 5_usize.pow(place) % 5]).collect();
                let (mut ids, mut whole) = (Vec::new(), Vec::new());
                encoder.encode(&text, Some(&mut cache), &mut ids).unwrap();
                encoder.encode(&text, None, &mut whole).unwrap();
                assert_eq!(ids, whole, "{text:?}");
            }
        }
    }

    #[test]
    fn what_is_no_tokenizer_is_refused() {
        let error = RowEncoder::new("{}", false, MARKS, LIMITS).unwrap_err();
        assert!(matches!(error, Error::Tokenizer(_)), "{error}");
        let marks = Marks { eos: Some(1 << 31), ..MARKS };
        let error = RowEncoder::new(LETTERS, false, marks, LIMITS).unwrap_err();
        assert!(error.to_string().contains("2147483648"), "{error}");
    }

    #[test]
    fn columns_of_different_lengths_are_refused() {
        let (data, two) = column(&["a", "b"]);
        let (_, one) = column(&["a"]);
        let texts = |offsets| Texts::new("texts", data.as_bytes(), offsets).unwrap();
        let batch =
            Batch { prompts: texts(&two), answers: [texts(&two), texts(&one)], name: "", first_row: 0 };
        let error = encoder(false).columns(&batch, true).unwrap_err().to_string();
        assert_eq!(error, "tokenize: rejected is 1 texts; must be 2, as prompts");
    }
}
