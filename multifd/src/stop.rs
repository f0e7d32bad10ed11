//! Ends a migration: the first error or a cancel wins, and everything that blocks is released.
//!
//! Each thing that can block (streams, the barrier, the page scan, the limiter) is registered here as a [`Stopper`]; the
//! thread that fails calls [`StopHandle::stop`]. A source that is [committed](StopHandle::commit) may no longer resume its
//! VM by itself: a cancel then only ends its wait for the answer. A destination that has [decided](StopHandle::decide)
//! goes on to its end, within its own limits.

use std::{collections::BTreeMap, fmt};

use crate::{
    error::Error,
    sync::{Arc, Mutex, lock},
    threads::caught,
    transport::Stopper,
};

/// Ends one migration from any thread. Clones end the same one.
#[derive(Clone)]
pub struct StopHandle {
    state: Arc<Mutex<State>>,
}

struct State {
    phase: Phase,
    /// The first error; the reason of `Stopped`, or of the interruption.
    first: Option<Error>,
    /// In the order of their registration. Empty once stopped, interrupted or decided.
    stoppers: BTreeMap<u64, Box<dyn Stopper>>,
    /// The number of the next registration.
    next: u64,
}

/// A stopper that is forgotten when this is dropped: what it stops is over.
#[must_use = "dropped at once, nothing is registered"]
pub(crate) struct Registration {
    handle: StopHandle,
    number: u64,
}

impl Drop for Registration {
    fn drop(&mut self) {
        let forgotten = lock(&self.handle.state).stoppers.remove(&self.number);
        // It may own what takes the lock when it is dropped.
        drop(forgotten);
    }
}

/// Phases follow each other in this order; `Running` leads to one of the next two only.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Running,
    /// Ended by an error or a cancel.
    Stopped,
    /// The other side may already act on what was said.
    Committed,
    /// Committed, and the wait for the answer was ended.
    Interrupted,
    /// Nothing stops the migration any more, or it is over.
    Decided,
}

impl StopHandle {
    /// A handle that stops nothing yet: pass it to the migration it is to end.
    pub fn new() -> StopHandle {
        let state = State { phase: Phase::Running, first: None, stoppers: BTreeMap::new(), next: 0 };
        StopHandle { state: Arc::new(Mutex::new(state)) }
    }

    /// Cancels the migration: the source's VM runs on, and each `run` that was given this handle returns [`Error::Cancelled`].
    ///
    /// The other side, in another process, has no handle that was used. A destination whose source was cancelled sees its connections end:
    /// [`Error::Io`], or [`Error::Protocol`] where a channel ended between two packets. A source whose destination was cancelled returns
    /// [`Error::Refused`], or that the connections ended, where that answer has not arrived.
    ///
    /// Between the source's commit and the destination's answer this ends the source's wait: `run` returns
    /// [`Error::InDoubt`] there, and the VM stays paused. Without effect once the migration has ended.
    pub fn cancel(&self) {
        self.interrupt(Error::Cancelled);
    }

    /// Ends the migration with `error`, also the wait for an answer after the commit.
    pub(crate) fn interrupt(&self, error: Error) {
        self.end(error, |phase| match phase {
            Phase::Running => Some(Phase::Stopped),
            Phase::Committed => Some(Phase::Interrupted),
            _ => None,
        });
    }

    /// Ends the migration with `error`, unless it was stopped or committed before: then gives `error` back.
    pub(crate) fn stop(&self, error: Error) -> Option<Error> {
        self.end(error, |phase| (phase == Phase::Running).then_some(Phase::Stopped))
    }

    fn end(&self, error: Error, next: impl FnOnce(Phase) -> Option<Phase>) -> Option<Error> {
        let mut state = lock(&self.state);
        let Some(next) = next(state.phase) else {
            drop(state);
            tracing::debug!(%error, "after the end");
            return Some(error);
        };
        state.phase = next;
        state.first = Some(error);
        let stoppers = std::mem::take(&mut state.stoppers);
        drop(state);
        stoppers.values().for_each(|stopper| stop_one(&**stopper));
        None
    }

    /// Has `stopper` stopped together with the migration; at once, if that has already happened; never, if nothing stops
    /// the migration any more.
    pub(crate) fn register(&self, stopper: Box<dyn Stopper>) {
        self.add(stopper);
    }

    /// The same until the registration is dropped: for what comes and goes any number of times in one migration.
    pub(crate) fn register_for_now(&self, stopper: Box<dyn Stopper>) -> Registration {
        Registration { handle: self.clone(), number: self.add(stopper) }
    }

    fn add(&self, stopper: Box<dyn Stopper>) -> u64 {
        let mut state = lock(&self.state);
        let number = state.next;
        state.next += 1;
        match state.phase {
            Phase::Running | Phase::Committed => {
                state.stoppers.insert(number, stopper);
            }
            Phase::Stopped | Phase::Interrupted => {
                drop(state);
                stop_one(&*stopper);
            }
            Phase::Decided => {}
        }
        number
    }

    /// From now on errors of threads no longer stop the migration, and a cancel only ends the wait for the answer.
    ///
    /// # Errors
    /// [`Error::Stopped`] if it was stopped before.
    pub(crate) fn commit(&self) -> Result<(), Error> {
        let mut state = lock(&self.state);
        match state.phase {
            Phase::Running => state.phase = Phase::Committed,
            Phase::Stopped => return Err(Error::Stopped),
            Phase::Committed | Phase::Interrupted | Phase::Decided => {}
        }
        Ok(())
    }

    /// From now on nothing stops the migration: it was decided, or is over. Forgets what was registered.
    ///
    /// # Errors
    /// [`Error::Stopped`] if it was stopped before.
    pub(crate) fn decide(&self) -> Result<(), Error> {
        let mut state = lock(&self.state);
        let stopped = state.phase == Phase::Stopped;
        if !stopped {
            state.phase = Phase::Decided;
        }
        // They have connections, and what the migration shares, which may have this handle: none would ever be released.
        let stoppers = std::mem::take(&mut state.stoppers);
        drop(state);
        drop(stoppers);
        if stopped { Err(Error::Stopped) } else { Ok(()) }
    }

    /// Whether it was [decided](Self::decide) that nothing stops the migration any more.
    pub(crate) fn is_decided(&self) -> bool {
        lock(&self.state).phase == Phase::Decided
    }

    /// Whether the migration was stopped.
    pub fn is_stopped(&self) -> bool {
        lock(&self.state).phase == Phase::Stopped
    }

    /// What the error says that stopped the migration, or interrupted its end, until it is taken.
    pub(crate) fn reason(&self) -> Option<String> {
        lock(&self.state).first.as_ref().map(Error::to_string)
    }

    /// The error that stopped the migration, or interrupted its end, for the thread that reports it. All others get
    /// [`Error::Stopped`].
    pub(crate) fn take_first(&self) -> Option<Error> {
        lock(&self.state).first.take()
    }
}

impl Default for StopHandle {
    fn default() -> StopHandle {
        StopHandle::new()
    }
}

/// Stops what `stopper` stops, which may be of a transport of the VMM's own: a panic of one must not keep the others from being stopped,
/// nor end the watchdog.
pub(crate) fn stop_one(stopper: &dyn Stopper) {
    let stopped = caught(|| {
        stopper.stop();
        Ok(())
    });
    if let Err(error) = stopped {
        tracing::error!(%error, "while a connection was ended");
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
    fn an_error_after_the_commit_stops_nothing_and_a_cancel_ends_the_wait() {
        let (handle, count) = (StopHandle::new(), Arc::new(AtomicUsize::new(0)));
        handle.register(Box::new(Count(count.clone())));
        handle.commit().unwrap();
        assert!(handle.stop(Error::Unconfirmed).is_some());
        assert_eq!(count.load(Relaxed), 0);
        handle.cancel();
        assert_eq!(count.load(Relaxed), 1);
        assert!(!handle.is_stopped(), "the VM may be the destination's");
        assert!(matches!(handle.take_first(), Some(Error::Cancelled)));
        handle.register(Box::new(Count(count.clone())));
        assert_eq!(count.load(Relaxed), 2, "too late is stopped at once");
    }

    /// The others were never stopped, and their threads waited without an end.
    #[test]
    fn a_stopper_that_panics_does_not_keep_the_others_from_being_stopped() {
        struct Panics;
        impl Stopper for Panics {
            fn stop(&self) {
                panic!("a defect of the transport");
            }
        }
        let (handle, count) = (StopHandle::new(), Arc::new(AtomicUsize::new(0)));
        handle.register(Box::new(Panics));
        handle.register(Box::new(Count(count.clone())));
        handle.cancel();
        assert_eq!(count.load(Relaxed), 1);
        handle.register(Box::new(Panics));
        assert!(matches!(handle.take_first(), Some(Error::Cancelled)));
    }

    /// A stopper for each connection of a stranger was kept until the end, which a peer could put off.
    #[test]
    fn a_registration_that_is_dropped_is_forgotten_and_not_stopped() {
        let (handle, count) = (StopHandle::new(), Arc::new(AtomicUsize::new(0)));
        let now = handle.register_for_now(Box::new(Count(count.clone())));
        for _ in 0..10 {
            drop(handle.register_for_now(Box::new(Count(count.clone()))));
        }
        assert_eq!(Arc::strong_count(&count), 2, "none but the one that is held");
        handle.cancel();
        assert_eq!(count.load(Relaxed), 1);
        drop(now);
        drop(handle.register_for_now(Box::new(Count(count.clone()))));
        assert_eq!(count.load(Relaxed), 2, "too late is stopped at once");
    }

    #[test]
    fn nothing_stops_what_was_decided() {
        let (handle, count) = (StopHandle::new(), Arc::new(AtomicUsize::new(0)));
        handle.register(Box::new(Count(count.clone())));
        handle.decide().unwrap();
        handle.cancel();
        assert_eq!(count.load(Relaxed), 0);
        assert!(!handle.is_stopped());
        // Found by a leak checker: every destination that took a VM over kept its connections forever.
        handle.register(Box::new(Count(count.clone())));
        assert_eq!(Arc::strong_count(&count), 1, "what cannot be stopped any more is not kept");
    }
}
