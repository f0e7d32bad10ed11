//! Checkpoints whose VM runs at once: real QEMUs as destinations of `multifd send --postcopy`.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    path::Path,
    thread,
    time::Duration,
};

use qemu_peer::{Installed, Qemu, Version};
use serde_json::Value;
use test_support::{TempDir, report, time_limit};

use crate::harness::{
    LIMIT, Multifd, Settings, TEST_LIMIT, assert_goes_on, entries, listen, migrate_away, receive_uri, vm,
};

const TABLE: &str = "postcopy";

/// A checkpoint of a guest on `installed` that has made some passes, and the QEMU that it ran on.
fn checkpoint(installed: &Installed, machine: &str, file: &Path, dir: &TempDir) -> Qemu {
    let mut source = vm(installed, machine).start().unwrap();
    Settings::default().apply(&mut source);
    source.wait_passes(3, LIMIT).unwrap();
    let (receive, uri) = Multifd::receive(&receive_uri(dir.path(), false), file, &[]);
    migrate_away(&mut source, &uri);
    receive.done();
    source
}

/// A QEMU that waits for a VM to run before its memory is there, and where.
fn destination(installed: &Installed, machine: &str, preempt: bool, tcp: bool) -> (Qemu, String) {
    let mut destination = vm(installed, machine).incoming().start().unwrap();
    destination.qmp().set_capabilities(&[("postcopy-ram", true), ("postcopy-preempt", preempt)]).unwrap();
    let uri = listen(&mut destination, tcp);
    (destination, uri)
}

/// `multifd send --postcopy`, with what `more` says.
fn send(file: &Path, uri: &str, preempt: bool, more: &[&str]) -> Multifd {
    let file = file.display().to_string();
    let preempt: &[&str] = if preempt { &["--preempt"] } else { &[] };
    Multifd::start(["send", &file, uri, "--postcopy"].iter().chain(preempt).chain(more))
}

fn figure(report: &Value, name: &str) -> u64 {
    report["postcopy"][name].as_u64().unwrap_or_else(|| panic!("no {name} in {report}"))
}

/// A VM of a checkpoint runs at once and gets all of its memory; the guest finds nothing wrong with it.
fn a_checkpoint_runs_at_once(version: Version, machine: &str, preempt: bool, tcp: bool) {
    let Some(installed) = Installed::require(version) else { return };
    time_limit(TEST_LIMIT, || {
        let dir = TempDir::new().unwrap();
        let file = dir.join("checkpoint");
        let source = checkpoint(&installed, machine, &file, &dir);
        let (mut destination, uri) = destination(&installed, machine, preempt, tcp);
        let sent = send(&file, &uri, preempt, &[]).done();
        assert_goes_on(&source, &mut destination);
        let pages = |name| figure(&sent, name);
        // Each page was sent once.
        let inspected = Multifd::start(["inspect", &file.display().to_string()]).done();
        let blocks = inspected["ram-blocks"].as_array().unwrap();
        let with_content: u64 = blocks.iter().map(|block| block["normal"].as_u64().unwrap()).sum();
        let total: u64 = blocks.iter().map(|block| block["pages"].as_u64().unwrap()).sum();
        assert_eq!(sent["ram"]["normal"].as_u64().unwrap(), with_content);
        assert_eq!(sent["ram"]["duplicate"].as_u64().unwrap(), total - with_content);
        assert_eq!(pages("zero-pages"), total - with_content);
        assert!(pages("urgent-pages") + pages("background-pages") >= with_content);
        assert!(pages("requests") >= pages("urgent-pages"));
        assert_eq!(pages("preempt-bytes") > 0, preempt);
        assert_eq!(entries(dir.path()), ["checkpoint"], "no note is left behind");
        report(
            TABLE,
            &format!(
                "{} {machine}, preempt {preempt}, tcp {tcp}: told to run after {} ms, {} requests, {} asked for, {} in the background, \
                 latency {}",
                version.name(),
                sent["postcopy"]["resume-time"],
                pages("requests"),
                pages("urgent-pages"),
                pages("background-pages"),
                sent["postcopy"]["request-latency-us"],
            ),
        );
    });
}

#[test]
fn a_checkpoint_of_7_2_runs_at_once() {
    a_checkpoint_runs_at_once(Version::V7_2, "pc-i440fx-7.2", false, false);
}

#[test]
fn a_checkpoint_of_7_2_runs_at_once_with_preempt() {
    a_checkpoint_runs_at_once(Version::V7_2, "pc-q35-7.2", true, true);
}

#[test]
fn a_checkpoint_of_10_0_runs_at_once() {
    a_checkpoint_runs_at_once(Version::V10_0, "pc-q35-10.0", false, true);
}

#[test]
fn a_checkpoint_of_10_0_runs_at_once_with_preempt() {
    a_checkpoint_runs_at_once(Version::V10_0, "pc-i440fx-10.0", true, false);
}

#[test]
fn a_checkpoint_of_11_1_runs_at_once() {
    a_checkpoint_runs_at_once(Version::V11_1, "pc-i440fx-11.1", false, false);
}

#[test]
fn a_checkpoint_of_11_1_runs_at_once_with_preempt() {
    a_checkpoint_runs_at_once(Version::V11_1, "pc-q35-11.1", true, true);
}

/// Passes a connection on to `to`, from source to destination in pieces that are `late` each.
fn pass_on(from: TcpStream, to: &str, late: Duration) {
    let to = TcpStream::connect(to).unwrap();
    let (mut back_from, mut back_to) = (to.try_clone().unwrap(), from.try_clone().unwrap());
    thread::spawn(move || {
        let _ = io::copy(&mut back_from, &mut back_to);
        let _ = back_to.shutdown(Shutdown::Both);
    });
    let (mut from, mut to) = (from, to);
    thread::spawn(move || {
        let mut piece = vec![0; 64 << 10];
        while let Ok(len @ 1..) = from.read(&mut piece) {
            thread::sleep(late);
            if to.write_all(&piece[..len]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Both);
    });
}

/// Where the second of two connections is slow: the one for pages that the guest waits for.
fn with_a_slow_preempt_connection(uri: &str, late: Duration) -> String {
    let to = uri.strip_prefix("tcp:").unwrap().to_owned();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for late in [Duration::ZERO, late] {
            let Ok((stream, _)) = listener.accept() else { return };
            pass_on(stream, &to, late);
        }
    });
    format!("tcp:{address}")
}

/// The end of main overtakes the last pages that the guest waits for, on the other connection.
fn a_page_that_is_later_than_the_end_is_not_lost(version: Version, machine: &str) {
    let Some(installed) = Installed::require(version) else { return };
    time_limit(TEST_LIMIT, || {
        let dir = TempDir::new().unwrap();
        let file = dir.join("checkpoint");
        let source = checkpoint(&installed, machine, &file, &dir);
        let (mut destination, uri) = destination(&installed, machine, true, true);
        let uri = with_a_slow_preempt_connection(&uri, Duration::from_millis(1500));
        let sent = send(&file, &uri, true, &[]).done();
        assert!(figure(&sent, "urgent-pages") > 0);
        assert_goes_on(&source, &mut destination);
    });
    report(
        TABLE,
        &format!("{} {machine}: main ends before the last page that was asked for arrives: ok", version.name()),
    );
}

#[test]
fn a_page_that_is_later_than_the_end_is_not_lost_in_7_2() {
    a_page_that_is_later_than_the_end_is_not_lost(Version::V7_2, "pc-i440fx-7.2");
}

#[test]
fn a_page_that_is_later_than_the_end_is_not_lost_in_10_0() {
    a_page_that_is_later_than_the_end_is_not_lost(Version::V10_0, "pc-i440fx-10.0");
}

#[test]
fn a_page_that_is_later_than_the_end_is_not_lost_in_11_1() {
    a_page_that_is_later_than_the_end_is_not_lost(Version::V11_1, "pc-i440fx-11.1");
}
