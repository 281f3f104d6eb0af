//! Writes the values of a tensor to a file: rounds, quantises, checks.

use half::{bf16, f16};

use super::bytes::{Plain, bytes};
use super::engine::ConvertEngine;
use super::file::Kind;
use super::layout::LayoutEntry;
use super::output::Output;
use super::rule::Target;
use super::source::narrow;
use super::state::{LONGEST_REPR, NESTED_BLOCKSIZE, json};
use crate::base::error::{Error, Result};
use crate::base::float::Dtype;
use crate::quant::blockwise8::{self, MAP_LEN, Map};
use crate::quant::codebook::NF4;
use crate::quant::nf4;

fn kind(dtype: Dtype) -> Kind {
    match dtype {
        Dtype::F32 => Kind::F32,
        Dtype::F16 => Kind::F16,
        Dtype::Bf16 => Kind::BF16,
    }
}

/// The entries of a tensor of this shape in the file.
#[must_use]
pub fn items(name: &str, shape: &[usize], target: Target) -> Vec<LayoutEntry> {
    let (dtype, blocksize, double) = match target {
        Target::Float(dtype) => return vec![LayoutEntry::new(name.into(), kind(dtype), shape.to_vec())],
        Target::Nf4 { dtype, blocksize, double } => (dtype, blocksize, double),
    };
    let count: usize = shape.iter().product();
    let blocks = count.div_ceil(blocksize);
    let part =
        |end: &str, kind, sizes: &[usize]| LayoutEntry::new(format!("{name}{end}"), kind, sizes.to_vec());
    let scales = if double { Kind::U8 } else { Kind::F32 };
    let mut items = vec![
        part("", Kind::U8, &[count.div_ceil(2), 1]),
        part(".absmax", scales, &[blocks]),
        part(".quant_map", Kind::F32, &[NF4.len()]),
    ];
    if double {
        items.push(part(".nested_absmax", Kind::F32, &[blocks.div_ceil(NESTED_BLOCKSIZE)]));
        items.push(part(".nested_quant_map", Kind::F32, &[MAP_LEN]));
    }
    let offset = double.then_some(0.0);
    let room = json(shape, dtype, blocksize, offset).len() + LONGEST_REPR;
    items.push(LayoutEntry::text(format!("{name}.quant_state.bitsandbytes__nf4"), room));
    items
}

/// A tensor that is being written.
#[derive(Debug)]
pub struct Sink<'a> {
    name: &'a str,
    shape: &'a [usize],
    target: Target,
    /// Any value that is not finite is an error; otherwise only one that rounding made infinite.
    strict: bool,
    absmax: Vec<f32>,
}

impl<'a> Sink<'a> {
    /// Begins a tensor. If `strict`, every value must be finite.
    #[must_use]
    pub fn new(name: &'a str, shape: &'a [usize], target: Target, strict: bool) -> Self {
        Self { name, shape, target, strict, absmax: Vec::new() }
    }

    /// Writes the values from `at` on, which is the start of a block.
    ///
    /// # Errors
    /// A value that is not finite, and errors of the system.
    pub fn write(
        &mut self,
        engine: &ConvertEngine<'_>,
        output: &Output,
        at: usize,
        wide: &[f32],
    ) -> Result<()> {
        match self.target.dtype() {
            Dtype::F32 => self.write_as(engine, output, at, wide),
            Dtype::F16 => self.rounded::<f16>(engine, output, at, wide),
            Dtype::Bf16 => self.rounded::<bf16>(engine, output, at, wide),
        }
    }

    fn rounded<T: Plain>(
        &mut self,
        engine: &ConvertEngine<'_>,
        output: &Output,
        at: usize,
        wide: &[f32],
    ) -> Result<()> {
        let mut values = vec![T::default(); wide.len()];
        narrow(engine.threads, wide, &mut values);
        if !self.strict && matches!(self.target, Target::Float(_)) {
            self.check(at, &values, |i| wide[i].is_finite())?;
        }
        self.write_as(engine, output, at, &values)
    }

    /// Writes values that already have the target's dtype.
    ///
    /// # Errors
    /// As [`Sink::write`].
    pub fn write_as<T: Plain>(
        &mut self,
        engine: &ConvertEngine<'_>,
        output: &Output,
        at: usize,
        values: &[T],
    ) -> Result<()> {
        let Target::Nf4 { blocksize, .. } = self.target else {
            if self.strict {
                self.check(at, values, |_| true)?;
            }
            return output.write(self.name, at * size_of::<T>(), bytes(values));
        };
        let mut packed = vec![0; values.len().div_ceil(2)];
        let done = self.absmax.len();
        self.absmax.resize(done + values.len().div_ceil(blocksize), 0.0);
        nf4::quantize(engine.threads, values, blocksize, &mut packed, &mut self.absmax[done..]);
        // The largest magnitude of a block shows whether all of it is finite.
        if self.absmax[done..].iter().any(|scale| !scale.is_finite()) {
            self.check(at, values, |_| true)?;
        }
        output.write(self.name, at / 2, &packed)
    }

    /// Reports the first value that is not finite but must be.
    fn check<T: Plain>(&self, at: usize, values: &[T], counts: impl Fn(usize) -> bool) -> Result<()> {
        let mut wide = [0.0; 1024];
        for (piece, values) in values.chunks(1024).enumerate() {
            let wide = &mut wide[..values.len()];
            T::widen(values, wide);
            // First a pass without branches: nearly always all are finite.
            if wide.iter().map(|x| x.to_bits() & 0x7fff_ffff).fold(0, u32::max) < f32::INFINITY.to_bits() {
                continue;
            }
            let bad = |i: &usize| !wide[*i].is_finite() && counts(1024 * piece + i);
            if let Some(i) = (0..wide.len()).find(bad) {
                return Err(self.unfit(at + 1024 * piece + i, wide[i]));
            }
        }
        Ok(())
    }

    fn unfit(&self, flat: usize, got: f32) -> Error {
        let columns = self.shape.last().copied().unwrap_or(1).max(1);
        let got = if got.is_nan() { "NaN".to_owned() } else { format!("{got}") };
        let place = format!("{got} in row {}, column {}", flat / columns, flat % columns);
        let expected = match self.target {
            Target::Nf4 { .. } => {
                "finite, because NaN or infinity would change all values of its block".into()
            }
            Target::Float(dtype) => format!("finite in {}", super::state::dtype_name(dtype)),
        };
        Error::Value { op: "checkpoint", argument: "a value", expected, got: place }.about(self.name)
    }

    /// Writes the entries of the complete tensor.
    ///
    /// # Errors
    /// Errors of the mean or the system.
    pub fn finish(self, engine: &ConvertEngine<'_>, output: &mut Output) -> Result<()> {
        let Target::Nf4 { dtype, blocksize, double } = self.target else {
            return Ok(());
        };
        let part = |end: &str| format!("{}{end}", self.name);
        output.write(&part(".quant_map"), 0, bytes(&NF4))?;
        let mut offset = None;
        if double {
            let mean = (engine.mean)(&self.absmax)?;
            let centred: Vec<f32> = self.absmax.iter().map(|scale| scale - mean).collect();
            let mut codes = vec![0; centred.len()];
            let mut largest = vec![0.0; centred.len().div_ceil(NESTED_BLOCKSIZE)];
            let map = Map::new(engine.map);
            blockwise8::quantize(engine.threads, &centred, &map, NESTED_BLOCKSIZE, &mut codes, &mut largest);
            output.write(&part(".absmax"), 0, &codes)?;
            output.write(&part(".nested_absmax"), 0, bytes(&largest))?;
            output.write(&part(".nested_quant_map"), 0, bytes(engine.map))?;
            offset = Some(mean);
        } else {
            output.write(&part(".absmax"), 0, bytes(&self.absmax))?;
        }
        let text = json(self.shape, dtype, blocksize, offset);
        output.text(part(".quant_state.bitsandbytes__nf4"), text);
        Ok(())
    }
}
