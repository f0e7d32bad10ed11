//! How long a guest waits for a page that it asks for, while the rest of its memory streams in the background.

use std::process::Command;

use serde_json::{Value, json};

use super::samples::Samples;
use super::{Bench, Findings};

/// One way to ask: its name, where the source listens, and whether pages that are asked for have a connection of their own.
type Variant = (&'static str, &'static str, bool);

const VARIANTS: &[Variant] = &[
    ("unix, preempt", "unix", true),
    ("unix, one connection", "unix", false),
    ("TCP, preempt", "tcp", true),
    ("TCP, one connection", "tcp", false),
];

/// What was measured, by the names that `faults` has for it.
const FIGURES: &[(&str, &str)] = &[
    ("/seen/p50", "seen: p50"),
    ("/seen/p99", "p99"),
    ("/seen/max", "most"),
    ("/reported/p50", "reported: p50"),
    ("/reported/p99", "p99"),
    ("/reported/max", "most"),
];

/// The section.
pub fn run(bench: &Bench) -> Result<Findings, String> {
    let mib: u32 = if bench.quick { 64 } else { 1024 };
    let repetitions = bench.repetitions(5);
    let mut runs: Vec<Vec<Value>> = vec![Vec::new(); VARIANTS.len()];
    for _ in 0..repetitions {
        for (variant, (name, ..)) in VARIANTS.iter().enumerate() {
            let run = measure(bench, VARIANTS[variant], mib)?;
            eprintln!("{name}: {run}");
            runs[variant].push(run);
        }
    }
    Ok(describe(mib, repetitions, &runs))
}

/// One run: what the program printed.
fn measure(bench: &Bench, (_, transport, preempt): Variant, mib: u32) -> Result<Value, String> {
    let uri = match transport {
        "tcp" => "tcp:127.0.0.1:0".to_owned(),
        _ => format!("unix:{}", bench.directory.join("faults").display()),
    };
    let mut command = Command::new(bench.programs.join("examples/faults"));
    command.args([uri, mib.to_string()]).args(preempt.then_some("preempt"));
    let output = command.output().map_err(|error| format!("faults: {error}"))?;
    if !output.status.success() {
        return Err(format!("faults: {}", String::from_utf8_lossy(&output.stderr)));
    }
    serde_json::from_slice(&output.stdout).map_err(|error| format!("faults: {error}"))
}

fn describe(mib: u32, repetitions: usize, runs: &[Vec<Value>]) -> Findings {
    let mut findings = Findings::default();
    findings.say(&format!(
        "{mib} MiB of content stream as fast as the destination reads, while a guest with one vCPU asks for random pages, one at a time. Both ends are in one process \
         (`multifd/examples/faults.rs`). Median of {repetitions} runs, with least and most; microseconds. \u{201c}Seen\u{201d} is from the request until the guest has its page, \
         \u{201c}reported\u{201d} from the arrival of the request until its page was written to the socket, of which the goal is a p99 of 2000 with preempt. Variants took turns."
    ));
    let head: Vec<&str> =
        ["", "background, GB/s", "requests"].into_iter().chain(FIGURES.iter().map(|(_, name)| *name)).collect();
    let rows: Vec<Vec<String>> = VARIANTS.iter().zip(runs).map(|((name, ..), runs)| row(name, mib, runs)).collect();
    findings.table(&head, &rows);
    let raw = VARIANTS.iter().zip(runs).map(|((name, ..), runs)| json!({ "variant": name, "mib": mib, "runs": runs }));
    findings.raw = Value::Array(raw.collect());
    findings
}

fn row(name: &str, mib: u32, runs: &[Value]) -> Vec<String> {
    let all = |figure: &dyn Fn(&Value) -> Option<f64>| {
        let mut samples = Samples::default();
        runs.iter().filter_map(figure).for_each(|value| samples.push(value));
        samples
    };
    let pointed = |at: &'static str| all(&|run: &Value| run.pointer(at)?.as_f64());
    let gigabytes = f64::from(mib) * 1_048_576.0 / 1e9;
    let speed = all(&|run: &Value| Some(gigabytes / run["seconds"].as_f64()?));
    let figures = FIGURES.iter().map(|(at, _)| pointed(at).show(0));
    [name.to_owned(), speed.show(1), pointed("/requests").show(0)].into_iter().chain(figures).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_variant_has_a_row_with_the_figures_of_its_runs() {
        let run = |p99: u64| {
            json!({ "seconds": 1.0, "requests": 10, "seen": { "p50": 1, "p99": p99, "max": 9 },
                    "reported": { "p50": 2, "p99": 3, "max": 4 } })
        };
        let row = row("unix", 1000, &[run(5), run(7), run(30)]);
        let expected = ["unix", "1.0 (1.0–1.0)", "10 (10–10)", "1 (1–1)", "7 (5–30)"];
        assert_eq!(row[..5], expected);
        assert_eq!(row.len(), 3 + FIGURES.len());
        let findings = describe(1000, 3, &vec![vec![run(5)]; VARIANTS.len()]);
        assert_eq!(findings.text.matches("preempt |").count(), 2, "{}", findings.text);
        assert_eq!(findings.raw[0]["runs"][0]["seen"]["p99"], 5);
    }
}
