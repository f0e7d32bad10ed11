//! The table of rounds, as progress and in the result.

use crate::report::Round;

/// The line above the rounds. `written`: pages written meanwhile, which `expected downtime` would take to send.
pub fn header() -> String {
    columns(["round", "dirty", "zero", "sent", "time", "rate", "written", "expected downtime"])
}

/// One round that is over.
pub fn row(round: &Round) -> String {
    let rate = if round.time > 0.0 { round.bytes as f64 / round.time * 1e3 } else { 0.0 };
    let number = if round.guest_running { round.round.to_string() } else { "pause".to_owned() };
    let (written, expected) = match (round.guest_running, round.expected_downtime) {
        (true, Some(time)) => (grouped(round.dirty_after), milliseconds(time)),
        (true, None) => (grouped(round.dirty_after), "unknown".to_owned()),
        (false, _) => (String::new(), String::new()),
    };
    columns([
        &number,
        &grouped(round.dirty_pages),
        &grouped(round.duplicate),
        &bytes(round.bytes),
        &milliseconds(round.time),
        &format!("{}/s", decimal_bytes(rate)),
        &written,
        &expected,
    ])
}

fn columns(cells: [&str; 8]) -> String {
    let mut line = String::new();
    for (cell, end) in cells.iter().zip(ENDS) {
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

/// Where each column ends.
const ENDS: [usize; 8] = [5, 15, 25, 35, 43, 53, 61, 79];

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
            bytes: 287_000_000,
            time: 220.0,
            guest_running: true,
            dirty_after: 1420,
            expected_downtime: Some(4.2),
            throttle: 0,
        };
        assert_eq!(row(&round).len(), header().len());
        assert_eq!(header().len(), 79, "a terminal with 80 columns must not wrap it");
        assert!(row(&round).contains("1.3 GB/s"), "{}", row(&round));
        round.guest_running = false;
        assert!(row(&round).starts_with("pause   131,584"), "{}", row(&round));
    }

    #[test]
    fn the_rounds_of_a_large_guest_fit_into_80_columns() {
        let round = Round {
            round: 12345,
            // 512 GiB.
            dirty_pages: 134_217_728,
            normal: 1,
            duplicate: 134_217_727,
            bytes: (1 << 40) - 1,
            time: 99_999.0,
            guest_running: true,
            dirty_after: 9_999_999,
            expected_downtime: Some(999.9),
            throttle: 0,
        };
        assert!(row(&round).len() < 80, "{}", row(&round));
    }
}
