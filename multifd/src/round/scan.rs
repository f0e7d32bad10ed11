//! Hands the dirty pages of the open section to whichever channel asks next.
//!
//! Every page of the bitmap passed to [`PageScan::load`] is handed out exactly once, in a [`Batch`] that lies within one
//! RAM block, unless it is [postponed](PageScan::postpone) before: then [`PageScan::take_postponed`] has it, exactly once, too.
//! Channels pull; no thread assigns work. Towards the end of a round batches become smaller, so that the channels share what is left:
//! between hosts each can send only a little at first, and a pause must not wait for the few that got all of it. A section is the part of a round between two sync points: the whole
//! round in the per-round dialect, a number of pages in the per-section one. See `barrier` for how it ends.

use crate::{
    dirty_bitmap::DirtyBitmap,
    layout::Layout,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::Relaxed},
        lock,
    },
};

/// The pages still to be sent in this round. Clones are the same scan.
#[derive(Clone)]
pub(crate) struct PageScan {
    shared: Arc<Shared>,
}

struct Shared {
    layout: Layout,
    /// Most pages in a batch.
    capacity: usize,
    /// How many channels share the pages.
    channels: AtomicUsize,
    state: Mutex<State>,
}

struct State {
    /// Pages not handed out yet.
    dirty: DirtyBitmap,
    /// Pages that were not handed out and are not to be in this round.
    postponed: DirtyBitmap,
    /// Pages that are zeros without looking; empty where nothing is known.
    zeros: Option<DirtyBitmap>,
    /// Below it, nothing is dirty.
    from: u64,
    /// How many pages are in `dirty`.
    left: u64,
    /// Pages that may still be handed out before the next sync point.
    allowed: u64,
    /// Packets of all channels so far: the number of the next one.
    packets: u64,
}

/// The pages that become one packet: at least one, all of one block.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    /// Position of the block in the layout.
    pub(crate) block: usize,
    /// Offsets in bytes within the block, ascending, of pages to be looked at.
    pub(crate) pages: Vec<u64>,
    /// Offsets in bytes of pages that are zeros without looking.
    pub(crate) zeros: Vec<u64>,
}

impl PageScan {
    /// A scan without pages, for batches of up to `capacity` pages of `layout`, which `channels` share.
    pub(crate) fn new(layout: Layout, capacity: usize, channels: usize) -> PageScan {
        let (dirty, postponed) = (DirtyBitmap::new(&layout), DirtyBitmap::new(&layout));
        let state = State { dirty, postponed, zeros: None, from: 0, left: 0, allowed: 0, packets: 0 };
        let channels = AtomicUsize::new(channels.max(1));
        PageScan { shared: Arc::new(Shared { layout, capacity, channels, state: Mutex::new(state) }) }
    }

    /// From now on, so many channels share the pages.
    pub(crate) fn share_among(&self, channels: usize) {
        // Relaxed: it only says how large batches are.
        self.shared.channels.store(channels.max(1), Relaxed);
    }

    /// Swaps the pages of a new round in: `dirty` becomes empty. Returns how many they are.
    ///
    /// Nothing is handed out before [`allow`](Self::allow). The round before is complete.
    pub(crate) fn load(&self, dirty: &mut DirtyBitmap) -> u64 {
        let mut state = lock(&self.shared.state);
        debug_assert!(state.dirty.is_empty(), "the round before was handed out completely");
        debug_assert!(state.postponed.is_empty(), "what it postponed is a part of this one");
        std::mem::swap(&mut state.dirty, dirty);
        state.from = 0;
        state.left = state.dirty.count();
        state.allowed = 0;
        state.left
    }

    /// From now on, pages that are also in `zeros` are handed out as zeros.
    pub(crate) fn set_zeros(&self, zeros: Option<DirtyBitmap>) {
        lock(&self.shared.state).zeros = zeros;
    }

    /// The same of `zeros`, too.
    pub(crate) fn add_zeros(&self, zeros: &DirtyBitmap) {
        match &mut lock(&self.shared.state).zeros {
            Some(known) => known.merge(zeros),
            none => *none = Some(zeros.clone()),
        }
    }

    /// Opens a section: lets `pages` more pages be handed out (batches are not cut short, so it may be some more).
    pub(crate) fn allow(&self, pages: u64) {
        lock(&self.shared.state).allowed = pages;
    }

    /// Fills `batch` with the next pages; `false` where the section has no more.
    pub(crate) fn next(&self, batch: &mut Batch) -> bool {
        batch.pages.clear();
        batch.zeros.clear();
        let Shared { layout, state, .. } = &*self.shared;
        let mut guard = lock(state);
        let state = &mut *guard;
        if state.allowed == 0 {
            return false;
        }
        let Some(first) = state.dirty.next(state.from) else { return false };
        let index = layout.block_of(first).expect("only pages of blocks are set");
        let block = &layout.blocks()[index];
        let most = self.shared.most(state.left);
        state.from = state.dirty.take(first, block.page_range().end, most, &mut batch.pages);
        let taken = batch.pages.len() as u64;
        state.left -= taken;
        state.allowed = state.allowed.saturating_sub(taken);
        batch.block = index;
        if let Some(zeros) = &state.zeros {
            let Batch { pages, zeros: known, .. } = batch;
            pages.retain(|&page| {
                let zero = zeros.contains(page);
                if zero {
                    known.push(page);
                }
                !zero
            });
        }
        drop(guard);
        for page in batch.pages.iter_mut().chain(&mut batch.zeros) {
            *page = block.offset_of(*page);
        }
        true
    }

    /// Takes those of `pages` out of the round that were not handed out so far. Returns how many.
    pub(crate) fn postpone(&self, pages: &DirtyBitmap) -> u64 {
        let mut guard = lock(&self.shared.state);
        let State { dirty, postponed, left, .. } = &mut *guard;
        let moved = dirty.move_chosen(pages, postponed);
        *left -= moved;
        moved
    }

    /// Moves the postponed pages into `next`, the pages of the next round.
    pub(crate) fn take_postponed(&self, next: &mut DirtyBitmap) {
        let mut state = lock(&self.shared.state);
        next.merge(&state.postponed);
        state.postponed.clear();
    }

    /// Returns the number of the packet that the caller is about to send: the numbers of all channels follow each other without gap, which
    /// the destination verifies at each sync point.
    pub(crate) fn packet_number(&self) -> u64 {
        let mut state = lock(&self.shared.state);
        state.packets += 1;
        state.packets - 1
    }

    /// Whether every page of the round was handed out.
    pub(crate) fn is_empty(&self) -> bool {
        let mut state = lock(&self.shared.state);
        match state.dirty.next(state.from) {
            Some(page) => {
                state.from = page;
                false
            }
            None => true,
        }
    }
}

impl Shared {
    /// Most pages of the next batch, where `left` are left: a channel's share of them, where that is not a waste of packets.
    fn most(&self, left: u64) -> usize {
        let share = usize::try_from(left.div_ceil(self.channels.load(Relaxed) as u64)).unwrap_or(usize::MAX);
        share.clamp(self.capacity.div_ceil(SMALLEST_PART), self.capacity)
    }
}

/// The smallest batch that is cut for the sake of other channels, as a part of the largest: 16 KiB of 512, of which its packet's header is
/// another 7 %.
const SMALLEST_PART: usize = 32;

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use multifd_proto::BlockName;

    use super::*;

    fn layout() -> Layout {
        let blocks = [("a", 300u64), ("b", 5)].map(|(name, pages)| (BlockName::new(name).unwrap(), pages * 4096));
        Layout::new(4096, blocks).unwrap()
    }

    fn drain(scan: &PageScan) -> Vec<(usize, Vec<u64>)> {
        let mut batch = Batch::default();
        let mut all = Vec::new();
        while scan.next(&mut batch) {
            all.push((batch.block, batch.pages.iter().map(|offset| offset / 4096).collect()));
        }
        all
    }

    #[test]
    fn each_page_is_handed_out_once_in_batches_of_one_block() {
        let scan = PageScan::new(layout(), 128, 1);
        scan.load(&mut DirtyBitmap::full(&layout()));
        assert_eq!(drain(&scan), [], "nothing before the section opens");
        scan.allow(u64::MAX);
        let expected = [(0, 0..128), (0, 128..256), (0, 256..300), (1, 0..5)];
        assert_eq!(drain(&scan), expected.map(|(block, pages)| (block, pages.collect())));
        assert!(scan.is_empty());
    }

    /// Between hosts the pause was as long as a few of 64 channels needed for all that was left.
    #[test]
    fn channels_share_what_is_left_of_a_round() {
        let scan = PageScan::new(layout(), 128, 4);
        assert_eq!(scan.load(&mut DirtyBitmap::full(&layout())), 305);
        scan.allow(u64::MAX);
        let sizes: Vec<usize> = drain(&scan).iter().map(|(_, pages)| pages.len()).collect();
        assert_eq!(sizes, [77, 57, 43, 32, 24, 18, 14, 10, 8, 6, 4, 4, 3, 4, 1]);
        // What is put off is not left.
        let mut dirty = DirtyBitmap::full(&layout());
        let mut written = DirtyBitmap::new(&layout());
        (0..200).for_each(|page| written.set(page));
        scan.load(&mut dirty);
        scan.allow(u64::MAX);
        assert_eq!(scan.postpone(&written), 200);
        assert_eq!(drain(&scan)[0], (0, (200..227).collect()));
        scan.take_postponed(&mut dirty);
        assert_eq!(scan.load(&mut dirty), 200);
    }

    #[test]
    fn a_section_ends_after_the_pages_it_was_allowed() {
        let scan = PageScan::new(layout(), 128, 1);
        scan.load(&mut DirtyBitmap::full(&layout()));
        scan.allow(130);
        assert_eq!(drain(&scan).len(), 2);
        assert!(!scan.is_empty());
        scan.allow(1);
        assert_eq!(drain(&scan).len(), 1);
        scan.allow(u64::MAX);
        assert_eq!(drain(&scan).len(), 1);
        assert!(scan.is_empty());
    }

    #[test]
    fn known_zeros_are_told_apart() {
        let scan = PageScan::new(layout(), 128, 1);
        let mut zeros = DirtyBitmap::new(&layout());
        zeros.set_range(1..120);
        let mut dirty = DirtyBitmap::new(&layout());
        dirty.set_range(0..125);
        scan.set_zeros(Some(zeros));
        scan.load(&mut dirty);
        assert!(dirty.is_empty());
        scan.allow(u64::MAX);
        let mut batch = Batch::default();
        assert!(scan.next(&mut batch));
        assert_eq!(batch.pages, [0, 120, 121, 122, 123, 124].map(|page| page * 4096));
        assert_eq!(batch.zeros.len(), 119);
        assert!(!scan.next(&mut batch));
    }

    #[test]
    fn zeros_that_are_known_later_are_told_apart_with_those_before() {
        let scan = PageScan::new(layout(), 128, 1);
        scan.load(&mut DirtyBitmap::full(&layout()));
        scan.allow(u64::MAX);
        for pages in [1..3, 120..128] {
            let mut zeros = DirtyBitmap::new(&layout());
            zeros.set_range(pages);
            scan.add_zeros(&zeros);
        }
        let mut batch = Batch::default();
        assert!(scan.next(&mut batch));
        let expected: Vec<u64> = [1, 2].into_iter().chain(120..128).map(|page| page * 4096).collect();
        assert_eq!(batch.zeros, expected);
        assert_eq!(batch.pages.len(), 118);
    }

    #[test]
    fn a_page_is_handed_out_or_postponed_and_a_part_of_the_next_round() {
        let scan = PageScan::new(layout(), 128, 1);
        scan.load(&mut DirtyBitmap::full(&layout()));
        scan.allow(u64::MAX);
        let mut batch = Batch::default();
        assert!(scan.next(&mut batch));
        let mut written = DirtyBitmap::new(&layout());
        written.set_range(100..200);
        assert_eq!(scan.postpone(&written), 72, "28 were handed out");
        assert_eq!(scan.postpone(&written), 0);
        let expected = [(0, (200..300).collect()), (1, (0..5).collect())];
        assert_eq!(drain(&scan), expected);
        assert!(scan.is_empty());
        let mut next = DirtyBitmap::new(&layout());
        next.set(7);
        scan.take_postponed(&mut next);
        assert!(next.iter().eq([7].into_iter().chain(128..200)));
        scan.load(&mut next);
        scan.allow(u64::MAX);
        assert_eq!(drain(&scan).len(), 1);
        scan.take_postponed(&mut next);
        assert!(next.is_empty());
    }

    #[test]
    fn packets_are_numbered_and_batches_are_not() {
        let scan = PageScan::new(layout(), 128, 1);
        scan.load(&mut DirtyBitmap::full(&layout()));
        scan.allow(u64::MAX);
        let mut batch = Batch::default();
        assert!(scan.next(&mut batch));
        assert_eq!(scan.packet_number(), 0);
        // Zeros only, in legacy mode: it becomes no packet.
        assert!(scan.next(&mut batch));
        assert_eq!(scan.packet_number(), 1);
    }
}
