//! Which of two ways the first content of a block goes, by what each of them costs on this host at this time.
//!
//! Runs of pages are either read into private memory and put in place by the kernel (`UFFDIO_COPY`), or read into place, where one
//! page fault brings many pages at once if the host has them to give. Which is cheaper differs by a factor of ten between
//! hosts, and on one host from one minute to the next. So what each run costs is measured, one of [`PERIOD`] slices
//! goes the way that is not the usual one, and the usual one is the one that cost less in its latest [`MEMORY`] bytes. Where the other
//! way cost far more, the next look at it comes twice as late, as looking is not free.

use std::time::Duration;

use crate::{
    sync::{
        Mutex,
        atomic::{AtomicU8, AtomicU64, Ordering::Relaxed},
        lock,
    },
    sys::cpu_time::of_this_thread,
};

/// How a run of pages gets its first content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// Through private memory.
    Copy = 0,
    /// From the connection into place.
    InPlace = 1,
}

impl Way {
    pub(super) fn of(number: u8) -> Way {
        if number == Way::Copy as u8 { Way::Copy } else { Way::InPlace }
    }

    pub(super) fn other(self) -> Way {
        if self == Way::Copy { Way::InPlace } else { Way::Copy }
    }
}

/// The choice for one block.
#[derive(Debug, Default)]
pub(super) struct Choice {
    /// Slices for which a way was chosen.
    slices: AtomicU64,
    /// How many there have to be before the other way is looked at again, less the first look's.
    next_look: AtomicU64,
    /// How many slices lay between the last two looks; 0 before the second.
    period: AtomicU64,
    /// The usual way.
    way: AtomicU8,
    /// By way.
    costs: Mutex<[Cost; 2]>,
    /// Bytes that went each way.
    bytes: [AtomicU64; 2],
}

/// What the latest bytes cost that went one way.
#[derive(Clone, Copy, Debug, Default)]
struct Cost {
    bytes: u64,
    nanoseconds: u64,
}

impl Cost {
    fn add(&mut self, bytes: u64, nanoseconds: u64) {
        self.bytes += bytes;
        self.nanoseconds = self.nanoseconds.saturating_add(nanoseconds);
        if self.bytes > MEMORY {
            // What was long ago counts less and less.
            self.bytes /= 2;
            self.nanoseconds /= 2;
        }
    }

    /// CPU seconds for a GB, once there was enough to tell. (Bytes per nanosecond are GB per second.)
    fn of_a_gb(&self) -> Option<f64> {
        (self.bytes >= ENOUGH).then(|| self.nanoseconds as f64 / self.bytes as f64)
    }
}

impl Choice {
    /// The way of another slice.
    pub(super) fn next(&self) -> Way {
        let usual = self.way();
        let slice = self.slices.fetch_add(1, Relaxed);
        // The usual one is the first to be known. Each slice has its number to itself, so one thread is here at a time.
        if slice != FIRST_LOOK + self.next_look.load(Relaxed) {
            return usual;
        }
        let other = usual.other();
        let mut costs = lock(&self.costs);
        let far_more = match (costs[usual as usize].of_a_gb(), costs[other as usize].of_a_gb()) {
            (Some(usual), Some(other)) => other > usual * FAR_MORE,
            _ => false,
        };
        let period = if far_more { (2 * self.period.load(Relaxed)).clamp(PERIOD, LONGEST_PERIOD) } else { PERIOD };
        self.period.store(period, Relaxed);
        self.next_look.fetch_add(period, Relaxed);
        costs[other as usize] = Cost::default();
        other
    }

    /// The way of slices that are no trial.
    pub(super) fn way(&self) -> Way {
        Way::of(self.way.load(Relaxed))
    }

    /// Begins to measure what going `way` costs this thread.
    pub(super) fn trial(&self, way: Way) -> Trial<'_> {
        Trial { choice: self, way, begun: of_this_thread() }
    }

    /// `bytes` went `way`.
    pub(super) fn went(&self, way: Way, bytes: u64) {
        self.bytes[way as usize].fetch_add(bytes, Relaxed);
    }

    pub(super) fn measured(&self, way: Way, bytes: u64, took: Duration) {
        let mut costs = lock(&self.costs);
        costs[way as usize].add(bytes, u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
        let usual = self.way();
        if let (Some(ours), Some(others)) = (costs[usual as usize].of_a_gb(), costs[usual.other() as usize].of_a_gb())
            && others < ours * WORTH_A_CHANGE
        {
            self.way.store(usual.other() as u8, Relaxed);
        }
    }

    /// CPU seconds for a GB that goes `way`, as far as is known.
    pub(super) fn cost(&self, way: Way) -> Option<f64> {
        lock(&self.costs)[way as usize].of_a_gb()
    }

    /// Bytes that went `way`.
    pub(super) fn bytes(&self, way: Way) -> u64 {
        self.bytes[way as usize].load(Relaxed)
    }
}

/// A measurement that has begun.
pub(crate) struct Trial<'a> {
    choice: &'a Choice,
    way: Way,
    begun: Duration,
}

impl Trial<'_> {
    /// `bytes` have their first content.
    pub(crate) fn ends(self, bytes: u64) {
        self.choice.measured(self.way, bytes, of_this_thread().saturating_sub(self.begun));
    }
}

/// The first slice that goes the other way.
const FIRST_LOOK: u64 = 1;
/// Slices from one look at the other way to the next: 256 MiB.
const PERIOD: u64 = 64;
/// The same where the other way is never worth it: 4 GiB.
const LONGEST_PERIOD: u64 = 16 * PERIOD;
/// The other way is looked at more and more rarely while it costs this many times as much.
const FAR_MORE: f64 = 1.5;
/// Bytes of which it is known what they cost; those before count for less.
const MEMORY: u64 = 16 << 20;
/// Bytes that have to go a way before it is known what it costs.
const ENOUGH: u64 = 1 << 20;
/// Another way is taken when it costs less than this share: measurements of the same thing differ by as much.
const WORTH_A_CHANGE: f64 = 0.85;

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    /// Fills `slices` at these costs, in nanoseconds for a MiB.
    fn fill(choice: &Choice, slices: u64, copy: u64, in_place: u64) -> Vec<Way> {
        let ways = (0..slices).map(|_| {
            let way = choice.next();
            for _ in 0..4 {
                let cost = if way == Way::Copy { copy } else { in_place };
                choice.measured(way, 1 << 20, Duration::from_nanos(cost));
                choice.went(way, 1 << 20);
            }
            way
        });
        ways.collect()
    }

    #[test]
    fn the_cheaper_way_is_taken_and_the_other_one_is_looked_at_again() {
        let choice = Choice::default();
        let ways = fill(&choice, 2 * PERIOD, 300_000, 100_000);
        assert_eq!(ways[..3], [Way::Copy, Way::InPlace, Way::InPlace]);
        assert_eq!(ways[PERIOD as usize + 1], Way::Copy);
        assert_eq!(ways.iter().filter(|way| **way == Way::Copy).count(), 2);
        assert_eq!(choice.bytes(Way::Copy), 8 << 20);
    }

    #[test]
    fn a_way_that_costs_far_more_is_looked_at_more_and_more_rarely_but_always_again() {
        let choice = Choice::default();
        let looks = |ways: &[Way], usual| -> Vec<u64> {
            (0..).zip(ways).filter(|(_, way)| **way != usual).map(|(slice, _)| slice).collect()
        };
        let ways = fill(&choice, 64 * PERIOD, 300_000, 2_000_000);
        let expected = [0, 1, 3, 7, 15, 31, 47, 63].map(|periods| periods * PERIOD + FIRST_LOOK);
        assert_eq!(looks(&ways, Way::Copy), expected);
        // Once it does no longer, it is looked at as often as at first, from the second look on.
        let ways = fill(&choice, 64 * PERIOD, 300_000, 280_000);
        assert_eq!(looks(&ways, Way::Copy)[..3], [15, 31, 32].map(|periods| periods * PERIOD + FIRST_LOOK));
    }

    /// The host may have no large pages left from one moment to the next: each fault then brings a small one, or waits.
    #[test]
    fn a_way_that_becomes_expensive_is_left_before_the_next_look() {
        let choice = Choice::default();
        fill(&choice, 10, 300_000, 100_000);
        let ways = fill(&choice, PERIOD - 10, 300_000, 900_000);
        let left = ways.iter().position(|way| *way == Way::Copy).unwrap();
        assert!(left <= 4, "after {left} slices of 4 MiB");
        assert!(ways[left..].iter().all(|way| *way == Way::Copy));
    }

    #[test]
    fn a_small_difference_changes_nothing() {
        let choice = Choice::default();
        assert!(fill(&choice, PERIOD, 300_000, 290_000)[2..].iter().all(|way| *way == Way::Copy));
        assert!((choice.cost(Way::Copy).unwrap() - 0.286).abs() < 0.001, "{:?}", choice.cost(Way::Copy));
    }

    #[test]
    fn a_trial_counts_the_time_of_its_thread() {
        let choice = Choice::default();
        let trial = choice.trial(Way::InPlace);
        let begun = of_this_thread();
        while of_this_thread() - begun < Duration::from_millis(1) {}
        trial.ends(1 << 30);
        assert!(choice.cost(Way::InPlace).unwrap() >= 1e6 / f64::from(1 << 30));
        assert_eq!(choice.cost(Way::Copy), None);
    }
}
