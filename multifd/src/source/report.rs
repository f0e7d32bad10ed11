//! What a finished migration was like, as the source saw it.

use std::time::Duration;

use multifd_proto::{machine::Dialect, packet::Compression};

use super::{ChannelCompression, Options};
use crate::{
    layout::Layout,
    progress::{Progress, RoundStats},
    transport::ZeroCopyCounters,
};

/// The figures of one migration.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Report {
    /// From the first connect to the destination's confirmation.
    pub total: Duration,
    /// From the first connect until the destination knew all RAM blocks.
    pub setup: Duration,
    /// How long the guest was paused, and why.
    pub downtime: Downtime,
    /// The first and the last 500 rounds; the very last one with the guest paused.
    pub rounds: Vec<RoundStats>,
    /// How many rounds there were.
    pub rounds_total: u64,
    /// How long all of them took together.
    pub rounds_took: Duration,
    /// Pages sent with content.
    pub normal: u64,
    /// Pages sent as zeros.
    pub zero: u64,
    /// Pages not sent because they were never touched.
    pub skipped: u64,
    /// Pages that were not read because the VM [excluded](crate::vm::SourceVm::excluded) them, at the end.
    pub excluded: u64,
    /// Bytes of device state that were sent while the guest ran.
    pub live_state: u64,
    /// Bytes of memory that was handed over.
    pub handed_over: u64,
    /// Bytes of RAM.
    pub ram_bytes: u64,
    /// Bytes in a page.
    pub page_size: usize,
    /// Bytes on main.
    pub main_bytes: u64,
    /// Bytes on each channel, by id.
    pub channel_bytes: Vec<u64>,
    /// By how many percent the guest was slowed down in the end.
    pub throttle: u8,
    /// How often the dirty log reported a page that the VM does not have. Such numbers are left out.
    pub dirty_outside: u64,
    /// What tracked the guest's writes.
    pub dirty_log: &'static str,
    /// Where rounds ended on main.
    pub dialect: Dialect,
    /// How page contents were compressed.
    pub compression: Compression,
    /// What each channel made of the choice to compress; empty where it had none.
    pub auto_compression: Vec<ChannelCompression>,
    /// How sending without copies went, where it was asked for.
    pub zero_copy: Option<ZeroCopy>,
}

/// How sending without copies went. A send is one system call with pages of one packet, or with what was left of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ZeroCopy {
    /// Sends that were to do without a copy.
    pub sends: u64,
    /// Those of them that were copied after all: by the kernel, as it always does on loopback, or for lack of room.
    pub copied: u64,
    /// Those of the copied ones for which there was no room: the limit of locked memory, or `net.core.optmem_max`.
    pub no_room: u64,
    /// SYNCs on a channel before which something was copied since its SYNC before.
    pub syncs_with_copies: u64,
    /// Why the connections cannot do it at all, if so.
    pub refused: Option<String>,
}

impl ZeroCopy {
    /// The totals of all channels.
    pub(super) fn count(&mut self, counters: &ZeroCopyCounters) {
        self.copied = counters.copied();
        self.sends = counters.zero_copied() + self.copied;
        self.no_room = counters.no_room();
        self.syncs_with_copies = counters.flushes_with_copies();
    }
}

/// The parts of the downtime, in the order in which they follow each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Downtime {
    /// From the call that paused the guest to the confirmation.
    pub total: Duration,
    /// Pausing vCPUs and devices.
    pub pause: Duration,
    /// Fetching the pages written until then.
    pub drain: Duration,
    /// Sending them, until every channel has sent its SYNC.
    pub last_round: Duration,
    /// Saving and sending device state.
    pub devices: Duration,
    /// Until the destination has loaded it and said so.
    pub confirm: Duration,
}

impl Report {
    pub(super) fn new(options: &Options, layout: &Layout) -> Report {
        Report {
            total: Duration::ZERO,
            setup: Duration::ZERO,
            downtime: Downtime::default(),
            rounds: Vec::new(),
            rounds_total: 0,
            rounds_took: Duration::ZERO,
            normal: 0,
            zero: 0,
            skipped: 0,
            excluded: 0,
            live_state: 0,
            handed_over: 0,
            ram_bytes: layout.bytes(),
            page_size: layout.page_size(),
            main_bytes: 0,
            channel_bytes: vec![0; usize::from(options.plan.channels)],
            throttle: 0,
            dirty_outside: 0,
            dirty_log: "",
            dialect: options.qemu.dialect,
            compression: options.format.compression,
            auto_compression: Vec::new(),
            zero_copy: options.plan.zero_copy.then(ZeroCopy::default),
        }
    }

    pub(super) fn finish(&mut self, progress: &Progress, total: Duration) {
        let snapshot = progress.snapshot();
        self.total = total;
        self.normal = snapshot.normal;
        self.zero = snapshot.zero;
        self.main_bytes = snapshot.main_bytes;
        self.channel_bytes = progress.channel_bytes(self.channel_bytes.len());
    }
}
