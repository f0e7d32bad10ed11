//! What the VMM wants of the switchover: now, or not yet.
//!
//! The decision is taken by one thread, under the same lock as a wish is made: a hold comes before it or is told that it
//! comes too late.

use std::time::Duration;

use super::convergence::{Decision, Wish};

use crate::{pulse::LEAST, sync::Deadline, transport::Stopper, watched::Watched};

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

    /// Waits until the switchover is no longer held, the next round is due in `round`, or the migration has ended.
    pub(super) fn wait_while_held(&self, round: Duration) {
        let _ = self.state.wait(Deadline::after(Some(round)), |state| (!state.wish.hold).then_some(()));
    }

    /// What ends a wait when the migration does.
    pub(super) fn stopper(&self) -> Box<dyn Stopper> {
        Box::new(self.state.clone())
    }
}

/// How long a migration rests between two rounds while it waits for its switchover, or for state. Each round sends what was written
/// meanwhile, and shows both sides that the other is there: twice the bytes that `stall_limit` asks for, also where nothing was written.
/// `least` is what a round sends at least: [`EMPTY_SECTION`] on main alone, and with channels a SYNC packet.
pub(super) fn rest_between_rounds(least: u64, stall_limit: Option<Duration>) -> Duration {
    let rounds = u32::try_from(2 * LEAST.div_ceil(least)).expect("a few hundred");
    stall_limit.map_or(LONGEST_REST, |limit| (limit / rounds).clamp(SHORTEST_REST, LONGEST_REST))
}

/// Bytes of a section in which nothing is sent on main: its head, its end, and its footer.
pub(super) const EMPTY_SECTION: u64 = 18;
const LONGEST_REST: Duration = Duration::from_millis(100);
/// However short the limit is.
const SHORTEST_REST: Duration = Duration::from_millis(1);

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    /// Without channels a held migration sent 180 bytes in a second, which were silence where the limit was shorter than 23 s.
    #[test]
    fn rounds_of_a_migration_that_waits_are_no_silence() {
        let millis = Duration::from_millis;
        // SYNC packets of pages of 64 and of 4 KiB.
        for bytes in [EMPTY_SECTION, 384, 1344] {
            for limit in [millis(600), millis(2000), millis(120_000)] {
                let rounds = limit.as_nanos() / rest_between_rounds(bytes, Some(limit)).as_nanos();
                assert!(rounds as u64 * bytes >= 2 * LEAST, "{limit:?}, {bytes}");
            }
        }
        for limit in [None, Some(millis(120_000))] {
            assert_eq!(rest_between_rounds(EMPTY_SECTION, limit), LONGEST_REST);
        }
        assert_eq!(rest_between_rounds(EMPTY_SECTION, Some(Duration::ZERO)), SHORTEST_REST);
    }
}
