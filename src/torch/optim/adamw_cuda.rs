//! A step of `AdamW` on a GPU: one launch of kernels/adamw.cu for all checked parameters of the same dtypes, as far as
//! the list of their addresses fits in a launch's arguments.

use tch::{Kind, Tensor};

use super::args::Item;
use crate::base::error::{Error, Result};
use crate::cuda::kernels::{ADAMW, constant};
use crate::cuda::{self, Device, Launch};
use crate::optim::adamw::{self, Rule};
use crate::torch::device::pointer;

const THREADS: i64 = constant(ADAMW.text, "THREADS");
/// Elements per warp: those that share a scale.
const BLOCK: i64 = constant(ADAMW.text, "BLOCK");
const _: () = assert!(BLOCK == adamw::BLOCK as i64);
/// Elements per block of threads.
const PER_BLOCK: u64 = (BLOCK * (THREADS / cuda::kernels::WARP)) as u64;
const LARGE_TABLE: usize = constant(ADAMW.text, "LARGE_TABLE") as usize;
const SMALL_TABLE: usize = constant(ADAMW.text, "SMALL_TABLE") as usize;
const RULES: usize = constant(ADAMW.text, "RULES") as usize;
/// Most blocks of a launch.
const BLOCKS: u64 = i32::MAX as u64;

/// Kernels with moments of 8 and of 32 bits.
fn kernels(value: Kind, grad: Kind) -> [&'static str; 2] {
    match (value, grad) {
        (Kind::BFloat16, Kind::BFloat16) => ["adamw8bit_bf16", "adamw_bf16"],
        (Kind::BFloat16, _) => ["adamw8bit_bf16_f32", "adamw_bf16_f32"],
        (Kind::Half, Kind::Half) => ["adamw8bit_f16", "adamw_f16"],
        (Kind::Half, _) => ["adamw8bit_f16_f32", "adamw_f16_f32"],
        _ => ["adamw8bit_f32", "adamw_f32"],
    }
}

/// `Rule` of kernels/adamw.cu.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
struct RuleOfTable {
    beta1: f32,
    beta2: f32,
    eps: f32,
    step_size: f32,
    keep: f32,
}

impl RuleOfTable {
    const NONE: Self = Self { beta1: 0.0, beta2: 0.0, eps: 0.0, step_size: 0.0, keep: 0.0 };

    fn of(rule: &Rule) -> Self {
        let Rule { beta1, beta2, eps, step_size, keep, seed: _ } = *rule;
        Self { beta1, beta2, eps, step_size, keep }
    }
}

/// `Table` of kernels/adamw.cu.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Table<const N: usize> {
    value: [u64; N],
    grad: [u64; N],
    m: [u64; N],
    v: [u64; N],
    m_absmax: [u64; N],
    v_absmax: [u64; N],
    first: [i64; N],
    bad: u64,
    begin: [u32; N],
    seed: [u32; N],
    rules: [RuleOfTable; RULES],
    count: u32,
    in_last: [u16; N],
    rule: [u8; N],
    stochastic: [u8; N],
}

impl<const N: usize> Table<N> {
    fn new(bad: u64) -> Self {
        Self {
            value: [0; N],
            grad: [0; N],
            m: [0; N],
            v: [0; N],
            m_absmax: [0; N],
            v_absmax: [0; N],
            first: [0; N],
            bad,
            begin: [0; N],
            seed: [0; N],
            rules: [RuleOfTable::NONE; RULES],
            count: 0,
            in_last: [0; N],
            rule: [0; N],
            stochastic: [0; N],
        }
    }
}

/// A launch while its tensors are collected.
struct Batch<const N: usize> {
    kernel: &'static str,
    table: Table<N>,
    rules: usize,
    blocks: u64,
}

impl<const N: usize> Batch<N> {
    fn new(kernel: &'static str, bad: u64) -> Self {
        Self { kernel, table: Table::new(bad), rules: 0, blocks: 0 }
    }

    /// Adds a tensor; false if there is no room for it.
    fn add(&mut self, tensor: &PlacedTensor) -> Result<bool> {
        let blocks = tensor.count.div_ceil(PER_BLOCK);
        if blocks > BLOCKS {
            return Err(Error::Internal(format!("a tensor of {} elements", tensor.count)));
        }
        let known = self.table.rules[..self.rules].iter().position(|rule| *rule == tensor.rule);
        let (at, rule) = (self.table.count as usize, known.unwrap_or(self.rules));
        if at == N || rule == RULES || self.blocks + blocks > BLOCKS {
            return Ok(false);
        }
        let Table { value, grad, m, v, m_absmax, v_absmax, .. } = &mut self.table;
        let places = [value, grad, m, v, m_absmax, v_absmax];
        for (place, address) in places.into_iter().zip(tensor.pointers) {
            place[at] = address;
        }
        let table = &mut self.table;
        table.first[at] = tensor.first;
        table.begin[at] = self.blocks as u32;
        table.in_last[at] = (tensor.count - (blocks - 1) * PER_BLOCK) as u16;
        table.rules[rule] = tensor.rule;
        table.rule[at] = rule as u8;
        (table.seed[at], table.stochastic[at]) = tensor.seed.map_or((0, 0), |seed| (seed, 1));
        table.count += 1;
        self.rules = self.rules.max(rule + 1);
        self.blocks += blocks;
        Ok(true)
    }

    fn launch(&self, device: Device) -> Result<()> {
        let grid = [self.blocks as u32, 1, 1];
        let launch =
            Launch { source: &ADAMW, kernel: self.kernel, grid, block: [THREADS as u32, 1, 1], shared: 0 };
        device.launch_with(&launch, &self.table)
    }
}

/// A tensor as a kernel sees it.
struct PlacedTensor {
    kernel: &'static str,
    /// Of the value, the gradient, the moments, and the scales of 8-bit ones.
    pointers: [u64; 6],
    count: u64,
    first: i64,
    rule: RuleOfTable,
    seed: Option<u32>,
}

impl PlacedTensor {
    fn of(item: &Item) -> Result<Self> {
        let (kind, grad_kind) = (item.value.f_kind()?, item.grad.f_kind()?);
        let [eight, full] = kernels(kind, grad_kind);
        let [m, v] = &item.moments;
        let [value, grad] = [pointer(&item.value, kind)?, pointer(&item.grad, grad_kind)?];
        let (kernel, addresses) = if let Some([m_absmax, v_absmax]) = &item.absmax {
            let codes = [pointer(m, Kind::Uint8)?, pointer(v, Kind::Uint8)?];
            let scales = [pointer(m_absmax, Kind::Float)?, pointer(v_absmax, Kind::Float)?];
            (eight, [value, grad, codes[0], codes[1], scales[0], scales[1]])
        } else {
            let none = cuda::Arg::ptr(0);
            (full, [value, grad, pointer(m, Kind::Float)?, pointer(v, Kind::Float)?, none, none])
        };
        Ok(Self {
            kernel,
            pointers: addresses.map(cuda::Arg::address),
            count: item.value.numel() as u64,
            first: item.first,
            rule: RuleOfTable::of(&item.rule),
            seed: item.rule.seed,
        })
    }
}

/// Updates all parameters, of any number of dtypes. Nothing is launched before all of them are known to be right.
pub(super) fn update(device: Device, items: &[Item], bad: &Tensor) -> Result<()> {
    let tensors = items.iter().map(PlacedTensor::of).collect::<Result<Vec<_>>>()?;
    let bad = pointer(bad, Kind::Int64)?.address();
    if cuda::has_large_arguments()? {
        launch_all::<LARGE_TABLE>(device, &tensors, bad)
    } else {
        launch_all::<SMALL_TABLE>(device, &tensors, bad)
    }
}

fn launch_all<const N: usize>(device: Device, tensors: &[PlacedTensor], bad: u64) -> Result<()> {
    let mut batches: Vec<Batch<N>> = Vec::new();
    for tensor in tensors.iter().filter(|tensor| tensor.count > 0) {
        let mut added = false;
        for batch in batches.iter_mut().filter(|batch| batch.kernel == tensor.kernel) {
            added = batch.add(tensor)?;
            if added {
                break;
            }
        }
        if !added {
            let mut batch = Batch::new(tensor.kernel, bad);
            batch.add(tensor)?;
            batches.push(batch);
        }
    }
    batches.iter().try_for_each(|batch| batch.launch(device))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(count: u64, beta1: f32) -> PlacedTensor {
        let rule = RuleOfTable { beta1, ..RuleOfTable::NONE };
        PlacedTensor { kernel: "adamw_f32", pointers: [8; 6], count, first: 0, rule, seed: None }
    }

    #[test]
    fn a_table_fits_in_the_arguments_of_a_kernel() {
        assert!(size_of::<Table<SMALL_TABLE>>() <= 4096);
        assert!(size_of::<Table<LARGE_TABLE>>() <= 32764);
        // A LoRA of all linear layers of a model of 7B: 32 layers, 7 matrices, 2 factors.
        const { assert!(LARGE_TABLE >= 32 * 7 * 2) };
    }

    #[test]
    fn tensors_begin_with_a_block_of_threads() {
        let mut batch = Batch::<8>::new("adamw_f32", 0);
        for count in [1, 2048, 2049, 4096] {
            assert!(batch.add(&tensor(count, 0.5)).expect("room"));
        }
        assert_eq!(batch.table.begin[..4], [0, 1, 2, 4]);
        assert_eq!(batch.table.in_last[..4], [1, 2048, 1, 2048]);
        assert_eq!((batch.table.count, batch.blocks, batch.rules), (4, 6, 1));
    }

    #[test]
    fn a_full_table_takes_no_more() {
        let mut batch = Batch::<64>::new("adamw_f32", 0);
        for rule in 0..RULES {
            assert!(batch.add(&tensor(5, rule as f32)).expect("room"));
        }
        assert!(!batch.add(&tensor(5, RULES as f32)).expect("no error"), "a rule too many");
        assert!(batch.add(&tensor(5, 3.0)).expect("room"), "a rule that is known");
        assert!(!batch.add(&tensor(BLOCKS * PER_BLOCK, 3.0)).expect("no error"), "blocks too many");
        for _ in RULES + 1..64 {
            assert!(batch.add(&tensor(5, 3.0)).expect("room"));
        }
        assert!(!batch.add(&tensor(5, 3.0)).expect("no error"), "a tensor too many");
        assert!(batch.add(&tensor((BLOCKS + 1) * PER_BLOCK, 3.0)).is_err());
    }
}
