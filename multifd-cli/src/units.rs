//! Sizes, rates and times as people write them: `512MiB`, `200MB/s`, `10Gbit/s`, `300ms`.

use std::time::Duration;

/// A number of bytes: `4096`, `512MiB`, `1GB`, `1.5GiB`.
///
/// # Errors
/// What would be right.
pub fn size(text: &str) -> Result<u64, UnitError> {
    whole(text, SIZES).ok_or(UnitError("a size would be right, e.g. 512MiB, 4GiB or 1GB"))
}

/// Bytes per second: `200MB/s`, `1GiB/s`, and bits: `10Gbit/s`.
///
/// # Errors
/// What would be right.
pub fn rate(text: &str) -> Result<u64, UnitError> {
    whole(text, RATES).ok_or(UnitError("a rate would be right, e.g. 200MB/s or 10Gbit/s"))
}

/// A time: `300ms`, `2s`, `1.5s`, `500us`, `2min`.
///
/// # Errors
/// What would be right.
pub fn time(text: &str) -> Result<Duration, UnitError> {
    let seconds = scaled(text, TIMES).map(Duration::try_from_secs_f64);
    seconds.and_then(Result::ok).ok_or(UnitError("a time would be right, e.g. 300ms or 2s"))
}

/// A number of bytes as [`size`] reads it.
pub fn show_size(bytes: u64) -> String {
    let units = [("GiB", 1u64 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
    match units.iter().find(|(_, factor)| bytes > 0 && bytes.is_multiple_of(*factor)) {
        Some((unit, factor)) => format!("{}{unit}", bytes / factor),
        None => format!("{bytes}B"),
    }
}

/// A text that is no size, rate or time; says what would be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct UnitError(&'static str);

fn whole(text: &str, units: &[(&str, f64)]) -> Option<u64> {
    // Digits alone are exact, also beyond what a floating-point number can hold.
    let digits = text.strip_suffix(units[0].0).filter(|digits| !digits.is_empty()).unwrap_or(text);
    if (units[0].1, units[1].0) == (1.0, "") && digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return digits.parse().ok();
    }
    let value = scaled(text, units)?;
    // Half a byte of 1.3KiB is rounded; what does not fit is an error.
    (value < u64::MAX as f64).then(|| value.round() as u64)
}

fn scaled(text: &str, units: &[(&str, f64)]) -> Option<f64> {
    let unit_at = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(unit_at);
    let (_, factor) = units.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit.trim_start()))?;
    // `parse` would also take a lonely dot at either end.
    let plain = number.starts_with(|c: char| c.is_ascii_digit()) && number.ends_with(|c: char| c.is_ascii_digit());
    plain.then(|| number.parse::<f64>().ok().map(|number| number * factor))?
}

const SIZES: &[(&str, f64)] = &[
    ("B", 1.0),
    ("", 1.0),
    ("kB", 1e3),
    ("MB", 1e6),
    ("GB", 1e9),
    ("TB", 1e12),
    ("KiB", 1024.0),
    ("MiB", 1048576.0),
    ("GiB", 1073741824.0),
    ("TiB", 1099511627776.0),
];
const RATES: &[(&str, f64)] = &[
    ("B/s", 1.0),
    ("kB/s", 1e3),
    ("MB/s", 1e6),
    ("GB/s", 1e9),
    ("KiB/s", 1024.0),
    ("MiB/s", 1048576.0),
    ("GiB/s", 1073741824.0),
    ("bit/s", 0.125),
    ("kbit/s", 125.0),
    ("Mbit/s", 125e3),
    ("Gbit/s", 125e6),
];
const TIMES: &[(&str, f64)] = &[("s", 1.0), ("ms", 1e-3), ("us", 1e-6), ("min", 60.0)];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_unit_is_read() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("18446744073709551615", u64::MAX),
            ("7B", 7),
            ("512MiB", 512 << 20),
            ("4GiB", 4 << 30),
            ("1.5GiB", 3 << 29),
            ("1GB", 1_000_000_000),
            ("2 KiB", 2048),
            ("2kib", 2048),
        ] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for (text, bytes) in [("200MB/s", 200_000_000), ("10Gbit/s", 1_250_000_000), ("5B/s", 5), ("1GiB/s", 1 << 30)] {
            assert_eq!(rate(text), Ok(bytes), "{text}");
        }
        for (text, micros) in [("300ms", 300_000), ("2s", 2_000_000), ("1.5s", 1_500_000), ("7us", 7), ("0s", 0)] {
            assert_eq!(time(text), Ok(Duration::from_micros(micros)), "{text}");
        }
    }

    #[test]
    fn anything_else_is_refused_with_what_would_be_right() {
        for text in ["", "MiB", "1MB/s", "-1MiB", "1e3", "1..5MiB", ".5MiB", "5.MiB", "inf", "99999999TiB", "1m"] {
            assert!(size(text).unwrap_err().to_string().contains("512MiB"), "{text}");
        }
        for text in ["", "200", "200MB", "max", "1Gb/s!"] {
            assert!(rate(text).unwrap_err().to_string().contains("200MB/s"), "{text}");
        }
        for text in ["", "300", "5m", "-1s", "nans"] {
            assert!(time(text).unwrap_err().to_string().contains("300ms"), "{text}");
        }
    }

    #[test]
    fn a_size_is_shown_as_it_is_read() {
        for bytes in [0, 1, 4096, 5 << 20, 3 << 30, (3 << 30) + 1] {
            assert_eq!(size(&show_size(bytes)), Ok(bytes));
        }
        assert_eq!(show_size(64 << 20), "64MiB");
    }
}
