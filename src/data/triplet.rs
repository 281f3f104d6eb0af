//! One row: joins a prompt with its two answers, finds where the answers begin, adds BOS and EOS, truncates.

use std::fmt;
use std::ops::Range;

use super::truncate::{Lengths, Limits};

/// The sides of a pair; arrays of two in this file have this order.
pub const SIDES: [&str; 2] = ["chosen", "rejected"];

/// Special token ids and the label of prompt tokens.
#[derive(Clone, Copy, Debug)]
pub struct Marks {
    /// Added before the prompt, unless it already starts with it.
    pub bos: Option<u32>,
    /// Added after the answer, unless it already ends with it.
    pub eos: Option<u32>,
    /// Label of prompt tokens.
    pub label_pad: i32,
}

/// A row as the tokenizer encodes it, without special tokens.
#[derive(Clone, Copy, Debug)]
pub struct Triplet<'a> {
    /// The prompt alone.
    pub prompt: &'a [u32],
    /// The prompt together with each answer.
    pub full: [&'a [u32]; 2],
}

/// Why a triplet cannot become a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Misfit {
    /// Prompt and answer together have fewer tokens than the prompt alone.
    Shrunk {
        /// The answer's name.
        side: &'static str,
        /// Tokens of prompt and answer together.
        full: usize,
        /// Tokens of the prompt.
        prompt: usize,
    },
    /// The sides disagree about the prompt by more than its last token.
    Prompts,
}

impl fmt::Display for Misfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Misfit::Shrunk { side, full, prompt } => write!(
                f,
                "prompt and {side} together have {full} tokens, fewer than the prompt alone ({prompt}), so \
                 the answer has no first token; end the prompt where a word ends"
            ),
            Misfit::Prompts => f.write_str(
                "the prompt's tokens differ between chosen and rejected by more than the last one; end the \
                 prompt where a word ends",
            ),
        }
    }
}

/// Token ids of a row: prompt, then the chosen and the rejected sequence.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Row {
    /// The ids of all three, concatenated.
    pub ids: Vec<i32>,
    /// Number of tokens of each.
    pub lengths: [usize; 3],
    /// Prompt tokens at the start of the chosen and the rejected sequence.
    pub masked: [usize; 2],
    /// True if the pair was truncated.
    pub overlength: bool,
}

/// Tokens with an optional BOS and EOS, not copied yet.
#[derive(Clone, Copy)]
struct Marked<'a> {
    front: Option<u32>,
    ids: &'a [u32],
    back: Option<u32>,
}

impl<'a> Marked<'a> {
    fn front(ids: &'a [u32], mark: Option<u32>) -> Self {
        Self { front: mark.filter(|mark| ids.first() != Some(mark)), ids, back: None }
    }

    fn back(ids: &'a [u32], mark: Option<u32>) -> Self {
        Self { front: None, ids, back: mark.filter(|mark| ids.last() != Some(mark)) }
    }

    fn len(&self) -> usize {
        self.ids.len() + usize::from(self.front.is_some()) + usize::from(self.back.is_some())
    }

    fn copy(&self, range: Range<usize>, to: &mut Vec<i32>) {
        let all = self.front.into_iter().chain(self.ids.iter().copied()).chain(self.back);
        to.extend(all.skip(range.start).take(range.len()).map(|id| id as i32));
    }
}

/// Where the answer begins: after the prompt, or one token earlier if the end of the prompt merged with the
/// answer; the merged token belongs to the answer.
fn boundary(triplet: &Triplet<'_>, side: usize) -> Result<usize, Misfit> {
    let (prompt, full) = (triplet.prompt, triplet.full[side]);
    if full.len() < prompt.len() {
        return Err(Misfit::Shrunk { side: SIDES[side], full: full.len(), prompt: prompt.len() });
    }
    // An empty prompt is a prefix of everything, so a prompt that is not a prefix has a last token.
    Ok(if full.starts_with(prompt) { prompt.len() } else { prompt.len() - 1 })
}

impl Triplet<'_> {
    /// The row, with BOS and EOS, cut to length.
    ///
    /// Ids must be below 2^31.
    ///
    /// # Errors
    ///
    /// [`Misfit`] if prompt and answer cannot be separated.
    pub fn row(&self, marks: &Marks, limits: &Limits) -> Result<Row, Misfit> {
        let cuts = [boundary(self, 0)?, boundary(self, 1)?];
        let [chosen, rejected] = [0, 1].map(|side| &self.full[side][..cuts[side]]);
        let differing = chosen.iter().zip(rejected).filter(|(a, b)| a != b).count();
        if differing > 1 || cuts[0].abs_diff(cuts[1]) > 1 {
            return Err(Misfit::Prompts);
        }

        // A last token that merged with an answer is not part of the prompt for generation.
        let alone = Marked::front(&self.prompt[..cuts[0].min(cuts[1])], marks.bos);
        let prompts = [chosen, rejected].map(|ids| Marked::front(ids, marks.bos));
        let answers = [0, 1].map(|side| Marked::back(&self.full[side][cuts[side]..], marks.eos));
        let kept = limits.cut(&Lengths {
            alone: alone.len(),
            prompts: prompts.map(|tokens| tokens.len()),
            answers: answers.map(|tokens| tokens.len()),
        });

        let masked = [kept.prompts[0].len(), kept.prompts[1].len()];
        let lengths = [kept.alone.len(), masked[0] + kept.answers[0], masked[1] + kept.answers[1]];
        let mut ids = Vec::with_capacity(lengths.iter().sum());
        alone.copy(kept.alone, &mut ids);
        for (side, prompt) in kept.prompts.into_iter().enumerate() {
            prompts[side].copy(prompt, &mut ids);
            answers[side].copy(0..kept.answers[side], &mut ids);
        }
        Ok(Row { ids, lengths, masked, overlength: kept.overlength })
    }
}

/// Lists of different lengths, concatenated, in Arrow's format.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lists {
    /// The items of all lists.
    pub values: Vec<i32>,
    /// Where each list begins, and where the last one ends.
    pub offsets: Vec<i32>,
}

impl Default for Lists {
    fn default() -> Self {
        Self { values: Vec::new(), offsets: vec![0] }
    }
}

/// The columns of many rows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Columns {
    /// Ids of the prompt, of the chosen and of the rejected sequence.
    pub ids: [Lists; 3],
    /// Labels of the chosen and the rejected sequence, which have the offsets of their ids.
    pub labels: [Vec<i32>; 2],
    /// 1 where the pair was truncated.
    pub overlength: Vec<u8>,
    /// 1 where neither side has a label.
    pub empty: Vec<u8>,
}

impl Columns {
    /// Concatenates rows; `None` if one column has more than 2^31 - 1 tokens.
    #[must_use]
    pub fn of(rows: &[Row], marks: &Marks) -> Option<Self> {
        let mut columns = Self::default();
        let total = |part: usize| rows.iter().map(|row| row.lengths[part]).sum::<usize>();
        for (part, lists) in columns.ids.iter_mut().enumerate() {
            i32::try_from(total(part)).ok()?;
            lists.values.reserve_exact(total(part));
            lists.offsets.reserve_exact(rows.len());
        }
        for (side, labels) in columns.labels.iter_mut().enumerate() {
            labels.reserve_exact(total(1 + side));
        }
        for row in rows {
            columns.push(row, marks);
        }
        Some(columns)
    }

    fn push(&mut self, row: &Row, marks: &Marks) {
        let mut rest = row.ids.as_slice();
        let mut empty = true;
        for (part, (lists, &length)) in self.ids.iter_mut().zip(&row.lengths).enumerate() {
            let (ids, others) = rest.split_at(length);
            rest = others;
            lists.values.extend_from_slice(ids);
            lists.offsets.push(lists.values.len() as i32);
            if let Some(side) = part.checked_sub(1) {
                let masked = row.masked[side];
                let labels = &mut self.labels[side];
                labels.resize(labels.len() + masked, marks.label_pad);
                labels.extend_from_slice(&ids[masked..]);
                empty &= masked == length && (marks.label_pad < 0 || masked == 0);
            }
        }
        self.overlength.push(u8::from(row.overlength));
        self.empty.push(u8::from(empty));
    }
}

#[cfg(test)]
mod tests {
    use super::{Columns, Lists, Marks, Misfit, Row, Triplet};
    use crate::data::truncate::{Keep, Limits};

    const MARKS: Marks = Marks { bos: Some(1), eos: Some(2), label_pad: -100 };

    fn limits(max_length: usize) -> Limits {
        Limits { max_length, max_prompt_length: None, keep: Keep::End }
    }

    fn row(prompt: &[u32], chosen: &[u32], rejected: &[u32]) -> Result<Row, Misfit> {
        Triplet { prompt, full: [chosen, rejected] }.row(&MARKS, &limits(20))
    }

    #[test]
    fn answers_begin_behind_the_prompt() {
        let made = row(&[5, 6], &[5, 6, 7], &[5, 6, 8, 9]).unwrap();
        assert_eq!(made.ids, [1, 5, 6, 1, 5, 6, 7, 2, 1, 5, 6, 8, 9, 2]);
        assert_eq!((made.lengths, made.masked), ([3, 5, 6], [3, 3]));
        assert!(!made.overlength);
    }

    #[test]
    fn a_token_that_merged_with_an_answer_is_the_answer_s() {
        // 6 became 16 before the rejected answer: its prompt, and the prompt alone, lose the 6.
        let made = row(&[5, 6], &[5, 6, 7], &[5, 16]).unwrap();
        assert_eq!(made.ids, [1, 5, 1, 5, 6, 7, 2, 1, 5, 16, 2]);
        assert_eq!((made.lengths, made.masked), ([2, 5, 4], [3, 2]));
    }

    #[test]
    fn marks_are_added_once() {
        let made = row(&[1, 5], &[1, 5, 7, 2], &[1, 5]).unwrap();
        assert_eq!(made.ids, [1, 5, 1, 5, 7, 2, 1, 5, 2]);
        let bare = Marks { bos: None, eos: None, label_pad: 0 };
        let triplet = Triplet { prompt: &[], full: [&[7], &[]] };
        let made = triplet.row(&bare, &limits(9)).unwrap();
        assert_eq!((made.ids, made.lengths), (vec![7], [0, 1, 0]));
        // One token for both: an empty prompt and an empty answer have one each.
        let both = Marks { bos: Some(2), ..MARKS };
        let made = Triplet { prompt: &[], full: [&[], &[2]] }.row(&both, &limits(9)).unwrap();
        assert_eq!((made.ids, made.lengths), (vec![2, 2, 2, 2, 2], [1, 2, 2]));
    }

    #[test]
    fn rows_are_cut() {
        let triplet = Triplet { prompt: &[5, 6], full: [&[5, 6, 7, 8], &[5, 6, 9]] };
        let made = triplet.row(&MARKS, &limits(5)).unwrap();
        assert_eq!(made.ids, [1, 5, 6, 1, 5, 6, 7, 8, 1, 5, 6, 9, 2]);
        assert!(made.overlength);
        let limits = Limits { max_length: 5, max_prompt_length: Some(1), keep: Keep::End };
        let made = triplet.row(&MARKS, &limits).unwrap();
        assert_eq!(made.ids, [6, 6, 7, 8, 2, 6, 9, 2]);
        assert_eq!((made.lengths, made.masked), ([1, 4, 3], [1, 1]));
    }

    #[test]
    fn misfits_are_told() {
        let error = row(&[5, 6, 7], &[5, 6, 7, 8], &[5, 9]).unwrap_err();
        assert_eq!(error, Misfit::Shrunk { side: "rejected", full: 2, prompt: 3 });
        let words = "prompt and rejected together have 2 tokens, fewer than the prompt alone (3), so the";
        assert!(error.to_string().starts_with(words), "{error}");
        let error = row(&[5, 6, 7], &[5, 6, 7, 8], &[9, 9, 8]).unwrap_err();
        assert_eq!(error, Misfit::Prompts);
        assert!(error.to_string().contains("differ between chosen and rejected"), "{error}");
        // One token may differ, wherever it is.
        assert!(row(&[5, 6, 7], &[5, 6, 7, 8], &[9, 6, 8]).is_ok());
    }

    #[test]
    fn columns_are_the_rows_end_to_end() {
        let rows = [row(&[5], &[5, 7], &[5, 8]).unwrap(), row(&[6, 6], &[6, 6], &[6, 6, 9]).unwrap()];
        let columns = Columns::of(&rows, &MARKS).unwrap();
        let lists =
            |values: &[i32], offsets: &[i32]| Lists { values: values.into(), offsets: offsets.into() };
        assert_eq!(columns.ids[0], lists(&[1, 5, 1, 6, 6], &[0, 2, 5]));
        assert_eq!(columns.ids[1], lists(&[1, 5, 7, 2, 1, 6, 6, 2], &[0, 4, 8]));
        assert_eq!(columns.labels[0], [-100, -100, 7, 2, -100, -100, -100, 2]);
        assert_eq!(columns.ids[2], lists(&[1, 5, 8, 2, 1, 6, 6, 9, 2], &[0, 4, 9]));
        assert_eq!(columns.labels[1], [-100, -100, 8, 2, -100, -100, -100, 9, 2]);
        assert_eq!((columns.overlength, columns.empty), (vec![0, 0], vec![0, 0]));
    }

    #[test]
    fn a_row_is_empty_without_a_token_of_either_answer() {
        let cut = |max_length, label_pad| {
            let marks = Marks { label_pad, ..MARKS };
            let triplet = Triplet { prompt: &[5, 6], full: [&[5, 6, 7], &[5, 16]] };
            let rows = [triplet.row(&marks, &limits(max_length)).unwrap()];
            Columns::of(&rows, &marks).unwrap().empty
        };
        assert_eq!(cut(2, -100), [1]);
        assert_eq!(cut(3, -100), [0]); // the rejected prompt is one token shorter
        assert_eq!(cut(2, 0), [0]); // then the prompt has labels
    }
}
