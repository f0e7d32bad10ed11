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

// Loom has none of its own, and shuttle's is this one.
pub(crate) use std::sync::Weak;

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

/// As [`wait`], for at most `left`, where there is a clock: model checkers have none, and wait until they are woken.
#[cfg(not(any(loom, shuttle)))]
pub(crate) fn wait_for<'a, T>(
    condvar: &Condvar,
    guard: MutexGuard<'a, T>,
    left: Option<std::time::Duration>,
) -> MutexGuard<'a, T> {
    match left {
        None => wait(condvar, guard),
        Some(left) => condvar.wait_timeout(guard, left).unwrap_or_else(|poisoned| poisoned.into_inner()).0,
    }
}

/// As [`wait`].
#[cfg(any(loom, shuttle))]
pub(crate) fn wait_for<'a, T>(
    condvar: &Condvar,
    guard: MutexGuard<'a, T>,
    _left: Option<std::time::Duration>,
) -> MutexGuard<'a, T> {
    wait(condvar, guard)
}

/// The moment at which a peer has been waited for long enough. Under model checkers it never comes, unless it is at once.
#[derive(Clone, Copy)]
pub(crate) struct Deadline(Option<std::time::Instant>);

impl Deadline {
    /// `limit` from now on; `None` for never.
    pub(crate) fn after(limit: Option<std::time::Duration>) -> Deadline {
        let limit = limit.filter(|limit| limit.is_zero() || cfg!(not(any(loom, shuttle))));
        Deadline(limit.and_then(|limit| std::time::Instant::now().checked_add(limit)))
    }

    /// How much time is left, 0 where it is over; `None` for any.
    pub(crate) fn left(self) -> Option<std::time::Duration> {
        self.0.map(|at| at.saturating_duration_since(std::time::Instant::now()))
    }

    /// Whether it has passed.
    pub(crate) fn is_over(self) -> bool {
        self.left().is_some_and(|left| left.is_zero())
    }
}
