//! The pages that were discarded at the switch to postcopy: each has to come again, exactly once.
//!
//! This is the account of the third law at a destination that takes every page before anything runs on it. A page is placed at
//! most once after the hand-over, whichever connection brings it, and the memory is whole when none is missing.

use std::{io, ops::Range};

use multifd_proto::Violation;

use crate::{
    dirty_bitmap::{DirtyBitmap, word_masks},
    layout::{BlockLayout, Layout},
};

/// The account of one switch.
pub(crate) struct Discarded {
    missing: DirtyBitmap,
    /// How many pages were discarded, and how many of them have come.
    pages: u64,
    came: u64,
}

impl Discarded {
    /// Nothing of `layout`, which may be a claim of a peer, is discarded yet.
    ///
    /// # Errors
    /// There is no room for a bit for each page.
    pub(crate) fn new(layout: &Layout) -> io::Result<Discarded> {
        Ok(Discarded { missing: DirtyBitmap::try_new(layout)?, pages: 0, came: 0 })
    }

    /// The source has discarded the bytes `range` of `block`, which are whole pages inside it. Returns their page numbers.
    ///
    /// A page is discarded at most once, so all ranges together cost no more than the memory has pages.
    ///
    /// # Errors
    /// [`Violation::DiscardedTwice`].
    pub(crate) fn discard(&mut self, block: &BlockLayout, range: &Range<u64>) -> Result<Range<u64>, Violation> {
        let len = range.end - range.start;
        let first = block.page_at(range.start);
        let pages = first..first + len / (block.bytes() / block.pages());
        if word_masks(pages.clone()).any(|(word, mask)| self.missing.words()[word] & mask != 0) {
            return Err(Violation::DiscardedTwice { block: block.name().clone(), start: range.start });
        }
        self.pages += pages.end - pages.start;
        self.missing.set_range(pages.clone());
        Ok(pages)
    }

    /// The page at `offset` of `block` comes.
    ///
    /// # Errors
    /// [`Violation::PageNotMissing`].
    pub(crate) fn claim(&mut self, block: &BlockLayout, offset: u64) -> Result<(), Violation> {
        let page = block.page_at(offset);
        if !self.missing.contains(page) {
            return Err(Violation::PageNotMissing { block: block.name().clone(), offset });
        }
        self.missing.clear_range(page..page + 1);
        self.came += 1;
        Ok(())
    }

    /// Whether page number `page` was discarded and has not come.
    pub(crate) fn lacks(&self, page: u64) -> bool {
        self.missing.contains(page)
    }

    /// How many pages were discarded.
    pub(crate) fn pages(&self) -> u64 {
        self.pages
    }

    /// How many of them have not come.
    pub(crate) fn missing(&self) -> u64 {
        self.pages - self.came
    }

    /// Whether every page of `layout` is one that was discarded or is in `named`. To be asked before any has come.
    pub(crate) fn covers_with(&self, named: Option<&DirtyBitmap>, layout: &Layout) -> bool {
        let mut all = self.missing.clone();
        if let Some(named) = named {
            all.merge(named);
        }
        all.count() == layout.pages()
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use multifd_proto::BlockName;

    use super::*;

    const PAGE: u64 = 4096;

    fn layout() -> Layout {
        let blocks = [("ram", 200), ("rom", 3)];
        Layout::new(PAGE as usize, blocks.map(|(name, pages)| (BlockName::new(name).unwrap(), pages * PAGE))).unwrap()
    }

    #[test]
    fn every_discarded_page_comes_exactly_once() {
        let layout = layout();
        let [ram, rom] = layout.blocks() else { panic!("two blocks") };
        let mut discarded = Discarded::new(&layout).unwrap();
        assert_eq!(discarded.discard(ram, &(2 * PAGE..5 * PAGE)), Ok(2..5));
        discarded.discard(ram, &(100 * PAGE..200 * PAGE)).unwrap();
        discarded.discard(rom, &(0..3 * PAGE)).unwrap();
        assert_eq!((discarded.pages(), discarded.missing()), (106, 106));
        let refused =
            |block: &BlockLayout, offset| Err(Violation::PageNotMissing { block: block.name().clone(), offset });
        assert_eq!(discarded.claim(ram, PAGE), refused(ram, PAGE), "it was not discarded");
        assert!(!discarded.lacks(1) && !discarded.lacks(5));
        for page in (2..5).chain(100..200) {
            assert!(discarded.lacks(page));
            discarded.claim(ram, page * PAGE).unwrap();
            assert!(!discarded.lacks(page));
            assert_eq!(discarded.claim(ram, page * PAGE), refused(ram, page * PAGE), "it has come");
        }
        for page in 0..3 {
            assert_eq!(discarded.missing(), 3 - page);
            discarded.claim(rom, page * PAGE).unwrap();
        }
        assert_eq!(discarded.missing(), 0);
    }

    /// Sixteen bytes on the wire may not have the destination look at all of its memory again and again.
    #[test]
    fn a_page_is_discarded_once() {
        let layout = layout();
        let ram = &layout.blocks()[0];
        for again in [0..200, 199..200, 0..1, 50..60] {
            let mut discarded = Discarded::new(&layout).unwrap();
            discarded.discard(ram, &(0..200 * PAGE)).unwrap();
            let start = again.start * PAGE;
            let refused = Err(Violation::DiscardedTwice { block: ram.name().clone(), start });
            assert_eq!(discarded.discard(ram, &(start..again.end * PAGE)), refused);
        }
    }

    #[test]
    fn pages_that_were_named_and_those_that_were_discarded_are_all_there_are() {
        let layout = layout();
        let [ram, rom] = layout.blocks() else { panic!("two blocks") };
        let mut discarded = Discarded::new(&layout).unwrap();
        discarded.discard(ram, &(0..199 * PAGE)).unwrap();
        discarded.discard(rom, &(0..3 * PAGE)).unwrap();
        assert!(!discarded.covers_with(None, &layout));
        let mut named = DirtyBitmap::new(&layout);
        named.set(5);
        assert!(!discarded.covers_with(Some(&named), &layout));
        named.set(199);
        assert!(discarded.covers_with(Some(&named), &layout));
    }
}
