//! For which memory of a block the kernel was asked for large pages.
//!
//! It is asked for exactly the memory that is about to be filled, in granules of 64 KiB: a large page lies within what was
//! asked for, so memory that is never filled takes none, and a sparse guest stays as small as it is. Each part that has no
//! neighbour costs the process a mapping of its own, of which the kernel permits some ten thousand: [`MOST_PARTS`] bounds that.

use crate::{
    ram::GuestRange,
    sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    sys::{advice, zeroed::zeroed_atomics},
};

/// The parts of one block.
pub(super) struct Advised {
    /// The address of the first granule.
    start: u64,
    /// A bit for each granule.
    granules: Vec<AtomicU64>,
    /// Parts without neighbours so far.
    parts: AtomicU32,
    /// How many there may be.
    most: u32,
}

impl Advised {
    /// For a block at `start`, `bytes` long.
    ///
    /// # Errors
    /// There is no room for the account.
    pub(super) fn new(start: u64, bytes: u64) -> std::io::Result<Advised> {
        Advised::with_most(start, bytes, MOST_PARTS)
    }

    fn with_most(start: u64, bytes: u64, most: u32) -> std::io::Result<Advised> {
        let first = start / GRANULE;
        let count = (start + bytes).div_ceil(GRANULE) - first;
        let words = usize::try_from(count.div_ceil(64)).map_err(|_| std::io::ErrorKind::OutOfMemory)?;
        Ok(Advised { start: first * GRANULE, granules: zeroed_atomics(words)?, parts: AtomicU32::new(0), most })
    }

    /// Asks for large pages for `range`, as far as it is whole granules.
    pub(super) fn ask(&self, range: GuestRange<'_>) {
        let address = range.as_ptr() as u64;
        let skip = address.next_multiple_of(GRANULE) - address;
        let len = (range.len() as u64).saturating_sub(skip) / GRANULE * GRANULE;
        if len == 0 {
            return;
        }
        let first = (address + skip - self.start) / GRANULE;
        let granules = first..first + len / GRANULE;
        if granules.clone().all(|granule| self.has(granule)) {
            return;
        }
        let joins = (first > 0 && self.has(first - 1)) || self.has(granules.end);
        // Counted before: threads may each add one more than there may be.
        if !joins && self.parts.fetch_add(1, Relaxed) >= self.most {
            return;
        }
        let asked = range.slice(skip as usize, len as usize).expect("within the range, whole granules");
        match advice::huge_pages(asked) {
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

/// The smallest large page that is used.
const GRANULE: u64 = 64 << 10;
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
        let advised = Advised::with_most(block.address(), 8192 << 10, 2).unwrap();
        let ask = |offset: usize, len: usize| advised.ask(block.range((offset * KIB) as u64, len * KIB).unwrap());
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
}
