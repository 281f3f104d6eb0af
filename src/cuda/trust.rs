//! Which families of kernels are used on a GPU: those that gave right results there.
//!
//! Every launch of an operation asks [`trusts`] first. The first question about a GPU runs the trial that
//! Python registers with [`on_first_use`]; it ends with [`settle`]. What is not trusted goes through
//! libtorch's operations. Without a trial, as in the tests of this crate, everything is trusted.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use super::kernels::{ADAMW, BLOCKWISE8, HEAD_BATCH, HEAD_TILES, KernelSource, NF4};
use crate::base::error::{Error, Result};

/// Kernels that are used together, and that are right or wrong together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Family {
    /// Statistics of a tile of logits.
    HeadForward,
    /// Those and the expectation of a frozen head.
    HeadExpectation,
    /// Gradients of a tile of logits.
    HeadGradient,
    /// Layout and loss of a batch of pairs.
    HeadBatch,
    /// Values to NF4 codes.
    Nf4Quantize,
    /// NF4 codes to values.
    Nf4Dequantize,
    /// Products of a few tokens with NF4 codes.
    Nf4Product,
    /// Blocks of 8-bit codes, there and back.
    Blockwise8,
    /// `AdamW` with moments of 8 bits.
    Adamw8,
    /// `AdamW` with moments of 32 bits.
    Adamw32,
}

impl Family {
    /// All families.
    pub const ALL: [Self; 10] = [
        Self::HeadForward,
        Self::HeadExpectation,
        Self::HeadGradient,
        Self::HeadBatch,
        Self::Nf4Quantize,
        Self::Nf4Dequantize,
        Self::Nf4Product,
        Self::Blockwise8,
        Self::Adamw8,
        Self::Adamw32,
    ];

    /// The name in Python and in files.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::HeadForward => "head_forward",
            Self::HeadExpectation => "head_expectation",
            Self::HeadGradient => "head_gradient",
            Self::HeadBatch => "head_batch",
            Self::Nf4Quantize => "nf4_quantize",
            Self::Nf4Dequantize => "nf4_dequantize",
            Self::Nf4Product => "nf4_product",
            Self::Blockwise8 => "blockwise8",
            Self::Adamw8 => "adamw8",
            Self::Adamw32 => "adamw32",
        }
    }

    /// The sources of its kernels.
    #[must_use]
    pub fn sources(self) -> Vec<&'static KernelSource> {
        match self {
            Self::HeadForward | Self::HeadExpectation | Self::HeadGradient => vec![&HEAD_TILES],
            Self::HeadBatch => vec![&HEAD_BATCH, &HEAD_TILES],
            Self::Nf4Quantize | Self::Nf4Dequantize | Self::Nf4Product => vec![&NF4],
            Self::Blockwise8 => vec![&BLOCKWISE8],
            Self::Adamw8 | Self::Adamw32 => vec![&ADAMW],
        }
    }

    const fn bit(self) -> u32 {
        1 << self as u8
    }
}

/// More GPUs than a machine has.
const GPUS: usize = 64;

/// Set when a GPU's families are known.
const SETTLED: u32 = 1 << 31;

/// By index of the GPU: [`SETTLED`] and the bits of the families that are trusted.
static SWITCHES: [AtomicU32; GPUS] = [const { AtomicU32::new(0) }; GPUS];

/// Tries the kernels of a GPU, and settles which are trusted.
type Trial = fn(i32) -> Result<()>;

static TRIAL: OnceLock<Trial> = OnceLock::new();

/// Registers what is run before the first kernel of each GPU. Only the first call counts.
pub fn on_first_use(trial: Trial) {
    let _ = TRIAL.set(trial);
}

fn switch(ordinal: i32) -> Option<&'static AtomicU32> {
    SWITCHES.get(usize::try_from(ordinal).ok()?)
}

/// True if all these families may be used on the GPU of this index; the first question runs the trial.
///
/// # Errors
/// Those of the trial, whose results are no errors.
pub fn trusts(ordinal: i32, families: &[Family]) -> Result<bool> {
    let Some(switch) = switch(ordinal) else { return Ok(false) };
    if switch.load(Ordering::Acquire) & SETTLED == 0 {
        let Some(trial) = TRIAL.get() else { return Ok(true) };
        trial(ordinal)?;
    }
    let state = switch.load(Ordering::Acquire);
    if state & SETTLED == 0 {
        return Err(Error::Internal(format!("the trial of cuda:{ordinal} has no result")));
    }
    Ok(families.iter().all(|family| state & family.bit() != 0))
}

/// Trusts these families and no others on a GPU; with `None`, the next question runs the trial again.
///
/// # Errors
/// An index that no GPU has.
pub fn settle(ordinal: i32, families: Option<&[Family]>) -> Result<()> {
    let Some(switch) = switch(ordinal) else {
        let expected = format!("from 0 to {}", GPUS - 1);
        return Err(Error::Value {
            op: "trust_kernels",
            argument: "gpu",
            expected,
            got: ordinal.to_string(),
        });
    };
    let bits = |families: &[Family]| families.iter().fold(SETTLED, |bits, family| bits | family.bit());
    switch.store(families.map_or(0, bits), Ordering::Release);
    Ok(())
}

/// The families that are trusted on a GPU; none before the trial.
#[must_use]
pub fn trusted(ordinal: i32) -> Option<Vec<Family>> {
    let state = switch(ordinal)?.load(Ordering::Acquire);
    let of_state = || Family::ALL.into_iter().filter(|family| state & family.bit() != 0).collect();
    (state & SETTLED != 0).then(of_state)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_are_trusted_as_settled() {
        // No trial is registered in these tests, and no other test uses this GPU.
        let gpu = GPUS as i32 - 1;
        assert!(trusts(gpu, &Family::ALL).expect("no trial"));
        assert_eq!(trusted(gpu), None);
        let some = [Family::HeadBatch, Family::Adamw32];
        settle(gpu, Some(&some)).expect("an index");
        assert!(trusts(gpu, &some).expect("settled"));
        assert!(!trusts(gpu, &[Family::HeadBatch, Family::HeadForward]).expect("settled"));
        assert_eq!(trusted(gpu).as_deref(), Some(&some[..]));
        settle(gpu, Some(&[])).expect("an index");
        assert_eq!(trusted(gpu), Some(Vec::new()));
        settle(gpu, None).expect("an index");
        assert_eq!(trusted(gpu), None);
    }

    #[test]
    fn a_gpu_beyond_the_last_is_not_trusted() {
        for gpu in [-1, GPUS as i32] {
            assert!(!trusts(gpu, &[]).expect("no trial"));
            assert!(settle(gpu, Some(&Family::ALL)).is_err());
        }
    }

    #[test]
    fn every_family_has_a_bit_a_name_and_sources() {
        let bits = Family::ALL.iter().fold(0, |bits, family| bits | family.bit());
        assert_eq!(bits.count_ones() as usize, Family::ALL.len());
        assert_eq!(bits & SETTLED, 0);
        assert!(Family::ALL.iter().all(|family| !family.sources().is_empty() && !family.name().is_empty()));
    }
}
