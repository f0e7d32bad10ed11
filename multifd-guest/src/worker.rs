//! The reins of one worker, which is a vCPU or a thread: pause, throttle, write rate, and waiting for it to get somewhere.
//!
//! A worker runs until it has finished as many pages as its budget says, a word that it reads before each page. Then it
//! asks [`Reins::next`], which rests, pauses or raises the budget. Who wants something of it lowers the budget.
//! The budget is written under the lock, so what one side lowered the other does not raise by accident.

use std::{
    sync::{
        Arc, Condvar, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use crate::{
    pace::{Grant, Pacer},
    sys::Mapping,
    view::View,
};

/// Shared by a worker and its guest.
pub(crate) struct Reins {
    state: Mutex<State>,
    changed: Condvar,
    mailbox: Arc<Mapping>,
    budget_at: usize,
}

struct State {
    wanted: Wanted,
    phase: Phase,
    pacer: Pacer,
    /// Somebody waits until so many pages are finished.
    target: Option<u64>,
    /// Pages that were finished when the worker asked last.
    done: u64,
    view: View,
}

#[derive(Clone, Copy, PartialEq)]
enum Wanted {
    Run,
    Pause,
    End,
}

enum Phase {
    Running,
    Paused,
    Ended { why: Option<String> },
}

/// What a worker has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Go on.
    Run,
    /// Bring its state to rest, then call [`Reins::paused`].
    Pause,
    /// Leave.
    End,
}

impl Reins {
    /// For a worker that begins paused, and reads its budget at `budget_at` of `mailbox`.
    pub(crate) fn new(pacer: Pacer, mailbox: Arc<Mapping>, budget_at: usize) -> Reins {
        let state =
            State { wanted: Wanted::Pause, phase: Phase::Running, pacer, target: None, done: 0, view: View::default() };
        Reins { state: Mutex::new(state), changed: Condvar::new(), mailbox, budget_at }
    }

    /// Lets the worker run.
    pub(crate) fn run(&self) {
        self.lock().wanted = Wanted::Run;
        self.changed.notify_all();
    }

    /// Lets a worker run that has come from elsewhere, and watches it for a while.
    pub(crate) fn arrive(&self) {
        let mut state = self.lock();
        state.view.arrives();
        state.wanted = Wanted::Run;
        self.changed.notify_all();
    }

    /// What the worker sees of a migration; `f` is called with it.
    pub(crate) fn view<T>(&self, f: impl FnOnce(&View) -> T) -> T {
        f(&self.lock().view)
    }

    /// Asks the worker to pause; it follows at the latest when it is kicked.
    pub(crate) fn ask_to_pause(&self) {
        self.ask(Wanted::Pause);
    }

    /// Asks the worker to leave its thread.
    pub(crate) fn ask_to_end(&self) {
        self.ask(Wanted::End);
    }

    fn ask(&self, wanted: Wanted) {
        let mut state = self.lock();
        state.wanted = wanted;
        self.budget().store(0, Ordering::Relaxed);
        self.changed.notify_all();
    }

    /// Waits until the worker stands still.
    ///
    /// # Errors
    /// It ended, for the reason given.
    pub(crate) fn wait_paused(&self) -> Result<(), String> {
        let mut state = self.lock();
        loop {
            match &state.phase {
                Phase::Paused => return Ok(()),
                Phase::Ended { why } => return Err(why.clone().unwrap_or_else(|| "it has ended".to_owned())),
                Phase::Running => state = self.wait(state),
            }
        }
    }

    /// Slows the worker down.
    pub(crate) fn throttle(&self, percent: u8) {
        let mut state = self.lock();
        state.pacer.throttle(percent);
        self.budget().store(0, Ordering::Relaxed);
        self.changed.notify_all();
    }

    /// Waits until the worker has finished `pages` pages. Returns whether it has: not if it stands still, ended, or the
    /// time is over.
    pub(crate) fn wait_done(&self, pages: u64, deadline: Instant) -> bool {
        let mut state = self.lock();
        state.target = Some(pages);
        let budget = self.budget();
        budget.store(budget.load(Ordering::Relaxed).min(pages), Ordering::Relaxed);
        loop {
            if state.done >= pages {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || matches!(state.phase, Phase::Ended { .. }) || state.wanted != Wanted::Run {
                state.target = None;
                return false;
            }
            state = self.wait_for(state, left);
        }
    }

    /// Whether the worker stands still.
    pub(crate) fn is_paused(&self) -> bool {
        let state = self.lock();
        matches!(state.phase, Phase::Paused) && state.wanted == Wanted::Pause
    }

    /// Why the worker ended by itself, if it did.
    pub(crate) fn failure(&self) -> Option<String> {
        match &self.lock().phase {
            Phase::Ended { why } => why.clone(),
            _ => None,
        }
    }

    /// The worker's budget: the number of pages at which it has to ask again.
    pub(crate) fn budget(&self) -> &AtomicU64 {
        self.mailbox.word(self.budget_at)
    }

    /// Called by the worker, which has finished `done` pages: returns when there is something to do.
    pub(crate) fn next(&self, done: u64) -> Next {
        let mut state = self.lock();
        state.done = done;
        state.view.asks(done);
        loop {
            match state.wanted {
                Wanted::Run => {}
                Wanted::Pause => return Next::Pause,
                Wanted::End => return Next::End,
            }
            if state.target.is_some_and(|target| target <= done) {
                state.target = None;
                self.changed.notify_all();
            }
            let grant = match state.view.wants_first_page() && !state.pacer.is_idle() {
                // What it sees of the pause ends with this page, not with a rest.
                true => Grant::Until(done + 1),
                false => state.pacer.grant(done, Instant::now()),
            };
            match grant {
                Grant::Until(pages) => {
                    let budget = state.target.map_or(pages, |target| target.min(pages));
                    let budget = state.view.runs(done, budget);
                    self.budget().store(budget, Ordering::Relaxed);
                    return Next::Run;
                }
                Grant::Rest(None) => state = self.wait(state),
                Grant::Rest(Some(time)) => state = self.wait_for(state, time),
            }
        }
    }

    /// Called by the worker when it stands still; returns when it may go on.
    pub(crate) fn paused(&self) {
        let mut state = self.lock();
        state.view.stops();
        state.phase = Phase::Paused;
        self.changed.notify_all();
        while state.wanted == Wanted::Pause {
            state = self.wait(state);
        }
        state.phase = Phase::Running;
        state.pacer.restart();
    }

    /// Called by the worker before it leaves; `why` if nobody asked it to.
    pub(crate) fn ended(&self, why: Option<String>) {
        self.lock().phase = Phase::Ended { why };
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Whoever panicked did not leave the state between two values: each is set by one statement.
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn wait_for<'a>(&self, state: MutexGuard<'a, State>, time: Duration) -> MutexGuard<'a, State> {
        self.changed.wait_timeout(state, time).unwrap_or_else(|poisoned| poisoned.into_inner()).0
    }
}
