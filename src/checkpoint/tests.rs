use std::collections::HashMap;
use std::path::{Path, PathBuf};

use half::bf16;
use safetensors::tensor::{Dtype as Kind, TensorView};
use safetensors::{SafeTensors, serialize};
use tempfile::TempDir;

use super::bytes::{bytes, values};
use super::collection::Collection;
use super::convert::{Job, convert, size};
use super::engine::ConvertEngine;
use super::rule::{Factor, MergeUpdate, Target, TensorRule};
use super::state::State;
use crate::base::error::{Error, Result};
use crate::base::float::{Dtype, Float};
use crate::base::portable::Portable;
use crate::quant::blockwise8::{self, MAP_LEN, Map};
use crate::quant::codebook::NF4;
use crate::quant::nf4;

mod damage;
mod fuzz;

const BLOCK: usize = 4096;

const JSON: &str = "w.quant_state.bitsandbytes__nf4";

fn map() -> [f32; MAP_LEN] {
    std::array::from_fn(|i| {
        let t = (i as f32 - 127.0) / 128.0;
        t * t.abs()
    })
}

fn wave(n: usize) -> Vec<f32> {
    (0..n).map(|i| (i as f32 * 0.71).sin() * (0.02 + (i % 13) as f32)).collect()
}

fn narrow(values: &[f32]) -> Vec<bf16> {
    values.iter().map(|&x| bf16::from_f32(x)).collect()
}

fn wide(values: &[bf16]) -> Vec<f32> {
    values.iter().map(|x| x.to_f32()).collect()
}

/// A tensor to write into a file for a test.
type Made = (String, Kind, Vec<usize>, Vec<u8>);

fn made(name: &str, kind: Kind, shape: &[usize], data: &[u8]) -> Made {
    (name.into(), kind, shape.to_vec(), data.to_vec())
}

fn write(folder: &Path, name: &str, tensors: &[Made]) -> PathBuf {
    let views = tensors.iter().map(|(name, kind, shape, data)| {
        (name.clone(), TensorView::new(*kind, shape.clone(), data).expect("a tensor"))
    });
    let path = folder.join(name);
    std::fs::write(&path, serialize(views, None).expect("a file")).expect("a disk");
    path
}

/// A sum in the order of the values.
#[allow(clippy::unnecessary_wraps)] // the engine's type
fn mean(values: &[f32]) -> Result<f32> {
    Ok(values.iter().sum::<f32>() / values.len() as f32)
}

/// Runs a job on one file and returns what is in the file that it writes.
fn run(folder: &Path, base: &[Made], adapter: &[Made], rules: Vec<TensorRule>) -> Result<Vec<u8>> {
    let base = Collection::open(&[write(folder, "base", base)])?;
    let adapter = Collection::open(&[write(folder, "adapter", adapter)])?;
    let out = folder.join("out");
    let _ = std::fs::remove_file(&out);
    let job = Job { base: &base, adapter: Some(&adapter), rules, outputs: vec![out.clone()] };
    let map = map();
    let engine = ConvertEngine { threads: &Portable, gemm: &Portable, mean: &mean, map: &map, chunk: BLOCK };
    let expected = size(&job)?;
    let mut told = 0;
    let written = convert(&job, &engine, &mut |bytes| {
        told += bytes;
        Ok(())
    })?;
    assert_eq!(told, base.files()[0].entries().values().map(|entry| entry.len).sum::<usize>());
    let file = std::fs::read(out).expect("a file");
    assert!(file.len() <= expected && written[0].len == expected);
    let mut names: Vec<_> =
        SafeTensors::deserialize(&file).expect("whole").names().iter().map(ToString::to_string).collect();
    names.sort();
    let mut told = written[0].names.clone();
    told.sort();
    assert_eq!(names, told);
    Ok(file)
}

fn data<'a>(file: &'a [u8], name: &str) -> &'a [u8] {
    SafeTensors::deserialize(file).expect("whole").tensor(name).expect(name).data()
}

fn to_nf4(name: &str, dtype: Dtype, blocksize: usize, double: bool) -> TensorRule {
    let target = Target::Nf4 { dtype, blocksize, double };
    TensorRule { name: name.into(), replacement: None, update: None, transposed: false, target }
}

fn to_float(name: &str, dtype: Dtype) -> TensorRule {
    TensorRule { target: Target::Float(dtype), ..to_nf4(name, dtype, 64, false) }
}

fn factor(name: &str, transposed: bool) -> Factor {
    Factor { name: name.into(), transposed }
}

fn packed<T: Float>(values: &[T], blocksize: usize) -> (Vec<u8>, Vec<f32>) {
    let (mut bytes, mut absmax) =
        (vec![0; values.len().div_ceil(2)], vec![0.0; values.len().div_ceil(blocksize)]);
    nf4::quantize(&Portable, values, blocksize, &mut bytes, &mut absmax);
    (bytes, absmax)
}

fn folder() -> TempDir {
    tempfile::tempdir().expect("a folder")
}

#[test]
fn quantised_in_chunks_as_at_once() {
    let folder = folder();
    // 3 chunks and a partial block.
    let weight = narrow(&wave(101 * 103));
    let base = [
        made("w", Kind::BF16, &[101, 103], bytes(&weight)),
        made("other", Kind::I64, &[3], &[7; 24]),
        made("odd", Kind::U8, &[5], &[1, 2, 3, 4, 5]),
    ];
    let file = run(folder.path(), &base, &[], vec![to_nf4("w", Dtype::Bf16, 64, false)]).expect("a file");
    let (codes, absmax) = packed(&weight, 64);
    assert_eq!(data(&file, "w"), codes);
    assert_eq!(data(&file, "w.absmax"), bytes(&absmax));
    assert_eq!(data(&file, "w.quant_map"), bytes(&NF4));
    let json = br#"{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [101, 103]}"#;
    assert_eq!(data(&file, "w.quant_state.bitsandbytes__nf4"), json);
    assert_eq!((data(&file, "other"), data(&file, "odd")), (&[7; 24][..], &[1, 2, 3, 4, 5][..]));
}

#[test]
fn scales_are_quantised_as_a_whole() {
    let folder = folder();
    let weight = wave(90 * 128);
    let base = [made("w", Kind::F32, &[90, 128], bytes(&weight))];
    let file = run(folder.path(), &base, &[], vec![to_nf4("w", Dtype::F32, 32, true)]).expect("a file");
    let (codes, absmax) = packed(&weight, 32);
    let offset = mean(&absmax).expect("a mean");
    let centred: Vec<f32> = absmax.iter().map(|x| x - offset).collect();
    let (mut scales, mut largest) = (vec![0; 360], vec![0.0; 2]);
    let nearest = Map::new(&map());
    blockwise8::quantize(&Portable, &centred, &nearest, 256, &mut scales, &mut largest);
    assert_eq!((data(&file, "w"), data(&file, "w.absmax")), (&codes[..], &scales[..]));
    assert_eq!(data(&file, "w.nested_absmax"), bytes(&largest));
    assert_eq!(data(&file, "w.nested_quant_map"), bytes(&map()));
    let json = String::from_utf8_lossy(data(&file, "w.quant_state.bitsandbytes__nf4")).into_owned();
    assert!(json.ends_with(&format!("\"nested_offset\": {:?}}}", f64::from(offset))), "{json}");

    // Read back: every value is within one step of its block.
    let path = folder.path().join("out");
    let source = Collection::open(&[&path]).expect("a file");
    let state = State::read(&source, "w").expect("a state").expect("quantised");
    assert!(state.double() && state.shape == [90, 128] && state.dtype == Dtype::F32);
    for (a, b) in state.scales(64, 90 * 128 - 64).iter().zip(&absmax[2..]) {
        assert!((a - b).abs() < 0.02 * largest[0].max(largest[1]), "{a} {b}");
    }
}

#[test]
fn a_transpose_is_quantised_as_such() {
    let folder = folder();
    let weight = wave(24 * 40);
    let turned: Vec<f32> =
        (0..40).flat_map(|j| (0..24).map(move |i| (i, j))).map(|(i, j)| weight[i * 40 + j]).collect();
    let base = [made("w", Kind::F32, &[24, 40], bytes(&weight))];
    let rule = TensorRule { transposed: true, ..to_nf4("w", Dtype::F32, 64, false) };
    let file = run(folder.path(), &base, &[], vec![rule]).expect("a file");
    assert_eq!(data(&file, "w"), packed(&turned, 64).0);
    assert!(data(&file, "w.quant_state.bitsandbytes__nf4").ends_with(b"\"shape\": [40, 24]}"));
}

/// `base + scale * left right`, rows scaled to the norms of `magnitude`.
fn merged(
    base: &[f32],
    update: (&[f32], &[f32], f32),
    columns: usize,
    magnitude: Option<&[f32]>,
) -> Vec<f64> {
    let (left, right, scale) = update;
    let rank = right.len() / columns;
    let mut sum: Vec<f64> = base.iter().map(|&x| f64::from(x)).collect();
    for (i, row) in sum.chunks_mut(columns).enumerate() {
        for (j, x) in row.iter_mut().enumerate() {
            let product = |k| f64::from(left[i * rank + k]) * f64::from(right[k * columns + j]);
            *x += f64::from(scale) * (0..rank).map(product).sum::<f64>();
        }
        if let Some(lengths) = magnitude {
            let norm = row.iter().map(|x| x * x).sum::<f64>().sqrt();
            for x in row {
                *x *= f64::from(lengths[i]) / norm;
            }
        }
    }
    sum
}

fn close(got: &[u8], want: &[f64]) {
    let got = values::<f32>(got);
    assert_eq!(got.len(), want.len());
    for (a, b) in got.iter().zip(want) {
        assert!((f64::from(*a) - b).abs() <= 2e-6 * b.abs().max(1.0), "{a} {b}");
    }
}

#[test]
fn updates_are_added_in_every_form() {
    let folder = folder();
    // 4 chunks: a chunk of full rows and full blocks is a multiple of 4096 / gcd(4096, 24) = 512 rows.
    let (rows, columns, rank) = (1200, 24, 3);
    let base = wave(rows * columns);
    let left: Vec<f32> = wave(rows * rank).iter().map(|x| x * 0.1).collect();
    let right = wave(rank * columns);
    let turned: Vec<f32> = (0..columns * rank).map(|i| right[i % rank * columns + i / rank]).collect();
    let lengths: Vec<f32> = (0..rows).map(|i| 1.0 + i as f32 * 0.01).collect();
    let bias = wave(rows);
    let tensors = [
        made("w", Kind::F32, &[rows, columns], bytes(&base)),
        made("bias", Kind::F32, &[rows], bytes(&bias)),
    ];
    let adapter = [
        made("a", Kind::F32, &[rank, columns], bytes(&right)),
        made("turned", Kind::F32, &[columns, rank], bytes(&turned)),
        made("b", Kind::F32, &[rows, rank], bytes(&left)),
        made("m", Kind::F32, &[rows], bytes(&lengths)),
        made("bias.new", Kind::BF16, &[rows], bytes(&narrow(&bias))),
    ];
    let update = MergeUpdate {
        left: factor("b", false),
        right: Some(factor("a", false)),
        scale: 0.7,
        magnitude: None,
    };
    let ruled = |update: MergeUpdate| TensorRule { update: Some(update), ..to_float("w", Dtype::F32) };
    let bias_rule = TensorRule {
        update: Some(MergeUpdate { left: factor("m", false), right: None, scale: -2.0, magnitude: None }),
        replacement: Some("bias.new".into()),
        ..to_float("bias", Dtype::F32)
    };
    let file =
        run(folder.path(), &tensors, &adapter, vec![ruled(update.clone()), bias_rule]).expect("a file");
    let plain = merged(&base, (&left, &right, 0.7), columns, None);
    close(data(&file, "w"), &plain);
    let rounded = wide(&narrow(&bias));
    let want: Vec<f64> =
        rounded.iter().zip(&lengths).map(|(x, y)| f64::from(*x) - 2.0 * f64::from(*y)).collect();
    close(data(&file, "bias"), &want);

    let turned = MergeUpdate { right: Some(factor("turned", true)), ..update.clone() };
    let file = run(folder.path(), &tensors, &adapter, vec![ruled(turned)]).expect("a file");
    close(data(&file, "w"), &plain);

    let dora = MergeUpdate { magnitude: Some("m".into()), ..update };
    let file = run(folder.path(), &tensors, &adapter, vec![ruled(dora)]).expect("a file");
    close(data(&file, "w"), &merged(&base, (&left, &right, 0.7), columns, Some(&lengths)));
}

/// A file with a 4-bit weight, as `run` writes it.
fn four_bit(folder: &Path, double: bool) -> (Vec<bf16>, Vec<Made>) {
    let weight = narrow(&wave(70 * 130));
    let base =
        [made("w", Kind::BF16, &[70, 130], bytes(&weight)), made("n", Kind::F32, &[1], bytes(&[3.0f32]))];
    let file = run(folder, &base, &[], vec![to_nf4("w", Dtype::Bf16, 64, double)]).expect("a file");
    let read = SafeTensors::deserialize(&file).expect("whole");
    let tensors = read
        .tensors()
        .into_iter()
        .map(|(name, view)| (name, view.dtype(), view.shape().to_vec(), view.data().to_vec()));
    (weight, tensors.collect())
}

#[test]
fn a_four_bit_base_is_read_copied_and_written_again() {
    for double in [false, true] {
        let folder = folder();
        let (weight, tensors) = four_bit(folder.path(), double);
        let by_name: HashMap<_, _> = tensors.iter().map(|made| (made.0.as_str(), &made.3)).collect();
        let copied = run(folder.path(), &tensors, &[], vec![]).expect("a file");
        for (name, data) in &by_name {
            assert_eq!(self::data(&copied, name), *data, "{name}");
        }
        let file = run(folder.path(), &tensors, &[], vec![to_float("w", Dtype::F32)]).expect("a file");
        assert_eq!(SafeTensors::deserialize(&file).expect("whole").len(), 2);
        let values = values::<f32>(data(&file, "w")).into_owned();
        assert_eq!(values, wide(&narrow(&values)), "rounded to the dtype of the state");
        let worst = values.iter().zip(wide(&weight)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        // Half of the widest gap of the code, times the largest scale.
        assert!(worst > 0.0 && worst < 0.16 * 12.1, "{worst}");

        let again =
            run(folder.path(), &tensors, &[], vec![to_nf4("w", Dtype::Bf16, 64, double)]).expect("a file");
        if !double {
            // Values that were decoded are encoded to the same codes.
            for (name, data) in &by_name {
                assert_eq!(self::data(&again, name), *data, "{name}");
            }
        }
    }
}

fn problem(result: Result<Vec<u8>>) -> String {
    result.expect_err("an error").to_string()
}

#[test]
fn rules_have_to_fit() {
    let folder = folder();
    let base = [
        made("w", Kind::F32, &[2, 64], bytes(&wave(128))),
        made("v", Kind::F32, &[64], bytes(&wave(64))),
        made("i", Kind::I64, &[1], &[0; 8]),
    ];
    let adapter = [
        made("b", Kind::F32, &[2, 3], bytes(&wave(6))),
        made("a", Kind::F32, &[4, 64], bytes(&wave(256))),
        made("nan", Kind::F32, &[2, 1], bytes(&[0.5, f32::NAN])),
        made("flat", Kind::F32, &[2, 1, 1], bytes(&[0.5f32, 1.0])),
        made("whole", Kind::I64, &[2], &[0; 16]),
        made("ones", Kind::F32, &[1, 64], bytes(&[1.0f32; 64])),
        made("short", Kind::F32, &[1], bytes(&[1.0f32])),
    ];
    let update = |left: &str, right: &str, magnitude: Option<&str>| {
        let magnitude = magnitude.map(Into::into);
        Some(MergeUpdate {
            left: factor(left, false),
            right: Some(factor(right, false)),
            scale: 1.0,
            magnitude,
        })
    };
    let ruled = |update| TensorRule { update, ..to_float("w", Dtype::F32) };
    let replaced = |name: &str| TensorRule { replacement: Some(name.into()), ..to_float("w", Dtype::F32) };
    let cases = [
        (to_float("x", Dtype::F32), "has no tensor \"x\""),
        (to_float("i", Dtype::F32), "i has dtype I64; must be F32, F16 or BF16"),
        (to_nf4("v", Dtype::F32, 64, false), "shape is [64] of v; must be a matrix with values"),
        (to_nf4("w", Dtype::F32, 48, false), "blocksize is 48 of w; must be 32, 64"),
        (
            TensorRule { transposed: true, ..to_float("v", Dtype::F32) },
            "shape is [64] of v; must be a matrix",
        ),
        (ruled(update("b", "a", None)), "b and its partner make (2, 3) by (4, 64); the base has (2, 64)"),
        (ruled(update("nan", "ones", None)), "nan is NaN at 1 of the flat tensor"),
        (ruled(update("flat", "ones", None)), "flat has shape [2, 1, 1]; must be a matrix"),
        (ruled(update("whole", "ones", None)), "whole has dtype I64"),
        (ruled(update("missing", "ones", None)), "has no tensor \"missing\""),
        (replaced("b"), "the shape of a replacement is [2, 3] of b; must be [2, 64], as the base has it"),
    ];
    for (rule, words) in cases {
        let message = problem(run(folder.path(), &base, &adapter, vec![rule]));
        assert!(message.contains(words), "{message}");
        assert!(!folder.path().join("out").exists(), "checked before a file is made");
    }
    let good = [
        made("b", Kind::F32, &[2, 1], bytes(&[1.0f32, 2.0])),
        made("ones", Kind::F32, &[1, 64], bytes(&[1.0f32; 64])),
        made("short", Kind::F32, &[1], bytes(&[1.0f32])),
    ];
    let message = problem(run(folder.path(), &base, &good, vec![ruled(update("b", "ones", Some("short")))]));
    assert!(message.contains("short has 1 elements; must be 2"), "{message}");
}

#[test]
fn values_that_are_not_finite_are_named() {
    let folder = folder();
    let mut weight = wave(130 * 64);
    weight[129 * 64 + 5] = f32::NAN;
    let base = [made("w", Kind::F32, &[130, 64], bytes(&weight))];
    let message = problem(run(folder.path(), &base, &[], vec![to_nf4("w", Dtype::F32, 64, true)]));
    assert!(message.contains("NaN in row 129, column 5 of w"), "{message}");
    // Copies and casts keep values that are not finite; casts do not create new ones.
    let file = run(folder.path(), &base, &[], vec![to_float("w", Dtype::F16)]).expect("a file");
    assert!(values::<half::f16>(data(&file, "w"))[129 * 64 + 5].is_nan());
    weight[7] = 1e5;
    let base = [made("w", Kind::F32, &[130, 64], bytes(&weight))];
    let message = problem(run(folder.path(), &base, &[], vec![to_float("w", Dtype::F16)]));
    assert!(message.contains("inf in row 0, column 7 of w; must be finite in float16"), "{message}");
    run(folder.path(), &base, &[], vec![to_float("w", Dtype::Bf16)]).expect("room in bf16");
    // All values of a sum must be finite.
    let adapter = [
        made("b", Kind::F32, &[130, 1], bytes(&[1.0f32; 130])),
        made("a", Kind::F32, &[1, 64], bytes(&[1.0f32; 64])),
    ];
    let update = MergeUpdate {
        left: factor("b", false),
        right: Some(factor("a", false)),
        scale: 1.0,
        magnitude: None,
    };
    let rule = TensorRule { update: Some(update), ..to_float("w", Dtype::F32) };
    let message = problem(run(folder.path(), &base, &adapter, vec![rule]));
    assert!(message.contains("NaN in row 129, column 5 of w; must be finite in float32"), "{message}");
}

#[test]
fn a_caller_may_stop() {
    let folder = folder();
    let base =
        Collection::open(&[write(folder.path(), "x", &[made("w", Kind::U8, &[9], &[1; 9])])]).expect("it");
    let job = Job { base: &base, adapter: None, rules: vec![], outputs: vec![folder.path().join("y")] };
    let map = map();
    let engine = ConvertEngine { threads: &Portable, gemm: &Portable, mean: &mean, map: &map, chunk: BLOCK };
    assert_eq!(convert(&job, &engine, &mut |_| Err(Error::Stopped)), Err(Error::Stopped));
}
