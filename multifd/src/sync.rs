//! The only place from which the engine takes its threads and locks.
//!
//! Everything that can block or race goes through here, so that the code that ships is the code that the model checkers
//! drive: `--cfg loom` explores every interleaving of the small types, `--cfg shuttle` random and priority schedules of
//! whole migrations. Neither has scoped threads or waits that time out, so the engine needs neither for correctness.

#[cfg(loom)]
pub(crate) use loom::{
    sync::{Condvar, Mutex, MutexGuard, atomic},
    thread,
};
#[cfg(shuttle)]
pub(crate) use shuttle::{
    sync::{Arc, Condvar, Mutex, MutexGuard, atomic},
    thread,
};
// Loom's own `Arc` holds no trait objects. Who drops the last reference is of no importance to the types under loom.
#[cfg(loom)]
pub(crate) use std::sync::Arc;
#[cfg(not(any(loom, shuttle)))]
pub(crate) use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard, atomic},
    thread,
};

/// Locks, also when a thread panicked while it held the lock.
///
/// A panicking thread stops the migration; those who still hold references only have to leave, and the invariants of
/// the locked types hold between any two statements.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Waits on `condvar`; the counterpart of [`lock`].
pub(crate) fn wait<'a, T>(condvar: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    condvar.wait(guard).unwrap_or_else(|poisoned| poisoned.into_inner())
}
