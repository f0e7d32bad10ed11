//! The rounds while the guest runs: what is sent, and what is dirty then.

use std::{io, time::Duration};

use super::{Run, Untouched};
use crate::{
    dirty_bitmap::DirtyBitmap,
    error::Error,
    progress::{Event, Observer, RoundStats},
    round::trace::Step,
    vm::{SourceVm, Throttled},
};

impl Run {
    /// Switches dirty tracking on and returns the pages of round 0: all of them, but for those never touched where the
    /// destination needs not be told.
    pub(super) fn start_tracking(&mut self, vm: &mut dyn SourceVm) -> Result<DirtyBitmap, Error> {
        self.report.dirty_log = vm.dirty_log().name();
        let ram = self.shared.ram.clone();
        if self.all_is_handed_over() {
            self.shared.scan.set_zeros(None);
            self.rounds_begun = self.now();
            return Ok(DirtyBitmap::new(ram.layout()));
        }
        self.tracking = true;
        if !self.tracking_starts_late() {
            vm.dirty_log().start(&ram).map_err(Error::dirty_log)?;
        }
        let mut dirty = DirtyBitmap::full(ram.layout());
        let mut untouched = DirtyBitmap::new(ram.layout());
        if let Err(error) = vm.untouched(&mut untouched) {
            tracing::warn!(%error, "which pages were never touched is not known: all are sent");
            untouched.clear();
        }
        untouched.clip(ram.layout());
        self.leave_out_handed_over(&mut dirty);
        self.leave_out_handed_over(&mut untouched);
        match self.shared.options.format.untouched {
            Untouched::Skip => {
                dirty.subtract(&untouched);
                self.report.skipped = untouched.count();
                self.shared.progress.add_skipped(self.report.skipped);
                self.shared.scan.set_zeros(None);
            }
            Untouched::Name => self.shared.scan.set_zeros(Some(untouched)),
        }
        self.rounds_begun = self.now();
        Ok(dirty)
    }

    /// Sends all pages of `dirty` while the guest runs, then puts those written meanwhile into it.
    pub(super) fn round(&mut self, dirty: &mut DirtyBitmap, vm: &mut dyn SourceVm) -> Result<(), Error> {
        self.exclude(dirty, vm)?;
        let mut stats = self.open_round(dirty, true);
        let begun = self.now();
        self.begin_peeking();
        loop {
            let pages = self.section_budget();
            self.main().ram_part()?;
            let section_begun = self.now();
            self.section(pages, Some(&mut *vm))?;
            self.measure_section(pages, self.now() - section_begun);
            if self.shared.scan.is_empty() {
                break;
            }
            self.shared.options.trace.step(|| Step::Section);
        }
        stats.barrier = self.shared.progress.barrier_age();
        self.end_to_spread();
        self.save_live(vm)?;
        // Zeros known from the beginning say nothing about what was written since.
        self.shared.scan.set_zeros(None);
        stats.took = self.now() - begun;
        if self.tracking_starts_late() && self.rounds == 0 {
            let ram = self.shared.ram.clone();
            vm.dirty_log().start(&ram).map_err(Error::dirty_log)?;
        }
        self.shared.scan.take_postponed(dirty);
        self.drain(dirty, vm)?;
        stats.dirty_after = dirty.count();
        self.close_round(stats);
        Ok(())
    }

    /// Adds the pages that were written to `dirty`. Numbers that belong to no page are left out, counted, and once warned of.
    pub(super) fn drain(&mut self, dirty: &mut DirtyBitmap, vm: &mut dyn SourceVm) -> Result<(), Error> {
        if self.all_is_handed_over() {
            return Ok(());
        }
        vm.dirty_log().drain(dirty).map_err(Error::dirty_log)?;
        if dirty.bits() != self.shared.ram.layout().bits() {
            // A channel would be given a page that lies behind all blocks.
            let text = "it has put a set of another size in the place of the one that it adds to";
            return Err(Error::dirty_log(io::Error::other(text)));
        }
        let outside = dirty.clip(self.shared.ram.layout());
        if outside > 0 && self.report.dirty_outside == 0 {
            let log = self.report.dirty_log;
            tracing::warn!(log, outside, "the dirty log reports pages that the VM does not have: they are left out");
        }
        self.report.dirty_outside += outside;
        self.leave_out_handed_over(dirty);
        self.leave_out_excluded(dirty);
        Ok(())
    }

    /// Only in tests: see [`Broken`](crate::testing::broken::Broken).
    #[cfg(any(test, feature = "__broken-variants"))]
    fn tracking_starts_late(&self) -> bool {
        self.shared.options.broken == Some(crate::testing::broken::Broken::TrackingStartsLate)
    }

    #[cfg(not(any(test, feature = "__broken-variants")))]
    const fn tracking_starts_late(&self) -> bool {
        false
    }

    pub(super) fn throttle(&mut self, percent: u8, vm: &mut dyn SourceVm, observer: &mut dyn Observer) {
        match vm.throttle(percent) {
            Throttled::Applied => {
                self.report.throttle = percent;
                observer.event(&Event::Throttle(percent));
            }
            Throttled::Unsupported => self.convergence.throttle_unsupported(),
        }
    }

    pub(super) fn does_not_converge(&self, dirty: &DirtyBitmap) -> Error {
        let left = self.left_now(dirty);
        Error::DoesNotConverge {
            rounds: self.rounds,
            seconds: (self.now() - self.rounds_begun).as_secs_f64(),
            remaining: left.dirty,
            bytes_per_second: self.convergence.bytes_per_second(),
            expected_downtime_ms: self.convergence.expected_downtime(&left).as_secs_f64() * 1e3,
            downtime_limit_ms: self.shared.live.get().limits.downtime.as_secs_f64() * 1e3,
        }
    }

    pub(super) fn open_round(&mut self, dirty: &mut DirtyBitmap, guest_running: bool) -> RoundStats {
        let round = self.rounds;
        self.shared.options.trace.step(|| Step::Drain(dirty.iter().collect()));
        let dirty_pages = self.shared.scan.load(dirty);
        self.shared.progress.open_round(round, dirty_pages);
        let before = self.shared.progress.snapshot();
        RoundStats {
            round,
            dirty_pages,
            // Totals so far, to be subtracted when the round is over.
            normal: before.normal,
            zero: before.zero,
            postponed: before.postponed,
            bytes: before.bytes(),
            took: Duration::ZERO,
            barrier: Duration::ZERO,
            guest_running,
            dirty_after: 0,
            expected_downtime: Duration::ZERO,
            throttle: self.report.throttle,
        }
    }

    pub(super) fn close_round(&mut self, mut stats: RoundStats) {
        let now = self.shared.progress.snapshot();
        stats.normal = now.normal - stats.normal;
        stats.zero = now.zero - stats.zero;
        stats.postponed = now.postponed - stats.postponed;
        stats.bytes = now.bytes() - stats.bytes;
        tracing::debug!(?stats, "round");
        self.rounds += 1;
        self.report.rounds_total += 1;
        self.report.rounds_took += stats.took;
        stats.keep_in(&mut self.report.rounds);
    }
}
