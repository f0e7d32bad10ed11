//! Memory that must not be read: [`SourceVm::excluded`].
//!
//! The VM is asked before each round, also before the last one. An excluded page is not read, whatever the log says of it, and
//! is zero at the destination: it is left out of round 0, as a page that was never touched is, and named as zero where an earlier round has
//! sent it. When it is in use again, it is a dirty page, so that the log need not have seen what was written to it meanwhile. The last round
//! has a set of its own, which is asked for when memory does not change any more: so the tracking law holds for all pages that are in use
//! at the end, and the others have no contents to be lost.

use super::{Run, Untouched};
use crate::{dirty_bitmap::DirtyBitmap, error::Error, vm::SourceVm};

/// The pages that were excluded in the round before; `None` where there were none.
pub(super) type Excluded = Option<DirtyBitmap>;

impl Run {
    /// Takes the pages that the VM excludes from the round that is about to begin out of `dirty`, and those that it excludes no longer
    /// into it.
    pub(super) fn exclude(&mut self, dirty: &mut DirtyBitmap, vm: &mut dyn SourceVm) -> Result<(), Error> {
        if self.all_is_handed_over() {
            return Ok(());
        }
        let layout = self.shared.ram.layout();
        let mut now = DirtyBitmap::new(layout);
        vm.excluded(&mut now).map_err(Error::vm("say which memory is not to be read"))?;
        now.clip(layout);
        let before = self.excluded.take();
        if before.is_none() && now.is_empty() {
            return Ok(());
        }
        let mut added = now.clone();
        if let Some(before) = before {
            let mut back = before.clone();
            back.subtract(&now);
            dirty.merge(&back);
            added.subtract(&before);
        }
        dirty.subtract(&now);
        if self.rounds > 0 || self.shared.options.format.untouched == Untouched::Name {
            // The destination may have contents of them, or wants to hear of every page.
            self.shared.scan.add_zeros(&added);
            dirty.merge(&added);
        }
        self.leave_out_handed_over(dirty);
        self.report.excluded = now.count();
        self.excluded = Some(now);
        Ok(())
    }

    /// Takes the pages out of `dirty` that are excluded until the VM is asked again: they are not waited for. One that is in use again then
    /// is added, whether the log has reported it or not.
    pub(super) fn leave_out_excluded(&self, dirty: &mut DirtyBitmap) {
        if let Some(excluded) = &self.excluded {
            dirty.subtract(excluded);
        }
    }
}
