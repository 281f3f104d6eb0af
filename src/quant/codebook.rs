//! The NF4 code: the only copy in the repository.

/// Values of the 16 codes: quantiles of the standard normal distribution, scaled to `[-1, 1]`, with
/// an exact zero (Dettmers et al. 2023, arXiv 2305.14314, appendix E).
pub const NF4: [f32; 16] = [
    f32::from_bits(0xbf80_0000),
    f32::from_bits(0xbf32_39b1),
    f32::from_bits(0xbf06_6b30),
    f32::from_bits(0xbeca_32a0),
    f32::from_bits(0xbe91_a24d),
    f32::from_bits(0xbe3d_353f),
    f32::from_bits(0xbdba_7871),
    f32::from_bits(0x0000_0000),
    f32::from_bits(0x3da2_faff),
    f32::from_bits(0x3e24_cae3),
    f32::from_bits(0x3e7c_04dd),
    f32::from_bits(0x3ead_033a),
    f32::from_bits(0x3ee1_a4b8),
    f32::from_bits(0x3f10_07ab),
    f32::from_bits(0x3f39_13b3),
    f32::from_bits(0x3f80_0000),
];

/// Midpoints in `f32`. The code of `x` is the number of midpoints below it: a tie goes down.
pub const MIDPOINTS: [f32; 15] = {
    let mut midpoints = [0.0; 15];
    let mut i = 0;
    while i < 15 {
        midpoints[i] = f32::midpoint(NF4[i], NF4[i + 1]);
        i += 1;
    }
    midpoints
};

/// The code of zero, also the padding in the last byte of an odd number of values.
pub const ZERO: u8 = 7;

/// The code of a value that has been scaled to `[-1, 1]`; 15 for NaN.
#[inline]
#[must_use]
pub fn nearest(x: f32) -> u8 {
    MIDPOINTS.iter().map(|&midpoint| u8::from(x > midpoint || x.is_nan())).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn midpoints_are_those_of_the_format() {
        let bits = [
            0xbf59_1cd8_u32,
            0xbf1c_5270,
            0xbeeb_8480,
            0xbead_ea76,
            0xbe70_3cec,
            0xbe0d_38bc,
            0xbd3a_7871,
            0x3d22_faff,
            0x3df6_4862,
            0x3e50_67e0,
            0x3e95_82d4,
            0x3ec7_53f9,
            0x3f00_6d04,
            0x3f24_8daf,
            0x3f5c_89da,
        ];
        assert_eq!(MIDPOINTS.map(f32::to_bits), bits);
    }

    #[test]
    fn ties_go_down_and_codes_round_trip() {
        for (code, &value) in NF4.iter().enumerate() {
            assert_eq!(usize::from(nearest(value)), code);
        }
        for (code, &midpoint) in MIDPOINTS.iter().enumerate() {
            assert_eq!(usize::from(nearest(midpoint)), code);
            assert_eq!(usize::from(nearest(midpoint.next_up())), code + 1);
        }
        assert_eq!(nearest(0.0), ZERO);
        assert_eq!(nearest(-0.0), ZERO);
        assert_eq!((nearest(f32::NEG_INFINITY), nearest(f32::INFINITY), nearest(f32::NAN)), (0, 15, 15));
    }
}
