//! `AdamW` with moments of 8 bits: a block is decoded, updated and encoded in one pass.
//!
//! After Dettmers et al. 2022 (arXiv 2110.02861): one code per element, one scale per 256 elements of the
//! flat parameter. The update uses the new moments before they are encoded.

use super::adamw::{BLOCK, Rule, element, store};
use super::octave::{
    SIGNED_ZERO, pack, root_code, root_inverse, root_value, signed_code, signed_inverse, signed_value,
};
use crate::base::float::Float;
use crate::base::simd::on_levels;

/// Codes and scales of some blocks.
#[derive(Debug)]
pub struct Codes<'a> {
    /// First moments, see [`super::octave::signed_code`].
    pub m: &'a mut [u8],
    /// Largest magnitude of each block's first moments.
    pub m_absmax: &'a mut [f32],
    /// Roots of the second moments, see [`super::octave::root_code`].
    pub v: &'a mut [u8],
    /// Largest second moment of each block.
    pub v_absmax: &'a mut [f32],
}

impl Codes<'_> {
    /// True if there is one code per element and one scale per block.
    #[must_use]
    pub fn fits(&self, elements: usize) -> bool {
        let blocks = elements.div_ceil(BLOCK);
        self.m.len() == elements
            && self.v.len() == elements
            && self.m_absmax.len() == blocks
            && self.v_absmax.len() == blocks
    }
}

on_levels! {
    /// One step on some blocks, the last of which may be partial; `first` is the index of the first element
    /// in its parameter. Returns how many gradients were not finite.
    ///
    /// # Panics
    /// If the lengths do not fit.
    pub fn update<P: Float, G: Float>(
        rule: &Rule,
        first: u64,
        values: &mut [P],
        grads: &[G],
        codes: Codes<'_>,
    ) -> u64 = blocks
}

#[inline(always)]
fn blocks<P: Float, G: Float, const LEVEL: u8>(
    rule: &Rule,
    first: u64,
    values: &mut [P],
    grads: &[G],
    codes: Codes<'_>,
) -> u64 {
    assert!(grads.len() == values.len() && codes.fits(values.len()));
    let (values, end_values) = values.as_chunks_mut::<BLOCK>();
    let (grads, end_grads) = grads.as_chunks::<BLOCK>();
    let (m, end_m) = codes.m.as_chunks_mut::<BLOCK>();
    let (v, end_v) = codes.v.as_chunks_mut::<BLOCK>();
    let mut scales = codes.m_absmax.iter_mut().zip(codes.v_absmax);
    // Buffers for narrower types and partial blocks: the loops have a fixed length.
    let (mut wide, mut grad, mut fresh) = ([0.0; BLOCK], [0.0; BLOCK], Fresh::new());
    let (mut bad, mut place) = (0, first);
    let whole = values.iter_mut().zip(grads).zip(m.iter_mut().zip(v)).zip(scales.by_ref());
    for (((values, grads), (m, v)), scales) in whole {
        if let (Some(values), Some(grads)) = (P::as_f32_mut(values), G::as_f32(grads))
            && let (Ok(values), Ok(grads)) = (values.try_into(), grads.try_into())
        {
            bad += block::<LEVEL>(rule, values, grads, [m, v], scales, &mut fresh);
        } else {
            P::widen(values, &mut wide);
            G::widen(grads, &mut grad);
            bad += block::<LEVEL>(rule, &mut wide, &grad, [m, v], scales, &mut fresh);
            store(&wide, rule.seed, place, values);
        }
        place += BLOCK as u64;
    }
    if let Some(scales) = scales.next() {
        // Clear what the buffers still hold of another block.
        let n = end_values.len();
        let (mut all_m, mut all_v) = ([SIGNED_ZERO; BLOCK], [0; BLOCK]);
        grad[n..].fill(0.0);
        P::widen(end_values, &mut wide[..n]);
        G::widen(end_grads, &mut grad[..n]);
        all_m[..n].copy_from_slice(end_m);
        all_v[..n].copy_from_slice(end_v);
        bad += block::<LEVEL>(rule, &mut wide, &grad, [&mut all_m, &mut all_v], scales, &mut fresh);
        end_m.copy_from_slice(&all_m[..n]);
        end_v.copy_from_slice(&all_v[..n]);
        store(&wide, rule.seed, place, end_values);
    }
    bad
}

/// The decoded moments of a block.
struct Fresh {
    m: [f32; BLOCK],
    roots: [f32; BLOCK],
}

impl Fresh {
    #[inline(always)]
    fn new() -> Self {
        Self { m: [0.0; BLOCK], roots: [0.0; BLOCK] }
    }
}

/// Updates a block in short loops. In a long loop a processor runs out of registers to rename before enough
/// iterations are in flight to hide the latency of a square root and a division.
#[inline(always)]
fn block<const LEVEL: u8>(
    rule: &Rule,
    values: &mut [f32; BLOCK],
    grads: &[f32; BLOCK],
    [m, v]: [&mut [u8; BLOCK]; 2],
    (m_absmax, v_absmax): (&mut f32, &mut f32),
    fresh: &mut Fresh,
) -> u64 {
    let (m_scale, root_scale) = (*m_absmax, v_absmax.sqrt());
    for (wide, &code) in fresh.m.iter_mut().zip(m.iter()) {
        *wide = signed_value(code) * m_scale;
    }
    for (wide, &code) in fresh.roots.iter_mut().zip(v.iter()) {
        *wide = root_value(code) * root_scale;
    }
    // Magnitudes compare like their bits, and an integer maximum does not depend on the order.
    let (mut m_top, mut v_top, mut bad) = (0, 0, 0);
    let moments = fresh.m.iter_mut().zip(&mut fresh.roots);
    for ((value, &grad), (m, root)) in values.iter_mut().zip(grads).zip(moments) {
        let after = element(rule, *value, grad, *m, *root * *root);
        (*value, *m, *root) = (after.value, after.m, after.root);
        m_top = m_top.max(after.m.to_bits() & 0x7fff_ffff);
        v_top = v_top.max(after.v.to_bits());
        bad += after.bad;
    }
    (*m_absmax, *v_absmax) = (f32::from_bits(m_top), f32::from_bits(v_top));
    let (m_inverse, root_inverse) = (signed_inverse(*m_absmax), root_inverse(v_absmax.sqrt()));
    for wide in &mut fresh.m {
        *wide = signed_code(*wide, m_inverse);
    }
    pack::<LEVEL>(&fresh.m, m);
    for wide in &mut fresh.roots {
        *wide = root_code(*wide, root_inverse);
    }
    pack::<LEVEL>(&fresh.roots, v);
    u64::from(bad)
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::super::adamw::tests::{rule, wave};
    use super::*;
    use crate::base::simd::Level;
    use crate::optim::adamw;

    struct Moments {
        m: Vec<u8>,
        m_absmax: Vec<f32>,
        v: Vec<u8>,
        v_absmax: Vec<f32>,
    }

    impl Moments {
        fn new(n: usize) -> Self {
            let blocks = n.div_ceil(BLOCK);
            Self {
                m: vec![SIGNED_ZERO; n],
                m_absmax: vec![0.0; blocks],
                v: vec![0; n],
                v_absmax: vec![0.0; blocks],
            }
        }

        fn codes(&mut self) -> Codes<'_> {
            Codes {
                m: &mut self.m,
                m_absmax: &mut self.m_absmax,
                v: &mut self.v,
                v_absmax: &mut self.v_absmax,
            }
        }

        /// Decodes both moments.
        fn decoded(&self) -> [Vec<f32>; 2] {
            let m = self.m.iter().enumerate().map(|(i, &q)| signed_value(q) * self.m_absmax[i / BLOCK]);
            let v = self.v.iter().enumerate().map(|(i, &q)| {
                let root = root_value(q) * self.v_absmax[i / BLOCK].sqrt();
                root * root
            });
            [m.collect(), v.collect()]
        }
    }

    #[test]
    fn a_step_is_that_of_fp32_from_the_decoded_moments() {
        for n in [1, 255, 256, 257, 1003] {
            let mut moments = Moments::new(n);
            let mut values = wave(n, 0.0);
            for t in 1..6 {
                let [mut m, mut v] = moments.decoded();
                let (mut expected, grads) = (values.clone(), wave(n, t as f32));
                adamw::update(Level::Baseline, &rule(t), 0, &mut expected, &grads, &mut m, &mut v);
                update(Level::best(), &rule(t), 0, &mut values, &grads, moments.codes());
                assert_eq!(values, expected, "{n} {t}");
                // The largest of a block exactly, the others within half a step of their codes.
                let [m_after, v_after] = moments.decoded();
                for (block, absmax) in moments.m_absmax.iter().enumerate() {
                    let range = block * BLOCK..n.min((block + 1) * BLOCK);
                    assert_eq!(m[range.clone()].iter().fold(0.0f32, |top, x| top.max(x.abs())), *absmax);
                    let top = v[range.clone()].iter().fold(0.0f32, |top, x| top.max(*x));
                    assert_eq!(top, moments.v_absmax[block]);
                    for i in range {
                        assert!((m_after[i] - m[i]).abs() <= 0.008 * absmax, "{i}");
                        assert!((v_after[i].sqrt() - v[i].sqrt()).abs() <= 0.004 * top.sqrt(), "{i}");
                    }
                }
            }
        }
    }

    fn four_steps<P: Float, G: Float>(level: Level, n: usize, seed: Option<u32>) -> (Vec<P>, Moments) {
        let narrow = |wide: Vec<f32>| -> Vec<P> { wide.into_iter().map(P::narrow_one).collect() };
        let (mut values, mut moments) = (narrow(wave(n, 0.0)), Moments::new(n));
        for t in 1..5 {
            let grads: Vec<G> = wave(n, t as f32 * 0.3).into_iter().map(G::narrow_one).collect();
            let rule = Rule { seed, ..rule(t) };
            assert_eq!(update(level, &rule, 512, &mut values, &grads, moments.codes()), 0);
        }
        (values, moments)
    }

    fn same_on_all_levels<P: Float + PartialEq + std::fmt::Debug, G: Float>(seed: Option<u32>) {
        let (values, moments) = four_steps::<P, G>(Level::Baseline, 700, seed);
        for &level in Level::available() {
            let (others, theirs) = four_steps::<P, G>(level, 700, seed);
            assert_eq!(values, others, "{level:?}");
            assert!(moments.m == theirs.m && moments.v == theirs.v, "{level:?}");
            assert!(moments.m_absmax == theirs.m_absmax && moments.v_absmax == theirs.v_absmax);
        }
    }

    #[test]
    fn all_levels_have_the_same_bits() {
        same_on_all_levels::<f32, f32>(None);
        same_on_all_levels::<bf16, bf16>(None);
        same_on_all_levels::<bf16, f32>(Some(77));
        same_on_all_levels::<f16, f16>(None);
    }

    #[test]
    fn what_is_not_finite_stays_and_spoils_no_neighbour() {
        let mut moments = Moments::new(512);
        let mut values = wave(512, 0.0);
        update(Level::best(), &rule(1), 0, &mut values, &wave(512, 0.1), moments.codes());
        let (before, mut grads) = (values.clone(), wave(512, 0.2));
        (grads[5], grads[9], grads[400]) = (f32::NAN, f32::INFINITY, f32::NEG_INFINITY);
        assert_eq!(update(Level::best(), &rule(2), 0, &mut values, &grads, moments.codes()), 3);
        for i in 0..512 {
            assert_eq!(values[i] == before[i], [5, 9, 400].contains(&i), "{i}");
        }
        assert!(moments.m[5] == SIGNED_ZERO && moments.v[5] == 0);
        assert!(moments.m_absmax.iter().chain(&moments.v_absmax).all(|x| x.is_finite()));
    }

    #[test]
    fn blocks_of_zeros_stay() {
        let mut moments = Moments::new(300);
        let (mut values, still) = (wave(300, 0.0), Rule { keep: 1.0, ..rule(1) });
        update(Level::best(), &still, 0, &mut values, &[0.0f32; 300], moments.codes());
        assert!(values == wave(300, 0.0) && moments.m_absmax == [0.0; 2] && moments.v == [0; 300]);
    }
}
