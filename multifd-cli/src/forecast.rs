//! When a migration will be done, by what the latest round measured; or what it lacks.
//!
//! The model is the one by which the engine decides: a round of `d` bytes takes `d / speed`, and leaves behind what was written
//! meanwhile. It holds as long as the guest goes on as in that round.

use std::time::Duration;

use multifd::{progress::RoundStats, source};
use multifd_proto::packet::Compression;

use crate::table;

/// What is to be expected of a migration.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Forecast {
    /// It is over in this time, counted from the end of the round.
    In(Duration),
    /// Each round leaves at least as much as it sent.
    Never(Lack),
}

/// Why a migration does not come to its end.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Lack {
    /// More than that would be enough, in bytes per second.
    needs_rate: f64,
    /// So would a pause of that length.
    needs_downtime: Duration,
    /// What there is.
    rate: f64,
    /// What is allowed.
    limit: Duration,
}

impl Forecast {
    /// After `round`, in pages of `page_size`, with a pause of at most `limit`. `None` where nothing was measured.
    pub fn after(round: &RoundStats, page_size: u64, limit: Duration) -> Option<Forecast> {
        let took = round.took.as_secs_f64();
        let mut left = (round.dirty_after * page_size) as f64;
        if left == 0.0 {
            return Some(Forecast::In(Duration::ZERO));
        }
        let downtime = round.expected_downtime.as_secs_f64();
        let speed = left / downtime;
        if took == 0.0 || round.expected_downtime == Duration::MAX || !speed.is_finite() {
            return None;
        }
        let written = left / took;
        let in_the_pause = left / limit.as_secs_f64();
        // Where almost all that was sent is dirty again, the guest may write any number of times as fast as was seen.
        let is_least = round.dirty_after.saturating_mul(10) >= round.dirty_pages.saturating_mul(9);
        let never = Lack {
            needs_rate: if is_least && in_the_pause.is_finite() { in_the_pause } else { written.min(in_the_pause) },
            needs_downtime: round.expected_downtime,
            rate: speed,
            limit,
        };
        let fits = |left: f64| left / speed <= limit.as_secs_f64() || left < page_size as f64;
        let mut seconds = 0.0;
        for _ in 0..MOST_ROUNDS {
            if fits(left) {
                let time = Duration::try_from_secs_f64(seconds + left / speed).ok()?;
                return Some(Forecast::In(time));
            }
            if written >= speed {
                return Some(Forecast::Never(never));
            }
            seconds += left / speed;
            left *= written / speed;
        }
        Some(Forecast::Never(never))
    }
}

impl Lack {
    /// The same in a sentence, without its end.
    pub fn text(&self) -> String {
        format!(
            "needs more than {}/s or {} of downtime, has {}/s and {}",
            table::decimal_bytes(self.needs_rate),
            table::milliseconds(self.needs_downtime.as_secs_f64() * 1e3),
            table::decimal_bytes(self.rate),
            table::milliseconds(self.limit.as_secs_f64() * 1e3),
        )
    }
}

/// What can be done about a migration with `options` that does not converge.
pub fn remedies(options: &source::Options) -> String {
    let mut remedies = Vec::new();
    if options.format.compression == Compression::None && !options.format.auto_compression {
        remedies.push("--compression auto");
    }
    if !options.parameters.limits.throttle {
        remedies.push("slowing the guest down (without --no-throttle)");
    }
    if options.parameters.max_bandwidth.is_some() {
        remedies.push("a higher --max-bandwidth");
    }
    remedies.push("a longer --downtime-limit");
    remedies.push("postcopy, between QEMUs");
    remedies.join(", ")
}

/// By then a guest that writes almost as fast as its memory is sent has gone on to something else.
const MOST_ROUNDS: u32 = 10_000;

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// A round of `took` that left `dirty` MiB, with a speed of 100 MiB/s.
    fn round(took: u64, dirty: u64) -> RoundStats {
        let mut stats = RoundStats::default();
        (stats.took, stats.dirty_after) = (Duration::from_millis(took), dirty * MIB / 4096);
        stats.dirty_pages = 4 * stats.dirty_after;
        stats.expected_downtime = Duration::from_millis(dirty * 10);
        stats
    }

    fn forecast(took: u64, dirty: u64, limit: u64) -> Option<Forecast> {
        Forecast::after(&round(took, dirty), 4096, Duration::from_millis(limit))
    }

    #[test]
    fn what_fits_into_the_pause_is_sent_in_it() {
        assert_eq!(forecast(1000, 30, 300), Some(Forecast::In(Duration::from_millis(300))));
        assert_eq!(forecast(1000, 0, 0), Some(Forecast::In(Duration::ZERO)));
    }

    #[test]
    fn a_guest_that_writes_half_as_fast_takes_rounds_that_are_half_as_long() {
        // 100 MiB left in 2 s: 1 s, then 0.5 s, then 0.25 s in the pause.
        let Some(Forecast::In(time)) = forecast(2000, 100, 300) else { panic!("it converges") };
        assert!((time.as_secs_f64() - 1.75).abs() < 1e-9, "{time:?}");
        // With no pause at all, until less than a page is left: 2 s.
        let Some(Forecast::In(time)) = forecast(2000, 100, 0) else { panic!("it converges") };
        assert!((time.as_secs_f64() - 2.0).abs() < 1e-3, "{time:?}");
    }

    #[test]
    fn a_guest_that_writes_faster_never_comes_and_it_is_said_what_is_missing() {
        // 100 MiB left in 0.5 s: it writes 200 MiB/s, and the pause could send 30 MiB.
        let Some(Forecast::Never(lack)) = forecast(500, 100, 300) else { panic!("it does not converge") };
        assert_eq!(lack.text(), "needs more than 209.7 MB/s or 1.00 s of downtime, has 104.9 MB/s and 300.0 ms");
        // A little more than the pause can send: a little more speed is enough, however fast it writes.
        let Some(Forecast::Never(lack)) = forecast(100, 40, 300) else { panic!("it does not converge") };
        assert!(lack.text().contains("needs more than 139.8 MB/s or 400.0 ms"), "{}", lack.text());
    }

    /// The measured rate was named, which such a guest exceeds as soon as there is more to write in the same time.
    #[test]
    fn of_a_guest_that_rewrites_all_that_was_sent_the_rate_is_not_known() {
        let mut stats = round(500, 100);
        stats.dirty_pages = stats.dirty_after;
        let lack = Forecast::after(&stats, 4096, Duration::from_millis(300));
        let Some(Forecast::Never(lack)) = lack else { panic!("it does not converge") };
        assert!(lack.text().contains("needs more than 349.5 MB/s or 1.00 s"), "{}", lack.text());
    }

    #[test]
    fn what_is_in_use_already_is_no_advice() {
        let mut options = source::Options::default();
        assert_eq!(remedies(&options), "--compression auto, a longer --downtime-limit, postcopy, between QEMUs");
        options.format.auto_compression = true;
        options.parameters.limits.throttle = false;
        options.parameters.max_bandwidth = Some(1);
        assert_eq!(
            remedies(&options),
            "slowing the guest down (without --no-throttle), a higher --max-bandwidth, a longer --downtime-limit, postcopy, \
             between QEMUs"
        );
    }

    #[test]
    fn without_a_speed_nothing_is_foretold() {
        let mut stats = round(1000, 100);
        stats.expected_downtime = Duration::MAX;
        assert_eq!(Forecast::after(&stats, 4096, Duration::ZERO), None);
        assert_eq!(forecast(0, 100, 300), None);
    }
}
