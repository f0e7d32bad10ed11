//! What the end of a connection means to a destination once the source has switched to postcopy: what [`meaning_after_switch`]
//! says. Nothing else decides it.
//!
//! This is [`channel_end`](crate::channel_end) for what comes after the rounds. A channel is first asked there: its part is over
//! with them. What is fatal to the rounds may be an interruption here: the pages that have come are kept, and the source brings the
//! others over new connections.

use crate::channel_end::End;

/// How far a connection of a destination has come when it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ReachedAfterSwitch {
    /// It takes no part: a preempt connection that has brought no word, or main of a source that asks to go on and has not yet.
    Nothing,
    /// It is main, and the end of the stream has not come.
    Stream,
    /// It is another connection, and pages are missing.
    Pages,
    /// It is another connection than main that has said its last word, or no page is missing.
    Whole,
}

/// What follows for a destination from the end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MeaningAfterSwitch {
    /// The migration ends, with the reason of this end unless there was one before.
    Fatal,
    /// The connection has done its part. Whether a page is missing all the same is seen at the end of the stream.
    Finished,
    /// It is dropped, and another connection may take its place.
    Replace,
    /// All connections are given up, and the source may go on over new ones.
    Interrupted,
}

/// What it means to a destination that a connection which has come as far as `reached` ends like this. `may_go_on`: the package has
/// come, and a source whose connections are lost is waited for.
pub const fn meaning_after_switch(reached: ReachedAfterSwitch, end: End, may_go_on: bool) -> MeaningAfterSwitch {
    use MeaningAfterSwitch as M;
    use ReachedAfterSwitch as R;
    match (reached, end) {
        (_, End::Stopped) => M::Finished,
        // What it does cannot be told from what a stranger does.
        (R::Nothing, _) => M::Replace,
        (_, End::Violation | End::Refused | End::Local) => M::Fatal,
        // Only main has to say that it ends. QEMU ends a preempt connection with a word or without.
        (R::Whole, _) | (R::Pages, End::Clean) => M::Finished,
        (R::Stream | R::Pages, _) if may_go_on => M::Interrupted,
        (R::Stream | R::Pages, _) => M::Fatal,
    }
}

#[cfg(test)]
mod tests {
    use super::{MeaningAfterSwitch::*, ReachedAfterSwitch::*, *};
    use End::{Clean, Cut, Local, Refused, Reset, Stopped, Unreachable, Violation};

    const ENDS: [End; 8] = [Clean, Cut, Reset, Unreachable, Violation, Refused, Local, Stopped];

    #[test]
    fn every_end_after_the_switch_has_its_meaning() {
        let f = Finished;
        let table = [
            (Nothing, [Replace, Replace, Replace, Replace, Replace, Replace, Replace, f]),
            (Stream, [Interrupted, Interrupted, Interrupted, Interrupted, Fatal, Fatal, Fatal, f]),
            (Pages, [f, Interrupted, Interrupted, Interrupted, Fatal, Fatal, Fatal, f]),
            (Whole, [f, f, f, f, Fatal, Fatal, Fatal, f]),
        ];
        for (reached, meanings) in table {
            assert_eq!(ENDS.map(|end| meaning_after_switch(reached, end, true)), meanings, "{reached:?}");
            // Where a source is not waited for, what interrupts is fatal, and nothing else differs.
            let fatal = meanings.map(|meaning| if meaning == Interrupted { Fatal } else { meaning });
            assert_eq!(ENDS.map(|end| meaning_after_switch(reached, end, false)), fatal, "{reached:?}");
        }
    }
}
