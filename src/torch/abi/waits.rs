//! For tests: what makes the host wait for a GPU, or copies between the two.

#[cfg(feature = "testing")]
use std::collections::BTreeMap;
use std::ffi::CStr;
#[cfg(feature = "testing")]
use std::sync::{Mutex, PoisonError};

/// Operators whose result has a shape that depends on values.
#[cfg(feature = "testing")]
const OPERATORS: [&CStr; 3] = [c"aten::nonzero", c"aten::masked_select", c"aten::_local_scalar_dense"];

/// How often each happened since the last [`taken`].
#[cfg(feature = "testing")]
static WAITS: Mutex<BTreeMap<&'static str, u64>> = Mutex::new(BTreeMap::new());

/// Counts a wait or a copy.
#[cfg(feature = "testing")]
pub fn note(what: &'static str) {
    *WAITS.lock().unwrap_or_else(PoisonError::into_inner).entry(what).or_default() += 1;
}

/// Counts an operator, if it is one that waits.
#[cfg(feature = "testing")]
pub fn note_operator(op: &CStr) {
    if let Some(known) = OPERATORS.into_iter().find(|known| *known == op) {
        note(known.to_str().unwrap_or("operator"));
    }
}

/// Nothing is counted in a library that is installed.
#[cfg(not(feature = "testing"))]
pub const fn note(_: &'static str) {}

/// Nothing is counted in a library that is installed.
#[cfg(not(feature = "testing"))]
pub const fn note_operator(_: &CStr) {}

/// The counts, which begin again at zero.
#[cfg(feature = "testing")]
pub fn taken() -> BTreeMap<&'static str, u64> {
    std::mem::take(&mut WAITS.lock().unwrap_or_else(PoisonError::into_inner))
}
