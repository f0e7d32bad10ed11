//! Runs the command as tests do: within a time limit, and never longer than its test.

#![allow(dead_code, reason = "each test file uses its part")]

pub mod captures;
pub mod client;
pub mod convert;
pub mod hosts;
pub mod proxy;
pub mod python;
pub mod schema;
pub mod user;

use std::{
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
    process::{Child, ChildStderr, Command, Output, Stdio},
    sync::{Arc, Mutex, OnceLock, mpsc},
    thread,
    time::{Duration, Instant},
};

use multifd_qmp::Client;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid};
use serde_json::{Value, json};

/// No test takes that long, even on a busy machine with two cores.
pub const LIMIT: Duration = Duration::from_secs(180);

/// The command with `args`, separated by spaces.
pub fn multifd(args: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_multifd"));
    command.args(args.split_whitespace()).stdin(Stdio::null());
    command
}

/// Runs it to its end.
pub fn run(args: &str) -> Output {
    multifd(args).output().unwrap()
}

/// What it printed to stdout, which has to be one JSON object and nothing else.
#[track_caller]
pub fn json(stdout: &[u8]) -> Value {
    let text = std::str::from_utf8(stdout).unwrap();
    let value: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text:?}"));
    assert!(value.is_object(), "{text}");
    schema::check(&value);
    value
}

#[track_caller]
pub fn number(report: &Value, path: &str) -> f64 {
    report.pointer(path).and_then(Value::as_f64).unwrap_or_else(|| panic!("no number {path} in {report}"))
}

pub fn exit_code(output: &Output) -> i32 {
    output.status.code().unwrap_or(-1)
}

/// Whether KVM guests run here; if not, the test is skipped with the reason.
pub fn kvm_or_skip() -> bool {
    static REASON: OnceLock<Option<String>> = OnceLock::new();
    let reason = REASON.get_or_init(|| {
        let output = run("guest --guest kvm --memory 1MiB --write-rate max --run-for 200ms --json");
        (exit_code(&output) != 0).then(|| json(&output.stdout)["error"].to_string())
    });
    if let Some(reason) = reason {
        test_support::skip(&format!("no KVM guest here: {reason}"));
    }
    reason.is_none()
}

/// What the process whose QMP socket is at `monitor` answers to `command`; `None` if it does not answer (any more).
pub fn ask(monitor: &Path, command: &str, arguments: Value) -> Option<Value> {
    let answer = Client::connect(monitor).and_then(|mut client| client.execute(command, arguments));
    answered(answer)
}

/// An answer as it comes over the socket.
pub fn answered(answer: Result<Value, multifd_qmp::Error>) -> Option<Value> {
    match answer {
        Ok(answer) => Some(json!({ "return": answer })),
        Err(multifd_qmp::Error::Refused { description, .. }) => Some(json!({ "error": description })),
        Err(_) => None,
    }
}

/// A `multifd guest` that runs beside the test and is killed with it.
pub struct Guest {
    child: Child,
    stdout: Option<thread::JoinHandle<String>>,
    stderr: Arc<Mutex<String>>,
    listening: mpsc::Receiver<String>,
    monitor: PathBuf,
}

impl Guest {
    /// Starts one with `args` and a QMP socket called `name` in `dir`.
    pub fn start(dir: &Path, name: &str, args: &str) -> Guest {
        Guest::start_by(multifd("guest --json"), dir, name, args)
    }

    /// The same by `command`, to which all but `guest --json` is added.
    pub fn start_by(mut command: Command, dir: &Path, name: &str, args: &str) -> Guest {
        let monitor = dir.join(name);
        command.args(args.split_whitespace()).arg("--qmp").arg(format!("unix:{}", monitor.display()));
        // The kernel ends it with this thread, also when a time limit ends the test.
        command.args(["--child-of", &std::process::id().to_string()]);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut output = child.stdout.take().unwrap();
        let stdout = thread::spawn(move || {
            let mut text = String::new();
            output.read_to_string(&mut text).unwrap();
            text
        });
        let (stderr, (listens, listening)) = (Arc::new(Mutex::new(String::new())), mpsc::channel());
        let errors = child.stderr.take().unwrap();
        let kept = stderr.clone();
        thread::spawn(move || keep(errors, &kept, &listens));
        Guest { child, stdout: Some(stdout), stderr, listening, monitor }
    }

    /// Starts one that waits at a new socket in `dir`.
    pub fn incoming(dir: &Path, name: &str, args: &str) -> (Guest, String) {
        let uri = format!("unix:{}", dir.join(format!("{name}.socket")).display());
        let guest = Guest::start(dir, name, &format!("--incoming {uri} {args}"));
        assert_eq!(guest.listening(), uri);
        (guest, uri)
    }

    /// Where it listens, once it does.
    #[track_caller]
    pub fn listening(&self) -> String {
        self.listening.recv_timeout(LIMIT).unwrap_or_else(|_| panic!("does not listen: {}", self.stderr()))
    }

    pub fn stderr(&self) -> String {
        self.stderr.lock().unwrap().clone()
    }

    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    /// Its answer to `command`; `None` if it does not answer (any more).
    pub fn ask(&self, command: &str, arguments: Value) -> Option<Value> {
        ask(&self.monitor, command, arguments)
    }

    /// Its status, once `wanted` says that this is it.
    #[track_caller]
    pub fn wait_for(&self, wanted: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + LIMIT;
        let mut last = None;
        while Instant::now() < deadline {
            last = self.ask("x-guest-status", json!({})).map(|mut answer| answer["return"].take());
            match last.take() {
                Some(status) if wanted(&status) => return status,
                other => last = other,
            }
            assert!(!self.has_ended(), "it has ended: last status {last:?}, {}", self.stderr());
            thread::sleep(Duration::from_millis(10));
        }
        panic!("never came: last status {last:?}, {}", self.stderr());
    }

    /// Whether the process has ended. Its exit status is still there for [`end`](Self::end).
    pub fn has_ended(&self) -> bool {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        waitid(WaitId::Pid(self.pid()), options).unwrap().is_some()
    }

    /// Its status; nothing from a process that has ended, or is about to: its guest has left.
    pub fn status(&self) -> Option<Value> {
        let status = self.ask("x-guest-status", json!({}))?["return"].take();
        (status.is_object() && status["state"] != "migrated").then_some(status)
    }

    /// Waits until the guest has made more passes than it had.
    #[track_caller]
    pub fn runs_on(&self) {
        let passes = number(&self.wait_for(|status| status["state"] == "running"), "/passes");
        let status = self.wait_for(|status| number(status, "/passes") > passes + 1.0);
        assert_eq!(number(&status, "/guest-errors"), 0.0);
    }

    /// Waits for its end: exit status, report.
    pub fn end(mut self) -> (i32, Value) {
        let stdout = self.stdout.take().unwrap().join().unwrap();
        let status = self.child.wait().unwrap();
        let report = if stdout.is_empty() { Value::Null } else { json(stdout.as_bytes()) };
        (status.code().unwrap_or(-1), report)
    }

    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // It has usually ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn keep(errors: ChildStderr, kept: &Mutex<String>, listens: &mpsc::Sender<String>) {
    for line in BufReader::new(errors).lines().map_while(Result::ok) {
        if let Some(uri) = line.strip_prefix("listening on ") {
            let _ = listens.send(uri.to_owned());
        }
        let mut kept = kept.lock().unwrap();
        kept.push_str(&line);
        kept.push('\n');
    }
}
