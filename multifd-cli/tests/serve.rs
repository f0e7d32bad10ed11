//! `multifd serve` and clients that are no QEMU: ones that say nothing, break off, or come too late.

mod common;

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, ChildStderr, Stdio},
    thread,
    time::Duration,
};

use common::{LIMIT, captures::recorded, exit_code, json, multifd, run};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use test_support::{TempDir, time_limit};

/// A server that is killed with the test.
struct Server {
    child: Killed,
    stderr: BufReader<ChildStderr>,
    socket: PathBuf,
}

/// A checkpoint of a QEMU in `dir`.
fn checkpoint(dir: &Path) -> PathBuf {
    let (stream, file) = (dir.join("stream"), dir.join("checkpoint"));
    fs::write(&stream, recorded("q10.0-xbzrle-0ch")).unwrap();
    assert!(run(&format!("convert {} {}", stream.display(), file.display())).status.success());
    fs::remove_file(stream).unwrap();
    file
}

impl Server {
    fn start(dir: &Path, more: &str) -> Server {
        let file = checkpoint(dir);
        let socket = dir.join("socket");
        let mut command = multifd("serve --json --listen");
        command.arg(format!("unix:{}", socket.display())).arg(&file).args(more.split_whitespace());
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let mut server = Server { child: Killed(child), stderr, socket };
        server.says("listening on ");
        server
    }

    /// A connection to it.
    fn client(&self) -> UnixStream {
        let client = UnixStream::connect(&self.socket).unwrap();
        client.set_read_timeout(Some(LIMIT)).unwrap();
        client
    }

    /// A client that is being served: it has got the beginning of the stream.
    fn served(&self) -> UnixStream {
        let mut client = self.client();
        let mut magic = [0; 4];
        client.read_exact(&mut magic).unwrap();
        assert_eq!(&magic, b"QEVM");
        client
    }

    /// A client whose VM runs, as far as the server can know.
    fn runs(&self) -> UnixStream {
        let mut client = self.served();
        client.write_all(&pong(2)).unwrap();
        let (mut bytes, mut seen) = (vec![0; 1 << 16], Vec::new());
        // The end of the package, and what follows it.
        while !seen.windows(RUN.len()).any(|window| window == RUN) {
            let len = client.read(&mut bytes).unwrap();
            assert!(len > 0, "no RUN");
            seen.extend_from_slice(&bytes[..len]);
        }
        client.write_all(&pong(3)).unwrap();
        client
    }

    /// Waits until it says a line with `part` in it on stderr.
    #[track_caller]
    fn says(&mut self, part: &str) {
        let mut line = String::new();
        while self.stderr.read_line(&mut line).unwrap() > 0 {
            if line.contains(part) {
                return;
            }
            line.clear();
        }
        panic!("never said {part:?}");
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child.0), signal).unwrap();
    }

    /// Its exit status, and what it reported.
    fn end(mut self) -> (i32, Vec<Value>) {
        self.stderr.read_to_string(&mut String::new()).unwrap();
        let (status, stdout) = self.child.end();
        let lines = stdout.split(|&byte| byte == b'\n').filter(|line| !line.is_empty());
        let mut reports: Vec<Value> = lines.map(json).collect();
        reports.sort_by_key(|report| report["client"].as_u64());
        (status, reports)
    }
}

/// A child that is killed by its id when this is dropped.
struct Killed(Child);

impl Killed {
    /// Waits for its exit status, and what it printed to stdout.
    fn end(&mut self) -> (i32, Vec<u8>) {
        let mut stdout = Vec::new();
        self.0.stdout.take().unwrap().read_to_end(&mut stdout).unwrap();
        (self.0.wait().unwrap().code().unwrap_or(-1), stdout)
    }
}

impl Drop for Killed {
    fn drop(&mut self) {
        // It has usually ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The last word of the package, and the PING behind it.
const RUN: &[u8] = b"\x08\0\x05\0\0\x08\0\x02\0\x04\0\0\0\x04";

fn pong(value: u32) -> Vec<u8> {
    [&[0, 2, 0, 4][..], &value.to_be_bytes()].concat()
}

#[track_caller]
fn failed(report: &Value, client: u64, what: &str) {
    let error = report["error"].as_str().unwrap_or_default();
    assert_eq!((&report["status"], report["client"].as_u64()), (&"failed".into(), Some(client)), "{report}");
    assert!(error.contains(what), "{what:?} is not in {error:?}");
}

fn entries(dir: &TempDir) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| !["socket", "receive"].contains(&name.as_str()))
        .collect();
    names.sort();
    names
}

#[test]
fn more_clients_than_the_limit_are_refused_and_later_ones_are_not() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let mut server = Server::start(dir.path(), "--max-clients 1");
        let first = server.served();
        assert_eq!(server.client().read(&mut [0; 1]).unwrap(), 0, "the second is not served");
        drop(first);
        server.says("client 1 ");
        // Its place is free soon after it was reported.
        while server.client().read(&mut [0; 1]).unwrap() == 0 {}
        server.signal(Signal::TERM);
        let (status, reports) = server.end();
        assert_eq!(status, 0, "{reports:?}");
        failed(&reports[0], 1, "The VM does not run there");
        failed(&reports[1], 2, "--max-clients");
        assert_eq!(entries(&dir), ["checkpoint"], "no note is left behind");
    });
}

#[test]
fn a_client_that_breaks_off_or_talks_nonsense_harms_no_other() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let (metrics, page) = (dir.join("clients.prom"), dir.join("clients.html"));
        let observed = format!("--clients 5 --metrics file:{} --report {}", metrics.display(), page.display());
        let server = Server::start(dir.path(), &observed);
        let patient = server.served();
        drop(server.client());
        let mut nonsense = server.client();
        nonsense.write_all(&[0xff; 64]).unwrap();
        nonsense.read_to_end(&mut Vec::new()).unwrap();
        // Asks for pages before there is a VM.
        let mut early = server.client();
        early.write_all(&[&[0, 3, 0, 19][..], &[0; 8], &[0, 0, 16, 0], b"\x06pc.ram"].concat()).unwrap();
        early.read_to_end(&mut Vec::new()).unwrap();
        drop(server.runs());
        drop(patient);
        let (status, reports) = server.end();
        assert_eq!(status, 8, "one VM is at a client: {reports:?}");
        failed(&reports[0], 1, "The VM does not run there");
        failed(&reports[1], 2, "The VM does not run there");
        failed(&reports[2], 3, "");
        failed(&reports[3], 4, "before RUN");
        failed(&reports[4], 5, "send");
        let note = reports[4]["state"].as_str().unwrap();
        assert!(note.contains("checkpoint.postcopy-"), "{note}");
        assert!(fs::read_to_string(note).unwrap().contains("client 5"));
        assert_eq!(entries(&dir).len(), 4, "{:?}", entries(&dir));
        let metrics = fs::read_to_string(metrics).unwrap();
        let sample = |name: &str| -> f64 {
            let line = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            line.unwrap_or_else(|| panic!("no {name} in {metrics}")).parse().unwrap()
        };
        for (status, count) in [("completed", 0.0), ("failed", 4.0), ("incomplete", 1.0)] {
            assert_eq!(sample(&format!("multifd_migrations_total{{status=\"{status}\"}}")), count, "{metrics}");
        }
        assert!(sample("multifd_main_bytes_total{role=\"source\"}") > 0.0, "{metrics}");
        let page = fs::read_to_string(page).unwrap();
        assert!(page.contains("<h2>Clients</h2>") && page.contains("client 5"), "{page}");
        assert_eq!(page.matches("<tr>").count(), 6, "{page}");
    });
}

#[test]
fn an_interrupt_refuses_a_client_whose_vm_does_not_run() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let server = Server::start(dir.path(), "");
        let mut waiting = server.served();
        server.signal(Signal::TERM);
        waiting.read_to_end(&mut Vec::new()).unwrap();
        let (status, reports) = server.end();
        assert_eq!(status, 0);
        assert_eq!(reports.len(), 1);
        assert_eq!(reports[0]["client"], 1);
        assert_eq!(reports[0]["status"], "cancelled", "{}", reports[0]);
        assert_eq!(entries(&dir), ["checkpoint"]);
    });
}

#[test]
fn a_vm_that_runs_has_a_time_to_get_its_memory_after_an_interrupt() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let mut server = Server::start(dir.path(), "--finish-timeout 300ms");
        // It never says that it has everything.
        let client = server.runs();
        server.signal(Signal::TERM);
        server.says("waits for VMs");
        server.says("--finish-timeout");
        let (status, reports) = server.end();
        assert_eq!(status, 8);
        failed(&reports[0], 1, "--recover --state");
        assert!(Path::new(reports[0]["state"].as_str().unwrap()).exists());
        drop(client);
    });
}

#[test]
fn a_second_interrupt_ends_at_once() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let mut server = Server::start(dir.path(), "--finish-timeout 1h --clients 1");
        let client = server.runs();
        server.signal(Signal::INT);
        server.says("waits for VMs");
        server.signal(Signal::INT);
        let (status, reports) = server.end();
        assert_eq!((status, reports.len()), (8, 1));
        drop(client);
    });
}

#[test]
fn a_file_that_changed_is_not_served_any_more() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let server = Server::start(dir.path(), "--clients 2");
        let mut first = server.served();
        let file = fs::File::options().append(true).open(dir.join("checkpoint")).unwrap();
        file.set_len(file.metadata().unwrap().len() - 4096).unwrap();
        first.write_all(&pong(2)).unwrap();
        first.read_to_end(&mut Vec::new()).unwrap();
        assert_eq!(server.client().read(&mut [0; 1]).unwrap(), 0);
        let (status, reports) = server.end();
        assert_eq!(status, 0, "no VM was told to run");
        failed(&reports[0], 1, "changed");
        failed(&reports[1], 2, "changed");
        assert_eq!(entries(&dir), ["checkpoint"]);
    });
}

#[test]
fn what_cannot_be_served_is_said_before_anything_listens() {
    let dir = TempDir::new().unwrap();
    let refused = |args: &str, status: i32, what: &str| {
        let output = run(&format!("serve --json --listen unix:{}/socket {args}", dir.path().display()));
        let report = json(&output.stdout);
        assert_eq!(exit_code(&output), status, "{report}");
        assert!(report["error"].as_str().unwrap().contains(what), "{report}");
        assert!(!dir.join("socket").exists());
    };
    let stream = dir.join("stream");
    fs::write(&stream, recorded("q10.0-xbzrle-0ch")).unwrap();
    refused(&stream.display().to_string(), 4, "multifd convert");
    refused("/nonexistent", 1, "opening it");
    refused("--preempt x", 2, "multifd send FILE URI --postcopy --preempt");
    refused("--max-clients 0 x", 2, "1 to 4096");
}

#[test]
fn a_client_that_is_silent_is_given_up() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let server = Server::start(dir.path(), "--clients 1 --stall-timeout 200ms");
        let mut silent = server.served();
        silent.read_to_end(&mut Vec::new()).unwrap();
        let (status, reports) = server.end();
        assert_eq!(status, 0);
        failed(&reports[0], 1, "fewer than 4096 bytes");
    });
}

/// What `inspect` says of the memory in `file`.
fn memory(file: &Path) -> Value {
    let output = run(&format!("inspect --digest --json {}", file.display()));
    json(&output.stdout)["ram-blocks"].clone()
}

/// Not only a QEMU takes a postcopy: a copy of the checkpoint is the same memory.
#[test]
fn a_checkpoint_is_sent_to_receive_as_a_postcopy() {
    time_limit(LIMIT, || {
        for preempt in ["", " --preempt"] {
            let dir = TempDir::new().unwrap();
            let (file, copy) = (checkpoint(dir.path()), dir.join("copy"));
            let uri = format!("unix:{}", dir.join("receive").display());
            let mut command = multifd("receive --json --output");
            let mut receive = Killed(command.arg(&copy).arg(&uri).stdout(Stdio::piped()).spawn().unwrap());
            // Once the socket is there, send waits until it listens.
            while !dir.join("receive").exists() {
                assert!(receive.0.try_wait().unwrap().is_none(), "receive has ended");
                thread::sleep(Duration::from_millis(1));
            }
            let sent = run(&format!("send --json --postcopy{preempt} {} {uri}", file.display()));
            assert_eq!(exit_code(&sent), 0, "{}", String::from_utf8_lossy(&sent.stdout));
            let (status, received) = receive.end();
            assert_eq!((status, &json(&received)["mode"]), (0, &"postcopy".into()));
            assert_eq!(memory(&file), memory(&copy));
            assert_eq!(entries(&dir), ["checkpoint", "copy"]);
        }
    });
}
