//! What a postcopy source counts, and how long pages were waited for.

use std::time::Duration;

use super::Job;
use crate::sync::{
    Mutex,
    atomic::{AtomicU64, Ordering::Relaxed},
    lock,
};

/// The figures of one VM, over all attempts.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Report {
    /// From the first connect until RUN was written; `None` before, and for a process that only recovers.
    pub resume: Option<Duration>,
    /// Requests that came, also for pages that were on their way.
    pub requests: u64,
    /// From the arrival of a request until the page was written to the socket.
    pub latency: Latency,
    /// Pages sent because they were asked for, zeros included.
    pub urgent_pages: u64,
    /// Pages of zeros, asked for or at the end.
    pub zero_pages: u64,
    /// Pages with content sent by themselves.
    pub background_pages: u64,
    /// Pages sent because they were named as those needed first.
    pub prefetched_pages: u64,
    /// Recoveries that were begun.
    pub recoveries: u64,
    /// Pages with content that were not sent, or that the destination lacks.
    pub left: u64,
    /// Pages with content that the destination lacked when it was last asked, in a recovery; `None` before.
    pub lacking: Option<u64>,
    /// Bytes on main.
    pub main_bytes: u64,
    /// Bytes on the preempt connection.
    pub preempt_bytes: u64,
    /// Bytes of RAM.
    pub ram_bytes: u64,
    /// Bytes in a page.
    pub page_size: usize,
}

/// How long requests waited. The figures are exact to a sixteenth.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Latency {
    /// Half of all requests waited no longer.
    pub p50: Duration,
    /// 99 % waited no longer.
    pub p99: Duration,
    /// The longest.
    pub max: Duration,
}

/// The counters.
#[derive(Default)]
pub(super) struct Figures {
    resume_micros: AtomicU64,
    requests: AtomicU64,
    urgent: AtomicU64,
    zero: AtomicU64,
    background: AtomicU64,
    prefetched: AtomicU64,
    recoveries: AtomicU64,
    /// One more than the destination lacked when it was asked; 0 before.
    lacking: AtomicU64,
    main_bytes: AtomicU64,
    preempt_bytes: AtomicU64,
    latencies: Mutex<Histogram>,
    faults: Mutex<Vec<u64>>,
}

/// Why a page is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reason {
    Asked,
    Background,
    Prefetch,
    /// A page of zeros that was not asked for.
    Zero,
}

impl Figures {
    pub(super) fn set_resume(&self, time: Duration) {
        self.resume_micros.store(u64::try_from(time.as_micros()).unwrap_or(u64::MAX).max(1), Relaxed);
    }

    pub(super) fn add_request(&self) {
        self.requests.fetch_add(1, Relaxed);
    }

    /// Remembers that page number `page` was asked for.
    pub(super) fn add_fault(&self, page: u64) {
        let mut faults = lock(&self.faults);
        if faults.len() < MAX_FAULTS {
            faults.push(page);
        }
    }

    pub(super) fn faults(&self) -> Vec<u64> {
        lock(&self.faults).clone()
    }

    pub(super) fn add_pages(&self, reason: Reason, pages: u64, zeros: u64) {
        let counter = match reason {
            Reason::Asked => Some(&self.urgent),
            Reason::Background => Some(&self.background),
            Reason::Prefetch => Some(&self.prefetched),
            Reason::Zero => None,
        };
        if let Some(counter) = counter {
            counter.fetch_add(pages, Relaxed);
        }
        self.zero.fetch_add(zeros, Relaxed);
    }

    pub(super) fn add_bytes(&self, preempt: bool, bytes: u64) {
        if preempt { &self.preempt_bytes } else { &self.main_bytes }.fetch_add(bytes, Relaxed);
    }

    pub(super) fn add_recovery(&self) {
        self.recoveries.fetch_add(1, Relaxed);
    }

    pub(super) fn set_lacking(&self, pages: u64) {
        self.lacking.store(pages + 1, Relaxed);
    }

    pub(super) fn add_latency(&self, waited: Duration) {
        lock(&self.latencies).add(waited);
    }

    pub(super) fn report(&self, job: &Job) -> Report {
        let resume = self.resume_micros.load(Relaxed);
        Report {
            resume: (resume > 0).then(|| Duration::from_micros(resume)),
            requests: self.requests.load(Relaxed),
            latency: lock(&self.latencies).latency(),
            urgent_pages: self.urgent.load(Relaxed),
            zero_pages: self.zero.load(Relaxed),
            background_pages: self.background.load(Relaxed),
            prefetched_pages: self.prefetched.load(Relaxed),
            recoveries: self.recoveries.load(Relaxed),
            left: job.claims.count_free(job.pages.present()),
            lacking: self.lacking.load(Relaxed).checked_sub(1),
            main_bytes: self.main_bytes.load(Relaxed),
            preempt_bytes: self.preempt_bytes.load(Relaxed),
            ram_bytes: job.pages.layout().bytes(),
            page_size: job.pages.layout().page_size(),
        }
    }
}

/// Counts of microseconds, in sixteen classes for each power of two.
struct Histogram {
    counts: [u64; CLASSES],
    max: Duration,
}

impl Default for Histogram {
    fn default() -> Histogram {
        Histogram { counts: [0; CLASSES], max: Duration::ZERO }
    }
}

impl Histogram {
    fn add(&mut self, waited: Duration) {
        let micros = u64::try_from(waited.as_micros()).unwrap_or(u64::MAX);
        self.counts[class(micros)] += 1;
        self.max = self.max.max(waited);
    }

    fn latency(&self) -> Latency {
        Latency { p50: self.quantile(50), p99: self.quantile(99), max: self.max }
    }

    /// What `percent` of all waited at most.
    fn quantile(&self, percent: u64) -> Duration {
        let all: u64 = self.counts.iter().sum();
        let wanted = (all * percent).div_ceil(100);
        let mut seen = 0;
        for (class, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= wanted && seen > 0 {
                return Duration::from_micros(upper(class)).min(self.max);
            }
        }
        self.max
    }
}

/// The class of `micros`.
fn class(micros: u64) -> usize {
    if micros < 16 {
        return micros as usize;
    }
    let power = micros.ilog2();
    let sixteenth = (micros >> (power - 4)) & 15;
    ((power as usize - 3) * 16 + sixteenth as usize).min(CLASSES - 1)
}

/// The largest number of a class.
fn upper(class: usize) -> u64 {
    if class < 16 {
        return class as u64;
    }
    let (power, sixteenth) = (class / 16 + 3, class as u64 % 16);
    let lower = (16 + sixteenth) << (power - 4);
    lower + (1 << (power - 4)) - 1
}

/// Up to 2^40 microseconds, twelve days.
const CLASSES: usize = 38 * 16;

/// The most faults that are remembered: 32 MiB. A guest of 16 GiB that touches every page has as many.
const MAX_FAULTS: usize = 4 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_class_holds_what_differs_by_less_than_a_sixteenth() {
        for micros in (0..5000).chain([1 << 20, (1 << 30) + 12345, (1 << 39) + 1]) {
            let upper = upper(class(micros));
            assert!(upper >= micros && upper <= micros + micros / 16, "{micros} in a class up to {upper}");
        }
        assert_eq!(class(u64::MAX), CLASSES - 1);
    }

    #[test]
    fn quantiles_are_those_of_the_sorted_list() {
        let mut histogram = Histogram::default();
        assert_eq!(histogram.latency(), Latency::default());
        (1..=1000).for_each(|micros| histogram.add(Duration::from_micros(micros)));
        let Latency { p50, p99, max } = histogram.latency();
        assert!((500..=532).contains(&p50.as_micros()), "{p50:?}");
        assert!((990..=1000).contains(&p99.as_micros()), "{p99:?}");
        assert_eq!(max, Duration::from_millis(1));
    }
}
