//! A shared library as a table of functions.

/// Declares a struct with a function pointer for each listed symbol, and `load`, which looks up all of them.
/// The library stays open as long as the struct lives.
macro_rules! library {
    ($(#[$doc:meta])* struct $name:ident {
        $(fn $field:ident = $symbol:ident($($argument:ty),* $(,)?) -> $result:ty;)*
    }) => {
        $(#[$doc])*
        #[derive(Debug)]
        pub struct $name {
            $(pub(super) $field: unsafe extern "C" fn($($argument),*) -> $result,)*
            _library: ::libloading::Library,
        }

        impl $name {
            fn load(library: ::libloading::Library) -> ::std::result::Result<Self, String> {
                Ok(Self {
                    $($field: {
                        let symbol = concat!(stringify!($symbol), "\0");
                        // SAFETY: the type is that of the function of this name in NVIDIA's headers.
                        *unsafe { library.get(symbol.as_bytes()) }.map_err(|error| error.to_string())?
                    },)*
                    _library: library,
                })
            }
        }
    };
}

pub(super) use library;

/// The system's reason why a library does not open.
pub fn reason(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}
