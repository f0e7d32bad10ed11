//! Far apart: a round trip of 20 and of 100 ms, with few and with many channels, idle and writing.

use std::process::{Command, Stdio};
use std::time::Duration;
use std::{env, thread};

use qemu_peer::Installed;
use serde_json::{Value, json};

use super::demo::demo;
use super::mover::{self, number};
use super::pace::{Pace, written_once};
use super::throughput::{content, random};
use super::wire::{self, Wire};
use super::{Bench, Findings, qemu};

/// The hidden first argument of the process inside the namespace; round trip in ms, name of the rate, and kind of guest follow.
pub const INSIDE: &str = "inside-distance";

/// A rate: its name, bits per second, MiB to move, and of these MiB that the writing guest rewrites.
struct Rate {
    name: &'static str,
    bits: f64,
    mib: u32,
    rewritten: u32,
}

const RATES: &[Rate] = &[
    Rate { name: "100 Mbit/s", bits: 1e8, mib: 24, rewritten: 8 },
    Rate { name: "1 Gbit/s", bits: 1e9, mib: 128, rewritten: 32 },
];
/// Milliseconds.
const ROUND_TRIPS: &[u32] = &[20, 100];
const CHANNELS: &[u8] = &[1, 4, 16, 64];

/// The section of the idle guest.
pub fn idle(bench: &Bench) -> Result<Findings, String> {
    let mut findings = Findings::default();
    findings.say(&format!(
        "{} An idle guest: the engine's is `multifd demo` with nothing to write, QEMU's is firmware that found nothing to boot, under TCG; \
         memory is full of content that is not zero. Set-up is from the first connect until the destination knew all RAM blocks, as the source reports it, in \
         QEMU's case as QEMU does (`setup-time`). One run each; the goals are a total time of at most QEMU's and a downtime of at most 2 \
         round trips + 20 ms. The downtime limit is 300 ms.",
        method()
    ));
    bench.newer_qemu().err().iter().for_each(|reason| findings.say(reason));
    let cells = cells(bench, "idle", &mut findings)?;
    let mut rows = Vec::new();
    let (mut slower, mut longer) = (0, 0);
    for cell in &cells {
        let figure = |side: &str, name: &str| number(&cell.report[side], name);
        let show = |name: &str, digits: usize| {
            ["multifd", "QEMU 10.0", "QEMU 11.1"].map(|side| show(figure(side, name), digits)).join(" / ")
        };
        let seconds = |side| figure(side, "seconds");
        let theirs = seconds("QEMU 10.0").min(seconds("QEMU 11.1"));
        let goal = 2.0 * f64::from(cell.round_trip) + 20.0;
        slower += u32::from(seconds("multifd") > theirs);
        longer += u32::from(figure("multifd", "downtime-ms") > goal);
        rows.push(vec![
            cell.name(),
            show("setup-ms", 0),
            format!("{} / {}", show("seconds", 2), self::show(seconds("plain sockets"), 2)),
            format!("{:.2}", seconds("multifd") / theirs),
            format!("{} (≤ {goal:.0})", show("downtime-ms", 0)),
        ]);
    }
    let head = [
        "",
        "set-up ms: multifd / QEMU 10.0 / 11.1",
        "total s: multifd / QEMU 10.0 / 11.1 / plain sockets",
        "total: multifd / the faster QEMU (≤ 1)",
        "downtime ms: multifd / QEMU 10.0 / 11.1 (goal for ours)",
    ];
    findings.table(&head, &rows);
    findings.say(&format!(
        "Of {} cells the engine took longer than the faster QEMU in {slower}, and its downtime was above the goal in {longer}.",
        cells.len()
    ));
    findings.raw = raw(&cells);
    Ok(findings)
}

/// The section of the guest that writes.
pub fn writing(bench: &Bench) -> Result<Findings, String> {
    let mut findings = Findings::default();
    let rewritten: Vec<String> = RATES.iter().map(|rate| format!("{} of {} MiB", rate.rewritten, rate.mib)).collect();
    findings.say(&format!(
        "{} The guest rewrites a part of its memory ({}), from first to last page and again, at {:.0} % of the rate; QEMU's \
         does so under TCG, slowed down by counting. No throttle. The downtime limit is {LIMIT_MS} ms, and the goal is that no run is above \
         it, as the side itself reports it; what the engine's guest saw itself is beside it, from its last page at the source to its first at the destination.",
        method(),
        rewritten.join(", "),
        SHARE * 100.0
    ));
    let cells = cells(bench, "writing", &mut findings)?;
    let mut rows = Vec::new();
    let mut above = [0, 0];
    for cell in &cells {
        if let Some(reason) = cell.report["multifd"]["failed"].as_str() {
            findings.say(&format!("{}: no migration by the engine: {reason}", cell.name()));
        }
        let figure = |side: &str, name: &str| number(&cell.report[side], name);
        for (side, count) in ["multifd", "QEMU 10.0"].into_iter().zip(&mut above) {
            *count += u32::from(figure(side, "downtime-ms") > f64::from(LIMIT_MS));
        }
        let pair = |name: &str, digits: usize| {
            ["multifd", "QEMU 10.0"].map(|side| show(figure(side, name), digits)).join(" / ")
        };
        rows.push(vec![
            cell.name(),
            pair("write-mb-per-second", 1),
            pair("seconds", 2),
            pair("rounds", 0),
            pair("downtime-ms", 0),
            show(figure("multifd", "guest-pause-ms"), 0),
        ]);
    }
    let head = [
        "",
        "guest writes MB/s: multifd / QEMU 10.0",
        "total s: multifd / QEMU 10.0",
        "rounds: multifd / QEMU 10.0",
        "downtime ms: multifd / QEMU 10.0",
        "pause that the engine's guest saw, ms",
    ];
    findings.table(&head, &rows);
    findings.say(&format!(
        "Of {} cells the downtime was above the limit in {} for the engine and in {} for QEMU; in {} the engine had none.",
        cells.len(),
        above[0],
        above[1],
        cells.iter().filter(|cell| cell.report["multifd"]["failed"].is_string()).count()
    ));
    findings.raw = raw(&cells);
    Ok(findings)
}

/// One line of a table.
struct Cell {
    rate: String,
    round_trip: u32,
    channels: u64,
    report: Value,
}

impl Cell {
    fn name(&self) -> String {
        format!("{}, {} ms, {} ch", self.rate, self.round_trip, self.channels)
    }
}

/// Runs this program once for each round trip and rate in a new network namespace, which ends with it.
fn cells(bench: &Bench, guest: &str, findings: &mut Findings) -> Result<Vec<Cell>, String> {
    let program = env::current_exe().map_err(|error| error.to_string())?;
    let mut cells = Vec::new();
    for rate in RATES.iter().take(if bench.quick { 1 } else { RATES.len() }) {
        for &round_trip in &ROUND_TRIPS[..if bench.quick { 1 } else { ROUND_TRIPS.len() }] {
            let mut command = Command::new("unshare");
            command.args(["--net", "--"]).arg(&program).args([
                "bench",
                INSIDE,
                &round_trip.to_string(),
                rate.name,
                guest,
            ]);
            command.args(bench.quick.then_some("--quick")).stdin(Stdio::null()).stderr(Stdio::piped());
            let output = command.output().map_err(|error| format!("unshare: {error}"))?;
            let said = String::from_utf8_lossy(&output.stderr);
            if !output.status.success() {
                let reason = said.lines().last().unwrap_or("no answer");
                findings.say(&format!("{}, {round_trip} ms: not measured to its end: {reason}", rate.name));
            }
            for line in output.stdout.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
                let report: Value = serde_json::from_slice(line).map_err(|error| format!("{INSIDE}: {error}"))?;
                let channels = report["channels"].as_u64().unwrap_or(0);
                let cell = Cell { rate: rate.name.to_owned(), round_trip, channels, report };
                eprintln!("{}: {}", cell.name(), cell.report);
                cells.push(cell);
            }
        }
    }
    Ok(cells)
}

fn raw(cells: &[Cell]) -> Value {
    cells
        .iter()
        .map(|cell| {
            json!({
                "rate": cell.rate, "round-trip-ms": cell.round_trip, "channels": cell.channels, "report": cell.report,
            })
        })
        .collect()
}

fn method() -> String {
    let memory: Vec<String> = RATES.iter().map(|rate| format!("{} MiB at {}", rate.mib, rate.name)).collect();
    format!(
        "{}. Inside a new network namespace, where two addresses see each other only through a TUN device; a thread of the bench delays each packet by half \
         the round trip, lets it through at the rate, and loses what would wait longer than 50 ms for that, as a router does. (This kernel may lack `netem`.) MTU 1500 \
         bytes, TCP as the system has it. The wire takes CPU time from both sides alike.",
        memory.join(", ")
    )
}

fn show(figure: f64, digits: usize) -> String {
    if figure.is_finite() { format!("{figure:.digits$}") } else { "–".to_owned() }
}

/// What runs inside the namespace; prints a JSON object for each number of channels.
pub fn inside(bench: &Bench, round_trip: &str, rate: &str, guest: &str) -> Result<(), String> {
    let rate = RATES.iter().find(|known| known.name == rate).ok_or_else(|| format!("no rate {rate}"))?;
    let round_trip = round_trip.parse().map_err(|_| format!("no round trip {round_trip}"))?;
    Wire { round_trip: Duration::from_millis(round_trip), rate: rate.bits }.lay()?;
    let measured = wire::round_trip_ms()?;
    let channels = if bench.quick { &CHANNELS[1..3] } else { CHANNELS };
    let say = |channels: u8, mut report: Value| {
        report["channels"] = channels.into();
        report["connect-ms"] = measured.into();
        println!("{report}");
    };
    match guest {
        "idle" => inside_idle(bench, rate, channels, say),
        _ => inside_writing(bench, rate, channels, say),
    }
}

fn inside_idle(bench: &Bench, rate: &Rate, channels: &[u8], say: impl Fn(u8, Value)) -> Result<(), String> {
    let content = content(bench, "random", random)?;
    let mut plain = mover::Source::start(bench, rate.mib, "anonymous", &content, rate.mib)?;
    let filled = |qemu: &Installed| qemu::Source::filled(qemu, rate.mib, &content, None, "tcg");
    let mut older = filled(&bench.qemu)?;
    let mut newer = bench.newer_qemu().ok().as_ref().map(filled).transpose()?;
    // The firmware has nothing to boot and comes to rest.
    thread::sleep(Duration::from_secs(3));
    for &channels in channels {
        let raw = mover::Destination::Raw { memory: "present" };
        let raw = plain.move_to(&format!("tcp:{}:0", wire::FAR), channels, "", raw, || Ok(()))?;
        let ours = demo_there(bench, rate, channels, &["--working-set=1MiB", "--write-rate=0MB/s"])?;
        let theirs = |source: &mut qemu::Source| -> Result<Value, String> {
            let parameters = qemu::Parameters { channels, ..Default::default() };
            let moved = source.migrate(&wire::FAR.to_string(), parameters, LIMIT, || Ok(()))?;
            Ok(moved.map_or(Value::Null, |moved| of_qemu(&moved)))
        };
        let (older, newer) = (theirs(&mut older)?, newer.as_mut().map_or(Ok(Value::Null), theirs)?);
        say(
            channels,
            json!({
                "plain sockets": { "seconds": raw.seconds() }, "multifd": ours, "QEMU 10.0": older, "QEMU 11.1": newer,
            }),
        );
    }
    Ok(())
}

fn inside_writing(bench: &Bench, rate: &Rate, channels: &[u8], say: impl Fn(u8, Value)) -> Result<(), String> {
    let content = content(bench, "random", random)?;
    let writes = SHARE * rate.bits / 8.0;
    let pace = Pace::measure(bench)?;
    for &channels in channels {
        let options = [format!("--working-set={}MiB", rate.rewritten), format!("--write-rate={writes:.0}B/s")];
        // One that does not converge is a result, too.
        let mut ours = demo_there(bench, rate, channels, &[&options[0], &options[1], "--no-throttle"])
            .unwrap_or_else(|error| json!({ "failed": error.lines().last() }));
        ours["write-mb-per-second"] = (writes / 1e6).into();
        let guest = pace.guest(rate.rewritten, writes);
        let mut source = qemu::Source::filled(&bench.qemu, rate.mib, &content, Some(guest), "tcg")?;
        written_once(&mut source)?;
        let written = source.write_rate(guest, Duration::from_secs(1))?;
        let parameters = qemu::Parameters { channels, downtime_limit: LIMIT_MS.into(), ..Default::default() };
        let moved = source.migrate(&wire::FAR.to_string(), parameters, LIMIT, || Ok(()))?;
        let mut theirs = moved.map_or(json!({}), |moved| of_qemu(&moved));
        theirs["write-mb-per-second"] = (written / 1e6).into();
        say(channels, json!({ "multifd": ours, "QEMU 10.0": theirs }));
    }
    Ok(())
}

/// A demo over the wire, and what is compared of its report.
fn demo_there(bench: &Bench, rate: &Rate, channels: u8, options: &[&str]) -> Result<Value, String> {
    let common = [
        format!("--address={}", wire::FAR),
        format!("--channels={channels}"),
        format!("--memory={}MiB", rate.mib),
        "--filled=100".to_owned(),
        format!("--downtime-limit={LIMIT_MS}ms"),
        format!("--max-time={}s", LIMIT.as_secs()),
        "--after=500ms".to_owned(),
    ];
    let all: Vec<&str> = common.iter().map(String::as_str).chain(options.iter().copied()).collect();
    let report = demo(bench, &all)?;
    let milliseconds = |name: &str| number(&report, name) / 1e3;
    Ok(json!({
        "seconds": milliseconds("total-time-us") / 1e3, "setup-ms": milliseconds("setup-time-us"),
        "downtime-ms": milliseconds("downtime-us"), "rounds": number(&report["ram"], "dirty-sync-count"),
        "guest-pause-ms": number(&report["verified"], "guest-pause"), "parts-ms": report["downtime-parts"],
    }))
}

fn of_qemu(moved: &qemu::Moved) -> Value {
    json!({
        "seconds": moved.seconds(), "setup-ms": moved.setup_ms(), "downtime-ms": moved.downtime_ms(),
        "rounds": moved.ram("dirty-sync-count"),
    })
}

/// What the writing guest writes, of the rate.
const SHARE: f64 = 0.2;
const LIMIT_MS: u32 = 300;
const LIMIT: Duration = Duration::from_secs(60);
