//! How soon a guest is back at its speed that runs before its memory is there, with a list of pages to send first and without.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};
use std::{env, fs};

use qemu_peer::{Qemu, Status};
use serde_json::{Value, json};

use super::mover::number;
use super::pace::{Pace, written_once};
use super::qemu::{self, system_ms};
use super::samples::Samples;
use super::throughput::{content, random};
use super::wire::{self, Wire};
use super::{Bench, Findings};

/// The hidden first argument of the process inside the namespace.
pub const INSIDE: &str = "inside-resumed";

/// In the order in which they take turns: the second writes the list that the others use.
const VARIANTS: &[(&str, &[&str])] = &[
    ("without `--postcopy`", &[]),
    ("`--postcopy`", &["--postcopy", "--clone", "--record-faults=LIST"]),
    ("`--prefetch`, before it runs", &["--postcopy", "--clone", "--prefetch=LIST", "--prefetch-when=before-run"]),
    ("`--prefetch`, after it runs", &["--postcopy", "--clone", "--prefetch=LIST", "--prefetch-when=after-run"]),
];

/// The figures of one variant, in milliseconds from the start of `send` but for the last two.
#[derive(Default)]
struct Figures {
    runs: Samples,
    at_speed: Samples,
    all_there: Samples,
    requests: Samples,
    prefetched: Samples,
}

/// The section: runs itself in a new network namespace, which ends with it.
pub fn run(bench: &Bench) -> Result<Findings, String> {
    let program = env::current_exe().map_err(|error| error.to_string())?;
    let mut command = Command::new("unshare");
    command.args(["--net", "--"]).arg(&program).args(["bench", INSIDE]).args(bench.quick.then_some("--quick"));
    command.args(bench.once.then_some("--once")).stdin(Stdio::null()).stderr(Stdio::inherit());
    let output = command.output().map_err(|error| format!("unshare: {error}"))?;
    let report: Value = serde_json::from_slice(&output.stdout)
        .map_err(|_| "the process in its namespace gave no report; its reason is above".to_owned())?;
    let mut findings = Findings::default();
    findings.say(&format!(
        "A checkpoint of {MIB} MiB, full of content, is sent to a QEMU 10.0 (TCG) over a wire with a round trip of {} ms, at {} MB/s. Its guest goes through {REWRITTEN} MiB of it again \
         and again, {:.0} ms a pass, and says on its serial line when one is over. Milliseconds from the start of `send`: until QEMU runs the guest, until the first of three passes in \
         a row begins that are at 90 % of the speed which it has when all is there, and until the sender has ended. Without `--postcopy` all memory comes first. The list is what `--record-faults` wrote in the run \
         before. Median with least and most; variants took turns.",
        ROUND_TRIP.as_millis(),
        RATE / 1_000_000,
        number(&report, "pass-ms")
    ));
    let mut rows = Vec::new();
    for (name, _) in VARIANTS {
        let samples = |figure: &str| {
            let mut samples = Samples::default();
            let all = report["variants"][name][figure].as_array().map(Vec::as_slice).unwrap_or_default();
            all.iter().filter_map(Value::as_f64).for_each(|value| samples.push(value));
            samples.show(0)
        };
        let mut row = vec![(*name).to_owned()];
        row.extend(["runs-ms", "at-speed-ms", "all-there-ms", "requests", "prefetched-pages"].map(samples));
        rows.push(row);
    }
    let head = ["", "runs", "back at 90 % of its speed", "all there", "pages asked for", "pages sent first"];
    findings.table(&head, &rows);
    findings.raw = report;
    Ok(findings)
}

/// What runs inside the namespace; prints a JSON object.
pub fn inside(bench: &Bench) -> Result<(), String> {
    Wire { round_trip: ROUND_TRIP, rate: 1e9 }.lay()?;
    let content = content(bench, "random", random)?;
    let bytes = f64::from(REWRITTEN) * 1048576.0;
    let guest = Pace::measure(bench)?.guest(REWRITTEN, bytes / PASS.as_secs_f64());
    let mut source = qemu::Source::filled(&bench.qemu, MIB, &content, Some(guest), "tcg")?;
    written_once(&mut source)?;
    let file = bench.directory.join("resumed");
    checkpoint(bench, &mut source, &file)?;
    let list = bench.directory.join("resumed-list");
    let mut figures: Vec<Figures> = VARIANTS.iter().map(|_| Figures::default()).collect();
    let mut passes = Samples::default();
    for _ in 0..bench.repetitions(5) {
        for ((name, options), figures) in VARIANTS.iter().zip(&mut figures) {
            let options: Vec<String> =
                options.iter().map(|option| option.replace("LIST", &list.display().to_string())).collect();
            let resumed = resume(bench, &source, &file, &options).map_err(|error| format!("{name}: {error}"))?;
            eprintln!("{name}: {resumed:?}");
            figures.runs.push(resumed.runs);
            figures.at_speed.push(resumed.at_speed);
            figures.all_there.push(resumed.all_there);
            figures.requests.push(resumed.requests);
            figures.prefetched.push(resumed.prefetched);
            passes.push(resumed.pass);
        }
    }
    let _ = (fs::remove_file(&file), fs::remove_file(&list));
    let variants: serde_json::Map<String, Value> = VARIANTS
        .iter()
        .zip(&figures)
        .map(|((name, _), figures)| {
            let value = json!({
                "runs-ms": figures.runs.json(), "at-speed-ms": figures.at_speed.json(),
                "all-there-ms": figures.all_there.json(), "requests": figures.requests.json(),
                "prefetched-pages": figures.prefetched.json(),
            });
            ((*name).to_owned(), value)
        })
        .collect();
    println!("{}", json!({ "pass-ms": passes.median(), "variants": variants }));
    Ok(())
}

/// Has the running guest of `source` leave for a checkpoint.
fn checkpoint(bench: &Bench, source: &mut qemu::Source, file: &Path) -> Result<(), String> {
    // Of the run before.
    let _ = fs::remove_file(file);
    let socket = bench.directory.join("resumed-socket");
    let _ = fs::remove_file(&socket);
    let uri = format!("unix:{}", socket.display());
    let mut command = Command::new(bench.programs.join("multifd"));
    command.args(["receive", &uri, "--progress=never", "--quiet", "--output"]).arg(file);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let mut receiver = Ended(command.spawn().map_err(|error| format!("multifd: {error}"))?);
    let deadline = Instant::now() + LIMIT;
    while !socket.exists() {
        if Instant::now() > deadline {
            return Err("multifd receive does not listen".to_owned());
        }
        thread::sleep(Duration::from_millis(5));
    }
    let migrate = |qemu: &mut Qemu| -> Result<(), Box<dyn std::error::Error>> {
        qemu.qmp().set_capabilities(&[("return-path", true)])?;
        qemu.qmp().set_multifd(4, "none")?;
        qemu.qmp().set_parameters(&[("max-bandwidth", json!(100u64 << 30))])?;
        qemu.qmp().migrate(&uri)?;
        qemu.qmp().wait_migration(&[Status::Completed], LIMIT)?;
        Ok(())
    };
    migrate(source.qemu()).map_err(|error| error.to_string())?;
    let status = receiver.0.wait().map_err(|error| format!("multifd: {error}"))?;
    if status.success() { Ok(()) } else { Err(format!("multifd receive ended with {status}")) }
}

/// One start from the checkpoint, in milliseconds from the start of `send`.
#[derive(Debug)]
struct Resumed {
    runs: f64,
    at_speed: f64,
    all_there: f64,
    requests: f64,
    prefetched: f64,
    /// How long a pass takes when all is there.
    pass: f64,
}

fn resume(bench: &Bench, source: &qemu::Source, file: &Path, options: &[String]) -> Result<Resumed, String> {
    let postcopy = options.iter().any(|option| option == "--postcopy");
    let mut destination = source.incoming()?;
    let uri = format!("tcp:{}:{}", wire::FAR, qemu::free_port()?);
    let prepare = |qemu: &mut Qemu| -> Result<(), Box<dyn std::error::Error>> {
        qemu.qmp().set_capabilities(&[("postcopy-ram", postcopy), ("return-path", true), ("events", true)])?;
        if !postcopy {
            qemu.qmp().set_multifd(4, "none")?;
        }
        qemu.qmp().migrate_incoming(&uri)?;
        Ok(())
    };
    prepare(destination.qemu()).map_err(|error| error.to_string())?;
    let mut command = Command::new(bench.programs.join("multifd"));
    command.args(["send"]).arg(file).args([&uri, "--json", "--progress=never", &format!("--max-bandwidth={RATE}B/s")]);
    command.args(options).args((!postcopy).then_some("--channels=4"));
    command.stdout(Stdio::piped());
    let begun = system_ms();
    let mut sender = Ended(command.spawn().map_err(|error| format!("multifd: {error}"))?);
    let mut ends = Vec::new();
    let (mut all_there, deadline) = (None, Instant::now() + LIMIT);
    // What the passes are compared with are those after the end.
    let mut passes_at_end = 0;
    while all_there.is_none() || ends.len() < passes_at_end + COMPARED + 1 {
        if Instant::now() > deadline {
            return Err(format!("{} passes after {LIMIT:?}", ends.len()));
        }
        let said = destination.qemu().serial().map_err(|error| error.to_string())?;
        let now = system_ms() - begun;
        ends.resize(said.len().max(ends.len()), now);
        if all_there.is_none() && sender.0.try_wait().map_err(|error| format!("multifd: {error}"))?.is_some() {
            (all_there, passes_at_end) = (Some(now), ends.len());
        }
        thread::sleep(Duration::from_millis(1));
    }
    let output = destination.qemu().output()?;
    if output.is_corrupted() {
        return Err(format!("the guest found its memory wrong: {output:?}"));
    }
    let report = std::io::read_to_string(sender.0.stdout.take().expect("piped")).map_err(|error| error.to_string())?;
    let status = sender.0.wait().map_err(|error| format!("multifd: {error}"))?;
    if !status.success() {
        return Err(format!("multifd send ended with {status}: {report}"));
    }
    let report: Value = serde_json::from_str(&report).map_err(|error| format!("multifd send: {error}"))?;
    let mut runs = None;
    while runs.is_none() {
        let event = destination.qemu().qmp().next_event(Duration::from_secs(5)).map_err(|error| error.to_string())?;
        let part = |name: &str| event.timestamp[name].as_f64().unwrap_or(f64::NAN);
        runs = (event.name == "RESUME").then(|| part("seconds") * 1e3 + part("microseconds") / 1e3 - begun);
    }
    let (at_speed, pass) =
        back_at_speed(&ends, passes_at_end).ok_or_else(|| format!("never at its speed: {ends:?}"))?;
    Ok(Resumed {
        runs: runs.expect("found"),
        at_speed: at_speed.max(runs.expect("found")),
        all_there: all_there.expect("the loop ended"),
        requests: number(&report["postcopy"], "requests"),
        prefetched: number(&report["postcopy"], "prefetched-pages"),
        pass,
    })
}

/// When the first of three passes begins that are at 90 % of the speed, and how long a pass takes at full speed; of the ends of
/// all passes, of which those from number `settled` on are at full speed.
fn back_at_speed(ends: &[f64], settled: usize) -> Option<(f64, f64)> {
    let lengths = |ends: &[f64]| -> Vec<f64> { ends.windows(2).map(|pair| pair[1] - pair[0]).collect() };
    let mut full = Samples::default();
    lengths(ends.get(settled..)?).into_iter().for_each(|length| full.push(length));
    let pass = full.median();
    let good = lengths(ends).windows(3).position(|three| three.iter().all(|length| *length <= pass / 0.9))?;
    Some((ends[good], pass))
}

/// A process that is ended when this is dropped.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        // Fails only if it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

const MIB: u32 = 256;
const REWRITTEN: u32 = 8;
const PASS: Duration = Duration::from_millis(40);
const ROUND_TRIP: Duration = Duration::from_millis(4);
/// Bytes per second.
const RATE: u64 = 40_000_000;
/// Passes at full speed that are compared with.
const COMPARED: usize = 10;
const LIMIT: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_passes_in_a_row_are_needed() {
        // One good pass alone, from 300; three from 800 on.
        let ends = [100.0, 300.0, 340.0, 500.0, 800.0, 840.0, 881.0, 920.0, 960.0, 1000.0, 1040.0];
        assert_eq!(back_at_speed(&ends, 7), Some((800.0, 40.0)));
        assert_eq!(back_at_speed(&[0.0, 40.0, 500.0, 540.0, 1000.0, 1040.0, 1080.0], 4), None);
        assert_eq!(back_at_speed(&ends, 20), None);
    }
}
