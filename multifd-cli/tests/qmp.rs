//! The monitors of `guest`, `send` and `receive`, driven by clients that know QEMU only: the QMP library of the QEMU project,
//! and the types of the crate `qapi-qmp`.

mod common;

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use common::{Guest, LIMIT, multifd, number, python, user::User};
use multifd_qmp::{
    Client, Error, Status,
    qapi_qmp::{self, MigrationStatus, RunState},
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use test_support::{TempDir, in_ci, skip, time_limit};

const SMALL: &str = "--guest process --memory 32MiB --working-set 4MiB --write-rate 20MB/s";

/// A Python that has `qemu.qmp`; a skip where there is none.
fn python_or_skip() -> Option<PathBuf> {
    match python::with("qemu.qmp==0.0.6", "qemu.qmp") {
        Ok(python) => Some(python),
        Err(reason) if in_ci() => panic!("qemu.qmp cannot be installed from PyPI: {reason}"),
        Err(reason) => {
            skip(&format!("qemu.qmp cannot be installed from PyPI: {reason}"));
            None
        }
    }
}

/// Has `script` drive the processes with these monitors.
fn drive(python: &Path, script: &str, monitors: [PathBuf; 2], place: &str) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(script);
    // Without compiled modules beside the sources.
    let output = Command::new(python).arg("-B").arg(script).args(monitors).arg(place).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.stdout, b"driven by qemu.qmp\n");
}

#[test]
fn the_library_of_the_qemu_project_drives_a_whole_migration() {
    let Some(python) = python_or_skip() else { return };
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let source = Guest::start(dir.path(), "source", SMALL);
        let destination = Guest::start(dir.path(), "destination", &format!("{SMALL} --incoming defer"));
        source.wait_for(|status| number(status, "/passes") > 0.0);
        destination.wait_for(|status| status["state"] == "incoming");
        let uri = format!("unix:{}", dir.join("migration").display());
        drive(&python, "qmp_client.py", [dir.join("source"), dir.join("destination")], &uri);
        for (guest, moved) in [(source, true), (destination, false)] {
            let (exit, report) = guest.end();
            assert_eq!((exit, &report["status"]), (0, &json!("completed")), "{report}");
            assert!(moved || number(&report, "/guest-errors") + number(&report, "/pages-wrong") == 0.0, "{report}");
        }
    });
}

fn connect(dir: &TempDir, name: &str) -> Client {
    let deadline = Instant::now() + LIMIT;
    loop {
        match Client::connect(&dir.join(name)) {
            Ok(client) => return client,
            Err(Error::Connect { .. }) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(10)),
            Err(error) => panic!("{error}"),
        }
    }
}

/// Waits for the event `name`, with this status if it has one; returns the names of all events until then.
fn wait_event(client: &mut Client, name: &str, status: Option<&str>) -> Vec<String> {
    let mut seen = Vec::new();
    loop {
        let event = client.next_event(LIMIT).unwrap_or_else(|error| panic!("{error} after {seen:?}"));
        let text = event.data["status"].as_str().map_or(event.name.clone(), |text| format!("{} {text}", event.name));
        seen.push(text);
        if event.name == name && status.is_none_or(|status| event.data["status"] == status) {
            return seen;
        }
    }
}

#[test]
fn the_types_of_qapi_take_every_answer_of_a_migration() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let source_guest = Guest::start(dir.path(), "source", SMALL);
        let destination_guest = Guest::start(dir.path(), "destination", &format!("{SMALL} --incoming defer"));
        let (mut source, mut destination) = (connect(&dir, "source"), connect(&dir, "destination"));
        assert_eq!(source.run(qapi_qmp::query_status {}).unwrap().status, RunState::running);
        assert_eq!(destination.run(qapi_qmp::query_status {}).unwrap().status, RunState::inmigrate);
        assert!(source.run(qapi_qmp::query_migrate {}).unwrap().status.is_none());
        let parameters = source.run(qapi_qmp::query_migrate_parameters {}).unwrap();
        // QEMU's defaults, in QEMU's units.
        assert_eq!((parameters.multifd_channels, parameters.downtime_limit), (Some(2), Some(300)));
        assert_eq!(parameters.max_bandwidth, Some(128 << 20));
        assert_eq!(source.run(qapi_qmp::query_migrate_capabilities {}).unwrap().len(), 22);
        assert!(source.run(qapi_qmp::query_version {}).unwrap().package.starts_with("multifd "));
        source.run(qapi_qmp::query_commands {}).unwrap();

        let path = dir.join("migration").display().to_string();
        let address = json!([{ "channel-type": "main",
            "addr": { "transport": "socket", "type": "unix", "path": path } }]);
        destination.execute("migrate-incoming", json!({ "channels": address })).unwrap();
        let listening = destination.run(qapi_qmp::query_migrate {}).unwrap();
        assert_eq!(listening.status, Some(MigrationStatus::setup));
        assert_eq!(listening.socket_address.map(|addresses| addresses.len()), Some(1));
        source.execute("migrate-set-parameters", json!({ "max-bandwidth": 4 << 20, "multifd-channels": 5 })).unwrap();
        source.execute("migrate", json!({ "uri": format!("unix:{path}") })).unwrap();
        wait_event(&mut source, "MIGRATION", Some("active"));
        let active = source.run(qapi_qmp::query_migrate {}).unwrap();
        assert_eq!(active.status, Some(MigrationStatus::active));
        assert!(active.ram.unwrap().total >= 32 << 20 && active.expected_downtime.is_some());
        // Everything but a new migration goes on, and the limits change at once.
        assert!(source.execute("migrate", json!({ "uri": "unix:other" })).is_err());
        assert!(source.execute("migrate-set-capabilities", json!({ "capabilities": [] })).is_err());
        source.execute("migrate-set-parameters", json!({ "max-bandwidth": 0 })).unwrap();
        let mut seen = wait_event(&mut source, "MIGRATION", Some("completed"));
        seen.retain(|event| event != "MIGRATION_PASS");
        assert_eq!(seen, ["STOP", "MIGRATION device", "MIGRATION completed"]);
        let arrived = wait_event(&mut destination, "RESUME", None);
        assert_eq!(arrived.first().map(String::as_str), Some("MIGRATION setup"));
        assert!(arrived.contains(&"MIGRATION completed".to_owned()), "{arrived:?}");

        let done = source.run(qapi_qmp::query_migrate {}).unwrap();
        assert_eq!(done.status, Some(MigrationStatus::completed));
        let ram = done.ram.unwrap();
        assert!(done.downtime.is_some() && ram.multifd_bytes > 0 && ram.dirty_sync_count >= 2, "{ram:?}");
        assert_eq!(source.run(qapi_qmp::query_status {}).unwrap().status, RunState::postmigrate);
        assert!(source.cont().is_err(), "the guest has left");
        assert_eq!(destination.run(qapi_qmp::query_migrate {}).unwrap().status, Some(MigrationStatus::completed));
        // The process stays for its client, and no longer.
        drop(source);
        let (exit, report) = source_guest.end();
        assert_eq!((exit, &report["channels"]), (0, &json!(5)), "{report}");
        destination.quit().unwrap();
        assert_eq!(destination_guest.end().0, 0);
    });
}

#[test]
fn a_migration_is_cancelled_and_the_guest_runs_on() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let guest = Guest::start(dir.path(), "source", SMALL);
        let (destination, uri) = Guest::incoming(dir.path(), "destination", SMALL);
        let mut source = connect(&dir, "source");
        // Without effect, as in QEMU.
        source.migrate_cancel().unwrap();
        source.execute("migrate-set-parameters", json!({ "max-bandwidth": 1 << 20 })).unwrap();
        source.migrate(&uri).unwrap();
        wait_event(&mut source, "MIGRATION", Some("active"));
        assert!(source.stop().is_err() && source.quit().is_err(), "a migration has the guest");
        source.migrate_cancel().unwrap();
        let seen = wait_event(&mut source, "MIGRATION", Some("cancelled"));
        assert!(seen.contains(&"MIGRATION cancelling".to_owned()), "{seen:?}");
        assert_eq!(source.run(qapi_qmp::query_migrate {}).unwrap().status, Some(MigrationStatus::cancelled));
        assert_eq!(source.run_state().unwrap(), "running");
        guest.runs_on();
        assert_ne!(destination.end().0, 0);

        source.stop().unwrap();
        source.stop().unwrap();
        let paused = guest.wait_for(|status| status["state"] == "stopped");
        let error = source.migrate("unix:nowhere").unwrap_err().to_string();
        assert!(error.contains("expected cont"), "{error}");
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(guest.wait_for(|_| true)["pages-written"], paused["pages-written"]);
        source.cont().unwrap();
        guest.runs_on();
        source.quit().unwrap();
        let (exit, report) = guest.end();
        // That the migration was cancelled is what became of it.
        assert_eq!((exit, number(&report, "/guest-errors") + number(&report, "/pages-wrong")), (3, 0.0), "{report}");
    });
}

#[test]
fn a_guest_that_cannot_leave_says_why_in_the_answer() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let guest = Guest::start(dir.path(), "source", &format!("{SMALL} --connect-timeout 100ms"));
        let mut source = connect(&dir, "source");
        source.migrate(&format!("unix:{}", dir.join("nowhere").display())).unwrap();
        wait_event(&mut source, "MIGRATION", Some("failed"));
        let failed = source.run(qapi_qmp::query_migrate {}).unwrap();
        assert!(failed.error_desc.unwrap().contains("No such file"));
        guest.runs_on();
        source.quit().unwrap();
        // The guest is whole; that it could not leave was a failure all the same.
        assert_eq!(guest.end().1["pages-wrong"], 0);
    });
}

#[test]
fn a_checkpoint_under_way_is_looked_at_steered_and_cancelled() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let at = |name: &str| dir.join(name).display().to_string();
        let receive = |name: &str| {
            let (file, uri, monitor) = (at(name), at("receive"), at("receive-qmp"));
            let args = format!("receive unix:{uri} --output {file} --qmp unix:{monitor} --json -q");
            multifd(&args).stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::null()).spawn().unwrap()
        };
        let receiver = receive("first");
        let mut monitor = connect(&dir, "receive-qmp");
        assert_eq!(monitor.run_state().unwrap(), "inmigrate");
        let source = Guest::start(dir.path(), "source", SMALL);
        source.wait_for(|_| true);
        source.ask("migrate", json!({ "uri": format!("unix:{}", at("receive")) })).unwrap();
        wait_event(&mut monitor, "MIGRATION", Some("completed"));
        assert_eq!(monitor.run(qapi_qmp::query_migrate {}).unwrap().status, Some(MigrationStatus::completed));
        assert!(monitor.cont().is_err(), "there is no guest that runs");
        drop(monitor);
        assert!(receiver.wait_with_output().unwrap().status.success());
        assert_eq!(source.end().0, 0);

        // It is sent on, and both ends are cancelled.
        let receiver = receive("second");
        let mut of_receiver = connect(&dir, "receive-qmp");
        let send = |more: &str| {
            let args =
                format!("send {} unix:{} --qmp unix:{} --json -q {more}", at("first"), at("receive"), at("send-qmp"));
            multifd(&args).stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::null()).spawn().unwrap()
        };
        let sender = send("--max-bandwidth 1MB/s");
        let mut of_sender = connect(&dir, "send-qmp");
        of_sender.wait_migration(&[Status::Active], LIMIT).unwrap();
        let parameters = of_sender.run(qapi_qmp::query_migrate_parameters {}).unwrap();
        assert_eq!((parameters.max_bandwidth, parameters.multifd_channels), (Some(1_000_000), Some(4)));
        of_sender.migrate_cancel().unwrap();
        wait_event(&mut of_sender, "MIGRATION", Some("cancelled"));
        drop(of_sender);
        assert_eq!(sender.wait_with_output().unwrap().status.code(), Some(3));
        wait_event(&mut of_receiver, "MIGRATION", Some("failed"));
        drop(of_receiver);
        assert_ne!(receiver.wait_with_output().unwrap().status.code(), Some(0));
        assert!(!dir.join("second").exists());

        // Faster on demand, and then to the end.
        let receiver = receive("third");
        let _waits = connect(&dir, "receive-qmp");
        let sender = send("--max-bandwidth 100kB/s");
        let mut of_sender = connect(&dir, "send-qmp");
        of_sender.wait_migration(&[Status::Active], LIMIT).unwrap();
        of_sender.execute("migrate-set-parameters", json!({ "max-bandwidth": 0 })).unwrap();
        wait_event(&mut of_sender, "MIGRATION", Some("completed"));
        drop(of_sender);
        assert!(sender.wait_with_output().unwrap().status.success());
        assert!(receiver.wait_with_output().unwrap().status.success());
        assert!(dir.join("third").exists());
        // The one that waits is told to end.
        let receiver = receive("fourth");
        connect(&dir, "receive-qmp").quit().unwrap();
        assert_eq!(receiver.wait_with_output().unwrap().status.code(), Some(3));
    });
}

/// Starts `multifd receive defer`, with its monitor in `dir`.
fn deferred(dir: &TempDir) -> Child {
    let at = |name: &str| dir.join(name).display().to_string();
    let args = format!("receive defer --output {} --qmp unix:{} --json -q", at("checkpoint"), at("receive-qmp"));
    multifd(&args).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap()
}

#[test]
fn the_library_of_the_qemu_project_has_a_deferred_receive_take_a_guest() {
    let Some(python) = python_or_skip() else { return };
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let source = Guest::start(dir.path(), "source", SMALL);
        let receiver = deferred(&dir);
        source.wait_for(|status| number(status, "/passes") > 0.0);
        connect(&dir, "receive-qmp");
        let place = dir.join("migration").display().to_string();
        drive(&python, "qmp_defer.py", [dir.join("source"), dir.join("receive-qmp")], &place);
        assert_eq!(source.end().0, 0);
        let output = receiver.wait_with_output().unwrap();
        let report = common::json(&output.stdout);
        assert_eq!((output.status.code(), &report["mode"]), (Some(0), &json!("live")), "{report}");
        assert!(dir.join("checkpoint").exists());
    });
}

#[test]
fn a_deferred_receive_reads_what_its_client_names_and_says_what_was_wrong_with_it() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        // A file is a place, too.
        fs::write(dir.join("file"), [b"QEVM".as_slice(), &[0xff; 64]].concat()).unwrap();
        let receiver = deferred(&dir);
        let mut monitor = connect(&dir, "receive-qmp");
        assert_eq!(monitor.run_state().unwrap(), "inmigrate");
        let path = dir.join("file").display().to_string();
        let address = |offset: i64| json!([{ "channel-type": "main", "addr": { "transport": "file", "filename": path, "offset": offset } }]);
        assert!(monitor.execute("migrate-incoming", json!({ "channels": address(-1) })).is_err());
        monitor.execute("migrate-incoming", json!({ "channels": address(0), "exit-on-error": false })).unwrap();
        wait_event(&mut monitor, "MIGRATION", Some("failed"));
        let failed = monitor.run(qapi_qmp::query_migrate {}).unwrap();
        assert_eq!(failed.status, Some(MigrationStatus::failed));
        assert!(failed.error_desc.unwrap().contains("main, at byte"));
        let again = monitor.execute("migrate-incoming", json!({ "uri": "fd:0" })).unwrap_err().to_string();
        assert!(again.contains("already been started"), "{again}");
        // It stays until it is told to end, or its clients have gone.
        monitor.quit().unwrap();
        assert_eq!(receiver.wait_with_output().unwrap().status.code(), Some(4));
        assert!(!dir.join("checkpoint").exists());

        for end in ["quit", "interrupt"] {
            let receiver = deferred(&dir);
            let mut monitor = connect(&dir, "receive-qmp");
            match end {
                "quit" => monitor.quit().unwrap(),
                _ => kill_process(Pid::from_child(&receiver), Signal::TERM).unwrap(),
            }
            let output = receiver.wait_with_output().unwrap();
            let report = common::json(&output.stdout);
            assert_eq!((output.status.code(), &report["status"]), (Some(3), &json!("cancelled")), "{end}: {report}");
        }
    });
}

#[test]
fn only_the_owner_of_a_monitor_may_connect() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let guest = Guest::start(dir.path(), "source", SMALL);
        guest.wait_for(|_| true);
        let path = dir.join("source");
        assert_eq!(fs::symlink_metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        // By another way than the file's rights, which a bind mount might have opened.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).unwrap();
        let Some(user) = User::new(&dir) else { return };
        let (monitor, file) = (format!("unix:{}", path.display()), dir.join("checkpoint").display().to_string());
        let mut command = user.command(env!("CARGO_BIN_EXE_multifd"));
        let output = command.args(["checkpoint", &monitor, "--output", &file]).output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && error.contains("closed during greeting"), "{error}");
        guest.runs_on();
    });
}

#[test]
fn what_is_deferred_needs_a_monitor() {
    for args in ["guest --incoming defer --json", "receive defer --output /nonesuch/file --json"] {
        let output = time_limit(LIMIT, || common::run(args));
        assert_eq!(output.status.code(), Some(2));
        let report: Value = common::json(&output.stdout);
        assert!(report["error"].as_str().unwrap().contains("--qmp unix:PATH"), "{report}");
    }
}
