//! The threads that libtorch's own kernels run on.
//!
//! After a matrix product, libgomp's threads keep spinning for the next parallel section. A second pool
//! (rayon) would compete with them: on two cores it gains nothing. So the passes between products run on
//! libgomp's threads.

use crate::base::threads::{Threads, forked};

/// libtorch's intra-op threads.
#[derive(Clone, Copy, Debug)]
pub struct TorchThreads;

impl Threads for TorchThreads {
    fn size(&self) -> usize {
        usize::try_from(tch::get_num_threads()).unwrap_or(1).max(1)
    }

    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        let threads = self.size().min(tasks);
        if threads <= 1 || forked() {
            (0..tasks).for_each(task);
        } else {
            parallel(threads, tasks, task);
        }
    }
}

#[cfg(target_os = "linux")]
mod openmp {
    #![allow(unsafe_code)] // libgomp's C interface

    use std::any::Any;
    use std::ffi::{c_int, c_uint, c_void};
    use std::mem::transmute;
    use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
    use std::ptr::NonNull;
    use std::sync::{Mutex, OnceLock};

    use crate::base::threads::Threads;
    use crate::torch::abi::find;

    type Body = extern "C" fn(*mut c_void);

    /// Functions of the OpenMP library that libtorch runs on.
    struct OpenMp {
        parallel: unsafe extern "C" fn(Body, *mut c_void, c_uint, c_uint),
        thread_num: unsafe extern "C" fn() -> c_int,
        num_threads: unsafe extern "C" fn() -> c_int,
    }

    /// None if libtorch runs on another library.
    fn openmp() -> Option<&'static OpenMp> {
        static OPENMP: OnceLock<Option<OpenMp>> = OnceLock::new();
        let read = || {
            let parallel = find(c"GOMP_parallel")?;
            let (thread_num, num_threads) = (find(c"omp_get_thread_num")?, find(c"omp_get_num_threads")?);
            // SAFETY: the functions of these names, which OpenMP and libgomp define.
            Some(unsafe {
                OpenMp {
                    parallel: transmute::<
                        NonNull<c_void>,
                        unsafe extern "C" fn(Body, *mut c_void, c_uint, c_uint),
                    >(parallel),
                    thread_num: transmute::<NonNull<c_void>, unsafe extern "C" fn() -> c_int>(thread_num),
                    num_threads: transmute::<NonNull<c_void>, unsafe extern "C" fn() -> c_int>(num_threads),
                }
            })
        };
        OPENMP.get_or_init(read).as_ref()
    }

    struct Section<'a> {
        openmp: &'static OpenMp,
        tasks: usize,
        task: &'a (dyn Fn(usize) + Sync),
        panic: Mutex<Option<Box<dyn Any + Send>>>,
    }

    extern "C" fn body(section: *mut c_void) {
        // SAFETY: `data` is the `Section` on the stack of `parallel`, which waits for the threads.
        let section = unsafe { &*section.cast::<Section<'_>>() };
        // SAFETY: plain queries, valid anywhere.
        let (member, size) = unsafe { ((section.openmp.thread_num)(), (section.openmp.num_threads)()) };
        let (member, size) = (member.max(0) as usize, size.max(1) as usize);
        // There may be fewer threads than requested, so each takes every size-th task. Unwinding
        // through libgomp's frames is undefined: catch here, resume in `parallel`.
        let run = || (member..section.tasks).step_by(size).for_each(section.task);
        if let (Err(panic), Ok(mut slot)) = (catch_unwind(AssertUnwindSafe(run)), section.panic.lock()) {
            *slot = Some(panic);
        }
    }

    /// Runs the tasks on libgomp's threads, which libtorch has already loaded.
    pub fn parallel(threads: usize, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        let Some(openmp) = openmp() else {
            return crate::base::portable::Portable.run(tasks, task);
        };
        let mut section = Section { openmp, tasks, task, panic: Mutex::new(None) };
        let data = (&raw mut section).cast::<c_void>();
        // SAFETY: `body` has the C signature that libgomp expects, and `section` outlives the call.
        unsafe { (openmp.parallel)(body, data, threads as c_uint, 0) };
        if let Ok(Some(panic)) = section.panic.into_inner() {
            resume_unwind(panic);
        }
    }
}

#[cfg(target_os = "linux")]
use openmp::parallel;

/// On other systems libtorch has another OpenMP, without this interface.
#[cfg(not(target_os = "linux"))]
fn parallel(_threads: usize, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
    crate::base::portable::Portable.run(tasks, task);
}
