//! What the end of a round costs: our barrier beside waiting for each channel in turn; a sync point per round or section.

use std::process::Command;

use serde_json::{Value, json};

use super::mover::{self, Destination, Source};
use super::plot::{Series, bars};
use super::samples::{Samples, named};
use super::throughput::{content, random};
use super::{Bench, Findings};

/// The section of the barrier.
pub fn run(bench: &Bench) -> Result<Findings, String> {
    let (runs, rounds) = if bench.quick { (1, "300") } else { (5, "2000") };
    let mut findings = Findings::default();
    findings.say(
        "From the last page queued to all channels until the acknowledgement that every channel has passed the end of the \
         round, and until the sender could go on; one page per channel and round, over real sockets, all threads in one \
         process. “In turn” is the scheme in which main has a condvar for each channel, asks each for its SYNC, waits for \
         each, then writes FLUSH, and in which the receiving main waits for each channel and then releases each. “Barrier” \
         is the engine's own `RoundBarrier` on both sides with FLUSH written at once. With the barrier nothing is \
         handed to a channel: the pages lie in the scan before the round opens. In turn, main hands each channel its page \
         first, and channels work while it hands out the rest; the time from the first page handed out is given beside. \
         “Without any barrier” is the least that threads and sockets take: main wakes all channels at once, nobody waits for \
         the others, and the last receiver acknowledges. All send the same bytes and take turns of 50 rounds. A cell is the median of the medians of several runs, with least and most, in µs.",
    );
    let mut raw = Vec::new();
    for transport in ["unix", "tcp"] {
        let mut rows = Vec::new();
        let mut series = [Vec::new(), Vec::new()];
        let counts = [1, 4, 8, 16, 32];
        for channels in counts {
            let mut figures: [Samples; 8] = Default::default();
            for _ in 0..runs {
                let report = rounds_example(bench, transport, channels, rounds)?;
                let figure = |scheme: &str, name: &str| mover::number(&report[scheme], name);
                let (ours, theirs) = (figure("barrier", "acknowledged-us"), figure("in-turn", "acknowledged-us"));
                let whole = figure("in-turn", "round-us");
                let stalled = [figure("barrier", "stalled-us"), figure("in-turn", "stalled-us")];
                let least = figure("no-barrier", "acknowledged-us");
                let measured = [ours, theirs, ours / theirs, whole, ours / whole, stalled[0], stalled[1], least];
                figures.iter_mut().zip(measured).for_each(|(samples, figure)| samples.push(figure));
                raw.push(report);
            }
            let [ours, theirs, ratio, whole, whole_ratio, stalled, their_stalled, least] = figures;
            eprintln!("{transport} {channels}: {} / {} = {}", ours.show(0), theirs.show(0), ratio.show(2));
            let goal = match channels {
                8 => " (≤ 0.60)",
                16 => " (≤ 0.50)",
                _ => "",
            };
            rows.push(vec![
                channels.to_string(),
                ours.show(0),
                theirs.show(0),
                format!("{}{goal}", ratio.show(2)),
                whole.show(0),
                whole_ratio.show(2),
                stalled.show(0),
                their_stalled.show(0),
                least.show(0),
            ]);
            series[0].push(ours);
            series[1].push(theirs);
        }
        findings.say(&format!("**{transport}** (goal):"));
        let head = [
            "channels",
            "barrier",
            "in turn",
            "ratio",
            "in turn, from the first page",
            "ratio to that",
            "sender stalled, barrier",
            "sender stalled, in turn",
            "without any barrier",
        ];
        findings.table(&head, &rows);
        let groups: Vec<String> = counts.iter().map(|channels| format!("{channels} channels")).collect();
        let [ours, theirs] = series;
        let series = [Series { name: "barrier", bars: ours }, Series { name: "in turn", bars: theirs }];
        let title = format!("End of a round over {transport}");
        findings.plot(&format!("rounds-{transport}"), &title, bars(&title, "µs", &groups, &series));
    }
    findings.raw = Value::Array(raw);
    Ok(findings)
}

fn rounds_example(bench: &Bench, transport: &str, channels: u8, rounds: &str) -> Result<Value, String> {
    let program = bench.programs.join("examples/rounds");
    let output = Command::new(&program).args([transport, &channels.to_string(), rounds]).output();
    let output = output.map_err(|error| format!("{}: {error}", program.display()))?;
    serde_json::from_slice(&output.stdout)
        .map_err(|_| format!("rounds: {}", String::from_utf8_lossy(&output.stderr).trim()))
}

/// The section of the two dialects.
pub fn dialects(bench: &Bench) -> Result<Findings, String> {
    let mib = if bench.quick { 256 } else { 1024 };
    let content = content(bench, "random", random)?;
    let mut source = Source::start(bench, mib, "anonymous", &content, mib)?;
    let gb = f64::from(mib) * 1048576.0 / 1e9;
    let names = ["per round", "per section"];
    let mut figures: [[Samples; 2]; 2] = Default::default();
    for repetition in 0..if bench.quick { 2 } else { 8 } {
        for (name, option) in [("per round", ""), ("per section", "per-section")] {
            let dialect = named(&names, name);
            let present = Destination::Engine { memory: "present", first_touch: "direct" };
            let moved = source.move_to("tcp:127.0.0.1:0", 4, option, present, || mover::warm(bench, mib))?;
            if repetition > 0 {
                figures[dialect][0].push(gb / moved.seconds());
                figures[dialect][1].push(moved.cpu_seconds() / gb);
            }
        }
    }
    let mut findings = Findings::default();
    findings.say(&format!(
        "The same {mib} MiB of random pages into present memory, 4 channels over TCP: one sync point for the whole round, as \
         QEMU does it from 8.1 on, or one for each section of about 50 ms, as QEMU does it before. They took turns."
    ));
    let row = |(name, [speed, cpu]): (&&str, &[Samples; 2])| vec![(*name).to_owned(), speed.show(2), cpu.show(2)];
    let rows: Vec<Vec<String>> = names.iter().zip(&figures).map(row).collect();
    findings.table(&["dialect", "GB/s", "CPU s/GB"], &rows);
    let speed = |name: &str| figures[named(&names, name)].first().map_or(f64::NAN, Samples::median);
    let ratio = speed("per section") / speed("per round");
    findings.say(&format!("Per section runs at {ratio:.2} of the speed of per round."));
    let raw = names.iter().zip(&figures).map(
        |(name, [speed, cpu])| json!({ "dialect": name, "gb-per-second": speed.json(), "cpu-seconds-per-gb": cpu.json() }),
    );
    findings.raw = Value::Array(raw.collect());
    Ok(findings)
}
