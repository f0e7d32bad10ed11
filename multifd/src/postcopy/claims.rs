//! Who sends which page: the thread that sets its bit.

use std::{io, ops::Range};

use multifd_proto::mapped_ram::bitmap_len;

use crate::{
    dirty_bitmap::DirtyBitmap,
    layout::Layout,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    sys::zeroed::zeroed_atomics,
};

/// A bit for each page: set once a thread has taken it upon itself to send it. The order of memory does not matter: what is
/// sent is in a file that is not written.
pub(super) struct Claims {
    words: Vec<AtomicU64>,
}

impl Claims {
    /// No page is claimed.
    ///
    /// # Errors
    /// There is no room for them.
    pub(super) fn new(layout: &Layout) -> io::Result<Claims> {
        let words = usize::try_from(layout.bits() / 64).map_err(|_| io::ErrorKind::OutOfMemory)?;
        Ok(Claims { words: zeroed_atomics(words)? })
    }

    /// Claims `page`. `false`: another thread has, or has done so before.
    pub(super) fn claim(&self, page: u64) -> bool {
        let mask = 1 << (page % 64);
        self.words[(page / 64) as usize].fetch_or(mask, Relaxed) & mask == 0
    }

    /// Claims no page any more. No other thread claims pages meanwhile.
    pub(super) fn clear(&self) {
        self.words.iter().for_each(|word| word.store(0, Relaxed));
    }

    /// Whether `page` is claimed.
    pub(super) fn contains(&self, page: u64) -> bool {
        self.words[(page / 64) as usize].load(Relaxed) >> (page % 64) & 1 == 1
    }

    /// The first page of `of`, at or after `from`, that is not claimed.
    pub(super) fn next_free(&self, of: &DirtyBitmap, from: u64) -> Option<u64> {
        let mut next = of.next(from);
        while let Some(page) = next {
            let word = (page / 64) as usize;
            let free = of.words()[word] & !self.words[word].load(Relaxed) & (!0 << (page % 64));
            if free != 0 {
                return Some(word as u64 * 64 + u64::from(free.trailing_zeros()));
            }
            next = of.next((word as u64 + 1) * 64);
        }
        None
    }

    /// The first page of all, at or after `from`, that is not claimed.
    pub(super) fn next_unclaimed(&self, layout: &Layout, from: u64) -> Option<u64> {
        let of_block = |pages: Range<u64>| self.first(from.max(pages.start)..pages.end, false);
        layout.blocks().iter().find_map(|block| of_block(block.page_range()))
    }

    /// The first of `pages` that is claimed, or that is not.
    pub(super) fn first(&self, pages: Range<u64>, claimed: bool) -> Option<u64> {
        let mut next = pages.start;
        while next < pages.end {
            let word = self.words[(next / 64) as usize].load(Relaxed);
            let found = if claimed { word } else { !word } & (!0 << (next % 64));
            if found != 0 {
                let page = next / 64 * 64 + u64::from(found.trailing_zeros());
                return (page < pages.end).then_some(page);
            }
            next = (next / 64 + 1) * 64;
        }
        None
    }

    /// How many pages of `of` are not claimed.
    pub(super) fn count_free(&self, of: &DirtyBitmap) -> u64 {
        let words = of.words().iter().zip(&self.words);
        words.map(|(of, claimed)| u64::from((of & !claimed.load(Relaxed)).count_ones())).sum()
    }

    /// Claims exactly those of `pages`, the pages of a block, that the destination's bitmap says it has received. No other
    /// thread claims pages meanwhile.
    pub(super) fn set_received(&self, pages: Range<u64>, bitmap: &[u8]) {
        debug_assert_eq!(bitmap.len() as u64, bitmap_len(pages.end - pages.start, 1));
        let words = self.words[(pages.start / 64) as usize..].iter();
        for (word, bytes) in words.zip(bitmap.chunks_exact(8)) {
            word.store(u64::from_le_bytes(bytes.try_into().expect("chunks of 8")), Relaxed);
        }
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use multifd_proto::BlockName;

    use super::*;

    fn layout() -> Layout {
        Layout::new(4096, [("a", 70), ("b", 3)].map(|(name, pages)| (BlockName::new(name).unwrap(), pages * 4096)))
            .unwrap()
    }

    #[test]
    fn a_page_is_claimed_once() {
        let claims = Claims::new(&layout()).unwrap();
        assert!(claims.claim(69) && !claims.claim(69) && claims.contains(69));
        assert!(!claims.contains(68));
        claims.clear();
        assert!(claims.claim(69), "none is claimed any more");
    }

    #[test]
    fn what_is_free_is_present_and_not_claimed() {
        let layout = layout();
        let claims = Claims::new(&layout).unwrap();
        let mut present = DirtyBitmap::new(&layout);
        for page in [3, 4, 66, 69, 128, 130] {
            present.set(page);
        }
        for page in [3, 66, 128, 129] {
            claims.claim(page);
        }
        let mut free = Vec::new();
        let mut from = 0;
        while let Some(page) = claims.next_free(&present, from) {
            free.push(page);
            from = page + 1;
        }
        assert_eq!(free, [4, 69, 130]);
        assert_eq!(claims.count_free(&present), 3);
        let mut unclaimed = Vec::new();
        let mut from = 0;
        while let Some(page) = claims.next_unclaimed(&layout, from) {
            unclaimed.push(page);
            from = page + 1;
        }
        let expected: Vec<u64> = (0..70).chain(128..131).filter(|page| ![3, 66, 128, 129].contains(page)).collect();
        assert_eq!(unclaimed, expected);
    }

    #[test]
    fn a_block_may_end_with_the_last_word() {
        let layout = Layout::new(4096, [(BlockName::new("a").unwrap(), 64 * 4096)]).unwrap();
        let claims = Claims::new(&layout).unwrap();
        assert_eq!(claims.first(0..64, true), None);
        assert_eq!(claims.first(64..64, false), None);
    }

    /// From each page on, also where others of its word lie before it.
    #[test]
    fn what_is_found_is_the_first_from_there_on() {
        let layout = layout();
        let claims = Claims::new(&layout).unwrap();
        let mut present = DirtyBitmap::new(&layout);
        let pages: Vec<u64> = layout.blocks().iter().flat_map(|block| block.page_range()).collect();
        pages.iter().filter(|&page| page % 3 != 1).for_each(|&page| present.set(page));
        for page in [0, 2, 3, 11, 12, 13, 62, 63, 65, 69, 129] {
            claims.claim(page);
        }
        let first =
            |from: u64, holds: &dyn Fn(u64) -> bool| pages.iter().copied().find(|&page| page >= from && holds(page));
        let free = pages.iter().filter(|&&page| page % 3 != 1 && !claims.contains(page)).count();
        assert_eq!(claims.count_free(&present), free as u64);
        for from in 0..layout.bits() + 2 {
            let free = first(from, &|page| page % 3 != 1 && !claims.contains(page));
            assert_eq!(claims.next_free(&present, from), free, "from {from}");
            assert_eq!(
                claims.next_unclaimed(&layout, from),
                first(from, &|page| !claims.contains(page)),
                "from {from}"
            );
            for end in from..=70 {
                for claimed in [true, false] {
                    let expected = first(from, &|page| claims.contains(page) == claimed).filter(|&page| page < end);
                    assert_eq!(claims.first(from..end, claimed), expected, "{from}..{end}, {claimed}");
                }
            }
        }
    }

    #[test]
    fn a_recovery_claims_what_was_received_and_frees_the_rest() {
        let layout = layout();
        let claims = Claims::new(&layout).unwrap();
        claims.claim(1);
        claims.claim(129);
        let mut bytes = Vec::new();
        for block in layout.blocks() {
            bytes.clear();
            multifd_proto::postcopy::received::encode(block.pages(), [0, 2], &mut bytes);
            claims.set_received(block.page_range(), &bytes[8..bytes.len() - 8]);
        }
        let claimed: Vec<u64> = (0..layout.bits()).filter(|&page| claims.contains(page)).collect();
        assert_eq!(claimed, [0, 2, 128, 130]);
    }
}
