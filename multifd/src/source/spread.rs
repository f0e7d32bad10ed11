//! Over how many channels the pages are spread where the destination is far away.
//!
//! Channels share a path. More of them than it takes to fill it lose each other's packets: rounds take longer, and the pause waits for what
//! is sent again. So only a few take pages at first, and more as long as that makes the migration faster. That is found out in round 0, in
//! which the others wait for their turn. Where the destination is near, channels are there for the sake of the processors, and all take
//! pages.
//!
//! Each channel ends each round with its SYNC, whether it had pages or not; the laws do not say which of them takes a page.

use std::time::Duration;

use multifd_proto::{ChannelId, packet::Compression};

use super::{Run, backlog::NEAR};
use crate::{
    error::Error,
    sync::{Deadline, Mutex, lock},
    transport::Stopper,
    watched::Watched,
};

/// How many channels take pages.
pub(super) struct Spread {
    channels: usize,
    turns: Watched<Turns>,
    trial: Mutex<Option<Trial>>,
}

/// What channels wait for.
struct Turns {
    /// The first so many take pages.
    used: usize,
    /// The others wait for their turn until the pages of the section are handed out.
    may_grow: bool,
    /// Sections whose pages are handed out.
    over: u64,
}

/// Whether more channels are faster.
struct Trial {
    round_trip: Duration,
    settling: Duration,
    measuring: Duration,
    /// When what is measured begins.
    from: Duration,
    /// Since when, and how much had been taken by then.
    begun: Option<(Duration, u64)>,
    /// How many were used before and how fast that was, while more are tried.
    before: Option<(usize, f64)>,
    /// How fast as many as there are are, when more were found to be no faster.
    best: Option<(Duration, f64)>,
}

impl Spread {
    /// All of `channels` take pages.
    pub(super) fn new(channels: usize) -> Spread {
        let turns = Turns { used: channels, may_grow: false, over: 0 };
        Spread { channels, turns: Watched::new(turns), trial: Mutex::new(None) }
    }

    /// What ends the waits of all channels.
    pub(super) fn stopper(&self) -> Box<dyn Stopper> {
        Box::new(self.turns.clone())
    }

    /// Begins with a few channels where the destination is `round_trip` away. All are connected, and none takes pages yet.
    pub(super) fn begin(&self, round_trip: Duration, now: Duration) {
        if round_trip < NEAR || self.channels <= FEW {
            return;
        }
        let settling = (round_trip * 4).clamp(SHORTEST, LONGEST);
        let measuring = (round_trip * 2).clamp(SHORTEST, LONGEST);
        let from = now + settling;
        *lock(&self.trial) =
            Some(Trial { round_trip, settling, measuring, from, begun: None, before: None, best: None });
        self.turns.update(|turns| (turns.used, turns.may_grow) = (FEW, true));
        tracing::debug!(?round_trip, channels = FEW, "pages are spread over a few channels at first");
    }

    /// Round 0 is over: no channel waits from now on, and those that were on trial have no turn.
    pub(super) fn end(&self) {
        let Some(trial) = lock(&self.trial).take() else { return };
        self.turns.update(|turns| {
            turns.may_grow = false;
            turns.used = trial
                .before
                .filter(|&(fewer, rate)| !trial.is_wide(fewer, rate))
                .map_or(turns.used, |(fewer, _)| fewer);
        });
        tracing::debug!(channels = self.used(), "pages are spread over so many channels");
    }

    /// How many channels take pages.
    pub(super) fn used(&self) -> usize {
        self.turns.look(|turns| turns.used)
    }

    /// Whether `channel` takes pages of section number `section`; it may wait for its turn.
    ///
    /// # Errors
    /// [`Error::Stopped`].
    pub(super) fn takes(&self, channel: ChannelId, section: u64) -> Result<bool, Error> {
        let turn = self.turns.wait(Deadline::after(None), |turns| match channel.index() < turns.used {
            true => Some(true),
            false => (!turns.may_grow || turns.over > section).then_some(false),
        });
        Ok(turn?.unwrap_or_default())
    }

    /// All pages of section number `section` are handed out.
    pub(super) fn handed_out(&self, section: u64) {
        if self.turns.look(|turns| turns.may_grow && turns.over <= section) {
            self.turns.update(|turns| turns.over = turns.over.max(section + 1));
        }
    }

    /// By channel 0, which always takes pages, before each packet: tries more channels, or goes back to fewer. `taken` says how many bytes
    /// the destination's host has, and `left` how many this round still has at most. `None`: as before.
    ///
    /// What was written is no measure: the kernel's buffers grow meanwhile. Nor is what is acknowledged in order, which stands still
    /// behind a lost packet and then leaps ahead.
    pub(super) fn look(&self, now: Duration, taken: impl FnOnce() -> u64, left: impl FnOnce() -> u64) -> Option<usize> {
        let mut guard = lock(&self.trial);
        let trial = guard.as_mut().filter(|trial| now >= trial.from)?;
        let Some((begun, before)) = trial.begun else {
            trial.begun = Some((now, taken()));
            return None;
        };
        if now - begun < trial.measuring {
            return None;
        }
        let rate = taken().saturating_sub(before) as f64 / (now - begun).as_secs_f64();
        let used = self.used();
        let next = trial.judge(used, self.channels, rate, left(), now);
        tracing::debug!(
            used,
            next,
            rate,
            "channels that take pages, and bytes per second that the destination's host took"
        );
        if next != used {
            self.turns.update(|turns| turns.used = next);
        }
        (next != used).then_some(next)
    }
}

impl Run {
    /// Before round 0. Channels that compress are there for the sake of the processors.
    pub(super) fn begin_to_spread(&self) {
        if self.shared.options.format.compression == Compression::None {
            self.shared.spread.begin(self.shared.backlog.distance(), self.now());
            self.shared.scan.share_among(self.shared.spread.used());
        }
    }

    /// After each round, of which only the first matters.
    pub(super) fn end_to_spread(&self) {
        self.shared.spread.end();
        self.shared.scan.share_among(self.shared.spread.used());
    }
}

impl Trial {
    /// How many of `channels` are used next, where `used` were as fast as `rate` and `left` bytes are to be sent.
    fn judge(&mut self, used: usize, channels: usize, rate: f64, left: u64, now: Duration) -> usize {
        (self.from, self.begun) = (now + self.settling, None);
        if let Some((fewer, slower)) = self.before
            && rate < slower * GAIN
            && !self.is_wide(fewer, slower)
        {
            (self.before, self.best) = (None, Some((now, slower)));
            return fewer;
        }
        let known =
            |(since, best): (Duration, f64)| rate < best * GAIN && now - since < AGAIN && !self.is_wide(used, rate);
        if used == channels || (self.before.is_none() && self.best.is_some_and(known)) {
            self.before = None;
            return used;
        }
        let more = used.saturating_mul(FACTOR).min(channels);
        if self.before.is_none() && !self.is_wide(used, rate) && !self.is_worth_it(more - used, left, rate) {
            return used;
        }
        self.before = Some((used, rate));
        more
    }

    /// Whether what is `left` is so much that a trial of `added` channels is worth what it costs: each takes a packet and is slow with
    /// its first, and where they get in each other's way the end of the round waits for them.
    fn is_worth_it(&self, added: usize, left: u64, rate: f64) -> bool {
        let trial = rate * (self.settling + self.measuring).as_secs_f64() + added as f64 * PACKET;
        left as f64 >= trial * WORTH
    }

    /// Whether so much is on its way on each of `used` channels that a lost packet holds much up: then there are too few, also where
    /// more are not faster. The more there are, the more they get in each other's way.
    fn is_wide(&self, used: usize, rate: f64) -> bool {
        rate * self.round_trip.as_secs_f64() > (used * used) as f64 * WIDE
    }
}

/// How many take pages at first. Of 64 channels at 100 Mbit/s these had the shortest pause.
const FEW: usize = if cfg!(shuttle) { 1 } else { 4 };
const FACTOR: usize = 4;
/// Bytes on their way on a channel, for each channel there is: measured at 100 Mbit/s and 1 Gbit/s, 20 and 100 ms.
const WIDE: f64 = 128e3;
/// By how much more channels have to be faster.
const GAIN: f64 = 1.25;
/// A trial is begun where at least so many times its bytes are left. (16 channels at 100 Mbit/s and 100 ms, of which 4 fill the path: with a
/// trial in the middle of 24 MiB three of five migrations took 4.4 to 4.8 s in place of 3.2.)
const WORTH: f64 = 8.0;
/// Bytes of a full packet; of one page in tests, whose guests are small.
const PACKET: f64 = if cfg!(test) { 4096.0 } else { 512.0 * 1024.0 };
/// How long what was found holds.
const AGAIN: Duration = Duration::from_secs(10);
/// Of a settling or a measurement.
const SHORTEST: Duration = Duration::from_millis(if cfg!(shuttle) { 1 } else { 60 });
const LONGEST: Duration = Duration::from_secs(2);

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use std::{sync::Arc, thread};

    use test_support::time_limit;

    use super::*;

    const RTT: Duration = Duration::from_millis(20);

    /// Lets round 0 take `seconds` on a path where so many channels are as fast as `rate` says. Returns all numbers of channels there were.
    fn tried(channels: usize, seconds: u64, rate: impl Fn(usize, Duration) -> f64) -> (Spread, Vec<usize>) {
        let spread = Spread::new(channels);
        spread.begin(RTT, Duration::ZERO);
        let (mut sent, mut all) = (0.0, vec![spread.used()]);
        for millis in 0..seconds * 1000 {
            let now = Duration::from_millis(millis);
            sent += rate(spread.used(), now) / 1e3;
            all.extend(spread.look(now, || sent as u64, || u64::MAX));
        }
        (spread, all)
    }

    #[test]
    fn near_the_end_of_the_round_no_more_channels_are_tried_unless_much_is_on_its_way() {
        // Settling and measuring take 140 ms here.
        let after = |left: u64, rate: u64| {
            let spread = Spread::new(64);
            spread.begin(RTT, Duration::ZERO);
            assert!(spread.look(Duration::from_secs(1), || 0, || left).is_none());
            spread.look(Duration::from_secs(2), || rate, || left)
        };
        let packets = 12 * 8 * PACKET as u64;
        assert_eq!(after(packets + 1_119_000, 1_000_000), None);
        assert_eq!(after(packets + 1_121_000, 1_000_000), Some(16));
        assert_eq!(after(0, 105_000_000), Some(16), "there are too few");
    }

    #[test]
    fn all_channels_are_used_where_the_destination_is_near_or_they_are_few() {
        for (channels, round_trip) in [(64, Duration::from_micros(900)), (64, Duration::ZERO), (4, RTT), (0, RTT)] {
            let spread = Spread::new(channels);
            spread.begin(round_trip, Duration::ZERO);
            assert_eq!(spread.used(), channels);
            assert!(spread.look(Duration::from_secs(1), || 0, || 0).is_none());
            spread.end();
            assert_eq!(spread.used(), channels);
        }
    }

    #[test]
    fn a_path_that_a_few_channels_fill_has_no_more_of_them() {
        let (spread, all) = tried(64, 5, |_, _| 12.5e6);
        assert_eq!(all, [4, 16, 4]);
        spread.end();
        assert_eq!(spread.used(), 4);
        // Less so with more.
        assert_eq!(tried(64, 5, |used, _| 12e6 / (used as f64).sqrt()).1, [4, 16, 4]);
    }

    #[test]
    fn a_path_that_takes_more_has_all_channels_or_as_many_as_help() {
        let (spread, all) = tried(64, 5, |used, _| used as f64 * 40e6);
        assert_eq!(all, [4, 16, 64]);
        spread.end();
        assert_eq!(spread.used(), 64);
        assert_eq!(tried(64, 5, |used, _| (used as f64 * 40e6).min(700e6)).1, [4, 16, 64, 16]);
        assert_eq!(tried(6, 5, |used, _| used as f64).1, [4, 6]);
    }

    #[test]
    fn a_path_on_which_much_is_on_its_way_has_more_channels() {
        assert_eq!(tried(64, 5, |_, _| 100e6).1, [4, 16, 4]);
        let (spread, all) = tried(64, 5, |_, _| 105e6);
        assert_eq!(all, [4, 16, 64, 16]);
        spread.end();
        assert_eq!(spread.used(), 16);
        // Round 0 is over before it is known whether more are faster.
        let (spread, all) = tried(16, 0, |_, _| 0.0);
        assert_eq!(all, [4]);
        let trial = lock(&spread.trial).take().unwrap();
        *lock(&spread.trial) = Some(Trial { before: Some((4, 105e6)), ..trial });
        spread.turns.update(|turns| turns.used = 16);
        spread.end();
        assert_eq!(spread.used(), 16);
    }

    #[test]
    fn what_was_found_is_looked_at_again() {
        // The path is wider from the third second on.
        let wider = |used: usize, now: Duration| if now.as_secs() < 3 { 1e7 } else { used as f64 * 1e7 };
        assert_eq!(tried(64, 6, wider).1, [4, 16, 4, 16, 64]);
        let (_, all) = tried(64, 25, |_, _| 1e7);
        assert_eq!(all, [4, 16, 4, 16, 4, 16, 4], "every ten seconds");
    }

    #[test]
    fn channels_that_are_on_trial_at_the_end_have_no_turn() {
        let (spread, all) = tried(64, 1, |used, _| used as f64);
        assert_eq!(all, [4, 16, 64]);
        let (short, _) = tried(64, 0, |_, _| 1.0);
        short.end();
        assert_eq!(short.used(), 4);
        let trial = lock(&spread.trial).take().unwrap();
        *lock(&spread.trial) = Some(Trial { before: Some((16, 1.0)), ..trial });
        spread.end();
        assert_eq!(spread.used(), 16);
    }

    #[test]
    fn a_channel_waits_for_its_turn_for_the_end_of_the_section_or_for_a_stop() {
        time_limit(Duration::from_secs(60), || {
            let spread = Arc::new(Spread::new(64));
            spread.begin(RTT, Duration::ZERO);
            let waits = |channel: u8, section: u64| {
                let spread = spread.clone();
                thread::spawn(move || spread.takes(ChannelId(channel), section))
            };
            assert!(spread.takes(ChannelId(3), 1).unwrap());
            let (fourth, last) = (waits(4, 1), waits(63, 1));
            thread::sleep(Duration::from_millis(20));
            assert!(!fourth.is_finished() && !last.is_finished());
            spread.turns.update(|turns| turns.used = 16);
            assert!(fourth.join().unwrap().unwrap());
            spread.handed_out(1);
            assert!(!last.join().unwrap().unwrap());
            assert!(!spread.takes(ChannelId(63), 0).unwrap(), "one that comes late");
            let next = waits(63, 2);
            thread::sleep(Duration::from_millis(20));
            assert!(!next.is_finished());
            spread.stopper().stop();
            assert!(matches!(next.join().unwrap(), Err(Error::Stopped)));
            spread.end();
            assert!(!spread.takes(ChannelId(63), 2).unwrap() && spread.takes(ChannelId(15), 2).unwrap());
        });
    }
}
