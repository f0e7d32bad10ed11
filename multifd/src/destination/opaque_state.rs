//! Device-state packets that are kept as they come: what tells whether all are here.
//!
//! Nothing on the wire says how many there are, and nothing orders channels after the last sync point. A source of ours sends all of them
//! before that point (`KeptPackets::send`), so there the last barrier is the proof. Of a QEMU's it is
//! the rule of main's end (`checkpoint::tail`) once more: the source is answered when no channel is within a packet and none has
//! brought one for [`QUIET`]; after that each channel is read to its end, and what still comes is kept. One that breaks or does not end is an
//! error: it is not known whether all came.

use std::io;

use multifd_proto::{ChannelId, Violation, device_state::OpaquePacket, machine::MachineDefaults};

use super::{Run, Target};
use crate::{
    checkpoint::QUIET,
    error::{Error, Place},
    sync::{Arc, Deadline, lock},
    transport::Stopper,
    watched::Watched,
};

/// Keeps device-state packets. Called from the threads of all channels.
pub(crate) trait OpaqueSink: Send + Sync {
    /// Finds a place for `packet`, which comes on `channel` with `header`. Returns where its payload goes, or the limit that it passes.
    ///
    /// # Errors
    /// The file system's.
    fn reserve(
        &self,
        channel: ChannelId,
        header: &[u8],
        packet: &OpaquePacket<'_>,
    ) -> Result<Result<u64, Violation>, Error>;

    /// Writes `bytes` of a payload to `at`, which lies in a place that was reserved.
    ///
    /// # Errors
    /// The file system's.
    fn write(&self, bytes: &[u8], at: u64) -> Result<(), Error>;
}

/// What the channels have brought. Clones are the same one.
#[derive(Clone, Default)]
pub(super) struct OpaqueState {
    watched: Watched<Counts>,
}

#[derive(Default)]
struct Counts {
    /// The source is one of ours.
    ours: bool,
    /// Packets that have begun to come.
    begun: u64,
    /// Those that are here.
    here: u64,
    /// Channels that may bring more.
    channels: usize,
    /// Where one broke that may have had more.
    broken: Option<Place>,
}

impl OpaqueState {
    pub(super) fn stopper(&self) -> Box<dyn Stopper> {
        Box::new(self.watched.clone())
    }

    /// The source is one of ours: no packet comes after the last round.
    pub(super) fn is_of_ours(&self) {
        self.watched.update(|counts| counts.ours = true);
    }

    /// Whether a packet may come where the rounds `are_over`.
    pub(super) fn may_come(&self, are_over: bool) -> bool {
        self.watched.look(|counts| !(counts.ours && are_over))
    }

    pub(super) fn begin(&self) {
        self.watched.update(|counts| counts.begun += 1);
    }

    pub(super) fn end(&self) {
        self.watched.update(|counts| counts.here += 1);
    }

    pub(super) fn channel_joined(&self) {
        self.watched.update(|counts| counts.channels += 1);
    }

    /// A channel has ended: in order, or at `broken`. One that breaks between packets may have had more, where any have come.
    pub(super) fn channel_ended(&self, broken: Option<Place>) {
        self.watched.update(|counts| {
            counts.channels -= 1;
            counts.broken = counts.broken.or(broken.filter(|_| counts.begun > 0));
        });
    }

    /// How many packets have come.
    fn begun(&self) -> u64 {
        self.watched.look(|counts| counts.begun)
    }

    /// Waits until no packet is on its way, as far as silence tells. Returns how many have come.
    fn await_quiet(&self) -> Result<u64, Error> {
        loop {
            let (before, is_settled) = self.watched.look(|counts| ((counts.begun, counts.here), counts.is_settled()));
            self.check()?;
            if is_settled {
                return Ok(before.0);
            }
            let more = self.watched.wait(Deadline::after(Some(QUIET)), |counts| {
                let changed = counts.broken.is_some() || counts.is_settled() || (counts.begun, counts.here) != before;
                changed.then_some(())
            })?;
            if more.is_none() && before.0 == before.1 {
                return Ok(before.0);
            }
        }
    }

    /// Waits until all channels have ended. Returns whether they have by `deadline`.
    fn await_end(&self, deadline: Deadline) -> Result<bool, Error> {
        let ended =
            self.watched.wait(deadline, |counts| (counts.channels == 0 || counts.broken.is_some()).then_some(()));
        self.check()?;
        Ok(ended?.is_some())
    }

    fn check(&self) -> Result<(), Error> {
        match self.watched.look(|counts| counts.broken) {
            None => Ok(()),
            Some(at) => Err(Error::Io { at, source: io::ErrorKind::UnexpectedEof.into() }),
        }
    }
}

impl Run {
    /// Waits until all device-state packets are here that are kept. Called before they are made to last.
    pub(super) fn opaque_state_is_here(&mut self) -> Result<(), Error> {
        if lock(&self.shared.pages).as_ref().is_some_and(|pages| pages.opaque.is_some()) {
            self.opaque_packets = self.shared.opaque.await_quiet()?;
        }
        Ok(())
    }

    /// The source has its answer and ends its connections: keeps what still comes until then.
    ///
    /// # Errors
    /// [`Error::StateOnChannels`]: a channel broke that may have had more, or the source has not closed all of them within `close_timeout`; what
    /// `target` runs into.
    pub(super) fn opaque_state_ends(&mut self, target: &mut dyn Target) -> Result<(), Error> {
        let is_kept = lock(&self.shared.pages).as_ref().is_some_and(|pages| pages.opaque.is_some());
        // Older machine types have none.
        let may_come = MachineDefaults::of(&self.report.machine).is_none_or(|defaults| defaults.switchover_start);
        let opaque = self.shared.opaque.clone();
        if !is_kept || self.offer.is_some() || !(may_come || opaque.begun() > 0) {
            return Ok(());
        }
        let ended = opaque.await_end(Deadline::after(Some(self.shared.options.close_timeout)));
        if opaque.begun() == 0 {
            return Ok(());
        }
        let at = self.main().place();
        let all_came = match ended {
            Ok(true) => Ok(()),
            Ok(false) => Err(Error::Io { at, source: io::Error::new(io::ErrorKind::TimedOut, STAYS_OPEN) }),
            Err(error) => Err(error),
        };
        let kept = match opaque.begun() > self.opaque_packets {
            true => target.late_packets(all_came.is_ok()),
            false => Ok(()),
        };
        let Err(error) = all_came else { return kept };
        if let Err(error) = kept {
            tracing::warn!(%error, "what came of the last device-state packets is left in the file");
        }
        Err(Error::StateOnChannels { reason: Box::new(error) })
    }
}

/// Why it is not known whether all is here.
const STAYS_OPEN: &str = "the source does not close its channels";

impl Counts {
    /// Whether no packet is on its way for certain.
    fn is_settled(&self) -> bool {
        self.begun == 0 || (self.begun == self.here && (self.ours || self.channels == 0))
    }
}

/// What a channel works with to keep packets.
pub(super) type Opaque = Arc<dyn OpaqueSink>;
