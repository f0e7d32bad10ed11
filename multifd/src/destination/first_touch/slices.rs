//! Which parts of memory are registered with a userfaultfd while they get their first content.
//!
//! Ending a registration walks the page tables of all that is registered, with the address space locked: 30 to 75 ms for
//! each GiB, for which every thread waits that maps, or touches a page for the first time. So memory is registered in slices of a few
//! MiB, at the first page that comes for one, and each registration ends when its slice is full, or when too many are open:
//! at most [`MOST_OPEN`] slices are registered at any time, however much memory there is, and after
//! [`close`](Slices::close) none.
//!
//! A slice is registered once. Pages that come for it afterwards are written like any other, also by a thread that
//! finds the registration gone between two system calls.
//!
//! Where the host gives large pages (see [`LargePages`]), each slice goes one of two ways, as `choice` says: it is registered, or runs
//! are read into place, which the kernel was asked before to back with large pages.

use std::{collections::VecDeque, io, ops::Range, path::Path};

use multifd_proto::BlockName;

use super::{
    advised::{Advised, Asked},
    choice::{Choice, Trial, Way},
};
use crate::{
    host::{FreshKind, LargePages, large_pages::huge_on_advice},
    ram::{Backing, GuestRange, Ram, RamBlock},
    sync::{
        Mutex,
        atomic::{
            AtomicU8, AtomicU32, AtomicU64,
            Ordering::{AcqRel, Acquire, Relaxed, Release},
        },
        lock,
    },
    sys::uffd::Userfaultfd,
};

/// Fresh memory that the kernel fills by `UFFDIO_COPY`, slice by slice.
pub(crate) struct Slices {
    uffd: Userfaultfd,
    /// In order of their addresses.
    blocks: Vec<Block>,
    /// Bytes in a slice, a power of two; slices begin at multiples of it.
    bytes: u64,
    most_open: usize,
    /// How often [`age`](Self::age) was called.
    age: AtomicU32,
    open: Mutex<Open>,
}

struct Block {
    name: BlockName,
    addresses: Range<u64>,
    slices: Vec<Slice>,
    choice: Choice,
    large: Result<Large, String>,
}

/// Large pages, which a block may get.
struct Large {
    offer: Offer,
    advised: Advised,
}

/// What a host gives to fresh memory.
#[derive(Clone, Copy, Debug)]
enum Offer {
    /// Pages of 64 to 512 KiB.
    Large(LargePages),
    /// Pages of 2 MiB alone, where they are asked for.
    Huge,
}

impl Offer {
    /// What this host gives, or why it gives nothing.
    fn of_host(kind: FreshKind) -> Result<Offer, String> {
        match LargePages::of_host(kind) {
            Ok(pages) => Ok(Offer::Large(pages)),
            Err(_) if kind == FreshKind::Private && huge_on_advice(Path::new("/")) => Ok(Offer::Huge),
            Err(why) => Err(why.to_string()),
        }
    }

    fn is_advised(&self) -> bool {
        match self {
            Offer::Large(pages) => pages.advised,
            Offer::Huge => true,
        }
    }

    /// The shortest run that is read into place. A large page that comes unasked may hold more than what is filled:
    /// [`MOST_INFLATED`] times as much.
    fn least_run(&self) -> usize {
        match self {
            Offer::Large(pages) => LEAST_RUN.max(pages.largest_unasked / MOST_INFLATED),
            Offer::Huge => LEAST_RUN,
        }
    }
}

struct Slice {
    /// [`FRESH`], [`OPEN`] or [`OVER`].
    state: AtomicU8,
    /// Bytes that were not filled yet. Wraps where pages come twice; that matters to no slice that is [`OVER`].
    left: AtomicU64,
    /// The age in which it was last filled.
    used: AtomicU32,
    /// 0 before its first long run, then one more than its [`Way`].
    way: AtomicU8,
}

/// Not registered yet.
const FRESH: u8 = 0;
/// Registered.
const OPEN: u8 = 1;
/// Not registered any more, for good.
const OVER: u8 = 2;

#[derive(Default)]
struct Open {
    /// Those that are registered, the oldest first.
    slices: VecDeque<SliceId>,
    /// No further one is registered.
    closed: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct SliceId {
    block: usize,
    slice: usize,
}

impl Slices {
    /// All of `ram`, of which nothing is registered yet.
    ///
    /// # Errors
    /// The kernel's: there is no userfaultfd for this process.
    pub(super) fn new(ram: &Ram) -> io::Result<Slices> {
        Slices::of(ram, SLICE, MOST_OPEN, |_| Err("asked for".to_owned()))
    }

    /// The same, where large pages are used if they are cheaper.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub(super) fn or_large_pages(ram: &Ram) -> io::Result<Slices> {
        Slices::of(ram, SLICE, MOST_OPEN, Offer::of_host)
    }

    fn of(
        ram: &Ram,
        bytes: u64,
        most_open: usize,
        host: impl Fn(FreshKind) -> Result<Offer, String>,
    ) -> io::Result<Slices> {
        let uffd = Userfaultfd::open().map_err(|(_, error)| error)?;
        let block = |block: &RamBlock| {
            let addresses = block.address()..block.address() + block.bytes() as u64;
            let count = (addresses.end - 1) / bytes - addresses.start / bytes + 1;
            let slices = (0..count as usize).map(|slice| {
                let part = slice_of(&addresses, slice, bytes);
                let left = AtomicU64::new(part.end - part.start);
                Slice { state: AtomicU8::new(FRESH), left, used: AtomicU32::new(0), way: AtomicU8::new(0) }
            });
            let (name, slices, large) = (block.name().clone(), slices.collect(), large(block, &host));
            Block { name, addresses, slices, choice: Choice::default(), large }
        };
        let mut blocks: Vec<Block> = ram.blocks().iter().map(block).collect();
        blocks.sort_by_key(|block| block.addresses.start);
        let (age, open) = (AtomicU32::new(0), Mutex::new(Open::default()));
        Ok(Slices { uffd, blocks, bytes, most_open, age, open })
    }

    /// How pages that come for `range` get their first content, as far as can be told now.
    pub(super) fn way(&self, range: GuestRange<'_>) -> Way {
        let parts: Vec<SliceId> = self.parts(range).map(|(id, _)| id).collect();
        if parts.iter().all(|id| self.slice(*id).state.load(Relaxed) == OVER) {
            return Way::InPlace;
        }
        let block = &self.blocks[parts[0].block];
        let Ok(large) = &block.large else { return Way::Copy };
        if range.len() < large.offer.least_run() {
            return Way::Copy;
        }
        let chosen = &self.slice(parts[0]).way;
        match chosen.load(Relaxed) {
            0 => {
                let affords = large.advised.affords(block.choice.bytes(Way::InPlace));
                let way = if affords { block.choice.next() } else { Way::Copy };
                // Of threads that are here at the same time, the first one chooses.
                match chosen.compare_exchange(0, way as u8 + 1, Relaxed, Relaxed) {
                    Ok(_) => way,
                    Err(other) => Way::of(other - 1),
                }
            }
            way => Way::of(way - 1),
        }
    }

    /// Begins to measure what it costs that `range` goes `way`, where that is of interest.
    pub(super) fn trial(&self, range: GuestRange<'_>, way: Way) -> Option<Trial<'_>> {
        let block = self.block_of(range);
        block.large.is_ok().then(|| block.choice.trial(way))
    }

    /// Asks for large pages for `range`, which is about to be filled in place.
    pub(super) fn prepare(&self, range: GuestRange<'_>) {
        let block = self.block_of(range);
        block.choice.went(Way::InPlace, range.len() as u64);
        if let Ok(large) = &block.large
            && large.offer.is_advised()
        {
            large.advised.ask(range, block.choice.bytes(Way::InPlace));
        }
    }

    /// What became of the memory of each block.
    pub(super) fn account(&self) -> Vec<FreshMemory> {
        self.blocks.iter().map(Block::account).collect()
    }

    /// Puts `from` into `range`, which was never touched as far as is known, in pages of `page_size`.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn fill(&self, range: GuestRange<'_>, from: &[u8], page_size: usize) -> io::Result<()> {
        self.block_of(range).choice.went(Way::Copy, range.len() as u64);
        for (id, part) in self.parts(range) {
            let (to, from) = (range.slice(part.start, part.len()).expect("a part"), &from[part]);
            if self.is_open(id) {
                self.copy(to, from, page_size)?;
            } else {
                to.write(from);
            }
            self.filled(id, from.len() as u64);
        }
        Ok(())
    }

    /// A sync point has passed: ends the registration of slices that were not filled since the one before.
    pub(super) fn age(&self) {
        let mut open = lock(&self.open);
        let now = self.age.load(Relaxed);
        let (used, idle): (VecDeque<_>, VecDeque<_>) =
            std::mem::take(&mut open.slices).into_iter().partition(|&id| self.slice(id).used.load(Relaxed) == now);
        open.slices = used;
        self.age.store(now + 1, Relaxed);
        idle.into_iter().for_each(|id| self.end(id));
    }

    /// Ends all registrations. None is made afterwards: what comes later is written.
    pub(super) fn close(&self) {
        let mut open = lock(&self.open);
        if !open.closed {
            open.closed = true;
            self.blocks.iter().flat_map(|block| &block.slices).for_each(|slice| {
                let _ = slice.state.compare_exchange(FRESH, OVER, AcqRel, Relaxed);
            });
        }
        std::mem::take(&mut open.slices).into_iter().for_each(|id| self.end(id));
    }

    /// Has the kernel fill `to`, and writes the pages that it does not.
    fn copy(&self, to: GuestRange<'_>, from: &[u8], page_size: usize) -> io::Result<()> {
        let mut done = 0;
        while done < from.len() {
            let rest = to.slice(done, from.len() - done).expect("done < len, whole pages");
            match self.uffd.fill(rest, &from[done..]) {
                // Somebody has touched the page since: another channel in the same round, or the VMM.
                Ok(0) => {
                    let page = rest.slice(0, page_size).expect("at least one page is left");
                    page.write(&from[done..done + page_size]);
                    done += page_size;
                }
                Ok(filled) => done += filled,
                // The registration has ended meanwhile.
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                    rest.write(&from[done..]);
                    return Ok(());
                }
                // Huge pages that could not be told in time: without /proc there is nothing to read about a mapping.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                    self.refused(&error);
                    rest.write(&from[done..]);
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Whether slice `id` is registered, which it is from its first use on for a while.
    fn is_open(&self, id: SliceId) -> bool {
        let (slice, now) = (self.slice(id), self.age.load(Relaxed));
        if slice.used.load(Relaxed) != now {
            slice.used.store(now, Relaxed);
        }
        match slice.state.load(Acquire) {
            OPEN => true,
            FRESH => self.begin(id),
            _ => false,
        }
    }

    /// Registers slice `id`, unless another thread has done that, or it is too late.
    fn begin(&self, id: SliceId) -> bool {
        let mut open = lock(&self.open);
        let slice = self.slice(id);
        if open.closed || slice.state.load(Relaxed) != FRESH {
            return slice.state.load(Relaxed) == OPEN;
        }
        let addresses = slice_of(&self.blocks[id.block].addresses, id.slice, self.bytes);
        if let Err(error) = self.uffd.register(addresses.start, addresses.end - addresses.start) {
            drop(open);
            self.refused(&error);
            return false;
        }
        slice.state.store(OPEN, Release);
        open.slices.push_back(id);
        if open.slices.len() > self.most_open
            && let Some(oldest) = open.slices.pop_front()
        {
            self.end(oldest);
        }
        true
    }

    /// `bytes` of slice `id` have their content.
    fn filled(&self, id: SliceId, bytes: u64) {
        let slice = self.slice(id);
        if slice.left.fetch_sub(bytes, Relaxed) != bytes || slice.state.load(Relaxed) != OPEN {
            return;
        }
        let mut open = lock(&self.open);
        if let Some(position) = open.slices.iter().position(|known| *known == id) {
            open.slices.remove(position);
            self.end(id);
        }
    }

    /// Ends the registration of slice `id`, which is no longer among those that are open. The caller holds their lock.
    fn end(&self, id: SliceId) {
        self.slice(id).state.store(OVER, Release);
        let addresses = slice_of(&self.blocks[id.block].addresses, id.slice, self.bytes);
        if let Err(error) = self.uffd.unregister(addresses.start, addresses.end - addresses.start) {
            // It ends with the userfaultfd then.
            tracing::debug!(%error, "the registration of filled memory is not ended early");
        }
    }

    /// The kernel does not fill this memory.
    fn refused(&self, error: &io::Error) {
        tracing::debug!(%error, "the kernel does not fill this memory; it is filled by page faults");
        self.close();
    }

    fn block_of(&self, range: GuestRange<'_>) -> &Block {
        &self.blocks[self.block_at(range.as_ptr() as u64)]
    }

    /// The position of the block that `address` lies in.
    fn block_at(&self, address: u64) -> usize {
        self.blocks.partition_point(|block| block.addresses.end <= address)
    }

    fn slice(&self, id: SliceId) -> &Slice {
        &self.blocks[id.block].slices[id.slice]
    }

    /// The slices that `range` lies in, each with the bytes of the range that are its.
    fn parts(&self, range: GuestRange<'_>) -> impl Iterator<Item = (SliceId, Range<usize>)> + use<> {
        let (start, bytes) = (range.as_ptr() as u64, self.bytes);
        let block = self.block_at(start);
        let (first, mut done, len) = (self.blocks[block].addresses.start / bytes, 0, range.len());
        std::iter::from_fn(move || {
            let from = start + done as u64;
            let part = done..len.min(done + (bytes - from % bytes) as usize);
            done = part.end;
            let id = SliceId { block, slice: (from / bytes - first) as usize };
            (!part.is_empty()).then_some((id, part))
        })
    }

    /// How many slices are registered.
    #[cfg(all(test, not(any(loom, shuttle))))]
    pub(super) fn open(&self) -> usize {
        lock(&self.open).slices.len()
    }
}

impl Drop for Slices {
    fn drop(&mut self) {
        // Slice by slice also where a migration has failed: the VMM's other threads do not stand still for it either.
        self.close();
    }
}

/// The large pages that `block` may get.
fn large(block: &RamBlock, host: impl Fn(FreshKind) -> Result<Offer, String>) -> Result<Large, String> {
    let memory = match block.backing() {
        Backing::Anonymous => FreshKind::Private,
        Backing::MemoryFile(file) => {
            // The kernel maps a large page only where its address and its place in the file are alike.
            if !(block.address() ^ file.offset()).is_multiple_of(CONGRUENT) {
                return Err(format!(
                    "it is mapped at {:#x}, from {:#x} of its file on: for large pages both have to be the same in their last {} \
                     bits",
                    block.address(),
                    file.offset(),
                    CONGRUENT.trailing_zeros()
                ));
            }
            FreshKind::Shared
        }
        _ => return Err("it was not said what it is made of".to_owned()),
    };
    let offer = host(memory)?;
    let asked = if matches!(offer, Offer::Huge) { Asked::Huge } else { Asked::Large };
    let addresses = block.address()..block.address() + block.bytes() as u64;
    let advised = Advised::new(asked, addresses).map_err(|error| error.to_string())?;
    Ok(Large { offer, advised })
}

impl Block {
    fn account(&self) -> FreshMemory {
        let [copied, in_place] = [Way::Copy, Way::InPlace].map(|way| self.choice.bytes(way));
        let [copy_cost, in_place_cost] = [Way::Copy, Way::InPlace].map(|way| self.choice.cost(way));
        let reason = match (&self.large, copy_cost, in_place_cost) {
            (Err(why), ..) => format!("put in place by the kernel (UFFDIO_COPY): {why}"),
            (Ok(_), Some(copy), Some(place)) => {
                let way = match self.choice.way() {
                    Way::Copy => "put in place by the kernel (UFFDIO_COPY)",
                    Way::InPlace => "read into large pages",
                };
                format!("{way}: {copy:.2} CPU s/GB the one way, {place:.2} into large pages, as measured last")
            }
            (Ok(_), ..) => "there was too little to find out whether large pages are cheaper".to_owned(),
        };
        FreshMemory { block: self.name.clone(), copied, in_place, copy_cost, in_place_cost, reason }
    }
}

/// How the memory of one RAM block got its first content.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct FreshMemory {
    /// The name of the block.
    pub block: BlockName,
    /// Bytes that went through private memory, and were put in place by the kernel.
    pub copied: u64,
    /// Bytes that were read into place.
    pub in_place: u64,
    /// CPU seconds for a GB the first way, when it was tried last; `None` where it was not tried.
    pub copy_cost: Option<f64>,
    /// The same of the second way.
    pub in_place_cost: Option<f64>,
    /// Why most of it went the way it did, in words; also what the host would have to be set to.
    pub reason: String,
}

/// The addresses of slice number `slice` of a block at `addresses`.
fn slice_of(addresses: &Range<u64>, slice: usize, bytes: u64) -> Range<u64> {
    let start = (addresses.start / bytes + slice as u64) * bytes;
    start.max(addresses.start)..(start + bytes).min(addresses.end)
}

/// Bytes in a slice.
const SLICE: u64 = 4 << 20;
/// The most slices that are registered at a time: channels fill the same one, or neighbours.
const MOST_OPEN: usize = 16;
/// Bytes in the shortest run that is read into place: the smallest large page.
const LEAST_RUN: usize = 64 << 10;
/// How many times the content of a sparse guest may take, where the host gives large pages that it was not asked for. (What it
/// is asked for is filled to the last byte.) Of pages of 2 MiB, a run as long as the longest packet fills this part.
const MOST_INFLATED: usize = 4;
/// The largest of the large pages that are used: addresses and places in a file have to be the same modulo this.
const CONGRUENT: u64 = 512 << 10;

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use multifd_proto::BlockName;
    use test_support::{skip, time_limit};

    use super::*;
    use crate::{ram::RamBlock, testing::registered::registered};

    const PAGE: usize = 4096;
    const SMALL: u64 = 64 << 10;

    fn ram(blocks: &[(&str, usize)]) -> Ram {
        let block =
            |&(name, pages): &(&str, usize)| RamBlock::anonymous(BlockName::new(name).unwrap(), pages * PAGE).unwrap();
        Ram::new(PAGE, blocks.iter().map(block).collect()).unwrap()
    }

    /// `None` where this process gets no userfaultfd.
    fn slices(ram: &Ram, most_open: usize) -> Option<Slices> {
        let none = |_| Err("it is not asked".to_owned());
        Slices::of(ram, SMALL, most_open, none).map_err(|error| skip(&format!("no userfaultfd: {error}"))).ok()
    }

    fn content(page: u64) -> [u8; PAGE] {
        [(page % 255) as u8 + 1; PAGE]
    }

    fn fill(slices: &Slices, ram: &Ram, pages: Range<u64>) {
        for page in pages {
            slices.fill(ram.page(page).unwrap(), &content(page), PAGE).unwrap();
        }
    }

    /// The first page of a whole slice: the mapping begins at any page.
    fn first_of_a_slice(ram: &Ram) -> u64 {
        (SMALL - ram.blocks()[0].address() % SMALL) / PAGE as u64
    }

    #[track_caller]
    fn assert_filled(ram: &Ram, pages: Range<u64>) {
        for page in pages {
            assert_eq!(ram.page_bytes(page), content(page), "page {page}");
        }
    }

    /// All memory was registered until the end, and the guest waited while the kernel walked all of its page tables.
    #[test]
    fn a_slice_is_registered_from_its_first_page_until_it_is_full() {
        let ram = ram(&[("ram", 100)]);
        let Some(slices) = slices(&ram, 3) else { return };
        assert_eq!(registered(&ram), 0);
        let first = first_of_a_slice(&ram);
        fill(&slices, &ram, first..first + 15);
        assert_eq!((registered(&ram), slices.open()), (SMALL, 1));
        fill(&slices, &ram, first + 15..first + 17);
        assert_eq!((registered(&ram), slices.open()), (SMALL, 1), "the next one is, the full one no longer");
        assert_filled(&ram, first..first + 17);
    }

    #[test]
    fn however_pages_come_few_slices_are_registered_and_none_after_the_close() {
        let ram = ram(&[("a", 300), ("b", 1), ("c", 260)]);
        let Some(slices) = slices(&ram, 3) else { return };
        let pages: Vec<u64> = ram.layout().blocks().iter().flat_map(|block| block.page_range()).collect();
        // Every 17th page: each in another slice than the one before.
        for from in 0..17 {
            for &page in pages.iter().skip(from).step_by(17) {
                fill(&slices, &ram, page..page + 1);
                assert!(slices.open() <= 3);
            }
            assert!(registered(&ram) <= 3 * SMALL, "{}", registered(&ram));
        }
        slices.close();
        assert_eq!(registered(&ram), 0);
        pages.iter().for_each(|&page| assert_filled(&ram, page..page + 1));
    }

    #[test]
    fn after_the_close_pages_are_written_and_nothing_is_registered() {
        let ram = ram(&[("ram", 100)]);
        let Some(slices) = slices(&ram, 3) else { return };
        fill(&slices, &ram, 0..5);
        assert_eq!(slices.way(ram.page(90).unwrap()), Way::Copy);
        slices.close();
        assert_eq!([90, 6].map(|page| slices.way(ram.page(page).unwrap())), [Way::InPlace; 2]);
        fill(&slices, &ram, 5..100);
        assert_eq!(registered(&ram), 0);
        assert_filled(&ram, 0..100);
    }

    #[test]
    fn a_slice_that_is_not_filled_between_two_sync_points_is_no_longer_registered() {
        let ram = ram(&[("ram", 100)]);
        let Some(slices) = slices(&ram, 3) else { return };
        let first = first_of_a_slice(&ram);
        fill(&slices, &ram, first..first + 2);
        slices.age();
        assert_eq!(slices.open(), 1, "it was filled since the sync point before");
        fill(&slices, &ram, 60..61);
        slices.age();
        assert_eq!((slices.open(), registered(&ram)), (1, SMALL));
        slices.age();
        assert_eq!((slices.open(), registered(&ram)), (0, 0));
        fill(&slices, &ram, 0..100);
        assert_filled(&ram, 0..100);
    }

    /// A page that came later must not be replaced by one that is filled now: the kernel fills only what is not there.
    #[test]
    fn a_page_that_is_there_is_not_lost_around_one_that_is_filled() {
        let ram = ram(&[("ram", 40)]);
        let Some(slices) = slices(&ram, 3) else { return };
        let all = ram.blocks()[0].range(0, 40 * PAGE).unwrap();
        ram.page(7).unwrap().write(&[0xee; PAGE]);
        let bytes: Vec<u8> = (0..40).flat_map(content).collect();
        slices.fill(all, &bytes, PAGE).unwrap();
        assert_filled(&ram, 0..40);
    }

    #[test]
    fn threads_fill_while_registrations_end() {
        time_limit(std::time::Duration::from_secs(60), || {
            let ram = ram(&[("ram", 2000)]);
            let Some(slices) = slices(&ram, 2) else { return };
            std::thread::scope(|scope| {
                for thread in 0..4 {
                    let (slices, ram) = (&slices, &ram);
                    scope.spawn(move || (thread..2000).step_by(4).for_each(|page| fill(slices, ram, page..page + 1)));
                }
                scope.spawn(|| (0..20).for_each(|_| slices.age()));
            });
            assert_filled(&ram, 0..2000);
            slices.close();
            assert_eq!(registered(&ram), 0);
        });
    }

    /// Memory of 12 slices, on a host that gives large pages.
    fn with_large_pages(largest_unasked: usize) -> Option<(Ram, Slices)> {
        let ram = ram(&[("ram", 12 * 256)]);
        let host = |_| Ok(Offer::Large(LargePages { advised: largest_unasked == 0, largest_unasked }));
        let slices =
            Slices::of(&ram, 1 << 20, 3, host).map_err(|error| skip(&format!("no userfaultfd: {error}"))).ok()?;
        Some((ram, slices))
    }

    #[test]
    fn long_runs_are_tried_both_ways_where_the_host_gives_large_pages() {
        let Some((ram, slices)) = with_large_pages(0) else { return };
        let run = |first: u64, pages: usize| ram.blocks()[0].range(first * 4096, pages * PAGE).unwrap();
        assert_eq!(ram.blocks()[0].address() % (1 << 20), 0, "mapped at a multiple of a large page");
        assert_eq!(slices.way(run(0, 15)), Way::Copy, "shorter than a large page");
        assert_eq!(
            [0, 16, 256, 300].map(|first| slices.way(run(first, 16))),
            [Way::Copy, Way::Copy, Way::InPlace, Way::InPlace]
        );
        for (first, way, cost) in [(0, Way::Copy, 2000), (256, Way::InPlace, 1)] {
            let trial = slices.trial(run(first, 256), way).unwrap();
            // What it costs is what the thread does meanwhile.
            (0..cost).for_each(|round| drop(std::hint::black_box(vec![round as u8; 64 << 10])));
            trial.ends(1 << 20);
        }
        assert_eq!(slices.way(run(512, 16)), Way::InPlace);
        slices.prepare(run(512, 256));
        let [account] = &slices.account()[..] else { panic!("one block") };
        assert_eq!((account.copied, account.in_place), (0, 1 << 20));
        assert!(
            account.copy_cost > account.in_place_cost && account.reason.starts_with("read into large pages"),
            "{account:?}"
        );
    }

    /// 60 runs of 64 KiB, 2 MiB apart, and then all.
    #[test]
    fn a_sparse_guest_goes_the_way_that_does_not_make_it_grow() {
        let ram = ram(&[("ram", 64 * 256)]);
        let made = Slices::of(&ram, 2 << 20, 3, |_| Ok(Offer::Huge));
        let Ok(slices) = made.map_err(|error| skip(&format!("no userfaultfd: {error}"))) else { return };
        let run = |first: u64, pages: usize| ram.blocks()[0].range(first * 4096, pages * PAGE).unwrap();
        assert_eq!(slices.way(run(0, 15)), Way::Copy, "too short to be worth it");
        let mut ways = Vec::new();
        for slice in 0..28 {
            let run = run(slice * 512, 16);
            let way = slices.way(run);
            ways.push(way);
            // Large pages cost nothing here.
            let cost = std::time::Duration::from_millis(u64::from(way == Way::Copy));
            slices.blocks[0].choice.measured(way, 4 << 20, cost);
            if way == Way::InPlace {
                slices.prepare(run);
            }
        }
        assert_eq!(ways[..3], [Way::Copy, Way::InPlace, Way::InPlace]);
        assert_eq!(ways[20..], [Way::Copy; 8], "16 MiB were asked for, and a few runs were filled");
        slices.prepare(run(0, 16 * 256));
        assert_eq!(slices.way(run(30 * 512, 16)), Way::InPlace, "16 MiB were filled");
    }

    /// A host that gives large pages to all made a guest that uses one page in many as large as its memory.
    #[test]
    fn a_run_is_read_into_place_only_if_it_fills_a_quarter_of_any_large_page() {
        let Some((ram, slices)) = with_large_pages(2 << 20) else { return };
        let run = |first: u64, pages: usize| ram.blocks()[0].range(first * 4096, pages * PAGE).unwrap();
        slices.way(run(0, 256));
        assert_eq!([127, 128].map(|pages| slices.way(run(256, pages))), [Way::Copy, Way::InPlace]);
    }

    #[test]
    fn the_account_says_why_there_are_no_large_pages() {
        let ram = ram(&[("ram", 20)]);
        let Some(slices) = slices(&ram, 3) else { return };
        fill(&slices, &ram, 0..20);
        let [account] = &slices.account()[..] else { panic!("one block") };
        assert_eq!((account.copied, account.in_place), (20 * 4096, 0));
        assert_eq!(account.reason, "put in place by the kernel (UFFDIO_COPY): it is not asked");
    }
}
