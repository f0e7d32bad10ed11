//! What happens when a process is cancelled, killed, or not there: the guest runs on in one place, and only in one.

mod common;

use std::{process::Stdio, thread, time::Duration};

use common::{Guest, LIMIT, number};
use rustix::process::Signal;
use serde_json::{Value, json};
use test_support::{TempDir, time_limit};

/// Takes about half a second to send: enough to be in the middle of it.
const SLOW: &str = "--guest process --memory 32MiB --working-set 8MiB --max-bandwidth 50MB/s --channels 3";
const SAME: &str = "--guest process --memory 32MiB --working-set 8MiB";

#[track_caller]
fn begin(source: &Guest, uri: &str) {
    let answer = source.ask("migrate", json!({ "uri": uri })).unwrap();
    assert!(answer.get("return").is_some(), "{answer}");
}

/// Waits until no attempt is under way.
#[track_caller]
fn settled(source: &Guest) -> Value {
    source.wait_for(|status| status["state"] != "outgoing")
}

/// Moves the guest to a new destination, where it has to be whole.
#[track_caller]
fn move_and_check(dir: &TempDir, source: Guest) {
    let (destination, uri) = Guest::incoming(dir.path(), "last", SAME);
    begin(&source, &uri);
    let (exit, report) = source.end();
    assert_eq!((exit, &report["status"]), (0, &json!("completed")), "{report}");
    let finish = json!({ "passes": 2, "within": 100.0 });
    // Also before the destination itself has noticed that the guest is there.
    assert!(destination.ask("x-guest-finish", finish).unwrap().get("return").is_some());
    let (exit, report) = destination.end();
    assert_eq!(exit, 0, "{report}");
    assert_eq!(number(&report, "/guest-errors") + number(&report, "/pages-wrong"), 0.0);
    assert!(number(&report, "/guest-passes-after") >= number(&report, "/guest-passes-before") + 2.0, "{report}");
}

#[test]
fn the_guest_survives_a_destination_killed_at_any_moment_and_moves_at_the_next_attempt() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let start = |attempt: u64| {
            let source = Guest::start(dir.path(), &format!("s{attempt}"), SLOW);
            source.wait_for(|_| true);
            source
        };
        let (mut source, mut survived) = (start(0), 0);
        for attempt in 1..8 {
            let (destination, uri) = Guest::incoming(dir.path(), &format!("d{attempt}"), SAME);
            begin(&source, &uri);
            thread::sleep(Duration::from_millis(attempt * 61));
            destination.kill();
            while source.status().is_some_and(|status| status["state"] == "outgoing") {
                thread::sleep(Duration::from_millis(5));
            }
            let Some(status) = source.status() else {
                // Too late: the destination had confirmed. Then the guest was there and must not be here.
                let (exit, report) = source.end();
                assert_eq!((exit, &report["status"]), (0, &json!("completed")), "{report}");
                source = start(attempt);
                continue;
            };
            assert_eq!(status["state"], "running", "{status}");
            assert_eq!(status["status"], "failed", "{status}");
            source.runs_on();
            survived += 1;
        }
        assert!(survived >= 3, "only {survived} destinations were killed in time");
        move_and_check(&dir, source);
    });
}

#[test]
fn a_destination_whose_source_is_killed_ends_without_a_guest() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let mut in_time = 0;
        for attempt in 0..5 {
            let (destination, uri) = Guest::incoming(dir.path(), &format!("d{attempt}"), SAME);
            let source = Guest::start(dir.path(), &format!("s{attempt}"), SLOW);
            source.wait_for(|_| true);
            begin(&source, &uri);
            thread::sleep(Duration::from_millis(11 + attempt * 71));
            let before = destination.ask("x-guest-status", json!({})).unwrap();
            source.kill();
            if before["return"]["state"] != "incoming" {
                continue;
            }
            let (exit, report) = match destination.ask("x-guest-status", json!({})) {
                // Confirmed in the last moment: then the guest is here, and nowhere else.
                Some(status) if status["return"]["state"] == "running" => continue,
                _ => destination.end(),
            };
            assert_eq!(exit, 1, "{report}");
            assert_eq!(report["status"], "failed");
            assert!(report["error"].is_string() && report.get("guest-passes-after").is_none(), "{report}");
            in_time += 1;
        }
        assert!(in_time >= 2, "only {in_time} sources were killed in time");
    });
}

#[test]
fn an_interrupt_cancels_and_the_source_guest_runs_on() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        for (index, signal) in [Signal::INT, Signal::TERM].into_iter().enumerate() {
            let (destination, uri) = Guest::incoming(dir.path(), &format!("d{index}"), SAME);
            let source = Guest::start(dir.path(), &format!("s{index}"), SLOW);
            source.wait_for(|_| true);
            begin(&source, &uri);
            source.wait_for(|status| status["state"] == "outgoing");
            thread::sleep(Duration::from_millis(60));
            source.signal(signal);
            let status = settled(&source);
            assert_eq!((&status["state"], &status["status"]), (&json!("running"), &json!("cancelled")), "{status}");
            source.runs_on();
            // No migration is under way: the next one ends the process.
            source.signal(signal);
            let (exit, report) = source.end();
            assert_eq!((exit, &report["status"]), (3, &json!("cancelled")), "{report}");
            assert!(number(&report, "/guest-passes-after") > number(&report, "/guest-passes-before"), "{report}");
            assert_eq!(number(&report, "/guest-errors") + number(&report, "/pages-wrong"), 0.0);
            let (exit, report) = destination.end();
            assert_eq!(exit, 1, "{report}");
        }
    });
}

#[test]
fn a_source_without_a_monitor_shows_that_its_guest_runs_on_and_ends() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let (_destination, uri) = Guest::incoming(dir.path(), "d", SAME);
        let mut command = common::multifd(&format!("guest --json {SLOW} --after 100ms --migrate-to {uri}"));
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        thread::sleep(Duration::from_millis(350));
        let pid = rustix::process::Pid::from_raw(child.id() as i32).unwrap();
        rustix::process::kill_process(pid, Signal::INT).unwrap();
        let output = child.wait_with_output().unwrap();
        let report = common::json(&output.stdout);
        assert_eq!(common::exit_code(&output), 3, "{report}");
        assert!(number(&report, "/guest-passes-after") > number(&report, "/guest-passes-before"), "{report}");
    });
}

#[test]
fn an_interrupted_destination_ends_and_the_source_guest_runs_on() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        // While it waits.
        let (destination, _) = Guest::incoming(dir.path(), "waiting", SAME);
        destination.signal(Signal::INT);
        let (exit, report) = destination.end();
        assert_eq!((exit, &report["status"]), (3, &json!("cancelled")), "{report}");
        // In the middle.
        let (destination, uri) = Guest::incoming(dir.path(), "busy", SAME);
        let source = Guest::start(dir.path(), "source", SLOW);
        source.wait_for(|_| true);
        begin(&source, &uri);
        thread::sleep(Duration::from_millis(120));
        destination.signal(Signal::INT);
        let (exit, report) = destination.end();
        assert_eq!((exit, &report["status"]), (3, &json!("cancelled")), "{report}");
        assert_eq!(settled(&source)["state"], "running");
        source.runs_on();
        move_and_check(&dir, source);
    });
}

#[test]
fn the_next_destination_is_tried_when_one_fails() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let (destination, uri) = Guest::incoming(dir.path(), "d", SAME);
        let nobody = dir.join("nobody");
        let targets = format!("--migrate-to unix:{} --migrate-to {uri}", nobody.display());
        let source = Guest::start(dir.path(), "s", &format!("{SAME} --after 0s {targets}"));
        let (exit, report) = source.end();
        assert_eq!((exit, &report["status"]), (0, &json!("completed")), "{report}");
        destination.runs_on();
        assert!(destination.ask("quit", json!({})).unwrap().get("return").is_some());
        assert_eq!(destination.end().0, 0);
    });
}

#[test]
fn a_guest_that_has_come_can_go_on_to_the_next() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let (middle, uri) = Guest::incoming(dir.path(), "middle", SAME);
        let source = Guest::start(dir.path(), "source", SAME);
        source.wait_for(|_| true);
        begin(&source, &uri);
        assert_eq!(source.end().0, 0);
        middle.runs_on();
        move_and_check(&dir, middle);
    });
}

#[test]
fn guests_of_different_sizes_do_not_match_and_the_source_guest_runs_on() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let (destination, uri) = Guest::incoming(dir.path(), "d", "--guest process --memory 16MiB");
        let source = Guest::start(dir.path(), "s", SAME);
        source.wait_for(|_| true);
        begin(&source, &uri);
        let (exit, report) = destination.end();
        assert_eq!(exit, 4, "{report}");
        assert!(report["error"].as_str().unwrap().contains("\"ram\""), "{report}");
        assert_eq!(settled(&source)["state"], "running");
        source.runs_on();
    });
}
