//! The rounds of a migration, as far as they are remembered: a source that writes without end makes rounds without end.

use std::{collections::VecDeque, time::Duration};

use multifd::progress::RoundStats;

/// The first and the last rounds, and exact totals of all of them.
#[derive(Clone, Debug, Default)]
pub struct Rounds {
    first: Vec<RoundStats>,
    last: VecDeque<RoundStats>,
    count: u64,
    took: Duration,
}

impl Rounds {
    /// One more is over.
    pub fn push(&mut self, round: RoundStats) {
        self.count += 1;
        self.took += round.took;
        if self.first.len() < KEPT {
            self.first.push(round);
            return;
        }
        if self.last.len() == KEPT {
            self.last.pop_front();
        }
        self.last.push_back(round);
    }

    /// Those that are remembered, in order.
    pub fn iter(&self) -> impl Iterator<Item = &RoundStats> {
        self.first.iter().chain(&self.last)
    }

    /// The same, the latest first.
    pub fn latest_first(&self) -> impl Iterator<Item = &RoundStats> {
        self.last.iter().rev().chain(self.first.iter().rev())
    }

    /// The latest.
    pub fn latest(&self) -> Option<&RoundStats> {
        self.last.back().or(self.first.last())
    }

    /// How many there were.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// How long they took together.
    pub fn took(&self) -> Duration {
        self.took
    }
}

impl<'a> FromIterator<&'a RoundStats> for Rounds {
    fn from_iter<I: IntoIterator<Item = &'a RoundStats>>(rounds: I) -> Rounds {
        let mut all = Rounds::default();
        rounds.into_iter().for_each(|round| all.push(round.clone()));
        all
    }
}

/// At the beginning, and at the end.
const KEPT: usize = 500;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_and_the_last_rounds_are_kept_and_the_totals_are_exact() {
        let mut rounds = Rounds::default();
        assert!(rounds.latest().is_none());
        for round in 0..10_000 {
            let mut stats = RoundStats::default();
            (stats.round, stats.took) = (round, Duration::from_millis(3));
            rounds.push(stats);
            assert_eq!(rounds.latest().map(|latest| latest.round), Some(round));
        }
        let kept: Vec<u64> = rounds.iter().map(|round| round.round).collect();
        assert_eq!(kept, (0..500).chain(9500..10_000).collect::<Vec<_>>());
        assert_eq!((rounds.count(), rounds.took()), (10_000, Duration::from_secs(30)));
    }
}
