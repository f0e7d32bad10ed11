//! Sections of RAM, each of which ends with a sync point.

use std::time::Duration;

use multifd_proto::{
    machine::{Dialect, ZeroPages},
    rounds::Party,
};

use super::{Flush, Run};
use crate::{error::Error, round::trace::Step, sync::lock, vm::SourceVm};

impl Run {
    /// One section, behind its head: opens the scan for `pages`, ends with a sync point and the footer. `guest` is given where it runs
    /// and a later round follows: what it writes again meanwhile may wait for that.
    pub(super) fn section(&mut self, pages: u64, guest: Option<&mut dyn SourceVm>) -> Result<(), Error> {
        let early =
            self.shared.options.qemu.flush == Flush::Early && self.shared.options.qemu.zero_pages != ZeroPages::Legacy;
        let per_round = self.shared.options.qemu.dialect == Dialect::PerRound;
        self.shared.scan.allow(pages);
        self.shared.progress.open_section();
        self.meet()?;
        if per_round && early {
            self.shared.options.trace.step(|| Step::Flush);
            self.main().flush_word()?;
        }
        match self.shared.options.is_main_alone() {
            true => self.send_pages_on_main(guest)?,
            // Every channel has sent its SYNC.
            false => self.gather(guest)?,
        }
        self.name_zeros()?;
        if !(per_round && early) {
            self.shared.options.trace.step(|| Step::Flush);
        }
        if per_round && !early {
            self.main().flush_word()?;
        }
        self.main().section_end()
    }

    /// Names the zero pages that the channels found, in legacy mode.
    fn name_zeros(&mut self) -> Result<(), Error> {
        let shared = self.shared.clone();
        if let Some(zeros) = &mut *lock(&shared.legacy_zeros) {
            shared.options.trace.step(|| Step::Name(zeros.iter().collect()));
            self.main().zero_words(zeros)?;
            zeros.clear();
        }
        Ok(())
    }

    /// Meets all channels at the barrier.
    pub(super) fn meet(&mut self) -> Result<(), Error> {
        let at = self.main().place();
        self.shared.barrier.meet(Party::Main, at).map(drop)
    }

    pub(super) fn section_budget(&self) -> u64 {
        match self.shared.options.qemu.dialect {
            Dialect::PerRound => u64::MAX,
            Dialect::PerSection => self.section_pages,
        }
    }

    /// Sizes the next section of the per-section dialect so that it takes as long as the options say.
    pub(super) fn measure_section(&mut self, pages: u64, took: Duration) {
        if pages == u64::MAX || took.is_zero() {
            return;
        }
        let ideal = pages as f64 * self.shared.options.qemu.section_time.as_secs_f64() / took.as_secs_f64();
        // At most doubled, so that one section of zero pages does not open the next one for seconds of content.
        self.section_pages =
            (ideal as u64).clamp(FIRST_SECTION_PAGES / 4, pages.saturating_mul(2).max(FIRST_SECTION_PAGES));
    }
}

/// 32 MiB of 4 KiB pages: what a first section sends before any speed was measured.
pub(super) const FIRST_SECTION_PAGES: u64 = 8192;
