//! What the end of a channel means for its migration.
//!
//! A channel ends in many ways and at any moment, on both sides. Its thread says how ([`End`]) and how far it had come
//! ([`Reached`]), and [`meaning`] says what follows from that. Nothing else decides it.
//!
//! A channel counts from its first SYNC on: with it a destination lets the channel join, and a source sends none before it knows
//! that the destination's host has what the channel said first. So a connection that ends before can be replaced by
//! another one without harm: it is not counted twice, and none is lost. From then on the pages of a round may be on it, and
//! no other connection can take its place, until all rounds are over and have arrived. What an end means once the source has
//! switched to postcopy is [`meaning_after_switch`](crate::postcopy::meaning_after_switch)'s to say.

/// How far a channel has come when it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reached {
    /// It takes no part: at a source, the destination's host is not known to have anything of it; at a destination, it has not joined.
    Nothing {
        /// There is still time for another connection in its place.
        in_time: bool,
    },
    /// It takes part, and brings pages of a round or may have to bring some of the next.
    Rounds,
    /// It has passed the last SYNC, and so has main: all that it had to bring is there.
    LastSync,
    /// This side has decided who has the VM: what a channel does makes no difference any more.
    Decided,
}

/// How a channel ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum End {
    /// In order, between two packets.
    Clean,
    /// In the middle of a packet.
    Cut,
    /// Its connection was reset, between two packets.
    Reset,
    /// The peer was not reached, or not in time.
    Unreachable,
    /// The peer broke a rule.
    Violation,
    /// The peer said that it cannot go on.
    Refused,
    /// This side could not go on.
    Local,
    /// The migration has ended before: this is a consequence.
    Stopped,
}

/// What follows from the end of a channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Meaning {
    /// The migration ends, with the reason of this end unless there was one before.
    Fatal,
    /// The channel has done its part. Where another round needs it all the same, the account of [rounds](crate::rounds) says so.
    Finished,
    /// Another connection may take its place.
    Replace,
}

/// What it means that a channel which has come as far as `reached` ends like this.
pub const fn meaning(reached: Reached, end: End) -> Meaning {
    match (reached, end) {
        (_, End::Stopped) | (Reached::Decided, _) => Meaning::Finished,
        (_, End::Violation | End::Refused | End::Local) => Meaning::Fatal,
        (Reached::Nothing { in_time: true }, End::Clean | End::Cut | End::Reset) => Meaning::Replace,
        (Reached::Nothing { .. }, _) => Meaning::Fatal,
        (_, End::Clean) | (Reached::LastSync, End::Reset | End::Unreachable) => Meaning::Finished,
        (Reached::Rounds, End::Cut | End::Reset | End::Unreachable) => Meaning::Fatal,
        // The beginning of something that may not follow.
        (Reached::LastSync, End::Cut) => Meaning::Fatal,
    }
}

#[cfg(test)]
mod tests {
    use super::{End::*, Meaning::*, Reached::*, *};

    #[test]
    fn every_end_at_every_stage_has_its_meaning() {
        let ends = [Clean, Cut, Reset, Unreachable, Violation, Refused, Local, Stopped];
        let table = [
            (Nothing { in_time: true }, [Replace, Replace, Replace, Fatal, Fatal, Fatal, Fatal, Finished]),
            (Nothing { in_time: false }, [Fatal, Fatal, Fatal, Fatal, Fatal, Fatal, Fatal, Finished]),
            (Rounds, [Finished, Fatal, Fatal, Fatal, Fatal, Fatal, Fatal, Finished]),
            (LastSync, [Finished, Fatal, Finished, Finished, Fatal, Fatal, Fatal, Finished]),
            (Decided, [Finished; 8]),
        ];
        for (reached, meanings) in table {
            assert_eq!(ends.map(|end| meaning(reached, end)), meanings, "{reached:?}");
        }
    }

    /// It may have pages that are on no other connection.
    #[test]
    fn a_channel_that_takes_part_is_never_replaced() {
        for reached in [Rounds, LastSync, Decided] {
            for end in [Clean, Cut, Reset, Unreachable, Violation, Refused, Local, Stopped] {
                assert_ne!(meaning(reached, end), Replace, "{reached:?}, {end:?}");
            }
        }
    }
}
