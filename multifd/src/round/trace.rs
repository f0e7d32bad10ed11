//! The steps of the protocol as they happen, for a checker that knows the machine of the proofs (`proof/round_law.py`), and those of
//! a postcopy for another one.
//!
//! Each has the name that it has there. In test builds they are recorded; elsewhere nothing is left of it.

use multifd_proto::rounds::Party;

use super::device_trace::DeviceStep;
use crate::postcopy::trace::HandOver;

/// One step. Pages are numbers of the layout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Source main opens a round with these pages.
    Drain(Vec<u64>),
    /// Source main opens a section with what the last one left.
    Section,
    /// A channel takes pages.
    Take(Party, Vec<u64>),
    /// It writes copies of them.
    Send(Party, Vec<u64>),
    /// It finds them zero, and leaves them to main.
    Find(Party, Vec<u64>),
    /// Main names zero pages.
    Name(Vec<u64>),
    /// A channel writes SYNC.
    Sync(Party),
    /// Main writes what ends a round.
    Flush,
    /// Main writes the end of the stream.
    End,
    /// The destination puts copies from a connection into place.
    Apply(Party, Vec<u64>),
    /// A connection has read its SYNC, or main what ends a round.
    Arrive(Party),
    /// The destination takes a packet of device state from a channel.
    State(Party),
    /// The destination starts the guest.
    Start,
    /// One of the device-state law.
    Device(DeviceStep),
    /// One of the hand-over law, which is none of the rounds'.
    HandOver(HandOver),
}

#[cfg(any(test, feature = "__fuzzing"))]
pub(crate) use crate::testing::trace::Trace;

/// Takes steps, and forgets them.
#[cfg(not(any(test, feature = "__fuzzing")))]
#[derive(Clone, Debug, Default)]
pub(crate) struct Trace(());

#[cfg(not(any(test, feature = "__fuzzing")))]
impl Trace {
    /// Does nothing.
    #[inline(always)]
    pub(crate) fn step(&self, _: impl FnOnce() -> Step) {}
}
