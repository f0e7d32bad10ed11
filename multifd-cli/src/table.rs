//! The table of rounds, as progress and in the result.

use std::time::Duration;

use crate::{report::Round, role::Role};

/// Which columns a table has: as many as fit, and none that a destination cannot know.
#[derive(Clone, Copy, Debug)]
pub struct Columns {
    role: Role,
    is_narrow: bool,
}

impl Columns {
    /// For rounds as `role` sees them, on a terminal of `width` columns.
    pub fn new(role: Role, width: usize) -> Columns {
        Columns { role, is_narrow: width < 80 }
    }

    /// The line above the rounds. `written`: pages written meanwhile, which `expected downtime` would take to send.
    pub fn header(self) -> String {
        match (self.role, self.is_narrow) {
            (Role::Source, false) => {
                aligned(&WIDE, &["round", "dirty", "zero", "sent", "time", "rate", "written", "expected downtime"])
            }
            (Role::Source, true) => aligned(&NARROW, &["round", "dirty", "sent", "time", "rate", "downtime"]),
            (Role::Destination, _) => aligned(&WIDE, &["round", "pages", "zero", "received", "time", "rate"]),
        }
    }

    /// One round that is over.
    pub fn row(self, round: &Round) -> String {
        let rate = if round.time > 0.0 { round.bytes as f64 / round.time * 1e3 } else { 0.0 };
        let number = if round.guest_running { round.round.to_string() } else { "pause".to_owned() };
        let (dirty, zero) = (grouped(round.dirty_pages), grouped(round.duplicate));
        let (sent, time, rate) = (bytes(round.bytes), milliseconds(round.time), format!("{}/s", decimal_bytes(rate)));
        let (written, expected) = match (round.dirty_after.filter(|_| round.guest_running), round.expected_downtime_us)
        {
            (Some(written), Some(time)) => (grouped(written), milliseconds(time as f64 / 1e3)),
            (Some(written), None) => (grouped(written), "unknown".to_owned()),
            (None, _) => (String::new(), String::new()),
        };
        match (self.role, self.is_narrow) {
            (Role::Source, false) => {
                aligned(&WIDE, &[&number, &dirty, &zero, &sent, &time, &rate, &written, &expected])
            }
            (Role::Source, true) => aligned(&NARROW, &[&number, &dirty, &sent, &time, &rate, &expected]),
            (Role::Destination, _) => aligned(&WIDE, &[&number, &dirty, &zero, &sent, &time, &rate]),
        }
    }
}

/// `cells`, each of which ends where `ends` says.
fn aligned(ends: &[usize], cells: &[&str]) -> String {
    let mut line = String::new();
    for (cell, end) in cells.iter().zip(ends) {
        // A cell that is too wide takes the room of the next: figures never touch.
        let room = end.saturating_sub(line.len() + cell.len());
        let least = usize::from(!line.is_empty());
        line.extend(std::iter::repeat_n(' ', room.max(least)));
        line.push_str(cell);
    }
    line.trim_end().to_owned()
}

/// `1234567` as `1,234,567`.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// Bytes of memory, e.g. `64.0 MiB`.
pub fn bytes(bytes: u64) -> String {
    scaled(bytes as f64, 1024.0, ["B", "KiB", "MiB", "GiB", "TiB"])
}

/// Bytes on a wire, e.g. `1.3 GB`.
pub fn decimal_bytes(bytes: f64) -> String {
    scaled(bytes, 1000.0, ["B", "kB", "MB", "GB", "TB"])
}

fn scaled(mut value: f64, step: f64, units: [&str; 5]) -> String {
    let mut unit = 0;
    while value >= step && unit + 1 < units.len() {
        value /= step;
        unit += 1;
    }
    if unit == 0 { format!("{value:.0} {}", units[0]) } else { format!("{value:.1} {}", units[unit]) }
}

/// A time that came in milliseconds, e.g. `12.3 ms` or `1.24 s`.
pub fn milliseconds(time: f64) -> String {
    if time < 1000.0 { format!("{time:.1} ms") } else { format!("{:.2} s", time / 1e3) }
}

/// A time that is only known roughly, e.g. `45 s`, `3m 20s`, `2h 05m`.
pub fn rough_time(time: Duration) -> String {
    let seconds = time.as_secs_f64().ceil() as u64;
    match seconds {
        0..100 => format!("{seconds} s"),
        100..6000 => format!("{}m {:02}s", seconds / 60, seconds % 60),
        6000..360_000 => format!("{}h {:02}m", seconds / 3600, seconds / 60 % 60),
        _ => "days".to_owned(),
    }
}

/// Where each column ends.
const WIDE: [usize; 8] = [5, 15, 25, 35, 43, 53, 61, 79];
/// On a terminal with less than 80 columns, down to 60.
const NARROW: [usize; 6] = [5, 17, 28, 37, 48, 59];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_short() {
        assert_eq!([0, 999, 1000, 1_234_567].map(grouped), ["0", "999", "1,000", "1,234,567"]);
        assert_eq!([12, 64 << 20, 3 << 30].map(bytes), ["12 B", "64.0 MiB", "3.0 GiB"]);
        assert_eq!([999.0, 1.25e9].map(decimal_bytes), ["999 B", "1.2 GB"]);
        assert_eq!([0.04, 999.9, 1240.0].map(milliseconds), ["0.0 ms", "999.9 ms", "1.24 s"]);
    }

    #[test]
    fn rows_stand_below_their_header() {
        let mut round = Round {
            round: 2,
            dirty_pages: 131_584,
            normal: 70_000,
            duplicate: 61_584,
            postponed: None,
            bytes: 287_000_000,
            time: 220.0,
            barrier_time: 1.0,
            guest_running: true,
            dirty_after: Some(1420),
            expected_downtime: Some(4),
            expected_downtime_us: Some(4200),
            throttle: Some(0),
        };
        for (width, header) in [(104, 79), (80, 79), (60, 59)] {
            let columns = Columns::new(Role::Source, width);
            assert_eq!(columns.row(&round).len(), columns.header().len());
            assert_eq!(columns.header().len(), header, "a terminal with {width} columns must not wrap it");
            assert!(columns.row(&round).contains("1.3 GB/s"), "{}", columns.row(&round));
        }
        round.guest_running = false;
        let row = Columns::new(Role::Source, 80).row(&round);
        assert!(row.starts_with("pause   131,584"), "{row}");
    }

    #[test]
    fn the_rounds_of_a_large_guest_fit_into_80_columns() {
        let round = Round {
            round: 12345,
            // 512 GiB.
            dirty_pages: 134_217_728,
            normal: 1,
            duplicate: 134_217_727,
            postponed: None,
            bytes: (1 << 40) - 1,
            time: 99_999.0,
            barrier_time: 1.0,
            guest_running: true,
            dirty_after: Some(9_999_999),
            expected_downtime: Some(1000),
            expected_downtime_us: Some(999_900),
            throttle: Some(0),
        };
        for role in [Role::Source, Role::Destination] {
            for width in [60, 80, 104] {
                let row = Columns::new(role, width).row(&round);
                assert!(row.len() < width, "{row}");
            }
        }
    }

    #[test]
    fn a_destination_has_no_columns_for_what_it_cannot_know() {
        let header = Columns::new(Role::Destination, 80).header();
        assert_eq!(header, "round     pages      zero  received    time      rate");
    }

    #[test]
    fn a_rough_time_is_short() {
        let texts = [0, 45, 100, 5999, 6000, 86_400, 1 << 40].map(|seconds| rough_time(Duration::from_secs(seconds)));
        assert_eq!(texts, ["0 s", "45 s", "1m 40s", "99m 59s", "1h 40m", "24h 00m", "days"]);
    }
}
