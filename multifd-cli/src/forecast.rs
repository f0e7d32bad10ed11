//! When a migration will be done, by what its rounds measured; or what it lacks.
//!
//! The model is the one by which the engine decides: a round of `d` bytes takes `d / speed`, and leaves behind what was written
//! meanwhile ([`Writes`]). It holds as long as the guest goes on as in these rounds.

use std::time::Duration;

use multifd::{progress::RoundStats, source};
use multifd_proto::packet::Compression;

use crate::{table, writes::Writes};

/// What is to be expected of a migration.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Forecast {
    /// It is over in this time, counted from the end of the round.
    In(Duration),
    /// No round leaves so little that it fits into the pause.
    Never(Lack),
}

/// Why a migration does not come to its end.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Lack {
    /// More than that would be enough, in bytes per second.
    needs_rate: f64,
    /// So would a pause of that length: the shortest that any round can lead to.
    needs_downtime: Duration,
    /// What there is in a pause.
    rate: f64,
    /// What is allowed.
    limit: Duration,
}

/// How fast pages are sent, in bytes per second.
#[derive(Clone, Copy)]
struct Speed {
    /// While the guest runs: a limit on bandwidth holds there.
    round: f64,
    pause: f64,
}

/// How it ends, by the model.
enum End {
    /// The rest fits after so many seconds, which end with the pause.
    Fits(f64),
    /// It never does; so many bytes are the least that is left.
    Least(f64),
}

impl Forecast {
    /// After the rounds in `latest`, the latest first, in pages of `page_size`, with a pause of at most `limit`. `None` where nothing was
    /// measured.
    pub fn after<'a>(
        mut latest: impl Iterator<Item = &'a RoundStats>,
        page_size: u64,
        limit: Duration,
    ) -> Option<Forecast> {
        let round = latest.next()?;
        let left = (round.dirty_after * page_size) as f64;
        if left == 0.0 {
            return Some(Forecast::In(Duration::ZERO));
        }
        let pause = left / round.expected_downtime.as_secs_f64();
        let took = round.took.as_secs_f64();
        if took == 0.0 || round.expected_downtime == Duration::MAX || !pause.is_finite() {
            return None;
        }
        let speed = Speed { round: sent(round, page_size).unwrap_or(pause), pause };
        let writes = latest.find_map(|other| Writes::of_two(round, other, page_size));
        let known = writes.unwrap_or_else(|| Writes::of_one(round, page_size));
        let limit_seconds = limit.as_secs_f64();
        let end = |speed| run(left, known, speed, limit_seconds, page_size as f64);
        match end(speed) {
            End::Fits(seconds) => Duration::try_from_secs_f64(seconds).ok().map(Forecast::In),
            End::Least(least) => {
                let fits = |rate: f64| matches!(end(Speed { round: rate, pause: rate.max(pause) }), End::Fits(_));
                let in_the_pause = left / limit_seconds;
                // Where almost all that was sent is dirty again, the guest may write any number of times as fast as one round shows.
                let is_least = round.dirty_after.saturating_mul(10) >= round.dirty_pages.saturating_mul(9);
                let needs_rate = match writes {
                    None if is_least && in_the_pause.is_finite() => in_the_pause,
                    _ => least_rate(speed.round, known.rate().min(in_the_pause), fits),
                };
                let needs_downtime = Duration::try_from_secs_f64(least / pause).unwrap_or(Duration::MAX);
                Some(Forecast::Never(Lack { needs_rate, needs_downtime, rate: pause, limit }))
            }
        }
    }
}

/// How long a round takes that sends what `round` left.
pub fn next_round(round: &RoundStats, page_size: u64) -> Duration {
    let left = (round.dirty_after * page_size) as f64;
    let at = |speed: f64| Duration::try_from_secs_f64(left / speed).ok();
    sent(round, page_size).and_then(at).unwrap_or(round.expected_downtime)
}

/// Bytes of pages with content per second in `round`, if there were any.
fn sent(round: &RoundStats, page_size: u64) -> Option<f64> {
    let sent = (round.normal * page_size) as f64 / round.took.as_secs_f64();
    Some(sent).filter(|sent| *sent > 0.0 && sent.is_finite())
}

/// Goes on from `left` bytes by the model, round by round, until they fit into a pause of `limit` seconds or do not get fewer.
fn run(mut left: f64, writes: Writes, speed: Speed, limit: f64, page_size: f64) -> End {
    let mut seconds = 0.0;
    let mut least = left;
    for _ in 0..MOST_ROUNDS {
        if left / speed.pause <= limit || left < page_size {
            return End::Fits(seconds + left / speed.pause);
        }
        let took = left / speed.round;
        let next = writes.in_time(took);
        if next >= left * PROGRESS {
            break;
        }
        seconds += took;
        left = next;
        least = left;
    }
    End::Least(least)
}

/// The least rate between `from`, with which it does not fit, and about `to` with which it does.
fn least_rate(from: f64, to: f64, fits: impl Fn(f64) -> bool) -> f64 {
    let (mut low, mut high) = (from.min(to), to);
    if !fits(high) {
        return high;
    }
    for _ in 0..30 {
        let middle = f64::midpoint(low, high);
        if fits(middle) { high = middle } else { low = middle }
    }
    high
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
const MOST_ROUNDS: u32 = 1000;
/// A round that leaves more than this part of what it sent brings the end no nearer.
const PROGRESS: f64 = 0.999;

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
        Forecast::after([&round(took, dirty)].into_iter(), 4096, Duration::from_millis(limit))
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
        let lack = Forecast::after([&stats].into_iter(), 4096, Duration::from_millis(300));
        let Some(Forecast::Never(lack)) = lack else { panic!("it does not converge") };
        assert!(lack.text().contains("needs more than 349.5 MB/s or 1.00 s"), "{}", lack.text());
    }

    /// 30 MiB rewritten all the time, after a first round of 4 s and a second of 0.3 s.
    fn of_a_small_part(limit: u64) -> Forecast {
        let rounds = [round(300, 30), round(4000, 30)];
        Forecast::after(rounds.iter(), 4096, Duration::from_millis(limit)).unwrap()
    }

    /// The first round says that it writes 7.5 MiB/s, and the second that all of it was written in its time. One alone had the end near.
    #[test]
    fn two_rounds_tell_how_much_a_guest_writes_and_how_fast() {
        assert!(matches!(forecast(4000, 30, 200), Some(Forecast::In(_))));
        let Forecast::Never(lack) = of_a_small_part(200) else { panic!("30 MiB are always dirty") };
        assert_eq!(lack.needs_downtime, Duration::from_millis(300), "that of what it writes, and no less");
        assert!((lack.needs_rate / (150.0 * MIB as f64) - 1.0).abs() < 0.02, "30 MiB in 200 ms: {}", lack.text());
        assert!(matches!(of_a_small_part(301), Forecast::In(_)));
    }

    /// Twice as long a round left twice as much: no end of what it writes is in sight.
    #[test]
    fn where_more_time_leaves_more_the_rate_decides() {
        for (rate, converges) in [(50, true), (150, false)] {
            let rounds = [round(400, rate * 400 / 1000), round(800, rate * 800 / 1000)];
            let forecast = Forecast::after(rounds.iter(), 4096, Duration::from_millis(10)).unwrap();
            assert_eq!(matches!(forecast, Forecast::In(_)), converges, "{rate} MiB/s: {forecast:?}");
        }
    }

    /// Below a limit on bandwidth rounds are slow, and the pause is not.
    #[test]
    fn a_round_has_the_speed_of_rounds_and_the_pause_its_own() {
        let mut stats = round(1000, 100);
        // 200 MiB in 1 s, and 100 MiB in 0.1 s.
        stats.normal = 200 * MIB / 4096;
        stats.expected_downtime = Duration::from_millis(100);
        let Some(Forecast::In(time)) = Forecast::after([&stats].into_iter(), 4096, Duration::from_millis(60)) else {
            panic!("50 MiB are left by the next round")
        };
        assert!((time.as_secs_f64() - 0.55).abs() < 1e-6, "a round of 100 MiB, and a pause of 50: {time:?}");
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
        assert_eq!(Forecast::after([&stats].into_iter(), 4096, Duration::ZERO), None);
        assert_eq!(forecast(0, 100, 300), None);
    }
}
