//! Which vector instructions the machine has: one answer for all modules.

/// Instruction sets that have vector code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// AVX-512 with byte and word instructions.
    Avx512,
    /// AVX2 with fused multiply-add and half-precision conversions.
    Avx2,
    /// Plain loops.
    Baseline,
}

/// Defines a function that dispatches on the level, from an `#[inline(always)]` body that is compiled for
/// every level. The level is the first argument of the function and, as a number, the last one of the body.
macro_rules! on_levels {
    (
        $(#[$doc:meta])*
        $vis:vis fn $name:ident<$($generic:ident: $bound:ident),*>($($arg:ident: $ty:ty),* $(,)?) -> $ret:ty
            = $body:ident
    ) => {
        $(#[$doc])*
        $vis fn $name<$($generic: $bound),*>(level: $crate::base::simd::Level, $($arg: $ty),*) -> $ret {
            use $crate::base::simd::Level;
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
            fn avx512<$($generic: $bound),*>($($arg: $ty),*) -> $ret {
                $body::<$($generic,)* { Level::Avx512 as u8 }>($($arg),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            fn avx2<$($generic: $bound),*>($($arg: $ty),*) -> $ret {
                $body::<$($generic,)* { Level::Avx2 as u8 }>($($arg),*)
            }
            match level {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: `level` is one that this machine has.
                #[allow(unsafe_code)]
                Level::Avx512 => unsafe { avx512($($arg),*) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: as above.
                #[allow(unsafe_code)]
                Level::Avx2 => unsafe { avx2($($arg),*) },
                _ => $body::<$($generic,)* { Level::Baseline as u8 }>($($arg),*),
            }
        }
    };
}
pub(crate) use on_levels;

impl Level {
    /// The best level of this machine, limited by `ATEN_CPU_CAPABILITY` (`avx2` or `default`), which limits
    /// libtorch's vector code too.
    #[must_use]
    pub fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            use std::sync::OnceLock;
            static LEVEL: OnceLock<Level> = OnceLock::new();
            *LEVEL.get_or_init(|| {
                let avx2 = is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c");
                let avx512 = is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl");
                let limit = std::env::var("ATEN_CPU_CAPABILITY").unwrap_or_default();
                Self::limited(avx2, avx512, &limit)
            })
        }
        #[cfg(not(target_arch = "x86_64"))]
        Level::Baseline
    }

    /// The best available level that a value of `ATEN_CPU_CAPABILITY` allows.
    #[cfg(any(test, target_arch = "x86_64"))]
    fn limited(avx2: bool, avx512: bool, limit: &str) -> Self {
        match (avx2, avx512, limit) {
            (_, _, "default") | (false, ..) => Level::Baseline,
            (_, false, _) | (_, _, "avx2") => Level::Avx2,
            _ => Level::Avx512,
        }
    }

    /// All levels of this machine.
    #[cfg(test)]
    #[must_use]
    pub fn available() -> &'static [Level] {
        match Self::best() {
            Level::Avx512 => &[Level::Avx512, Level::Avx2, Level::Baseline],
            Level::Avx2 => &[Level::Avx2, Level::Baseline],
            Level::Baseline => &[Level::Baseline],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Level;

    #[test]
    fn the_limit_is_that_of_libtorch() {
        for (avx2, avx512, limit, level) in [
            (true, true, "", Level::Avx512),
            (true, true, "avx512", Level::Avx512),
            (true, true, "avx2", Level::Avx2),
            (true, true, "default", Level::Baseline),
            (true, false, "avx512", Level::Avx2),
            (true, false, "default", Level::Baseline),
            (false, true, "", Level::Baseline),
        ] {
            assert_eq!(Level::limited(avx2, avx512, limit), level, "{avx2} {avx512} {limit}");
        }
    }
}
