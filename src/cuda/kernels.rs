//! The sources of kernels/, embedded.

/// A source file, compiled by itself.
#[derive(Debug)]
pub struct Source {
    /// The name of the file, without its end.
    pub name: &'static str,
    /// Its text.
    pub text: &'static str,
}

/// What every source may include, as `common.cuh`.
pub const COMMON: &str = include_str!("../../kernels/common.cuh");

/// `AdamW` with moments of 8 and of 32 bits.
pub static ADAMW: Source = Source { name: "adamw", text: include_str!("../../kernels/adamw.cu") };

/// 8-bit blockwise quantisation.
pub static BLOCKWISE8: Source =
    Source { name: "blockwise8", text: include_str!("../../kernels/blockwise8.cu") };

/// The ORPO head: rows of a batch, and their loss.
pub static HEAD_BATCH: Source =
    Source { name: "head_batch", text: include_str!("../../kernels/head_batch.cu") };

/// The ORPO head: softmax and gradient on tiles of logits.
pub static HEAD_TILES: Source =
    Source { name: "head_tiles", text: include_str!("../../kernels/head_tiles.cu") };

/// NF4: quantise, dequantise, multiply.
pub static NF4: Source = Source { name: "nf4", text: include_str!("../../kernels/nf4.cu") };

/// All sources.
pub static ALL: [&Source; 5] = [&ADAMW, &BLOCKWISE8, &HEAD_BATCH, &HEAD_TILES, &NF4];

#[cfg(test)]
mod tests {
    use super::NF4;
    use crate::quant::codebook;

    /// The bits of the array of this name in the source.
    fn table(name: &str) -> Vec<u32> {
        let (_, rest) = NF4.text.split_once(&format!("__constant__ u32 {name}")).expect("there");
        let (body, _) = rest.split_once("};").expect("an array");
        let words = body.split("0x").skip(1);
        words.map(|word| u32::from_str_radix(&word[..8], 16).expect("eight digits")).collect()
    }

    #[test]
    fn the_code_of_the_card_is_the_code() {
        assert_eq!(table("NF4["), codebook::NF4.map(f32::to_bits));
        assert_eq!(table("MIDPOINTS["), codebook::MIDPOINTS.map(f32::to_bits));
    }
}
