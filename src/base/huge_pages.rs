//! Fewer page faults for large buffers that are allocated in every call.
//!
//! The gradient of a large head is newly allocated in each step. In pages of 4 KiB its first touch costs
//! several times a pass over it: 0.23 s against 0.06 s for 545 MB on a virtual machine.
#![allow(unsafe_code)] // one system call

/// Asks the system to back `memory`, not touched yet, with large pages. Does not change the contents; does
/// nothing for small buffers or on systems without this advice.
#[cfg(target_os = "linux")]
pub fn advise<T>(memory: &mut [T]) {
    const PAGE: usize = 4096;
    const WORTH_IT: usize = 8 << 20;
    let range = memory.as_mut_ptr_range();
    let (first, end) = ((range.start as usize).next_multiple_of(PAGE), range.end as usize / PAGE * PAGE);
    if end.saturating_sub(first) >= WORTH_IT {
        // SAFETY: the pages are within `memory`, which is borrowed for the call; the advice changes how they
        // are mapped, not their contents. A failure only costs speed.
        unsafe { libc::madvise(first as *mut libc::c_void, end - first, libc::MADV_HUGEPAGE) };
    }
}

/// See the implementation for Linux.
#[cfg(not(target_os = "linux"))]
pub fn advise<T>(_memory: &mut [T]) {}

#[cfg(test)]
mod tests {
    #[test]
    fn memory_keeps_what_it_holds() {
        let mut memory = vec![7u8; 20 << 20];
        super::advise(&mut memory[1..]);
        assert!(memory.iter().all(|&byte| byte == 7));
        super::advise::<u8>(&mut []);
    }
}
