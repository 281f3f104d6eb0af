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

/// NF4: quantise, dequantise, multiply.
pub static NF4: Source = Source { name: "nf4", text: include_str!("../../kernels/nf4.cu") };

/// All sources.
pub static ALL: [&Source; 2] = [&BLOCKWISE8, &NF4];
