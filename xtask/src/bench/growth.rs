//! What grows with what: the engine alone, from little to much of one thing at a time.

use std::path::Path;

use serde_json::{Value, json};

use super::mover::{self, Destination, Moved, Source, number};
use super::samples::Samples;
use super::throughput::{content, random};
use super::{Bench, Findings};

/// What is varied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Axis {
    /// GiB, all of it in use, into fresh memory.
    Dense,
    /// GiB, of which a quarter is in use: of one GiB, whatever the size.
    Sparse,
    Channels,
    Blocks,
    Rounds,
}

impl Axis {
    const ALL: &[Axis] = &[Axis::Dense, Axis::Sparse, Axis::Channels, Axis::Blocks, Axis::Rounds];

    fn name(self) -> &'static str {
        match self {
            Axis::Dense => "GiB of memory, all in use, fresh",
            Axis::Sparse => "GiB of memory, 256 MiB in use, fresh",
            Axis::Channels => "channels, 512 MiB that are present",
            Axis::Blocks => "RAM blocks, 512 MiB that are present",
            Axis::Rounds => "rounds, 64 MiB that are present and 16 MiB in each round after the first",
        }
    }

    /// The values, rising.
    fn values(self, quick: bool) -> Vec<u32> {
        let all: &[u32] = match self {
            Axis::Dense => &[1, 2, 4, 8, 16, 32, 64],
            Axis::Sparse => &[1, 16, 128, 1024],
            Axis::Channels => &[1, 4, 16, 64, 255],
            Axis::Blocks => &[1, 10, 100, 1000],
            Axis::Rounds => &[1, 3, 10, 30, 100],
        };
        let available = available_gib();
        // Both ends on this machine, and as much again as a quarter for the process that touches memory before.
        let fits = |value: u32| self != Axis::Dense || f64::from(value) * 2.25 + 1.0 < available;
        let all = all.iter().copied().filter(|value| fits(*value));
        if quick { all.take(2).collect() } else { all.collect() }
    }

    /// What the exponent of the time would be if nothing but what is moved took any.
    fn expected(self) -> u32 {
        u32::from(matches!(self, Axis::Dense | Axis::Rounds))
    }

    fn measure(self, bench: &Bench, content: &Path, value: u32) -> Result<Moved, String> {
        let present = Destination::Engine { memory: "present", first_touch: "direct" };
        let fresh = Destination::Engine { memory: "anonymous", first_touch: "auto" };
        let listen = "tcp:127.0.0.1:0";
        match self {
            Axis::Dense | Axis::Sparse => {
                let mib = value * 1024;
                let used = if self == Axis::Dense { mib } else { 256 };
                let mut source = Source::start(bench, mib, "anonymous", content, used)?;
                source.move_to(listen, 4, "", fresh, || mover::warm(bench, used + used / 4))
            }
            Axis::Channels => {
                let channels = u8::try_from(value).expect("at most 255");
                let mut source = Source::start(bench, 512, "anonymous", content, 512)?;
                source.move_to(listen, channels, "", present, || Ok(()))
            }
            Axis::Blocks => {
                let mut source = Source::start_blocks(bench, 512, "anonymous", content, 512, value)?;
                source.move_to(listen, 4, "", present, || Ok(()))
            }
            Axis::Rounds => {
                let mut source = Source::start(bench, 64, "anonymous", content, 64)?;
                source.move_to(listen, 4, &format!("rounds={value}"), present, || Ok(()))
            }
        }
    }
}

/// The figures at one value.
#[derive(Default)]
struct Figures {
    seconds: Samples,
    cpu_seconds: Samples,
    downtime_ms: Samples,
    rounds: Samples,
}

/// The section.
pub fn run(bench: &Bench) -> Result<Findings, String> {
    let content = content(bench, "random", random)?;
    let mut measured = Vec::new();
    for &axis in Axis::ALL {
        let values = axis.values(bench.quick);
        let mut figures: Vec<(u32, Figures)> = values.into_iter().map(|value| (value, Figures::default())).collect();
        // Values take turns, so that what else the machine does meets all of them.
        for _ in 0..bench.repetitions(3) {
            for (value, figures) in &mut figures {
                let moved = axis.measure(bench, &content, *value)?;
                figures.seconds.push(moved.seconds());
                figures.cpu_seconds.push(moved.cpu_seconds());
                figures.downtime_ms.push(number(&moved.source, "downtime-ms"));
                figures.rounds.push(number(&moved.source, "rounds"));
                eprintln!("{value} {}: {:.3} s", axis.name(), moved.seconds());
            }
        }
        measured.push((axis, figures));
    }
    Ok(describe(&measured))
}

fn describe(measured: &[(Axis, Vec<(u32, Figures)>)]) -> Findings {
    let mut findings = Findings::default();
    findings.say(
        "The engine alone, random pages that nobody writes, over TCP on this host, 4 channels unless they are what grows; one thing grows at a time, and its values took \
         turns. The exponent is the slope of a straight line through the logarithms of the medians: 1 grows in proportion, 0 not at all. It is \
         given over all values, and for the last step alone, where what is always the same counts least. Memory goes as far as fits into this host twice. CPU is of both processes, in steps of 10 ms. Rounds are made by a \
         log that reports the same pages as often as is asked for (`mover`, option `rounds`).",
    );
    let (mut rows, mut slopes, mut raw) = (Vec::new(), Vec::new(), Vec::new());
    for (axis, figures) in measured {
        for (value, figures) in figures {
            rows.push(vec![
                format!("{value} {}", axis.name()),
                figures.seconds.show(3),
                figures.cpu_seconds.show(2),
                figures.downtime_ms.show(2),
            ]);
            raw.push(json!({
                "axis": axis.name(), "value": value, "seconds": figures.seconds.json(),
                "cpu-seconds": figures.cpu_seconds.json(), "downtime-ms": figures.downtime_ms.json(),
                "rounds": figures.rounds.json(),
            }));
        }
        let exponents = |figure: fn(&Figures) -> &Samples| {
            let points: Vec<(f64, f64)> =
                figures.iter().map(|(value, figures)| (f64::from(*value), figure(figures).median())).collect();
            let last = &points[points.len().saturating_sub(2)..];
            format!("{} / {}", show(slope(&points)), show(slope(last)))
        };
        let from_to = figures
            .first()
            .zip(figures.last())
            .map_or("–".to_owned(), |((from, _), (to, _))| format!("{from} to {to}"));
        slopes.push(vec![
            format!("{from_to} {}", axis.name()),
            format!("{} ({})", exponents(|figures| &figures.seconds), axis.expected()),
            format!("{} ({})", exponents(|figures| &figures.cpu_seconds), axis.expected()),
            format!("{} (0)", exponents(|figures| &figures.downtime_ms)),
        ]);
    }
    findings.say("**Exponents, over all values / of the last step** (what it would be if only what is moved counted):");
    findings.table(&["", "seconds", "CPU seconds", "downtime"], &slopes);
    findings.say("**The figures:**");
    findings.table(&["", "seconds", "CPU seconds, both", "downtime ms"], &rows);
    findings.raw = Value::Array(raw);
    findings
}

/// The slope of the line through the logarithms of `points` that fits best; NaN where there is none.
fn slope(points: &[(f64, f64)]) -> f64 {
    let logs: Vec<(f64, f64)> =
        points.iter().filter(|(x, y)| *x > 0.0 && *y > 0.0).map(|(x, y)| (x.ln(), y.ln())).collect();
    let count = logs.len() as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| logs.iter().map(of).sum::<f64>() / count;
    let (x, y) = (mean(|point| point.0), mean(|point| point.1));
    let products: f64 = logs.iter().map(|(a, b)| (a - x) * (b - y)).sum();
    let squares: f64 = logs.iter().map(|(a, _)| (a - x) * (a - x)).sum();
    products / squares
}

fn show(exponent: f64) -> String {
    if exponent.is_finite() { format!("{exponent:.2}") } else { "–".to_owned() }
}

/// What this host could give to processes at this moment.
fn available_gib() -> f64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok()).unwrap_or(0.0) / 1048576.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slope_is_the_exponent_of_a_power() {
        for exponent in [0.0, 0.5, 1.0, 2.0] {
            let points: Vec<(f64, f64)> = [1.0, 3.0, 10.0, 255.0].map(|x: f64| (x, 7.0 * x.powf(exponent))).to_vec();
            assert!((slope(&points) - exponent).abs() < 1e-9, "{exponent}: {}", slope(&points));
        }
        assert!(slope(&[(1.0, 2.0)]).is_nan() && slope(&[]).is_nan());
    }

    #[test]
    fn the_last_step_is_told_from_all_values() {
        let mut figures: Vec<(u32, Figures)> = Vec::new();
        for (value, seconds) in [(1, 1.0), (10, 1.0), (100, 10.0)] {
            let mut cell = Figures::default();
            cell.seconds.push(seconds);
            cell.cpu_seconds.push(1.0);
            cell.downtime_ms.push(1.0);
            figures.push((value, cell));
        }
        let text = describe(&[(Axis::Channels, figures)]).text;
        assert!(
            text.contains("| 1 to 100 channels, 512 MiB that are present | 0.50 / 1.00 (0) | 0.00 / 0.00 (0) |"),
            "{text}"
        );
    }
}
