//! Threads, which the caller of an algorithm supplies, and loops that are split over them.
//!
//! Inside torch these are torch's own OpenMP threads (`crate::torch::threads`); without it
//! [`super::portable`] has those of rayon.

use std::ops::Range;
use std::sync::{Mutex, OnceLock};

/// A fixed number of threads.
pub trait Threads: Sync {
    /// Number of threads.
    fn size(&self) -> usize;

    /// Runs `task(0), .., task(tasks - 1)`, in parallel if possible, and returns when all are done.
    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync));
}

/// Only the calling thread: for small work, and where other threads may not exist.
#[derive(Clone, Copy, Debug)]
pub struct Serial;

impl Threads for Serial {
    fn size(&self) -> usize {
        1
    }

    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        (0..tasks).for_each(task);
    }
}

static LOADED_IN: OnceLock<u32> = OnceLock::new();

/// Records the process that loaded the library. Recorded later, in a child that was forked before the library
/// was first used, it would be the child.
pub fn remember_process() {
    LOADED_IN.get_or_init(std::process::id);
}

/// True in a child of the process that loaded the library. A parallel section there waits for threads that
/// `fork` did not copy.
#[must_use]
pub fn forked() -> bool {
    *LOADED_IN.get_or_init(std::process::id) != std::process::id()
}

/// Splits `0..items` evenly over the threads and gives each its range.
pub fn split(threads: &dyn Threads, items: usize, f: impl Fn(Range<usize>) + Sync) {
    let parts = threads.size().clamp(1, items.max(1));
    threads.run(parts, &|part| f(items * part / parts..items * (part + 1) / parts));
}

/// Calls `f(row, columns, state)` for every row of a row-major matrix in parallel, where `states` has one
/// entry per row.
pub fn for_rows<T: Send, S: Send>(
    threads: &dyn Threads,
    matrix: &mut [T],
    width: usize,
    states: &mut [S],
    f: impl Fn(usize, &mut [T], &mut S) + Sync,
) {
    let rows = states.len();
    debug_assert_eq!(matrix.len(), rows * width);
    let parts = threads.size().clamp(1, rows.max(1));
    // Each thread takes a disjoint chunk out of a slot; the locks are never contended.
    let mut slots = Vec::with_capacity(parts);
    let (mut matrix, mut states) = (matrix, states);
    for part in 0..parts {
        let (first, end) = (rows * part / parts, rows * (part + 1) / parts);
        let (chunk, rest) = matrix.split_at_mut((end - first) * width);
        let (state, others) = states.split_at_mut(end - first);
        slots.push(Mutex::new(Some((first, chunk, state))));
        (matrix, states) = (rest, others);
    }
    threads.run(parts, &|part| {
        let taken = slots[part].lock().ok().and_then(|mut slot| slot.take());
        if let Some((first, chunk, state)) = taken {
            for (i, (row, state)) in chunk.chunks_exact_mut(width).zip(state).enumerate() {
                f(first + i, row, state);
            }
        }
    });
}

/// Calls `f` with every item, in parallel; each item has its part of the output. A thread takes consecutive
/// items: two threads that write to the same new large page wait for each other.
pub fn for_each<A: Send>(threads: &dyn Threads, items: impl Iterator<Item = A>, f: impl Fn(A) + Sync) {
    // The lock is never contended: each slot is taken once.
    let slots: Vec<_> = items.map(|item| Mutex::new(Some(item))).collect();
    split(threads, slots.len(), |range| {
        for slot in &slots[range] {
            if let Some(item) = slot.lock().ok().and_then(|mut slot| slot.take()) {
                f(item);
            }
        }
    });
}
