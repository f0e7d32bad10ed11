//! Sizes, rates and times as people write them: `512MiB`, `200MB/s`, `10Gbit/s`, `300ms`; and as QEMU's users type them:
//! `10G`, `128M`, `5m`.
//!
//! A bare letter is a power of two, as in all of QEMU's options: `10G` is 10 GiB, and as a rate 10 GiB/s. A bare number of
//! bytes is a size; as a rate or a time it is refused, because QEMU reads it as MiB/s here, bytes/s there and ms elsewhere.

use std::time::Duration;

/// A number of bytes: `4096`, `512MiB`, `1GB`, `1.5GiB`, `10G`.
///
/// # Errors
/// What was expected.
pub fn size(text: &str) -> Result<u64, UnitError> {
    whole(text, SIZES).ok_or(UnitError("expected a size, e.g. 512MiB, 4GiB, 10G or 1GB"))
}

/// Bytes per second: `200MB/s`, `1GiB/s`, `128M`, and bits: `10Gbit/s`.
///
/// # Errors
/// What was expected.
pub fn rate(text: &str) -> Result<u64, UnitError> {
    whole(text, RATES).ok_or(UnitError("expected a rate, e.g. 200MB/s, 10Gbit/s, or 128M for 128 MiB/s"))
}

/// The same, where `0` alone means no limit.
///
/// # Errors
/// What was expected.
pub fn rate_limit(text: &str) -> Result<Limit<u64>, UnitError> {
    if text == "0" {
        return Ok(Limit(None));
    }
    match whole(text, RATES) {
        Some(0) => Err(UnitError("at this rate nothing is ever sent; expected 1B/s or more, or 0 for no limit")),
        Some(rate) => Ok(Limit(Some(rate))),
        None => Err(UnitError("expected a rate, e.g. 200MB/s, 10Gbit/s, or 128M for 128 MiB/s; 0 for no limit")),
    }
}

/// A time: `300ms`, `2s`, `1.5s`, `500us`, `2min`, `5m`, `1h`, `0`.
///
/// # Errors
/// What was expected.
pub fn time(text: &str) -> Result<Duration, UnitError> {
    read_time(text).ok_or(UnitError("expected a time with its unit, e.g. 300ms, 2s or 5m"))
}

/// The same, where zero means no limit.
///
/// # Errors
/// What was expected.
pub fn time_limit(text: &str) -> Result<Limit<Duration>, UnitError> {
    let time = read_time(text).ok_or(UnitError("expected a time with its unit, e.g. 300ms, 2s or 5m; 0 for no limit"));
    Ok(Limit(time.map(|time| (!time.is_zero()).then_some(time))?))
}

/// A limit that can be given as none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit<T>(pub Option<T>);

/// A number of bytes as [`size`] reads it.
pub fn show_size(bytes: u64) -> String {
    let units = [("GiB", 1u64 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
    match units.iter().find(|(_, factor)| bytes > 0 && bytes.is_multiple_of(*factor)) {
        Some((unit, factor)) => format!("{}{unit}", bytes / factor),
        None => format!("{bytes}B"),
    }
}

/// A text that is no size, rate or time; says what was expected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct UnitError(&'static str);

fn read_time(text: &str) -> Option<Duration> {
    let seconds = if text == "0" { 0.0 } else { scaled(text, TIMES)? };
    // 136 years: the clock has room for that.
    Duration::try_from_secs_f64(seconds).ok().filter(|time| time.as_secs() <= u32::MAX.into())
}

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
    ("KiB", KIB),
    ("MiB", MIB),
    ("GiB", GIB),
    ("TiB", TIB),
    ("K", KIB),
    ("M", MIB),
    ("G", GIB),
    ("T", TIB),
];
const RATES: &[(&str, f64)] = &[
    ("B/s", 1.0),
    ("kB/s", 1e3),
    ("MB/s", 1e6),
    ("GB/s", 1e9),
    ("KiB/s", KIB),
    ("MiB/s", MIB),
    ("GiB/s", GIB),
    ("K", KIB),
    ("M", MIB),
    ("G", GIB),
    ("T", TIB),
    ("bit/s", 0.125),
    ("kbit/s", 125.0),
    ("Mbit/s", 125e3),
    ("Gbit/s", 125e6),
];
const TIMES: &[(&str, f64)] = &[("s", 1.0), ("ms", 1e-3), ("us", 1e-6), ("min", 60.0), ("m", 60.0), ("h", 3600.0)];
const KIB: f64 = 1024.0;
const MIB: f64 = KIB * KIB;
const GIB: f64 = KIB * MIB;
const TIB: f64 = KIB * GIB;

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
    fn units_are_read_as_qemu_reads_them() {
        for (text, bytes) in [("10G", 10 << 30), ("128M", 128 << 20), ("1m", 1 << 20), ("4k", 4096), ("2T", 2 << 40)] {
            assert_eq!(size(text), Ok(bytes), "{text}");
            assert_eq!(rate(text), Ok(bytes), "{text}");
            assert_eq!(rate_limit(text), Ok(Limit(Some(bytes))), "{text}");
        }
        for (text, seconds) in [("5m", 300), ("2min", 120), ("1h", 3600), ("0", 0)] {
            assert_eq!(time(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
    }

    #[test]
    fn zero_is_no_limit() {
        assert_eq!(rate_limit("0"), Ok(Limit(None)));
        assert!(rate_limit("0B/s").unwrap_err().to_string().contains("1B/s"));
        for text in ["0", "0s", "0ms"] {
            assert_eq!(time_limit(text), Ok(Limit(None)), "{text}");
        }
        assert_eq!(time_limit("5m"), Ok(Limit(Some(Duration::from_secs(300)))));
    }

    #[test]
    fn anything_else_is_refused_with_what_was_expected() {
        for text in ["", "MiB", "1MB/s", "-1MiB", "1e3", "1..5MiB", ".5MiB", "5.MiB", "inf", "99999999TiB", "1min"] {
            assert!(size(text).unwrap_err().to_string().contains("512MiB"), "{text}");
        }
        for text in ["", "200", "200MB", "max", "1Gb/s!"] {
            assert!(rate(text).unwrap_err().to_string().contains("200MB/s"), "{text}");
            assert!(rate_limit(text).unwrap_err().to_string().contains("0 for no limit"), "{text}");
        }
        for text in ["", "300", "5M/s", "-1s", "nans", "9999999h"] {
            assert!(time(text).unwrap_err().to_string().contains("300ms"), "{text}");
            assert!(time_limit(text).unwrap_err().to_string().contains("0 for no limit"), "{text}");
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
