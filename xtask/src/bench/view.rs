//! What the guest sees of its migration: how much it writes before, in each round and after, and for how long it stands still.

use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use qemu_peer::BootGuest;
use serde_json::{Value, json};

use super::mover::number;
use super::pace::written_once;
use super::qemu::{self, Cursor, system_ms};
use super::samples::Samples;
use super::throughput::{content, random};
use super::{Bench, Findings};

/// What was seen of one migration. Times are in milliseconds of the system's clock.
#[derive(Clone, Debug, Default)]
struct Watched {
    began: f64,
    ended: f64,
    /// What the source reports of its pause.
    downtime: f64,
    /// Where each round ended that the guest ran in.
    rounds: Vec<f64>,
    /// Pages written by the time given, as they are seen at the source, and at the destination, where what is not more than the
    /// source's last is not of a guest that runs there.
    source: Vec<(f64, f64)>,
    destination: Vec<(f64, f64)>,
}

/// What follows from it.
#[derive(Clone, Debug, Default)]
struct View {
    /// Writes per 20 ms before: pages.
    before: f64,
    /// The same of each round, as a part of that.
    rounds: Vec<f64>,
    /// And in the second after the pause.
    after: f64,
    /// Of each 100 ms from the beginning until a second after the pause, without the pause, as a part of that.
    windows: Vec<f64>,
    /// From the last page at the source to the first at the destination.
    pause: f64,
    /// Times of more than 2 ms without a page, in milliseconds: in the second before, and from the beginning until a second after the pause.
    stalls_before: Vec<f64>,
    stalls: Vec<f64>,
}

impl Watched {
    /// What the guest saw. An error where there is nothing to see.
    fn judge(&self) -> Result<View, String> {
        let last = self.source.last().ok_or("nothing was seen of the source")?.1;
        let stopped = self.source.iter().find(|(_, pages)| *pages == last).expect("the last is one of them").0;
        let there: Vec<(f64, f64)> = self.destination.iter().copied().filter(|(_, pages)| *pages > last).collect();
        let runs = there.first().ok_or("the guest was not seen to run at the destination")?.0;
        let mut all: Vec<(f64, f64)> = self.source.iter().copied().filter(|(at, _)| *at <= stopped).collect();
        let here = all.clone();
        all.extend(&there);
        let written = |from: f64, to: f64| pages_at(&all, to) - pages_at(&all, from);
        let steps = |from: f64, to: f64, width: f64| {
            let count = ((to - from) / width).floor().max(0.0) as u32;
            (0..count).map(move |step| from + f64::from(step) * width)
        };
        let per_20_ms = |from: f64, to: f64| {
            let mut samples = Samples::default();
            steps(from, to, 20.0).for_each(|at| samples.push(written(at, at + 20.0)));
            samples.median()
        };
        let before = per_20_ms(self.began - SECOND, self.began);
        if before.is_nan() || before <= 0.0 {
            return Err("the guest wrote nothing before".to_owned());
        }
        let starts = std::iter::once(self.began).chain(self.rounds.iter().copied());
        let rounds = starts.zip(self.rounds.iter().copied().chain([stopped]));
        // A round too short for one step says nothing.
        let rounds = rounds.map(|(from, to)| per_20_ms(from, to.min(stopped)) / before).filter(|part| part.is_finite());
        let windows = steps(self.began, stopped, 100.0).filter(|at| at + 100.0 <= stopped).chain(steps(
            runs,
            runs + SECOND,
            100.0,
        ));
        Ok(View {
            before,
            rounds: rounds.collect(),
            after: per_20_ms(runs, runs + SECOND) / before,
            windows: windows.map(|at| written(at, at + 100.0) / 5.0 / before).collect(),
            pause: runs - stopped,
            stalls_before: stalls(&here, self.began - SECOND, self.began),
            stalls: stalls(&here, self.began, stopped).into_iter().chain(stalls(&there, runs, runs + SECOND)).collect(),
        })
    }
}

/// How many pages were written at this time, between the two moments beside it in proportion.
fn pages_at(series: &[(f64, f64)], at: f64) -> f64 {
    let next = series.partition_point(|(time, _)| *time <= at);
    match (next.checked_sub(1).map(|index| series[index]), series.get(next)) {
        (Some((then, pages)), Some(&(later, more))) => pages + (more - pages) * (at - then) / (later - then),
        (Some((_, pages)), None) | (None, Some(&(_, pages))) => pages,
        (None, None) => f64::NAN,
    }
}

/// Times of more than 2 ms between `from` and `to` in which `series` stays the same.
fn stalls(series: &[(f64, f64)], from: f64, to: f64) -> Vec<f64> {
    let within = series.iter().filter(|(at, _)| (from..=to).contains(at));
    let (mut stalls, mut since, mut latest) = (Vec::new(), None::<(f64, f64)>, 0.0);
    for &(at, pages) in within.chain(&[(f64::INFINITY, f64::NAN)]) {
        match since {
            Some((_, same)) if same == pages => {}
            _ => {
                if let Some((begun, _)) = since
                    && latest - begun > 2.0
                {
                    stalls.push(latest - begun);
                }
                since = Some((at, pages));
            }
        }
        latest = at;
    }
    stalls
}

/// A guest on one side with one limit of bandwidth in bytes per second, 0 for none.
const VARIANTS: &[(&str, &str, u64)] = &[
    ("multifd, 200 MB/s", "multifd", 200_000_000),
    ("QEMU, 200 MB/s", "QEMU", 200_000_000),
    ("multifd, no limit", "multifd", 0),
    ("QEMU, no limit", "QEMU", 0),
];

/// What was found of one variant.
#[derive(Default)]
struct Figures {
    total: Samples,
    downtime: Samples,
    views: Vec<View>,
    kind: String,
}

/// The section.
pub fn run(bench: &Bench) -> Result<Findings, String> {
    let content = content(bench, "random", random)?;
    let mib = if bench.quick { 256 } else { 512 };
    let mut figures: Vec<Figures> = VARIANTS.iter().map(|_| Figures::default()).collect();
    let mut skipped = Vec::new();
    for _ in 0..bench.repetitions(3) {
        for ((name, side, limit), figures) in VARIANTS.iter().zip(&mut figures) {
            let watched = match *side {
                "multifd" => ours(bench, mib, *limit),
                _ => theirs(bench, mib, &content, *limit).map(|watched| (watched, "KVM".to_owned())),
            };
            let judged = watched.and_then(|(watched, kind)| Ok((watched.judge()?, watched, kind)));
            match judged {
                Ok((view, watched, kind)) => {
                    eprintln!(
                        "{name}: {:.0} pages in 20 ms, pause {:.1} ms, {:?}",
                        view.before, view.pause, view.windows
                    );
                    figures.total.push((watched.ended - watched.began) / 1e3);
                    figures.downtime.push(watched.downtime);
                    figures.views.push(view);
                    figures.kind = kind;
                }
                Err(reason) => skipped.push(format!("{name}: not measured: {reason}.")),
            }
        }
    }
    let mut findings = describe(mib, &figures);
    skipped.iter().for_each(|reason| findings.say(reason));
    Ok(findings)
}

/// A guest of ours, which counts its pages itself.
fn ours(bench: &Bench, mib: u32, limit: u64) -> Result<(Watched, String), String> {
    let mut command = Command::new(bench.programs.join("examples/watch"));
    command.args([&mib.to_string(), &REWRITTEN.to_string(), "4", &limit.to_string()]);
    let output = command.output().map_err(|error| format!("watch: {error}"))?;
    let report: Value = serde_json::from_slice(&output.stdout)
        .map_err(|_| format!("watch: {}", String::from_utf8_lossy(&output.stderr).trim()))?;
    let series = |name: &str| -> Vec<(f64, f64)> {
        let samples = report[name].as_array().map(Vec::as_slice).unwrap_or_default();
        samples.iter().filter_map(|sample| Some((sample[0].as_f64()? / 1e3, sample[1].as_f64()?))).collect()
    };
    let rounds = report["rounds"].as_array().map(Vec::as_slice).unwrap_or_default();
    let watched = Watched {
        began: number(&report, "began-us") / 1e3,
        ended: number(&report, "ended-us") / 1e3,
        downtime: number(&report, "downtime-ms"),
        rounds: rounds
            .iter()
            .filter(|round| round["guest-running"] == true)
            .map(|round| number(round, "ended-us") / 1e3)
            .collect(),
        source: series("source"),
        destination: series("destination"),
    };
    let word = |name: &str| report[name].as_str().unwrap_or("?").to_owned();
    Ok((watched, format!("{}, {}", word("guest"), word("dirty-log"))))
}

/// A guest of QEMU under KVM; what it has written is read from its memory.
fn theirs(bench: &Bench, mib: u32, content: &Path, limit: u64) -> Result<Watched, String> {
    let guest = BootGuest::new(1 << 20..(1 + REWRITTEN) << 20);
    let mut source = qemu::Source::filled(&bench.qemu, mib, content, Some(guest), "kvm")?;
    written_once(&mut source)?;
    let mut destination = source.incoming()?;
    let cursors = [source.cursor(guest)?, destination.cursor(guest)?];
    let stop = AtomicBool::new(false);
    let (moved, [here, there]) = thread::scope(|scope| {
        let stop = &stop;
        let watch = scope.spawn(move || watch(&cursors, stop));
        thread::sleep(Duration::from_secs(2));
        let limit = if limit == 0 { 100 << 30 } else { limit };
        let parameters = qemu::Parameters { max_bandwidth: limit, ..Default::default() };
        let moved = source.migrate_to(&mut destination, "tcp", parameters, LIMIT, || Ok(()));
        thread::sleep(Duration::from_secs(2));
        stop.store(true, Ordering::Relaxed);
        (moved, watch.join().expect("it does not panic"))
    });
    let moved = moved?.ok_or("QEMU takes too long")?;
    let [began, ended] = moved.began_and_ended;
    Ok(Watched {
        began,
        ended,
        downtime: moved.downtime_ms(),
        // The first two are before round 0 and after it; the last is in the pause.
        rounds: moved.syncs.iter().filter(|(count, _)| *count > 1).map(|(_, at)| *at).collect(),
        source: here,
        destination: there,
    })
}

/// Looks at both sides every millisecond until `stop`.
fn watch(cursors: &[Cursor; 2], stop: &AtomicBool) -> [Vec<(f64, f64)>; 2] {
    let mut seen = [Vec::new(), Vec::new()];
    while !stop.load(Ordering::Relaxed) {
        for (cursor, seen) in cursors.iter().zip(&mut seen) {
            // Of a side that has ended there is nothing more to see.
            if let Ok(pages) = cursor.pages() {
                seen.push((system_ms(), pages));
            }
        }
        thread::sleep(Duration::from_millis(1));
    }
    seen
}

fn describe(mib: u32, figures: &[Figures]) -> Findings {
    let mut findings = Findings::default();
    let kind = figures.first().map_or("?", |figures| &figures.kind);
    findings.say(&format!(
        "A guest with one vCPU under KVM rewrites {REWRITTEN} of {mib} MiB as fast as it can, and checks each page before that; all other memory is full of content. 4 channels \
         over TCP, downtime limit 300 ms, no throttle, with 200 MB/s of bandwidth and without a limit. QEMU 10.0 runs a boot sector under KVM; ours is the guest of the demo ({kind}). The two guests do not do the same \
         work, so each is compared with itself: with what it wrote per 20 ms in the second before. How far it is was looked up each millisecond from outside: \
         ours counts its pages, QEMU's memory tells. The pause that the guest saw is from its last page at the source to its first at the destination, the one reported is the side's own. A stall is a time of more than 2 ms without a page. \
         Windows of 100 ms are those from the beginning until a second after the pause, without the pause. Variants took turns."
    ));
    let head = [
        "",
        "pages in 20 ms before",
        "windows ≥ 0.9, % (100)",
        "the slowest window",
        "in the second after",
        "stalls before",
        "stalls",
        "the longest, ms",
        "pause seen, ms",
        "pause reported, ms",
        "total s",
    ];
    let mut rows = Vec::new();
    let mut by_round = Vec::new();
    let mut raw = Vec::new();
    for ((name, _, limit), figures) in VARIANTS.iter().zip(figures) {
        let samples = |figure: &dyn Fn(&View) -> f64| {
            let mut samples = Samples::default();
            figures.views.iter().for_each(|view| samples.push(figure(view)));
            samples
        };
        let good = |view: &View| {
            let good = view.windows.iter().filter(|part| **part >= 0.9).count();
            100.0 * good as f64 / view.windows.len() as f64
        };
        let longest = |view: &View| view.stalls.iter().copied().fold(0.0, f64::max);
        rows.push(vec![
            (*name).to_owned(),
            samples(&|view| view.before).show(0),
            samples(&good).show(0),
            samples(&|view| view.windows.iter().copied().fold(f64::INFINITY, f64::min)).show(2),
            samples(&|view| view.after).show(2),
            samples(&|view| view.stalls_before.len() as f64).show(0),
            samples(&|view| view.stalls.len() as f64).show(0),
            samples(&longest).show(1),
            samples(&|view| view.pause).show(1),
            figures.downtime.show(1),
            figures.total.show(2),
        ]);
        // Of the run in the middle of the list: rounds of different runs do not belong together.
        if let Some(view) = figures.views.get(figures.views.len() / 2) {
            let parts: Vec<String> = view.rounds.iter().take(12).map(|part| format!("{part:.2}")).collect();
            by_round.push(vec![(*name).to_owned(), view.rounds.len().to_string(), parts.join(", ")]);
        }
        let views = figures.views.iter().map(|view| {
            json!({
                "pages-in-20-ms-before": view.before, "rounds": view.rounds, "after": view.after, "windows": view.windows,
                "stalls-before-ms": view.stalls_before, "stalls-ms": view.stalls, "pause-ms": view.pause,
            })
        });
        raw.push(json!({
            "variant": name, "max-bandwidth": limit, "total-s": figures.total.json(),
            "downtime-ms": figures.downtime.json(), "views": views.collect::<Vec<Value>>(),
        }));
    }
    findings.table(&head, &rows);
    findings.say(
        "**Pages in 20 ms in each round of 20 ms or more**, of those before (the first 12, of one run; QEMU's rounds are as its status shows them every 20 ms):",
    );
    findings.table(&["", "rounds", "part of the speed before"], &by_round);
    findings.raw = raw.into();
    findings
}

/// MiB: less than 200 MB/s move in the downtime limit.
const REWRITTEN: u32 = 32;
const LIMIT: Duration = Duration::from_secs(60);
/// Milliseconds.
const SECOND: f64 = 1000.0;

#[cfg(test)]
mod tests {
    use super::*;

    /// A guest that writes 10 pages a millisecond for 4 s, stands still for `pause` ms at 3 s, and is at half its speed for 100 ms at 1.5 s.
    fn watched(pause: f64) -> Watched {
        let pages = |at: f64| 10.0 * at - 5.0 * (at - 1500.0).clamp(0.0, 100.0);
        let source = (0..=3000).map(|at| (f64::from(at), pages(f64::from(at)))).collect();
        // Before it runs there, the destination shows what came over.
        let stale = (2500..3000).map(|at| (f64::from(at), pages(f64::from(at) - 100.0)));
        let there = (1..=1500).map(|at| (3000.0 + pause + f64::from(at), pages(3000.0 + f64::from(at))));
        let destination = stale.chain(there).collect();
        Watched { began: 1200.0, ended: 3050.0, downtime: 1.0, rounds: vec![2200.0], source, destination }
    }

    #[test]
    fn the_guest_is_compared_with_itself() {
        let view = watched(50.0).judge().unwrap();
        assert!((view.before - 200.0).abs() < 1e-6, "{}", view.before);
        assert!((view.pause - 51.0).abs() < 1e-6, "{}", view.pause);
        assert_eq!(view.windows.len(), 18 + 10);
        assert!((view.windows[3] - 0.5).abs() < 1e-6, "{:?}", view.windows);
        assert_eq!(view.windows.iter().filter(|part| **part < 0.99).count(), 1, "{:?}", view.windows);
        assert!(view.stalls.is_empty() && view.stalls_before.is_empty());
        assert_eq!(view.rounds.len(), 2);
    }

    #[test]
    fn a_stall_is_seen_and_the_pause_is_none() {
        let mut watched = watched(50.0);
        // It stands still from 2000 to 2040.
        for (at, pages) in &mut watched.source {
            if *at > 2000.0 {
                *pages = (*pages - 400.0).max(19_500.0);
            }
        }
        let view = watched.judge().unwrap();
        assert_eq!(view.stalls, [40.0]);
    }

    #[test]
    fn a_guest_that_never_ran_there_is_an_error() {
        let mut watched = watched(50.0);
        watched.destination.retain(|(at, _)| *at < 3000.0);
        assert!(watched.judge().is_err());
    }
}
