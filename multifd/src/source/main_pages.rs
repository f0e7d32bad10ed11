//! Pages that main carries, where there are no channels.
//!
//! The stream is what a QEMU sends without multifd: each section of RAM has pages and ends with a sync point, and all of it comes in
//! order on one connection. So the round law holds by the connection alone: what was sent in one round is in place before anything
//! of the next is read. To the account of rounds it is a migration with no channel, whose barrier main passes by itself; to the proof,
//! one with a channel that leaves every page to main (`testing::machine`).

use std::io;

use multifd_proto::{packet::Compression, rounds::Party};

use super::{Options, Run, room::Room};
use crate::{
    error::{Error, Mismatch},
    round::{scan::Batch, trace::Step},
    vm::SourceVm,
};

impl Options {
    /// Whether main carries the pages.
    pub(super) fn is_main_alone(&self) -> bool {
        self.plan.channels == 0
    }

    /// # Errors
    /// Something is asked for that only channels can do.
    pub(super) fn check_main_alone(&self) -> Result<(), Error> {
        match self.format.compression {
            method if self.is_main_alone() && method != Compression::None => {
                Err(Mismatch::CompressionNeedsChannels.into())
            }
            _ => Ok(()),
        }
    }

    /// Whether device-state packets of an earlier stream can be sent.
    pub(super) fn check_kept_packets(&self) -> Result<(), Error> {
        let Some(device) = self.qemu.replay.packets.as_ref().and_then(|packets| packets.devices().first()) else {
            return Ok(());
        };
        // QEMU itself sends them uncompressed only.
        match self.is_main_alone() || self.format.compression != Compression::None {
            true => Err(Mismatch::PacketsNeedChannels { name: device.name.clone(), instance: device.instance }.into()),
            false => Ok(()),
        }
    }
}

impl Run {
    /// Sends the pages of the open section, by this thread. `guest` is given where it runs and a later round follows: what it writes
    /// again meanwhile may wait for that.
    pub(super) fn send_pages_on_main(&mut self, mut guest: Option<&mut dyn SourceVm>) -> Result<(), Error> {
        let shared = self.shared.clone();
        let room = Room::new(&shared.ram).map_err(Error::io(self.main().place()))?;
        let (mut batch, mut ranges) = (Batch::default(), Vec::new());
        while shared.scan.next(&mut batch) {
            if shared.stop.is_stopped() {
                return Err(Error::Stopped);
            }
            let block = &shared.ram.blocks()[batch.block];
            self.trace_on_main(Step::Take, &batch);
            room.load(block, &batch.pages)?;
            shared.look_for_zeros(&mut batch, &room, &mut ranges);
            self.trace_on_main(Step::Send, &batch);
            self.main().pages(block.name(), &batch, &ranges)?;
            shared.progress.add_pages(batch.pages.len() as u64, batch.zeros.len() as u64);
            if let Some(guest) = guest.as_deref_mut() {
                self.postpone_when_due(guest);
            }
        }
        shared.progress.channel_ends_round();
        Ok(())
    }

    fn trace_on_main(&self, step: impl FnOnce(Party, Vec<u64>) -> Step, batch: &Batch) {
        let block = &self.shared.ram.layout().blocks()[batch.block];
        let pages = || batch.pages.iter().chain(&batch.zeros).map(|&offset| block.page_at(offset)).collect();
        self.shared.options.trace.step(|| step(Party::Main, pages()));
    }

    /// Says why pages are copied that were to be sent without a copy to `peer`.
    pub(super) fn main_copies(&self, peer: &str) {
        if self.shared.options.is_main_alone() && self.shared.zero_copy.is_some() {
            let message = "main carries the pages, and copies them";
            self.shared.copies(peer, Err(io::Error::new(io::ErrorKind::Unsupported, message)));
        }
    }
}
