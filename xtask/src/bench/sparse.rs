//! What memory costs that was never touched: a large guest of which little is in use, beside a small one.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};

use super::mover::{self, Destination, Source};
use super::samples::Samples;
use super::throughput::{content, random};
use super::{Bench, Findings, qemu};

/// A guest: what it is called here, total and used MiB, and whether QEMU moves it too.
struct Size {
    name: &'static str,
    mib: u32,
    used: u32,
    with_qemu: bool,
}

const SIZES: &[Size] = &[
    Size { name: SMALL, mib: 1024, used: 1024, with_qemu: true },
    Size { name: LARGE, mib: 65_536, used: 1024, with_qemu: true },
    Size { name: "the largest", mib: 1_048_576, used: 1024, with_qemu: false },
];
const QUICK: &[Size] = &[
    Size { name: SMALL, mib: 128, used: 128, with_qemu: true },
    Size { name: LARGE, mib: 4096, used: 128, with_qemu: true },
    Size { name: "the largest", mib: 65_536, used: 128, with_qemu: true },
];
const SMALL: &str = "the small one";
const LARGE: &str = "the large one";

/// The figures of one side with one guest.
#[derive(Default)]
struct Figures {
    seconds: Samples,
    cpu_seconds: Samples,
    /// Of the last run: peak of both processes in MiB, downtime in milliseconds, and what the sides said.
    peak_mib: [f64; 2],
    downtime_ms: f64,
    said: Value,
}

impl Figures {
    fn add(&mut self, seconds: f64, cpu_seconds: f64, peak_mib: [f64; 2], downtime_ms: f64, said: Value) {
        self.seconds.push(seconds);
        self.cpu_seconds.push(cpu_seconds);
        (self.peak_mib, self.downtime_ms, self.said) = (peak_mib, downtime_ms, said);
    }
}

/// By the guest's name and the side's.
type Cells = BTreeMap<(&'static str, &'static str), Figures>;

/// The section.
pub fn run(bench: &Bench) -> Result<Findings, String> {
    let content = content(bench, "random", random)?;
    let sizes = if bench.quick { QUICK } else { SIZES };
    let mut cells = Cells::new();
    for _ in 0..bench.repetitions(3) {
        for size in sizes {
            let (mib, used) = (size.mib, size.used);
            let mut source = Source::start(bench, mib, "anonymous", &content, used)?;
            let warm = || mover::warm(bench, used + used / 4);
            let engine = Destination::Engine { memory: "anonymous", first_touch: "auto" };
            let moved = source.move_to("tcp:127.0.0.1:0", 4, "", engine, warm)?;
            drop(source);
            eprintln!("{mib} MiB: {:.2} s", moved.seconds());
            let peak = [&moved.source, &moved.destination].map(|side| mover::number(side, "peak-mib"));
            let said = json!({ "source": moved.source, "destination": moved.destination });
            let downtime = mover::number(&moved.source, "downtime-ms");
            let cell = cells.entry((size.name, "multifd")).or_default();
            cell.add(moved.seconds(), moved.cpu_seconds(), peak, downtime, said);
            if size.with_qemu {
                let mut source = qemu::Source::stopped_unreserved(bench, mib, &content, used)?;
                let moved = source.migrate("tcp", qemu::Parameters::default(), LIMIT, warm)?;
                let moved = moved.ok_or("QEMU takes too long")?;
                eprintln!("{mib} MiB, QEMU: {:.2} s", moved.seconds());
                let peak = moved.peak_mib.map(|mib| mib as f64);
                let (seconds, downtime) = (moved.seconds(), moved.downtime_ms());
                let cell = cells.entry((size.name, "QEMU")).or_default();
                cell.add(seconds, moved.cpu_seconds, peak, downtime, json!({ "answer": moved.answer }));
            }
        }
    }
    Ok(describe(sizes, &cells))
}

fn describe(sizes: &[Size], cells: &Cells) -> Findings {
    let mut findings = Findings::default();
    findings.say(
        "Guests with random pages in a part of their memory, in pieces of 2 MiB spread over all of it; the rest was never \
         touched. Anonymous memory, 4 channels over TCP, destination fresh. Peak is the most memory that a process had at \
         any time, source / destination; what is in use has to be in both. A bitmap of 1 TiB is 32 MiB. QEMU's peak \
         includes QEMU itself; it runs with `reserve=off`, as the kernel refuses it the larger memory otherwise. Neither side was told which pages are in use; sizes took turns.",
    );
    let mut rows = Vec::new();
    let mut raw = Vec::new();
    for size in sizes {
        for side in ["multifd", "QEMU"] {
            let Some(cell) = cells.get(&(size.name, side)) else { continue };
            let [source, destination] = cell.peak_mib;
            let digits = if side == "QEMU" { 0 } else { 2 };
            rows.push(vec![
                format!("{side}: {} GiB, {} in use", f64::from(size.mib) / 1024.0, show_size(size.used)),
                cell.seconds.show(2),
                cell.cpu_seconds.show(2),
                format!("{source:.0} / {destination:.0}"),
                format!("{:.digits$}", cell.downtime_ms),
            ]);
            raw.push(json!({
                "side": side, "mib": size.mib, "used-mib": size.used, "seconds": cell.seconds.json(),
                "cpu-seconds": cell.cpu_seconds.json(), "peak-mib": cell.peak_mib, "said": cell.said,
            }));
        }
    }
    findings.table(&["", "seconds", "CPU seconds, both", "peak MiB, source / destination", "downtime ms"], &rows);
    let seconds = |name, side| cells.get(&(name, side)).map_or(f64::NAN, |cell: &Figures| cell.seconds.median());
    let size = |name: &str| sizes.iter().find(|size| size.name == name).expect("a guest of that name");
    let (small, large) = (size(SMALL), size(LARGE));
    findings.say(&format!(
        "The engine moves {} of which {} are in use in {:.2} of the time of {}.",
        show_size(large.mib),
        show_size(large.used),
        seconds(LARGE, "multifd") / seconds(SMALL, "multifd"),
        show_size(small.mib)
    ));
    findings.files.push((
        "summary-sparse.md".to_owned(),
        format!(
            "A guest of {} of which {} are in use moves in {:.2} s, with QEMU on both sides in {:.2} s.\n",
            show_size(large.mib),
            show_size(large.used),
            seconds(LARGE, "multifd"),
            seconds(LARGE, "QEMU")
        ),
    ));
    findings.raw = Value::Array(raw);
    findings
}

fn show_size(mib: u32) -> String {
    if mib >= 1024 { format!("{} GiB", f64::from(mib) / 1024.0) } else { format!("{mib} MiB") }
}

const LIMIT: Duration = Duration::from_secs(300);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_figure_is_of_the_guest_and_side_that_it_names() {
        let mut cells = Cells::new();
        for (index, size) in SIZES.iter().enumerate() {
            for (side, factor) in [("multifd", 1.0), ("QEMU", 3.0)] {
                let seconds = factor * f64::from(1 << (4 * index));
                cells.entry((size.name, side)).or_default().add(seconds, 0.0, [0.0; 2], 0.0, Value::Null);
            }
        }
        let findings = describe(SIZES, &cells);
        let text = "The engine moves 64 GiB of which 1 GiB are in use in 16.00 of the time of 1 GiB.";
        assert!(findings.text.contains(text), "{}", findings.text);
        let summary = &findings.files[0].1;
        assert!(summary.contains("moves in 16.00 s, with QEMU on both sides in 48.00 s"), "{summary}");
    }
}
