//! What TLS costs, beside connections without it and beside QEMU with it.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use qemu_peer::Memory;
use serde_json::{Value, json};

use super::mover::{self, Destination, Source};
use super::samples::{Samples, named};
use super::throughput::{content, random};
use super::{Bench, Findings, qemu};

/// What is compared, in the order in which the runs of one repetition follow each other.
const VARIANTS: &[&str] = &["QEMU", "QEMU, TLS", "multifd", "multifd, TLS"];
const CHANNELS: &[u8] = &[1, 4];

/// GB/s and CPU seconds per GB, by channels and variant.
type Cells = BTreeMap<(u8, usize), (Samples, Samples)>;

/// The section.
pub fn run(bench: &Bench) -> Result<Findings, String> {
    let mib = if bench.quick { 256 } else { 1024 };
    let content = content(bench, "random", random)?;
    let tls = certificates(bench)?;
    let mut ours = Source::start(bench, mib, "anonymous", &content, mib)?;
    let mut theirs = qemu::Source::stopped(bench, mib, Memory::Anonymous, &content, mib)?;
    let gb = f64::from(mib) * 1048576.0 / 1e9;
    let mut cells = Cells::new();
    for &channels in CHANNELS {
        // The first has to start and load programs.
        for repetition in 0..=bench.repetitions(5) {
            for (variant, name) in VARIANTS.iter().enumerate() {
                let warm = || mover::warm(bench, mib + mib / 4);
                let (seconds, cpu) = match *name {
                    "QEMU" | "QEMU, TLS" => {
                        let tls = (*name == "QEMU, TLS").then_some(&*tls);
                        let parameters = qemu::Parameters { channels, tls, ..Default::default() };
                        let moved = theirs.migrate("tcp", parameters, LIMIT, warm)?.ok_or("QEMU takes too long")?;
                        (moved.seconds(), moved.cpu_seconds)
                    }
                    name => {
                        let plain = Destination::Engine { memory: "anonymous", first_touch: "auto" };
                        let destination = if name == "multifd" { plain } else { Destination::Tls(&tls) };
                        let moved = ours.move_to("tcp:127.0.0.1:0", channels, "", destination, warm)?;
                        (moved.seconds(), moved.cpu_seconds())
                    }
                };
                eprintln!("{channels} channels: {name}: {:.2} GB/s, {:.2} CPU s/GB", gb / seconds, cpu / gb);
                if repetition > 0 {
                    let cell: &mut (Samples, Samples) = cells.entry((channels, variant)).or_default();
                    cell.0.push(gb / seconds);
                    cell.1.push(cpu / gb);
                }
            }
        }
    }
    Ok(describe(mib, &cells))
}

/// Makes certificates for this host.
fn certificates(bench: &Bench) -> Result<PathBuf, String> {
    let dir = bench.directory.join("tls");
    // Of the run before.
    let _ = fs::remove_dir_all(&dir);
    let mut command = Command::new(bench.programs.join("multifd"));
    let made = command.arg("tls-init").arg(&dir).args(["--host", "127.0.0.1", "--quiet"]).output();
    match made {
        Ok(output) if output.status.success() => Ok(dir),
        Ok(output) => Err(format!("tls-init: {}", String::from_utf8_lossy(&output.stderr))),
        Err(error) => Err(format!("multifd: {error}")),
    }
}

fn describe(mib: u32, cells: &Cells) -> Findings {
    let mut findings = Findings::default();
    findings.say(&format!(
        "{mib} MiB of random pages that no process writes, over TCP on this host, from anonymous memory into anonymous memory; QEMU 10.0 with a guest \
         that never ran. Certificates are those of `multifd tls-init`; both pairs agree on TLS 1.3. CPU is of both processes. Variants took turns; the first turn is not counted."
    ));
    let cell = |channels: u8, variant: usize| cells.get(&(channels, variant)).cloned().unwrap_or_default();
    let head: Vec<String> = CHANNELS.iter().map(|channels| format!("{channels} ch")).collect();
    let head: Vec<&str> = std::iter::once("").chain(head.iter().map(String::as_str)).collect();
    let rows = |figure: fn(&(Samples, Samples)) -> &Samples| -> Vec<Vec<String>> {
        let row = |(variant, name): (usize, &&str)| {
            let figures = CHANNELS.iter().map(|&channels| figure(&cell(channels, variant)).show(2));
            std::iter::once((*name).to_owned()).chain(figures).collect()
        };
        VARIANTS.iter().enumerate().map(row).collect()
    };
    findings.say("**GB/s:**");
    findings.table(&head, &rows(|cell| &cell.0));
    findings.say("**CPU seconds per GB, both processes:**");
    findings.table(&head, &rows(|cell| &cell.1));
    findings.say("**As ratios of medians** (goal):");
    let ratio = |what: &str, of: &dyn Fn(u8) -> f64| {
        let ratios = CHANNELS.iter().map(|&channels| format!("{:.2}", of(channels)));
        std::iter::once(what.to_owned()).chain(ratios).collect::<Vec<String>>()
    };
    let speed = |channels, name| cell(channels, named(VARIANTS, name)).0.median();
    let cpu = |channels, name| cell(channels, named(VARIANTS, name)).1.median();
    let ratios = [
        ratio("per core: TLS / without (≥ 0.6)", &|channels| {
            cpu(channels, "multifd") / cpu(channels, "multifd, TLS")
        }),
        ratio("GB/s: multifd / QEMU, both with TLS (≥ 1.5)", &|channels| {
            speed(channels, "multifd, TLS") / speed(channels, "QEMU, TLS")
        }),
        ratio("per core: multifd / QEMU, both with TLS", &|channels| {
            cpu(channels, "QEMU, TLS") / cpu(channels, "multifd, TLS")
        }),
    ];
    findings.table(&head, &ratios);
    let raw = cells.iter().map(|((channels, variant), (speed, cpu))| {
        json!({
            "channels": channels, "variant": VARIANTS[*variant], "mib": mib, "gb-per-second": speed.json(),
            "cpu-seconds-per-gb": cpu.json(),
        })
    });
    findings.raw = Value::Array(raw.collect());
    findings
}

/// No migration of this size takes nearly as long.
const LIMIT: Duration = Duration::from_secs(120);
