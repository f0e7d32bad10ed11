//! What the VMM wants of the switchover: now, or not yet.
//!
//! The decision is taken by one thread, under the same lock as a wish is made: a hold comes before it or is told that it
//! comes too late.

use std::time::Duration;

use super::convergence::{Decision, Wish};

use crate::{sync::Deadline, transport::Stopper, watched::Watched};

/// The wishes for one migration. Clones are the same.
#[derive(Clone, Default)]
pub(super) struct Steering {
    state: Watched<State>,
}

#[derive(Default)]
struct State {
    wish: Wish,
    /// It was decided to switch over: a wish comes too late.
    decided: bool,
}

impl Steering {
    pub(super) fn switch_over(&self) {
        self.state.update(|state| state.wish.switch_over = true);
    }

    /// Whether it comes in time.
    pub(super) fn hold(&self, hold: bool) -> bool {
        self.state.update(|state| {
            state.wish.hold = hold;
            !state.decided
        })
    }

    /// What is wished at this moment.
    pub(super) fn wish(&self) -> Wish {
        self.state.look(|state| state.wish)
    }

    /// Lets `decide` decide by the wishes, of which no other is taken once it has decided to switch over.
    pub(super) fn decide(&self, decide: impl FnOnce(Wish) -> Decision) -> Decision {
        self.state.update(|state| {
            let decision = decide(state.wish);
            state.decided |= decision == Decision::SwitchOver;
            decision
        })
    }

    /// Waits until the switchover is no longer held, the next round is due, or the migration has ended.
    pub(super) fn wait_while_held(&self) {
        let _ = self.state.wait(Deadline::after(Some(HELD_ROUND)), |state| (!state.wish.hold).then_some(()));
    }

    /// What ends a wait when the migration does.
    pub(super) fn stopper(&self) -> Box<dyn Stopper> {
        Box::new(self.state.clone())
    }
}

/// Between two rounds of a migration that only waits for its switchover. Each sends what was written meanwhile, and shows both
/// sides that the other is there: more than the 4 KiB in a second that the limits of silence ask for.
const HELD_ROUND: Duration = Duration::from_millis(100);
