//! How long a guest stands still, idle and writing, and how fast it may write; beside QEMU with the same link and limit.

use std::process::Command;
use std::time::Duration;

use qemu_peer::{BootGuest, Memory};
use serde_json::{Value, json};

use super::mover::number;
use super::samples::Samples;
use super::{Bench, Findings, qemu};

/// The parts of the downtime, as the report names them.
const PARTS: &[&str] = &["pause", "drain", "last-round", "devices", "confirm"];

/// The figures of one kind of guest.
#[derive(Clone, Default)]
struct Stood {
    downtime: Samples,
    total: Samples,
    rounds: Samples,
    rate: Samples,
    parts: [Samples; 5],
}

impl Stood {
    fn add_demo(&mut self, report: &Value) {
        self.downtime.push(number(report, "downtime"));
        self.total.push(number(report, "total-time") / 1e3);
        self.rounds.push(number(&report["ram"], "dirty-sync-count"));
        for (part, samples) in PARTS.iter().zip(&mut self.parts) {
            samples.push(number(&report["downtime-parts"], part));
        }
    }

    fn add_qemu(&mut self, moved: &qemu::Moved, rate: f64) {
        self.downtime.push(moved.downtime_ms());
        self.total.push(moved.seconds());
        self.rounds.push(moved.ram("dirty-sync-count"));
        self.rate.push(rate / 1e6);
    }

    fn json(&self) -> Value {
        let parts: Vec<Value> = self.parts.iter().map(Samples::json).collect();
        json!({
            "downtime-ms": self.downtime.json(), "total-s": self.total.json(), "rounds": self.rounds.json(),
            "write-mb-per-second": self.rate.json(), "parts-ms": parts,
        })
    }
}

/// The section of the idle guest.
pub fn idle(bench: &Bench) -> Result<Findings, String> {
    let kinds = ["kvm", "process"];
    let mut stood: [Stood; 3] = Default::default();
    let mut skipped = Vec::new();
    for repetition in 0..if bench.quick { 2 } else { 8 } {
        for (index, kind) in kinds.iter().enumerate() {
            let guest = format!("--guest={kind}");
            match demo(bench, &[&guest, "--memory=512MiB", "--working-set=64MiB", "--write-rate=0MB/s"]) {
                Ok(report) if repetition > 0 => stood[index].add_demo(&report),
                Ok(_) => {}
                Err(error) if repetition == 0 => skipped.push(format!("Guest `{kind}`: not measured, {error}.")),
                Err(_) => {}
            }
        }
        let mut source = qemu::Source::running(bench, 512, Memory::Anonymous, None)?;
        // The firmware has nothing to boot and comes to rest.
        std::thread::sleep(Duration::from_secs(3));
        let moved = source.migrate("tcp", qemu::Parameters::default(), LIMIT, || Ok(()))?;
        if repetition > 0 {
            stood[2].add_qemu(&moved.ok_or("QEMU takes too long")?, 0.0);
        }
    }
    let mut findings = Findings::default();
    findings.say(
        "Nobody writes; 4 channels over TCP, downtime limit 300 ms, 512 MiB. The engine's guest has 64 MiB in use and is a \
         vCPU under KVM or a thread of the process; QEMU 10.0 runs a PC whose firmware found nothing to boot, under TCG. \
         Downtime is from the order to pause until the destination has confirmed; QEMU gives it in whole milliseconds. In \
         ms, parts as the engine's report names them.",
    );
    let mut rows: Vec<Vec<String>> = Vec::new();
    for (name, stood) in ["multifd, KVM guest", "multifd, process guest", "QEMU 10.0"].into_iter().zip(&stood) {
        let parts = stood.parts.iter().map(|part| part.show(2));
        let head = [name.to_owned(), stood.downtime.show(2)];
        rows.push(head.into_iter().chain(parts).collect());
        eprintln!("{name}: {} ms", stood.downtime.show(2));
    }
    findings.table(&["", "downtime", "pause", "drain", "last round", "devices", "confirm"], &rows);
    skipped.iter().for_each(|reason| findings.say(reason));
    let explained: f64 = stood[0].parts.iter().map(Samples::median).filter(|part| part.is_finite()).sum();
    if explained > 0.0 {
        findings.say(&format!(
            "The medians of the parts of the KVM guest add up to {explained:.2} ms of {:.2} ms. The goal is 5 ms.",
            stood[0].downtime.median()
        ));
    }
    findings.raw = stood.iter().map(Stood::json).collect();
    Ok(findings)
}

/// The section of the guest that writes.
pub fn writing(bench: &Bench) -> Result<Findings, String> {
    let pace = Pace::measure(bench)?;
    let mut findings = Findings::default();
    findings.say(&format!(
        "{} MB/s of bandwidth for both (`--max-bandwidth`, `max-bandwidth`), downtime limit 100 ms, 4 channels over TCP, 512 \
         MiB of which the guest rewrites 64 MiB from first to last page forever, at a share of the bandwidth. QEMU runs a \
         boot sector under TCG that is slowed down by counting; its rate was measured before each migration. It keeps a \
         core busy while it counts, which ours does not. No throttle on either side.",
        LINK / 1e6
    ));
    let mut rows = Vec::new();
    let mut raw = Vec::new();
    let shares: &[f64] = if bench.quick { &[0.1] } else { &[0.1, 0.5, 0.8] };
    for &share in shares {
        let mut stood: [Stood; 2] = Default::default();
        for _ in 0..bench.repetitions(3) {
            let report = writing_demo(bench, share)?;
            stood[0].add_demo(&report);
            stood[0].rate.push(share * LINK / 1e6);
            match pace.migrate(bench, share)? {
                (rate, Some(moved)) => stood[1].add_qemu(&moved, rate),
                (rate, None) => eprintln!("QEMU at {:.0} MB/s: not finished within {LIMIT:?}", rate / 1e6),
            }
        }
        for (name, stood) in ["multifd", "QEMU"].into_iter().zip(&stood) {
            eprintln!("{share}: {name}: {} ms", stood.downtime.show(1));
            let parts: Vec<String> = stood.parts.iter().map(|part| format!("{:.1}", part.median())).collect();
            rows.push(vec![
                format!("{:.0} %, {name}", share * 100.0),
                stood.rate.show(0),
                stood.downtime.show(1),
                stood.total.show(2),
                stood.rounds.show(0),
                if name == "QEMU" { "–".to_owned() } else { parts.join(" / ") },
            ]);
            raw.push(json!({ "share": share, "side": name, "stood": stood.json() }));
        }
    }
    let head = [
        "",
        "guest writes MB/s",
        "downtime ms",
        "total s",
        "rounds",
        "pause / drain / last round / devices / confirm, ms",
    ];
    findings.table(&head, &rows);
    findings.raw = raw.into();
    Ok(findings)
}

/// The section of the fastest guest that still moves.
pub fn convergence(bench: &Bench) -> Result<Findings, String> {
    let pace = Pace::measure(bench)?;
    let mut findings = Findings::default();
    findings.say(&format!(
        "The same guests and link; one migration each, at rising write rates, without throttle, for at most {} s. A guest \
         that writes faster than the link moves its 64 MiB can only converge if all of it fits into the downtime limit.",
        LIMIT.as_secs()
    ));
    let shares: &[f64] = if bench.quick { &[0.8] } else { &[0.8, 0.9, 0.95, 1.0, 1.1, 1.3] };
    let mut rows = Vec::new();
    let mut raw = Vec::new();
    let show = |found: Option<(f64, f64)>| match found {
        Some((seconds, downtime)) => format!("{seconds:.1} s, downtime {downtime:.0} ms"),
        None => "does not converge".to_owned(),
    };
    for &share in shares {
        let ours = writing_demo(bench, share).ok();
        let ours = ours.map(|report| (number(&report, "total-time") / 1e3, number(&report, "downtime")));
        let (rate, theirs) = pace.migrate(bench, share)?;
        let theirs = theirs.map(|moved| (moved.seconds(), moved.downtime_ms()));
        eprintln!("{share}: {}; QEMU at {:.0} MB/s: {}", show(ours), rate / 1e6, show(theirs));
        rows.push(vec![
            format!("{:.0} %", share * 100.0),
            format!("{:.0}", share * LINK / 1e6),
            show(ours),
            format!("{:.0}", rate / 1e6),
            show(theirs),
        ]);
        raw.push(json!({ "share": share, "multifd": ours, "qemu-rate": rate, "qemu": theirs }));
    }
    findings.table(&["share of the link", "multifd: MB/s", "multifd", "QEMU: MB/s", "QEMU"], &rows);
    findings.raw = raw.into();
    Ok(findings)
}

fn writing_demo(bench: &Bench, share: f64) -> Result<Value, String> {
    let rate = format!("--write-rate={:.0}B/s", share * LINK);
    let link = format!("--max-bandwidth={LINK:.0}B/s");
    let limit = format!("--max-time={}s", LIMIT.as_secs());
    let guest = ["--memory=512MiB", "--working-set=64MiB", "--filled=0", &rate, "--after=2s"];
    demo(
        bench,
        &[&guest[..], &[&link, &limit, "--downtime-limit=100ms", "--max-rounds=10000", "--no-throttle"]].concat(),
    )
}

/// `multifd demo` with these options; its report.
fn demo(bench: &Bench, options: &[&str]) -> Result<Value, String> {
    let program = bench.programs.join("multifd");
    let common = ["demo", "--json", "--progress=never", "--channels=4", "--transport=tcp", "--no-verify"];
    let output = Command::new(&program).args(common).args(options).output();
    let output = output.map_err(|error| format!("{}: {error}", program.display()))?;
    let report: Value = serde_json::from_slice(&output.stdout)
        .map_err(|_| String::from_utf8_lossy(&output.stderr).trim().to_owned())?;
    if output.status.success() { Ok(report) } else { Err(report["error"].as_str().unwrap_or("failed").to_owned()) }
}

/// How long QEMU's guest takes for a page, in seconds: a part that is always the same, and one for each count.
struct Pace {
    page: f64,
    count: f64,
}

impl Pace {
    fn measure(bench: &Bench) -> Result<Pace, String> {
        let [few, many] = [5_000u32, 100_000].map(|delay| -> Result<f64, String> {
            let (source, guest) = start(bench, delay)?;
            Ok(4096.0 / source.write_rate(guest, Duration::from_secs(2))?)
        });
        let (few, many) = (few?, many?);
        let count = (many - few) / 95_000.0;
        eprintln!("QEMU's guest: {few:.3e} s a page counting to 5,000, {many:.3e} s counting to 100,000");
        Ok(Pace { page: few - 5_000.0 * count, count })
    }

    fn delay(&self, rate: f64) -> u32 {
        (((4096.0 / rate) - self.page) / self.count).max(0.0) as u32
    }

    /// Migrates a guest that writes at about `share` of the link; its measured rate, and `None` where it takes too long.
    fn migrate(&self, bench: &Bench, share: f64) -> Result<(f64, Option<qemu::Moved>), String> {
        let (mut source, guest) = start(bench, self.delay(share * LINK))?;
        let rate = source.write_rate(guest, Duration::from_secs(1))?;
        let parameters = qemu::Parameters { max_bandwidth: LINK as u64, downtime_limit: 100, ..Default::default() };
        Ok((rate, source.migrate("tcp", parameters, LIMIT, || Ok(()))?))
    }
}

/// A QEMU whose guest has written its memory at least once.
fn start(bench: &Bench, delay: u32) -> Result<(qemu::Source, BootGuest), String> {
    let guest = BootGuest::new(1 << 20..65 << 20).slowed(delay);
    let mut source = qemu::Source::running(bench, 512, Memory::Anonymous, Some(guest))?;
    source.qemu().wait_passes(1, Duration::from_secs(120)).map_err(|error| error.to_string())?;
    Ok((source, guest))
}

/// Bytes per second of bandwidth.
const LINK: f64 = 100e6;
const LIMIT: Duration = Duration::from_secs(30);
