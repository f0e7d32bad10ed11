//! Who may connect where a migration arrives: `--allow` and `--max-unidentified`, of each verb that listens.

mod common;

use std::{
    io::{BufRead, BufReader, Read},
    net::TcpStream,
    process::Stdio,
    time::Duration,
};

use common::{Guest, LIMIT, exit_code, multifd, run};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use test_support::{TempDir, time_limit};

const SMALL: &str = "--guest process --memory 4MiB --write-rate 10MB/s";

/// What a guest says that is migrated to `uri`: its exit status and its report.
fn send(uri: &str) -> (i32, serde_json::Value) {
    let output = run(&format!("guest {SMALL} --after 1ms --run-for 1ms --json --migrate-to {uri}"));
    (exit_code(&output), common::json(&output.stdout))
}

/// Reads until the other end has closed `stream`.
fn is_closed(mut stream: TcpStream) {
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    // An end or a reset.
    assert_eq!(stream.read(&mut [0]).unwrap_or(0), 0);
}

fn address(uri: &str) -> &str {
    uri.strip_prefix("tcp:").unwrap()
}

#[test]
fn a_guest_arrives_from_an_address_that_is_allowed_and_from_no_other() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let start = |name, allowed| {
            Guest::start(dir.path(), name, &format!("{SMALL} --incoming tcp:127.0.0.1:0 --run-for 1ms {allowed}"))
        };
        let closed = start("closed", "--allow 192.0.2.0/24 --allow fd00::/8");
        let uri = closed.listening();
        let (exit, report) = send(&uri);
        assert_eq!((exit, &report["status"], &report["guest-errors"]), (1, &json!("failed"), &json!(0)), "{report}");
        while !closed.stderr().contains("--allow does not name") {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(closed.stderr().contains("127.0.0.1:"), "{}", closed.stderr());
        let open = start("open", "--allow 192.0.2.0/24 --allow 127.0.0.0/8");
        let (exit, report) = send(&open.listening());
        assert_eq!((exit, &report["status"]), (0, &json!("completed")), "{report}");
        assert_eq!(open.end().0, 0);
    });
}

/// A process that listens, as its stderr says, and is interrupted in the end.
fn listens(args: &str, then: impl FnOnce(&str)) -> String {
    let mut child = multifd(args).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut said = String::new();
    stderr.read_line(&mut said).unwrap();
    let uri = said.strip_prefix("listening on ").unwrap_or_else(|| panic!("{said}")).trim_end().to_owned();
    then(&uri);
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    stderr.read_to_string(&mut said).unwrap();
    child.wait().unwrap();
    said
}

#[test]
fn receive_and_give_back_close_connections_of_other_addresses() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let file = dir.join("vm").display().to_string();
        for verb in [format!("receive tcp:127.0.0.1:0 -o {file}"), "give-back tcp:127.0.0.1:0 pc.ram=4096".to_owned()] {
            let said = listens(&format!("{verb} --allow 192.0.2.1"), |uri| {
                is_closed(TcpStream::connect(address(uri)).unwrap());
            });
            assert!(said.contains("--allow does not name"), "{verb}: {said}");
        }
    });
}

#[test]
fn of_connections_that_say_nothing_the_oldest_makes_room() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let args = format!("{SMALL} --incoming tcp:127.0.0.1:0 --run-for 1ms --max-unidentified 3");
        let destination = Guest::start(dir.path(), "q", &args);
        let uri = destination.listening();
        let mut silent: Vec<_> = (0..3).map(|_| TcpStream::connect(address(&uri)).unwrap()).collect();
        // None that has just come makes room.
        std::thread::sleep(Duration::from_secs(4));
        silent.push(TcpStream::connect(address(&uri)).unwrap());
        is_closed(silent.remove(0));
        // There is room for the source as well.
        let (exit, report) = send(&uri);
        assert_eq!((exit, &report["status"]), (0, &json!("completed")), "{report}");
        silent.into_iter().for_each(is_closed);
        assert_eq!(destination.end().0, 0);
    });
}

/// Each that had to make room was a warning, and again until its thread had noticed: thousands of lines in a second.
#[test]
fn connections_without_end_do_not_fill_the_log() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let destination = Guest::start(dir.path(), "f", &format!("{SMALL} --incoming tcp:127.0.0.1:0 --run-for 1ms"));
        let uri = destination.listening();
        // More than may be there at a time, however short they are.
        let silent: Vec<_> = (0..500).map(|_| TcpStream::connect(address(&uri)).unwrap()).collect();
        let (exit, report) = send(&uri);
        assert_eq!((exit, &report["status"]), (0, &json!("completed")), "{report}");
        silent.into_iter().for_each(is_closed);
        let said = destination.stderr();
        assert_eq!(destination.end().0, 0);
        assert_eq!(said.matches("too many connections of strangers").count(), 1, "{said}");
        assert!(said.matches("none of this migration").count() <= 100, "{said}");
    });
}

#[test]
fn an_address_makes_no_sense_where_there_is_none() {
    for args in [
        "receive unix:/tmp/nonesuch -o /tmp/nonesuch/x --allow 10.0.0.0/8",
        "receive - -o /tmp/nonesuch/x --allow 10.0.0.0/8",
        "guest --allow 10.0.0.0/8",
        "guest --incoming unix:/tmp/nonesuch --allow 10.0.0.0/8",
        "serve /tmp/nonesuch/x --listen unix:/tmp/nonesuch --allow 10.0.0.0/8",
        "give-back unix:/tmp/nonesuch pc.ram=4096 --allow 10.0.0.0/8",
        "checkpoint unix:/tmp/nonesuch -o /tmp/nonesuch/x --allow 10.0.0.0/8",
        "receive tcp:127.0.0.1:0 -o /tmp/nonesuch/x --allow host.example",
        "receive tcp:127.0.0.1:0 -o /tmp/nonesuch/x --max-unidentified 0",
    ] {
        let output = run(args);
        assert_eq!(exit_code(&output), 2, "{args}: {output:?}");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.contains("--allow") || said.contains("--max-unidentified"), "{args}: {said}");
    }
}
