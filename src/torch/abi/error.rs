//! Errors: what libtorch says, and where tch looks for it.

use std::cell::Cell;
use std::ffi::{CStr, CString, c_char};
use std::ptr;

use super::symbols::{Code, Torch};

/// A result, or the text of an error.
pub type Result<T> = std::result::Result<T, String>;

thread_local! {
    /// The text of the last error of this thread, allocated by the C library; null if there is none.
    static LAST: Cell<*mut c_char> = const { Cell::new(ptr::null_mut()) };
    /// True if the next question is not about the last call: see [`hold`].
    static HELD: Cell<bool> = const { Cell::new(false) };
}

/// What tch asks for after each call: the text, which it frees, or null.
#[unsafe(no_mangle)]
extern "C" fn get_and_reset_last_err() -> *mut c_char {
    if HELD.replace(false) { ptr::null_mut() } else { LAST.replace(ptr::null_mut()) }
}

/// Keeps the error from the next question, for the one after. tch frees the numbers among a call's arguments before it
/// asks whether the call failed, asks after each of them too, and panics if there is an error then.
pub fn hold() {
    HELD.set(true);
}

fn set(text: &str) {
    let text = CString::new(text.replace('\0', " ")).unwrap_or_default();
    // SAFETY: copies a C string.
    let old = LAST.replace(unsafe { libc::strdup(text.as_ptr()) });
    // SAFETY: null, or a string of `strdup` that nobody has asked for.
    unsafe { libc::free(old.cast()) };
}

/// The value, or `otherwise` with the error left for tch.
pub fn or_set<T>(result: Result<T>, otherwise: T) -> T {
    result.unwrap_or_else(|text| {
        set(&text);
        otherwise
    })
}

/// Turns a code of `function` into an error.
pub fn check(torch: &Torch, code: Code, function: &dyn Fn() -> String) -> Result<()> {
    if code == 0 { Ok(()) } else { Err(format!("{}: {}", function(), reason(torch))) }
}

/// Why the last call of this thread failed. Before 2.13 libtorch prints it and keeps nothing.
fn reason(torch: &Torch) -> String {
    let Some(what) = torch.torch_exception_get_what_without_backtrace else {
        return "failed; torch before 2.13 prints the reason to standard error and keeps no text".into();
    };
    // SAFETY: a C string, which the next error of this thread replaces.
    let text = unsafe { what() };
    if text.is_null() {
        return "failed for no stated reason".into();
    }
    // SAFETY: as above.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken() -> Option<String> {
        let text = get_and_reset_last_err();
        if text.is_null() {
            return None;
        }
        // SAFETY: a string of `strdup`.
        let owned = unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned();
        // SAFETY: as tch does.
        unsafe { libc::free(text.cast()) };
        Some(owned)
    }

    #[test]
    fn an_error_outlives_the_numbers_of_its_call() {
        assert_eq!(or_set(Err("of a call".into()), 1), 1);
        hold();
        assert_eq!(taken(), None);
        assert_eq!(taken().as_deref(), Some("of a call"));
    }

    #[test]
    fn the_last_error_of_a_thread_is_read_once() {
        assert_eq!(or_set(Err("first".into()), 1), 1);
        assert_eq!(or_set(Err("sec\0nd".into()), 2), 2);
        let elsewhere = std::thread::spawn(taken).join().expect("no panic");
        assert_eq!(elsewhere, None);
        assert_eq!(taken().as_deref(), Some("sec nd"));
        assert_eq!(taken(), None);
        assert_eq!(or_set(Ok(3), 0), 3);
    }
}
