//! The switchover: the guest is paused, and what is left of it is sent.

use super::Run;
use crate::{
    dirty_bitmap::DirtyBitmap,
    error::Error,
    progress::{Event, Observer},
    pulse::Pulse,
    sections::Sections,
    sync::atomic::Ordering,
    vm::SourceVm,
};

impl Run {
    /// From here on, memory does not change.
    pub(super) fn pause(&mut self, vm: &mut dyn SourceVm) -> Result<(), Error> {
        if self.shared.stop.is_stopped() {
            return Err(Error::Stopped);
        }
        self.paused_at = self.now();
        self.paused = true;
        // From here on the limit of the pause bounds every wait.
        Pulse::rest(self.watchdog.timers());
        self.shared.live.pause_limit.begin(self.watchdog.timers());
        vm.pause().map_err(Error::vm("pause"))?;
        self.report.downtime.pause = self.now() - self.paused_at;
        Ok(())
    }

    /// A round like any other, with the guest paused: the pages still left, and those written until the pause.
    pub(super) fn last_round(
        &mut self,
        dirty: &mut DirtyBitmap,
        vm: &mut dyn SourceVm,
        observer: &mut dyn Observer,
    ) -> Result<(), Error> {
        let drain_begun = self.now();
        self.drain(dirty, vm)?;
        let begun = self.now();
        self.report.downtime.drain = begun - drain_begun;
        // The limit protects other traffic from a long migration; the pause is short and the guest waits.
        self.shared.live.limiter.set_unlimited();
        let mut stats = self.open_round(dirty, false);
        self.main().switchover_start()?;
        self.main().ram_end()?;
        self.section(u64::MAX)?;
        stats.took = self.now() - begun;
        stats.barrier = self.shared.progress.barrier_age();
        self.report.downtime.last_round = stats.took;
        self.close_round(stats);
        if let Some(last) = self.report.rounds.last() {
            observer.event(&Event::Round(last.clone()));
        }
        self.end_channels()
    }

    /// The channels have nothing more to send. Their connections stay open: an early end would look like a failure.
    fn end_channels(&mut self) -> Result<(), Error> {
        self.shared.finished.store(true, Ordering::Release);
        self.meet()?;
        for channel in self.channels.drain(..) {
            self.ended.push(channel.join()??);
        }
        Ok(())
    }

    /// Sends the state of vCPUs and devices, up to the last byte that may still be taken back.
    pub(super) fn devices(&mut self, vm: &mut dyn SourceVm) -> Result<(), Error> {
        let begun = self.now();
        let mut sections = Sections::new();
        vm.save(&mut sections).map_err(Error::vm("save its state"))?;
        self.main().sections(sections)?;
        self.report.downtime.devices = self.now() - begun;
        Ok(())
    }
}
