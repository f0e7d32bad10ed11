//! Ends a migration: the first error or a cancel wins, and everything that blocks is released.
//!
//! Whatever can block (streams, the barrier, the page scan, the limiter) is registered here as a [`Stopper`]; whoever
//! fails calls [`StopHandle::stop`]. Once [committed](StopHandle::commit) the migration can no longer be cancelled: the
//! other side may already have answered.

use std::fmt;

use crate::{
    error::Error,
    sync::{Arc, Mutex, lock},
    transport::Stopper,
};

/// Ends one migration from any thread. Clones end the same one.
#[derive(Clone)]
pub struct StopHandle {
    state: Arc<Mutex<State>>,
}

struct State {
    /// Only `Running` leads to the others, so only one of them ever happens.
    phase: Phase,
    /// The first error; the reason of `Stopped`.
    first: Option<Error>,
    /// Empty once stopped or committed.
    stoppers: Vec<Box<dyn Stopper>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Running,
    Stopped,
    Committed,
}

impl StopHandle {
    /// A handle that stops nothing yet: pass it to the migration it is to end.
    pub fn new() -> StopHandle {
        let state = State { phase: Phase::Running, first: None, stoppers: Vec::new() };
        StopHandle { state: Arc::new(Mutex::new(state)) }
    }

    /// Cancels the migration: the source's VM runs on, `run` returns [`Error::Cancelled`] on both sides. Without effect
    /// once the migration is committed or has ended.
    pub fn cancel(&self) {
        self.stop(Error::Cancelled);
    }

    /// Ends the migration with `error`, unless it was stopped or committed before: then gives `error` back.
    pub(crate) fn stop(&self, error: Error) -> Option<Error> {
        self.stop_after(error, || {})
    }

    /// The same, with something to be done once `error` is known as the reason and before anything ends because of it.
    pub(crate) fn stop_after(&self, error: Error, last: impl FnOnce()) -> Option<Error> {
        let mut state = lock(&self.state);
        if state.phase != Phase::Running {
            drop(state);
            tracing::debug!(%error, "after the end");
            return Some(error);
        }
        state.phase = Phase::Stopped;
        state.first = Some(error);
        let stoppers = std::mem::take(&mut state.stoppers);
        drop(state);
        last();
        for stopper in &stoppers {
            stopper.stop();
        }
        None
    }

    /// Has `stopper` stopped together with the migration; at once, if that has already happened; never, if it is committed.
    pub(crate) fn register(&self, stopper: Box<dyn Stopper>) {
        let mut state = lock(&self.state);
        match state.phase {
            Phase::Running => state.stoppers.push(stopper),
            Phase::Stopped => {
                drop(state);
                stopper.stop();
            }
            Phase::Committed => {}
        }
    }

    /// From now on nothing stops the migration.
    ///
    /// # Errors
    /// [`Error::Stopped`] if it was stopped before.
    pub(crate) fn commit(&self) -> Result<(), Error> {
        let mut state = lock(&self.state);
        match state.phase {
            Phase::Stopped => Err(Error::Stopped),
            Phase::Running | Phase::Committed => {
                state.phase = Phase::Committed;
                // They have connections, and what the migration shares, which may have this handle: nobody would ever
                // let go of either.
                let stoppers = std::mem::take(&mut state.stoppers);
                drop(state);
                drop(stoppers);
                Ok(())
            }
        }
    }

    /// Whether the migration was stopped.
    pub fn is_stopped(&self) -> bool {
        lock(&self.state).phase == Phase::Stopped
    }

    /// Whether nothing stops the migration any more.
    pub(crate) fn is_committed(&self) -> bool {
        lock(&self.state).phase == Phase::Committed
    }

    /// The error that stopped the migration, for the one who reports it. Everybody else gets [`Error::Stopped`].
    pub(crate) fn take_first(&self) -> Option<Error> {
        lock(&self.state).first.take()
    }
}

impl Default for StopHandle {
    fn default() -> StopHandle {
        StopHandle::new()
    }
}

/// Ends the migration when the thread that holds it panics: all others would wait for that thread.
pub(crate) struct PanicGuard<'a> {
    stop: Option<&'a StopHandle>,
    /// Whose thread it is.
    owner: String,
}

impl<'a> PanicGuard<'a> {
    pub(crate) fn new(stop: &'a StopHandle, owner: impl fmt::Display) -> PanicGuard<'a> {
        PanicGuard { stop: Some(stop), owner: owner.to_string() }
    }

    /// The thread has not panicked.
    pub(crate) fn disarm(mut self) {
        self.stop = None;
    }
}

impl Drop for PanicGuard<'_> {
    fn drop(&mut self) {
        if let Some(stop) = self.stop {
            stop.stop(Error::Panicked { message: format!("the thread of {}", self.owner) });
        }
    }
}

/// Shared, so that one connection can be ended for two reasons.
impl Stopper for std::sync::Arc<dyn Stopper> {
    fn stop(&self) {
        (**self).stop();
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use crate::sync::atomic::{AtomicUsize, Ordering::Relaxed};

    struct Count(Arc<AtomicUsize>);

    impl Stopper for Count {
        fn stop(&self) {
            self.0.fetch_add(1, Relaxed);
        }
    }

    #[test]
    fn the_first_error_wins_and_stops_everything_once() {
        let (handle, count) = (StopHandle::new(), Arc::new(AtomicUsize::new(0)));
        handle.register(Box::new(Count(count.clone())));
        handle.cancel();
        handle.stop(Error::Stopped);
        assert_eq!(count.load(Relaxed), 1);
        assert!(matches!(handle.take_first(), Some(Error::Cancelled)));
        handle.register(Box::new(Count(count.clone())));
        assert_eq!(count.load(Relaxed), 2, "too late is stopped at once");
        assert!(handle.commit().is_err());
    }

    #[test]
    fn a_committed_migration_cannot_be_cancelled() {
        let (handle, count) = (StopHandle::new(), Arc::new(AtomicUsize::new(0)));
        handle.register(Box::new(Count(count.clone())));
        handle.commit().unwrap();
        handle.cancel();
        assert_eq!(count.load(Relaxed), 0);
        assert!(!handle.is_stopped());
        // Found by a leak checker: every destination that took a VM over kept its connections for ever.
        handle.register(Box::new(Count(count.clone())));
        assert_eq!(Arc::strong_count(&count), 1, "nobody keeps what cannot be stopped any more");
    }
}
