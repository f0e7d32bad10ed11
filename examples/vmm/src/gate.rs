//! Where the threads of the VM wait while it is paused: vCPUs and the DMA device.

use std::{
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// Opens to let all of them run, closes to pause them, and knows when all of them are.
#[derive(Default)]
pub struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    open: bool,
    ended: bool,
    threads: usize,
    waiting: usize,
}

impl Gate {
    /// Counts one more thread, which is going to call [`pass`](Self::pass).
    pub fn add_thread(&self) {
        self.lock().threads += 1;
    }

    /// The thread that calls this will not come again.
    pub fn leave(&self) {
        self.lock().threads -= 1;
        self.changed.notify_all();
    }

    /// Whether the thread may go on at once.
    pub fn is_open(&self) -> bool {
        let state = self.lock();
        state.open && !state.ended
    }

    /// Waits until the gate is open. `false` when the VM ends.
    pub fn pass(&self) -> bool {
        let mut state = self.lock();
        state.waiting += 1;
        self.changed.notify_all();
        while !state.open && !state.ended {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.waiting -= 1;
        !state.ended
    }

    /// Lets all threads run.
    pub fn open(&self) {
        self.lock().open = true;
        self.changed.notify_all();
    }

    /// Pauses all threads: when it returns, each of them waits. `kick` makes a vCPU leave the guest. It is called again and
    /// again: a signal that comes just before the guest is entered is lost.
    pub fn close(&self, kick: impl Fn()) {
        self.lock().open = false;
        self.await_threads(kick, |state| state.waiting == state.threads);
    }

    /// Ends all threads.
    pub fn end(&self, kick: impl Fn()) {
        self.lock().ended = true;
        self.changed.notify_all();
        self.await_threads(kick, |state| state.threads == 0);
    }

    fn await_threads(&self, kick: impl Fn(), reached: impl Fn(&State) -> bool) {
        let mut state = self.lock();
        while !reached(&state) {
            kick();
            let waited = self.changed.wait_timeout(state, Duration::from_millis(1));
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
