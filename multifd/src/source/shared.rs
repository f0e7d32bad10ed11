//! What all threads of one source share.

use super::{Live, Options, backlog::Backlog, openings::Openings, spread::Spread, state_queue::StateQueue};
use crate::{
    dirty_bitmap::DirtyBitmap,
    progress::Progress,
    pulse::Pulse,
    ram::Ram,
    round::{barrier::RoundBarrier, scan::PageScan},
    stop::StopHandle,
    sync::{Arc, Mutex, atomic::AtomicBool},
    transport::ZeroCopyCounters,
};

/// What all threads of one source share.
pub(super) struct Shared {
    pub(super) ram: Ram,
    /// One page of zeros, to send a page that is zero without reading it.
    pub(super) zero_page: Ram,
    pub(super) scan: PageScan,
    pub(super) barrier: RoundBarrier,
    pub(super) live: Live,
    pub(super) progress: Progress,
    /// What all connections moved; by it the migration notices that the destination is silent.
    pub(super) pulse: Pulse,
    /// What the connections hold of what was sent.
    pub(super) backlog: Backlog,
    /// What channels report until all are open.
    pub(super) openings: Openings,
    pub(super) stop: StopHandle,
    pub(super) options: Options,
    /// Zero pages that channels found and main has to name, in legacy mode.
    pub(super) legacy_zeros: Mutex<Option<DirtyBitmap>>,
    /// Counts what is sent without a copy, where that was asked for; and why it is not possible, if so.
    pub(super) zero_copy: Option<Arc<ZeroCopyCounters>>,
    pub(super) copies_because: Mutex<Option<String>>,
    /// No section follows; read by channels after the barrier has opened, which orders it.
    pub(super) finished: AtomicBool,
    /// The section that opens next is the last one; read by channels after the barrier has opened, which orders it.
    pub(super) last_section: AtomicBool,
    /// Device state that channels send once there are no more sections.
    pub(super) state: StateQueue,
    /// Which channels take pages.
    pub(super) spread: Spread,
}
