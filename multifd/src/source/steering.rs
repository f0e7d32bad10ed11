//! What the VMM wants of the switchover: now, or not yet.
//!
//! The decision is taken by one thread, under the same lock as a wish is made: a hold comes before it or is told that it
//! comes too late.

use std::time::Duration;

use multifd_proto::convergence::{Decision, Wish};

use crate::{
    sync::{Arc, Condvar, Deadline, Mutex, lock, wait_for},
    transport::Stopper,
};

/// The wishes for one migration. Clones are the same.
#[derive(Clone, Default)]
pub(super) struct Steering {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    wish: Wish,
    /// It was decided to switch over: a wish comes too late.
    decided: bool,
    stopped: bool,
}

impl Steering {
    pub(super) fn switch_over(&self) {
        lock(&self.shared.state).wish.switch_over = true;
        self.shared.changed.notify_all();
    }

    /// Whether it comes in time.
    pub(super) fn hold(&self, hold: bool) -> bool {
        let mut state = lock(&self.shared.state);
        state.wish.hold = hold;
        let in_time = !state.decided;
        drop(state);
        self.shared.changed.notify_all();
        in_time
    }

    /// What is wished at this moment.
    pub(super) fn wish(&self) -> Wish {
        lock(&self.shared.state).wish
    }

    /// Lets `decide` decide by the wishes, of which no other is taken once it has decided to switch over.
    pub(super) fn decide(&self, decide: impl FnOnce(Wish) -> Decision) -> Decision {
        let mut state = lock(&self.shared.state);
        let decision = decide(state.wish);
        state.decided |= decision == Decision::SwitchOver;
        decision
    }

    /// Waits until the switchover is no longer held, or the next round is due.
    pub(super) fn wait_while_held(&self) {
        let deadline = Deadline::after(Some(HELD_ROUND));
        let mut state = lock(&self.shared.state);
        while state.wish.hold && !state.stopped && !deadline.is_over() {
            state = wait_for(&self.shared.changed, state, deadline.left());
        }
    }
}

/// The migration has ended: nothing is held any more.
impl Stopper for Steering {
    fn stop(&self) {
        lock(&self.shared.state).stopped = true;
        self.shared.changed.notify_all();
    }
}

/// Between two rounds of a migration that only waits for its switchover. Each sends what was written meanwhile, and shows both
/// sides that the other is there: more than the 4 KiB in a second that the limits of silence ask for.
const HELD_ROUND: Duration = Duration::from_millis(100);
