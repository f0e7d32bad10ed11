//! Ends waits that have a limit: one thread that acts when a moment has come.
//!
//! No wait of the engine has a clock of its own. A wait that may last too long is ended from outside, through the
//! [`StopHandle`] or by ending connections, and the watchdog is what does it in time. Model checkers
//! have no clock: under them no moment ever comes.

use std::time::{Duration, Instant};

use crate::{
    error::Error,
    stop::StopHandle,
    sync::{Arc, Condvar, Mutex, lock},
    threads::{Task, Threads},
};

/// The thread, and what it waits for. Dropping it ends the thread.
pub(crate) struct Watchdog {
    timers: Timers,
    thread: Option<Task<()>>,
}

/// What a [`Watchdog`] waits for. Clones share it.
#[derive(Clone)]
pub(crate) struct Timers {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    timers: Vec<Timer>,
    ended: bool,
}

// Under a model checker no moment ever comes, and nothing is read.
#[cfg_attr(any(loom, shuttle), expect(dead_code))]
struct Timer {
    name: &'static str,
    due: Instant,
    /// Called when the moment has come. Returns how long to wait before the next call, if there is to be one.
    act: Option<Act>,
}

type Act = Box<dyn FnMut() -> Option<Duration> + Send>;

impl Watchdog {
    /// Starts the thread of the migration that `stop` ends.
    ///
    /// # Errors
    /// [`Error::Thread`].
    pub(crate) fn start(threads: &dyn Threads, stop: &StopHandle) -> Result<Watchdog, Error> {
        let shared = Shared { state: Mutex::new(State { timers: Vec::new(), ended: false }), changed: Condvar::new() };
        let timers = Timers { shared: Arc::new(shared) };
        let thread = spawn(timers.clone(), threads, stop)?;
        Ok(Watchdog { timers, thread })
    }

    /// What it waits for.
    pub(crate) fn timers(&self) -> &Timers {
        &self.timers
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        lock(&self.timers.shared.state).ended = true;
        self.timers.shared.changed.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the watchdog's thread panicked");
        }
    }
}

impl Timers {
    /// Has `act` called after `wait`, in place of the timer of this name. `act` must not block.
    pub(crate) fn set(
        &self,
        name: &'static str,
        wait: Duration,
        act: impl FnMut() -> Option<Duration> + Send + 'static,
    ) {
        let mut state = lock(&self.shared.state);
        state.timers.retain(|timer| timer.name != name);
        state.timers.push(Timer { name, due: after(wait), act: Some(Box::new(act)) });
        drop(state);
        self.shared.changed.notify_all();
    }

    /// Forgets the timer of this name.
    pub(crate) fn clear(&self, name: &'static str) {
        lock(&self.shared.state).timers.retain(|timer| timer.name != name);
    }

    #[cfg(not(any(loom, shuttle)))]
    fn run(&self) {
        let mut state = lock(&self.shared.state);
        while !state.ended {
            let now = Instant::now();
            if let Some(timer) = state.timers.iter_mut().find(|timer| timer.act.is_some() && timer.due <= now) {
                let (name, mut act) = (timer.name, timer.act.take().expect("found by it"));
                drop(state);
                let again = act();
                state = lock(&self.shared.state);
                // Unless it was cleared or replaced meanwhile.
                if let Some(timer) = state.timers.iter_mut().find(|timer| timer.name == name && timer.act.is_none()) {
                    match again {
                        Some(wait) => (timer.due, timer.act) = (after(wait), Some(act)),
                        None => state.timers.retain(|timer| timer.name != name),
                    }
                }
                continue;
            }
            let next = state.timers.iter().map(|timer| timer.due).min();
            let left = next.map_or(LONGEST, |due| due.saturating_duration_since(now));
            let waited = self.shared.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(|poisoned| poisoned.into_inner()).0;
        }
    }
}

#[cfg(not(any(loom, shuttle)))]
fn spawn(timers: Timers, threads: &dyn Threads, stop: &StopHandle) -> Result<Option<Task<()>>, Error> {
    Task::spawn(threads, crate::threads::ThreadRole::Watchdog, stop, move || timers.run()).map(Some)
}

#[cfg(any(loom, shuttle))]
fn spawn(_timers: Timers, _threads: &dyn Threads, _stop: &StopHandle) -> Result<Option<Task<()>>, Error> {
    Ok(None)
}

fn after(wait: Duration) -> Instant {
    let now = Instant::now();
    now.checked_add(wait.min(LONGEST)).unwrap_or(now)
}

/// Longer than any migration: what is due later than that never is.
const LONGEST: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use std::sync::mpsc;

    use super::*;
    use crate::threads::StdThreads;

    #[test]
    fn a_timer_acts_when_it_is_due_and_again_as_it_says() {
        let watchdog = Watchdog::start(&StdThreads, &StopHandle::new()).unwrap();
        let (acted, acts) = mpsc::channel();
        let mut left = 3;
        watchdog.timers().set("x", Duration::from_millis(1), move || {
            acted.send(left).unwrap();
            left -= 1;
            (left > 0).then_some(Duration::from_millis(1))
        });
        let all: Vec<_> = (0..4).map_while(|_| acts.recv_timeout(Duration::from_secs(30)).ok()).collect();
        assert_eq!(all, [3, 2, 1]);
    }

    #[test]
    fn a_timer_that_is_replaced_or_cleared_does_not_act() {
        let watchdog = Watchdog::start(&StdThreads, &StopHandle::new()).unwrap();
        let (acted, acts) = mpsc::channel();
        for name in ["replaced", "cleared"] {
            let acted = acted.clone();
            watchdog.timers().set(name, Duration::from_secs(3600), move || {
                acted.send("the first").unwrap();
                None
            });
        }
        watchdog.timers().clear("cleared");
        watchdog.timers().set("replaced", Duration::ZERO, move || {
            acted.send("the second").unwrap();
            None
        });
        assert_eq!(acts.recv_timeout(Duration::from_secs(30)), Ok("the second"));
        drop(watchdog);
        assert!(acts.recv().is_err(), "nothing acts after that");
    }
}
