//! `multifd serve`: real QEMUs that get their VM through a connection that was passed on to them.

use std::{
    fs,
    net::TcpStream,
    os::fd::{AsRawFd, OwnedFd},
    os::unix::net::UnixStream,
    path::Path,
    thread,
};

use qemu_peer::{Installed, Qemu, Version};
use rustix::{
    io::{FdFlags, fcntl_setfd},
    process::Signal,
};
use serde_json::{Value, json};
use test_support::{TempDir, report, time_limit};

use crate::{
    harness::{LIMIT, MIB, Multifd, TEST_LIMIT, assert_goes_on, entries, vm},
    postcopy::{checkpoint, figure},
    recovery::Recoverable,
    tls::{certificates, encrypt},
};

const TABLE: &str = "serve";

/// A server of `file`, and where it listens.
fn serve(file: &Path, dir: &TempDir, tcp: bool, more: &[&str]) -> (Multifd, String) {
    let uri = if tcp { "tcp:127.0.0.1:0".to_owned() } else { format!("unix:{}/serve", dir.path().display()) };
    let file = file.display().to_string();
    let mut server = Multifd::start(["serve", &file, "--listen", &uri].iter().chain(more));
    let uri = server.wait_line("listening on ");
    (server, uri)
}

fn connect(uri: &str) -> OwnedFd {
    match uri.split_once(':').unwrap() {
        ("tcp", address) => TcpStream::connect(address).unwrap().into(),
        (_, path) => UnixStream::connect(path).unwrap().into(),
    }
}

/// A QEMU that gets its VM through a new connection to `uri`.
fn client(installed: &Installed, machine: &str, uri: &str) -> Qemu {
    pass_on(connect(uri), |from| {
        let mut qemu = vm(installed, machine).incoming().start().unwrap();
        qemu.qmp().set_capabilities(&[("postcopy-ram", true)]).unwrap();
        qemu.qmp().migrate_incoming(from).unwrap();
        qemu
    })
}

/// What `start` makes of the connection `socket`, which the QEMU that it starts inherits; it is given the URI.
fn pass_on<T>(socket: OwnedFd, start: impl FnOnce(&str) -> T) -> T {
    fcntl_setfd(&socket, FdFlags::empty()).unwrap();
    start(&format!("fd:{}", socket.as_raw_fd()))
}

/// The end of a server: the reports of its clients, by their numbers.
fn ended(server: Multifd, status: i32) -> Vec<Value> {
    let (exit, text, log) = server.end_as_text();
    let mut reports: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    reports.sort_by_key(|report| report["client"].as_u64());
    assert_eq!(exit.code(), Some(status), "{reports:?}\n{log}");
    reports
}

fn a_vm_comes_through_a_connection_that_was_passed_on(version: Version, machine: &str, tcp: bool) {
    let Some(installed) = Installed::require(version) else { return };
    time_limit(TEST_LIMIT, || {
        let dir = TempDir::new().unwrap();
        let file = dir.join("checkpoint");
        let source = checkpoint(&installed, machine, &file, &dir);
        let (server, uri) = serve(&file, &dir, tcp, &["--clients=1"]);
        let mut qemu = client(&installed, machine, &uri);
        assert_goes_on(&source, &mut qemu);
        let reports = ended(server, 0);
        assert_eq!(reports.len(), 1);
        assert_eq!((&reports[0]["status"], &reports[0]["client"]), (&json!("completed"), &json!(1)));
        assert_eq!(entries(dir.path()), ["checkpoint"], "no note is left behind");
    });
}

#[test]
fn a_vm_comes_to_7_2_through_a_connection_that_was_passed_on() {
    a_vm_comes_through_a_connection_that_was_passed_on(Version::V7_2, "pc-i440fx-7.2", true);
}

#[test]
fn a_vm_comes_to_10_0_through_a_connection_that_was_passed_on() {
    a_vm_comes_through_a_connection_that_was_passed_on(Version::V10_0, "pc-q35-10.0", false);
}

#[test]
fn a_vm_comes_to_11_1_through_a_connection_that_was_passed_on() {
    a_vm_comes_through_a_connection_that_was_passed_on(Version::V11_1, "pc-i440fx-11.1", true);
}

/// The QEMU is the server of TLS although it did not open the connection.
#[test]
fn clones_come_through_encrypted_connections() {
    for (version, machine) in
        [(Version::V7_2, "pc-i440fx-7.2"), (Version::V10_0, "pc-q35-10.0"), (Version::V11_1, "pc-i440fx-11.1")]
    {
        let Some(installed) = Installed::require(version) else { continue };
        time_limit(TEST_LIMIT, || {
            let dir = TempDir::new().unwrap();
            let kept = TempDir::new().unwrap();
            let file = dir.join("checkpoint");
            let source = checkpoint(&installed, machine, &file, &dir);
            let (ours, other) = (certificates(&kept, "ours", "127.0.0.1"), certificates(&kept, "other", "127.0.0.1"));
            let tls_dir = format!("--tls-dir={}", ours.display());
            let (server, uri) = serve(&file, &dir, true, &["--clients=3", &tls_dir]);
            // One without TLS, and one of another CA: neither gets a byte of the VM.
            let mut plain = client(&installed, machine, &uri);
            let mut stranger = encrypted_client(&installed, machine, &uri, &other);
            let mut qemu = encrypted_client(&installed, machine, &uri, &ours);
            assert_goes_on(&source, &mut qemu);
            // The first has nothing to say, and waits.
            for qemu in [&mut plain, &mut stranger] {
                assert!(!qemu.output().is_ok_and(|output| output.passes() > 0), "its guest runs");
                qemu.kill().unwrap();
            }
            let reports = ended(server, 0);
            let status: Vec<&str> = reports.iter().map(|report| report["status"].as_str().unwrap()).collect();
            assert_eq!(status, ["failed", "failed", "completed"], "{reports:?}");
            for refused in &reports[..2] {
                assert!(refused["error"].as_str().unwrap().contains("TLS"), "{refused}");
            }
            assert_eq!(entries(dir.path()), ["checkpoint"], "no note is left behind");
        });
        report(TABLE, &format!("{:4} {machine}, with TLS: ok", version.name()));
    }
}

/// A QEMU with the certificates in `tls` that gets its VM through a new connection to `uri`.
fn encrypted_client(installed: &Installed, machine: &str, uri: &str, tls: &Path) -> Qemu {
    pass_on(connect(uri), |from| {
        let mut qemu = vm(installed, machine).incoming().start().unwrap();
        qemu.qmp().set_capabilities(&[("postcopy-ram", true)]).unwrap();
        encrypt(&mut qemu, tls, "server");
        qemu.qmp().migrate_incoming(from).unwrap();
        qemu
    })
}

/// Eight at a time from one file. What the server keeps in memory is less than one guest has.
#[test]
fn eight_clones_from_one_file() {
    let Some(installed) = Installed::require(Version::V10_0) else { return };
    time_limit(TEST_LIMIT, || {
        let dir = TempDir::new().unwrap();
        let file = dir.join("checkpoint");
        let machine = "pc-i440fx-10.0";
        let source = checkpoint(&installed, machine, &file, &dir);
        // Slow enough for all of them to be there at the same time.
        let (server, uri) = serve(&file, &dir, false, &["--max-clients=8", "--max-bandwidth=20MB/s"]);
        let clones: Vec<Qemu> = thread::scope(|scope| {
            let start = || scope.spawn(|| client(&installed, machine, &uri));
            let starting: Vec<_> = (0..8).map(|_| start()).collect();
            starting.into_iter().map(|clone| clone.join().unwrap()).collect()
        });
        for mut clone in clones {
            assert_goes_on(&source, &mut clone);
        }
        let status = fs::read_to_string(format!("/proc/{}/status", server.pid())).unwrap();
        let kib = |name: &str| -> u64 {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.trim_matches([':', '\t', ' ', 'k', 'B']).parse().unwrap()
        };
        server.signal(Signal::TERM);
        let reports = ended(server, 0);
        assert_eq!(reports.len(), 8);
        for each in &reports {
            assert_eq!(each["status"], "completed", "{each}");
            assert!(each["ram"]["normal"].as_u64().unwrap() > 0);
            // Each page once to each of them, and to none a page that was for another one.
            assert_eq!(each["ram"]["normal"], reports[0]["ram"]["normal"]);
        }
        assert_eq!(entries(dir.path()), ["checkpoint"]);
        assert!(kib("VmHWM") < u64::from(MIB) << 10, "{status}");
        let requests: u64 = reports.iter().map(|report| figure(report, "requests")).sum();
        report(
            TABLE,
            &format!(
                "{machine}: 8 clones at once of {MIB} MiB each, {requests} requests; the server had {} KiB resident at most, {} \
                 KiB of it its own in the end",
                kib("VmHWM"),
                kib("RssAnon")
            ),
        );
    });
}

/// The server dies after the VM runs: another process goes on with the note that it left.
#[test]
fn a_vm_whose_server_died_gets_the_rest_from_another_process() {
    let Some(installed) = Installed::require(Version::V10_0) else { return };
    time_limit(TEST_LIMIT, || {
        let dir = TempDir::new().unwrap();
        let file = dir.join("checkpoint");
        let machine = "pc-i440fx-10.0";
        let source = checkpoint(&installed, machine, &file, &dir);
        let (server, uri) = serve(&file, &dir, false, &["--max-bandwidth=2MB/s"]);
        let mut qemu = pass_on(connect(&uri), |from| {
            let mut waiting = Recoverable::waiting(&installed, machine, false, &dir);
            waiting.qemu.qmp().migrate_incoming(from).unwrap();
            waiting
        });
        qemu.qemu.qmp().wait_run_state("running", LIMIT).unwrap();
        server.signal(Signal::KILL);
        drop(server);
        let note = entries(dir.path()).into_iter().find(|name| name.starts_with("checkpoint.postcopy-")).unwrap();
        let (file, note) = (file.display().to_string(), dir.join(&note).display().to_string());
        qemu.gets_the_rest(&["send", &file], &["--recover", "--state", &note]);
        assert_goes_on(&source, &mut qemu.qemu);
    });
}
