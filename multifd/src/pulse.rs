//! Notices that a peer has gone silent.
//!
//! Every connection of one side counts the bytes that it moved here. A peer that owes bytes and moves fewer than
//! [`LEAST`] within the limit ends the migration, however it spreads them: a byte now and then does not help. The engine
//! decides by this account and never by [`Progress`](crate::progress::Progress), which is for display.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use crate::{error::Error, stop::StopHandle, sync::Arc, watchdog::Timers};

/// Bytes moved on all connections of one side, in either direction. Clones count together.
#[derive(Clone, Default)]
pub(crate) struct Pulse {
    bytes: Arc<AtomicU64>,
}

impl Pulse {
    /// Counts `bytes`.
    pub(crate) fn add(&self, bytes: usize) {
        self.bytes.fetch_add(bytes as u64, Relaxed);
    }

    /// Stops the migration by `stop` if fewer than [`LEAST`] bytes are moved within the limit, from now until
    /// [`rest`](Self::rest). `limit` is asked at each look, since it may change; `None` for no limit.
    pub(crate) fn watch(
        &self,
        timers: &Timers,
        limit: impl Fn() -> Option<Duration> + Send + 'static,
        stop: &StopHandle,
    ) {
        let stop = stop.clone();
        self.watch_with(timers, limit, move |limit| _ = stop.stop(Error::Stalled { limit }));
    }

    /// The same with `silent`, which is called once with the limit, in place of the stop.
    pub(crate) fn watch_with(
        &self,
        timers: &Timers,
        limit: impl Fn() -> Option<Duration> + Send + 'static,
        silent: impl Fn(Duration) + Send + 'static,
    ) {
        let pulse = self.clone();
        let next_look = |limit: Option<Duration>| {
            limit.map_or(LONGEST_LOOK, |limit| (limit / LOOKS).clamp(SHORTEST_LOOK, LONGEST_LOOK))
        };
        let (mut seen, mut quiet) = (self.bytes.load(Relaxed), Duration::ZERO);
        let mut look = next_look(limit());
        timers.set(TIMER, look, move || {
            let bytes = pulse.bytes.load(Relaxed);
            if bytes - seen >= LEAST {
                (seen, quiet) = (bytes, Duration::ZERO);
            } else {
                quiet += look;
            }
            let limit = limit();
            if let Some(limit) = limit
                && quiet + look / 2 >= limit
            {
                silent(limit);
                return None;
            }
            look = next_look(limit);
            Some(look)
        });
    }

    /// Ends the watch: this side has something to do for which it needs no peer.
    pub(crate) fn rest(timers: &Timers) {
        timers.clear(TIMER);
    }
}

/// Fewer bytes than these within the limit are silence. A SYNC packet of 4 KiB pages has 1344.
pub(crate) const LEAST: u64 = 4096;
/// How often the account is looked at within the limit, at least.
const LOOKS: u32 = 8;
/// However short the limit is: the time between two looks is what is counted.
const SHORTEST_LOOK: Duration = Duration::from_millis(1);
/// By then a changed limit is noticed.
const LONGEST_LOOK: Duration = Duration::from_secs(1);
const TIMER: &str = "silence";

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use std::{sync::mpsc, time::Duration};

    use super::*;
    use crate::{threads::StdThreads, transport::Stopper, watchdog::Watchdog};

    struct Tell(mpsc::Sender<()>);

    impl Stopper for Tell {
        fn stop(&self) {
            let _ = self.0.send(());
        }
    }

    /// Ends when `pulse` has stopped the migration while `meanwhile` was called again and again.
    fn stops(meanwhile: impl Fn(&Pulse)) -> bool {
        let (stop, pulse) = (StopHandle::new(), Pulse::default());
        let watchdog = Watchdog::start(&StdThreads, &stop).unwrap();
        let (tell, stopped) = mpsc::channel();
        stop.register(Box::new(Tell(tell)));
        pulse.watch(watchdog.timers(), || Some(Duration::from_millis(80)), &stop);
        (0..100).any(|_| {
            meanwhile(&pulse);
            stopped.recv_timeout(Duration::from_millis(5)).is_ok()
        })
    }

    #[test]
    fn silence_and_a_byte_now_and_then_end_the_migration() {
        assert!(stops(|_| {}));
        assert!(stops(|pulse| pulse.add(1)));
    }

    /// Its eighth was no time at all, of which any number made none.
    #[test]
    fn the_shortest_limit_is_one() {
        for limit in [Duration::ZERO, Duration::from_nanos(1), Duration::from_nanos(7)] {
            let (stop, pulse) = (StopHandle::new(), Pulse::default());
            let watchdog = Watchdog::start(&StdThreads, &stop).unwrap();
            let (tell, stopped) = mpsc::channel();
            stop.register(Box::new(Tell(tell)));
            pulse.watch(watchdog.timers(), move || Some(limit), &stop);
            stopped.recv_timeout(Duration::from_secs(60)).unwrap();
        }
    }

    #[test]
    fn a_limit_that_is_set_meanwhile_counts() {
        let (stop, pulse) = (StopHandle::new(), Pulse::default());
        let watchdog = Watchdog::start(&StdThreads, &stop).unwrap();
        let (tell, stopped) = mpsc::channel();
        stop.register(Box::new(Tell(tell)));
        let limit = Arc::new(crate::sync::Mutex::new(None));
        let asked = limit.clone();
        pulse.watch(watchdog.timers(), move || *crate::sync::lock(&asked), &stop);
        assert!(stopped.recv_timeout(LONGEST_LOOK + Duration::from_millis(200)).is_err());
        *crate::sync::lock(&limit) = Some(Duration::from_millis(1));
        stopped.recv_timeout(Duration::from_secs(60)).unwrap();
    }

    #[test]
    fn a_peer_that_moves_bytes_is_left_alone() {
        let (stop, pulse) = (StopHandle::new(), Pulse::default());
        let watchdog = Watchdog::start(&StdThreads, &stop).unwrap();
        // However late this thread is, each look finds what it needs.
        pulse.watch(watchdog.timers(), || Some(Duration::from_secs(3600)), &stop);
        pulse.add(1 << 20);
        Pulse::rest(watchdog.timers());
        assert!(!stop.is_stopped());
    }
}
