//! The entries that bitsandbytes stores with a 4-bit weight.
//!
//! `weight` has the codes. With it come `weight.absmax` and `weight.quant_map`, with double quantisation
//! `weight.nested_absmax` and `weight.nested_quant_map`, and a JSON object with the rest as the bytes of
//! `weight.quant_state.bitsandbytes__nf4`.

use serde_json::{Map, Value};

use super::bytes::values;
use super::collection::{Collection, Found};
use super::file::Kind;
use crate::base::error::{Error, Result};
use crate::base::float::Dtype;
use crate::quant::BLOCK_SIZES;
use crate::quant::blockwise8::MAP_LEN;
use crate::quant::codebook::NF4;
use crate::quant::scales::Scales;

/// Scales that share one scale in double quantisation.
pub const NESTED_BLOCKSIZE: usize = 256;

const JSON: &str = ".quant_state.bitsandbytes__";

/// Suffixes of the entries of a weight, after its name.
pub const PARTS: [&str; 5] =
    [".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".quant_state.bitsandbytes__nf4"];

/// The name of a dtype in Python.
#[must_use]
pub fn dtype_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F32 => "float32",
        Dtype::F16 => "float16",
        Dtype::Bf16 => "bfloat16",
    }
}

/// The dtype with a name in Python.
#[must_use]
pub fn dtype_of(name: &str) -> Option<Dtype> {
    [Dtype::F32, Dtype::F16, Dtype::Bf16].into_iter().find(|&dtype| dtype_name(dtype) == name)
}

/// The scales of a weight, in memory: at most one per 32 values.
#[derive(Clone, Debug, PartialEq)]
enum Owned {
    Plain(Vec<f32>),
    Nested { codes: Vec<u8>, map: Vec<f32>, absmax: Vec<f32>, blocksize: usize, offset: f32 },
}

/// The state of a 4-bit weight: all but its codes.
#[derive(Clone, Debug, PartialEq)]
pub struct State {
    /// Sizes of the matrix.
    pub shape: Vec<usize>,
    /// Dtype of the matrix that was quantised.
    pub dtype: Dtype,
    /// Values that share a scale.
    pub blocksize: usize,
    scales: Owned,
}

impl State {
    /// The state of a weight, `None` if the tensor is not quantised.
    ///
    /// # Errors
    /// Another kind of quantisation, parts that are missing or not JSON, and parts that do not fit each other
    /// or the codes; the message names weight and part.
    pub fn read(from: &Collection, name: &str) -> Result<Option<Self>> {
        let weight = from.get(name)?;
        let wrong = |problem: String| weight.file.wrong(format!("{name}: {problem}"));
        if weight.entry.kind == Kind::I8 {
            return Err(wrong("is quantised to int8; only nf4 can be read".into()));
        }
        let json = format!("{name}{JSON}");
        let Some(found) = from.names_from(&json).next() else {
            return match PARTS.iter().find(|part| from.find(&format!("{name}{part}")).is_some()) {
                Some(part) => Err(wrong(format!("has {} but no quant_state.bitsandbytes__nf4", &part[1..]))),
                None => Ok(None),
            };
        };
        let quant_type = &found[json.len()..];
        if quant_type != "nf4" {
            return Err(wrong(format!("is quantised to {quant_type}; only nf4 can be read")));
        }
        let reader = Reader { from, name, weight };
        reader.state().map(Some)
    }

    /// Number of values.
    #[must_use]
    pub fn count(&self) -> usize {
        self.shape.iter().product()
    }

    /// True if the scales are quantised too.
    #[must_use]
    pub fn double(&self) -> bool {
        matches!(self.scales, Owned::Nested { .. })
    }

    /// The scales of the blocks of `count` values from `start` on, which is the start of a block.
    ///
    /// # Panics
    /// If there are not that many.
    #[must_use]
    pub fn scales(&self, start: usize, count: usize) -> Vec<f32> {
        let scales = match &self.scales {
            Owned::Plain(absmax) => Scales::Plain(absmax),
            Owned::Nested { codes, map, absmax, blocksize, offset } => {
                Scales::Nested { codes, map, absmax, blocksize: *blocksize, offset: *offset }
            }
        };
        let first = start / self.blocksize;
        (first..first + count.div_ceil(self.blocksize)).map(|block| scales.get(block)).collect()
    }
}

struct Reader<'a> {
    from: &'a Collection,
    name: &'a str,
    weight: Found<'a>,
}

impl Reader<'_> {
    fn wrong(&self, problem: &str) -> Error {
        self.weight.file.wrong(format!("{}: {problem}", self.name))
    }

    fn bytes(&self, part: &str, kind: Kind) -> Result<Vec<u8>> {
        let name = format!("{}{part}", self.name);
        let Some(Found { file, entry }) = self.from.find(&name) else {
            return Err(self.wrong(&format!("{} is missing", &part[1..])));
        };
        if entry.kind != kind {
            return Err(file.wrong(format!("{name} has dtype {}; must be {kind}", entry.kind)));
        }
        Ok(file.whole(entry)?.to_vec())
    }

    fn floats(&self, part: &str, len: usize, why: &str) -> Result<Vec<f32>> {
        let numbers = values::<f32>(&self.bytes(part, Kind::F32)?).into_owned();
        self.check_len(part, numbers.len(), len, why)?;
        Ok(numbers)
    }

    fn check_len(&self, part: &str, got: usize, len: usize, why: &str) -> Result<()> {
        if got == len {
            return Ok(());
        }
        Err(self.wrong(&format!("{} has {got} elements; must be {len}, {why}", &part[1..])))
    }

    fn state(&self) -> Result<State> {
        let text = self.bytes(".quant_state.bitsandbytes__nf4", Kind::U8)?;
        let json = serde_json::from_slice::<Value>(&text)
            .map_err(|error| self.wrong(&format!("quant_state is not JSON: {error}")))?;
        let Value::Object(json) = json else {
            return Err(self.wrong("quant_state is not a JSON object"));
        };
        let quant_type = json.get("quant_type").and_then(Value::as_str);
        if quant_type != Some("nf4") {
            return Err(self.unfit(&json, "quant_type", "\"nf4\""));
        }
        let blocksize = self.size(&json, "blocksize")?;
        if !BLOCK_SIZES.contains(&blocksize) {
            return Err(self.unfit(&json, "blocksize", "32, 64, 128, 256, 512, 1024, 2048 or 4096"));
        }
        let dtype = self.dtype(&json, "dtype")?;
        let shape = self.shape(&json)?;
        let count = shape
            .iter()
            .try_fold(1usize, |product, &size| product.checked_mul(size))
            .filter(|count| self.weight.entry.len == count.div_ceil(2));
        let Some(count) = count else {
            let len = self.weight.entry.len;
            let problem =
                format!("quant_state has shape {shape:?}, which does not fit the {len} bytes of codes");
            return Err(self.wrong(&problem));
        };
        let code = self.floats(".quant_map", NF4.len(), "one per code")?;
        if code != NF4 {
            return Err(self.wrong("quant_map does not have the values of NF4"));
        }
        let scales = self.scales(&json, count.div_ceil(blocksize))?;
        Ok(State { shape, dtype, blocksize, scales })
    }

    fn scales(&self, json: &Map<String, Value>, blocks: usize) -> Result<Owned> {
        const WHY: &str = "one per block";
        let nested = json.keys().any(|key| key.starts_with("nested_"))
            || self.from.find(&format!("{}.nested_absmax", self.name)).is_some();
        if !nested {
            return Ok(Owned::Plain(self.floats(".absmax", blocks, WHY)?));
        }
        let blocksize = self.size(json, "nested_blocksize")?;
        if blocksize == 0 {
            return Err(self.unfit(json, "nested_blocksize", "a positive number"));
        }
        if self.dtype(json, "nested_dtype")? != Dtype::F32 {
            return Err(self.unfit(json, "nested_dtype", "\"float32\""));
        }
        let Some(offset) = json.get("nested_offset").and_then(Value::as_f64) else {
            return Err(self.unfit(json, "nested_offset", "a number"));
        };
        let codes = self.bytes(".absmax", Kind::U8)?;
        self.check_len(".absmax", codes.len(), blocks, WHY)?;
        let map = self.floats(".nested_quant_map", MAP_LEN, "one per code")?;
        let absmax = self.floats(".nested_absmax", blocks.div_ceil(blocksize), "one per block of scales")?;
        Ok(Owned::Nested { codes, map, absmax, blocksize, offset: offset as f32 })
    }

    fn unfit(&self, json: &Map<String, Value>, key: &str, wanted: &str) -> Error {
        let got = json.get(key).map_or_else(|| "missing".to_owned(), Value::to_string);
        self.wrong(&format!("{key} of quant_state is {got}; must be {wanted}"))
    }

    fn size(&self, json: &Map<String, Value>, key: &str) -> Result<usize> {
        let size = json.get(key).and_then(Value::as_u64).and_then(|size| usize::try_from(size).ok());
        size.ok_or_else(|| self.unfit(json, key, "a size"))
    }

    fn dtype(&self, json: &Map<String, Value>, key: &str) -> Result<Dtype> {
        let dtype = json.get(key).and_then(Value::as_str).and_then(dtype_of);
        dtype.ok_or_else(|| self.unfit(json, key, "\"float32\", \"float16\" or \"bfloat16\""))
    }

    fn shape(&self, json: &Map<String, Value>) -> Result<Vec<usize>> {
        let sizes = json.get("shape").and_then(Value::as_array).and_then(|sizes| {
            sizes.iter().map(|size| size.as_u64().and_then(|size| usize::try_from(size).ok())).collect()
        });
        sizes.ok_or_else(|| self.unfit(json, "shape", "a list of sizes"))
    }
}

/// The JSON of a weight as Python's `json.dumps` writes it; `offset` with double quantisation.
#[must_use]
pub fn json(shape: &[usize], dtype: Dtype, blocksize: usize, offset: Option<f32>) -> String {
    let sizes = shape.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let dtype = dtype_name(dtype);
    let mut text = format!(
        "{{\"quant_type\": \"nf4\", \"blocksize\": {blocksize}, \"dtype\": \"{dtype}\", \"shape\": [{sizes}]"
    );
    if let Some(offset) = offset {
        let offset = repr(f64::from(offset));
        let more = format!(
            "\"nested_blocksize\": {NESTED_BLOCKSIZE}, \"nested_dtype\": \"float32\", \"nested_offset\": {offset}"
        );
        text = [text, more].join(", ");
    }
    text + "}"
}

/// Longest text of [`repr`].
pub const LONGEST_REPR: usize = 24;

/// A number as Python writes it: the shortest digits that read back the same, with an exponent below
/// 1e-4 and from 1e16 on.
#[must_use]
pub fn repr(x: f64) -> String {
    if !x.is_finite() {
        let name = if x.is_nan() { "NaN" } else { "Infinity" };
        return format!("{}{name}", if x < 0.0 { "-" } else { "" });
    }
    let mut scientific = format!("{x:e}");
    // Two texts of this length can be equally near, because values of f32 have few digits; Python takes the
    // even one.
    let places = scientific.chars().take_while(|&c| c != 'e').filter(char::is_ascii_digit).count() - 1;
    let even = format!("{x:.places$e}");
    if even.parse() == Ok(x) {
        scientific = even;
    }
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if x != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.abs());
    }
    plain(digits, exponent)
}

/// Writes `digits * 10^exponent`, where `digits` has one digit before the point, without an exponent.
fn plain(digits: &str, exponent: i32) -> String {
    let (sign, digits) = digits.strip_prefix('-').map_or(("", digits), |rest| ("-", rest));
    let digits = digits.replace('.', "");
    let Ok(before) = usize::try_from(exponent + 1) else {
        return format!("{sign}0.{}{digits}", "0".repeat(exponent.unsigned_abs() as usize - 1));
    };
    match before.checked_sub(digits.len()) {
        Some(zeros) => format!("{sign}{digits}{}.0", "0".repeat(zeros)),
        None if before == 0 => format!("{sign}0.{digits}"),
        None => format!("{sign}{}.{}", &digits[..before], &digits[before..]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[allow(clippy::excessive_precision)] // the last digit is what is tested
    fn numbers_are_written_as_python_writes_them() {
        let cases = [
            (0.123_779_296_875, "0.123779296875"),
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1.0, "1.0"),
            (-2.5, "-2.5"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (-1.25e-7, "-1.25e-07"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (f64::NAN, "NaN"),
            (f64::NEG_INFINITY, "-Infinity"),
            (f64::from(0.1f32), "0.10000000149011612"),
            (123.456, "123.456"),
            (120.0, "120.0"),
            (0.012, "0.012"),
            // 0.080219268798828125 and 0.0001220703125 + 2^-34, which end in a 5: round to the even digit.
            (0.080_219_268_798_828_125, "0.08021926879882812"),
            (f64::from(f32::from_bits(0x3e80_0001)), "0.2500000298023224"),
        ];
        for (x, text) in cases {
            assert_eq!(repr(x), text);
        }
        assert_eq!(repr(-f64::MIN_POSITIVE).len(), LONGEST_REPR);
    }

    #[test]
    #[allow(clippy::excessive_precision)] // the last digit is what is tested
    fn the_json_is_that_of_the_format() {
        let plain = r#"{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [8, 64]}"#;
        assert_eq!(json(&[8, 64], Dtype::Bf16, 64, None), plain);
        let nested = r#"{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [8, 64], "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.123779296875}"#;
        assert_eq!(json(&[8, 64], Dtype::Bf16, 64, Some(0.123_779_3)), nested);
    }
}
