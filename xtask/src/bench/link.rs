//! A link of limited rate: a network namespace whose loopback passes through a token bucket.

use std::process::{Command, Stdio};
use std::time::Duration;
use std::{env, fs};

use qemu_peer::Memory;
use serde_json::{Value, json};

use super::mover::{self, Destination, Source};
use super::throughput::{content, random};
use super::{Bench, Findings, qemu};

/// The hidden first argument of the process inside the namespace; the rate follows.
pub const INSIDE: &str = "inside-link";

/// The rates, with MiB to move.
const RATES: &[(&str, f64, u32)] = &[("1gbit", 1e9, 512), ("100mbit", 1e8, 64)];

/// The section: runs itself once for each rate in a new network namespace, which ends with it.
pub fn run(bench: &Bench) -> Result<Findings, String> {
    let mut findings = Findings::default();
    findings.say(
        "Inside a new network namespace, where the loopback device has an MTU of 1500 bytes and a token bucket (`tbf`) at \
         the rate; acknowledgements pass through it too. Random pages of a guest that does not write, 4 channels. Plain \
         sockets are the limit: the same bytes on the same number of connections without a protocol.",
    );
    let program = env::current_exe().map_err(|error| error.to_string())?;
    let mut rows = Vec::new();
    let mut raw = Vec::new();
    for (rate, bits, mib) in RATES.iter().take(if bench.quick { 1 } else { RATES.len() }) {
        let mut command = Command::new("unshare");
        command.args(["--net", "--"]).arg(&program).args(["bench", INSIDE, rate]);
        command.args(bench.quick.then_some("--quick")).stdin(Stdio::null()).stderr(Stdio::piped());
        let output = command.output().map_err(|error| format!("unshare: {error}"))?;
        let Ok(report) = serde_json::from_slice::<Value>(&output.stdout) else {
            let reason = String::from_utf8_lossy(&output.stderr);
            findings.say(&format!("{rate}: not measured: {}", reason.lines().last().unwrap_or("no answer")));
            continue;
        };
        let seconds = |side: &str| mover::number(&report[side], "seconds");
        let bytes = f64::from(*mib) * 1048576.0;
        for side in ["plain sockets", "multifd", "QEMU"] {
            let downtime = report[side]["downtime-ms"].as_f64();
            rows.push(vec![
                format!("{rate}, {mib} MiB: {side}"),
                format!("{:.2}", seconds(side)),
                format!("{:.1}", bytes * 8.0 / seconds(side) / bits * 100.0),
                format!("{:.1}", seconds("plain sockets") / seconds(side) * 100.0),
                downtime.map_or("–".to_owned(), |downtime| format!("{downtime:.1}")),
            ]);
        }
        raw.push(json!({ "rate": rate, "mib": mib, "report": report }));
    }
    let head = ["", "seconds", "guest bytes, % of the rate", "% of plain sockets (≥ 95)", "downtime ms"];
    findings.table(&head, &rows);
    findings.raw = raw.into();
    Ok(findings)
}

/// What runs inside the namespace; prints a JSON object.
pub fn inside(bench: &Bench, rate: &str) -> Result<(), String> {
    let (_, _, mib) = RATES.iter().find(|(name, ..)| *name == rate).ok_or_else(|| format!("no rate {rate}"))?;
    // Nobody else's network: a namespace of our own has nothing but its loopback.
    let devices = fs::read_to_string("/proc/net/dev").map_err(|error| error.to_string())?;
    if devices.lines().skip(2).any(|line| !line.trim_start().starts_with("lo:")) {
        return Err("not inside a network namespace of its own".to_owned());
    }
    tool("ip", &["link", "set", "dev", "lo", "mtu", "1500", "up"])?;
    tool("tc", &["qdisc", "add", "dev", "lo", "root", "tbf", "rate", rate, "burst", "256kb", "latency", "50ms"])?;
    let content = content(bench, "random", random)?;
    let no_warming = || Ok(());
    let mut source = Source::start(bench, *mib, "anonymous", &content, *mib)?;
    let raw = source.move_to(LISTEN, 4, "", Destination::Raw { memory: "present" }, no_warming)?;
    let engine = Destination::Engine { memory: "anonymous", first_touch: "auto" };
    let ours = source.move_to(LISTEN, 4, "", engine, no_warming)?;
    drop(source);
    let mut source = qemu::Source::stopped(bench, *mib, Memory::Anonymous, &content, *mib)?;
    let limit = Duration::from_secs(120);
    let theirs = source.migrate("tcp", qemu::Parameters::default(), limit, no_warming)?.ok_or("QEMU takes too long")?;
    let report = json!({
        "plain sockets": raw.source,
        "multifd": ours.source,
        "QEMU": { "seconds": theirs.seconds(), "downtime-ms": theirs.downtime_ms(), "answer": theirs.answer },
    });
    println!("{report}");
    Ok(())
}

fn tool(program: &str, arguments: &[&str]) -> Result<(), String> {
    let output = Command::new(program).args(arguments).output().map_err(|error| format!("{program}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{program}: {}", String::from_utf8_lossy(&output.stderr).trim()))
}

const LISTEN: &str = "tcp:127.0.0.1:0";
