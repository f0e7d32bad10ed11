//! Decides after each round whether the rest fits into the pause.
//!
//! Pure: time and speed come in with the [`RoundReport`]. A guest that writes faster than the link sends never gets
//! there; it is slowed down in steps where the VM can do that, and given up on when the limits are reached.

use std::time::Duration;

/// How long a migration may take, and how long the guest may be paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The pause that is acceptable: the last round has to fit into it.
    pub downtime: Duration,
    /// At most so many rounds with the guest running; `None` for no limit.
    pub rounds: Option<u64>,
    /// At most so much time for these rounds; `None` for no limit.
    pub time: Option<Duration>,
    /// What follows when one of the two limits above is reached and the rest does not fit.
    pub at_limit: AtLimit,
    /// Slow a guest down that writes too fast.
    pub throttle: bool,
    /// Bytes per second that the pause can use, where the operator knows it; `None`: as much as was seen. A limit on bandwidth ends
    /// with the pause, so a migration below one may have seen less. This limits nothing: it is what the decision counts on.
    pub switchover_bandwidth: Option<u64>,
}

impl Default for Limits {
    /// 300 ms of downtime, at most 100 rounds and then it gives up, throttling where the VM can.
    fn default() -> Limits {
        let (downtime, rounds) = (Duration::from_millis(300), Some(100));
        Limits { downtime, rounds, time: None, at_limit: AtLimit::GiveUp, throttle: true, switchover_bandwidth: None }
    }
}

/// What follows when the rounds or the time are used up, and the rest would take longer than the acceptable pause.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AtLimit {
    /// The migration ends, and the guest runs on at the source.
    #[default]
    GiveUp,
    /// The guest is paused for as long as the rest takes.
    SwitchOver,
}

/// What the VMM wants of the moment of the switchover, whatever the limits say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Wish {
    /// Switch over when the round is over, whether the rest fits or not.
    pub switch_over: bool,
    /// Do not switch over. It wins over `switch_over`, which is done once this is taken back. Rounds and time that pass
    /// meanwhile do not count towards the limits.
    pub hold: bool,
}

/// What is known when a round is over and the dirty log was drained again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RoundReport {
    /// Rounds sent so far, this one included.
    pub rounds: u64,
    /// Bytes of pages with content sent in this round, before compression, and of device state.
    pub sent: u64,
    /// Bytes that all connections took for this round.
    pub wire: u64,
    /// How long the round took, from its opening to its barrier, and the wait for what it left in the connections, if there was one.
    pub took: Duration,
    /// Bytes per second that all connections were allowed together, if there was a limit. It ends with the pause.
    pub limit: Option<u64>,
    /// Bytes per second that the path was seen to carry for some moments, where the transport can tell.
    pub carries: Option<u64>,
    /// What the pause would have to wait for.
    pub left: Left,
    /// Time since the first round began.
    pub elapsed: Duration,
}

/// What a pause that began now would have to wait for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Left {
    /// Bytes of pages that were written again and are still to be sent, and of device state that a VM says is to come.
    pub dirty: u64,
    /// Bytes that the connections took and that have not reached the destination: the last round queues behind them.
    pub unsent: u64,
    /// The messages that both sides exchange before the guest runs again, as the sum of their round trips.
    pub round_trips: Duration,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Decision {
    /// Send another round with the guest running.
    Continue,
    /// The same, with the guest slowed down by this many percent.
    Throttle(u8),
    /// Pause the guest: the rest fits, or it is to be done now.
    SwitchOver,
    /// The rest fits, and the switchover is held: send another round in a while, or when it no longer is.
    Hold,
    /// The limits are reached and the rest does not fit.
    GiveUp,
}

/// Follows the rounds of one migration.
#[derive(Clone, Debug)]
pub(crate) struct Convergence {
    limits: Limits,
    /// Bytes and time of recent rounds; their quotient is the speed. Halved together now and then, so that the past
    /// fades and rounds that fit into socket buffers, which look infinitely fast, weigh little.
    bytes: f64,
    seconds: f64,
    /// Bytes on the connections in the same time.
    wire: f64,
    /// Bytes per second that a pause may count on, because the last round was held back by a limit that ends there.
    beyond_limit: f64,
    throttle: u8,
    /// The VM can be slowed down, as far as it is known.
    can_throttle: bool,
    wish: Wish,
    /// Rounds and time that do not count, since the switchover was held.
    held_rounds: u64,
    held_time: Duration,
    /// When the round before was over, since the first began.
    elapsed: Duration,
    /// Rounds in a row in which the guest wrote more than half of what was sent.
    losing: u32,
}

impl Convergence {
    /// No round sent yet.
    pub fn new(limits: Limits) -> Convergence {
        Convergence {
            limits,
            bytes: 0.0,
            seconds: 0.0,
            wire: 0.0,
            beyond_limit: 0.0,
            throttle: 0,
            can_throttle: true,
            wish: Wish::default(),
            held_rounds: 0,
            held_time: Duration::ZERO,
            elapsed: Duration::ZERO,
            losing: 0,
        }
    }

    /// Decides by `limits` from now on.
    pub fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
    }

    /// Decides by `wish` from now on.
    pub fn set_wish(&mut self, wish: Wish) {
        self.wish = wish;
    }

    /// What to do after the round that `report` describes.
    pub fn decide(&mut self, report: &RoundReport) -> Decision {
        self.observe(report);
        let fits = self.time_for(&report.left) <= self.budget(&report.left);
        match self.wish {
            Wish { hold: true, .. } if fits => return Decision::Hold,
            Wish { hold: false, switch_over } if switch_over || fits => return Decision::SwitchOver,
            Wish { hold: false, .. } if self.is_used_up(report) => {
                return match self.limits.at_limit {
                    AtLimit::GiveUp => Decision::GiveUp,
                    AtLimit::SwitchOver => Decision::SwitchOver,
                };
            }
            _ => {}
        }
        self.losing = if report.left.dirty > report.sent / 2 { self.losing + 1 } else { 0 };
        let throttles = self.limits.throttle && self.can_throttle;
        if throttles && self.losing >= LOSING_ROUNDS && self.throttle < MAX_THROTTLE {
            self.throttle = (self.throttle + THROTTLE_STEP).clamp(FIRST_THROTTLE, MAX_THROTTLE);
            return Decision::Throttle(self.throttle);
        }
        Decision::Continue
    }

    /// The VM cannot be slowed down, so do not ask again.
    pub fn throttle_unsupported(&mut self) {
        self.can_throttle = false;
        self.throttle = 0;
    }

    /// The speed that a pause counts on, in bytes of pages per second; 0 before anything was sent.
    ///
    /// It is what the operator says ([`Limits::switchover_bandwidth`]), or else what was measured in the rounds. Where a limit on
    /// bandwidth held these back, it is at least half of what the path was seen to carry.
    pub fn bytes_per_second(&self) -> u64 {
        let speed = self.speed(self.bytes);
        if speed.is_finite() { speed as u64 } else { 0 }
    }

    /// Whether the decision after the round that `report` describes would be to switch over.
    pub fn would_switch_over(&self, report: &RoundReport) -> bool {
        self.clone().decide(report) == Decision::SwitchOver
    }

    /// How long a pause would last in which all that is `left` is sent.
    pub fn expected_downtime(&self, left: &Left) -> Duration {
        self.time_for(left).saturating_add(left.round_trips)
    }

    /// How long it takes to send what is `left`.
    fn time_for(&self, left: &Left) -> Duration {
        let at = |bytes: u64, sent: f64| match bytes {
            0 => 0.0,
            bytes => bytes as f64 / self.speed(sent),
        };
        let seconds = at(left.dirty, self.bytes) + at(left.unsent, self.wire);
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
    }

    /// Bytes per second that a pause counts on, where `sent` of the same kind went in the time that was measured.
    fn speed(&self, sent: f64) -> f64 {
        if let Some(rate) = self.limits.switchover_bandwidth {
            return rate.max(1) as f64;
        }
        let measured = if self.seconds > 0.0 { sent / self.seconds } else { 0.0 };
        measured.max(self.beyond_limit)
    }

    /// How much of the limit is there for sending. A limit that is hardly longer than the round trips cannot be kept. That is no reason
    /// never to switch over, so a tenth of it always is.
    fn budget(&self, left: &Left) -> Duration {
        let limit = self.limits.downtime;
        limit.saturating_sub(left.round_trips).max(limit / 10)
    }

    /// Whether the rounds or the time that count are used up.
    fn is_used_up(&self, report: &RoundReport) -> bool {
        let rounds = report.rounds.saturating_sub(self.held_rounds);
        let time = report.elapsed.saturating_sub(self.held_time);
        self.limits.rounds.is_some_and(|limit| rounds >= limit) || self.limits.time.is_some_and(|limit| time >= limit)
    }

    fn observe(&mut self, report: &RoundReport) {
        let passed = report.elapsed.saturating_sub(self.elapsed);
        self.elapsed = report.elapsed;
        if self.wish.hold {
            self.held_rounds += 1;
            self.held_time += passed;
        }
        self.bytes += report.sent as f64;
        self.wire += report.wire as f64;
        self.seconds += report.took.as_secs_f64();
        if self.bytes > WINDOW {
            // All of it: the first round may be a thousand times as long as those that follow, and slower, since it fills fresh memory.
            let part = WINDOW / 2.0 / self.bytes;
            self.bytes *= part;
            self.wire *= part;
            self.seconds *= part;
        }
        self.beyond_limit = match (report.limit, report.carries) {
            // Else it is not the limit that made the round slow.
            (Some(limit), Some(carries))
                if report.wire as f64 >= HELD_BACK * limit as f64 * report.took.as_secs_f64() =>
            {
                carries as f64 * PROVEN
            }
            _ => 0.0,
        };
    }
}

/// Bytes after which the past counts half, and no more than that: many times what the buffers of some channels take at once, and few
/// enough to follow a link or a guest that changes.
const WINDOW: f64 = (64 << 20) as f64;
/// A round that reached this part of the limit was held back by it.
const HELD_BACK: f64 = 0.8;
/// The part of what the path carried for moments that a pause counts on: it is longer than those, and acknowledgements may have come in
/// bunches.
const PROVEN: f64 = 0.5;
/// One round may be bad luck; two in a row are a trend.
const LOSING_ROUNDS: u32 = 2;
const FIRST_THROTTLE: u8 = 20;
const THROTTLE_STEP: u8 = 10;
const MAX_THROTTLE: u8 = 99;

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    const MB: u64 = 1_000_000;

    fn report(rounds: u64, sent: u64, millis: u64, dirty: u64) -> RoundReport {
        let took = Duration::from_millis(millis);
        let left = Left { dirty, ..Left::default() };
        let elapsed = took * rounds as u32;
        RoundReport { rounds, sent, wire: sent, took, limit: None, carries: None, left, elapsed }
    }

    fn limits(downtime_ms: u64) -> Limits {
        Limits { downtime: Duration::from_millis(downtime_ms), ..Limits::default() }
    }

    #[test]
    fn switches_over_when_the_rest_fits_and_not_before() {
        let mut convergence = Convergence::new(limits(100));
        assert_eq!(convergence.decide(&report(1, 1000 * MB, 1000, 101 * MB)), Decision::Continue);
        let left = Left { dirty: 101 * MB, ..Left::default() };
        assert_eq!(convergence.expected_downtime(&left), Duration::from_millis(101));
        assert_eq!(convergence.decide(&report(2, 100 * MB, 100, 100 * MB)), Decision::SwitchOver);
    }

    #[test]
    fn an_idle_guest_needs_one_round_whatever_the_limit() {
        let mut convergence = Convergence::new(limits(0));
        assert_eq!(convergence.decide(&report(1, 0, 0, 0)), Decision::SwitchOver);
    }

    #[test]
    fn limits_that_change_count_from_the_next_decision_on() {
        let mut convergence = Convergence::new(limits(1));
        assert_eq!(convergence.decide(&report(1, 1000 * MB, 1000, 900 * MB)), Decision::Continue);
        convergence.set_limits(limits(900));
        assert_eq!(convergence.decide(&report(2, 1000 * MB, 1000, 900 * MB)), Decision::SwitchOver);
    }

    #[test]
    fn a_race_is_not_lost_while_half_of_what_was_sent_stays() {
        let mut convergence = Convergence::new(limits(1));
        for round in 1..10 {
            assert_eq!(convergence.decide(&report(round, 1000 * MB, 1000, 500 * MB)), Decision::Continue);
        }
        convergence.decide(&report(10, 1000 * MB, 1000, 501 * MB));
        assert_eq!(convergence.decide(&report(11, 1000 * MB, 1000, 501 * MB)), Decision::Throttle(20));
    }

    #[test]
    fn nothing_is_known_of_the_speed_before_any_time_has_passed() {
        let mut convergence = Convergence::new(limits(1));
        assert_eq!(convergence.decide(&report(1, 100 * MB, 0, MB)), Decision::Continue);
        assert_eq!(convergence.bytes_per_second(), 0);
    }

    #[test]
    fn the_past_counts_whole_up_to_the_window() {
        let after = |first: u64| {
            let mut convergence = Convergence::new(limits(1));
            convergence.decide(&report(1, first, 1000, 50 * MB));
            convergence.decide(&report(2, 1 << 20, 1000, 50 * MB));
            convergence.bytes_per_second()
        };
        assert_eq!(after(63 << 20), 32 << 20);
        assert_eq!(after(64 << 20), 65 << 19, "not half of it, which would be 22 MiB/s");
        assert!(after(65 << 20) < 23 << 20);
    }

    #[test]
    fn a_losing_race_is_throttled_in_steps_and_then_given_up() {
        let mut convergence = Convergence::new(Limits { rounds: Some(20), ..limits(1) });
        let mut throttles = Vec::new();
        for round in 1..20 {
            match convergence.decide(&report(round, 1000 * MB, 1000, 900 * MB)) {
                Decision::Throttle(percent) => throttles.push(percent),
                other => assert_eq!(other, Decision::Continue),
            }
        }
        assert_eq!(throttles, [20, 30, 40, 50, 60, 70, 80, 90, 99]);
        assert_eq!(convergence.decide(&report(20, 1000 * MB, 1000, 900 * MB)), Decision::GiveUp);
    }

    #[test]
    fn time_is_a_limit_too() {
        let mut convergence = Convergence::new(Limits { time: Some(Duration::from_secs(2)), ..limits(1) });
        assert_eq!(convergence.decide(&report(1, 1000 * MB, 1000, 900 * MB)), Decision::Continue);
        assert_eq!(convergence.decide(&report(2, 1000 * MB, 1000, 900 * MB)), Decision::GiveUp);
    }

    #[test]
    fn where_the_limits_say_so_the_guest_is_paused_for_as_long_as_it_takes() {
        let at_limit = AtLimit::SwitchOver;
        let mut convergence = Convergence::new(Limits { rounds: Some(2), at_limit, ..limits(1) });
        assert_eq!(convergence.decide(&report(1, 1000 * MB, 1000, 900 * MB)), Decision::Continue);
        assert_eq!(convergence.decide(&report(2, 1000 * MB, 1000, 900 * MB)), Decision::SwitchOver);
    }

    #[test]
    fn a_switchover_that_is_wanted_comes_after_the_round_and_not_while_it_is_held() {
        let mut convergence = Convergence::new(limits(1));
        convergence.set_wish(Wish { switch_over: true, hold: true });
        assert_eq!(convergence.decide(&report(1, 1000 * MB, 1000, 900 * MB)), Decision::Continue);
        convergence.set_wish(Wish { switch_over: true, hold: false });
        assert_eq!(convergence.decide(&report(2, 1000 * MB, 1000, 900 * MB)), Decision::SwitchOver);
    }

    /// An operator who moves a network for minutes would find that the migration has given up.
    #[test]
    fn rounds_and_time_of_a_switchover_that_is_held_do_not_count() {
        let time = Some(Duration::from_secs(5));
        for limits in [Limits { rounds: Some(3), ..limits(10) }, Limits { rounds: None, time, ..limits(10) }] {
            let mut convergence = Convergence::new(Limits { throttle: false, ..limits });
            assert_eq!(convergence.decide(&report(1, 100 * MB, 1000, 90 * MB)), Decision::Continue);
            convergence.set_wish(Wish { hold: true, ..Wish::default() });
            for round in 2..1000 {
                let dirty = if round % 2 == 0 { 0 } else { 90 * MB };
                let expected = if round % 2 == 0 { Decision::Hold } else { Decision::Continue };
                assert_eq!(convergence.decide(&report(round, 100 * MB, 1000, dirty)), expected);
            }
            convergence.set_wish(Wish::default());
            assert_eq!(convergence.decide(&report(1000, 100 * MB, 1000, 90 * MB)), Decision::Continue);
            for round in 1001..1003 {
                convergence.decide(&report(round, 100 * MB, 1000, 90 * MB));
            }
            assert_eq!(convergence.decide(&report(1003, 100 * MB, 1000, 90 * MB)), Decision::GiveUp);
        }
    }

    /// The limits are set anew before each decision.
    #[test]
    fn a_vm_that_cannot_be_slowed_down_is_not_asked_again() {
        let mut convergence = Convergence::new(limits(1));
        convergence.decide(&report(1, MB, 10, MB));
        assert_eq!(convergence.decide(&report(2, MB, 10, MB)), Decision::Throttle(20));
        convergence.throttle_unsupported();
        convergence.set_limits(limits(1));
        assert_eq!(convergence.decide(&report(3, MB, 10, MB)), Decision::Continue);
    }

    #[test]
    fn a_tiny_fast_round_does_not_hide_a_slow_link() {
        let mut convergence = Convergence::new(limits(10));
        convergence.decide(&report(1, 100 * MB, 1000, 50 * MB));
        convergence.decide(&report(2, MB, 0, 50 * MB));
        assert!(convergence.bytes_per_second() < 110 * MB, "{}", convergence.bytes_per_second());
    }

    /// The pause was longer than its limit by all that lay in socket buffers.
    #[test]
    fn what_the_connections_still_hold_and_round_trips_count() {
        let begun = report(1, 100 * MB, 1000, 10 * MB);
        let with = |unsent, millis| {
            let round_trips = Duration::from_millis(millis);
            RoundReport { left: Left { unsent, round_trips, ..begun.left }, ..begun }
        };
        let convergence = Convergence::new(limits(300));
        assert!(convergence.would_switch_over(&begun));
        assert!(convergence.would_switch_over(&with(20 * MB, 0)) && !convergence.would_switch_over(&with(21 * MB, 0)));
        assert!(convergence.would_switch_over(&with(0, 200)) && !convergence.would_switch_over(&with(0, 201)));
        let mut convergence = convergence;
        convergence.decide(&begun);
        assert_eq!(convergence.expected_downtime(&with(20 * MB, 40).left), Duration::from_millis(340));
    }

    #[test]
    fn what_the_connections_hold_goes_at_the_speed_of_the_wire() {
        // Compressed to a tenth: 100 MB/s of pages are 10 MB/s on the wire.
        let mut compressed = RoundReport { wire: 10 * MB, ..report(1, 100 * MB, 1000, 0) };
        compressed.left.unsent = MB;
        let mut convergence = Convergence::new(limits(99));
        assert_eq!(convergence.decide(&compressed), Decision::Continue);
        assert_eq!(convergence.expected_downtime(&compressed.left), Duration::from_millis(100));
    }

    #[test]
    fn a_limit_shorter_than_the_round_trips_still_switches_over() {
        let mut far = report(1, 100 * MB, 1000, 3 * MB);
        far.left.round_trips = Duration::from_secs(1);
        assert!(Convergence::new(limits(300)).would_switch_over(&far));
        far.left.dirty = 4 * MB;
        assert!(!Convergence::new(limits(300)).would_switch_over(&far), "a tenth of the limit is 3 MB");
    }

    /// A round below a limit of 20 MB/s on a path that carries `carries`.
    fn below_limit(sent: u64, millis: u64, dirty: u64, carries: Option<u64>) -> RoundReport {
        RoundReport { limit: Some(20 * MB), carries, ..report(1, sent, millis, dirty) }
    }

    /// The rest was counted at the speed of the limit, which ends with the pause: a guest was slowed down to 1 % for a last round of
    /// a millisecond.
    #[test]
    fn a_limit_on_bandwidth_that_ends_with_the_pause_does_not_count() {
        let decide = |report: &RoundReport| Convergence::new(limits(300)).decide(report);
        assert_eq!(decide(&below_limit(20 * MB, 1000, 8 * MB, None)), Decision::Continue, "of 6 MB");
        assert_eq!(decide(&below_limit(20 * MB, 1000, 30 * MB, Some(200 * MB))), Decision::SwitchOver);
        assert_eq!(
            decide(&below_limit(20 * MB, 1000, 31 * MB, Some(200 * MB))),
            Decision::Continue,
            "half of it counts"
        );
        let mut convergence = Convergence::new(limits(300));
        convergence.decide(&below_limit(20 * MB, 1000, 31 * MB, Some(200 * MB)));
        assert_eq!(convergence.bytes_per_second(), 100 * MB);
        let left = Left { dirty: 20 * MB, unsent: 10 * MB, ..Left::default() };
        assert_eq!(convergence.expected_downtime(&left), Duration::from_millis(300));
    }

    #[test]
    fn what_a_path_carried_for_moments_counts_only_where_the_limit_was_in_the_way() {
        let decide = |report: &RoundReport| Convergence::new(limits(300)).decide(report);
        // The link, the disk or the processor was slower than the limit.
        assert_eq!(decide(&below_limit(15 * MB, 1000, 8 * MB, Some(200 * MB))), Decision::Continue);
        let unlimited = RoundReport { limit: None, ..below_limit(20 * MB, 1000, 8 * MB, Some(200 * MB)) };
        assert_eq!(decide(&unlimited), Decision::Continue);
        // However long the round was.
        assert_eq!(decide(&below_limit(10 * MB, 500, 30 * MB, Some(200 * MB))), Decision::SwitchOver);
        assert_eq!(decide(&below_limit(20 * MB, 4000, 8 * MB, Some(200 * MB))), Decision::Continue);
        // It never makes what was measured less.
        assert_eq!(decide(&below_limit(20 * MB, 1000, 6 * MB, Some(1))), Decision::SwitchOver);
    }

    #[test]
    fn what_the_operator_says_of_the_pause_counts_for_more_than_what_was_seen() {
        for (rate, expected) in [(100 * MB, Decision::SwitchOver), (99 * MB, Decision::Continue)] {
            let limits = Limits { switchover_bandwidth: Some(rate), ..limits(300) };
            assert_eq!(Convergence::new(limits).decide(&report(1, 20 * MB, 1000, 30 * MB)), expected);
            assert_eq!(
                Convergence::new(limits).decide(&below_limit(20 * MB, 1000, 30 * MB, Some(1000 * MB))),
                expected
            );
        }
        let none = Limits { switchover_bandwidth: Some(0), ..limits(300) };
        assert_eq!(Convergence::new(none).decide(&report(1, 20 * MB, 1000, 30 * MB)), Decision::Continue);
    }

    /// The first round fills fresh memory. Its speed counted for rounds afterwards, however fast these were: a rest that fits was sent
    /// again with the guest running, and the guest slowed down.
    #[test]
    fn a_slow_first_round_is_forgotten_after_some_tens_of_megabytes() {
        let mut convergence = Convergence::new(limits(100));
        assert_eq!(convergence.decide(&report(1, 64_000 * MB, 640_000, 70 * MB)), Decision::Continue);
        // 1 GB/s, and the 70 MB would take 70 ms.
        assert_eq!(convergence.decide(&report(2, 70 * MB, 70, 70 * MB)), Decision::Continue);
        assert_eq!(convergence.decide(&report(3, 70 * MB, 70, 70 * MB)), Decision::Throttle(20), "two in a row");
        assert_eq!(convergence.decide(&report(4, 70 * MB, 70, 70 * MB)), Decision::SwitchOver);
    }
}
