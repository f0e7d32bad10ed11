//! The switchover: the guest is paused, and what is left of it is sent.

use std::{cell::Cell, io};

use super::{
    Run,
    backlog::{CHANNELS_TIMER, NEAR},
    state_queue::{KeptState, QueuedState},
};
use crate::{
    dirty_bitmap::DirtyBitmap,
    error::Error,
    progress::{Event, Observer},
    pulse::Pulse,
    sections::{Packing, Sections},
    sync::atomic::Ordering,
    vm::{SourceVm, VmError, check_memory},
};

/// Sections that were not sent yet, and the vmdescription.
pub(super) type Saved = (Vec<u8>, Vec<u8>);

/// What was saved before the last pages, and state that goes over the channels.
pub(super) type SavedFirst = (Saved, KeptState);

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
        self.watchdog.timers().clear(CHANNELS_TIMER);
        self.shared.live.pause_limit.begin(self.watchdog.timers());
        vm.pause().map_err(Error::vm("pause"))?;
        check_memory(&self.shared.ram, vm.ram())?;
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
        self.exclude(dirty, vm)?;
        let begun = self.now();
        self.report.downtime.drain = begun - drain_begun;
        // The limit protects other traffic from a long migration; the pause is short and the guest waits.
        self.shared.live.limiter.set_unlimited();
        let mut stats = self.open_round(dirty, false);
        self.main().switchover_start()?;
        self.main().ram_end()?;
        self.shared.last_section.store(true, Ordering::Release);
        // Nothing is written, and no round follows for what would wait.
        self.section(u64::MAX, None)?;
        stats.took = self.now() - begun;
        stats.barrier = self.shared.progress.barrier_age();
        self.report.downtime.last_round = stats.took;
        self.close_round(stats);
        if let Some(last) = self.report.rounds.last() {
            observer.event(&Event::Round(last.clone()));
        }
        self.end_sections()
    }

    /// The channels have no more pages to send. They may have device state.
    fn end_sections(&mut self) -> Result<(), Error> {
        self.shared.finished.store(true, Ordering::Release);
        let may_have_state = self.sends_state_packets();
        if !may_have_state {
            self.shared.state.close();
        }
        self.meet()?;
        if may_have_state { Ok(()) } else { self.end_channels() }
    }

    /// The channels have nothing more to send. Their connections stay open: an early end would look like a failure.
    fn end_channels(&mut self) -> Result<(), Error> {
        // One that is not joined here, because another has failed, is joined at the end.
        while !self.channels.is_empty() {
            let channel = self.channels.remove(0);
            self.ended.push(channel.join()??);
        }
        Ok(())
    }

    /// Asks a VM for its state that writes memory meanwhile: before the last drain, which reports these writes.
    pub(super) fn save_first(&mut self, vm: &mut dyn SourceVm) -> Result<Option<SavedFirst>, Error> {
        if !vm.save_writes_memory() {
            return Ok(None);
        }
        let begun = self.now();
        let mut kept = KeptState::default();
        let mut sections = Sections::kept(self.terms());
        if let Some(packing) = self.packing() {
            sections = sections.with_packets(&mut kept, packing);
        }
        let saved = vm.save(&mut sections).and_then(|()| Ok(sections.into_parts(self.page_size())?));
        self.report.downtime.devices = self.now() - begun;
        saved.map(|saved| Some((saved, kept))).map_err(Error::vm("save its state"))
    }

    /// Sends the state of vCPUs and devices, which may have been `saved`, up to the last byte that may still be taken back.
    pub(super) fn devices(&mut self, vm: &mut dyn SourceVm, saved: Option<SavedFirst>) -> Result<(), Error> {
        let begun = self.now();
        let (rest, vmdescription) = match saved {
            Some((saved, kept)) => {
                // All of them, before main speaks of any: the channels take them while it does.
                self.shared.state.add_all(kept);
                saved
            }
            None => self.save(vm)?,
        };
        self.shared.state.told();
        self.main().sections(&rest, vmdescription)?;
        if self.sends_state_packets() {
            self.shared.state.close();
            self.end_channels()?;
        }
        self.report.downtime.devices += self.now() - begun;
        Ok(())
    }

    /// Asks the VM for its state and sends it piece by piece. Returns what was not sent, and the vmdescription.
    fn save(&mut self, vm: &mut dyn SourceVm) -> Result<Saved, Error> {
        let packing = self.packing();
        let ((), saved) = self.send_sections("save its state", u64::MAX, packing, |out| vm.save(out))?;
        Ok(saved)
    }

    /// What of the state goes over the channels, if any of it may.
    fn packing(&self) -> Option<Packing> {
        let by_distance = || if self.shared.backlog.distance() < NEAR { Packing::NEAR } else { Packing::FAR };
        self.sends_state_packets().then(by_distance)
    }

    /// Has `add` add sections of at most `room` bytes of state, and sends them piece by piece, by `packing` on the channels.
    /// Returns what it returned, and what was not sent. `what` is what the VM is asked for.
    pub(super) fn send_sections<R>(
        &mut self,
        what: &'static str,
        room: u64,
        packing: Option<Packing>,
        add: impl FnOnce(&mut Sections<'_>) -> Result<R, VmError>,
    ) -> Result<(R, Saved), Error> {
        let (page_size, terms) = (self.page_size(), self.terms());
        let shared = self.shared.clone();
        let limiter = &shared.live.limiter;
        let main = self.main();
        let failure = Cell::new(None);
        let mut send = |piece: &[u8]| {
            limiter.take(piece.len() as u64);
            main.raw(piece).map_err(|error| {
                let source = io::Error::other(error.to_string());
                failure.set(Some(error));
                source
            })
        };
        let mut packets = QueuedState { queue: &shared.state, failure: &failure };
        let mut sections = Sections::sent(terms, &mut send).with_room(room);
        if let Some(packing) = packing {
            sections = sections.with_packets(&mut packets, packing);
        }
        let added = add(&mut sections).and_then(|added| Ok((added, sections.into_parts(page_size)?)));
        // What the VM ran into was a connection.
        match failure.take() {
            Some(error) => Err(error),
            None => added.map_err(Error::vm(what)),
        }
    }

    fn page_size(&self) -> usize {
        self.shared.ram.layout().page_size()
    }
}
