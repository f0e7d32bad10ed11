//! Postcopy that QMP clients pause and have go on elsewhere, by the commands of QEMU: `migrate-pause`, `migrate-recover`, and `migrate`
//! with `resume`.

use std::{
    thread,
    time::{Duration, Instant},
};

use multifd_qmp::Client;
use qemu_peer::{Installed, Version};
use serde_json::{Value, json};
use test_support::{TempDir, time_limit};

use crate::{
    harness::{LIMIT, Multifd, TEST_LIMIT, assert_goes_on, assert_same_memory, receive_uri},
    postcopy::{checkpoint, figure, send},
    recovery::{Recoverable, monitor_of, told_until},
    switched::{SOURCES, send_pages_slowly, wait_status},
};

/// Asserts that the command is refused, by QEMU's class and in these words.
fn refused(monitor: &mut Client, command: &str, arguments: Value, words: &str) {
    let error = monitor.execute(command, arguments).unwrap_err().to_string();
    assert_eq!(error, format!("{command}: GenericError: {words}"));
}

/// Waits until `query-migrate` says `status`.
fn wait_until(monitor: &mut Client, status: &str) {
    let deadline = Instant::now() + LIMIT;
    loop {
        let answer = monitor.execute("query-migrate", json!({})).unwrap();
        if answer["status"] == status {
            return;
        }
        assert!(Instant::now() < deadline, "{status} awaited: {answer}");
        thread::sleep(Duration::from_millis(10));
    }
}

const NOT_TO_PAUSE: &str = "migrate-pause is currently only supported during postcopy-active or postcopy-recover state";
const NOT_PAUSED: &str = "Migrate recover can only be run when postcopy is paused.";
const NOTHING_TO_RESUME: &str = "Cannot resume if there is no paused migration";

/// A postcopy could not be paused, its limits could not be changed, and it went on at the address of its command line only.
#[test]
fn a_client_pauses_a_postcopy_and_has_it_go_on_at_another_address() {
    let Some(installed) = Installed::require(Version::V10_0) else { return };
    time_limit(TEST_LIMIT, || {
        let dir = TempDir::new().unwrap();
        let file = dir.join("checkpoint");
        let source = checkpoint(&installed, "pc-i440fx-10.0", &file, &dir);
        let (mut destination, uri) = Recoverable::start(&installed, "pc-i440fx-10.0", false, &dir);
        let qmp = format!("--qmp=unix:{}", dir.join("qmp").display());
        // As good as no page comes by itself.
        let sending = send(&file, &uri, false, &[&qmp, "--max-bandwidth=1B/s", "--stall-timeout=0"]);
        let mut monitor = monitor_of(&dir.join("qmp"));
        // A client that comes late is told of no event that was before.
        wait_until(&mut monitor, "postcopy-active");
        // A QEMU that loses its source before it runs the guest has another end.
        destination.qemu.wait_passes(1, LIMIT).unwrap();
        let elsewhere = json!({ "uri": "unix:/nonesuch/socket", "resume": true });
        refused(&mut monitor, "migrate", elsewhere.clone(), NOTHING_TO_RESUME);
        refused(&mut monitor, "migrate", json!({ "uri": uri }), "There's a migration process in progress");
        refused(&mut monitor, "migrate-recover", json!({ "uri": uri }), NOT_PAUSED);
        monitor.execute_out_of_band("migrate-pause", json!({})).unwrap();
        told_until(&mut monitor, "postcopy-paused");
        refused(&mut monitor, "migrate-pause", json!({}), NOT_TO_PAUSE);
        // A place at which no destination listens is no end: the next one may be right.
        monitor.execute("migrate", elsewhere).unwrap();
        monitor.execute("migrate-set-parameters", json!({ "max-bandwidth": 0, "max-postcopy-bandwidth": 0 })).unwrap();
        let uri = destination.listens_again().listens();
        monitor.execute("migrate", json!({ "uri": uri, "resume": true })).unwrap();
        let told = told_until(&mut monitor, "completed");
        assert_eq!(told, ["postcopy-recover-setup", "postcopy-recover", "postcopy-active", "completed"]);
        drop(monitor);
        assert!(figure(&sending.done(), "recoveries") >= 1);
        assert_goes_on(&source, &mut destination.qemu);
    });
}

/// A `multifd receive` with `more` and a monitor, its URI, and the monitor.
fn receives(dir: &TempDir, more: &[&str]) -> (Multifd, String, Client) {
    let qmp = format!("--qmp=unix:{}", dir.join("qmp").display());
    let more = [more, &[&qmp]].concat();
    let (receive, uri) = Multifd::receive(&receive_uri(dir.path(), false), &dir.join("checkpoint"), &more);
    (receive, uri, monitor_of(&dir.join("qmp")))
}

/// A destination whose source has switched listened where it was started, whatever became of that network.
#[test]
fn a_client_has_the_source_of_a_postcopy_come_back_to_another_address() {
    let source = SOURCES[2];
    let Some(installed) = Installed::require(source.version) else { return };
    time_limit(TEST_LIMIT, || {
        let dir = TempDir::new().unwrap();
        let mut qemu = source.start(&installed);
        let (receive, uri, mut monitor) = receives(&dir, &["--digest", "--recover-timeout=10min"]);
        refused(&mut monitor, "migrate-pause", json!({}), NOT_TO_PAUSE);
        send_pages_slowly(&mut qemu, &uri);
        let again = format!("unix:{}", dir.join("again").display());
        refused(&mut monitor, "migrate-recover", json!({ "uri": again }), NOT_PAUSED);
        monitor.execute_out_of_band("migrate-pause", json!({})).unwrap();
        told_until(&mut monitor, "postcopy-paused");
        wait_status(&mut qemu, "postcopy-paused");
        refused(&mut monitor, "migrate", json!({ "uri": again, "resume": true }), NOTHING_TO_RESUME);
        monitor.execute_out_of_band("migrate-recover", json!({ "uri": again })).unwrap();
        let address = &monitor.execute("query-migrate", json!({})).unwrap()["socket-address"][0];
        assert_eq!(address["path"], dir.join("again").display().to_string());
        qemu.qmp().execute("migrate", json!({ "uri": again, "resume": true })).unwrap();
        qemu.qmp().set_parameters(&[("max-postcopy-bandwidth", json!(0))]).unwrap();
        let told = told_until(&mut monitor, "completed");
        assert_eq!(told, ["postcopy-recover", "postcopy-active", "completed"]);
        drop(monitor);
        let received = receive.done();
        assert_eq!((&received["mode"], &received["recoveries"]), (&"postcopy".into(), &1.into()));
        assert_same_memory(&mut qemu, &received);
    });
}

/// A source that would not be waited for is not paused: its VM would be in two halves.
#[test]
fn a_client_cannot_pause_a_destination_that_does_not_wait() {
    let source = SOURCES[2];
    let Some(installed) = Installed::require(source.version) else { return };
    time_limit(TEST_LIMIT, || {
        let dir = TempDir::new().unwrap();
        let mut qemu = source.start(&installed);
        let (receive, uri, mut monitor) = receives(&dir, &[]);
        send_pages_slowly(&mut qemu, &uri);
        let error = monitor.execute("migrate-pause", json!({})).unwrap_err().to_string();
        assert!(error.contains("GenericError") && error.contains("--recover-timeout"), "{error}");
        qemu.qmp().set_parameters(&[("max-postcopy-bandwidth", json!(0))]).unwrap();
        assert_eq!(told_until(&mut monitor, "completed").last().unwrap(), "completed");
        drop(monitor);
        assert_eq!(receive.done()["recoveries"], 0);
    });
}
