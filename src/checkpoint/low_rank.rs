//! The update that an adapter adds to a matrix (`LoRA`, Hu et al. 2021, arXiv 2106.09685), and the norms that
//! it gives its rows (`DoRA`, Liu et al. 2024, arXiv 2402.09353).

use half::{bf16, f16};

use super::bytes::values;
use super::collection::Collection;
use super::file::Kind;
use super::rule::{Factor, MergeUpdate};
use super::source::widen;
use crate::base::error::{Error, Result};
use crate::base::gemm::{Dims, Gemm};
use crate::base::threads::{Serial, Threads, for_rows};

/// A low-rank update in memory.
#[derive(Debug)]
pub struct LowRank {
    /// `(rows, rank)`, multiplied by the scale.
    left: Vec<f32>,
    /// `(rank, columns)`.
    right: Vec<f32>,
    rank: usize,
    columns: usize,
    magnitude: Option<Vec<f32>>,
}

/// Reads a small tensor as `f32`, with its two sizes; a vector is a column.
fn matrix(from: &Collection, factor: &Factor) -> Result<(Vec<f32>, usize, usize)> {
    let found = from.get(&factor.name)?;
    let (rows, columns) = match found.entry.shape[..] {
        [rows, columns] => (rows, columns),
        [rows] => (rows, 1),
        ref shape => {
            let problem = format!("{} has shape {shape:?}; must be a matrix", factor.name);
            return Err(found.file.wrong(problem));
        }
    };
    let bytes = found.file.whole(found.entry)?;
    let mut wide = vec![0.0; rows * columns];
    let threads = &Serial; // a few megabytes
    match found.entry.kind {
        Kind::F32 => widen::<f32>(threads, &values(&bytes), &mut wide),
        Kind::F16 => widen::<f16>(threads, &values(&bytes), &mut wide),
        Kind::BF16 => widen::<bf16>(threads, &values(&bytes), &mut wide),
        kind => {
            let problem = format!("{} has dtype {kind}; must be F32, F16 or BF16", factor.name);
            return Err(found.file.wrong(problem));
        }
    }
    if let Some(place) = wide.iter().position(|x| !x.is_finite()) {
        let problem = format!("{} is {} at {place} of the flat tensor", factor.name, wide[place]);
        return Err(found.file.wrong(problem));
    }
    if !factor.transposed {
        return Ok((wide, rows, columns));
    }
    let turned = (0..rows * columns).map(|i| wide[i % rows * columns + i / rows]).collect();
    Ok((turned, columns, rows))
}

impl LowRank {
    /// Reads the matrices of an update of a `rows` by `columns` matrix.
    ///
    /// # Errors
    /// Tensors that are missing, have another shape or dtype, or are not finite.
    pub fn read(from: &Collection, update: &MergeUpdate, rows: usize, columns: usize) -> Result<Self> {
        let (mut left, got_rows, rank) = matrix(from, &update.left)?;
        let (right, right_rank, got_columns) = match &update.right {
            Some(factor) => matrix(from, factor)?,
            None => (vec![1.0], 1, 1),
        };
        if (got_rows, got_columns, rank) != (rows, columns, right_rank) {
            let name = &update.left.name;
            let problem = format!(
                "{name} and its partner make ({got_rows}, {rank}) by ({right_rank}, {got_columns}); \
                 the base has ({rows}, {columns})"
            );
            return Err(from.get(name)?.file.wrong(problem));
        }
        for x in &mut left {
            *x *= update.scale;
        }
        let magnitude = match &update.magnitude {
            None => None,
            Some(name) => {
                let (lengths, sizes, others) =
                    matrix(from, &Factor { name: name.clone(), transposed: false })?;
                if sizes * others != rows {
                    let problem = format!("{name} has {} elements; must be {rows}", sizes * others);
                    return Err(from.get(name)?.file.wrong(problem));
                }
                Some(lengths)
            }
        };
        Ok(Self { left, right, rank, columns, magnitude })
    }

    /// Applies the update to `values`, the rows from `first` on.
    ///
    /// # Errors
    /// Errors of the product.
    pub fn apply(
        &self,
        threads: &dyn Threads,
        gemm: &dyn Gemm<f32>,
        first: usize,
        values: &mut [f32],
    ) -> Result<()> {
        let rows = values.len() / self.columns;
        if self.rank > 0 {
            let dims = Dims { rows, tile: self.rank, width: self.columns };
            let left = &self.left[first * self.rank..(first + rows) * self.rank];
            gemm.d_hidden(dims, left, &self.right, values)?;
        }
        let Some(magnitude) = &self.magnitude else {
            return Ok(());
        };
        let mut lengths = magnitude
            .get(first..first + rows)
            .ok_or_else(|| Error::Internal("row norms of DoRA are missing".into()))?
            .to_vec();
        for_rows(threads, values, self.columns, &mut lengths, |_, row, length| {
            let norm = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt() as f32;
            let factor = *length / norm;
            for x in row {
                *x *= factor;
            }
        });
        Ok(())
    }
}
