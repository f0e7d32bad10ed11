//! A recovery: asks the destination which pages it has, and takes that for what was sent.

use multifd_proto::command::Command;

use super::{link::Link, trace::HandOver};
#[cfg(any(test, feature = "__broken-variants"))]
use crate::testing::broken::Broken;
use crate::{error::Error, progress::Phase, sync::Deadline};

impl Link<'_> {
    /// Everything up to the moment at which pages are sent again. There is no header on such a connection: it begins with
    /// RECV_BITMAP for each block.
    pub(super) fn recover(&mut self) -> Result<(), Error> {
        let job = self.job().clone();
        self.connect_main()?;
        self.set_phase(Phase::Setup);
        let blocks = job.pages.layout().blocks();
        self.inbox().update(|mail| {
            mail.bitmaps_due = blocks.len();
            mail.run_sent = true;
        });
        for block in blocks {
            self.main().encoder().command(&Command::RecvBitmap { block: block.name().clone() });
        }
        self.main().send()?;
        self.connect_preempt()?;
        self.inbox().wait(Deadline::after(None), |mail| mail.bitmaps_due == 0)?;
        let received = self.inbox().update(|mail| std::mem::take(&mut mail.received));
        for (block, bitmap) in blocks.iter().zip(&received) {
            #[cfg(any(test, feature = "__broken-variants"))]
            if job.options.broken == Some(Broken::SourceKeepsItsBits) {
                break;
            }
            job.claims.set_received(block.page_range(), bitmap);
        }
        job.step(|| {
            let claimed = |&page: &u64| job.claims.contains(page);
            HandOver::Bits(blocks.iter().flat_map(|block| block.page_range()).filter(claimed).collect())
        });
        job.figures.set_lacking(job.claims.count_free(job.pages.present()));
        self.is_told_what_is_left();
        self.job().pages.check_unchanged()?;
        // Requests for pages that are claimed are not answered: only from here on they are right.
        self.answer_on_preempt()?;
        self.main().encoder().command(&Command::PostcopyResume);
        self.main().send()?;
        self.inbox().wait(Deadline::after(None), |mail| mail.is_resumed).map(drop)
    }
}
