//! What main does at a sync point, where a round ends.

use std::time::Duration;

use multifd_proto::{machine::Dialect, rounds::Party};

use super::Run;
use crate::{
    error::Error,
    progress::{Event, Observer, Phase, RoundStats},
    round::{
        barrier::{Passed, Patience},
        trace::Step,
    },
};

impl Run {
    /// The end of a round, or of a section in the dialect that ends each of them.
    pub(super) fn sync_point(&mut self, observer: &mut dyn Observer) -> Result<(), Error> {
        let place = self.main().place();
        self.shared.options.trace.step(|| Step::Arrive(Party::Main));
        let round = self.shared.arrive(Party::Main, place)?;
        if let Some(round) = round {
            self.pass(round)?;
        }
        #[cfg(any(test, feature = "__broken-variants"))]
        self.shared.loose.fix_channels(self.shared.barrier.members(|members| members.joined()));
        self.look_at_members();
        if let Some(sink) = self.sink.as_ref().filter(|_| self.phase >= Some(Phase::Rounds)) {
            // Sections end at sync points, too. What is told to settle late is told again when RAM is complete.
            sink.settle(self.report.dialect == Some(Dialect::PerRound));
        }
        self.count_round(observer);
        Ok(())
    }

    /// Waits until `round` is over, at whose end main has arrived.
    ///
    /// # Errors
    /// Channels that are missing did not come in time, or main has ended meanwhile; as
    /// [`RoundBarrier::pass`](crate::round::barrier::RoundBarrier::pass).
    fn pass(&mut self, round: u64) -> Result<(), Error> {
        // Where no other connection can come, none is waited for.
        let limit = if self.shared.single { Some(Duration::ZERO) } else { self.shared.options.setup_timeout };
        let mut patience = Patience::new(limit, LOOK_EVERY);
        loop {
            match self.shared.barrier.pass_within(round, &mut patience)? {
                Passed::Over => return Ok(()),
                Passed::Missing => return Err(self.shared.channels_missing()),
                Passed::NotYet => self.look_at_main()?,
            }
        }
    }

    /// Notices that main has ended where it may not.
    fn look_at_main(&mut self) -> Result<(), Error> {
        let Some((at, source)) = self.main().look() else { return Ok(()) };
        Err(match self.shared.barrier.members(|members| members.is_complete()) {
            true => Error::Io { at, source },
            false => Error::SourceGone { at, channels: self.shared.channels_here(), source },
        })
    }

    fn count_round(&mut self, observer: &mut dyn Observer) {
        let snapshot = self.shared.progress.snapshot();
        let (normal, zero) = self.shared.progress.take_pages_after(self.rounds);
        let bytes = snapshot.bytes() - std::mem::replace(&mut self.bytes_before, snapshot.bytes());
        self.rounds += 1;
        if self.phase < Some(Phase::Rounds) {
            // The set-up ends with a sync point, and has no pages.
            self.shared.progress.open_round(0, 0);
            return;
        }
        let stats = RoundStats {
            round: self.report.rounds_total,
            dirty_pages: normal + zero,
            normal,
            zero,
            postponed: 0,
            bytes,
            took: self.shared.progress.round_age(),
            barrier: self.shared.progress.barrier_age(),
            guest_running: !self.paused,
            dirty_after: 0,
            expected_downtime: Duration::ZERO,
            throttle: 0,
        };
        self.shared.progress.open_round(stats.round + 1, 0);
        observer.event(&Event::Round(stats.clone()));
        self.report.rounds_total += 1;
        self.report.rounds_took += stats.took;
        stats.keep_in(&mut self.report.rounds);
    }
}

/// How often main's connection is looked at while main waits. Most rounds are over sooner.
const LOOK_EVERY: Duration = Duration::from_millis(100);
