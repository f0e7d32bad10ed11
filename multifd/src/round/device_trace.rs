//! The steps of device state on its way as they happen, for a checker that knows the machine of the proofs (`proof/device_state_law.py`).
//!
//! They are told to the [`Trace`](super::trace::Trace) of a migration, by its source and by its destination, where the queue and the window
//! are locked: so they are in the order in which they happened. Outside of test builds nothing is left of it.

use multifd_proto::ChannelId;

/// One step. Packets are their numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DeviceStep {
    /// Main numbers a packet and queues it.
    Put(u64),
    /// Main is about to write words about all packets that were queued.
    Tell,
    /// Main says that no packet follows.
    Close,
    /// A channel takes a packet from the queue.
    Take(ChannelId, u64),
    /// It is about to write it.
    Write(ChannelId, u64),
    /// A sending channel ends, which may have taken packets or not.
    Over(ChannelId, Takes),
    /// A channel has read the head of a packet, and there is room for the rest.
    Head(ChannelId, u64),
    /// The rest is there.
    Come(u64),
    /// Main takes it for its device.
    Unpack(u64),
    /// The destination has read the end, and is about to write READY.
    Ready,
    /// The source is about to write GO.
    Go,
}

/// Whether a channel takes packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Takes {
    Packets,
    None,
}
