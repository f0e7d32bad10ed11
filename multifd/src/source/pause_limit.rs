//! Bounds the pause of the guest.
//!
//! When the limit has passed, the migration is stopped: until GO is written the guest resumes, after it the outcome is in
//! doubt. The limit may be changed at any moment, also while the guest is paused.

use std::time::{Duration, Instant};

use crate::{
    error::Error,
    stop::StopHandle,
    sync::{Arc, Mutex, lock},
    watchdog::Timers,
};

/// The limit of one migration's pause. Clones are the same limit.
#[derive(Clone)]
pub(super) struct PauseLimit {
    state: Arc<Mutex<State>>,
    stop: StopHandle,
}

struct State {
    /// `None` for no limit.
    limit: Option<Duration>,
    /// Set while the guest is paused.
    paused: Option<(Instant, Timers)>,
}

impl PauseLimit {
    pub(super) fn new(limit: Option<Duration>, stop: StopHandle) -> PauseLimit {
        PauseLimit { state: Arc::new(Mutex::new(State { limit, paused: None })), stop }
    }

    /// The guest is paused from now on.
    pub(super) fn begin(&self, timers: &Timers) {
        let mut state = lock(&self.state);
        state.paused = Some((Instant::now(), timers.clone()));
        self.arm(&state);
    }

    /// The guest is no longer paused by this migration.
    pub(super) fn end(&self) {
        if let Some((_, timers)) = lock(&self.state).paused.take() {
            timers.clear(TIMER);
        }
    }

    /// Changes the limit; `None` for none.
    pub(super) fn set(&self, limit: Option<Duration>) {
        let mut state = lock(&self.state);
        state.limit = limit;
        self.arm(&state);
    }

    fn arm(&self, state: &State) {
        let Some((since, timers)) = &state.paused else { return };
        let Some(limit) = state.limit else { return timers.clear(TIMER) };
        let stop = self.stop.clone();
        timers.set(TIMER, limit.saturating_sub(since.elapsed()), move || {
            stop.interrupt(Error::PauseLimit { limit });
            None
        });
    }
}

const TIMER: &str = "pause";
