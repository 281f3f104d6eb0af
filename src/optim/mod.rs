//! `AdamW` on slices, with moments of 32 or of 8 bits.
//!
//! [`adamw`] has the rule and its `f32` form, [`octave`] the 8-bit format of the moments, [`adamw8bit`]
//! the pass that decodes, updates and encodes a block, and [`step`] runs all parameters of a step in one
//! parallel region.

pub mod adamw;
pub mod adamw8bit;
pub mod octave;
pub mod step;
