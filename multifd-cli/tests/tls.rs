//! TLS as operators use it: certificates of `tls-init`, whole migrations, and what is said where the two ends do not fit.

mod common;

use std::{path::Path, thread, time::Duration};

use common::{Guest, LIMIT, exit_code, json, number, run};
use test_support::{TempDir, time_limit};

const SMALL: &str = "--guest process --memory 4MiB --write-rate 10MB/s";

fn certificates(dir: &TempDir, name: &str) -> String {
    let path = dir.join(name).display().to_string();
    let made = run(&format!("tls-init {path} --host 127.0.0.1 --host guests.example --json"));
    assert_eq!(exit_code(&made), 0, "{made:?}");
    assert_eq!(json(&made.stdout)["hosts"], serde_json::json!(["127.0.0.1", "guests.example"]));
    path
}

/// What a guest says that could not be migrated with `args`: it runs on here, and ends with `status`.
fn fails(status: i32, args: &str) -> String {
    let output = run(&format!("guest {SMALL} --after 1ms --run-for 1ms --json {args}"));
    assert_eq!(exit_code(&output), status, "{output:?}");
    json(&output.stdout)["error"].as_str().unwrap().to_owned()
}

#[track_caller]
fn assert_says(message: &str, expected: &str) {
    assert!(message.contains(expected), "{message:?} does not say {expected:?}");
}

/// Waits until `guest` has said `expected`.
fn logs(guest: &Guest, expected: &str) {
    while !guest.stderr().contains(expected) {
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_guest_moves_with_tls() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let tls = certificates(&dir, "tls");
        for transport in ["tcp", "unix --tls-hostname guests.example"] {
            let output = run(&format!("demo {SMALL} --after 10ms --json --tls-dir {tls} --transport {transport}"));
            assert_eq!(exit_code(&output), 0, "{output:?}");
            assert_eq!(number(&json(&output.stdout), "/verified/pages-different"), 0.0);
        }
    });
}

#[test]
fn a_guest_that_is_refused_runs_on_and_the_next_is_taken() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let (tls, other) = (certificates(&dir, "tls"), certificates(&dir, "other"));
        let args = format!("--incoming tcp:127.0.0.1:0 --run-for 1ms --tls-dir {tls} {SMALL}");
        let destination = Guest::start(dir.path(), "qmp", &args);
        let to = format!("--migrate-to {}", destination.listening());
        assert_says(&fails(4, &to), "the destination speaks TLS, and this source does not");
        assert_says(&fails(1, &format!("{to} --tls-dir {other}")), "is not of the CA in ca-cert.pem here");
        let wrong = fails(1, &format!("{to} --tls-dir {tls} --tls-hostname wrong.example"));
        assert_says(&wrong, "is not for wrong.example, but for 127.0.0.1, guests.example");
        let moved = run(&format!("guest {SMALL} --after 1ms {to} --json --tls-dir {tls}"));
        assert_eq!(exit_code(&moved), 0, "{moved:?}");
        logs(&destination, "the source migrates without TLS, and this destination requires it");
        logs(&destination, "the source ends it: the certificate of this end is not of a CA that it trusts");
    });
}

#[test]
fn a_source_with_tls_says_that_its_destination_has_none() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let tls = certificates(&dir, "tls");
        let (destination, uri) = Guest::incoming(dir.path(), "plain", SMALL);
        let message = fails(1, &format!("--migrate-to {uri} --tls-dir {tls} --tls-hostname guests.example"));
        assert_says(&message, "does the destination have TLS on?");
        logs(&destination, "speaks TLS; a source with TLS needs a destination with TLS");
        assert_says(&fails(1, &format!("--migrate-to {uri} --tls-dir {tls}")), "--tls-hostname says for which one");
    });
}

#[test]
fn options_of_tls_that_make_no_sense_are_refused() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let file = |name: &str| dir.join(name).display().to_string();
        for (args, status, expected) in [
            (format!("receive - --output {} --tls-dir {}", file("out"), file("tls")), 2, "--tls-dir"),
            (format!("receive tcp:127.0.0.1:0 --output {} --tls-hostname x", file("out")), 2, "--tls-dir"),
            (
                format!("checkpoint unix:{} --output {} --tls-dir {}", file("q"), file("out"), file("tls")),
                2,
                "--listen",
            ),
            (format!("receive tcp:127.0.0.1:0 --output {} --tls-dir {}", file("out"), file("tls")), 1, "ca-cert.pem"),
        ] {
            let output = run(&args);
            assert_eq!(exit_code(&output), status, "{args}: {output:?}");
            assert_says(&String::from_utf8_lossy(&output.stderr), expected);
        }
        assert!(!Path::new(&file("out")).exists());
    });
}
