//! Keeps all channels together below one rate: a token bucket.
//!
//! Channels take what they are about to send. Each take is given its place in time at once, in the order of the calls,
//! so no channel can overtake another that waits, and the rate is kept however many they are.

use std::time::{Duration, Instant};

use crate::{
    sync::{Arc, Condvar, Mutex, lock},
    transport::Stopper,
};

/// A limit on bytes per second that several threads share. Clones are the same limit.
#[derive(Clone)]
pub(crate) struct Limiter {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    /// Signalled when takes no longer wait.
    released: Condvar,
    epoch: Instant,
}

struct State {
    /// `None`: no take waits.
    bucket: Option<Bucket>,
    /// The limit was lifted for good.
    released: bool,
}

impl Limiter {
    /// A limit of `bytes_per_second`; `None` for no limit. After a pause, at most 50 ms worth is sent at once.
    pub(crate) fn new(bytes_per_second: Option<u64>) -> Limiter {
        let bucket = bytes_per_second.map(Bucket::new);
        let shared = Shared {
            state: Mutex::new(State { bucket, released: false }),
            released: Condvar::new(),
            epoch: Instant::now(),
        };
        Limiter { shared: Arc::new(shared) }
    }

    /// Waits until `bytes` may be sent. Returns at once where there is no limit (any more).
    ///
    /// Any number of bytes passes, also more than fits into the bucket: those who come after it wait the longer. Returns
    /// whether the limit holds the channels back: most of the bucket was taken already.
    pub(crate) fn take(&self, bytes: u64) -> bool {
        self.shared.take(bytes)
    }

    /// Changes the limit to `bytes_per_second`, unless it was lifted for good; `None` for no limit.
    pub(crate) fn set(&self, bytes_per_second: Option<u64>) {
        let mut state = lock(&self.shared.state);
        if !state.released {
            state.bucket = bytes_per_second.map(Bucket::new);
            drop(state);
            self.shared.released.notify_all();
        }
    }

    /// Lifts the limit for good, also for those who wait: while the guest is paused, each byte held back is downtime.
    pub(crate) fn set_unlimited(&self) {
        self.shared.release();
    }

    /// What releases all who wait, because the migration ends.
    pub(crate) fn stopper(&self) -> Box<dyn Stopper> {
        Box::new(LimiterStopper(self.shared.clone()))
    }
}

impl Shared {
    #[cfg(not(any(loom, shuttle)))]
    fn take(&self, bytes: u64) -> bool {
        let mut state = lock(&self.state);
        let Some(bucket) = &mut state.bucket else { return false };
        let now = self.epoch.elapsed();
        let is_tight = bucket.is_tight(now);
        let turn = bucket.take(now, bytes);
        while state.bucket.is_some() {
            let left = turn.saturating_sub(self.epoch.elapsed());
            if left.is_zero() {
                return is_tight;
            }
            let waited = self.released.wait_timeout(state, left);
            state = waited.unwrap_or_else(|poisoned| poisoned.into_inner()).0;
        }
        false
    }

    /// Model checkers have no clock: nobody ever waits for one.
    #[cfg(any(loom, shuttle))]
    fn take(&self, bytes: u64) -> bool {
        if let Some(bucket) = &mut lock(&self.state).bucket {
            bucket.take(self.epoch.elapsed(), bytes);
        }
        false
    }

    fn release(&self) {
        let mut state = lock(&self.state);
        (state.bucket, state.released) = (None, true);
        drop(state);
        self.released.notify_all();
    }
}

struct LimiterStopper(Arc<Shared>);

impl Stopper for LimiterStopper {
    fn stop(&self) {
        self.0.release();
    }
}

/// When who may send, without a clock: the time is an argument.
struct Bucket {
    bytes_per_second: u64,
    /// When the bucket is full again if nobody takes any more. Each take moves it on by what it takes to refill.
    full_at: Duration,
}

impl Bucket {
    fn new(bytes_per_second: u64) -> Bucket {
        // No rate at all would be a migration that never ends and divides by zero.
        Bucket { bytes_per_second: bytes_per_second.max(1), full_at: Duration::ZERO }
    }

    /// Whether more than half of the bucket was taken.
    #[cfg(not(any(loom, shuttle)))]
    fn is_tight(&self, now: Duration) -> bool {
        self.full_at.saturating_sub(now) > BURST / 2
    }

    /// Takes `bytes` and returns when they may be sent: now or before where there is room.
    fn take(&mut self, now: Duration, bytes: u64) -> Duration {
        let full_at = self.full_at.max(now);
        let nanos = (u128::from(bytes) * 1_000_000_000).div_ceil(u128::from(self.bytes_per_second));
        self.full_at = full_at.saturating_add(Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)));
        full_at.saturating_sub(BURST)
    }
}

/// How long it takes to fill the bucket. Long enough to make up for late wake-ups, short for the link.
const BURST: Duration = Duration::from_millis(50);

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use test_support::time_limit;

    use super::*;
    use crate::sync::thread;

    const MS: Duration = Duration::from_millis(1);
    const PACKET: u64 = 512 * 1024;

    #[test]
    fn over_any_time_no_more_is_sent_than_rate_and_burst_allow_and_hardly_less() {
        for rate in [1_000_000, 125_000_000, 12_500_000_000] {
            let mut bucket = Bucket::new(rate);
            let (mut now, mut sent) = (Duration::ZERO, 0u64);
            // Sizes from a SYNC packet to a full one.
            let sizes = [1344, PACKET, 4096, PACKET + 1344, 100];
            for take in 0..200_000 {
                let bytes = sizes[take % sizes.len()];
                now = now.max(bucket.take(now, bytes));
                // Sent at `now`: everything before fits into rate and burst.
                let allowed = (now + BURST).as_nanos() * u128::from(rate) / 1_000_000_000 + 1;
                assert!(u128::from(sent) <= allowed, "{sent} bytes after {now:?} at {rate} B/s");
                sent += bytes;
            }
            let fair = now.as_secs_f64() * rate as f64;
            assert!(sent as f64 >= 0.999 * fair, "{sent} of {fair} bytes at {rate} B/s");
        }
    }

    #[test]
    fn a_pause_allows_a_burst_of_50_ms_and_no_more() {
        let mut bucket = Bucket::new(1_000_000);
        let mut now = 3600 * Duration::from_secs(1);
        let mut at_once = 0;
        while bucket.take(now, 1000) <= now {
            at_once += 1000;
        }
        assert_eq!(at_once, 51_000, "50 ms worth, and the take that empties the bucket");
        now += 10 * MS;
        assert!(bucket.take(now, 1) <= now);
        assert!(bucket.take(now, 10_000) <= now);
        assert!(bucket.take(now, 1) > now, "10 ms later there is room for 10,000 bytes, less the 2,000 overdrawn");
    }

    #[test]
    fn a_take_larger_than_the_bucket_passes_and_those_after_it_wait() {
        let mut bucket = Bucket::new(1_000_000);
        assert_eq!(bucket.take(Duration::ZERO, 10_000_000), Duration::ZERO);
        assert_eq!(bucket.take(Duration::ZERO, 1), 9950 * MS);
    }

    #[test]
    fn a_bucket_is_tight_when_more_than_half_of_it_was_taken() {
        let mut bucket = Bucket::new(1_000_000);
        bucket.take(Duration::ZERO, 25_000);
        assert!(!bucket.is_tight(Duration::ZERO));
        bucket.take(Duration::ZERO, 1);
        assert!(bucket.is_tight(Duration::ZERO) && !bucket.is_tight(MS) && !bucket.is_tight(1000 * MS));
        let limiter = Limiter::new(Some(1));
        assert!(!limiter.take(1), "it was full");
        assert!((0..3).any(|_| limiter.take(1)));
    }

    #[test]
    fn a_limit_can_be_changed_until_it_is_lifted_for_good() {
        let limiter = Arc::new(Limiter::new(Some(1)));
        limiter.take(1_000_000);
        let waits = limiter.clone();
        let waiting = thread::spawn(move || waits.take(1));
        thread::sleep(20 * MS);
        assert!(!waiting.is_finished());
        time_limit(Duration::from_secs(10), move || {
            limiter.set(None);
            waiting.join().unwrap();
            limiter.set(Some(1));
            assert!(lock(&limiter.shared.state).bucket.is_some());
            limiter.set_unlimited();
            limiter.set(Some(1));
            assert!((0..1000).all(|_| !limiter.take(u64::MAX)));
        });
    }

    #[test]
    fn numbers_without_measure_do_not_overflow() {
        let mut bucket = Bucket::new(0);
        bucket.take(Duration::MAX, u64::MAX);
        bucket.take(Duration::ZERO, u64::MAX);
        assert_eq!(bucket.full_at, Duration::MAX);
    }

    #[test]
    fn four_threads_share_the_rate_evenly() {
        let limiter = Arc::new(Limiter::new(Some(200_000_000)));
        let begin = Instant::now();
        let threads: Vec<_> = (0..4)
            .map(|_| {
                let limiter = limiter.clone();
                thread::spawn(move || {
                    let mut sent = 0;
                    while begin.elapsed() < 500 * MS {
                        limiter.take(PACKET);
                        sent += PACKET;
                    }
                    sent
                })
            })
            .collect();
        let sent: Vec<u64> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        let seconds = begin.elapsed().as_secs_f64();
        // The burst, and a packet for each thread that was given its turn before the end.
        let allowed = 200e6 * (seconds + 0.05) + 4.0 * PACKET as f64;
        let total = sent.iter().sum::<u64>() as f64;
        assert!(total <= allowed && total >= 0.5 * allowed, "{sent:?} in {seconds} s");
        // Whoever starts first has the burst to itself; after that turns are given in order.
        assert!(*sent.iter().min().unwrap() as f64 >= 0.4 * total / 4.0, "{sent:?}");
    }

    #[test]
    fn lifting_the_limit_and_stopping_release_all_who_wait() {
        let releases: [fn(&Limiter); 2] = [Limiter::set_unlimited, |limiter| limiter.stopper().stop()];
        for release in releases {
            let limiter = Arc::new(Limiter::new(Some(1)));
            limiter.take(1_000_000);
            let threads: Vec<_> = (0..3)
                .map(|_| {
                    let limiter = limiter.clone();
                    thread::spawn(move || limiter.take(1_000_000))
                })
                .collect();
            thread::sleep(20 * MS);
            assert!(threads.iter().all(|thread| !thread.is_finished()));
            release(&limiter);
            time_limit(Duration::from_secs(10), || {
                for thread in threads {
                    thread.join().unwrap();
                }
                limiter.take(u64::MAX);
            });
        }
    }

    #[test]
    fn without_a_limit_nobody_waits() {
        let limiter = Limiter::new(None);
        time_limit(Duration::from_secs(10), || assert!((0..1000).all(|_| !limiter.take(u64::MAX))));
    }
}
