//! The values of a tensor, plain or 4-bit, a chunk at a time.

use half::{bf16, f16};

use super::bytes::{Plain, values};
use super::collection::{Collection, Found};
use super::file::Kind;
use super::state::State;
use crate::base::error::Result;
use crate::base::float::{Dtype, Float};
use crate::base::threads::{Threads, for_each};
use crate::quant::nf4;
use crate::quant::packed::Packed;
use crate::quant::scales::Scales;

/// A tensor of floating point values.
#[derive(Debug)]
pub struct TensorSource<'a> {
    /// The file and entry with its bytes.
    pub found: Found<'a>,
    /// Its quantisation state, if it is quantised.
    pub state: Option<State>,
}

/// The dtype of a plain tensor, `None` if it is not a float type of models.
#[must_use]
pub fn float(kind: Kind) -> Option<Dtype> {
    match kind {
        Kind::F32 => Some(Dtype::F32),
        Kind::F16 => Some(Dtype::F16),
        Kind::BF16 => Some(Dtype::Bf16),
        _ => None,
    }
}

/// Converts to `f32` in parallel.
pub fn widen<T: Float>(threads: &dyn Threads, values: &[T], wide: &mut [f32]) {
    const PIECE: usize = 16_384;
    let items = values.chunks(PIECE).zip(wide.chunks_mut(PIECE));
    for_each(threads, items, |(values, wide)| T::widen(values, wide));
}

/// Rounds from `f32` in parallel.
pub fn narrow<T: Float>(threads: &dyn Threads, wide: &[f32], values: &mut [T]) {
    const PIECE: usize = 16_384;
    let items = wide.chunks(PIECE).zip(values.chunks_mut(PIECE));
    for_each(threads, items, |(wide, values)| {
        let (whole, rest) = wide.as_chunks::<16>();
        let (places, last) = values.as_chunks_mut::<16>();
        for (place, wide) in places.iter_mut().zip(whole) {
            *place = T::narrow(wide);
        }
        for (place, &wide) in last.iter_mut().zip(rest) {
            *place = T::narrow_one(wide);
        }
    });
}

impl<'a> TensorSource<'a> {
    /// A tensor by name.
    ///
    /// # Errors
    /// If it is missing, has another quantisation, or is not a float tensor.
    pub fn open(from: &'a Collection, name: &str) -> Result<Self> {
        let found = from.get(name)?;
        let state = State::read(from, name)?;
        if state.is_none() && float(found.entry.kind).is_none() {
            let problem = format!("{name} has dtype {}; must be F32, F16 or BF16", found.entry.kind);
            return Err(found.file.wrong(problem));
        }
        Ok(Self { found, state })
    }

    /// Sizes of the tensor.
    #[must_use]
    pub fn shape(&self) -> &[usize] {
        self.state.as_ref().map_or(&self.found.entry.shape, |state| &state.shape)
    }

    /// Dtype of its values.
    #[must_use]
    pub fn dtype(&self) -> Dtype {
        let plain = || float(self.found.entry.kind).unwrap_or(Dtype::F32);
        self.state.as_ref().map_or_else(plain, |state| state.dtype)
    }

    /// Bytes of the file that hold `count` values from `start` on.
    #[must_use]
    pub fn bytes(&self, start: usize, count: usize) -> std::ops::Range<usize> {
        let end = start + count;
        match (&self.state, self.dtype()) {
            (Some(_), _) => start / 2..end.div_ceil(2),
            (None, Dtype::F32) => 4 * start..4 * end,
            (None, _) => 2 * start..2 * end,
        }
    }

    /// The values from `start` on, which is the start of a block.
    ///
    /// # Errors
    /// Errors of the system.
    pub fn read(&self, threads: &dyn Threads, start: usize, wide: &mut [f32]) -> Result<()> {
        let range = self.bytes(start, wide.len());
        let bytes = self.found.file.window(self.found.entry, range.clone())?;
        self.found.file.prefetch(self.found.entry, range.end..range.end + range.len());
        if let Some(state) = &self.state {
            let scales = state.scales(start, wide.len());
            let packed = Packed {
                bytes: &bytes,
                scales: Scales::Plain(&scales),
                blocksize: state.blocksize,
                via: [state.dtype, Dtype::F32],
            };
            nf4::dequantize(threads, &packed, wide);
            return Ok(());
        }
        match self.dtype() {
            Dtype::F32 => widen::<f32>(threads, &values(&bytes), wide),
            Dtype::F16 => widen::<f16>(threads, &values(&bytes), wide),
            Dtype::Bf16 => widen::<bf16>(threads, &values(&bytes), wide),
        }
        Ok(())
    }

    /// Calls `f` with the values from `start` on as stored in the file, if their type is `T`.
    ///
    /// # Errors
    /// Errors of the system.
    pub fn direct<T: Plain, R>(
        &self,
        start: usize,
        count: usize,
        f: impl FnOnce(&[T]) -> Result<R>,
    ) -> Result<R> {
        let range = self.bytes(start, count);
        let bytes = self.found.file.window(self.found.entry, range.clone())?;
        self.found.file.prefetch(self.found.entry, range.end..range.end + range.len());
        f(&values::<T>(&bytes))
    }
}
