//! What a destination is told before it begins.

use std::time::Duration;

use multifd_proto::{extension::Extensions, packet::Compression};

use super::FirstTouch;
use crate::{
    clock::Clock,
    round::trace::Trace,
    sync::Arc,
    threads::{StdThreads, Threads},
};

/// How to receive. Everything that the stream tells is found out unless it is required here.
///
/// Made by [`Options::default`] and changed field by field.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Options {
    /// How many channels there have to be; `None` for as many as the source has. That is what it says, or what the numbers
    /// of its packets prove; a source of which neither is true needs the number here, and fails without it.
    pub channels: Option<u8>,
    /// How page contents have to be compressed; `None` for whatever each packet says.
    pub compression: Option<Compression>,
    /// How memory that was never touched gets its first content.
    pub first_touch: FirstTouch,
    /// The machine type that the source has to run.
    pub machine: Option<String>,
    /// The UUID that the source's channels have to name; `None` for any, the same on all channels.
    pub uuid: Option<[u8; 16]>,
    /// A secret of this migration that the source's channels have to name in place of the UUID: a connection without it is a
    /// stranger's. The source is given the same one. Not with a QEMU, which does not know of it.
    pub token: Option<[u8; 16]>,
    /// Whether to tell the source that it may switch over whenever it likes.
    pub switchover_ack: SwitchoverAck,
    /// How long a connection may take to say what it is, and main waits at a sync point for channels that have not come.
    pub setup_timeout: Option<Duration>,
    /// How many connections may be there that have not said what they are; the oldest makes room for the newest. At least one.
    /// One that came less than 3 seconds ago stays, as long as there are at most 272: a source may open all of its own at once.
    pub max_unidentified: usize,
    /// How long the source may send fewer than 4 KiB on all connections once it is there; `None` for no limit.
    pub stall_limit: Option<Duration>,
    /// How long to wait for a source that has switched to postcopy and lost its connections, until it goes on over new ones; zero
    /// to fail at once. The wait begins again when a page has come since. Such a connection names no [`token`](Self::token), so with
    /// one there is no wait.
    pub recover_limit: Duration,
    /// What to agree on with a source of ours, of what it offers.
    pub extensions: Extensions,
    /// How long the source may take to close main after it was told that the VM is ours.
    pub close_timeout: Duration,
    /// Remember the round of every page's last write and [report](super::Report::audit) writes from an older one: four
    /// bytes for each page, and an atomic operation for each that arrives.
    pub audit: bool,
    /// Where time comes from.
    pub clock: Clock,
    /// How threads are made.
    pub threads: Arc<dyn Threads>,
    /// Who is told of each step.
    pub(crate) trace: Trace,
    /// A defect to be caught.
    #[cfg(any(test, feature = "__broken-variants"))]
    pub(crate) broken: Option<crate::testing::broken::Broken>,
}

impl Default for Options {
    /// Takes what comes; 30 seconds for the set-up, 64 connections that have not said what they are, two minutes of silence, no wait for a
    /// recovery, and 5 seconds for the connections to end.
    fn default() -> Options {
        Options {
            channels: None,
            compression: None,
            first_touch: FirstTouch::Auto,
            machine: None,
            uuid: None,
            token: None,
            switchover_ack: SwitchoverAck::Auto,
            setup_timeout: Some(Duration::from_secs(30)),
            max_unidentified: 64,
            stall_limit: Some(Duration::from_secs(120)),
            recover_limit: Duration::ZERO,
            extensions: Extensions::known(),
            close_timeout: Duration::from_secs(5),
            audit: false,
            clock: Clock::monotonic(),
            threads: Arc::new(StdThreads),
            trace: Trace::default(),
            #[cfg(any(test, feature = "__broken-variants"))]
            broken: None,
        }
    }
}

/// Whether to tell the source that it may switch over, once it has opened the return path.
///
/// A QEMU with the capability `switchover-ack` and a machine type before 11.1 never ends the migration without it. A QEMU
/// before 8.1, and any with a machine type of 11.1 or newer, fails the migration when it comes unasked. Nothing in the stream
/// says whether the capability is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SwitchoverAck {
    /// At once if the machine type is 8.1 to 11.0, where it does no harm. For older machine types, and those whose name has
    /// no version, once the source shows that it waits: it goes on without any page left to send. Never from 11.1 on.
    Auto,
    /// Never.
    Never,
    /// As soon as the return path is open.
    Always,
}
