//! Where the engine's time comes from: measured speed decides when to switch over, so tests bring their own.

use std::{
    // Not from `crate::sync`: nothing waits for it.
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

/// Tells the time since some fixed moment. It never goes backwards.
#[derive(Clone)]
pub struct Clock(Arc<dyn Fn() -> Duration + Send + Sync>);

impl Clock {
    /// The monotonic clock of the machine.
    pub fn monotonic() -> Clock {
        let start = std::time::Instant::now();
        Clock(Arc::new(move || start.elapsed()))
    }

    /// A clock that tells what `now` returns, in nanoseconds. Where that goes back, as the time of day does when it is set, the clock
    /// stands still until it has come up again.
    pub fn from_fn(now: impl Fn() -> Duration + Send + Sync + 'static) -> Clock {
        let latest = AtomicU64::new(0);
        Clock(Arc::new(move || {
            let now = u64::try_from(now().as_nanos()).unwrap_or(u64::MAX);
            Duration::from_nanos(latest.fetch_max(now, Relaxed).max(now))
        }))
    }

    pub(crate) fn now(&self) -> Duration {
        (self.0)()
    }
}

impl std::fmt::Debug for Clock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Clock").field(&self.now()).finish()
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    /// A time that went back was a panic where the time between two moments is taken, also after the guest had been started.
    #[test]
    fn a_clock_never_goes_backwards() {
        let times = [5, 9, 3, 8, 10].map(Duration::from_millis);
        let next = AtomicU64::new(0);
        let clock = Clock::from_fn(move || times[next.fetch_add(1, Relaxed) as usize]);
        let told: Vec<_> = times.iter().map(|_| clock.now().as_millis()).collect();
        assert_eq!(told, [5, 9, 9, 9, 10]);
        assert!(Clock::from_fn(|| Duration::MAX).now() > Duration::from_secs(1 << 33));
    }
}
