//! Where in a range of memory each buffer goes: first fit by address.
//!
//! Training allocates and frees the same kinds of buffers in each layer and each step. Placing each one in
//! the first gap that fits and joining adjacent gaps at once keeps the range dense, so that resident memory
//! stays near the memory in use.

use std::collections::{BTreeMap, HashMap};

/// Sizes are rounded up to this, so that gaps are worth keeping.
const GRAIN: usize = 4096;

/// Book-keeping of a range of `capacity` bytes; touches no memory itself.
#[derive(Debug)]
pub struct Arena {
    capacity: usize,
    /// End of the last buffer; everything after it is free.
    top: usize,
    /// Start and size of each gap below `top`. No two are adjacent, and none ends at `top`.
    gaps: BTreeMap<usize, usize>,
    /// Start and size of each buffer.
    used: HashMap<usize, usize>,
}

impl Arena {
    /// An empty range.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Self { capacity, top: 0, gaps: BTreeMap::new(), used: HashMap::new() }
    }

    /// Start of a new buffer, or none if no gap holds it.
    pub fn allocate(&mut self, size: usize) -> Option<usize> {
        let size = size.max(1).checked_next_multiple_of(GRAIN)?;
        let gap = self.gaps.iter().find(|&(_, &room)| room >= size).map(|(&start, &room)| (start, room));
        let start = if let Some((start, room)) = gap {
            self.gaps.remove(&start);
            if room > size {
                self.gaps.insert(start + size, room - size);
            }
            start
        } else {
            let start = self.top;
            self.top = start.checked_add(size).filter(|&top| top <= self.capacity)?;
            start
        };
        self.used.insert(start, size);
        Some(start)
    }

    /// Frees a buffer; false if none starts there.
    pub fn free(&mut self, start: usize) -> bool {
        let Some(size) = self.used.remove(&start) else { return false };
        let (mut first, mut end) = (start, start + size);
        if let Some((&before, &room)) = self.gaps.range(..start).next_back()
            && before + room == start
        {
            self.gaps.remove(&before);
            first = before;
        }
        if let Some(room) = self.gaps.remove(&end) {
            end += room;
        }
        if end == self.top {
            self.top = first;
        } else {
            self.gaps.insert(first, end - first);
        }
        true
    }

    /// Start and size of free memory that may be resident: the gaps, and the part from the top to `touched`.
    pub fn vacant(&self, touched: usize) -> impl Iterator<Item = (usize, usize)> + '_ {
        let gaps = self.gaps.iter().map(|(&start, &size)| (start, size));
        gaps.chain((touched > self.top).then(|| (self.top, touched - self.top)))
    }

    /// End of the last buffer.
    #[must_use]
    pub fn top(&self) -> usize {
        self.top
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_used_first_and_joined() {
        let mut arena = Arena::new(64 * GRAIN);
        let starts: Vec<usize> = (0..4).map(|_| arena.allocate(2 * GRAIN - 5).expect("room")).collect();
        assert_eq!(starts, [0, 2, 4, 6].map(|x| x * GRAIN));
        assert!(arena.free(starts[2]) && arena.free(starts[1]));
        assert!(!arena.free(starts[1]), "freed twice");
        assert_eq!(arena.vacant(arena.top()).collect::<Vec<_>>(), [(2 * GRAIN, 4 * GRAIN)]);
        assert_eq!(arena.allocate(3 * GRAIN), Some(2 * GRAIN));
        assert_eq!(arena.allocate(2 * GRAIN), Some(8 * GRAIN), "the gap of one is too small");
        assert_eq!(arena.allocate(1), Some(5 * GRAIN));
        assert_eq!(arena.allocate(55 * GRAIN), None);
        assert_eq!(arena.allocate(54 * GRAIN), Some(10 * GRAIN), "up to the last byte");
        assert_eq!(arena.allocate(usize::MAX), None);
    }

    #[test]
    fn buffers_never_overlap() {
        let mut arena = Arena::new(1 << 30);
        let mut live: Vec<(usize, usize)> = Vec::new();
        let mut state = 12345u64;
        for _ in 0..5000 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let draw = (state >> 33) as usize;
            if live.len() > 40 || (draw.is_multiple_of(3) && !live.is_empty()) {
                let (start, _) = live.swap_remove(draw % live.len());
                assert!(arena.free(start));
            } else {
                let size = draw % 100_000 + 1;
                let start = arena.allocate(size).expect("room");
                assert!(live.iter().all(|&(s, n)| start + size <= s || s + n <= start));
                live.push((start, size));
            }
            // All memory below the top is a buffer or a gap.
            let rounded: usize = live.iter().map(|&(_, n)| n.next_multiple_of(GRAIN)).sum();
            let gaps: usize = arena.vacant(arena.top()).map(|(_, n)| n).sum();
            assert_eq!(rounded + gaps, arena.top());
        }
        live.drain(..).for_each(|(start, _)| assert!(arena.free(start)));
        assert_eq!((arena.top(), arena.vacant(arena.top()).count()), (0, 0));
    }
}
