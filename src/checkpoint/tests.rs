use std::collections::HashMap;
use std::path::{Path, PathBuf};

use half::bf16;
use proptest::prelude::*;
use safetensors::tensor::{Dtype as Kind, TensorView};
use safetensors::{SafeTensors, serialize};
use tempfile::TempDir;

use super::bytes::{bytes, values};
use super::collection::Collection;
use super::convert::{Engine, Job, convert, size};
use super::file::TensorFile;
use super::rule::{Factor, Rule, Target, Update};
use super::state::State;
use crate::error::{Error, Result};
use crate::head::backend::Portable;
use crate::quant::blockwise8::{self, Choice, MAP_LEN, Map};
use crate::quant::codebook::NF4;
use crate::quant::nf4;
use crate::quant::storage::{Dtype, Storage};

const BLOCK: usize = 4096;

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
#[allow(clippy::unnecessary_wraps)] // as the engine wants it
fn mean(values: &[f32]) -> Result<f32> {
    Ok(values.iter().sum::<f32>() / values.len() as f32)
}

/// Runs a job on one file and returns what is in the file that it writes.
fn run(folder: &Path, base: &[Made], adapter: &[Made], rules: Vec<Rule>) -> Result<Vec<u8>> {
    let base = Collection::open(&[write(folder, "base", base)])?;
    let adapter = Collection::open(&[write(folder, "adapter", adapter)])?;
    let out = folder.join("out");
    let _ = std::fs::remove_file(&out);
    let job = Job { base: &base, adapter: Some(&adapter), rules, outputs: vec![out.clone()] };
    let map = map();
    let engine = Engine {
        team: &Portable,
        gemm: &Portable,
        mean: &mean,
        map: &map,
        choice: Choice::Nearest,
        chunk: BLOCK,
    };
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

fn to_nf4(name: &str, dtype: Dtype, blocksize: usize, double: bool) -> Rule {
    let target = Target::Nf4 { dtype, blocksize, double };
    Rule { name: name.into(), replacement: None, update: None, transposed: false, target }
}

fn to_float(name: &str, dtype: Dtype) -> Rule {
    Rule { target: Target::Float(dtype), ..to_nf4(name, dtype, 64, false) }
}

fn factor(name: &str, transposed: bool) -> Factor {
    Factor { name: name.into(), transposed }
}

fn packed<T: Storage>(values: &[T], blocksize: usize) -> (Vec<u8>, Vec<f32>) {
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
    let nearest = Map::new(&map(), Choice::Nearest);
    blockwise8::quantize(&Portable, &centred, &nearest, 256, &mut scales, &mut largest);
    assert_eq!((data(&file, "w"), data(&file, "w.absmax")), (&codes[..], &scales[..]));
    assert_eq!(data(&file, "w.nested_absmax"), bytes(&largest));
    assert_eq!(data(&file, "w.nested_quant_map"), bytes(&map()));
    let json = String::from_utf8_lossy(data(&file, "w.quant_state.bitsandbytes__nf4")).into_owned();
    assert!(json.ends_with(&format!("\"nested_offset\": {:?}}}", f64::from(offset))), "{json}");

    // Read back: every value within the width of a step of its block.
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
    let rule = Rule { transposed: true, ..to_nf4("w", Dtype::F32, 64, false) };
    let file = run(folder.path(), &base, &[], vec![rule]).expect("a file");
    assert_eq!(data(&file, "w"), packed(&turned, 64).0);
    assert!(data(&file, "w.quant_state.bitsandbytes__nf4").ends_with(b"\"shape\": [40, 24]}"));
}

/// `base + scale * left right`, rows brought to the lengths of `magnitude`.
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
    // 4 chunks: 4096 columns' worth of rows is 4096 / gcd(4096, 24) = 512 rows, so rows are many.
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
    let update =
        Update { left: factor("b", false), right: Some(factor("a", false)), scale: 0.7, magnitude: None };
    let ruled = |update: Update| Rule { update: Some(update), ..to_float("w", Dtype::F32) };
    let bias_rule = Rule {
        update: Some(Update { left: factor("m", false), right: None, scale: -2.0, magnitude: None }),
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

    let turned = Update { right: Some(factor("turned", true)), ..update.clone() };
    let file = run(folder.path(), &tensors, &adapter, vec![ruled(turned)]).expect("a file");
    close(data(&file, "w"), &plain);

    let dora = Update { magnitude: Some("m".into()), ..update };
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
            // Codes are values of their own block, so they are found again.
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
        Some(Update { left: factor(left, false), right: Some(factor(right, false)), scale: 1.0, magnitude })
    };
    let ruled = |update| Rule { update, ..to_float("w", Dtype::F32) };
    let replaced = |name: &str| Rule { replacement: Some(name.into()), ..to_float("w", Dtype::F32) };
    let cases = [
        (to_float("x", Dtype::F32), "has no tensor \"x\""),
        (to_float("i", Dtype::F32), "i has dtype I64; must be F32, F16 or BF16"),
        (to_nf4("v", Dtype::F32, 64, false), "shape is [64] of v; must be a matrix with values"),
        (to_nf4("w", Dtype::F32, 48, false), "blocksize is 48 of w; must be 32, 64"),
        (Rule { transposed: true, ..to_float("v", Dtype::F32) }, "shape is [64] of v; must be a matrix"),
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
    // Copies and casts keep what is there; casts do not add to it.
    let file = run(folder.path(), &base, &[], vec![to_float("w", Dtype::F16)]).expect("a file");
    assert!(values::<half::f16>(data(&file, "w"))[129 * 64 + 5].is_nan());
    weight[7] = 1e5;
    let base = [made("w", Kind::F32, &[130, 64], bytes(&weight))];
    let message = problem(run(folder.path(), &base, &[], vec![to_float("w", Dtype::F16)]));
    assert!(message.contains("inf in row 0, column 7 of w; must be finite in float16"), "{message}");
    run(folder.path(), &base, &[], vec![to_float("w", Dtype::Bf16)]).expect("room in bf16");
    // A sum has to be finite everywhere.
    let adapter = [
        made("b", Kind::F32, &[130, 1], bytes(&[1.0f32; 130])),
        made("a", Kind::F32, &[1, 64], bytes(&[1.0f32; 64])),
    ];
    let update =
        Update { left: factor("b", false), right: Some(factor("a", false)), scale: 1.0, magnitude: None };
    let rule = Rule { update: Some(update), ..to_float("w", Dtype::F32) };
    let message = problem(run(folder.path(), &base, &adapter, vec![rule]));
    assert!(message.contains("NaN in row 129, column 5 of w; must be finite in float32"), "{message}");
}

#[test]
fn a_caller_may_stop() {
    let folder = folder();
    let base =
        Collection::open(&[write(folder.path(), "x", &[made("w", Kind::U8, &[9], &[1; 9])])]).expect("it");
    let job = Job { base: &base, adapter: None, rules: vec![], outputs: vec![folder.path().join("y")] };
    let (map, choice) = (map(), Choice::Nearest);
    let engine = Engine { team: &Portable, gemm: &Portable, mean: &mean, map: &map, choice, chunk: BLOCK };
    assert_eq!(convert(&job, &engine, &mut |_| Err(Error::Stopped)), Err(Error::Stopped));
}

#[test]
fn a_name_is_in_one_file() {
    let folder = folder();
    let tensor = [made("w", Kind::U8, &[1], &[1])];
    let paths = [write(folder.path(), "x", &tensor), write(folder.path(), "y", &tensor)];
    let message = Collection::open(&paths).expect_err("twice").to_string();
    assert!(message.contains("has a tensor \"w\", and so has"), "{message}");
    let message = Collection::open(&[folder.path().join("z")]).expect_err("none").to_string();
    assert!(message.ends_with("z: No such file or directory"), "{message}");
}

#[test]
fn damaged_files_are_refused() {
    let folder = folder();
    let path = write(folder.path(), "x", &[made("w", Kind::F32, &[4], bytes(&wave(4)))]);
    let whole = std::fs::read(&path).expect("it");
    let open = |content: &[u8]| {
        std::fs::write(&path, content).expect("a disk");
        TensorFile::open(&path).expect_err("damaged").to_string()
    };
    assert!(open(&[]).contains("has 0 bytes"));
    assert!(open(&whole[..whole.len() - 1]).contains("is truncated or too long"));
    assert!(open(&[whole.clone(), vec![0]].concat()).contains("is truncated or too long"));
    assert!(open(&whole[..20]).contains("the header ends after its 20 bytes"));
    assert!(open(b"PK\x03\x04 an archive of pickles").contains("is no safetensors file"));
    let text = String::from_utf8_lossy(&whole[8..]).replace("[4]", "[5]").into_bytes();
    assert!(open(&[&whole[..8], &text[..]].concat()).contains("invalid shape, data type, or offset"));
    // One that shrinks while it is read.
    std::fs::write(&path, &whole).expect("a disk");
    let file = TensorFile::open(&path).expect("whole again");
    std::fs::write(&path, &whole[..whole.len() - 4]).expect("a disk");
    let message = file.whole(&file.entries()["w"]).expect_err("shorter").to_string();
    assert!(message.contains("fewer than when it was opened"), "{message}");
}

/// The message that a 4-bit weight with changed parts is refused with.
fn refused(change: impl Fn(&mut Vec<Made>)) -> String {
    let folder = folder();
    let (_, mut tensors) = four_bit(folder.path(), true);
    change(&mut tensors);
    let file = Collection::open(&[write(folder.path(), "changed", &tensors)]).expect("a file");
    State::read(&file, "w").expect_err("no state").to_string()
}

fn part<'a>(tensors: &'a mut [Made], name: &str) -> &'a mut Made {
    tensors.iter_mut().find(|made| made.0 == name).expect(name)
}

const JSON: &str = "w.quant_state.bitsandbytes__nf4";

fn refused_json(from: &str, to: &str) -> String {
    refused(|tensors| {
        let made = part(tensors, JSON);
        let text = String::from_utf8(made.3.clone()).expect("text").replace(from, to);
        (made.2, made.3) = (vec![text.len()], text.into_bytes());
    })
}

#[test]
fn states_that_do_not_fit_are_refused_by_name() {
    let cases = [
        (refused_json("130", "131"), "shape [70, 131], which does not fit the 4550 bytes of codes"),
        (refused_json("[70, 130]", "[70, -130]"), "shape of quant_state is [70,-130]"),
        (refused_json("70", "18446744073709551615"), "which does not fit"),
        (refused_json("\"blocksize\": 64", "\"blocksize\": 48"), "blocksize of quant_state is 48"),
        (
            refused_json("\"blocksize\": 64", "\"blocksize\": 128"),
            "absmax has 143 elements; must be 72, one a block",
        ),
        (refused_json("bfloat16", "float64"), "dtype of quant_state is \"float64\""),
        (refused_json("\"nf4\"", "\"fp4\""), "quant_type of quant_state is \"fp4\"; must be \"nf4\""),
        (refused_json("{", "["), "quant_state is no JSON"),
        (refused_json("nested_offset", "offset"), "nested_offset of quant_state is missing"),
        (refused_json("256", "0"), "nested_blocksize of quant_state is 0"),
        (refused_json("256", "128"), "nested_absmax has 1 elements; must be 2"),
        (
            refused(|all| part(all, JSON).0 = "w.quant_state.bitsandbytes__fp4".into()),
            "w: is fp4; of quantised",
        ),
        (refused(|all| all.retain(|made| made.0 != JSON)), "has absmax but no quant_state"),
        (refused(|all| all.retain(|made| made.0 != "w.absmax")), "absmax is missing"),
        (refused(|all| all.retain(|made| made.0 != "w.quant_map")), "quant_map is missing"),
        (refused(|all| part(all, "w").1 = Kind::I8), "w: is int8"),
        (refused(|all| part(all, "w.quant_map").3[0] ^= 1), "quant_map has other values than NF4"),
        (
            refused(|all| {
                let made = part(all, "w.nested_absmax");
                (made.1, made.2) = (Kind::U8, vec![4]);
            }),
            "w.nested_absmax has dtype U8; must be F32",
        ),
    ];
    for (message, words) in cases {
        assert!(message.contains(words), "{message}");
    }
}

proptest! {
    /// No file makes the reader panic, and what it takes can be read.
    #[test]
    fn any_bytes_are_a_file_or_an_error(mut content: Vec<u8>, length in any::<Option<u8>>()) {
        if let (Some(length), true) = (length, content.len() >= 8) {
            content[..8].copy_from_slice(&u64::from(length).to_le_bytes());
        }
        read_all(&content);
    }

    /// Headers of the right form, with sizes that fit the file now and then.
    #[test]
    fn any_header_is_a_file_or_an_error(
        tensors in prop::collection::vec(
            (
                prop::sample::select(vec!["w", "w.absmax", "w.quant_map", "w.nested_absmax", JSON, "x", ""]),
                prop::sample::select(vec!["F32", "BF16", "U8", "I8", "F4", "F8_E4M3", "BOOL", "F128"]),
                prop::collection::vec(prop_oneof![0u64..9, any::<u64>()], 0..4),
                prop::option::weighted(0.2, any::<(u64, u64)>()),
            ),
            0..5,
        ),
        surplus in 0usize..2,
    ) {
        let (mut at, mut parts) = (0u64, Vec::new());
        for (name, kind, shape, offsets) in tensors {
            let bits = match kind { "F32" => 32u64, "BF16" => 16, "F4" => 4, _ => 8 };
            let len = shape.iter().try_fold(bits, |product, size| product.checked_mul(*size)).unwrap_or(0) / 8;
            let end = at.saturating_add(len);
            let (from, to) = offsets.unwrap_or((at, end));
            if end < 100_000 {
                at = end;
            }
            parts.push(format!(
                "{name:?}:{{\"dtype\":{kind:?},\"shape\":{shape:?},\"data_offsets\":[{from},{to}]}}"
            ));
        }
        let header = format!("{{{}}}", parts.join(","));
        let mut content = (header.len() as u64).to_le_bytes().to_vec();
        content.extend_from_slice(header.as_bytes());
        content.resize(content.len() + at as usize + surplus, 0x77);
        read_all(&content);
    }

    #[test]
    fn a_changed_file_is_a_file_or_an_error(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in prop::option::of(any::<prop::sample::Index>()),
        double: bool,
    ) {
        let mut content = whole_file(double);
        for (place, byte) in changes {
            let place = place.index(content.len());
            content[place] = byte;
        }
        if let Some(cut) = cut {
            content.truncate(cut.index(content.len()));
        }
        read_all(&content);
    }

    /// Texts in place of the JSON: what is read has the sizes that it says.
    #[test]
    fn any_json_is_a_state_or_an_error(
        (key, value) in (
            prop::sample::select(vec!["blocksize", "dtype", "shape", "nested_blocksize", "nested_offset", "quant_type"]),
            prop_oneof![
                any::<i64>().prop_map(serde_json::Value::from),
                any::<f64>().prop_map(serde_json::Value::from),
                prop::sample::select(vec![32, 64, 128, 4096]).prop_map(serde_json::Value::from),
                ".{0,8}".prop_map(serde_json::Value::from),
                prop::collection::vec(any::<u64>(), 0..4).prop_map(serde_json::Value::from),
                prop::collection::vec(0u64..200, 0..4).prop_map(serde_json::Value::from),
                Just(serde_json::Value::Null),
            ],
        ),
        double: bool,
    ) {
        let file = whole_file(double);
        let read = SafeTensors::deserialize(&file).expect("whole");
        let text = read.tensor(JSON).expect("it").data();
        let mut json: serde_json::Value = serde_json::from_slice(text).expect("JSON");
        json[key] = value;
        let text = json.to_string().into_bytes();
        let tensors: Vec<Made> = read.tensors().into_iter().map(|(name, view)| {
            let data = if name == JSON { text.clone() } else { view.data().to_vec() };
            let shape = if name == JSON { vec![text.len()] } else { view.shape().to_vec() };
            (name, view.dtype(), shape, data)
        }).collect();
        let folder = folder();
        read_all(&std::fs::read(write(folder.path(), "x", &tensors)).expect("it"));
    }

    /// Whatever the shape, the file holds what quantising the whole tensor makes, and reads back.
    #[test]
    fn any_matrix_is_quantised_whole(
        rows in 1usize..90, columns in 1usize..90, power in 5u32..13, double: bool, seed: u32,
    ) {
        let folder = folder();
        let weight: Vec<f32> = wave(rows * columns).iter().map(|x| x * (1.0 + (seed % 97) as f32)).collect();
        let base = [made("w", Kind::F32, &[rows, columns], bytes(&weight))];
        let blocksize = 1 << power;
        let file = run(folder.path(), &base, &[], vec![to_nf4("w", Dtype::F32, blocksize, double)]).expect("a file");
        prop_assert_eq!(data(&file, "w"), &packed(&weight, blocksize).0[..]);
        let source = Collection::open(&[folder.path().join("out")]).expect("a file");
        let state = State::read(&source, "w").expect("a state").expect("quantised");
        prop_assert_eq!(state.scales(0, rows * columns).len(), (rows * columns).div_ceil(blocksize));
        prop_assert_eq!(state.double(), double);
    }
}

/// A file with a small 4-bit weight and a plain one.
fn whole_file(double: bool) -> Vec<u8> {
    use std::sync::OnceLock;
    static FILES: [OnceLock<Vec<u8>>; 2] = [OnceLock::new(), OnceLock::new()];
    let make = || {
        let folder = folder();
        let base = [
            made("w", Kind::BF16, &[3, 70], bytes(&narrow(&wave(210)))),
            made("n", Kind::F32, &[2], bytes(&wave(2))),
        ];
        run(folder.path(), &base, &[], vec![to_nf4("w", Dtype::Bf16, 64, double)]).expect("a file")
    };
    FILES[usize::from(double)].get_or_init(make).clone()
}

/// Opens a file with this content, and reads every tensor and state if that works.
fn read_all(content: &[u8]) {
    let folder = folder();
    let path = folder.path().join("x");
    std::fs::write(&path, content).expect("a disk");
    let Ok(collection) = Collection::open(&[&path]) else {
        return;
    };
    let file = &collection.files()[0];
    for (name, entry) in file.entries() {
        assert_eq!(file.whole(entry).expect("bytes").len(), entry.len);
        if let Ok(Some(state)) = State::read(&collection, name) {
            assert_eq!(entry.len, state.count().div_ceil(2));
            let blocks = state.count().div_ceil(state.blocksize);
            assert_eq!(state.scales(0, state.count()).len(), blocks);
        }
        let rules = vec![to_float(name, Dtype::F32)];
        let job = Job { base: &collection, adapter: None, rules, outputs: vec![folder.path().join("y")] };
        let _ = size(&job);
    }
}
