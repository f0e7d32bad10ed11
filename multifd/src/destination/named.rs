//! Which pages main has named, where that is the only evidence that none is missing.
//!
//! A stream without channels says nothing of what it left out until its END section of `ram`, and a background snapshot has no
//! such section. What is known of it is what it named: it is complete if it named every page of every block, and of one instant
//! only if it named none twice.

use std::io;

use crate::{dirty_bitmap::DirtyBitmap, error::Mismatch, layout::Layout};

/// The pages that main has named so far.
pub(super) struct NamedPages {
    pages: DirtyBitmap,
    /// How often a page was named that had been named before.
    again: u64,
}

impl NamedPages {
    /// None of the pages of `layout`, which may be a claim of a peer.
    ///
    /// # Errors
    /// There is no room for a bit for each of them.
    pub(super) fn new(layout: &Layout) -> io::Result<NamedPages> {
        Ok(NamedPages { pages: DirtyBitmap::try_new(layout)?, again: 0 })
    }

    /// Main has named `page`.
    pub(super) fn name(&mut self, page: u64) {
        if self.pages.contains(page) {
            self.again += 1;
        }
        self.pages.set(page);
    }

    /// The pages that were named.
    pub(super) fn pages(&self) -> &DirtyBitmap {
        &self.pages
    }

    /// How many pages were named.
    pub(super) fn count(&self) -> u64 {
        self.pages.count()
    }

    /// Verifies that every page of `layout` was named exactly once.
    ///
    /// # Errors
    /// [`Mismatch::SnapshotIncomplete`].
    pub(super) fn verify_each_once(&self, layout: &Layout) -> Result<(), Mismatch> {
        let (pages, named, again) = (layout.pages(), self.count(), self.again);
        if (named, again) == (pages, 0) {
            return Ok(());
        }
        Err(Mismatch::SnapshotIncomplete { missing: pages - named, pages, again })
    }
}
