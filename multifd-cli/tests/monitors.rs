//! `multifd checkpoint` at a monitor that does not tell the truth: it ends, and there is no file.

mod common;

use std::{
    io::{BufRead, BufReader, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    process::Stdio,
    sync::mpsc,
    thread,
    time::Duration,
};

use common::{LIMIT, json, multifd};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use test_support::{TempDir, time_limit};

/// A QEMU whose guest runs, and which never migrates anything.
struct Pretended {
    /// Its answer to `query-migrate` once it was told to migrate.
    migrated: Value,
    /// The command from then on that `told` hears of, once, before it is answered.
    at: &'static str,
    /// How long it is not answered then.
    held: Duration,
    told: mpsc::Sender<()>,
    state: Value,
    started: bool,
}

impl Pretended {
    /// Answers at `path` until the process of the test ends.
    fn listen(mut self, path: &Path) {
        let listener = UnixListener::bind(path).unwrap();
        thread::spawn(move || {
            for stream in listener.incoming() {
                // The client may have gone.
                let _ = self.serve(&stream.unwrap());
            }
        });
    }

    fn serve(&mut self, mut stream: &UnixStream) -> std::io::Result<()> {
        let version = json!({ "qemu": { "major": 10, "minor": 0, "micro": 0 }, "package": "" });
        writeln!(stream, "{}", json!({ "QMP": { "version": version, "capabilities": [] } }))?;
        for line in BufReader::new(stream).lines() {
            let command: Value = serde_json::from_str(&line?)?;
            let name = command["execute"].as_str().unwrap();
            if name == "migrate" {
                (self.state, self.started) = (self.migrated.clone(), true);
            }
            if self.started && name == self.at {
                self.at = "";
                self.told.send(()).unwrap();
                thread::sleep(self.held);
            }
            let answer = match name {
                "query-status" => json!({ "status": "running", "running": true }),
                "query-migrate" => self.state.clone(),
                "query-migrate-capabilities" => ["multifd", "return-path", "events", "background-snapshot"]
                    .map(|name| json!({ "capability": name, "state": false }))
                    .into(),
                "migrate_cancel" => {
                    self.state = json!({ "status": "cancelled" });
                    json!({})
                }
                _ => json!({}),
            };
            writeln!(stream, "{}", json!({ "return": answer, "id": command["id"] }))?;
        }
        Ok(())
    }
}

/// Runs `checkpoint` at such a QEMU in `dir`, and interrupts it when `told` hears, if so told. Returns its status and its report.
fn checkpoint(dir: &TempDir, qemu: Pretended, is_told: &mpsc::Receiver<()>, interrupted: bool) -> (i32, Value) {
    qemu.listen(&dir.join("qmp"));
    let (at, stall) = (dir.path().display(), if interrupted { "2min" } else { "300ms" });
    let args = format!("checkpoint unix:{at}/qmp -o {at}/ckpt --json --stall-timeout {stall}");
    let child = multifd(&args).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    is_told.recv_timeout(LIMIT).unwrap();
    if interrupted {
        kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    }
    let output = child.wait_with_output().unwrap();
    assert!(!dir.join("ckpt").exists());
    (common::exit_code(&output), json(&output.stdout))
}

fn pretended(migrated: &Value, at: &'static str, held: Duration) -> (Pretended, mpsc::Receiver<()>) {
    let (told, is_told) = mpsc::channel();
    (Pretended { migrated: migrated.clone(), at, held, told, state: json!({}), started: false }, is_told)
}

/// With each of these answers it waited forever; with the one that all is done, an interrupt did not end that either.
#[test]
fn a_qemu_that_sends_nothing_and_says_nothing_true_is_given_up() {
    time_limit(LIMIT, || {
        for (migrated, expected) in [
            (json!({ "status": "completed" }), "says that its migration is completed"),
            (json!({ "status": "setup" }), "no migration has come to unix:"),
            (json!({ "status": "active", "ram": { "dirty-sync-count": 1 } }), "no migration has come to unix:"),
            (json!({}), "no migration has come to unix:"),
        ] {
            for interrupted in [false, true] {
                let dir = TempDir::new().unwrap();
                let (qemu, is_told) = pretended(&migrated, "migrate", Duration::ZERO);
                let (exit, report) = checkpoint(&dir, qemu, &is_told, interrupted);
                let error = report["error"].as_str().unwrap();
                let case = format!("{migrated}, interrupted: {interrupted}: {report}");
                match interrupted {
                    false => {
                        assert_eq!(exit, 1, "{case}");
                        assert!(error.contains(expected) && error.contains("--stall-timeout"), "{case}");
                    }
                    true => assert_eq!((exit, &report["status"]), (3, &json!("cancelled")), "{case}"),
                }
            }
        }
    });
}

/// The interrupt was noticed while QEMU was asked, and not again where it then said that all is done: the receiver waited forever.
#[test]
fn an_interrupt_counts_whenever_it_comes() {
    time_limit(LIMIT, || {
        for status in ["completed", "active", "failed"] {
            let dir = TempDir::new().unwrap();
            let held = Duration::from_secs(1);
            let (qemu, is_told) = pretended(&json!({ "status": status }), "query-migrate", held);
            let (exit, report) = checkpoint(&dir, qemu, &is_told, true);
            assert_eq!((exit, &report["status"]), (3, &json!("cancelled")), "{status}: {report}");
        }
    });
}
