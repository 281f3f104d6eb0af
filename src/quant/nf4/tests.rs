use half::{bf16, f16};

use super::super::codebook::NF4;
use super::super::scales::Scales;
use super::*;
use crate::base::float::Dtype;
use crate::base::portable::Portable;
use crate::quant::BLOCK_SIZES;

fn wave(n: usize) -> Vec<f32> {
    (0..n).map(|i| (i as f32 * 0.71).sin() * (0.02 + (i % 13) as f32)).collect()
}

fn quantized<T: Float>(values: &[T], blocksize: usize) -> (Vec<u8>, Vec<f32>) {
    let mut packed = vec![0; values.len().div_ceil(2)];
    let mut absmax = vec![0.0; values.len().div_ceil(blocksize)];
    quantize(&Portable, values, blocksize, &mut packed, &mut absmax);
    (packed, absmax)
}

fn plain<'a>(bytes: &'a [u8], absmax: &'a [f32], blocksize: usize) -> Packed<'a> {
    Packed { bytes, scales: Scales::Plain(absmax), blocksize, via: [Dtype::F32; 2] }
}

/// The format by its definition, value by value.
fn naive(values: &[f32], blocksize: usize) -> (Vec<u8>, Vec<f32>) {
    let (mut codes, mut scales) = (Vec::new(), Vec::new());
    for block in values.chunks(blocksize) {
        let largest = block.iter().fold(0.0f32, |max, x| max.max(x.abs()));
        let scale = largest.max(1e-38);
        let whole = block.len() == blocksize;
        scales.push(if whole { largest } else { scale });
        codes.extend(block.iter().map(|x| nearest(if whole { x * (1.0 / scale) } else { x / scale })));
    }
    if codes.len() % 2 == 1 {
        codes.push(7);
    }
    (codes.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect(), scales)
}

#[test]
fn a_block_by_hand() {
    let mut values = [0.0f32; 33];
    // Scale 2: 1.0, 0.5, -0.25, which are nearest to codes 15, 12 (0.44; 0.56 is further) and 4 (-0.28).
    (values[0], values[1], values[2], values[32]) = (2.0, 1.0, -0.5, -3.0);
    let (packed, absmax) = quantized(&values, 32);
    assert_eq!(absmax, [2.0, 3.0]);
    assert_eq!(packed[..3], [0xfc, 0x47, 0x77]);
    assert_eq!(packed[16], 0x07); // -1, then the padding
}

#[test]
fn codes_equal_the_naive_ones() {
    for blocksize in BLOCK_SIZES {
        for n in [0, 1, 2, 31, 63, 64, 65, 4095, 4097, 16_384, 40_001] {
            let values = wave(n);
            assert_eq!(quantized(&values, blocksize), naive(&values, blocksize), "{blocksize} {n}");
            let half: Vec<bf16> = values.iter().map(|&x| bf16::from_f32(x)).collect();
            let wide: Vec<f32> = half.iter().map(|x| x.to_f32()).collect();
            assert_eq!(quantized(&half, blocksize), naive(&wide, blocksize), "{blocksize} {n}");
            let half: Vec<f16> = values.iter().map(|&x| f16::from_f32(x)).collect();
            let wide: Vec<f32> = half.iter().map(|x| x.to_f32()).collect();
            assert_eq!(quantized(&half, blocksize), naive(&wide, blocksize), "{blocksize} {n}");
        }
    }
}

#[test]
fn every_level_picks_the_same_codes() {
    fn check<T: Float>(values: &[T], wide: &[f32]) {
        let levels = Level::available().iter();
        for (&level, blocksize) in levels.flat_map(|level| [32, 64, 4096].map(|size| (level, size))) {
            let (mut packed, mut absmax) =
                (vec![0; wide.len().div_ceil(2)], vec![0.0; wide.len().div_ceil(blocksize)]);
            blocks_at(level, values, blocksize, &mut packed, &mut absmax);
            assert_eq!((packed, absmax), naive(wide, blocksize), "{level:?}");
        }
    }
    let values = wave(9001);
    check(&values, &values);
    let half: Vec<bf16> = values.iter().map(|&x| bf16::from_f32(x)).collect();
    check(&half, &half.iter().map(|x| x.to_f32()).collect::<Vec<_>>());
    let half: Vec<f16> = values.iter().map(|&x| f16::from_f32(x)).collect();
    check(&half, &half.iter().map(|x| x.to_f32()).collect::<Vec<_>>());
}

#[test]
fn every_level_rounds_alike() {
    fn check<T: Float + PartialEq + std::fmt::Debug>(packed: &Packed<'_>) {
        let mut truth = vec![T::default(); 1001];
        unpack::read(Level::Baseline, packed, 0, &mut truth);
        for &level in Level::available() {
            let mut values = vec![T::default(); 1001];
            unpack::read(level, packed, 0, &mut values);
            assert_eq!(values, truth, "{level:?} {:?}", packed.via);
        }
    }
    // Subnormal in f16, too large for it, and in between.
    let values: Vec<f32> = wave(1001).iter().zip(0..).map(|(x, i)| x * 10f32.powi(i / 64 % 15 - 9)).collect();
    let (bytes, absmax) = quantized(&values, 64);
    for via in [[Dtype::F32; 2], [Dtype::Bf16, Dtype::F16], [Dtype::F16, Dtype::F32]] {
        let packed = Packed { via, ..plain(&bytes, &absmax, 64) };
        check::<f32>(&packed);
        check::<bf16>(&packed);
        check::<f16>(&packed);
    }
}

#[test]
fn zeros_and_specks() {
    let (packed, absmax) = quantized(&[0.0f32; 70], 64);
    assert!(packed.iter().all(|&byte| byte == 0x77));
    assert_eq!(absmax, [0.0, 1e-38]);
    let (_, absmax) = quantized(&[1e-40f32; 64], 64);
    assert_eq!(absmax, [1e-40]);
}

#[test]
fn nan_and_infinity_stay_in_their_blocks() {
    let mut values = wave(4 * 64 + 10);
    values[70] = f32::NAN;
    values[130] = f32::NEG_INFINITY;
    values[260] = f32::INFINITY;
    let (packed, absmax) = quantized(&values, 64);
    assert!(
        absmax[0].is_finite() && absmax[1].is_nan() && absmax[2].is_infinite() && absmax[4].is_infinite()
    );
    assert!(packed[32..64].iter().all(|&byte| byte == 0xff));
    assert_eq!((packed[64], packed[65]), (0x77, 0xf7));
    assert_eq!(packed[130], 0xf7);
    let mut back = vec![0.0f32; values.len()];
    dequantize(&Portable, &plain(&packed, &absmax, 64), &mut back);
    assert!(back[..64].iter().all(|x| x.is_finite()) && back[64..128].iter().all(|x| x.is_nan()));
    assert_eq!(back[130], f32::INFINITY);
}

#[test]
fn any_range_reads_the_same_values() {
    let values = wave(1001);
    let (packed, absmax) = quantized(&values, 32);
    let packed = plain(&packed, &absmax, 32);
    let code =
        |i: usize| if i.is_multiple_of(2) { packed.bytes[i / 2] >> 4 } else { packed.bytes[i / 2] & 15 };
    let truth: Vec<f32> = (0..1001).map(|i| NF4[usize::from(code(i))] * absmax[i / 32]).collect();
    let ranges = [(0, 1001), (0, 0), (1, 2), (31, 33), (33, 500), (64, 127), (511, 1001), (1000, 1001)];
    for &level in Level::available() {
        for (start, end) in ranges {
            let mut part = vec![0.0f32; end - start];
            unpack::read(level, &packed, start, &mut part);
            assert_eq!(part, truth[start..end], "{level:?} {start}..{end}");
            let mut half = vec![bf16::ZERO; end - start];
            unpack::read(level, &packed, start, &mut half);
            assert!(half.iter().zip(&part).all(|(a, &b)| *a == bf16::from_f32(b)));
            let mut half = vec![f16::ZERO; end - start];
            unpack::read(level, &packed, start, &mut half);
            assert!(half.iter().zip(&part).all(|(a, &b)| *a == f16::from_f32(b)));
        }
    }
}

#[test]
fn tiles_are_parts_of_the_matrix() {
    let (rows, width) = (13, 77);
    let values = wave(rows * width);
    let (packed, absmax) = quantized(&values, 64);
    let packed = Packed { via: [Dtype::F16, Dtype::Bf16], ..plain(&packed, &absmax, 64) };
    let mut whole = vec![0.0f32; rows * width];
    dequantize(&Portable, &packed, &mut whole);
    assert!(whole.iter().all(|&x| x == bf16::from_f32(x).to_f32()));
    for (row, column, columns) in [(0, 0, 77), (2, 0, 77), (0, 5, 31), (3, 64, 13)] {
        let mut part = vec![0.0f32; (rows - row) * columns];
        dequantize_tile(&Portable, &packed, Tile { width, row, column, columns }, &mut part);
        for (i, part) in part.chunks(columns).enumerate() {
            let first = (row + i) * width + column;
            assert_eq!(part, &whole[first..first + columns]);
        }
    }
}
