//! The role of each row of a batch in the loss.

use super::odds_ratio::NllScope;

/// A batch of pairs: one entry per row that predicts a token.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// The next token, or negative if the row needs no score.
    pub targets: &'a [i64],
    /// `0..pairs` for chosen sequences, `pairs..2 * pairs` for the rejected ones, in the same order.
    pub sequence: &'a [i64],
    /// True where the target belongs to the completion.
    pub completion: &'a [bool],
    /// Number of pairs.
    pub pairs: usize,
}

/// The role of a row in the loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Only its logits' mean is reported.
    None,
    /// A prompt token of a chosen sequence: its coefficient is known in advance.
    Prompt,
    /// A completion token of the chosen sequence of this pair.
    Chosen(usize),
    /// A completion token of the rejected sequence of this pair.
    Rejected(usize),
}

/// Rows by role, and the counts that the loss divides by.
#[derive(Debug)]
pub struct Layout {
    /// Role of every row.
    pub roles: Vec<Role>,
    /// Completion rows of each pair's chosen sequence.
    pub chosen: Vec<Vec<usize>>,
    /// Completion rows of each pair's rejected sequence.
    pub rejected: Vec<Vec<usize>>,
    /// Chosen prompt rows, if they count.
    pub prompt: Vec<usize>,
    /// Number of tokens in the negative log-likelihood.
    pub nll_tokens: usize,
    /// Rows of each side, of any role.
    pub side_rows: [usize; 2],
}

impl Layout {
    /// Sorts the rows of a checked batch.
    #[must_use]
    pub fn new(batch: Batch<'_>, scope: NllScope) -> Self {
        let mut layout = Self {
            roles: Vec::with_capacity(batch.targets.len()),
            chosen: vec![Vec::new(); batch.pairs],
            rejected: vec![Vec::new(); batch.pairs],
            prompt: Vec::new(),
            nll_tokens: 0,
            side_rows: [0; 2],
        };
        for row in 0..batch.targets.len() {
            let sequence = usize::try_from(batch.sequence[row]).unwrap_or(0);
            let (side, pair) = (usize::from(sequence >= batch.pairs), sequence % batch.pairs);
            layout.side_rows[side] += 1;
            let scored = batch.targets[row] >= 0;
            let role = match (scored, side, batch.completion[row]) {
                (true, 0, true) => Role::Chosen(pair),
                (true, 1, true) => Role::Rejected(pair),
                (true, 0, false) if scope == NllScope::Full => Role::Prompt,
                _ => Role::None,
            };
            match role {
                Role::None => {}
                Role::Prompt => layout.prompt.push(row),
                Role::Chosen(pair) => layout.chosen[pair].push(row),
                Role::Rejected(pair) => layout.rejected[pair].push(row),
            }
            layout.nll_tokens += usize::from(matches!(role, Role::Prompt | Role::Chosen(_)));
            layout.roles.push(role);
        }
        layout
    }

    /// Rows that need the head, in the batch's order.
    pub fn scored(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.roles.len()).filter(|&row| self.roles[row] != Role::None)
    }

    /// Completion rows of a pair, chosen first.
    #[must_use]
    pub fn pair(&self, pair: usize) -> Vec<usize> {
        [&self.chosen[pair][..], &self.rejected[pair]].concat()
    }

    /// Completion rows of the longest pair.
    #[must_use]
    pub fn longest_pair(&self) -> usize {
        self.chosen.iter().zip(&self.rejected).map(|(c, r)| c.len() + r.len()).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_by_scope() {
        let batch = Batch {
            targets: &[3, 4, 5, -100, -100, 6, 7],
            sequence: &[0, 0, 0, 0, 1, 1, 1],
            completion: &[false, true, true, true, false, true, false],
            pairs: 1,
        };
        let full = Layout::new(batch, NllScope::Full);
        assert_eq!(full.prompt, [0]);
        assert_eq!((full.pair(0), full.nll_tokens, full.longest_pair()), (vec![1, 2, 5], 3, 3));
        assert_eq!(full.scored().collect::<Vec<_>>(), [0, 1, 2, 5]);
        assert_eq!(full.side_rows, [4, 3]);
        let completion = Layout::new(batch, NllScope::Completion);
        assert_eq!((completion.prompt.len(), completion.nll_tokens), (0, 2));
    }
}
