//! What the connections still hold of what was sent, and how it is let out before the guest is paused.
//!
//! A round is over for the source when the kernel has taken its last byte. Between hosts that may be long before the last byte is
//! there: socket buffers grow to megabytes on each channel. All that lies in them when the guest is paused is a part of the pause, so
//! the main thread waits for it first, while the guest runs, and drains the log once more. The time counts as the round's.
//!
//! The same meters know when a connection was reset. A channel that has nothing to send would not notice.

use std::{io, time::Duration};

use multifd_proto::{ChannelId, extension::Extension};

use super::{
    Run, Shared,
    convergence::{Decision, Left, RoundReport},
};
use crate::{
    dirty_bitmap::DirtyBitmap,
    error::{Connection, Error, Place},
    progress::{Event, Observer},
    sync::Arc,
    transport::{Meter, Stopper, Stream, Transit},
    vm::SourceVm,
    watched::Watched,
};

/// The meters of all connections of one source. Clones are the same.
#[derive(Clone, Default)]
pub(super) struct Backlog {
    meters: Watched<Vec<(Connection, Arc<dyn Meter>)>>,
}

impl Backlog {
    /// Counts what is written to `stream` from now on, where its transport can tell. It takes the place of an earlier one of `connection`.
    ///
    /// # Errors
    /// As [`Stream::meter`].
    pub(super) fn add(&self, connection: Connection, stream: &dyn Stream) -> io::Result<()> {
        let meter = stream.meter()?;
        self.meters.update(|meters| {
            meters.retain(|(other, _)| *other != connection);
            meters.extend(meter.map(|meter| (connection, meter.into())));
        });
        Ok(())
    }

    /// A channel whose connection has ended, and how, if its transport can tell.
    fn ended_channel(&self) -> Option<(ChannelId, io::Error)> {
        let meters = self.meters.look(Clone::clone);
        meters.into_iter().find_map(|(connection, meter)| match connection {
            Connection::Channel(id) => meter.transit().err().map(|error| (id, error)),
            _ => None,
        })
    }

    /// What is on its way on all connections together, the longest of their round trips, and the most that one of them was seen to
    /// carry: they share a path, and each has had it to itself for moments. One that has ended has nothing: the next write to it fails.
    fn transit(&self) -> Transit {
        let mut all = Transit::default();
        // Not under the lock: a transport's own meter may stop the migration.
        let meters = self.meters.look(Clone::clone);
        for one in meters.iter().filter_map(|(_, meter)| meter.transit().ok()) {
            all.unacknowledged = all.unacknowledged.saturating_add(one.unacknowledged);
            all.round_trip = all.round_trip.max(one.round_trip);
            all.carries = all.carries.max(one.carries);
        }
        all
    }

    /// How far away the destination is at least: the shortest round trip of any connection, zero where one cannot tell.
    pub(super) fn distance(&self) -> Duration {
        let meters = self.meters.look(Clone::clone);
        let known = meters.iter().filter_map(|(_, meter)| meter.transit().ok());
        known.map(|transit| transit.round_trip).min().unwrap_or_default()
    }

    /// What all connections together hold of what was sent.
    pub(super) fn unacknowledged(&self) -> u64 {
        self.transit().unacknowledged
    }

    /// As [`Watched::rest`].
    pub(super) fn rest(&self, time: Duration) -> Result<(), Error> {
        self.meters.rest(time)
    }

    pub(super) fn stopper(&self) -> Box<dyn Stopper> {
        Box::new(self.meters.clone())
    }
}

impl Run {
    /// Ends the migration when the connection of a channel is found to have ended, until [the guest is paused](Self::pause): each channel
    /// is needed for another round. A channel finds out by itself when it next has something to send, and it may have nothing while main
    /// waits for the destination, or is held by a user.
    pub(super) fn watch_channels(&self) {
        let Shared { backlog, progress, stop, options, .. } = &*self.shared;
        let (backlog, progress, stop, channels) =
            (backlog.clone(), progress.clone(), stop.clone(), options.plan.channels);
        self.watchdog.timers().set(CHANNELS_TIMER, LOOK_AT_CHANNELS, move || {
            let Some((id, source)) = backlog.ended_channel() else { return Some(LOOK_AT_CHANNELS) };
            let offset = progress.channel_bytes(channels.into())[id.index()];
            let at = Place { connection: Connection::Channel(id), offset };
            drop(stop.stop(Error::Io { at, source }));
            None
        });
    }

    /// Decides by what the pause would have to wait for. Before it begins, that is as little as can be.
    pub(super) fn decide(
        &mut self,
        dirty: &mut DirtyBitmap,
        vm: &mut dyn SourceVm,
        observer: &mut dyn Observer,
    ) -> Result<Decision, Error> {
        self.convergence.set_limits(self.shared.live.get().limits);
        self.convergence.set_wish(self.shared.live.steering.wish());
        let waited = self.let_out(dirty, vm)?;
        let report = self.round_report(dirty, self.shared.backlog.transit(), waited);
        let decision = self.shared.live.steering.decide(|wish| {
            self.convergence.set_wish(wish);
            self.convergence.decide(&report)
        });
        // The guest wrote more meanwhile than the wait has gained: the next wait ends as soon as the rest fits.
        self.hurries |= !waited.is_zero() && decision != Decision::SwitchOver;
        let expected = self.convergence.expected_downtime(&report.left);
        let last = self.report.rounds.last_mut().expect("a round was sent");
        last.took += waited;
        last.expected_downtime = expected;
        observer.event(&Event::Round(last.clone()));
        self.report.rounds_took += waited;
        Ok(decision)
    }

    /// Waits until the connections hold little, where nothing else speaks against the pause, and puts the pages that were written
    /// meanwhile into `dirty`. Returns how long it has waited.
    fn let_out(&mut self, dirty: &mut DirtyBitmap, vm: &mut dyn SourceVm) -> Result<Duration, Error> {
        let begun = self.now();
        let empty = |transit: Transit| Transit { unacknowledged: 0, ..transit };
        let mut transit = self.shared.backlog.transit();
        let would_pause =
            |run: &Run, transit, waited| run.convergence.would_switch_over(&run.round_report(dirty, transit, waited));
        if is_little(transit) || !would_pause(self, empty(transit), Duration::ZERO) {
            return Ok(Duration::ZERO);
        }
        let mut waited = Duration::ZERO;
        let is_enough =
            |run: &Run, transit, waited| is_little(transit) || (run.hurries && would_pause(run, transit, waited));
        while !is_enough(self, transit, waited) {
            let limits = self.shared.live.get().limits;
            if limits.time.is_some_and(|time| self.now() - self.rounds_begun >= time) {
                break;
            }
            self.shared.backlog.rest((waited / 16).clamp(SHORTEST_REST, LONGEST_REST))?;
            let now = self.shared.backlog.transit();
            // The destination takes bytes, though none are written.
            let gone = transit.unacknowledged.saturating_sub(now.unacknowledged);
            self.shared.pulse.add(usize::try_from(gone).unwrap_or(usize::MAX));
            (transit, waited) = (now, self.now() - begun);
        }
        tracing::debug!(?waited, ?transit, "let out what the connections held");
        self.drain(dirty, vm)?;
        self.report.rounds.last_mut().expect("a round was sent").dirty_after = dirty.count();
        Ok(waited)
    }

    /// The last round, when `transit` is what the connections hold `waited` after it.
    fn round_report(&self, dirty: &DirtyBitmap, transit: Transit, waited: Duration) -> RoundReport {
        let page_size = self.shared.ram.layout().page_size() as u64;
        let last = self.report.rounds.last().expect("a round was sent");
        RoundReport {
            rounds: last.round + 1,
            sent: last.normal * page_size + self.live_state.sent(),
            wire: last.bytes,
            took: sending(last.took, waited, transit),
            limit: self.shared.live.get().max_bandwidth,
            carries: transit.carries,
            left: self.left(dirty, transit),
            elapsed: self.now() - self.rounds_begun,
        }
    }

    /// What a pause would have to wait for.
    pub(super) fn left(&self, dirty: &DirtyBitmap, transit: Transit) -> Left {
        // The last byte of the stream and its answer; between two ends that agreed on it, READY and GO before that.
        let round_trips = if self.extensions.contains(Extension::TwoStepCommit) { 2 } else { 1 };
        Left {
            dirty: (dirty.count() * self.shared.ram.layout().page_size() as u64).saturating_add(self.state_left()),
            unsent: transit.unacknowledged,
            round_trips: transit.round_trip.saturating_mul(round_trips),
        }
    }

    /// What a pause that began now would have to wait for.
    pub(super) fn left_now(&self, dirty: &DirtyBitmap) -> Left {
        self.left(dirty, self.shared.backlog.transit())
    }
}

/// How long a round was sent that took `took` until its last byte was written, when `transit` is what the connections hold `waited` after it.
///
/// The last acknowledgement comes a round trip after its byte was sent, and that is no time of sending: the round trips of the
/// pause are counted by themselves. No more is taken off than was waited for.
fn sending(took: Duration, waited: Duration, transit: Transit) -> Duration {
    let answered = if transit.unacknowledged == 0 { transit.round_trip.min(waited) } else { Duration::ZERO };
    (took + waited).saturating_sub(answered)
}

/// Whether no wait for what is on its way is worth it. Between hosts that is nothing at all: the last bytes may be some that were lost and
/// that the kernel sends again only after a while. Within a host bytes are there almost at once, and only their acknowledgement
/// may be late.
fn is_little(transit: Transit) -> bool {
    transit.unacknowledged == 0 || (transit.round_trip < NEAR && transit.unacknowledged <= LITTLE)
}

/// Round trips that are shorter do not leave the host, or hardly.
pub(super) const NEAR: Duration = Duration::from_millis(1);
/// Bytes on all connections together.
const LITTLE: u64 = 64 << 10;
/// Between two looks at the meters: often enough to be no part of what is waited for.
const SHORTEST_REST: Duration = Duration::from_millis(1);
/// However long the wait is.
const LONGEST_REST: Duration = Duration::from_millis(20);
/// Looks at the connections of channels while rounds are sent.
pub(super) const CHANNELS_TIMER: &str = "channels";
const LOOK_AT_CHANNELS: Duration = if cfg!(test) { Duration::from_millis(50) } else { Duration::from_secs(1) };

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    /// A round trip of each round was counted twice: as sending, and among those of the pause.
    #[test]
    fn the_answer_to_the_last_byte_is_no_time_of_sending() {
        let millis = Duration::from_millis;
        let after = |waited, unacknowledged| {
            sending(millis(5), millis(waited), Transit::new(unacknowledged, millis(100))).as_millis()
        };
        assert_eq!(after(150, 0), 55);
        assert_eq!(after(30, 0), 5, "no more than was waited for");
        assert_eq!(after(0, 0), 5);
        assert_eq!(after(150, 1), 155, "it has not come yet");
    }
}
