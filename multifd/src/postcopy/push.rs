//! The background: sends all pages with content that no thread has sent, and goes on behind a fault where there was one; then all
//! pages of zeros that were not asked for.
//!
//! Those of zeros come last, and they have to come. A QEMU whose stream has ended gives the pages that it did not get back to the
//! kernel, which makes them zeros, but it takes its global lock before it does. If the thread that has this lock waits for
//! such a page, both wait forever: seen with QEMU 7.2, 10.0 and 11.1, whose devices touch memory under the lock. So the stream
//! ends when every page is on its way.

use std::time::{Duration, Instant};

use super::{Claims, NO_FAULT, figures::Reason, inbox::Mail, link::Link};
use crate::{
    dirty_bitmap::DirtyBitmap,
    error::Error,
    progress::Phase,
    sync::{
        Deadline,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

impl Link<'_> {
    /// Sends `first`, then all other pages, and answers requests in between where main is the only connection.
    pub(super) fn push(&mut self, first: &[u64]) -> Result<(), Error> {
        let job = self.job().clone();
        job.progress.open_round(0, job.claims.count_free(job.pages.present()));
        self.set_phase(Phase::Postcopy);
        self.open_part();
        let batch = if job.options.preempt { BATCH } else { BATCH_BETWEEN_REQUESTS };
        let mut pace = Pace::new(job.handle.max_bandwidth());
        for pages in first.chunks(batch) {
            let claimed: Vec<u64> = pages.iter().copied().filter(|&page| job.claims.claim(page)).collect();
            self.main().sends(&claimed);
            self.one_batch(&claimed, Reason::Prefetch, &mut pace)?;
        }
        let mut next = 0;
        while let Some(pages) = next_batch(&job.claims, job.pages.present(), &job.after_fault, &mut next, batch) {
            self.main().sends(&pages);
            self.one_batch(&pages, Reason::Background, &mut pace)?;
        }
        self.push_zeros()
    }

    /// Names all pages that are left as zeros.
    fn push_zeros(&mut self) -> Result<(), Error> {
        let job = self.job().clone();
        let layout = job.pages.layout();
        let (mut next, mut pages) = (0, Vec::with_capacity(ZEROS));
        loop {
            pages.clear();
            while pages.len() < ZEROS
                && let Some(page) = job.claims.next_unclaimed(layout, next)
            {
                next = page + 1;
                if job.claims.claim(page) {
                    pages.push(page);
                }
            }
            if pages.is_empty() {
                return Ok(());
            }
            self.serve(Deadline::after(Some(Duration::ZERO)), |_| false)?;
            self.main().sends(&pages);
            self.main().send_claimed(&pages, Reason::Zero)?;
        }
    }

    fn one_batch(&mut self, pages: &[u64], reason: Reason, pace: &mut Pace) -> Result<(), Error> {
        let (handle, bytes) = (self.job().handle.clone(), pages.len() * self.job().pages.layout().page_size());
        loop {
            let turn = pace.turn(Instant::now(), bytes);
            self.serve(Deadline::after(Some(turn)), |_| handle.max_bandwidth() != pace.bytes_per_second)?;
            // At a rate that has changed these pages may have been due for long, or not be due for long.
            if !pace.change(handle.max_bandwidth()) {
                break;
            }
        }
        self.main().send_claimed(pages, reason)
    }

    /// Answers requests, where main has to, until `enough` or `deadline`.
    ///
    /// # Errors
    /// [`Error::Stopped`], or what went wrong with a page.
    pub(super) fn serve(&mut self, deadline: Deadline, enough: impl Fn(&Mail) -> bool) -> Result<(), Error> {
        let answers = !self.job().options.preempt;
        loop {
            self.inbox().wait(deadline, |mail| enough(mail) || (answers && mail.has_urgent()))?;
            let Some(urgent) = answers.then(|| self.inbox().take()).flatten() else {
                return Ok(());
            };
            self.open_part();
            self.main().answer(&urgent)?;
        }
    }
}

/// Claims up to `most` pages of `present` that are not claimed, from `next` on, or behind the last fault. `None`: there are none.
pub(super) fn next_batch(
    claims: &Claims,
    present: &DirtyBitmap,
    after_fault: &AtomicU64,
    next: &mut u64,
    most: usize,
) -> Option<Vec<u64>> {
    let after_fault = after_fault.swap(NO_FAULT, Relaxed);
    if after_fault != NO_FAULT {
        *next = after_fault;
    }
    let mut pages = Vec::with_capacity(most);
    while pages.len() < most {
        let free = claims.next_free(present, *next);
        let Some(page) = free.or_else(|| claims.next_free(present, 0)) else { break };
        *next = page + 1;
        // Another thread may have been faster.
        if claims.claim(page) {
            pages.push(page);
        }
    }
    (!pages.is_empty()).then_some(pages)
}

/// Spreads the background over time.
struct Pace {
    bytes_per_second: Option<u64>,
    /// When what was sent so far is paid for.
    paid_at: Option<Instant>,
}

impl Pace {
    fn new(bytes_per_second: Option<u64>) -> Pace {
        Pace { bytes_per_second, paid_at: None }
    }

    /// Takes another rate from now on, at which nothing was sent. Returns whether it is another one.
    fn change(&mut self, bytes_per_second: Option<u64>) -> bool {
        let changed = bytes_per_second != self.bytes_per_second;
        if changed {
            *self = Pace::new(bytes_per_second);
        }
        changed
    }

    /// How long to wait before `bytes` are sent at `now`.
    fn turn(&mut self, now: Instant, bytes: usize) -> Duration {
        let Some(rate) = self.bytes_per_second else { return Duration::ZERO };
        let begin = self.paid_at.map_or(now, |paid| paid.max(now.checked_sub(BURST).unwrap_or(now)));
        let cost = Duration::try_from_secs_f64(bytes as f64 / rate.max(1) as f64).unwrap_or(LONGEST).min(LONGEST);
        self.paid_at = Some(begin + cost);
        begin.saturating_duration_since(now)
    }
}

/// Pages of the background that are sent at once: 256 KiB, where requests have a connection of their own.
const BATCH: usize = 64;
/// 64 KiB, where a request waits for them.
const BATCH_BETWEEN_REQUESTS: usize = 16;
/// Words for pages of zeros that are sent at once: 2 KiB, which the destination has to put into place one by one.
const ZEROS: usize = 256;
/// What was not sent in the past can be sent later, up to so much.
const BURST: Duration = Duration::from_millis(50);
const LONGEST: Duration = Duration::from_secs(3600);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_kept_over_time() {
        let (begin, mut pace) = (Instant::now(), Pace::new(Some(1_000_000)));
        let mut now = begin;
        for _ in 0..100 {
            now += pace.turn(now, 10_000);
        }
        assert_eq!(now - begin, Duration::from_millis(990), "the first is sent at once");
        // A long pause is not made up for.
        now += Duration::from_secs(60);
        let waits: Duration = (0..20).map(|_| pace.turn(now, 10_000)).last().unwrap();
        assert_eq!(waits, Duration::from_millis(140));
        // Of a rate that was much lower nothing is left to be waited for.
        assert!(pace.change(Some(1)) && !pace.change(Some(1)));
        assert_eq!([0; 2].map(|_| pace.turn(now, 7200)), [Duration::ZERO, Duration::from_secs(3600)]);
        assert!(pace.change(Some(7200)));
        assert_eq!([0; 2].map(|_| pace.turn(now, 7200)), [Duration::ZERO, Duration::from_secs(1)]);
        assert_eq!(Pace::new(None).turn(now, usize::MAX), Duration::ZERO);
        assert_eq!(Pace::new(Some(1)).turn(now, usize::MAX), Duration::ZERO);
    }
}
