//! Pages that the guest writes again before they are sent wait for the next round.
//!
//! While the channels send a round, main looks into the dirty log now and then ([`DirtyLog::peek`](crate::dirty::DirtyLog::peek)) and
//! takes out of the scan what was written again since the last drain. Such a page has to be sent in the next round whatever happens in this
//! one, so to send it now is in vain. A guest that writes a small part of its memory most of the time costs little more than that part,
//! and once, with the guest paused.
//!
//! **It loses nothing**, with any peer and any log. A page that waits stays a part of the source's dirty set: it is among the pages of the
//! next round, whether the next drain reports it or not, and is read after that drain. To the destination it is a page that was not dirty in
//! this round. In the last round none waits: no round would follow.
//!
//! **It starves none.** The drain at the end of the round re-arms the page, so it waits again only if it is written again. Each round sends
//! for [`PEEK_EVERY`] before any page waits.

use std::time::Duration;

use super::Run;
use crate::{dirty_bitmap::DirtyBitmap, error::Error, sync::Deadline, vm::SourceVm};

/// When main looks into the dirty log of a round.
pub(super) struct Peeking {
    /// Not before.
    due: Deadline,
    /// The log has failed at it.
    failed: bool,
    /// What it said last; kept for its memory.
    written: Option<DirtyBitmap>,
}

impl Default for Peeking {
    /// Never.
    fn default() -> Peeking {
        Peeking { due: Deadline::after(None), failed: false, written: None }
    }
}

impl Run {
    /// A round begins, of which no page was written again so far.
    pub(super) fn begin_peeking(&mut self) {
        self.peeking.due = Deadline::after(Some(self.shared.options.peek_every));
    }

    /// Waits until every channel has sent its SYNC. Meanwhile pages that `guest` writes again are taken out of the round.
    pub(super) fn gather(&mut self, guest: Option<&mut dyn SourceVm>) -> Result<(), Error> {
        // Where all memory is handed over, the log is not switched on.
        let looks = !self.peeking.failed && !self.all_is_handed_over();
        let Some(guest) = guest.filter(|_| looks) else { return self.shared.barrier.gather() };
        while !self.shared.barrier.gather_until(self.peeking.due)? {
            self.postpone(guest);
        }
        Ok(())
    }

    /// Takes the pages that `guest` has written again out of the round, if it is time to look for them.
    pub(super) fn postpone_when_due(&mut self, guest: &mut dyn SourceVm) {
        if self.peeking.due.is_over() && !self.peeking.failed && !self.all_is_handed_over() {
            self.postpone(guest);
        }
    }

    fn postpone(&mut self, guest: &mut dyn SourceVm) {
        let begun = self.now();
        let written = self.peeking.written.get_or_insert_with(|| DirtyBitmap::new(self.shared.ram.layout()));
        written.clear();
        match guest.dirty_log().peek(written) {
            Ok(()) => {
                let pages = self.shared.scan.postpone(written);
                self.shared.progress.add_postponed(pages);
                // A look at a large guest may take a while, and its vCPUs may feel it.
                let took = self.now() - begun;
                self.peeking.due = Deadline::after(Some(self.shared.options.peek_every.max(took * 20)));
            }
            Err(error) => {
                tracing::warn!(%error, "the dirty log cannot be looked into while a round is sent: pages may be sent in vain");
                self.peeking.failed = true;
                self.peeking.due = Deadline::after(None);
            }
        }
    }
}

/// Shorter rounds send all of their pages.
pub(super) const PEEK_EVERY: Duration = Duration::from_millis(100);
