//! One bit per page of all RAM blocks, with a summary that makes sparse ones cheap.
//!
//! Bit `n` is page number `n` of the [`Layout`]. A second, 64 times smaller bitmap has a bit for each word that is not
//! zero: a clean bitmap of a terabyte (32 MiB) is passed over by reading 512 KiB, whatever it held before.

use std::{io, ops::Range};

use crate::{layout::Layout, sys::zeroed::zeroed};

/// A set of pages, by page number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirtyBitmap {
    words: Vec<u64>,
    /// Bit `w` is set if and only if `words[w]` is not 0.
    summary: Vec<u64>,
    /// How many pages were to be added that it has no bit for, since [`clip`](Self::clip).
    outside: u64,
}

impl DirtyBitmap {
    /// An empty set for the pages of `layout`: one bit for each.
    ///
    /// # Panics
    /// If that is more than this process can address, which no mapped memory needs.
    pub fn new(layout: &Layout) -> DirtyBitmap {
        let words = usize::try_from(layout.bits() / 64).expect("bitmap of mapped memory fits memory");
        DirtyBitmap { words: vec![0; words], summary: vec![0; words.div_ceil(64)], outside: 0 }
    }

    /// An empty set for the pages of `layout`, which may be a claim of a peer.
    ///
    /// # Errors
    /// There is no room for it.
    pub(crate) fn try_new(layout: &Layout) -> io::Result<DirtyBitmap> {
        let words = usize::try_from(layout.bits() / 64).map_err(|_| io::ErrorKind::OutOfMemory)?;
        Ok(DirtyBitmap { words: zeroed(words)?, summary: zeroed(words.div_ceil(64))?, outside: 0 })
    }

    /// The set of all pages of `layout`.
    ///
    /// # Panics
    /// As [`new`](Self::new).
    pub fn full(layout: &Layout) -> DirtyBitmap {
        let mut bitmap = DirtyBitmap::new(layout);
        for block in layout.blocks() {
            bitmap.set_range(block.page_range());
        }
        bitmap
    }

    /// Number of bits, a multiple of 64.
    pub fn bits(&self) -> u64 {
        self.words.len() as u64 * 64
    }

    /// Adds `page`. One that is not below [`bits`](Self::bits) is left out and counted: see [`clip`](Self::clip).
    pub fn set(&mut self, page: u64) {
        match page < self.bits() {
            true => self.merge_word((page / 64) as usize, 1 << (page % 64)),
            false => self.outside = self.outside.saturating_add(1),
        }
    }

    /// Adds all of `pages`. Those that are not below [`bits`](Self::bits) are left out and counted: see [`clip`](Self::clip).
    pub fn set_range(&mut self, pages: Range<u64>) {
        let inside = pages.start.min(self.bits())..pages.end.min(self.bits());
        let outside = pages.end.saturating_sub(pages.start.max(self.bits()));
        self.outside = self.outside.saturating_add(outside);
        let pages = inside;
        for (word, mask) in word_masks(pages) {
            self.merge_word(word, mask);
        }
    }

    /// Removes all of `pages`.
    pub fn clear_range(&mut self, pages: Range<u64>) {
        let pages = pages.start.min(self.bits())..pages.end.min(self.bits());
        for (word, mask) in word_masks(pages) {
            self.remove(word, mask);
        }
    }

    /// Removes the pages of `bits` from word number `word`.
    fn remove(&mut self, word: usize, bits: u64) {
        self.words[word] &= !bits;
        if self.words[word] == 0 {
            self.summary[word / 64] &= !(1 << (word % 64));
        }
    }

    /// Adds the pages `word * 64 + i` for each bit `i` of `bits`: how a kernel's bitmap is merged in. Those of a `word` that is
    /// not below `bits() / 64` are left out and counted: see [`clip`](Self::clip).
    pub fn merge_word(&mut self, word: usize, bits: u64) {
        if bits == 0 {
            return;
        }
        match self.words.get_mut(word) {
            Some(found) => {
                *found |= bits;
                self.summary[word / 64] |= 1 << (word % 64);
            }
            None => self.outside = self.outside.saturating_add(bits.count_ones().into()),
        }
    }

    /// Removes the numbers that belong to no page of `layout`, which lie between two blocks. Returns how many these were, with those
    /// that were to be added since the last call and have no bit at all.
    pub fn clip(&mut self, layout: &Layout) -> u64 {
        let mut outside = std::mem::take(&mut self.outside);
        for block in layout.blocks() {
            let end = block.page_range().end;
            if let Some(word) = self.words.get_mut((end / 64) as usize).filter(|_| end % 64 != 0) {
                let none = *word & (!0 << (end % 64));
                outside = outside.saturating_add(none.count_ones().into());
                *word &= !none;
            }
        }
        outside
    }

    /// Adds all pages of `other`, which has as many bits. Those that there is no bit for are left out and counted: see
    /// [`clip`](Self::clip).
    pub fn merge(&mut self, other: &DirtyBitmap) {
        self.outside = self.outside.saturating_add(other.outside);
        for (word, bits) in other.nonzero_words() {
            self.merge_word(word, bits);
        }
    }

    /// Removes all pages of `other`, which has as many bits. Those that there is no bit for are left out.
    pub fn subtract(&mut self, other: &DirtyBitmap) {
        for (word, bits) in other.nonzero_words() {
            if word < self.words.len() {
                self.remove(word, bits);
            }
        }
    }

    /// Moves the pages that are also in `chosen` to `into`; all three have as many bits. Returns how many.
    pub(crate) fn move_chosen(&mut self, chosen: &DirtyBitmap, into: &mut DirtyBitmap) -> u64 {
        let mut moved = 0;
        for (word, bits) in chosen.nonzero_words() {
            let bits = self.words.get(word).map_or(0, |found| found & bits);
            if bits != 0 {
                self.remove(word, bits);
                into.merge_word(word, bits);
                moved += u64::from(bits.count_ones());
            }
        }
        moved
    }

    /// Removes all pages.
    pub fn clear(&mut self) {
        self.outside = 0;
        for index in 0..self.summary.len() {
            let mut bits = std::mem::take(&mut self.summary[index]);
            while bits != 0 {
                self.words[index * 64 + bits.trailing_zeros() as usize] = 0;
                bits &= bits - 1;
            }
        }
    }

    /// Whether `page` is in the set.
    pub fn contains(&self, page: u64) -> bool {
        self.words.get((page / 64) as usize).is_some_and(|word| word >> (page % 64) & 1 == 1)
    }

    /// Number of pages in the set.
    pub fn count(&self) -> u64 {
        self.nonzero_words().map(|(_, bits)| u64::from(bits.count_ones())).sum()
    }

    /// Whether no page is in the set.
    pub fn is_empty(&self) -> bool {
        self.nonzero_words().next().is_none()
    }

    /// The first page of the set that is `from` or later.
    pub fn next(&self, from: u64) -> Option<u64> {
        let mut word = (from / 64) as usize;
        let mut bits = self.words.get(word)? & (!0 << (from % 64));
        if bits == 0 {
            word = self.next_word(word + 1)?;
            bits = self.words[word];
        }
        Some(word as u64 * 64 + u64::from(bits.trailing_zeros()))
    }

    /// The first word that is not 0 and is number `from` or later.
    fn next_word(&self, from: usize) -> Option<usize> {
        let mut index = from / 64;
        let mut candidates = self.summary.get(index)? & (!0 << (from % 64));
        while candidates == 0 {
            index += 1;
            candidates = *self.summary.get(index)?;
        }
        Some(index * 64 + candidates.trailing_zeros() as usize)
    }

    /// All pages of the set, in order.
    pub fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        let mut from = 0;
        std::iter::from_fn(move || {
            let page = self.next(from)?;
            from = page + 1;
            Some(page)
        })
    }

    /// The words as they are, 64 pages each, lowest page in the lowest bit.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Takes up to `most` pages below `end` out of the set, beginning with the first at or after `from`, and puts their
    /// numbers behind `into`. Returns the number behind the last one taken.
    pub(crate) fn take(&mut self, from: u64, end: u64, most: usize, into: &mut Vec<u64>) -> u64 {
        let mut from = from;
        let mut left = most;
        while left > 0 {
            let Some(first) = self.next(from).filter(|&page| page < end) else { break };
            let word = (first / 64) as usize;
            let mut bits = self.words[word] & (!0 << (first % 64));
            if end < (first / 64 + 1) * 64 {
                bits &= (1 << (end % 64)) - 1;
            }
            let mut taken = 0;
            while bits != 0 && left > 0 {
                let bit = bits.trailing_zeros();
                into.push(word as u64 * 64 + u64::from(bit));
                bits &= bits - 1;
                taken |= 1 << bit;
                left -= 1;
                from = word as u64 * 64 + u64::from(bit) + 1;
            }
            self.remove(word, taken);
        }
        from
    }

    fn nonzero_words(&self) -> impl Iterator<Item = (usize, u64)> + '_ {
        self.summary.iter().enumerate().flat_map(move |(index, &summary)| {
            let mut left = summary;
            std::iter::from_fn(move || {
                if left == 0 {
                    return None;
                }
                let word = index * 64 + left.trailing_zeros() as usize;
                left &= left - 1;
                Some((word, self.words[word]))
            })
        })
    }
}

/// The words that `pages` lie in, each with the bits of the pages.
pub(crate) fn word_masks(pages: Range<u64>) -> impl Iterator<Item = (usize, u64)> {
    let mut from = pages.start;
    std::iter::from_fn(move || {
        if from >= pages.end {
            return None;
        }
        let word = from / 64;
        let end = pages.end.min((word + 1) * 64);
        let low = !0 << (from % 64);
        let high = !0 >> (63 - (end - 1) % 64);
        from = end;
        Some((word as usize, low & high))
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    /// A device that reports one page too many ended the VMM.
    #[test]
    fn numbers_that_belong_to_no_page_are_left_out_and_counted() {
        let name = |name: &str| multifd_proto::BlockName::new(name).unwrap();
        let layout = Layout::new(4096, [(name("a"), 3 * 4096), (name("b"), 64 * 4096)]).unwrap();
        let mut bitmap = DirtyBitmap::full(&layout);
        assert_eq!((bitmap.bits(), bitmap.clip(&layout)), (128, 0));
        bitmap.set(3);
        bitmap.set_range(60..66);
        bitmap.set(128);
        bitmap.set(u64::MAX);
        bitmap.set_range(127..u64::MAX);
        bitmap.merge_word(2, 0b101);
        bitmap.merge_word(usize::MAX, 1);
        let beyond = (u64::MAX - 128).saturating_add(1 + 1 + 2 + 1);
        assert_eq!(bitmap.clip(&layout), beyond.saturating_add(1 + 4));
        assert_eq!(bitmap, DirtyBitmap::full(&layout));
        bitmap.clear_range(127..u64::MAX);
        assert_eq!(bitmap.count(), 66);
    }

    use multifd_proto::BlockName;

    use super::*;

    fn layout(pages: &[u64]) -> Layout {
        let blocks =
            pages.iter().enumerate().map(|(i, pages)| (BlockName::new(&format!("b{i}")).unwrap(), pages * 4096));
        Layout::new(4096, blocks).unwrap()
    }

    /// A small generator, so that the comparison with the oracle is the same in every run.
    struct Steps(u64);

    impl Steps {
        fn below(&mut self, bound: u64) -> u64 {
            self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (self.0 >> 33) % bound
        }
    }

    #[test]
    fn agrees_with_a_plain_set() {
        let layout = layout(&[5000, 1, 70, 20_000]);
        let mut steps = Steps(7);
        for _ in 0..200 {
            let mut bitmap = DirtyBitmap::new(&layout);
            let mut oracle = BTreeSet::new();
            for _ in 0..steps.below(40) {
                let start = steps.below(layout.bits());
                let end = (start + steps.below(200)).min(layout.bits());
                if steps.below(4) == 0 {
                    bitmap.clear_range(start..end);
                    oracle.retain(|page| !(start..end).contains(page));
                } else {
                    bitmap.set_range(start..end);
                    oracle.extend(start..end);
                }
            }
            assert_eq!(bitmap.count(), oracle.len() as u64);
            assert_eq!(bitmap.is_empty(), oracle.is_empty());
            assert!(bitmap.iter().eq(oracle.iter().copied()));
            let (from, end) = (steps.below(layout.bits()), steps.below(layout.bits()));
            let most = steps.below(300) as usize;
            let expected: Vec<u64> =
                oracle.iter().copied().filter(|&page| page >= from && page < end).take(most).collect();
            let mut taken = Vec::new();
            bitmap.take(from, end, most, &mut taken);
            assert_eq!(taken, expected);
            oracle.retain(|page| !expected.contains(page));
            assert!(bitmap.iter().eq(oracle.iter().copied()));
            let (mut chosen, mut moved) = (DirtyBitmap::new(&layout), DirtyBitmap::new(&layout));
            chosen.set_range(from..(from + 500).min(layout.bits()));
            let expected: Vec<u64> = oracle.iter().copied().filter(|&page| chosen.contains(page)).collect();
            assert_eq!(bitmap.move_chosen(&chosen, &mut moved), expected.len() as u64);
            assert!(moved.iter().eq(expected));
            oracle.retain(|&page| !chosen.contains(page));
            assert!(bitmap.iter().eq(oracle.iter().copied()));
            assert_exact(&bitmap);
        }
    }

    #[track_caller]
    fn assert_exact(bitmap: &DirtyBitmap) {
        for (word, bits) in bitmap.words.iter().enumerate() {
            assert_eq!(bitmap.summary[word / 64] >> (word % 64) & 1 == 1, *bits != 0, "word {word}");
        }
    }

    /// The summary kept its bits when words became empty: after one round with all pages, each count of a terabyte without
    /// any read 32 MiB instead of 512 KiB.
    #[test]
    fn the_summary_names_the_words_with_pages_and_no_other_after_any_operation() {
        let layout = layout(&[5000, 1, 70, 20_000]);
        let mut steps = Steps(11);
        let mut bitmap = DirtyBitmap::full(&layout);
        for _ in 0..2000 {
            let start = steps.below(layout.bits());
            let range = start..(start + steps.below(300)).min(layout.bits());
            match steps.below(6) {
                0 => bitmap.set_range(range),
                1 => bitmap.clear_range(range),
                2 => bitmap.set(start),
                3 => {
                    bitmap.take(start, layout.bits(), steps.below(300) as usize, &mut Vec::new());
                }
                more => {
                    let mut other = DirtyBitmap::new(&layout);
                    other.set_range(range);
                    if more == 4 { bitmap.merge(&other) } else { bitmap.subtract(&other) }
                }
            }
            assert_exact(&bitmap);
        }
        bitmap.merge(&DirtyBitmap::full(&layout));
        bitmap.take(0, layout.bits(), usize::MAX, &mut Vec::new());
        assert_eq!(bitmap, DirtyBitmap::new(&layout), "nothing tells that it had pages");
    }

    #[test]
    fn full_has_every_page_and_no_other_bit() {
        let layout = layout(&[65, 1, 64]);
        let bitmap = DirtyBitmap::full(&layout);
        assert_eq!(bitmap.count(), 130);
        assert!(bitmap.iter().all(|page| layout.block_of(page).is_some()));
    }

    #[test]
    fn merge_and_subtract_are_the_set_operations() {
        let layout = layout(&[300]);
        let (mut a, mut b) = (DirtyBitmap::new(&layout), DirtyBitmap::new(&layout));
        a.set_range(10..200);
        b.set_range(150..300);
        let mut union = a.clone();
        union.merge(&b);
        assert!(union.iter().eq(10..300));
        union.subtract(&a);
        assert!(union.iter().eq(200..300));
        union.clear();
        assert!(union.is_empty());
        assert!(union.words().iter().all(|&word| word == 0));
    }

    #[test]
    fn a_set_for_the_claim_of_a_peer_is_as_large_as_any() {
        let layout = layout(&[5000, 70]);
        assert_eq!(DirtyBitmap::try_new(&layout).unwrap(), DirtyBitmap::new(&layout));
    }

    #[test]
    fn single_pages_are_the_pages_of_the_set() {
        let layout = layout(&[5000]);
        let mut bitmap = DirtyBitmap::new(&layout);
        let pages = [0, 1, 63, 64, 200, 4095, 4096, 4999];
        pages.iter().for_each(|&page| bitmap.set(page));
        assert!(bitmap.iter().eq(pages));
        assert!(pages.iter().all(|&page| bitmap.next(page) == Some(page)));
        assert_eq!(bitmap.words()[..4], [1 << 63 | 0b11, 1, 0, 1 << (200 - 192)]);
        assert_eq!(bitmap.words().len() as u64 * 64, bitmap.bits());
        bitmap.clear();
        assert_eq!(bitmap, DirtyBitmap::new(&layout));
    }

    /// The number behind them may be of a page, too.
    #[test]
    fn pages_are_taken_up_to_the_end_and_not_with_it() {
        let layout = layout(&[200]);
        for end in [8, 10, 64, 100, 128] {
            let mut bitmap = DirtyBitmap::full(&layout);
            let mut taken = Vec::new();
            assert_eq!(bitmap.take(8, end, usize::MAX, &mut taken), end);
            assert!(taken.into_iter().eq(8..end));
            assert_eq!(bitmap.next(8), Some(end));
        }
    }

    /// A block of whole words ends where the next one begins, and no number lies between.
    #[test]
    fn blocks_of_whole_words_keep_the_pages_behind_them() {
        let layout = layout(&[64, 128, 3]);
        let mut bitmap = DirtyBitmap::full(&layout);
        assert_eq!(bitmap.clip(&layout), 0);
        assert_eq!(bitmap, DirtyBitmap::full(&layout));
    }
}
