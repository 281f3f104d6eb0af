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

/// 8-bit blockwise quantisation.
pub static BLOCKWISE8: Source =
    Source { name: "blockwise8", text: include_str!("../../kernels/blockwise8.cu") };

/// The ORPO head: softmax, loss and gradient on tiles of logits.
pub static HEAD: Source = Source { name: "head", text: include_str!("../../kernels/head.cu") };

/// NF4: quantise, dequantise, multiply.
pub static NF4: Source = Source { name: "nf4", text: include_str!("../../kernels/nf4.cu") };

/// All sources.
pub static ALL: [&Source; 3] = [&BLOCKWISE8, &HEAD, &NF4];
