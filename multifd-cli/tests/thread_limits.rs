//! A limit on threads is reached at each thread in turn: the guest runs on where it was, and can be moved once there is room.

mod common;

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    time::{Duration, Instant},
};

use common::{
    Guest, LIMIT,
    client::Client,
    user::{User, address_space},
};
use serde_json::json;
use test_support::{TempDir, time_limit};

const SAME: &str = "--guest process --memory 8MiB --working-set 2MiB --channels 3";
const CHANNELS: usize = 3;

/// The process ended with a panic, and the guest with it.
#[test]
fn the_guest_survives_a_source_without_threads_and_moves_once_there_are_some() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let Some(user) = User::new(&dir) else { return };
        let source = Guest::start_by(user.guest(), dir.path(), "source", SAME);
        let mut client = Client::new(&dir.path().join("source"));
        client.runs_on();
        // The thread of the migration, the return path, the channels.
        let needed = 2 + CHANNELS;
        for more in 0..needed {
            let (destination, uri) = Guest::incoming(dir.path(), &format!("d{more}"), SAME);
            fs::set_permissions(dir.path().join(format!("d{more}.socket")), fs::Permissions::from_mode(0o777)).unwrap();
            user.allow(source.pid(), more);
            assert!(client.ask("migrate", json!({ "uri": uri })).get("return").is_some());
            let status = client.settled();
            assert_eq!((&status["state"], &status["status"]), (&json!("running"), &json!("failed")), "{status}");
            let error = status["error"].as_str().unwrap();
            assert!(error.starts_with("cannot create the thread that "), "{more} threads: {error}");
            client.runs_on();
            destination.kill();
        }
        user.allow(source.pid(), 100);
        let (destination, uri) = Guest::incoming(dir.path(), "last", SAME);
        fs::set_permissions(dir.path().join("last.socket"), fs::Permissions::from_mode(0o777)).unwrap();
        assert!(client.ask("migrate", json!({ "uri": uri })).get("return").is_some());
        // The source stays for its client.
        drop(client);
        let (exit, report) = source.end();
        assert_eq!((exit, &report["status"]), (0, &json!("completed")), "{report}");
        destination.runs_on();
    });
}

/// A new thread got its stack and not what it needs besides, and ended the process, guest and all.
#[test]
fn the_guest_survives_a_source_without_memory_for_its_threads() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let Some(user) = User::new(&dir) else { return };
        let source = Guest::start_by(user.guest(), dir.path(), "source", SAME);
        let mut client = Client::new(&dir.path().join("source"));
        client.runs_on();
        let (destination, uri) = Guest::incoming(dir.path(), "there", SAME);
        fs::set_permissions(dir.path().join("there.socket"), fs::Permissions::from_mode(0o777)).unwrap();
        // Less than a stack, and room for one or two of them.
        for kib in (0..20).map(|step| step * 256) {
            let used = address_space(source.pid());
            user.limit(source.pid(), &format!("--as={}:", used + (kib << 10)));
            assert!(client.ask("migrate", json!({ "uri": uri })).get("return").is_some());
            let status = client.settled();
            assert_eq!((&status["state"], &status["status"]), (&json!("running"), &json!("failed")), "{status}");
            let error = status["error"].as_str().unwrap();
            assert!(error.starts_with("cannot create the thread that "), "{kib} KiB: {error}");
            client.runs_on();
        }
        destination.kill();
    });
}

#[test]
fn the_guest_stays_at_the_source_when_the_destination_gets_no_threads() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let source = Guest::start(dir.path(), "source", SAME);
        source.wait_for(|_| true);
        // One for each channel; the others exist when it listens, and the one that finds out which is main ends there.
        for more in 0..CHANNELS {
            let Some(user) = User::new(&dir) else { return };
            let uri = format!("unix:{}", dir.path().join(format!("d{more}.socket")).display());
            let mut command = user.guest();
            command.args(["--incoming", &uri]);
            let destination = Guest::start_by(command, dir.path(), &format!("d{more}"), SAME);
            assert_eq!(destination.listening(), uri);
            // It listens before the threads are made that serve the listener and the monitor.
            let mut client = Client::new(&dir.path().join(format!("d{more}")));
            let deadline = Instant::now() + LIMIT;
            let accepts = || {
                let tasks = fs::read_dir(format!("/proc/{}/task", destination.pid().as_raw_nonzero())).unwrap();
                let mut names =
                    tasks.flatten().map(|task| fs::read_to_string(task.path().join("comm")).unwrap_or_default());
                names.any(|name| name.trim_end() == "multifd-accept")
            };
            while !accepts() {
                assert!(Instant::now() < deadline, "{}", client.status());
                std::thread::sleep(Duration::from_millis(5));
            }
            assert_eq!(client.status()["state"], "incoming");
            user.allow(destination.pid(), more);
            assert!(source.ask("migrate", json!({ "uri": uri })).unwrap().get("return").is_some());
            let status = source.wait_for(|status| status["state"] != "outgoing");
            assert_eq!((&status["state"], &status["status"]), (&json!("running"), &json!("failed")), "{status}");
            source.runs_on();
            let (exit, report) = destination.end();
            let error = report["error"].as_str().unwrap_or_default();
            assert!(exit != 0 && error.starts_with("cannot create the thread that "), "{exit}: {report}");
        }
    });
}
