//! A guest moves from process to process while processes are killed and stopped at random moments.
//!
//! The process that has the guest afterwards has it whole: it goes on with its passes, finds nothing wrong, and in the end
//! every page is what it has to be. A destination that is killed before it was allowed to start the guest leaves it running at
//! the source. One that is killed later leaves it there paused, in doubt, until the operator says that it runs nowhere else. A
//! destination whose source is killed runs the guest only if it was allowed to; a process that is stopped for a while
//! delays the migration and nothing else.
//!
//! `MULTIFD_KILLS` sets how many moments are tried, `MULTIFD_SEED` repeats a run.

use std::{
    env,
    io::{BufRead, BufReader, Read},
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant, SystemTime},
};

use fastrand::Rng;
use multifd_qmp::{Client, Error};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use test_support::{TempDir, report, time_limit};

/// One `multifd guest`.
struct Process {
    child: Child,
    monitor: PathBuf,
    uri: String,
}

impl Process {
    /// Starts a guest, or a process that waits for one.
    fn start(directory: &TempDir, number: usize, incoming: bool) -> Process {
        let monitor = directory.join(format!("c{number}"));
        let uri = format!("unix:{}", directory.join(format!("d{number}")).display());
        let mut command = Command::new(env!("CARGO_BIN_EXE_multifd"));
        command.args(["guest", "--guest=process", "--dirty-log=bitmap", "--memory=24MiB", "--working-set=4MiB"]);
        command.args(["--write-rate=40MB/s", "--channels=2", "--json", "--progress=never", "-q"]);
        command.arg(format!("--qmp=unix:{}", monitor.display()));
        if incoming {
            command.arg(format!("--incoming={uri}"));
        }
        let stderr = if incoming { Stdio::piped() } else { Stdio::null() };
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(stderr).spawn().unwrap();
        if let Some(stderr) = child.stderr.take() {
            let mut line = String::new();
            BufReader::new(stderr).read_line(&mut line).unwrap();
            assert!(line.starts_with("listening on "), "{line:?}");
        }
        let mut process = Process { child, monitor, uri };
        process.until(|status| status.is_some());
        process
    }

    /// Asks; `None` from a process that has ended, or whose end is near.
    fn ask(&self, command: &str, arguments: Value) -> Option<Value> {
        let client = Client::builder().limit(LIMIT).connect(&self.monitor);
        match client.and_then(|mut client| client.execute(command, arguments)) {
            Ok(answer) => Some(json!({ "return": answer })),
            Err(Error::Refused { description, .. }) => Some(json!({ "error": description })),
            Err(_) => None,
        }
    }

    /// Begins to migrate the guest, which is here, to `there`.
    fn migrate(&mut self, there: &Process) {
        // No answer: the guest has left, and the process with it, before the answer could be written.
        if let Some(answer) = self.ask("migrate", json!({ "uri": there.uri })) {
            assert!(answer["return"].is_object(), "{answer}");
        }
    }

    /// Its status; nothing from a process that has ended, or is about to.
    fn status(&self) -> Option<Value> {
        Some(self.ask("x-guest-status", json!({}))?["return"].take()).filter(Value::is_object)
    }

    /// Its status once `enough` says so; `None` if it has ended.
    fn until(&mut self, enough: impl Fn(Option<&Value>) -> bool) -> Option<Value> {
        let begin = Instant::now();
        loop {
            let ended = self.child.try_wait().unwrap().is_some();
            let status = self.status();
            if ended || enough(status.as_ref()) {
                return if ended { None } else { status };
            }
            assert!(begin.elapsed() < LIMIT, "still {status:?}");
            std::thread::sleep(Duration::from_millis(3));
        }
    }

    /// Waits until no migration is under way. Returns what became of the guest here.
    fn settles(&mut self) -> Settled {
        let over = |status: &Value| status["state"] == "running" || status["state"] == "paused";
        match self.until(|status| status.is_some_and(over)) {
            None => Settled::Ended,
            Some(status) if status["state"] == "running" => {
                assert!(status.get("in-doubt").is_none(), "{status}");
                Settled::Runs
            }
            Some(status) => {
                assert_eq!(status["in-doubt"], true, "{status}");
                Settled::InDoubt
            }
        }
    }

    /// Says that the guest, which is paused in doubt here, runs nowhere else.
    fn resume(&mut self) {
        let answer = self.ask("x-guest-resume", json!({})).expect("it waits for this");
        assert_eq!(answer, json!({ "return": {} }));
        assert!(self.until(|status| status.is_some_and(|status| status["state"] == "running")).is_some());
    }

    /// As [`settles`](Self::settles) for one whose source is dead; `None` if it waits for a source as before, because the dead
    /// one had not reached it.
    fn settles_alone(&mut self, idle_files: usize) -> Option<bool> {
        let (begin, id) = (Instant::now(), self.child.id());
        let unreached = || begin.elapsed() > Duration::from_secs(1) && open_files(id) <= idle_files;
        let status = self.until(|status| status.is_some_and(|status| status["state"] == "running" || unreached()));
        match status {
            Some(status) if status["state"] == "incoming" => None,
            status => Some(status.is_some()),
        }
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).unwrap()).unwrap();
        // It may have ended; it was not waited for, so the id is still its own.
        let _ = kill_process(pid, signal);
    }

    fn kill(&mut self) {
        self.signal(Signal::KILL);
        self.child.wait().unwrap();
    }

    /// Asserts that the guest makes progress and finds nothing wrong.
    fn check(&mut self) {
        let passes = |status: &Value| status["passes"].as_u64().unwrap();
        let written = |status: &Value| status["pages-written"].as_u64().unwrap();
        let before = self.status().expect("it runs");
        assert_eq!(before["guest-errors"], 0, "{before}");
        let after = self.until(|status| status.is_some_and(|status| written(status) > written(&before)));
        let after = after.expect("it runs on");
        assert!(passes(&after) >= passes(&before));
        assert_eq!(after["guest-errors"], 0, "{after}");
    }

    /// Ends the guest and asserts that all its memory is right.
    fn finish(mut self) {
        self.ask("x-guest-finish", json!({ "passes": 2, "within": 20.0 })).expect("it runs");
        let mut text = String::new();
        self.child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
        self.child.wait().unwrap();
        let report: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(report["guest-errors"], 0, "{report}");
        assert_eq!(report["pages-wrong"], 0, "{report}");
        assert!(report["pages-checked"].as_u64().unwrap() >= 6144, "{report}");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// What became of the guest of one process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Settled {
    /// It runs here.
    Runs,
    /// It is paused here, and may run at the other side.
    InDoubt,
    /// The process has ended.
    Ended,
}

/// What happened how often.
#[derive(Debug, Default)]
struct Counts {
    kills: usize,
    stops: usize,
    /// The guest ran on at the source after its destination was killed.
    stayed: usize,
    /// The guest was paused in doubt at the source after its destination was killed, and ran on when it was told to.
    in_doubt: usize,
    /// The destination was killed when it had the guest already.
    killed_with_guest: usize,
    /// The source was killed when the guest had moved already.
    outlived: usize,
    /// The source was killed, guest and all, and the destination ended with an error.
    ended: usize,
    /// The source was killed before it had connected, and the destination waits for another.
    unreached: usize,
    /// A migration was complete in spite of a stopped process.
    moved: usize,
}

#[test]
fn a_guest_survives_kills_and_stops_at_random_moments() {
    let wanted = env::var("MULTIFD_KILLS").ok().map_or(300, |text| text.parse().expect("a number"));
    let seed = env::var("MULTIFD_SEED").ok().map_or_else(clock_seed, |text| text.parse().expect("a number"));
    println!("seed {seed}");
    let limit = if env::var_os("MULTIFD_KILLS").is_some() { Duration::from_secs(3600) } else { ENOUGH };
    time_limit(limit * 2 + LIMIT, || run(wanted, seed, limit));
}

fn run(wanted: usize, seed: u64, limit: Duration) {
    let directory = TempDir::new().unwrap();
    let mut random = Rng::with_seed(seed);
    let mut counts = Counts::default();
    let mut number = 0;
    let mut start = |incoming| {
        number += 1;
        Process::start(&directory, number, incoming)
    };
    let mut here = start(false);
    // How long a migration takes undisturbed: random moments are spread over most of that, as the rest is waiting.
    let mut there = start(true);
    let begin = Instant::now();
    here.migrate(&there);
    assert_eq!(there.settles(), Settled::Runs, "the guest moves when nothing is in its way");
    let usual = begin.elapsed() + Duration::from_millis(5);
    assert_eq!(here.settles(), Settled::Ended);
    here = there;

    let begin = Instant::now();
    while counts.kills + counts.stops < wanted && begin.elapsed() < limit {
        let mut there = start(true);
        let idle_files = open_files(there.child.id());
        here.migrate(&there);
        std::thread::sleep(usual.mul_f64(random.f64() * 0.8));
        match random.u8(..4) {
            kind @ (0 | 1) => {
                if kind == 1 {
                    there.signal(Signal::STOP);
                    std::thread::sleep(Duration::from_millis(random.u64(..30)));
                }
                there.kill();
                counts.kills += 1;
                match here.settles() {
                    Settled::Runs => {
                        here.check();
                        counts.stayed += 1;
                    }
                    Settled::InDoubt => {
                        // It is known to run nowhere else: that process is dead.
                        here.resume();
                        here.check();
                        counts.in_doubt += 1;
                    }
                    Settled::Ended => {
                        assert_eq!(here.child.wait().unwrap().code(), Some(0), "the guest has left");
                        counts.killed_with_guest += 1;
                        here = start(false);
                    }
                }
            }
            2 => {
                here.kill();
                counts.kills += 1;
                match there.settles_alone(idle_files) {
                    Some(true) => {
                        there.check();
                        counts.outlived += 1;
                        here = there;
                    }
                    Some(false) => {
                        let code = there.child.wait().unwrap().code();
                        assert!(matches!(code, Some(1 | 4)), "the destination ended with {code:?}");
                        counts.ended += 1;
                        here = start(false);
                    }
                    None => {
                        counts.unreached += 1;
                        here = start(false);
                    }
                }
            }
            _ => {
                let stopped = if random.bool() { &here } else { &there };
                stopped.signal(Signal::STOP);
                std::thread::sleep(Duration::from_millis(random.u64(..60)));
                stopped.signal(Signal::CONT);
                counts.stops += 1;
                assert_eq!(there.settles(), Settled::Runs, "a pause is no failure");
                assert_eq!(here.settles(), Settled::Ended);
                there.check();
                counts.moved += 1;
                here = there;
            }
        }
    }
    // Whatever it went through, it can still be moved, and nothing is missing.
    let mut there = start(true);
    here.migrate(&there);
    assert_eq!(there.settles(), Settled::Runs);
    there.finish();

    let Counts { kills, stops, stayed, in_doubt, killed_with_guest, outlived, ended, unreached, moved } = counts;
    report(
        "faults",
        &format!(
            "processes: faults injected {} ({kills} SIGKILL, {stops} SIGSTOP with SIGCONT, seed {seed}), guests lost 0; destination \
             killed, guest ran on at the source {stayed}, was paused there in doubt and resumed {in_doubt}; killed with the guest it had confirmed {killed_with_guest}; source killed, \
             destination had the guest {outlived}, destination ended with an error {ended}, waits for another source {unreached}; moved in spite of a stop {moved}",
            kills + stops
        ),
    );
    assert!(kills + stops >= 20, "only {} in {limit:?}", kills + stops);
    assert!(stayed > 0 && ended > 0 && moved > 0, "the moments are too much alike");
}

/// How many descriptors the process `id` has.
fn open_files(id: u32) -> usize {
    std::fs::read_dir(format!("/proc/{id}/fd")).map_or(0, Iterator::count)
}

fn clock_seed() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    now.as_nanos() as u64
}

/// For anything that a loaded machine may take its time for. A source whose destination is killed before it has connected tries
/// for 30 s to reach it.
const LIMIT: Duration = Duration::from_secs(60);
/// For all moments together, unless more are asked for.
const ENOUGH: Duration = Duration::from_secs(75);
