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
pub fn note(_what: &'static str) {
    #[cfg(feature = "testing")]
    {
        *WAITS.lock().unwrap_or_else(PoisonError::into_inner).entry(_what).or_default() += 1;
    }
}

/// Counts an operator, if it is one that waits.
pub fn note_operator(_op: &CStr) {
    #[cfg(feature = "testing")]
    if let Some(known) = OPERATORS.into_iter().find(|known| *known == _op) {
        note(known.to_str().unwrap_or("operator"));
    }
}

/// The counts, which begin anew.
#[cfg(feature = "testing")]
pub fn taken() -> BTreeMap<&'static str, u64> {
    std::mem::take(&mut WAITS.lock().unwrap_or_else(PoisonError::into_inner))
}
