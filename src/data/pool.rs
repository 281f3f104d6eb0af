//! Threads that survive a fork of the process.

use std::sync::{Arc, Mutex, PoisonError};
use std::{mem, process};

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::base::error::{Error, Result};

/// A pool of threads, started at first use in each process: a forked process (a worker of a
/// `DataLoader`) inherits the pool's memory without its threads, and would wait for them forever.
#[derive(Debug, Default)]
pub struct Pool {
    started: Mutex<Option<(u32, Arc<ThreadPool>)>>,
}

impl Pool {
    /// The pool of this process, with a thread for each core it may use (`RAYON_NUM_THREADS` if set).
    ///
    /// # Errors
    ///
    /// [`Error::Internal`] if the system starts no thread.
    pub fn get(&self) -> Result<Arc<ThreadPool>> {
        let mut started = self.started.lock().unwrap_or_else(PoisonError::into_inner);
        match &*started {
            Some((process, pool)) if *process == process::id() => return Ok(pool.clone()),
            _ => {}
        }
        // Leak the parent's pool: dropping it would signal threads that do not exist.
        mem::forget(started.take());
        let pool = ThreadPoolBuilder::new().thread_name(|index| format!("oddsmith-{index}")).build();
        let pool = Arc::new(pool.map_err(|error| Error::Internal(error.to_string()))?);
        *started = Some((process::id(), pool.clone()));
        Ok(pool)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::Pool;

    #[test]
    fn a_pool_is_started_once_in_a_process() {
        let pool = Pool::default();
        let first = pool.get().unwrap();
        assert!(Arc::ptr_eq(&first, &pool.get().unwrap()));
        // The state that a forked process inherits.
        let parent = std::process::id() + 1;
        *pool.started.lock().unwrap() = Some((parent, first.clone()));
        let own = pool.get().unwrap();
        assert!(!Arc::ptr_eq(&first, &own));
        assert_eq!(own.install(|| 3), 3);
    }
}
