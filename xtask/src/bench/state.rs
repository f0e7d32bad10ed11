//! 512 MiB of device state: on main, over the channels, and while the guest runs.

use std::process::Command;

use serde_json::{Value, json};

use super::mover::{Mover, number};
use super::samples::Samples;
use super::{Bench, Findings};

/// A way for the state: what it is called here, what the receiver takes, channels, and when it is sent.
const WAYS: &[(&str, &[&str], &str, &str)] = &[
    ("one section on main, as to an older version", &["main"], "4", "pause"),
    ("over 1 channel", &[], "1", "pause"),
    ("over 4 channels", &[], "4", "pause"),
    ("while the guest runs (`save_live`)", &[], "4", "live"),
];

#[derive(Default)]
struct Figures {
    downtime: Samples,
    seconds: Samples,
    cpu_seconds: Samples,
    /// How much more memory each side had at any time than before, in MiB.
    more: [Samples; 2],
    live_mib: f64,
    said: Vec<Value>,
}

/// The section.
pub fn run(bench: &Bench) -> Result<Findings, String> {
    let mib = if bench.quick { 64 } else { 512 };
    let program = bench.programs.join("examples/device_state");
    let mut all: Vec<Figures> = WAYS.iter().map(|_| Figures::default()).collect();
    for _ in 0..bench.repetitions(5) {
        for ((name, takes, channels, when), figures) in WAYS.iter().zip(&mut all) {
            let mut receiver = Mover::start(&program, &[&["receive", "tcp:127.0.0.1:0"], *takes].concat())?;
            let said = receiver.line()?;
            let uri = said.strip_prefix("listening on ").ok_or_else(|| format!("the receiver said `{said}`"))?;
            let mut command = Command::new(&program);
            command.args(["send", uri, &mib.to_string(), channels, when]);
            let output = command.output().map_err(|error| format!("{}: {error}", program.display()))?;
            let source: Value = serde_json::from_slice(&output.stdout)
                .map_err(|_| format!("the source: {}", String::from_utf8_lossy(&output.stderr).trim()))?;
            let destination = receiver.json()?;
            eprintln!("{name}: {:.0} ms", number(&source, "downtime-ms"));
            figures.downtime.push(number(&source, "downtime-ms"));
            figures.seconds.push(number(&source, "seconds"));
            figures.cpu_seconds.push(number(&source, "cpu-seconds") + number(&destination, "cpu-seconds"));
            figures.live_mib = number(&source, "live-bytes") / MIB;
            for (more, side) in figures.more.iter_mut().zip([&source, &destination]) {
                more.push(number(side, "more-bytes") / MIB);
            }
            figures.said.push(json!({ "way": name, "source": source, "destination": destination }));
        }
    }
    Ok(describe(mib, &all))
}

fn describe(mib: u32, all: &[Figures]) -> Findings {
    let mut findings = Findings::default();
    findings.say(&format!(
        "A VM of 4 MiB of memory with {mib} MiB of device state, which is made while it is written and verified while it is read; \
         TCP, both ends in processes of their own. More memory is the peak of a process less what it had before, source / destination. \
         One call of `save_live` takes 256 MiB; what is left then is sent in the pause where it fits into the limit of 300 ms.",
    ));
    let row = |((name, ..), figures): (&(&str, &[&str], &str, &str), &Figures)| {
        let [source, destination] = &figures.more;
        vec![
            (*name).to_owned(),
            figures.downtime.show(0),
            format!("{:.0}", figures.live_mib),
            figures.seconds.show(2),
            figures.cpu_seconds.show(2),
            format!("{} / {}", source.show(1), destination.show(1)),
        ]
    };
    let rows: Vec<_> = WAYS.iter().zip(all).map(row).collect();
    findings.table(
        &["", "downtime ms", "MiB before it", "seconds", "CPU seconds, both", "more memory MiB, source / destination"],
        &rows,
    );
    findings.raw = all.iter().flat_map(|figures| figures.said.clone()).collect();
    findings
}

const MIB: f64 = 1_048_576.0;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_way_has_its_own_row() {
        let mut all: Vec<Figures> = WAYS.iter().map(|_| Figures::default()).collect();
        for (index, figures) in all.iter_mut().enumerate() {
            figures.downtime.push(100.0 + index as f64);
            figures.more[1].push(index as f64);
        }
        let text = describe(512, &all).text;
        for (index, (name, ..)) in WAYS.iter().enumerate() {
            let row = text.lines().find(|line| line.starts_with(&format!("| {name} |"))).unwrap();
            assert!(row.contains(&format!("| {} |", 100 + index)) && row.ends_with(&format!("/ {index}.0 |")), "{row}");
        }
    }
}
