//! The inner parts that benches measure by themselves; not part of the interface.

use multifd_proto::{ChannelId, rounds::Party};

use crate::{
    destination::{Filler, FirstTouch},
    dirty_bitmap::DirtyBitmap,
    error::{Connection, Place},
    layout::Layout,
    ram::{GuestRange, Ram},
    round::barrier::RoundBarrier,
    round::scan::{Batch, PageScan},
};

/// The barrier at the end of a round.
#[derive(Clone)]
pub struct Barrier(RoundBarrier);

impl Barrier {
    /// A barrier for main and `channels` channels.
    pub fn new(channels: u8) -> Barrier {
        Barrier(RoundBarrier::new(usize::from(channels)))
    }

    /// Arrives as main and waits for all channels.
    pub fn main(&self) {
        self.0.meet(Party::Main, AT).expect(UNDISTURBED);
    }

    /// Waits as main until all channels have arrived.
    pub fn gather(&self) {
        self.0.gather().expect(UNDISTURBED);
    }

    /// Arrives as a channel and waits for all others.
    pub fn channel(&self, id: u8) {
        self.pass(self.arrive(id));
    }

    /// Arrives as a channel; returns the number of the round.
    pub fn arrive(&self, id: u8) -> u64 {
        self.0.arrive(Party::Channel(ChannelId(id)), AT).expect(UNDISTURBED)
    }

    /// Waits until `round` is over.
    pub fn pass(&self, round: u64) {
        self.0.pass(round).expect(UNDISTURBED);
    }
}

const UNDISTURBED: &str = "nobody stops or leaves";
/// Where nothing goes wrong.
const AT: Place = Place { connection: Connection::Main, offset: 0 };

/// How a destination gets the first content into memory.
pub struct FirstContent(Filler);

impl FirstContent {
    /// Prepares `ram` as `strategy` says.
    pub fn new(strategy: FirstTouch, ram: &Ram) -> FirstContent {
        FirstContent(Filler::new(strategy, ram))
    }

    /// Puts `from`, which has arrived, into `range`, which was never touched.
    ///
    /// # Errors
    /// The kernel's.
    pub fn fill(&self, range: GuestRange<'_>, from: &[u8], page_size: usize) -> std::io::Result<()> {
        self.0.prepare(range);
        self.0.fill(range, from, page_size)
    }
}

/// The scan that hands out the pages of a round.
#[derive(Clone)]
pub struct Scan(PageScan);

/// The pages of one packet.
#[derive(Default)]
pub struct Pages(Batch);

impl Scan {
    /// A scan for batches of up to `capacity` pages.
    pub fn new(layout: Layout, capacity: usize) -> Scan {
        Scan(PageScan::new(layout, capacity, 1))
    }

    /// Opens a round with the pages of `dirty`.
    pub fn open(&self, dirty: &mut DirtyBitmap) {
        self.0.load(dirty);
        self.0.allow(u64::MAX);
    }

    /// How many pages the next batch has; 0 when all were handed out.
    pub fn next(&self, into: &mut Pages) -> usize {
        if self.0.next(&mut into.0) { into.0.pages.len() } else { 0 }
    }
}
