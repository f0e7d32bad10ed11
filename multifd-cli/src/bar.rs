//! The line below the rounds: where the migration is, how far, how fast, and how long it will take.
//!
//! Pure: what is shown comes in with [`View`], and the width of the terminal.

use std::time::Duration;

use multifd::progress::{Phase, Snapshot};

use crate::table;

/// What the line shows.
pub struct View<'a> {
    /// The counters.
    pub snapshot: &'a Snapshot,
    /// Bytes per second.
    pub rate: f64,
    /// Pages per second.
    pub page_rate: f64,
    /// What is to be done after this round, where that is foretold.
    pub after_this_round: Option<Duration>,
    /// It does not converge, by the latest round.
    pub is_hopeless: bool,
    /// What sending the pages that are dirty would take.
    pub expected_downtime: Option<Duration>,
}

/// The line, in parts.
#[derive(Debug, PartialEq, Eq)]
pub struct Line {
    /// Phase or round.
    pub prefix: String,
    /// Columns of the bar; 0 for none.
    pub bar: usize,
    /// The rest.
    pub message: String,
}

impl View<'_> {
    /// The line on a terminal of `width` columns.
    pub fn line(&self, width: usize) -> Line {
        let Snapshot { phase, round, round_done, .. } = *self.snapshot;
        let prefix = match phase {
            Some(Phase::Rounds) => format!("round {round}"),
            phase => phase.map_or("", Phase::name).to_owned(),
        };
        let whole = whole_of(self.snapshot);
        let mut parts = Vec::new();
        match (whole, round_done) {
            (Some(whole), done) => parts.push(format!("{:.0} %", percent(done, whole))),
            (None, 0) => {}
            (None, done) => parts.push(format!("{} pages", table::grouped(done))),
        }
        parts.push(table::bytes(self.snapshot.bytes()));
        parts.push(format!("{}/s", table::decimal_bytes(self.rate)));
        if let Some(time) = self.time_left(whole) {
            parts.push(time);
        }
        if let Some(time) = self.expected_downtime {
            parts.push(format!("downtime {}", table::milliseconds(time.as_secs_f64() * 1e3)));
        }
        if phase == Some(Phase::Postcopy) {
            let left = self.snapshot.round_pages.saturating_sub(round_done);
            parts.push(format!("{} faults", table::grouped(self.snapshot.requests)));
            parts.push(format!("{} pages left", table::grouped(left)));
        }
        // As many as fit, in the order of what matters, then a bar if there is room.
        let room = width.saturating_sub(PREFIX + 2);
        let mut message = String::new();
        for part in parts {
            let gap = if message.is_empty() { "" } else { GAP };
            if message.len() + gap.len() + part.len() > room {
                break;
            }
            message = format!("{message}{gap}{part}");
        }
        let bar = room.saturating_sub(message.len() + 1).min(LONGEST_BAR);
        Line { prefix, bar: if whole.is_some() && bar >= SHORTEST_BAR { bar } else { 0 }, message }
    }

    fn time_left(&self, whole: Option<u64>) -> Option<String> {
        let snapshot = self.snapshot;
        if self.is_hopeless && snapshot.phase == Some(Phase::Rounds) {
            return Some("ETA never".to_owned());
        }
        let left = whole?.saturating_sub(snapshot.round_done);
        let round = Duration::try_from_secs_f64(left as f64 / self.page_rate).ok()?;
        match (snapshot.phase, self.after_this_round) {
            // What the guest writes in the first round is not known before its end.
            (Some(Phase::Setup), _) => None,
            (Some(Phase::Rounds), None) => Some(format!("round ends in {}", table::rough_time(round))),
            (Some(Phase::Rounds), Some(rest)) => Some(format!("ETA {}", table::rough_time(round + rest))),
            _ => Some(format!("ETA {}", table::rough_time(round))),
        }
    }
}

/// Never 100 before everything is there.
fn percent(done: u64, whole: u64) -> f64 {
    let percent = 100.0 * done.min(whole) as f64 / whole as f64;
    if done < whole { percent.min(99.0) } else { percent }
}

/// How many pages the round has. A destination knows it of round 0 alone, which has all pages, once it knows the RAM
/// blocks; of the later rounds the source does not tell.
pub fn whole_of(snapshot: &Snapshot) -> Option<u64> {
    let whole = match (snapshot.phase, snapshot.round_pages, snapshot.round) {
        (Some(Phase::Rounds | Phase::Switchover), 0, 0) | (Some(Phase::Setup), 0, 0) => snapshot.pages_total,
        (Some(Phase::Rounds | Phase::Switchover | Phase::Postcopy), pages, _) => pages,
        _ => 0,
    };
    (whole > 0).then_some(whole)
}

/// Columns of the phase or round.
pub const PREFIX: usize = 10;
const GAP: &str = "  ";
const LONGEST_BAR: usize = 20;
const SHORTEST_BAR: usize = 5;

#[cfg(test)]
mod tests {
    use super::*;

    fn view(snapshot: &Snapshot) -> View<'_> {
        View {
            snapshot,
            rate: 1.25e9,
            page_rate: 1000.0,
            after_this_round: None,
            is_hopeless: false,
            expected_downtime: None,
        }
    }

    #[test]
    fn a_destination_shows_how_far_round_0_is_and_later_how_much_came() {
        let mut snapshot = Snapshot::default();
        assert_eq!(whole_of(&snapshot), None, "not connected");
        snapshot.phase = Some(Phase::Setup);
        assert_eq!(whole_of(&snapshot), None, "no blocks yet");
        snapshot.pages_total = 1000;
        assert_eq!(whole_of(&snapshot), Some(1000));
        snapshot.phase = Some(Phase::Rounds);
        assert_eq!(whole_of(&snapshot), Some(1000));
        (snapshot.round, snapshot.round_done) = (1, 1234);
        assert_eq!(whole_of(&snapshot), None);
        assert_eq!(view(&snapshot).line(80).message, "1,234 pages  0 B  1.2 GB/s");
        // A source knows it.
        snapshot.round_pages = 2000;
        assert_eq!(whole_of(&snapshot), Some(2000));
        snapshot.phase = Some(Phase::Postcopy);
        (snapshot.requests, snapshot.round_done) = (1234, 1994);
        let line = view(&snapshot).line(104);
        assert_eq!((line.prefix.as_str(), line.bar), ("postcopy", 20));
        assert_eq!(line.message, "99 %  0 B  1.2 GB/s  ETA 1 s  1,234 faults  6 pages left");
        snapshot.phase = Some(Phase::Confirm);
        assert_eq!(whole_of(&snapshot), None);
    }

    #[test]
    fn percent_rate_and_eta_fit_into_60_80_and_104_columns() {
        let mut snapshot = Snapshot::default();
        (snapshot.phase, snapshot.round, snapshot.round_pages) = (Some(Phase::Rounds), 999, 134_217_728);
        (snapshot.main_bytes, snapshot.round_done) = ((1 << 50) - 1, 134_217_727);
        let view = View {
            after_this_round: Some(Duration::from_secs(5999)),
            expected_downtime: Some(Duration::from_millis(99_999)),
            page_rate: 1e9,
            rate: 999.9e6,
            ..view(&snapshot)
        };
        for width in [60, 80, 104] {
            let line = view.line(width);
            let columns = PREFIX + 1 + line.bar + usize::from(line.bar > 0) + line.message.len();
            assert!(columns < width, "{columns}: {line:?}");
            assert!(line.bar >= SHORTEST_BAR, "{line:?}");
            for part in ["99 %", "1024.0 TiB", "999.9 MB/s", "ETA 1h 40m"] {
                assert!(line.message.contains(part), "{width}: {line:?}");
            }
            assert_eq!(line.message.contains("downtime 100.00 s"), width >= 80, "{line:?}");
        }
    }

    #[test]
    fn what_cannot_come_to_an_end_has_no_time() {
        let mut snapshot = Snapshot::default();
        (snapshot.phase, snapshot.round, snapshot.round_pages) = (Some(Phase::Rounds), 3, 1000);
        let hopeless = View { is_hopeless: true, ..view(&snapshot) };
        assert!(hopeless.line(80).message.ends_with("ETA never"));
        // Nothing was sent yet.
        let slow = View { page_rate: 0.0, ..view(&snapshot) };
        assert_eq!(slow.line(80).message, "0 %  0 B  1.2 GB/s");
        assert!(view(&snapshot).line(80).message.ends_with("round ends in 1 s"));
    }
}
