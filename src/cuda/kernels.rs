//! The embedded sources of kernels/.

/// A source file, compiled separately.
#[derive(Debug)]
pub struct KernelSource {
    /// The name of the file, without its extension.
    pub name: &'static str,
    /// Its text.
    pub text: &'static str,
}

/// The header that every source can include, as `common.cuh`.
pub const COMMON: &str = include_str!("../../kernels/common.cuh");

/// `AdamW` with moments of 8 and of 32 bits.
pub static ADAMW: KernelSource = KernelSource { name: "adamw", text: include_str!("../../kernels/adamw.cu") };

/// 8-bit blockwise quantisation.
pub static BLOCKWISE8: KernelSource =
    KernelSource { name: "blockwise8", text: include_str!("../../kernels/blockwise8.cu") };

/// The ORPO head: rows of a batch, and their loss.
pub static HEAD_BATCH: KernelSource =
    KernelSource { name: "head_batch", text: include_str!("../../kernels/head_batch.cu") };

/// The ORPO head: softmax and gradient on tiles of logits.
pub static HEAD_TILES: KernelSource =
    KernelSource { name: "head_tiles", text: include_str!("../../kernels/head_tiles.cu") };

/// NF4: quantise, dequantise, multiply.
pub static NF4: KernelSource = KernelSource { name: "nf4", text: include_str!("../../kernels/nf4.cu") };

/// All sources.
pub static ALL: [&KernelSource; 5] = [&ADAMW, &BLOCKWISE8, &HEAD_BATCH, &HEAD_TILES, &NF4];

/// The value of `constexpr int NAME = 123;` in a source: sizes of a launch are said once, beside the kernel.
///
/// # Panics
/// If the source has no such line; as constants are computed by the compiler, it does not build then.
#[must_use]
pub const fn constant(text: &str, name: &str) -> i64 {
    const START: &[u8] = b"constexpr int ";
    let (text, name) = (text.as_bytes(), name.as_bytes());
    let mut at = 0;
    while at + START.len() + name.len() + 4 < text.len() {
        if has(text, at, START) && has(text, at + START.len(), name) {
            let equals = at + START.len() + name.len();
            if has(text, equals, b" = ") {
                return number(text, equals + 3);
            }
        }
        at += 1;
    }
    panic!("no such constant in the source");
}

const fn has(text: &[u8], at: usize, part: &[u8]) -> bool {
    let mut i = 0;
    while i < part.len() {
        if at + i >= text.len() || text[at + i] != part[i] {
            return false;
        }
        i += 1;
    }
    true
}

const fn number(text: &[u8], first: usize) -> i64 {
    let (mut at, mut value) = (first, 0);
    while text[at].is_ascii_digit() {
        value = 10 * value + (text[at] - b'0') as i64;
        at += 1;
    }
    assert!(at > first && text[at] == b';', "the constant is not a plain number");
    value
}

/// Threads of a warp.
pub const WARP: i64 = constant(COMMON, "WARP");

#[cfg(test)]
mod tests {
    use super::{NF4, constant};
    use crate::quant::codebook;

    /// The bits of the array of this name in the source.
    fn table(name: &str) -> Vec<u32> {
        let (_, rest) = NF4.text.split_once(&format!("__constant__ u32 {name}")).expect("there");
        let (body, _) = rest.split_once("};").expect("an array");
        let words = body.split("0x").skip(1);
        words.map(|word| u32::from_str_radix(&word[..8], 16).expect("eight digits")).collect()
    }

    #[test]
    fn constants_are_read_from_the_source() {
        let text = "constexpr int AB = 7;  // no A = 9;\nconstexpr int A = 128;\nconst int B = 3;\n\n";
        assert_eq!((constant(text, "AB"), constant(text, "A")), (7, 128));
        assert!(std::panic::catch_unwind(|| constant("constexpr int A = 3 * WARP;\n\n", "A")).is_err());
        assert!(std::panic::catch_unwind(|| constant(text, "B")).is_err());
    }

    #[test]
    fn the_code_of_the_card_is_the_code() {
        assert_eq!(table("NF4["), codebook::NF4.map(f32::to_bits));
        assert_eq!(table("MIDPOINTS["), codebook::MIDPOINTS.map(f32::to_bits));
    }
}
