//! 4-bit `NormalFloat` (NF4) and 8-bit blockwise quantisation on slices.
//!
//! Dettmers et al. 2023 (arXiv 2305.14314): blocks of a flat tensor share a scale, and every value is
//! the nearest of 16 numbers times that scale. [`codebook`] has the numbers, [`nf4`] turns values into
//! codes and back, [`blockwise8`] is the 8-bit form that compresses the scales, [`scales`] reads them
//! plain or compressed, and [`product`] multiplies by a 4-bit matrix without unpacking it.
//! `expand` has the vector code that turns codes into values, `pick` that for the other way.

pub mod blockwise8;
pub mod codebook;
mod expand;
pub mod level;
pub mod nf4;
mod pick;
pub mod product;
pub mod scales;
pub mod storage;

use std::sync::Mutex;

use crate::head::backend::{Team, split};

/// Block sizes of the format.
pub const BLOCK_SIZES: [usize; 8] = [32, 64, 128, 256, 512, 1024, 2048, 4096];

/// Elements that a task works on: a multiple of every block size, and small enough for the L2 cache.
const GRAIN: usize = 16_384;

/// Calls `f` with every item, in parallel; each item carries its own part of the output. A member of
/// the team takes neighbours: two that write to one large page of fresh memory wait for each other.
pub fn for_each<A: Send>(team: &dyn Team, items: impl Iterator<Item = A>, f: impl Fn(A) + Sync) {
    // The lock is never contended: each slot is taken once.
    let slots: Vec<_> = items.map(|item| Mutex::new(Some(item))).collect();
    split(team, slots.len(), |range| {
        for slot in &slots[range] {
            if let Some(item) = slot.lock().ok().and_then(|mut slot| slot.take()) {
                f(item);
            }
        }
    });
}
