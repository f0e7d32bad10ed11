//! A limit on threads is reached at each thread in turn: the guest runs on where it was, and can be moved once there is room.

mod common;

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::{fs::PermissionsExt, net::UnixStream},
    process::Command,
    sync::atomic::{AtomicU32, Ordering::Relaxed},
    time::{Duration, Instant},
};

use common::{Guest, LIMIT, number};
use rustix::process::{Pid, getuid};
use serde_json::{Value, json};
use test_support::{TempDir, skip, time_limit};

const SAME: &str = "--guest process --memory 8MiB --working-set 2MiB --channels 3";
const CHANNELS: usize = 3;

/// A user of its own, whom the limit on threads binds: it counts all threads of the user.
struct User(u32);

impl User {
    /// `None` and a skip where the command cannot run as another user.
    fn new(dir: &TempDir) -> Option<User> {
        if !getuid().is_root() {
            skip("only root can run the command as another user");
            return None;
        }
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let user = User(200_000 + std::process::id() % 1_000_000 * 8 + NEXT.fetch_add(1, Relaxed));
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let problem = match user.command(env!("CARGO_BIN_EXE_multifd")).arg("--version").output() {
            Ok(output) if output.status.success() => return Some(user),
            Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            Err(error) => error.to_string(),
        };
        skip(&format!("the command does not run as another user: {problem}"));
        None
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new("setpriv");
        command.arg(format!("--reuid={}", self.0)).args(["--clear-groups", "--inh-caps=-all", program]);
        command
    }

    fn guest(&self) -> Command {
        let mut command = self.command(env!("CARGO_BIN_EXE_multifd"));
        command.args(["guest", "--json"]);
        command
    }

    /// Lets `pid` have `more` threads than it has.
    fn allow(&self, pid: Pid, more: usize) {
        let pid = pid.as_raw_nonzero();
        let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap().count();
        // By the user itself: nobody else may without a privilege.
        let mut command = self.command("prlimit");
        let output = command.args([format!("--pid={pid}"), format!("--nproc={}:", threads + more)]).output().unwrap();
        assert!(output.status.success(), "prlimit: {}", String::from_utf8_lossy(&output.stderr));
    }
}

/// A connection to a control socket that is made while there is a thread for it.
struct Client(BufReader<UnixStream>);

impl Client {
    fn new(path: &std::path::Path) -> Client {
        let deadline = Instant::now() + LIMIT;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) => assert!(Instant::now() < deadline, "{}: {error}", path.display()),
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        Client(BufReader::new(stream))
    }

    fn ask(&mut self, command: &Value) -> Value {
        writeln!(self.0.get_mut(), "{command}").unwrap();
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line:?}"))
    }

    fn status(&mut self) -> Value {
        self.ask(&json!("status"))["return"].take()
    }

    /// The status, once no attempt is under way.
    fn settled(&mut self) -> Value {
        let deadline = Instant::now() + LIMIT;
        loop {
            let status = self.status();
            if status["state"] != "outgoing" {
                return status;
            }
            assert!(Instant::now() < deadline, "{status}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn runs_on(&mut self) {
        let deadline = Instant::now() + LIMIT;
        let before = number(&self.status(), "/passes");
        loop {
            let status = self.status();
            assert_eq!((&status["state"], number(&status, "/guest-errors")), (&json!("running"), 0.0), "{status}");
            if number(&status, "/passes") > before + 1.0 {
                return;
            }
            assert!(Instant::now() < deadline, "{status}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// The process ended with a panic, and the guest with it.
#[test]
fn the_guest_survives_a_source_without_threads_and_moves_once_there_are_some() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let Some(user) = User::new(&dir) else { return };
        let source = Guest::start_by(user.guest(), dir.path(), "source", SAME);
        let mut client = Client::new(&dir.path().join("source"));
        client.runs_on();
        // The thread of the migration, the return path, the channels.
        let needed = 2 + CHANNELS;
        for more in 0..needed {
            let (destination, uri) = Guest::incoming(dir.path(), &format!("d{more}"), SAME);
            fs::set_permissions(dir.path().join(format!("d{more}.socket")), fs::Permissions::from_mode(0o777)).unwrap();
            user.allow(source.pid(), more);
            assert!(client.ask(&json!({ "migrate": uri })).get("return").is_some());
            let status = client.settled();
            assert_eq!((&status["state"], &status["status"]), (&json!("running"), &json!("failed")), "{status}");
            let error = status["error"].as_str().unwrap();
            assert!(error.starts_with("cannot create the thread that "), "{more} threads: {error}");
            client.runs_on();
            destination.kill();
        }
        user.allow(source.pid(), 100);
        let (destination, uri) = Guest::incoming(dir.path(), "last", SAME);
        fs::set_permissions(dir.path().join("last.socket"), fs::Permissions::from_mode(0o777)).unwrap();
        assert!(client.ask(&json!({ "migrate": uri })).get("return").is_some());
        let (exit, report) = source.end();
        assert_eq!((exit, &report["status"]), (0, &json!("completed")), "{report}");
        destination.runs_on();
    });
}

#[test]
fn the_guest_stays_at_the_source_when_the_destination_gets_no_threads() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let source = Guest::start(dir.path(), "source", SAME);
        source.wait_for(|_| true);
        // One for each channel; the others exist when it listens, and the one that finds out which is main ends there.
        for more in 0..CHANNELS {
            let Some(user) = User::new(&dir) else { return };
            let uri = format!("unix:{}", dir.path().join(format!("d{more}.socket")).display());
            let mut command = user.guest();
            command.args(["--incoming", &uri]);
            let destination = Guest::start_by(command, dir.path(), &format!("d{more}"), SAME);
            assert_eq!(destination.listening(), uri);
            // It listens before the threads are made that serve the listener and the control socket.
            let mut client = Client::new(&dir.path().join(format!("d{more}")));
            let deadline = Instant::now() + LIMIT;
            let accepts = || {
                let tasks = fs::read_dir(format!("/proc/{}/task", destination.pid().as_raw_nonzero())).unwrap();
                let mut names =
                    tasks.flatten().map(|task| fs::read_to_string(task.path().join("comm")).unwrap_or_default());
                names.any(|name| name.trim_end() == "mfd accept")
            };
            while !accepts() {
                assert!(Instant::now() < deadline, "{}", client.status());
                std::thread::sleep(Duration::from_millis(5));
            }
            assert_eq!(client.status()["state"], "incoming");
            user.allow(destination.pid(), more);
            assert!(source.ask(&json!({ "migrate": uri })).unwrap().get("return").is_some());
            let status = source.wait_for(|status| status["state"] != "outgoing");
            assert_eq!((&status["state"], &status["status"]), (&json!("running"), &json!("failed")), "{status}");
            source.runs_on();
            let (exit, report) = destination.end();
            let error = report["error"].as_str().unwrap_or_default();
            assert!(exit != 0 && error.starts_with("cannot create the thread that "), "{exit}: {report}");
        }
    });
}
