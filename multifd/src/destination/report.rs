//! What a finished migration was like, as the destination saw it.

use std::time::Duration;

use multifd_proto::{BlockName, machine::Dialect, packet::Compression};

use super::FreshMemory;
use crate::progress::{Progress, RoundStats};
use crate::round::audit::Findings;

/// How the state of the VM came, which says from when it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Mode {
    /// Rounds while the guest ran, and the rest while it was paused: the state is that of the switchover.
    #[default]
    Live,
    /// A background snapshot: the state is that of the start, and the guest runs on at the source.
    Snapshot,
    /// Rounds while the guest ran, then the devices, then what was missing: the state is that of the switch.
    Postcopy,
}

/// The figures of one migration.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Report {
    /// From the first byte of main until the VM ran.
    pub total: Duration,
    /// From the first byte of main until the first round began.
    pub setup: Duration,
    /// From the source's word that its guest is paused until the VM ran; `None` for a background snapshot, whose guest
    /// runs on.
    pub downtime: Option<Duration>,
    /// How long the call of [`DestinationVm::start`](crate::vm::DestinationVm::start) took: a part of the downtime, and with a
    /// source of ours of its [`confirm`](crate::source::Downtime::confirm).
    pub start: Duration,
    /// How the state came.
    pub mode: Mode,
    /// The source's machine type.
    pub machine: String,
    /// The VM's UUID, where the source validates it.
    pub uuid: Option<[u8; 16]>,
    /// RAM blocks with their lengths in bytes, as the source listed them.
    pub blocks: Vec<(BlockName, u64)>,
    /// Those of them whose memory did not come: it is in files that both sides map. Only a
    /// [checkpoint](crate::checkpoint::Checkpoint) is taken without a part of the memory.
    pub memory_elsewhere: Vec<BlockName>,
    /// Channels beside main.
    pub channels: usize,
    /// How page contents were compressed; nothing where none came on a channel.
    pub compression: Option<Compression>,
    /// Where rounds ended on main.
    pub dialect: Option<Dialect>,
    /// What came between two sync points after the set-up, the first and the last 500: rounds in the per-round dialect,
    /// with the source's numbers, sections in the other.
    pub rounds: Vec<RoundStats>,
    /// How many there were.
    pub rounds_total: u64,
    /// How long all of them took together.
    pub rounds_took: Duration,
    /// Pages received with content.
    pub normal: u64,
    /// Pages received as zeros.
    pub zero: u64,
    /// Bytes of memory that the source has handed over.
    pub handed_over: u64,
    /// How memory that was never touched got its content, and why so, by block, where there was a choice.
    pub fresh_memory: Vec<FreshMemory>,
    /// How often the source went on over new connections, after it had switched to postcopy.
    pub recoveries: u64,
    /// What the audit found, where [`Options::audit`](super::Options::audit) asked for it.
    pub audit: Option<Findings>,
    /// Bytes on main.
    pub main_bytes: u64,
    /// Bytes on each channel, by id.
    pub channel_bytes: Vec<u64>,
}

impl Report {
    pub(super) fn finish(&mut self, progress: &Progress, total: Duration) {
        let snapshot = progress.snapshot();
        self.total = total;
        self.normal = snapshot.normal;
        self.zero = snapshot.zero;
        self.main_bytes = snapshot.main_bytes;
        self.channel_bytes = progress.channel_bytes(self.channels);
    }
}
