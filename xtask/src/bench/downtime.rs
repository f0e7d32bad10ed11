//! How long a guest stands still, idle and writing, and how fast it may write; beside QEMU with the same link and limit.

use std::collections::BTreeMap;
use std::time::Duration;

use qemu_peer::Memory;
use serde_json::{Value, json};

use super::demo::demo;
use super::mover::number;
use super::pace::{Pace, written_once};
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
    let mut stood: BTreeMap<&str, Stood> = BTreeMap::new();
    let mut skipped = Vec::new();
    for repetition in 0..if bench.quick { 2 } else { 8 } {
        for (name, kind) in [(KVM_GUEST, "kvm"), (PROCESS_GUEST, "process")] {
            let guest = format!("--guest={kind}");
            match demo(bench, &[&guest, "--memory=512MiB", "--working-set=64MiB", "--write-rate=0MB/s", "--channels=4"])
            {
                Ok(report) if repetition > 0 => stood.entry(name).or_default().add_demo(&report),
                Ok(_) => {}
                Err(error) if repetition == 0 => skipped.push(format!("Guest `{kind}`: not measured, {error}.")),
                Err(_) => {}
            }
        }
        for &(cpus, name) in CPUS {
            let cpus = format!("--cpus={cpus}");
            let guest =
                ["--guest=kvm", "--memory=512MiB", "--working-set=64MiB", "--write-rate=0MB/s", "--channels=4", &cpus];
            // What is in the way of one is in the way of that with one vCPU, too.
            if let Ok(report) = demo(bench, &guest)
                && repetition > 0
            {
                stood.entry(name).or_default().add_demo(&report);
            }
        }
        let mut source = qemu::Source::running(bench, 512, Memory::Anonymous, None)?;
        // The firmware has nothing to boot and comes to rest.
        std::thread::sleep(Duration::from_secs(3));
        let moved = source.migrate("tcp", qemu::Parameters::default(), LIMIT, || Ok(()))?;
        if repetition > 0 {
            stood.entry(QEMU_GUEST).or_default().add_qemu(&moved.ok_or("QEMU takes too long")?, 0.0);
        }
    }
    let mut findings = Findings::default();
    findings.say(
        "Nobody writes; 4 channels over TCP, downtime limit 300 ms, 512 MiB. The engine's guest has 64 MiB in use and is a \
         vCPU under KVM, or several (their state is saved and loaded by as many threads as there are CPUs), or a thread of the process; QEMU 10.0 runs a PC whose firmware found nothing to boot, under TCG. \
         Downtime is from the order to pause until the destination has confirmed; QEMU gives it in whole milliseconds. In \
         ms, parts as the engine's report names them.",
    );
    let mut rows: Vec<Vec<String>> = Vec::new();
    let several = CPUS.iter().map(|(_, name)| *name);
    for name in [KVM_GUEST].into_iter().chain(several).chain([PROCESS_GUEST, QEMU_GUEST]) {
        let stood = stood.entry(name).or_default();
        let parts = stood.parts.iter().map(|part| part.show(2));
        let head = [name.to_owned(), stood.downtime.show(2)];
        rows.push(head.into_iter().chain(parts).collect());
        eprintln!("{name}: {} ms", stood.downtime.show(2));
    }
    findings.table(&["", "downtime", "pause", "drain", "last round", "devices", "confirm"], &rows);
    skipped.iter().for_each(|reason| findings.say(reason));
    let kvm = &stood[KVM_GUEST];
    let explained: f64 = kvm.parts.iter().map(Samples::median).filter(|part| part.is_finite()).sum();
    if explained > 0.0 {
        findings.say(&format!(
            "The medians of the parts of the KVM guest add up to {explained:.2} ms of {:.2} ms. The goal is 5 ms.",
            kvm.downtime.median()
        ));
    }
    findings.raw = stood.iter().map(|(name, stood)| json!({ "guest": name, "stood": stood.json() })).collect();
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
        let mut stood: BTreeMap<&str, Stood> = BTreeMap::new();
        for _ in 0..bench.repetitions(3) {
            let report = writing_demo(bench, share)?;
            let ours = stood.entry("multifd").or_default();
            ours.add_demo(&report);
            ours.rate.push(share * LINK / 1e6);
            match migrate(bench, &pace, share)? {
                (rate, Some(moved)) => stood.entry("QEMU").or_default().add_qemu(&moved, rate),
                (rate, None) => eprintln!("QEMU at {:.0} MB/s: not finished within {LIMIT:?}", rate / 1e6),
            }
        }
        for name in ["multifd", "QEMU"] {
            let stood = stood.entry(name).or_default();
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
        let (rate, theirs) = migrate(bench, &pace, share)?;
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
    let guest = ["--channels=4", "--memory=512MiB", "--working-set=64MiB", "--filled=0", &rate, "--after=2s"];
    demo(
        bench,
        &[&guest[..], &[&link, &limit, "--downtime-limit=100ms", "--max-rounds=10000", "--no-throttle"]].concat(),
    )
}

/// Migrates QEMU's guest that writes at about `share` of the link; its measured rate, and `None` where it takes too long.
fn migrate(bench: &Bench, pace: &Pace, share: f64) -> Result<(f64, Option<qemu::Moved>), String> {
    let guest = pace.guest(64, share * LINK);
    let mut source = qemu::Source::running(bench, 512, Memory::Anonymous, Some(guest))?;
    written_once(&mut source)?;
    let rate = source.write_rate(guest, Duration::from_secs(1))?;
    let parameters = qemu::Parameters { max_bandwidth: LINK as u64, downtime_limit: 100, ..Default::default() };
    Ok((rate, source.migrate("tcp", parameters, LIMIT, || Ok(()))?))
}

/// Bytes per second of bandwidth.
const LINK: f64 = 100e6;
const LIMIT: Duration = Duration::from_secs(30);
const KVM_GUEST: &str = "multifd, KVM guest";
/// The same with several vCPUs.
const CPUS: &[(u32, &str)] =
    &[(4, "multifd, KVM guest, 4 vCPUs"), (16, "multifd, KVM guest, 16 vCPUs"), (64, "multifd, KVM guest, 64 vCPUs")];
const PROCESS_GUEST: &str = "multifd, process guest";
const QEMU_GUEST: &str = "QEMU 10.0";
