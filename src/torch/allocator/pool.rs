//! A pool that reuses the memory of CPU tensors while a model trains.
//!
//! libtorch allocates each tensor from the C library. glibc makes a new mapping for each large one, with page
//! faults each time, and aligns smaller ones in its heap, where the gap of a freed tensor is too small for an
//! equally large one because of the alignment: a training step keeps several times the memory it uses. Here
//! gaps are reused and stay mapped.
//!
//! A tensor of the pool may outlive the installation of the pool.
#![allow(unsafe_code)] // system calls

use std::ffi::c_void;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use super::arena::Arena;
use super::vtable::{self, Hooks};

/// Smaller tensors come from the C library.
const SMALLEST: usize = 256 << 10;

struct Pool {
    base: usize,
    /// Process that reserved the range. A forked child has a copy of it, and of a lock that another thread
    /// may have held, so it uses neither.
    process: u32,
    capacity: usize,
    state: Mutex<State>,
}

struct State {
    arena: Arena,
    /// End of the memory used since pages were last returned to the system.
    touched: usize,
}

impl Pool {
    /// Reserves addresses for twice the machine's memory; the system backs them as they are touched.
    fn reserve() -> Option<Self> {
        // SAFETY: plain queries.
        let (pages, page) =
            unsafe { (libc::sysconf(libc::_SC_PHYS_PAGES), libc::sysconf(libc::_SC_PAGESIZE)) };
        let capacity =
            usize::try_from(pages).ok()?.checked_mul(usize::try_from(page).ok()?)?.checked_mul(2)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new private mapping, at an address of the system's choice.
        let base = unsafe {
            libc::mmap(std::ptr::null_mut(), capacity, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
        };
        if base == libc::MAP_FAILED {
            return None;
        }
        // SAFETY: advice on the new mapping; a failure only costs speed.
        unsafe { libc::madvise(base, capacity, libc::MADV_HUGEPAGE) };
        let state = State { arena: Arena::new(capacity), touched: 0 };
        Some(Self { base: base as usize, process: std::process::id(), capacity, state: Mutex::new(state) })
    }

    fn state(&self) -> Option<MutexGuard<'_, State>> {
        if std::process::id() != self.process {
            return None;
        }
        // No code panics while it holds the lock.
        Some(self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn allocate(&self, size: usize) -> Option<usize> {
        let mut state = self.state()?;
        let start = state.arena.allocate(size)?;
        state.touched = state.touched.max(state.arena.top());
        Some(self.base + start)
    }

    /// Returns the pages of all gaps to the system.
    fn trim(&self) {
        let Some(mut state) = self.state() else { return };
        for (start, size) in state.arena.vacant(state.touched) {
            // SAFETY: the range is within the mapping and no buffer overlaps it.
            unsafe { libc::madvise((self.base + start) as *mut c_void, size, libc::MADV_DONTNEED) };
        }
        state.touched = state.arena.top();
    }
}

static POOL: OnceLock<Option<Pool>> = OnceLock::new();

fn pool() -> Option<&'static Pool> {
    POOL.get()?.as_ref()
}

fn allocate(size: usize) -> *mut c_void {
    let start = if size < SMALLEST { None } else { pool().and_then(|pool| pool.allocate(size)) };
    start.map_or(std::ptr::null_mut(), |start| start as *mut c_void)
}

fn free(data: *mut c_void) -> bool {
    let Some(pool) = pool() else { return false };
    let place = (data as usize).wrapping_sub(pool.base);
    if place >= pool.capacity {
        return false;
    }
    if let Some(mut state) = pool.state() {
        state.arena.free(place);
    }
    true
}

/// Allocates tensors of 256 KiB and more from the pool. Returns false without a change if the system has no
/// address space for it, or this libtorch has no place for another allocator.
pub fn install() -> bool {
    // Each allocator frees its own memory, whichever is installed then.
    POOL.get_or_init(Pool::reserve).is_some() && vtable::install(Hooks { allocate, free })
}

/// Allocates new tensors from the C library again, and returns the pool's gaps to the system.
pub fn uninstall() {
    vtable::uninstall();
    if let Some(pool) = pool() {
        pool.trim();
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Tensor};

    #[test]
    fn tensors_survive_the_pool() {
        let new = |value: f64| Tensor::full([1 << 20], value, (Kind::Float, Device::Cpu));
        let before = new(1.0);
        assert!(super::install());
        let inside = new(2.0);
        drop(new(3.0));
        let again = new(4.0);
        let small = Tensor::ones([3], (Kind::Float, Device::Cpu));
        super::uninstall();
        let after = new(5.0);
        let pool = super::pool().expect("installed");
        let place = |x: &Tensor| (x.data_ptr() as usize).wrapping_sub(pool.base);
        assert!(place(&inside) < pool.capacity && place(&again) < pool.capacity);
        assert!([&before, &small, &after].iter().all(|x| place(x) >= pool.capacity));
        for (tensor, value) in [(&before, 1.0), (&inside, 2.0), (&again, 4.0), (&after, 5.0)] {
            assert_eq!(tensor.mean(Kind::Double).double_value(&[]), value);
        }
        assert_eq!(small.sum(Kind::Float).double_value(&[]), 3.0);
    }
}
