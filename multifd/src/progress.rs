//! What a migration has done so far: counters to look at from outside, and events per phase and round.
//!
//! Counters are for display only; nothing is decided by them.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use multifd_proto::ChannelId;

/// The steps of a migration, in the order in which they happen; both sides use the same names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Phase {
    /// Connections are opened or awaited.
    Connect,
    /// Header, RAM blocks, the first sync point.
    Setup,
    /// Rounds with the guest running.
    Rounds,
    /// The last round, with the guest paused.
    Switchover,
    /// Device state.
    Devices,
    /// The guest runs at the destination, and gets its memory.
    Postcopy,
    /// The destination has everything; its confirmation is awaited or given.
    Confirm,
    /// The VM belongs to the destination.
    Done,
}

impl Phase {
    /// The name in events, progress bars and reports.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Connect => "connect",
            Phase::Setup => "setup",
            Phase::Rounds => "rounds",
            Phase::Switchover => "switchover",
            Phase::Devices => "devices",
            Phase::Postcopy => "postcopy",
            Phase::Confirm => "confirm",
            Phase::Done => "done",
        }
    }
}

/// One round that is over.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RoundStats {
    /// Counted from 0, the round that sends every page; the same number on both sides.
    pub round: u64,
    /// Pages that were dirty when it began; at a destination, those that came.
    pub dirty_pages: u64,
    /// Pages sent with content.
    pub normal: u64,
    /// Pages sent as zeros.
    pub zero: u64,
    /// Pages that were not sent because the guest had written them again: the next round has them. 0 at a destination.
    pub postponed: u64,
    /// Bytes on all connections, headers included.
    pub bytes: u64,
    /// From its opening until every channel has sent its SYNC packet; at a destination, from its first byte until main and
    /// every channel have passed its end.
    pub took: Duration,
    /// The part of it for which the first channel that was done waited for the last.
    pub barrier: Duration,
    /// Whether the guest was running.
    pub guest_running: bool,
    /// Pages written meanwhile, which the next round has to send; 0 for the last.
    pub dirty_after: u64,
    /// What a pause would take that sends those: at the speed measured so far, behind what the connections still hold, with the round
    /// trips of the commit.
    pub expected_downtime: Duration,
    /// By how many percent the guest was slowed down.
    pub throttle: u8,
}

impl RoundStats {
    /// Adds the round to `rounds`, of which the first and the last 500 are kept: a migration may have any number of rounds,
    /// and its account does not grow with them. [`round`](Self::round) stays the number of each.
    pub fn keep_in(self, rounds: &mut Vec<RoundStats>) {
        if rounds.len() == 2 * KEPT_ROUNDS {
            rounds.remove(KEPT_ROUNDS);
        }
        rounds.push(self);
    }
}

/// Something worth showing.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Event {
    /// A phase begins.
    Phase(Phase),
    /// A round is over.
    Round(RoundStats),
    /// The guest is slowed down from now on.
    Throttle(u8),
    /// A source that has switched to postcopy has lost its connections; it is waited for until it goes on over new ones.
    Interrupted {
        /// What ended the connections.
        reason: String,
        /// Pages that are missing.
        missing: u64,
        /// How long it is waited for.
        limit: Duration,
    },
    /// It goes on.
    Continued {
        /// Pages that are missing.
        missing: u64,
    },
}

/// Is told what happens, by the thread that called `run`.
pub trait Observer {
    /// `event` has just happened. The migration waits until this returns.
    fn event(&mut self, event: &Event);
}

/// Ignores all events.
impl Observer for () {
    fn event(&mut self, _event: &Event) {}
}

/// Lets any thread look at the counters of one migration.
#[derive(Clone)]
pub struct Progress {
    counters: Arc<Counters>,
}

struct Counters {
    /// What the times below are counted from, in microseconds.
    epoch: Instant,
    phase: AtomicU8,
    /// When the phase was entered, and how long each took before.
    phase_since: AtomicU64,
    phase_took: [AtomicU64; PHASES.len()],
    /// When the first byte of this round moved, plus one; 0 before.
    round_first_byte: AtomicU64,
    /// The same of the first channel that came to its end.
    round_first_end: AtomicU64,
    /// Pages with content and zeros that came after an even and after an odd number of sync points: no channel is further ahead
    /// of main than one.
    between: [[AtomicU64; 2]; 2],
    round: AtomicU64,
    pages_total: AtomicU64,
    round_pages: AtomicU64,
    round_done: AtomicU64,
    normal: AtomicU64,
    zero: AtomicU64,
    skipped: AtomicU64,
    postponed: AtomicU64,
    requests: AtomicU64,
    main_bytes: AtomicU64,
    channel_bytes: [AtomicU64; 256],
}

/// The counters at one moment. They are read one by one, so they may differ by what happened meanwhile.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Snapshot {
    /// The phase; `None` before the first.
    pub phase: Option<Phase>,
    /// The round that is being sent or received.
    pub round: u64,
    /// Pages of the VM.
    pub pages_total: u64,
    /// Pages that this round began with, less those that wait for the next; 0 where it is not known.
    pub round_pages: u64,
    /// Pages of this round that are done.
    pub round_done: u64,
    /// Pages with content, in all rounds.
    pub normal: u64,
    /// Zero pages, in all rounds.
    pub zero: u64,
    /// Pages not sent because they were never touched.
    pub skipped: u64,
    /// Pages that were not sent in a round because the guest had written them again, in all rounds.
    pub postponed: u64,
    /// Requests of a guest that runs at the destination already.
    pub requests: u64,
    /// Bytes on main.
    pub main_bytes: u64,
    /// Bytes on all channels.
    pub channel_bytes: u64,
}

impl Snapshot {
    /// Bytes on all connections.
    pub fn bytes(&self) -> u64 {
        self.main_bytes + self.channel_bytes
    }
}

impl Progress {
    pub(crate) fn new() -> Progress {
        Progress {
            counters: Arc::new(Counters {
                epoch: Instant::now(),
                phase: AtomicU8::new(u8::MAX),
                phase_since: AtomicU64::new(0),
                phase_took: [const { AtomicU64::new(0) }; PHASES.len()],
                round_first_byte: AtomicU64::new(0),
                round_first_end: AtomicU64::new(0),
                between: [const { [const { AtomicU64::new(0) }; 2] }; 2],
                round: AtomicU64::new(0),
                pages_total: AtomicU64::new(0),
                round_pages: AtomicU64::new(0),
                round_done: AtomicU64::new(0),
                normal: AtomicU64::new(0),
                zero: AtomicU64::new(0),
                skipped: AtomicU64::new(0),
                postponed: AtomicU64::new(0),
                requests: AtomicU64::new(0),
                main_bytes: AtomicU64::new(0),
                channel_bytes: [const { AtomicU64::new(0) }; 256],
            }),
        }
    }

    /// The counters now.
    pub fn snapshot(&self) -> Snapshot {
        let counters = &*self.counters;
        Snapshot {
            phase: PHASES.get(usize::from(counters.phase.load(Relaxed))).copied(),
            round: counters.round.load(Relaxed),
            pages_total: counters.pages_total.load(Relaxed),
            round_pages: counters.round_pages.load(Relaxed),
            round_done: counters.round_done.load(Relaxed),
            normal: counters.normal.load(Relaxed),
            zero: counters.zero.load(Relaxed),
            skipped: counters.skipped.load(Relaxed),
            postponed: counters.postponed.load(Relaxed),
            requests: counters.requests.load(Relaxed),
            main_bytes: counters.main_bytes.load(Relaxed),
            channel_bytes: counters.channel_bytes.iter().map(|bytes| bytes.load(Relaxed)).sum(),
        }
    }

    /// Bytes on each of the first `channels` channels.
    pub fn channel_bytes(&self, channels: usize) -> Vec<u64> {
        self.counters.channel_bytes.iter().take(channels).map(|bytes| bytes.load(Relaxed)).collect()
    }

    /// How long each phase took so far, the present one included; one that was entered twice has the sum. The last,
    /// [`Phase::Done`], takes no time.
    pub fn phase_times(&self) -> [(Phase, Duration); PHASES.len()] {
        let counters = &*self.counters;
        let current = usize::from(counters.phase.load(Relaxed));
        let since = self.now().saturating_sub(counters.phase_since.load(Relaxed));
        std::array::from_fn(|index| {
            let phase = PHASES[index];
            let now = if index == current && phase != Phase::Done { since } else { 0 };
            (phase, Duration::from_micros(counters.phase_took[index].load(Relaxed) + now))
        })
    }

    /// Called by one thread.
    pub(crate) fn set_phase(&self, phase: Phase) {
        let now = self.now();
        let before = self.counters.phase.swap(phase as u8, Relaxed);
        let since = self.counters.phase_since.swap(now, Relaxed);
        if let Some(took) = self.counters.phase_took.get(usize::from(before)) {
            took.fetch_add(now.saturating_sub(since), Relaxed);
        }
    }

    /// How long ago the first byte of this round moved; zero where none has.
    pub(crate) fn round_age(&self) -> Duration {
        self.age(&self.counters.round_first_byte)
    }

    /// How long ago the first channel came to the end of this round; zero where none has.
    pub(crate) fn barrier_age(&self) -> Duration {
        self.age(&self.counters.round_first_end)
    }

    /// A channel has come to the end of this round.
    pub(crate) fn channel_ends_round(&self) {
        if self.counters.round_first_end.load(Relaxed) == 0 {
            self.counters.round_first_end.store(self.now() + 1, Relaxed);
        }
    }

    fn age(&self, at: &AtomicU64) -> Duration {
        match at.load(Relaxed) {
            0 => Duration::ZERO,
            at => Duration::from_micros((self.now() + 1).saturating_sub(at)),
        }
    }

    fn first_byte_of_round(&self) {
        // Almost always set: one load for each packet.
        if self.counters.round_first_byte.load(Relaxed) == 0 {
            self.counters.round_first_byte.store(self.now() + 1, Relaxed);
        }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.counters.epoch.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    pub(crate) fn set_pages_total(&self, pages: u64) {
        self.counters.pages_total.store(pages, Relaxed);
    }

    pub(crate) fn open_round(&self, round: u64, pages: u64) {
        self.counters.round.store(round, Relaxed);
        self.counters.round_pages.store(pages, Relaxed);
        self.counters.round_done.store(0, Relaxed);
        self.counters.round_first_byte.store(0, Relaxed);
        self.counters.round_first_end.store(0, Relaxed);
    }

    /// All channels wait for the section that comes.
    pub(crate) fn open_section(&self) {
        self.counters.round_first_end.store(0, Relaxed);
    }

    pub(crate) fn add_pages(&self, normal: u64, zero: u64) {
        self.counters.normal.fetch_add(normal, Relaxed);
        self.counters.zero.fetch_add(zero, Relaxed);
        self.counters.round_done.fetch_add(normal + zero, Relaxed);
    }

    /// The same at a destination, by a thread that has passed `sync_points`. It may take pages of the next round sooner than main
    /// counts the last.
    pub(crate) fn add_pages_after(&self, sync_points: u64, normal: u64, zero: u64) {
        let [normals, zeros] = &self.counters.between[(sync_points % 2) as usize];
        normals.fetch_add(normal, Relaxed);
        zeros.fetch_add(zero, Relaxed);
        self.add_pages(normal, zero);
    }

    /// Takes out what was added after `sync_points`: main and all channels have passed one more.
    pub(crate) fn take_pages_after(&self, sync_points: u64) -> (u64, u64) {
        let [normals, zeros] = &self.counters.between[(sync_points % 2) as usize];
        (normals.swap(0, Relaxed), zeros.swap(0, Relaxed))
    }

    pub(crate) fn add_skipped(&self, pages: u64) {
        self.counters.skipped.fetch_add(pages, Relaxed);
    }

    /// Pages wait for the next round.
    pub(crate) fn add_postponed(&self, pages: u64) {
        self.counters.postponed.fetch_add(pages, Relaxed);
        self.counters.round_pages.fetch_sub(pages, Relaxed);
    }

    pub(crate) fn add_request(&self) {
        self.counters.requests.fetch_add(1, Relaxed);
    }

    pub(crate) fn add_main_bytes(&self, bytes: u64) {
        self.first_byte_of_round();
        self.counters.main_bytes.fetch_add(bytes, Relaxed);
    }

    pub(crate) fn add_channel_bytes(&self, channel: ChannelId, bytes: u64) {
        self.first_byte_of_round();
        self.counters.channel_bytes[channel.index()].fetch_add(bytes, Relaxed);
    }
}

/// Rounds at either end of a migration that are kept.
const KEPT_ROUNDS: usize = 500;

const PHASES: [Phase; 8] = [
    Phase::Connect,
    Phase::Setup,
    Phase::Rounds,
    Phase::Switchover,
    Phase::Devices,
    Phase::Postcopy,
    Phase::Confirm,
    Phase::Done,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_many_rounds_the_first_and_the_last_are_kept() {
        let mut rounds = Vec::new();
        for round in 0..5000 {
            let stats = RoundStats { round, guest_running: true, ..RoundStats::default() };
            stats.keep_in(&mut rounds);
        }
        let numbers: Vec<_> = rounds.iter().map(|stats| stats.round).collect();
        assert_eq!(numbers, (0..500).chain(4500..5000).collect::<Vec<_>>());
    }

    #[test]
    fn the_time_of_each_phase_adds_up() {
        let progress = Progress::new();
        progress.set_phase(Phase::Connect);
        std::thread::sleep(Duration::from_millis(2));
        progress.set_phase(Phase::Setup);
        progress.set_phase(Phase::Connect);
        progress.set_phase(Phase::Done);
        let times = progress.phase_times();
        assert!(times[0].1 >= Duration::from_millis(2), "{times:?}");
        assert_eq!(times, progress.phase_times(), "nothing grows once it is over");
        let elapsed = Duration::from_micros(progress.now());
        assert!(times.iter().map(|(_, time)| *time).sum::<Duration>() <= elapsed, "{times:?}");
    }

    #[test]
    fn a_round_begins_with_its_first_byte() {
        let progress = Progress::new();
        progress.open_round(1, 0);
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(progress.round_age(), Duration::ZERO);
        progress.add_channel_bytes(ChannelId(0), 1);
        let first = progress.counters.round_first_byte.load(Relaxed);
        assert!(first > 2000, "{first}");
        progress.add_main_bytes(1);
        assert_eq!(progress.counters.round_first_byte.load(Relaxed), first);
        progress.channel_ends_round();
        let end = progress.counters.round_first_end.load(Relaxed);
        progress.channel_ends_round();
        assert_eq!(progress.counters.round_first_end.load(Relaxed), end);
        progress.open_round(2, 0);
        assert_eq!((progress.round_age(), progress.barrier_age()), (Duration::ZERO, Duration::ZERO));
    }

    /// They were counted to the round before, as main had not counted that yet.
    #[test]
    fn pages_of_a_channel_that_is_ahead_belong_to_the_next_round() {
        let progress = Progress::new();
        progress.add_pages_after(1, 5, 1);
        progress.add_pages_after(2, 3, 0);
        assert_eq!(progress.take_pages_after(1), (5, 1));
        progress.add_pages_after(3, 1, 1);
        assert_eq!((progress.take_pages_after(2), progress.take_pages_after(3)), ((3, 0), (1, 1)));
        let snapshot = progress.snapshot();
        assert_eq!((snapshot.normal, snapshot.zero), (9, 2));
    }

    #[test]
    fn every_phase_is_read_back_as_it_was_set() {
        let progress = Progress::new();
        assert_eq!(progress.snapshot().phase, None);
        for phase in PHASES {
            progress.set_phase(phase);
            assert_eq!(progress.snapshot().phase, Some(phase));
        }
    }
}
