//! The VMM of `examples/vmm` on one host: its guest is copied to another process, or handed over with its memory.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStderr, ChildStdin, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use test_support::{HugePages, TempDir};

use super::samples::Samples;
use super::{Bench, Findings};

/// A VM: what its memory is made of, its MiB and how many of them the guest rewrites over and over, and how it moves.
struct Way {
    backing: &'static str,
    mib: u64,
    busy: u64,
    verb: &'static str,
}

const fn way(verb: &'static str, backing: &'static str, mib: u64, busy: u64) -> Way {
    Way { backing, mib, busy, verb }
}

impl Way {
    /// Pages of 2 MiB that both VMs need at once: all of their memory, or what they use of it with some to spare.
    fn huge_pages(&self) -> u64 {
        match self.backing {
            "huge" => 2 * (self.mib / 2 + 1),
            "huge-unreserved" => 2 * (self.busy / 2 + 32),
            _ => 0,
        }
    }
}

const WAYS: &[Way] = &[
    way(HAND_OVER, "memfd", 65_536, 64),
    way(HAND_OVER, "memfd", 2048, 256),
    way(HAND_OVER, "huge-unreserved", 65_536, 64),
    way(HAND_OVER, "huge", 256, 64),
    way(COPY, "memfd", 2048, 256),
    way(COPY, "anonymous", 65_536, 4),
    way(COPY, "memfd", 65_536, 4),
    way(COPY, "huge-unreserved", 65_536, 4),
    way(COPY, "huge", 256, 4),
];
const LIMIT: Duration = Duration::from_secs(60);
const COPY: &str = "migrate";
const HAND_OVER: &str = "upgrade";
const PARTS: [&str; 6] = ["total", "pause", "drain", "last-round", "devices", "confirm"];

#[derive(Default)]
struct Figures {
    /// As [`PARTS`], in milliseconds.
    parts: [Samples; 6],
    /// From the last character of the guest here to the first there.
    silent: Samples,
    /// The longest time between two characters before.
    silent_before: Samples,
    peak_mib: [Samples; 2],
}

/// The section.
pub fn run(bench: &Bench) -> Result<Findings, String> {
    let mut all: Vec<Figures> = WAYS.iter().map(|_| Figures::default()).collect();
    let mut skipped = Vec::new();
    let most = WAYS.iter().map(Way::huge_pages).max().unwrap_or(0);
    let huge_pages = HugePages::reserve(most);
    for _ in 0..bench.repetitions(10) {
        for (way, figures) in WAYS.iter().zip(&mut all) {
            if way.huge_pages() > 0 && huge_pages.is_none() {
                continue;
            }
            if let Err(reason) = measure(bench, way, figures) {
                skipped.push(format!("{} of {}: {reason}.", way.verb, way.backing));
            }
        }
    }
    if huge_pages.is_none() {
        skipped.push("Pages of 2 MiB are not measured: the host has none to give.".to_owned());
    }
    let mut findings = describe(&all);
    skipped.iter().for_each(|reason| findings.say(reason));
    Ok(findings)
}

/// One process of the VMM, ended when it is dropped.
struct Vmm {
    child: Child,
    stdin: ChildStdin,
    stderr: BufReader<ChildStderr>,
    /// When the guest has written something.
    written: mpsc::Receiver<Instant>,
}

impl Vmm {
    fn start(bench: &Bench, arguments: &[&str], way: &Way) -> Result<Vmm, String> {
        let program = bench.programs.join("vmm");
        let mut command = Command::new(&program);
        command.args(arguments).args(["--cpus", "1", "--backing", way.backing]);
        command.args(["--memory", &way.mib.to_string(), "--busy", &way.busy.to_string()]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|error| format!("{}: {error}", program.display()))?;
        let (mut stdout, (tell, written)) = (child.stdout.take().expect("piped"), mpsc::channel());
        thread::spawn(move || {
            let mut bytes = [0; 512];
            while let Ok(1..) = stdout.read(&mut bytes) {
                if tell.send(Instant::now()).is_err() {
                    break;
                }
            }
        });
        let (stdin, stderr) = (child.stdin.take().expect("piped"), child.stderr.take().expect("piped"));
        Ok(Vmm { child, stdin, stderr: BufReader::new(stderr), written })
    }

    /// The rest of the next line, which has to begin with `start`.
    fn line(&mut self, start: &str) -> Result<String, String> {
        let mut line = String::new();
        self.stderr.read_line(&mut line).map_err(|error| error.to_string())?;
        match line.strip_prefix(start) {
            Some(rest) => Ok(rest.trim().to_owned()),
            None => Err(format!("the VMM said `{}`", line.trim())),
        }
    }

    fn status(&self) -> String {
        format!("/proc/{}/status", self.child.id())
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        // Fails only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn measure(bench: &Bench, way: &Way, figures: &mut Figures) -> Result<(), String> {
    let directory = TempDir::new().map_err(|error| error.to_string())?;
    let uri = format!("unix:{}", directory.join("s").display());
    let mut there = Vmm::start(bench, &["receive", &uri], way)?;
    there.line("listening at ")?;
    let mut here = Vmm::start(bench, &["run"], way)?;
    here.line("running")?;
    // The first passes touch the memory.
    for _ in 0..3 {
        here.written.recv_timeout(LIMIT).map_err(|_| "the guest wrote nothing")?;
    }
    thread::sleep(Duration::from_secs(1));
    let begun = here.written.try_iter().last().ok_or("the guest wrote nothing for a second")?;
    thread::sleep(Duration::from_millis(500));
    let status = here.status();
    // The source ends when the guest has gone: what it had at most is looked at until then.
    let peak = thread::spawn(move || {
        let mut peak = 0.0;
        while let Some(mib) = peak_mib(&status) {
            peak = mib;
            thread::sleep(Duration::from_millis(5));
        }
        peak
    });
    writeln!(here.stdin, "{} {uri}", way.verb).map_err(|error| error.to_string())?;
    let report = here.line("moved to ")?;
    let parts = parts(&report)?;
    there.line("running")?;
    let first = there.written.recv_timeout(LIMIT).map_err(|_| "the guest wrote nothing afterwards")?;
    let before: Vec<Instant> = here.written.iter().collect();
    let last = *before.last().ok_or("the guest wrote nothing before")?;
    let pauses = std::iter::once(begun).chain(before.iter().copied()).zip(before.iter().copied());
    let longest = pauses.map(|(one, next)| next - one).max().unwrap_or_default();
    for (samples, ms) in figures.parts.iter_mut().zip(parts) {
        samples.push(ms);
    }
    figures.silent.push((first - last).as_secs_f64() * 1e3);
    figures.silent_before.push(longest.as_secs_f64() * 1e3);
    let there_mib = peak_mib(&there.status()).ok_or("the destination has ended")?;
    let here_mib = peak.join().map_err(|_| "a thread panicked")?;
    figures.peak_mib.iter_mut().zip([here_mib, there_mib]).for_each(|(samples, mib)| samples.push(mib));
    eprintln!("{} {} MiB of {}: {report}", way.verb, way.mib, way.backing);
    Ok(())
}

/// The most memory that a process had at any time; `None` when it has ended. Pages of 2 MiB are none of it, so they are added as they are now.
fn peak_mib(status: &str) -> Option<f64> {
    let text = fs::read_to_string(status).ok()?;
    let kib = |name| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse::<f64>().ok()
    };
    Some((kib("VmHWM:")? + kib("HugetlbPages:").unwrap_or(0.0)) / 1024.0)
}

/// The milliseconds in what the VMM says: `URI: TOTAL ms of downtime (pause 1.00, drain …)`.
fn parts(report: &str) -> Result<[f64; 6], String> {
    let found = || {
        let (before, rest) = report.split_once(" ms of downtime (")?;
        let total = before.rsplit(' ').next()?.parse().ok()?;
        let part = |name: &str| {
            let words = rest.trim_end_matches(')').split(", ");
            words.filter_map(|words| words.split_once(' ')).find(|(known, _)| *known == name)?.1.parse().ok()
        };
        let mut parts = [total; 6];
        for (value, name) in parts.iter_mut().zip(PARTS).skip(1) {
            *value = part(name)?;
        }
        Some(parts)
    };
    found().ok_or_else(|| format!("the VMM said `{report}`"))
}

fn describe(all: &[Figures]) -> Findings {
    let mut findings = Findings::default();
    findings.say(
        "The VMM of `examples/vmm` moves its guest to another process on this host, over a unix socket: one vCPU, memory of \
         `vm-memory`, a display of 8 MiB whose state goes while the guest runs. The guest verifies and rewrites the part of its memory that \
         is in use, over and over; the rest was never touched. Downtime is the source's, with its parts, medians. Silent is the time from the last \
         character that the guest writes at the source to the first at the destination, and beside it the longest between two \
         characters before. Peak is the most memory that a process had; memory that was handed over counts at both.",
    );
    let (mut rows, mut raw) = (Vec::new(), Vec::new());
    for (way, figures) in WAYS.iter().zip(all) {
        let verb = if way.verb == HAND_OVER { "handed over" } else { "copied" };
        let size = if way.mib >= 1024 { format!("{} GiB", way.mib / 1024) } else { format!("{} MiB", way.mib) };
        let parts: Vec<String> = figures.parts[1..].iter().map(|part| format!("{:.2}", part.median())).collect();
        let [source, destination] = &figures.peak_mib;
        rows.push(vec![
            format!("{verb}: {size}, {}, {} MiB in use", way.backing, way.busy),
            figures.parts[0].show(2),
            parts.join(" / "),
            format!("{} / {}", figures.silent.show(1), figures.silent_before.show(1)),
            format!("{:.0} / {:.0}", source.median(), destination.median()),
        ]);
        raw.push(json!({
            "verb": way.verb, "backing": way.backing, "mib": way.mib, "busy-mib": way.busy,
            "parts-ms": PARTS.iter().zip(&figures.parts).map(|(name, part)| json!({ *name: part.json() })).collect::<Vec<_>>(),
            "silent-ms": figures.silent.json(), "silent-before-ms": figures.silent_before.json(),
            "peak-mib": [source.json(), destination.json()],
        }));
    }
    findings.table(
        &[
            "",
            "downtime ms",
            "pause / drain / last round / devices / confirm",
            "silent ms, in it / before",
            "peak MiB, source / destination",
        ],
        &rows,
    );
    findings.raw = Value::Array(raw);
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_vmm_says_is_read_and_nothing_else_is() {
        let report = "unix:/tmp/a b/s: 4.50 ms of downtime (pause 0.57, drain 0.00, last-round 0.13, devices 0.40, confirm 3.40)";
        assert_eq!(parts(report).unwrap(), [4.5, 0.57, 0.0, 0.13, 0.4, 3.4]);
        assert!(parts("unix:/s: 4.50 ms of downtime (pause 0.57)").is_err());
        assert!(parts("").is_err());
    }
}
