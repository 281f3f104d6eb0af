//! What is cut from a pair that is too long, computed from the lengths only.

use std::ops::Range;

/// End of the prompt that is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// The first tokens.
    Start,
    /// The last tokens.
    End,
}

/// How long a row may be, in tokens.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Most tokens of prompt and answer together.
    pub max_length: usize,
    /// Most tokens of the prompt of a pair that is too long; `None` never cuts the prompt.
    pub max_prompt_length: Option<usize>,
    /// End of the prompt that `max_prompt_length` keeps.
    pub keep: Keep,
}

/// Tokens of a pair, BOS and EOS counted. Chosen comes before rejected.
#[derive(Clone, Copy, Debug)]
pub struct Lengths {
    /// The prompt alone, as used for generation.
    pub alone: usize,
    /// The prompt before each answer, without a token that merged with the answer.
    pub prompts: [usize; 2],
    /// The answers.
    pub answers: [usize; 2],
}

/// What is kept of a pair.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// Tokens of the prompt alone.
    pub alone: Range<usize>,
    /// Tokens of the prompt before each answer.
    pub prompts: [Range<usize>; 2],
    /// Leading tokens of each answer.
    pub answers: [usize; 2],
    /// True if the pair was too long.
    pub overlength: bool,
}

impl Limits {
    /// Cuts a pair to length.
    ///
    /// Without `max_prompt_length` each answer is cut to `max_length` minus its prompt; a prompt of
    /// `max_length` tokens or more is kept and its answers are empty (the rule of TRL 1.16). With it (the
    /// rule of TRL up to 0.27) the longer answer decides for both sides, so that they keep the same prompt:
    /// if prompt and longer answer do not fit, the prompt is cut to `max_prompt_length`, and if that is not
    /// enough the answers are cut to the remaining length. If `max_prompt_length` is `max_length` or more, that
    /// rule leaves no token of an answer; there each answer is cut to what its own prompt leaves.
    #[must_use]
    pub fn cut(&self, lengths: &Lengths) -> Kept {
        let whole = Kept {
            alone: 0..lengths.alone,
            prompts: lengths.prompts.map(|length| 0..length),
            answers: lengths.answers,
            overlength: false,
        };
        match self.max_prompt_length {
            None => self.cut_answers(whole),
            Some(limit) => self.cut_prompts(whole, limit),
        }
    }

    fn cut_answers(&self, mut kept: Kept) -> Kept {
        for (prompt, answer) in kept.prompts.iter().zip(&mut kept.answers) {
            let room = self.max_length.saturating_sub(prompt.len());
            kept.overlength |= *answer > room;
            *answer = room.min(*answer);
        }
        kept
    }

    fn cut_prompts(&self, mut kept: Kept, limit: usize) -> Kept {
        let longer = kept.answers[0].max(kept.answers[1]);
        let too_long = |prompt: &Range<usize>| prompt.len() + longer > self.max_length;
        let [chosen, rejected] = &mut kept.prompts;
        for prompt in [&mut kept.alone, chosen, rejected] {
            if too_long(prompt) {
                kept.overlength = true;
                let length = prompt.len();
                match self.keep {
                    Keep::Start => prompt.end = limit.min(length),
                    Keep::End => prompt.start = length.saturating_sub(limit),
                }
            }
        }
        for (prompt, answer) in kept.prompts.iter().zip(&mut kept.answers) {
            if too_long(prompt) {
                let before = if limit < self.max_length { limit } else { prompt.len() };
                *answer = self.max_length.saturating_sub(before).min(*answer);
            }
        }
        kept
    }
}

#[cfg(test)]
mod tests {
    use super::{Keep, Kept, Lengths, Limits};

    fn pair(prompt: usize, chosen: usize, rejected: usize) -> Lengths {
        Lengths { alone: prompt, prompts: [prompt; 2], answers: [chosen, rejected] }
    }

    fn limits(max_length: usize, max_prompt_length: Option<usize>, keep: Keep) -> Limits {
        Limits { max_length, max_prompt_length, keep }
    }

    #[test]
    fn without_a_prompt_limit_each_answer_gets_what_its_prompt_leaves() {
        let cut = |max_length| limits(max_length, None, Keep::End).cut(&pair(4, 4, 2));
        let kept = |answers, overlength| Kept { alone: 0..4, prompts: [0..4, 0..4], answers, overlength };
        assert_eq!(cut(8), kept([4, 2], false));
        assert_eq!(cut(7), kept([3, 2], true));
        assert_eq!(cut(5), kept([1, 1], true));
        // The prompt fills max_length: it is kept, and the answers become empty.
        assert_eq!(cut(4), kept([0, 0], true));
        assert_eq!(cut(3), kept([0, 0], true));
    }

    #[test]
    fn sides_with_prompts_of_their_own_are_cut_by_their_own() {
        let lengths = Lengths { alone: 3, prompts: [4, 3], answers: [2, 2] };
        let kept = limits(5, None, Keep::End).cut(&lengths);
        assert_eq!(kept.answers, [1, 2]);
        assert_eq!((kept.alone, kept.prompts), (0..3, [0..4, 0..3]));
    }

    #[test]
    fn with_a_prompt_limit_the_prompt_is_cut_first() {
        // 9 + 4 > 12: the prompt goes to 5, then 5 + 4 fits and the answers stay.
        let kept = limits(12, Some(5), Keep::End).cut(&pair(9, 4, 2));
        let answers = [4, 2];
        assert_eq!(kept, Kept { alone: 4..9, prompts: [4..9, 4..9], answers, overlength: true });
        let kept = limits(12, Some(5), Keep::Start).cut(&pair(9, 4, 2));
        assert_eq!(kept, Kept { alone: 0..5, prompts: [0..5, 0..5], answers, overlength: true });
    }

    #[test]
    fn then_the_answers_by_the_longer_one() {
        // 5 + 9 > 12: both sides keep at most 12 - 5; the shorter answer has fewer.
        let kept = limits(12, Some(5), Keep::End).cut(&pair(9, 9, 2));
        assert_eq!(kept.prompts, [4..9, 4..9]);
        assert_eq!(kept.answers, [7, 2]);
        // An answer longer than max_length leaves no room for a prompt.
        let kept = limits(12, Some(5), Keep::End).cut(&pair(3, 40, 1));
        assert_eq!((kept.alone, kept.prompts, kept.answers), (0..3, [0..3, 0..3], [7, 1]));
        assert!(kept.overlength);
        // A pair that fits is not changed.
        assert!(!limits(12, Some(5), Keep::End).cut(&pair(9, 3, 2)).overlength);
    }

    #[test]
    fn a_prompt_limit_of_max_length_leaves_the_answers_what_the_prompt_does() {
        let cut = |prompt, chosen| limits(12, Some(12), Keep::End).cut(&pair(prompt, chosen, 2));
        let kept = cut(4, 20);
        assert_eq!((kept.prompts, kept.answers), ([0..4, 0..4], [8, 2]));
        // A prompt that fills the row leaves nothing.
        let kept = cut(15, 3);
        assert_eq!((kept.prompts, kept.answers), ([3..15, 3..15], [0, 0]));
    }

    #[test]
    fn no_row_is_over_the_limit_and_none_is_emptied() {
        for (max_length, limit) in [(2, 1), (7, 3), (9, 8)] {
            for keep in [Keep::Start, Keep::End] {
                for case in 0..12 * 12 * 12 {
                    let (prompt, chosen, rejected) = (case / 144, 1 + case / 12 % 12, 1 + case % 12);
                    let kept = limits(max_length, Some(limit), keep).cut(&pair(prompt, chosen, rejected));
                    for (prompt, answer) in kept.prompts.iter().zip(kept.answers) {
                        assert!(prompt.len() + answer <= max_length && answer > 0, "{case} {kept:?}");
                    }
                }
            }
        }
    }
}
