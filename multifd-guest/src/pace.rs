//! How far a worker may go before it has to rest: the write rate and the throttle, as arithmetic.
//!
//! A worker owns a [`Pacer`] and asks it whenever it has used up what it was granted. Time is an argument. At full speed
//! the answer is "forever", and the guest does not leave its loop at all.

use std::time::{Duration, Instant};

/// How fast a guest writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rate {
    /// Not at all.
    Idle,
    /// So many bytes of pages per second, all workers together.
    BytesPerSecond(u64),
    /// As fast as it can.
    Max,
}

/// Grants one worker its pages.
#[derive(Debug)]
pub struct Pacer {
    pace: Pace,
    /// 0..=99: share of the time that is taken away.
    throttle: u8,
    /// Where the count of the present rate began: so many pages were done at that time.
    origin: Option<(Instant, u64)>,
    /// The grant that is in use, when throttled at full speed: when it began, how many pages, how many were done before.
    slice: Option<(Instant, u64, u64)>,
    resting_until: Option<Instant>,
    slice_pages: u64,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Pace {
    Idle,
    PagesPerSecond(f64),
    Max,
}

/// What a worker may do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grant {
    /// Go on until so many pages are done in all.
    Until(u64),
    /// Do nothing for so long; `None`: until something changes.
    Rest(Option<Duration>),
}

impl Pacer {
    /// One of `workers` that share `rate`.
    pub fn new(rate: Rate, workers: u64, page_size: u64) -> Pacer {
        let pace = match rate {
            Rate::Idle | Rate::BytesPerSecond(0) => Pace::Idle,
            Rate::BytesPerSecond(rate) => Pace::PagesPerSecond(rate as f64 / page_size as f64 / workers as f64),
            Rate::Max => Pace::Max,
        };
        Pacer { pace, throttle: 0, origin: None, slice: None, resting_until: None, slice_pages: 256 }
    }

    /// Whether it never grants anything.
    pub fn is_idle(&self) -> bool {
        self.pace == Pace::Idle
    }

    /// Takes away `percent` of the time, at most 99.
    pub fn throttle(&mut self, percent: u8) {
        self.throttle = percent.min(99);
        self.restart();
    }

    /// Forgets the past, after a time in which the worker did not run on purpose.
    pub fn restart(&mut self) {
        self.origin = None;
        self.slice = None;
        self.resting_until = None;
    }

    /// What a worker may do that has finished `done` pages.
    pub fn grant(&mut self, done: u64, now: Instant) -> Grant {
        match self.pace {
            Pace::Idle => Grant::Rest(None),
            Pace::Max if self.throttle == 0 => Grant::Until(u64::MAX),
            Pace::Max => self.grant_slice(done, now),
            Pace::PagesPerSecond(pace) => self.grant_at(pace * f64::from(100 - self.throttle) / 100.0, done, now),
        }
    }

    /// Runs for a few milliseconds, then rests for as long as keeps the share.
    fn grant_slice(&mut self, done: u64, now: Instant) -> Grant {
        if let Some((began, pages, before)) = self.slice {
            if done < before + pages {
                return Grant::Until(before + pages);
            }
            let ran = now.saturating_duration_since(began);
            let aim = SLICE.as_secs_f64() / ran.as_secs_f64().max(1e-6);
            // At most doubled, so that one odd measurement does not become a grant of minutes.
            self.slice_pages = ((pages as f64 * aim.min(2.0)) as u64).max(1);
            self.slice = None;
            self.resting_until = Some(now + ran * u32::from(self.throttle) / u32::from(100 - self.throttle));
        }
        if let Some(until) = self.resting_until.filter(|&until| until > now) {
            return Grant::Rest(Some(until - now));
        }
        self.resting_until = None;
        self.slice = Some((now, self.slice_pages, done));
        Grant::Until(done + self.slice_pages)
    }

    fn grant_at(&mut self, pages_per_second: f64, done: u64, now: Instant) -> Grant {
        let (began, before) = *self.origin.get_or_insert((now, done));
        let due = pages_per_second * now.saturating_duration_since(began).as_secs_f64();
        let ahead = done.saturating_sub(before) as f64;
        if due - ahead > (pages_per_second * BACKLOG.as_secs_f64()).max(1.0) {
            // It cannot keep up, or stood still: what it missed is not made up for in one burst.
            self.origin = Some((now - BACKLOG, done));
            return Grant::Until(done + ((pages_per_second * BACKLOG.as_secs_f64()) as u64).max(1));
        }
        if due >= ahead + 1.0 {
            return Grant::Until(before + due as u64);
        }
        let missing = Duration::try_from_secs_f64((ahead + 1.0 - due) / pages_per_second).unwrap_or(TICK);
        Grant::Rest(Some(missing.clamp(TICK, Duration::from_secs(1))))
    }
}

/// A worker at a given rate looks again after so long: leaving a KVM guest costs up to 70 us.
const TICK: Duration = Duration::from_millis(2);
/// How long a throttled worker runs at a time.
const SLICE: Duration = Duration::from_millis(5);
/// How much missed time is made up for.
const BACKLOG: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use super::*;

    /// Simulates a guest that writes `speed` pages per second, for ten seconds.
    fn pages_in_ten_seconds(mut pacer: Pacer, speed: f64) -> f64 {
        let start = Instant::now();
        let mut now = start;
        let mut done = 0;
        while now < start + Duration::from_secs(10) {
            match pacer.grant(done, now) {
                Grant::Until(until) => {
                    // No step of the simulation is longer than the rest of the time.
                    let pages = (until - done).min((speed * 0.1) as u64 + 1);
                    now += Duration::from_secs_f64(pages as f64 / speed);
                    done += pages;
                }
                Grant::Rest(Some(time)) => now += time,
                Grant::Rest(None) => break,
            }
        }
        done as f64
    }

    fn pacer(rate: Rate, throttle: u8) -> Pacer {
        let mut pacer = Pacer::new(rate, 2, 4096);
        pacer.throttle(throttle);
        pacer
    }

    #[track_caller]
    fn assert_near(found: f64, expected: f64) {
        assert!((found / expected - 1.0).abs() < 0.05, "{found} instead of {expected}");
    }

    #[test]
    fn a_rate_is_kept() {
        // 2 workers share 8,192,000 bytes per second: 1000 pages per second each.
        assert_near(pages_in_ten_seconds(pacer(Rate::BytesPerSecond(8_192_000), 0), 1e6), 10_000.0);
        assert_near(pages_in_ten_seconds(pacer(Rate::BytesPerSecond(8_192_000), 50), 1e6), 5_000.0);
        assert_near(pages_in_ten_seconds(pacer(Rate::BytesPerSecond(81_920), 0), 1e6), 100.0);
    }

    #[test]
    fn a_rate_above_the_guests_speed_is_its_speed() {
        assert_near(pages_in_ten_seconds(pacer(Rate::BytesPerSecond(u64::MAX), 0), 1e5), 1e6);
    }

    #[test]
    fn full_speed_is_one_grant_without_end() {
        assert_eq!(pacer(Rate::Max, 0).grant(5, Instant::now()), Grant::Until(u64::MAX));
    }

    #[test]
    fn a_throttled_guest_gets_its_share_of_the_time() {
        for (percent, share) in [(20, 0.8), (50, 0.5), (90, 0.1), (99, 0.01)] {
            assert_near(pages_in_ten_seconds(pacer(Rate::Max, percent), 1e6), 1e7 * share);
        }
    }

    #[test]
    fn an_idle_guest_rests_until_something_changes() {
        assert_eq!(pacer(Rate::Idle, 0).grant(0, Instant::now()), Grant::Rest(None));
        assert_eq!(pacer(Rate::BytesPerSecond(0), 10).grant(0, Instant::now()), Grant::Rest(None));
    }

    #[test]
    fn time_that_was_missed_is_not_made_up_for_in_one_burst() {
        let mut pacer = pacer(Rate::BytesPerSecond(8_192_000), 0);
        let now = Instant::now();
        pacer.grant(0, now);
        let Grant::Until(until) = pacer.grant(0, now + Duration::from_secs(100)) else { panic!("has to run") };
        assert!(until <= 200, "{until} pages at once");
    }
}
