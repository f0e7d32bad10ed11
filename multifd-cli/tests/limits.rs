//! A guest moves from process to process while one of the two runs into a limit: threads, descriptors, memory, room on disk.
//!
//! Whatever could not be had, afterwards the guest runs on exactly one side, or it is paused at the source, in doubt, and the
//! source says so. What the limit kept from moving moves when the limit is lifted.
//!
//! `MULTIFD_LIMITS` sets how many migrations are tried, `MULTIFD_SEED` repeats a run. Needs root, since the limit on threads
//! counts those of a user, and binds every user but root.

mod common;

use std::{
    env, fs,
    io::{BufRead, BufReader},
    os::unix::fs::PermissionsExt,
    path::PathBuf,
    process::{Command, Stdio},
    time::{Duration, Instant, SystemTime},
};

use common::{
    Guest, LIMIT,
    client::Client,
    exit_code,
    user::{User, address_space},
};
use fastrand::Rng;
use serde_json::{Value, json};
use test_support::{TempDir, report, time_limit};

const SAME: &str = "--guest process --dirty-log bitmap --memory 24MiB --working-set 4MiB --write-rate 40MB/s --channels 3 --stall-timeout 3s -q";

/// What there is too little of.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Threads,
    Descriptors,
    AddressSpace,
    /// Of a checkpoint: only for a destination.
    File,
}

/// A process with a guest, or one that waits for a guest.
struct Process {
    guest: Guest,
    user: User,
    client: Client,
    uri: String,
}

impl Process {
    fn start(dir: &TempDir, number: usize, incoming: bool) -> Option<Process> {
        let user = User::new(dir)?;
        let name = format!("p{number}");
        let socket = dir.join(format!("{name}.socket"));
        let uri = format!("unix:{}", socket.display());
        let waits = if incoming { format!("--incoming {uri} ") } else { String::new() };
        let guest = Guest::start_by(user.guest(), dir.path(), &name, &format!("{waits}{SAME}"));
        if incoming {
            assert_eq!(guest.listening(), uri);
            // The source is another user's.
            fs::set_permissions(socket, fs::Permissions::from_mode(0o777)).unwrap();
        }
        let mut client = Client::new(&dir.join(&name));
        client.status();
        Some(Process { guest, user, client, uri })
    }

    /// Its status; nothing from a process that has ended, or is about to.
    fn status(&mut self) -> Option<Value> {
        let status = self.client.try_ask("x-guest-status", json!({}))?["return"].take();
        if status["state"] == "migrated" {
            // It stays for its client.
            self.client.try_ask("quit", json!({}));
            return None;
        }
        Some(status).filter(Value::is_object)
    }

    /// Its status once `over` says so; `None` if it has ended.
    fn until(&mut self, over: impl Fn(&Value) -> bool) -> Option<Value> {
        let begin = Instant::now();
        loop {
            let status = self.status()?;
            if over(&status) {
                return Some(status);
            }
            assert!(begin.elapsed() < LIMIT, "still {status}: {}", self.guest.stderr());
            std::thread::sleep(Duration::from_millis(3));
        }
    }

    /// Gives this process `more` of what `kind` is than it has.
    fn squeeze(&self, kind: Kind, more: usize) {
        let pid = self.guest.pid();
        match kind {
            Kind::Threads => self.user.allow(pid, more),
            Kind::Descriptors => {
                let used = fs::read_dir(format!("/proc/{}/fd", pid.as_raw_nonzero())).unwrap().count();
                self.user.limit(pid, &format!("--nofile={}:", used + more));
            }
            Kind::AddressSpace => self.user.limit(pid, &format!("--as={}:", address_space(pid) + (more << 20))),
            Kind::File => unreachable!("a guest writes no file"),
        }
    }

    /// As before.
    fn release(&self) {
        let pid = self.guest.pid();
        self.user.limit(pid, "--nproc=1000:");
        self.user.limit(pid, "--nofile=1000:");
        self.user.limit(pid, "--as=unlimited:");
    }
}

/// What became of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Owner {
    Source,
    Destination,
    /// Paused at the source, in doubt, with a destination that does not run it.
    InDoubt,
}

#[test]
fn a_guest_survives_limits_on_either_side() {
    let wanted = env::var("MULTIFD_LIMITS").ok().map(|text| text.parse().expect("a number"));
    let seed = env::var("MULTIFD_SEED").ok().map_or_else(clock_seed, |text| text.parse().expect("a number"));
    println!("seed {seed}");
    let limit = wanted.map_or(LIMIT, |wanted: u32| Duration::from_secs(60) + LIMIT * (wanted / 20).max(1));
    time_limit(limit, || run(wanted.unwrap_or(24), &mut Rng::with_seed(seed), seed));
}

fn run(wanted: u32, random: &mut Rng, seed: u64) {
    let dir = TempDir::new().unwrap();
    let mut number = 0;
    let mut start = |incoming| {
        number += 1;
        Process::start(&dir, number, incoming)
    };
    let Some(mut here) = start(false) else { return };
    let mut owners = [0; 3];
    for round in 0..wanted {
        let kind = [Kind::Threads, Kind::Descriptors, Kind::AddressSpace, Kind::File][random.usize(..4)];
        let context = format!("{round}, seed {seed}: {kind:?}");
        if matches!(kind, Kind::File) {
            save(&dir, &mut here, random, &context);
            owners[Owner::Source as usize] += 1;
            continue;
        }
        let Some(mut there) = start(true) else { return };
        let more = random.usize(..12);
        let squeezed = if random.bool() { &here } else { &there };
        squeezed.squeeze(kind, more);
        let owner = migrate(&mut here, &mut there, &format!("{context}, {more} more"));
        owners[owner as usize] += 1;
        if owner == Owner::Destination {
            here = there;
        }
    }
    let Some(mut there) = start(true) else { return };
    assert_eq!(migrate(&mut here, &mut there, "without limits"), Owner::Destination);
    there.client.try_ask("x-guest-finish", json!({ "passes": 2, "within": 20.0 }));
    let (exit, last) = there.guest.end();
    assert_eq!((&last["guest-errors"], &last["pages-wrong"]), (&json!(0), &json!(0)), "{exit}: {last}");
    let [source, destination, in_doubt] = owners;
    report(
        "faults",
        &format!(
            "limits: {wanted} migrations (seed {seed}), guests lost 0, doubled 0; still at the source {source}, at the \
             destination {destination}, in doubt and resumed by word {in_doubt}"
        ),
    );
}

/// Tries to move the guest, and finds it. The limits are lifted afterwards.
fn migrate(here: &mut Process, there: &mut Process, context: &str) -> Owner {
    // No answer: the guest has left, and the process with it, before the answer could be written.
    if let Some(answer) = here.client.try_ask("migrate", json!({ "uri": there.uri })) {
        assert!(answer["return"].is_object(), "{context}: {answer}");
    }
    let at_source = here.until(|status| status["state"] != "outgoing");
    let begin = Instant::now();
    let at_destination = there.until(|status| {
        let left_alone =
            at_source.is_none() && status["state"] == "incoming" && begin.elapsed() > Duration::from_secs(10);
        assert!(!left_alone, "{context}: the source has ended: {}", here.guest.stderr());
        at_source.is_some() || status["state"] == "running"
    });
    let runs_there = at_destination.as_ref().is_some_and(|status| status["state"] == "running");
    match &at_source {
        None => {
            assert!(runs_there, "{context}: neither has it; {}, {}", here.guest.stderr(), there.guest.stderr());
            there.release();
            there.client.runs_on();
            Owner::Destination
        }
        Some(status) if status["state"] == "running" => {
            assert!(!runs_there, "{context}: both run; {status}");
            assert_eq!(status["status"], "failed", "{context}: {status}");
            here.release();
            here.client.runs_on();
            Owner::Source
        }
        Some(status) => {
            assert_eq!(
                (&status["state"], &status["in-doubt"]),
                (&json!("paused"), &json!(true)),
                "{context}: {status}"
            );
            if runs_there {
                there.release();
                there.client.runs_on();
                return Owner::Destination;
            }
            here.release();
            assert_eq!(here.client.ask("x-guest-resume", json!({})), json!({ "return": {} }), "{context}");
            here.client.runs_on();
            Owner::InDoubt
        }
    }
}

/// Tries to save the guest in a file for which there is too little room. The guest runs on, and no file is left.
fn save(dir: &TempDir, here: &mut Process, random: &mut Rng, context: &str) {
    let (socket, file) = (dir.join("receive.socket"), dir.join("checkpoint"));
    let uri = format!("unix:{}", socket.display());
    let mut receive = Command::new("prlimit");
    // The working set alone takes more than this.
    receive.arg(format!("--fsize={}", random.usize(1..4 << 20))).arg(env!("CARGO_BIN_EXE_multifd"));
    receive.args(["receive", &uri, "--json", "--progress=never", "-o"]).arg(&file);
    let mut receive = receive.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(receive.stderr.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, format!("listening on {uri}\n"), "{context}");
    fs::set_permissions(&socket, fs::Permissions::from_mode(0o777)).unwrap();
    if let Some(answer) = here.client.try_ask("migrate", json!({ "uri": uri })) {
        assert!(answer["return"].is_object(), "{context}: {answer}");
    }
    let status = here.until(|status| status["state"] != "outgoing").unwrap_or_else(|| panic!("{context}: lost"));
    assert_eq!((&status["state"], &status["status"]), (&json!("running"), &json!("failed")), "{context}: {status}");
    here.client.runs_on();
    let output = receive.wait_with_output().unwrap();
    assert_eq!(exit_code(&output), 1, "{context}: {}", String::from_utf8_lossy(&output.stdout));
    let left: Vec<PathBuf> = fs::read_dir(dir.path()).unwrap().flatten().map(|entry| entry.path()).collect();
    assert!(!left.contains(&file), "{context}: {left:?}");
}

fn clock_seed() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    now.as_nanos() as u64
}
