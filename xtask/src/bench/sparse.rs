//! What memory costs that was never touched: a large guest of which little is in use, beside a small one.

use std::time::Duration;

use serde_json::{Value, json};

use super::mover::{self, Destination, Moved, Source};
use super::samples::Samples;
use super::throughput::{content, random};
use super::{Bench, Findings, qemu};

/// Total and used MiB, and whether QEMU does it too.
const SIZES: &[(u32, u32, bool)] = &[(1024, 1024, true), (65_536, 1024, true), (1_048_576, 1024, false)];
const QUICK: &[(u32, u32, bool)] = &[(128, 128, true), (4096, 128, true), (65_536, 128, true)];

/// The section.
pub fn run(bench: &Bench) -> Result<Findings, String> {
    let content = content(bench, "random", random)?;
    let mut findings = Findings::default();
    findings.say(
        "Guests with random pages in a part of their memory, in pieces of 2 MiB spread over all of it; the rest was never \
         touched. Anonymous memory, 4 channels over TCP, destination fresh. Peak is the most memory that a process had at \
         any time, source / destination; what is in use has to be in both. A bitmap of 1 TiB is 32 MiB. QEMU's peak \
         includes QEMU itself; it runs with `reserve=off`, as the kernel refuses it the larger memory otherwise. Neither side was told which pages are in use; sizes took turns.",
    );
    let sizes = if bench.quick { QUICK } else { SIZES };
    let repetitions = bench.repetitions(3);
    let mut ours: Vec<(Samples, Samples, Option<Moved>)> = vec![Default::default(); sizes.len()];
    let mut theirs: Vec<(Samples, Samples, Option<qemu::Moved>)> = vec![Default::default(); sizes.len()];
    for _ in 0..repetitions {
        for (index, &(mib, used, with_qemu)) in sizes.iter().enumerate() {
            let mut source = Source::start(bench, mib, "anonymous", &content, used)?;
            let warm = || mover::warm(bench, used + used / 4);
            let engine = Destination::Engine { memory: "anonymous", first_touch: "auto" };
            let moved = source.move_to("tcp:127.0.0.1:0", 4, "", engine, warm)?;
            drop(source);
            eprintln!("{mib} MiB: {:.2} s", moved.seconds());
            ours[index].0.push(moved.seconds());
            ours[index].1.push(moved.cpu_seconds());
            ours[index].2 = Some(moved);
            if with_qemu {
                let mut source = qemu::Source::stopped_unreserved(bench, mib, &content, used)?;
                let moved = source.migrate("tcp", qemu::Parameters::default(), LIMIT, warm)?;
                let moved = moved.ok_or("QEMU takes too long")?;
                eprintln!("{mib} MiB, QEMU: {:.2} s", moved.seconds());
                theirs[index].0.push(moved.seconds());
                theirs[index].1.push(moved.cpu_seconds);
                theirs[index].2 = Some(moved);
            }
        }
    }
    let mut rows = Vec::new();
    let mut raw = Vec::new();
    for (index, &(mib, used, _)) in sizes.iter().enumerate() {
        let name = format!("{} GiB, {} in use", f64::from(mib) / 1024.0, show_size(used));
        if let (seconds, cpu, Some(moved)) = &ours[index] {
            let peak = [&moved.source, &moved.destination].map(|side| mover::number(side, "peak-mib"));
            rows.push(vec![
                format!("multifd: {name}"),
                seconds.show(2),
                cpu.show(2),
                format!("{:.0} / {:.0}", peak[0], peak[1]),
                format!("{:.2}", mover::number(&moved.source, "downtime-ms")),
            ]);
            raw.push(json!({
                "side": "multifd", "mib": mib, "used-mib": used, "seconds": seconds.json(), "cpu-seconds": cpu.json(),
                "source": moved.source, "destination": moved.destination,
            }));
        }
        if let (seconds, cpu, Some(moved)) = &theirs[index] {
            rows.push(vec![
                format!("QEMU: {name}"),
                seconds.show(2),
                cpu.show(2),
                format!("{} / {}", moved.peak_mib[0], moved.peak_mib[1]),
                format!("{:.0}", moved.downtime_ms()),
            ]);
            raw.push(json!({
                "side": "QEMU", "mib": mib, "used-mib": used, "seconds": seconds.json(), "cpu-seconds": cpu.json(),
                "peak-mib": moved.peak_mib, "answer": moved.answer,
            }));
        }
    }
    findings.table(&["", "seconds", "CPU seconds, both", "peak MiB, source / destination", "downtime ms"], &rows);
    let ratio = ours[1].0.median() / ours[0].0.median();
    findings.say(&format!("For the engine, the second guest takes {ratio:.2} of the time of the first."));
    let (mib, used, _) = sizes[1];
    findings.files.push((
        "summary-sparse.md".to_owned(),
        format!(
            "A guest of {} of which {} are in use moves in {:.2} s, with QEMU on both sides in {:.2} s.\n",
            show_size(mib),
            show_size(used),
            ours[1].0.median(),
            theirs[1].0.median()
        ),
    ));
    findings.raw = Value::Array(raw);
    Ok(findings)
}

fn show_size(mib: u32) -> String {
    if mib >= 1024 { format!("{} GiB", f64::from(mib) / 1024.0) } else { format!("{mib} MiB") }
}

const LIMIT: Duration = Duration::from_secs(300);
