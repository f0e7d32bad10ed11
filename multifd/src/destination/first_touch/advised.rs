//! For which memory of a block the kernel was asked for large pages.
//!
//! Pages of 64 to 512 KiB are asked for exactly the memory that is about to be filled, in granules of 64 KiB: a large page lies within
//! what was asked for, so memory that is never filled takes none, and a sparse guest stays as small as it is. Pages of 2 MiB are asked
//! for whole, where some of one is about to be filled, so a guest may grow: by a quarter of what was filled and [`SLACK`] at
//! most, however its memory is used. Each part that has no neighbour costs the process a mapping of its own, of which the kernel
//! permits some ten thousand: [`MOST_PARTS`] bounds that.

use std::ops::Range;

use crate::{
    ram::GuestRange,
    sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    sys::{advice, zeroed::zeroed_atomics},
};

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    /// Pages of 64 to 512 KiB, which lie within what is filled.
    Large,
    /// Pages of 2 MiB, of which a part is filled.
    Huge,
}

impl Asked {
    fn granule(self) -> u64 {
        if self == Asked::Large { 64 << 10 } else { 2 << 20 }
    }
}

/// The parts of one block.
pub(super) struct Advised {
    asked: Asked,
    addresses: Range<u64>,
    /// A bit for each granule, the first of which begins at or before the block.
    granules: Vec<AtomicU64>,
    /// Bytes that were asked for.
    bytes: AtomicU64,
    /// Parts without neighbours so far.
    parts: AtomicU32,
    /// How many there may be.
    most: u32,
}

impl Advised {
    /// For a block at `addresses`.
    ///
    /// # Errors
    /// There is no room for the account.
    pub(super) fn new(asked: Asked, addresses: Range<u64>) -> std::io::Result<Advised> {
        Advised::with_most(asked, addresses, MOST_PARTS)
    }

    fn with_most(asked: Asked, addresses: Range<u64>, most: u32) -> std::io::Result<Advised> {
        let granule = asked.granule();
        let count = addresses.end.div_ceil(granule) - addresses.start / granule;
        let words = usize::try_from(count.div_ceil(64)).map_err(|_| std::io::ErrorKind::OutOfMemory)?;
        let (granules, bytes, parts) = (zeroed_atomics(words)?, AtomicU64::new(0), AtomicU32::new(0));
        Ok(Advised { asked, addresses, granules, bytes, parts, most })
    }

    /// Whether more may be asked for when `filled` bytes were filled, as far as growing is concerned.
    pub(super) fn affords(&self, filled: u64) -> bool {
        self.asked == Asked::Large || self.bytes.load(Relaxed) + self.asked.granule() <= most_asked(filled)
    }

    /// Asks for large pages for `range`; with it, `filled` bytes of the block are filled.
    pub(super) fn ask(&self, range: GuestRange<'_>, filled: u64) {
        let granule = self.asked.granule();
        let (start, end) = (range.as_ptr() as u64, range.as_ptr() as u64 + range.len() as u64);
        let asked = match self.asked {
            Asked::Large => start.next_multiple_of(granule)..end / granule * granule,
            Asked::Huge => {
                let first = self.addresses.start.next_multiple_of(granule);
                (start / granule * granule).max(first)
                    ..end.next_multiple_of(granule).min(self.addresses.end / granule * granule)
            }
        };
        let base = self.addresses.start / granule;
        let granules = asked.start / granule - base..(asked.end / granule).saturating_sub(base);
        let new = granules.clone().filter(|granule| !self.has(*granule)).count() as u64;
        if asked.is_empty() || new == 0 {
            return;
        }
        // Counted before: of threads that are here at the same time, each sees what the others have asked for.
        let before = self.bytes.fetch_add(new * granule, Relaxed);
        let grows = self.asked == Asked::Huge && before + new * granule > most_asked(filled);
        let joins = (granules.start > 0 && self.has(granules.start - 1)) || self.has(granules.end);
        if grows || (!joins && self.parts.fetch_add(1, Relaxed) >= self.most) {
            self.bytes.fetch_sub(new * granule, Relaxed);
            return;
        }
        let block = range.block();
        let len = usize::try_from(asked.end - asked.start).expect("within the block");
        let whole = block.range(asked.start - block.address(), len).expect("within the block");
        match advice::huge_pages(whole) {
            Ok(()) => granules.for_each(|granule| {
                self.granules[(granule / 64) as usize].fetch_or(1 << (granule % 64), Relaxed);
            }),
            Err(error) => tracing::debug!(%error, "no large pages for fresh memory"),
        }
    }

    fn has(&self, granule: u64) -> bool {
        let word = self.granules.get((granule / 64) as usize);
        word.is_some_and(|word| word.load(Relaxed) >> (granule % 64) & 1 == 1)
    }
}

/// How many bytes pages of 2 MiB may take of which `filled` were filled.
fn most_asked(filled: u64) -> u64 {
    filled.saturating_add(filled / 4).saturating_add(SLACK)
}

/// What pages of 2 MiB may take beyond a quarter more than what is filled: as many as several channels fill at a time.
const SLACK: u64 = 16 << 20;
/// Linux permits 65,530 mappings for a process, and each part may add two.
const MOST_PARTS: u32 = 8192;

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use multifd_proto::BlockName;

    use super::*;
    use crate::ram::RamBlock;

    const KIB: usize = 1 << 10;

    /// How many bytes of `block` the kernel was asked to back with large pages, and in how many mappings.
    fn asked(block: &RamBlock) -> (u64, usize) {
        let (mut mapping, mut bytes, mut count) = (0..0, 0, 0);
        for line in std::fs::read_to_string("/proc/self/smaps").unwrap().lines() {
            let word = line.split(' ').next().unwrap_or("");
            if let Some((start, end)) = word.split_once('-')
                && let (Ok(start), Ok(end)) = (u64::from_str_radix(start, 16), u64::from_str_radix(end, 16))
            {
                mapping = start.max(block.address())..end.min(block.address() + block.bytes() as u64);
            } else if line.starts_with("VmFlags:") && line.split(' ').any(|flag| flag == "hg") && !mapping.is_empty() {
                bytes += mapping.end - mapping.start;
                count += 1;
            }
        }
        (bytes, count)
    }

    #[test]
    fn large_pages_are_asked_for_where_content_comes_and_nowhere_else() {
        let block = RamBlock::anonymous(BlockName::new("ram").unwrap(), 8192 * KIB).unwrap();
        let addresses = block.address()..block.address() + (8192 << 10);
        let advised = Advised::with_most(Asked::Large, addresses, 2).unwrap();
        let ask = |offset: usize, len: usize| advised.ask(block.range((offset * KIB) as u64, len * KIB).unwrap(), 0);
        ask(0, 60);
        assert_eq!(asked(&block), (0, 0), "less than a granule");
        ask(4, 190);
        assert_eq!(asked(&block), (128 << 10, 1), "only what is filled");
        ask(192, 512);
        assert_eq!(asked(&block), (640 << 10, 1), "a neighbour");
        ask(2048, 64);
        assert_eq!(asked(&block), (704 << 10, 2));
        ask(4096, 64);
        assert_eq!(asked(&block), (704 << 10, 2), "two parts are as many as there may be");
        ask(704, 1344);
        assert_eq!(asked(&block), (2048 << 10, 1), "between two parts");
        ask(0, 2048);
        assert_eq!(asked(&block).1, 1);
    }

    /// A block of 62 MiB that begins 1 MiB behind a multiple of 2 MiB.
    fn askew() -> (RamBlock, Advised, usize) {
        const MIB: usize = 1 << 20;
        let block = RamBlock::anonymous(BlockName::new("ram").unwrap(), 64 * MIB).unwrap();
        let from = (block.address().next_multiple_of(2 << 20) - block.address()) as usize + MIB;
        let addresses = block.address() + from as u64..block.address() + 64 * MIB as u64;
        let advised = Advised::new(Asked::Huge, addresses).unwrap();
        (block, advised, from)
    }

    #[test]
    fn huge_pages_are_asked_for_whole_and_within_the_block() {
        let (block, advised, from) = askew();
        let all = block.range(from as u64, block.bytes() - from).unwrap();
        let ask = |offset: usize, len: usize| advised.ask(all.slice(offset * KIB, len * KIB).unwrap(), 1 << 30);
        ask(0, 512);
        assert_eq!(asked(&block), (0, 0), "the first one begins before the block");
        ask(1024, 64);
        assert_eq!(asked(&block), (2048 << 10, 1), "the second one, by its first bytes");
        ask(2560, 512);
        assert_eq!(asked(&block), (2048 << 10, 1), "it was asked for");
        ask(2560, 1024);
        assert_eq!(asked(&block), (4096 << 10, 1), "the end of the second one and the beginning of the third");
    }

    /// One page in many is used: asking for 2 MiB each time made a guest up to 512 times as large.
    #[test]
    fn a_sparse_guest_grows_by_a_quarter_and_the_slack_at_most() {
        let (block, advised, from) = askew();
        let all = block.range(from as u64, block.bytes() - from).unwrap();
        let mut filled = 0;
        for granule in 0..30 {
            filled += 64 << 10;
            advised.ask(all.slice((1 + 2 * granule) << 20, 64 * KIB).unwrap(), filled);
            assert!(asked(&block).0 <= filled + filled / 4 + SLACK);
        }
        assert_eq!(asked(&block).0, 18 << 20, "of 60 MiB: the last one came when half a MiB and more was filled");
        assert!(!advised.affords(filled));
        assert!(advised.affords(64 << 20), "it goes on where much was filled");
    }
}
