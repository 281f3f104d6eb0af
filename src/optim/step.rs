//! A step of all parameters, in one parallel region.

use std::sync::atomic::{AtomicU64, Ordering};

use half::{bf16, f16};

use super::adamw::{self, BLOCK, Rule};
use super::adamw8bit::{self, Codes};
use crate::base::float::Float;
use crate::base::simd::Level;
use crate::base::threads::{Threads, for_each};

/// Elements of a task: full blocks, and enough of them that scheduling costs little.
const GRAIN: usize = 64 * BLOCK;

/// The moments of a parameter.
#[derive(Debug)]
pub enum Moments<'a> {
    /// `f32`: first and second.
    Full(&'a mut [f32], &'a mut [f32]),
    /// 8 bits.
    Eight(Codes<'a>),
}

/// The values of a parameter and their gradients, in the supported pairs of dtypes.
#[derive(Debug)]
pub enum Values<'a> {
    /// `f32`, both.
    F32(&'a mut [f32], &'a [f32]),
    /// `bf16`, both.
    Bf16(&'a mut [bf16], &'a [bf16]),
    /// `f16`, both.
    F16(&'a mut [f16], &'a [f16]),
    /// `bf16` with `f32` gradients.
    Bf16WithF32(&'a mut [bf16], &'a [f32]),
    /// `f16` with `f32` gradients.
    F16WithF32(&'a mut [f16], &'a [f32]),
}

impl Values<'_> {
    fn len(&self) -> usize {
        match self {
            Values::F32(values, _) => values.len(),
            Values::Bf16(values, _) | Values::Bf16WithF32(values, _) => values.len(),
            Values::F16(values, _) | Values::F16WithF32(values, _) => values.len(),
        }
    }
}

/// A parameter in a step.
#[derive(Debug)]
pub struct Parameter<'a> {
    /// Values and gradients.
    pub values: Values<'a>,
    /// Its state.
    pub moments: Moments<'a>,
    /// The rule from its group and its step count.
    pub rule: Rule,
    /// Index of the first element, if this is a part of a parameter.
    pub first: u64,
}

/// Updates all parameters; returns how many gradients were not finite.
///
/// # Panics
/// If a parameter's slices are not equally long.
pub fn step(threads: &dyn Threads, parameters: Vec<Parameter<'_>>) -> u64 {
    let bad = AtomicU64::new(0);
    let level = Level::best();
    let pieces: Vec<_> = parameters.into_iter().flat_map(pieces).collect();
    for_each(threads, pieces.into_iter(), |piece| {
        let first = piece.first;
        let found = match piece.values {
            Values::F32(values, grads) => update(level, &piece.rule, first, values, grads, piece.moments),
            Values::Bf16(values, grads) => update(level, &piece.rule, first, values, grads, piece.moments),
            Values::F16(values, grads) => update(level, &piece.rule, first, values, grads, piece.moments),
            Values::Bf16WithF32(values, grads) => {
                update(level, &piece.rule, first, values, grads, piece.moments)
            }
            Values::F16WithF32(values, grads) => {
                update(level, &piece.rule, first, values, grads, piece.moments)
            }
        };
        bad.fetch_add(found, Ordering::Relaxed);
    });
    bad.into_inner()
}

fn update<P: Float, G: Float>(
    level: Level,
    rule: &Rule,
    first: u64,
    values: &mut [P],
    grads: &[G],
    moments: Moments<'_>,
) -> u64 {
    match moments {
        Moments::Full(m, v) => adamw::update(level, rule, first, values, grads, m, v),
        Moments::Eight(codes) => adamw8bit::update(level, rule, first, values, grads, codes),
    }
}

/// Splits a parameter into pieces of full blocks.
fn pieces(parameter: Parameter<'_>) -> Vec<Parameter<'_>> {
    let Parameter { values, moments, rule, first } = parameter;
    let count = values.len().div_ceil(GRAIN);
    let moments: Vec<Moments<'_>> = match moments {
        Moments::Full(m, v) => {
            m.chunks_mut(GRAIN).zip(v.chunks_mut(GRAIN)).map(|(m, v)| Moments::Full(m, v)).collect()
        }
        Moments::Eight(codes) => {
            let scales = GRAIN / BLOCK;
            let m = codes.m.chunks_mut(GRAIN).zip(codes.m_absmax.chunks_mut(scales));
            let v = codes.v.chunks_mut(GRAIN).zip(codes.v_absmax.chunks_mut(scales));
            m.zip(v)
                .map(|((m, m_absmax), (v, v_absmax))| Moments::Eight(Codes { m, m_absmax, v, v_absmax }))
                .collect()
        }
    };
    assert_eq!(moments.len(), count, "moments of another size than their parameter");
    let values: Vec<Values<'_>> = match values {
        Values::F32(values, grads) => cut(values, grads).map(|(v, g)| Values::F32(v, g)).collect(),
        Values::Bf16(values, grads) => cut(values, grads).map(|(v, g)| Values::Bf16(v, g)).collect(),
        Values::F16(values, grads) => cut(values, grads).map(|(v, g)| Values::F16(v, g)).collect(),
        Values::Bf16WithF32(values, grads) => {
            cut(values, grads).map(|(v, g)| Values::Bf16WithF32(v, g)).collect()
        }
        Values::F16WithF32(values, grads) => {
            cut(values, grads).map(|(v, g)| Values::F16WithF32(v, g)).collect()
        }
    };
    let places = (first..).step_by(GRAIN);
    let parts = values.into_iter().zip(moments).zip(places);
    parts.map(|((values, moments), first)| Parameter { values, moments, rule, first }).collect()
}

fn cut<'a, P, G>(values: &'a mut [P], grads: &'a [G]) -> impl Iterator<Item = (&'a mut [P], &'a [G])> {
    values.chunks_mut(GRAIN).zip(grads.chunks(GRAIN))
}

#[cfg(test)]
mod tests {
    use super::super::adamw::tests::{rule, wave};
    use super::super::octave::SIGNED_ZERO;
    use super::*;
    use crate::base::portable::Portable;

    #[test]
    fn pieces_are_the_whole() {
        let n = 2 * GRAIN + 300;
        let blocks = n.div_ceil(BLOCK);
        let grads = wave(n, 0.5);
        let fresh = || (wave(n, 0.0), vec![SIGNED_ZERO; n], vec![0.0; blocks], vec![0; n], vec![0.0; blocks]);
        let (mut values, mut m, mut m_absmax, mut v, mut v_absmax) = fresh();
        let codes = Codes { m: &mut m, m_absmax: &mut m_absmax, v: &mut v, v_absmax: &mut v_absmax };
        let (mut few, mut few_m, mut few_v) = (wave(40, 0.0), vec![0.0; 40], vec![0.0; 40]);
        let mut few_grads = wave(40, 0.1);
        few_grads[7] = f32::NAN;
        let bad = step(
            &Portable,
            vec![
                Parameter {
                    values: Values::F32(&mut values, &grads),
                    moments: Moments::Eight(codes),
                    rule: rule(1),
                    first: 0,
                },
                Parameter {
                    values: Values::F32(&mut few, &few_grads),
                    moments: Moments::Full(&mut few_m, &mut few_v),
                    rule: rule(2),
                    first: 0,
                },
            ],
        );
        assert_eq!(bad, 1);
        let (mut expected, mut m2, mut m_absmax2, mut v2, mut v_absmax2) = fresh();
        let codes = Codes { m: &mut m2, m_absmax: &mut m_absmax2, v: &mut v2, v_absmax: &mut v_absmax2 };
        adamw8bit::update(Level::best(), &rule(1), 0, &mut expected, &grads, codes);
        assert!(values == expected && m == m2 && v == v2 && m_absmax == m_absmax2 && v_absmax == v_absmax2);
        let (mut expected, mut m, mut v) = (wave(40, 0.0), vec![0.0; 40], vec![0.0; 40]);
        adamw::update(Level::best(), &rule(2), 0, &mut expected, &few_grads, &mut m, &mut v);
        assert!(few == expected && few_m == m && few_v == v);
    }
}
