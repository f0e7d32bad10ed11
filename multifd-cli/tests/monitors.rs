//! `multifd checkpoint` at a monitor that does not tell the truth: it ends, and there is no file.

mod common;

use std::{
    io::{BufRead, BufReader, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    process::Stdio,
    sync::mpsc,
    thread,
};

use common::{LIMIT, json, multifd};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use test_support::{TempDir, time_limit};

/// Answers at `path` as a QEMU whose guest runs, and never migrates anything. `migrated` is its answer to `query-migrate` once it was
/// told to migrate, which `told` hears.
fn pretend(path: &Path, migrated: &Value, told: &mpsc::Sender<()>) {
    let listener = UnixListener::bind(path).unwrap();
    let (migrated, told) = (migrated.clone(), told.clone());
    // Ends with the process of the test.
    thread::spawn(move || {
        let mut state = json!({});
        for stream in listener.incoming() {
            // The client may have gone.
            let _ = serve(&stream.unwrap(), &mut state, &migrated, &told);
        }
    });
}

fn serve(mut stream: &UnixStream, state: &mut Value, migrated: &Value, told: &mpsc::Sender<()>) -> std::io::Result<()> {
    let version = json!({ "qemu": { "major": 10, "minor": 0, "micro": 0 }, "package": "" });
    writeln!(stream, "{}", json!({ "QMP": { "version": version, "capabilities": [] } }))?;
    for line in BufReader::new(stream).lines() {
        let command: Value = serde_json::from_str(&line?)?;
        let answer = match command["execute"].as_str().unwrap() {
            "query-status" => json!({ "status": "running", "running": true }),
            "query-migrate" => state.clone(),
            "query-migrate-capabilities" => ["multifd", "return-path", "events", "background-snapshot"]
                .map(|name| json!({ "capability": name, "state": false }))
                .into(),
            "migrate" => {
                *state = migrated.clone();
                told.send(()).unwrap();
                json!({})
            }
            "migrate_cancel" => {
                *state = json!({ "status": "cancelled" });
                json!({})
            }
            _ => json!({}),
        };
        writeln!(stream, "{}", json!({ "return": answer, "id": command["id"] }))?;
    }
    Ok(())
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
                let (told, is_told) = mpsc::channel();
                pretend(&dir.join("qmp"), &migrated, &told);
                let (at, stall) = (dir.path().display(), if interrupted { "2min" } else { "300ms" });
                let args = format!("checkpoint unix:{at}/qmp -o {at}/ckpt --json --stall-timeout {stall}");
                let child = multifd(&args).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
                is_told.recv_timeout(LIMIT).unwrap();
                if interrupted {
                    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
                }
                let output = child.wait_with_output().unwrap();
                let report = json(&output.stdout);
                let error = report["error"].as_str().unwrap();
                let case = format!("{migrated}, interrupted: {interrupted}: {report}");
                match interrupted {
                    false => {
                        assert_eq!(common::exit_code(&output), 1, "{case}");
                        assert!(error.contains(expected) && error.contains("--stall-timeout"), "{case}");
                    }
                    true => {
                        assert_eq!((common::exit_code(&output), &report["status"]), (3, &json!("cancelled")), "{case}")
                    }
                }
                assert!(!dir.join("ckpt").exists(), "{case}");
            }
        }
    });
}
