//! `multifd restore --postcopy` whose connection breaks after RUN, at a QEMU whose monitor knows what became of the VM.

mod common;

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    thread,
};

use common::{LIMIT, captures::recorded, exit_code, json, multifd, run};
use serde_json::{Value, json};
use test_support::{TempDir, time_limit};

/// What a monitor says, and how its QEMU takes a VM.
#[derive(Clone)]
struct Qemu {
    /// The answers to `query-migrate` and `query-status`.
    state: Arc<Mutex<(Value, &'static str)>>,
    /// The machine and the memory of the checkpoint.
    checkpoint: Arc<(String, Vec<(String, u64)>)>,
    /// What is said after RUN, before the connection is closed.
    last_words: Vec<u8>,
    /// The answers from then on.
    after_run: (Value, &'static str),
}

impl Qemu {
    fn listen(&self, path: &Path) {
        let (listener, qemu) = (UnixListener::bind(path).unwrap(), self.clone());
        // Ends with the process of the test.
        thread::spawn(move || {
            for stream in listener.incoming() {
                // The client may have gone.
                let _ = qemu.serve(&stream.unwrap());
            }
        });
    }

    fn serve(&self, mut stream: &UnixStream) -> std::io::Result<()> {
        let version = json!({ "qemu": { "major": 10, "minor": 0, "micro": 0 }, "package": "" });
        writeln!(stream, "{}", json!({ "QMP": { "version": version, "capabilities": [] } }))?;
        for line in BufReader::new(stream).lines() {
            let command: Value = serde_json::from_str(&line?)?;
            if command["execute"] == "migrate-recover" {
                let error = json!({ "class": "GenericError", "desc": "postcopy is not paused" });
                writeln!(stream, "{}", json!({ "error": error, "id": command["id"] }))?;
                continue;
            }
            let answer = self.answer(&command);
            writeln!(stream, "{}", json!({ "return": answer, "id": command["id"] }))?;
        }
        Ok(())
    }

    fn answer(&self, command: &Value) -> Value {
        let (machine, memory) = &*self.checkpoint;
        let (migration, guest) = self.state.lock().unwrap().clone();
        match command["execute"].as_str().unwrap() {
            "query-status" => json!({ "status": guest, "running": guest == "running" }),
            "query-migrate" => migration,
            "query-migrate-capabilities" => ["multifd", "return-path", "events", "postcopy-ram"]
                .map(|name| json!({ "capability": name, "state": false }))
                .into(),
            "qom-get" => format!("{machine}-machine").into(),
            "query-memdev" => {
                memory.iter().map(|(id, size)| json!({ "id": id, "size": size, "share": false })).collect()
            }
            "migrate-incoming" => {
                let uri = command["arguments"]["uri"].as_str().unwrap();
                let path = PathBuf::from(uri.strip_prefix("unix:").unwrap());
                let (listener, qemu) = (UnixListener::bind(&path).unwrap(), self.clone());
                self.state.lock().unwrap().0 = json!({ "status": "setup" });
                thread::spawn(move || qemu.take(listener, &path));
                json!({})
            }
            _ => json!({}),
        }
    }

    /// Takes a VM up to RUN, and breaks the connection.
    fn take(&self, listener: UnixListener, path: &Path) {
        let mut main = listener.accept().unwrap().0;
        main.set_read_timeout(Some(LIMIT)).unwrap();
        main.write_all(&pong(2)).unwrap();
        read_until(&mut main, RUN.len(), |bytes| bytes == RUN);
        main.write_all(&self.last_words).unwrap();
        if !self.last_words.is_empty() {
            // All pages come, and the end.
            read_until(&mut main, END.len() + 5, |bytes| bytes.starts_with(END) && bytes.ends_with(&[0]));
        }
        drop(listener);
        fs::remove_file(path).unwrap();
        *self.state.lock().unwrap() = self.after_run.clone();
    }
}

fn read_until(from: &mut UnixStream, len: usize, is_end: impl Fn(&[u8]) -> bool) {
    let (mut bytes, mut seen) = (vec![0; 1 << 16], Vec::new());
    loop {
        let count = from.read(&mut bytes).unwrap();
        assert!(count > 0, "the sender has ended");
        seen.extend_from_slice(&bytes[..count]);
        if seen.windows(len).any(&is_end) {
            return;
        }
        seen.drain(..seen.len().saturating_sub(len));
    }
}

fn pong(value: u32) -> Vec<u8> {
    [&[0, 2, 0, 4][..], &value.to_be_bytes()].concat()
}

/// The last word of the package, and the PING behind it.
const RUN: &[u8] = b"\x08\0\x05\0\0\x08\0\x02\0\x04\0\0\0\x04";
/// The end of a section of pages, and its footer; its number follows, and the end of the stream.
const END: &[u8] = b"\0\0\0\0\0\0\0\x10\x7e";

/// How a restore ends whose connection breaks after RUN, at a monitor that says `migration` and `guest` then.
fn restored(last_words: &[u8], migration: Value, guest: &'static str) -> (TempDir, i32, Value) {
    let dir = TempDir::new().unwrap();
    let (stream, file) = (dir.join("stream"), dir.join("checkpoint"));
    fs::write(&stream, recorded("q10.0-xbzrle-0ch")).unwrap();
    assert!(run(&format!("convert {} {}", stream.display(), file.display())).status.success());
    let checkpoint = multifd::checkpoint::Checkpoint::open(&file).unwrap();
    let memory = checkpoint.blocks().iter().map(|block| (block.name.to_string(), block.bytes)).collect();
    let qemu = Qemu {
        state: Arc::new(Mutex::new((json!({}), "inmigrate"))),
        checkpoint: Arc::new((checkpoint.machine().to_owned(), memory)),
        last_words: last_words.to_owned(),
        after_run: (migration, guest),
    };
    qemu.listen(&dir.join("qmp"));
    let qmp = dir.join("qmp");
    let output =
        multifd(&format!("restore --json --postcopy {} unix:{}", file.display(), qmp.display())).output().unwrap();
    (dir, exit_code(&output), json(&output.stdout))
}

/// The report said that it was completed and where its note is, and the note refused the next start from the checkpoint; where QEMU had
/// failed to load the VM the note was there as well.
#[test]
fn a_doubt_that_the_monitor_settles_leaves_no_note() {
    time_limit(LIMIT, || {
        for last_words in [vec![], pong(3)] {
            let (dir, status, report) = restored(&last_words, json!({ "status": "completed" }), "running");
            assert_eq!(status, 0, "{report}");
            assert_eq!((&report["confirmed-by"], &report["guest-state"]), (&json!("qmp"), &json!("running")));
            assert_eq!(report["state"], Value::Null, "{report}");
            assert!(!dir.join("checkpoint.postcopy").exists());
        }
        let (dir, status, report) =
            restored(&[], json!({ "status": "failed", "error-desc": "loadvm failed" }), "inmigrate");
        assert_eq!(status, 1, "{report}");
        let error = report["error"].as_str().unwrap();
        assert!(error.starts_with("QEMU could not load the VM: loadvm failed. This QEMU takes no second"), "{error}");
        assert_eq!(report["state"], Value::Null, "{report}");
        assert!(!dir.join("checkpoint.postcopy").exists());
    });
}

/// A guest that ran may have done something, so its note stays.
#[test]
fn a_doubt_that_the_monitor_does_not_settle_keeps_the_note() {
    time_limit(LIMIT, || {
        let (dir, status, report) = restored(&[], json!({ "status": "failed" }), "internal-error");
        let error = report["error"].as_str().unwrap();
        assert_eq!(status, 7, "{report}");
        assert!(error.contains("its guest is internal-error") && error.contains("--recover"), "{error}");
        assert!(dir.join("checkpoint.postcopy").exists() && report["state"].is_string());
    });
}

/// QEMU 10.0 and 11.1 end the migration as completed, and stay `inmigrate`, where they cannot take a disk. That was exit status 0.
#[test]
fn a_guest_that_qemu_does_not_start_is_no_success() {
    time_limit(LIMIT, || {
        let (dir, status, report) = restored(&pong(3), json!({ "status": "completed" }), "inmigrate");
        assert_eq!(status, 1, "{report}");
        assert_eq!(report["guest-state"], "inmigrate");
        let error = report["error"].as_str().unwrap();
        assert!(error.contains("has not started it") && error.contains("stderr"), "{error}");
        assert!(error.contains("end it with quit"), "{error}");
        assert!(!dir.join("checkpoint.postcopy").exists());
    });
}
