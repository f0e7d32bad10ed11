//! What a worker sees of a migration: how long it could not run, and for how long it made no progress soon afterwards.
//!
//! The engine's figure for the pause ends when the VM is told to run. A guest may still have to wait then, for a lock that the
//! kernel holds or for pages; that shows only in its own progress. So an incoming worker asks for its budget after the first
//! page, and in the first second every few pages: the time between getting a budget and asking again is its own.

use std::time::{Duration, Instant, SystemTime};

/// The view of one worker.
#[derive(Debug, Default)]
pub(crate) struct View {
    /// When it stopped last, in nanoseconds of the system's time.
    stopped: Option<u64>,
    /// It has come from elsewhere, and is watched since then.
    arrived: Option<Arrived>,
}

#[derive(Debug)]
struct Arrived {
    at: Instant,
    /// When the first page was finished, in nanoseconds of the system's time.
    first_page: Option<u64>,
    /// The budget in use: when it was given, and how many pages were finished then.
    given: Option<(Instant, u64)>,
    longest: Duration,
}

impl View {
    /// The worker stands still, from now on.
    pub(crate) fn stops(&mut self) {
        self.stopped = Some(now());
    }

    /// The worker has come from elsewhere and is about to run.
    pub(crate) fn arrives(&mut self) {
        self.arrived = Some(Arrived { at: Instant::now(), first_page: None, given: None, longest: Duration::ZERO });
    }

    /// The worker, which has finished `done` pages, asks for a budget.
    pub(crate) fn asks(&mut self, done: u64) {
        let Some(arrived) = &mut self.arrived else { return };
        let Some((given, before)) = arrived.given.take() else { return };
        arrived.longest = arrived.longest.max(given.elapsed());
        if done > before {
            arrived.first_page.get_or_insert_with(now);
        }
    }

    /// Whether the worker is to write its first page here, at once.
    pub(crate) fn wants_first_page(&self) -> bool {
        self.arrived.as_ref().is_some_and(|arrived| arrived.first_page.is_none())
    }

    /// The worker, which has finished `done` pages, may run until it has finished `budget`. Returns when it has to ask again.
    pub(crate) fn runs(&mut self, done: u64, budget: u64) -> u64 {
        let wants_first_page = self.wants_first_page();
        let Some(arrived) = self.arrived.as_mut().filter(|arrived| arrived.at.elapsed() < WATCHED) else {
            return budget;
        };
        arrived.given = Some((Instant::now(), done));
        budget.min(done + if wants_first_page { 1 } else { FEW })
    }

    /// When it stopped last, in nanoseconds of the system's time.
    pub(crate) fn stopped(&self) -> Option<u64> {
        self.stopped
    }

    /// When it had finished its first page here, in nanoseconds of the system's time, and the longest time that one budget took.
    pub(crate) fn seen(&self) -> Option<(u64, Duration)> {
        let arrived = self.arrived.as_ref()?;
        Some((arrived.first_page?, arrived.longest))
    }
}

/// What a guest saw of its migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestView {
    /// From the moment at which the first of its CPUs stopped at the source until the last one had finished a page here. By the
    /// system's time of both hosts: as exact as that is the same. Without the time that digests took.
    pub pause: Duration,
    /// The longest that any CPU took for a few pages in the first second here, waiting included.
    pub longest_wait: Duration,
}

/// Nanoseconds of the system's time.
fn now() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// How long a worker is watched that has come from elsewhere.
const WATCHED: Duration = Duration::from_secs(1);
/// Pages after which it asks then: leaving a KVM guest costs up to 70 us, as long as it takes to write these.
const FEW: u64 = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_that_was_here_all_the_time_is_not_watched() {
        let mut view = View::default();
        assert_eq!(view.runs(5, u64::MAX), u64::MAX);
        view.asks(100);
        view.stops();
        assert!(view.stopped().is_some() && view.seen().is_none());
    }

    #[test]
    fn a_worker_that_arrives_asks_after_its_first_page() {
        let mut view = View::default();
        view.arrives();
        // It is asked to pause before it has finished one.
        assert_eq!(view.runs(7, 1000), 8);
        view.asks(7);
        assert!(view.wants_first_page() && view.seen().is_none());
        assert_eq!(view.runs(7, 1000), 8);
        view.asks(8);
        let (first_page, _) = view.seen().unwrap();
        assert!(!view.wants_first_page());
        assert!([8 + FEW, 1000].contains(&view.runs(8, 1000)), "the second may be over");
        view.asks(8 + FEW);
        assert_eq!(view.seen().unwrap().0, first_page);
    }

    #[test]
    fn time_without_a_budget_is_not_counted() {
        let mut view = View::default();
        view.arrives();
        assert_eq!(view.runs(0, 10), 1);
        view.asks(1);
        let (_, longest) = view.seen().unwrap();
        // It rests.
        std::thread::sleep(longest + Duration::from_millis(5));
        view.asks(1);
        assert_eq!(view.seen().unwrap().1, longest);
    }
}
