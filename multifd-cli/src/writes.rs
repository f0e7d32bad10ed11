//! How much of its memory a guest writes, by what two rounds of different length left.
//!
//! A guest that writes without a pause has more dirty pages the longer nothing takes them, and at most its working set. Written at
//! random, `d` bytes are dirty after `t` seconds with `d = most × (1 - exp(-rate × t / most))`: at first the rate decides, in the end the
//! working set. Two rounds of different length tell both apart; one tells neither.

use multifd::progress::RoundStats;

/// What a guest writes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Writes {
    /// Bytes of clean pages that become dirty in a second, while nothing is dirty.
    rate: f64,
    /// Bytes of its working set; infinite where no end of it is seen.
    most: f64,
}

impl Writes {
    /// By one round: nothing is known of the working set.
    pub fn of_one(round: &RoundStats, page_size: u64) -> Writes {
        let Left { seconds, bytes } = Left::of(round, page_size);
        Writes { rate: bytes / seconds, most: f64::INFINITY }
    }

    /// By two rounds; `None` where they are too much alike, or the guest was slowed down in between.
    pub fn of_two(one: &RoundStats, other: &RoundStats, page_size: u64) -> Option<Writes> {
        let (one_left, other_left) = (Left::of(one, page_size), Left::of(other, page_size));
        let (short, long) =
            if one_left.seconds < other_left.seconds { (one_left, other_left) } else { (other_left, one_left) };
        let longer = long.seconds / short.seconds;
        if one.throttle != other.throttle || short.bytes <= 0.0 || !longer.is_finite() || longer < DIFFERENT {
            return None;
        }
        let more = long.bytes / short.bytes;
        if more > longer * NEARLY {
            return Some(Writes { rate: long.bytes / long.seconds, most: f64::INFINITY });
        }
        // `x` is rate / most: the quotient of what both left falls from `longer` to 1 as it grows.
        let quotient = |x: f64| f64::exp_m1(-x * long.seconds) / f64::exp_m1(-x * short.seconds);
        let (mut low, mut high) = (0.0, FULL / short.seconds);
        for _ in 0..50 {
            let middle = f64::midpoint(low, high);
            if quotient(middle) > more { low = middle } else { high = middle }
        }
        let most = (long.bytes / -f64::exp_m1(-high * long.seconds)).max(short.bytes);
        Some(Writes { rate: high * most, most })
    }

    /// Bytes that are dirty when nothing has taken them for `seconds`.
    pub fn in_time(&self, seconds: f64) -> f64 {
        if self.most.is_infinite() {
            return self.rate * seconds;
        }
        -self.most * f64::exp_m1(-self.rate * seconds / self.most)
    }

    /// Bytes per second that a link needs for each round to leave less than the one before, whatever the working set.
    pub fn rate(&self) -> f64 {
        self.rate
    }
}

/// What a round left.
#[derive(Clone, Copy)]
struct Left {
    seconds: f64,
    bytes: f64,
}

impl Left {
    fn of(round: &RoundStats, page_size: u64) -> Left {
        Left { seconds: round.took.as_secs_f64(), bytes: (round.dirty_after * page_size) as f64 }
    }
}

/// Times that one round is longer than another one that tells more than it.
const DIFFERENT: f64 = 1.25;
/// What is left by a round that is longer by this part of the difference is as good as in proportion.
const NEARLY: f64 = 0.97;
/// By so many times the time in which a working set is written once, it is dirty as a whole.
const FULL: f64 = 10.0;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn left(millis: u64, pages: f64) -> RoundStats {
        let mut round = RoundStats::default();
        (round.took, round.dirty_after) = (Duration::from_millis(millis), pages as u64);
        round
    }

    #[test]
    fn two_rounds_tell_rate_and_working_set_of_a_guest_that_writes_at_random() {
        let guest = Writes { rate: 50_000.0, most: 10_000.0 };
        let rounds = [2000, 150].map(|millis| left(millis, guest.in_time(millis as f64 / 1e3)));
        for [one, other] in [[0, 1], [1, 0]] {
            let found = Writes::of_two(&rounds[one], &rounds[other], 1).unwrap();
            assert!((found.rate / guest.rate - 1.0).abs() < 0.02, "{found:?}");
            assert!((found.most / guest.most - 1.0).abs() < 0.02, "{found:?}");
        }
    }

    #[test]
    fn a_working_set_that_is_always_dirty_has_a_rate_of_at_least_that() {
        let found = Writes::of_two(&left(1000, 800.0), &left(100, 800.0), 1).unwrap();
        assert!((found.most - 800.0).abs() < 2.0 && found.rate > 800.0 / 0.1, "{found:?}");
        // Another part of its memory was written in the long one: no less than what was seen.
        assert!(Writes::of_two(&left(1000, 700.0), &left(100, 800.0), 1).unwrap().most >= 800.0);
    }

    #[test]
    fn rounds_that_are_alike_tell_no_more_than_one() {
        assert_eq!(Writes::of_two(&left(110, 800.0), &left(100, 700.0), 1), None);
        assert_eq!(Writes::of_two(&left(1000, 800.0), &left(100, 0.0), 1), None);
        assert_eq!(Writes::of_two(&left(1000, 800.0), &left(0, 800.0), 1), None);
        let mut slowed = left(1000, 800.0);
        slowed.throttle = 20;
        assert_eq!(Writes::of_two(&slowed, &left(100, 800.0), 1), None);
    }

    #[test]
    fn where_twice_the_time_leaves_twice_as_much_no_end_is_seen() {
        let found = Writes::of_two(&left(1000, 800.0), &left(500, 400.0), 1).unwrap();
        assert_eq!(found, Writes { rate: 800.0, most: f64::INFINITY });
        assert_eq!(found.in_time(10.0), 8000.0);
    }
}
