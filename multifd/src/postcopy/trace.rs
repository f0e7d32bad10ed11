//! The steps of a postcopy as they happen, for a checker that knows the machine of the proofs (`proof/hand_over_law.py`).
//!
//! They are told to the [`Trace`](crate::round::trace::Trace) of a migration, by its source and by its destination; outside of test
//! builds nothing is left of it.

use crate::error::Connection;

/// One step. Pages are numbers of the layout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum HandOver {
    /// The source sends pages before the switch, and does not have them discarded.
    Final(Vec<u64>),
    /// The destination's last barrier has passed.
    Barrier,
    /// The destination gives up pages.
    Discard(Vec<u64>),
    /// The source is about to write RUN.
    Give,
    /// The destination has read RUN.
    Run,
    /// A thread of the source has set the bits of pages, and is about to send them.
    Send(Via, Vec<u64>),
    /// The destination places a page that came.
    Place(Via, u64),
    /// All connections are given up, and the destination has no thread that places a page of one of them.
    Break,
    /// The destination takes connections again, over which its source may go on.
    Recover,
    /// The source goes on with these bits set.
    Bits(Vec<u64>),
    /// The destination has everything.
    End,
}

/// What a page comes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Via {
    Main,
    Preempt,
}

impl Via {
    pub(crate) fn of(connection: Connection) -> Via {
        match connection {
            Connection::Preempt => Via::Preempt,
            _ => Via::Main,
        }
    }
}
