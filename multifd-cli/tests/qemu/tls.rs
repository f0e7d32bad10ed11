//! TLS between `multifd` and real QEMUs, both ways, with the certificates that `multifd tls-init` makes.

use std::path::{Path, PathBuf};

use qemu_peer::{Installed, Qemu, Status, Version};
use serde_json::json;
use test_support::{TempDir, report, time_limit};

use crate::harness::{
    LIMIT, Multifd, Settings, TEST_LIMIT, assert_goes_on, assert_runs_on, assert_runs_on_after, assert_same_memory,
    listen, migrate_away, vm,
};

const TABLE: &str = "TLS";
const TCP: &str = "tcp:127.0.0.1:0";

/// Certificates for `host`.
pub fn certificates(dir: &TempDir, name: &str, host: &str) -> PathBuf {
    let path = dir.join(name);
    Multifd::start(["tls-init", &path.display().to_string(), "--host", host]).done();
    path
}

/// Has migrations of `qemu` use the certificates in `dir`, as `endpoint`: client or server.
pub fn encrypt(qemu: &mut Qemu, dir: &Path, endpoint: &str) {
    let id = format!("tls-{}", dir.file_name().unwrap().to_string_lossy());
    let object = json!({
        "qom-type": "tls-creds-x509", "id": id, "endpoint": endpoint, "verify-peer": true, "dir": dir.display().to_string()
    });
    qemu.qmp().execute("object-add", object).unwrap();
    qemu.qmp().set_parameters(&[("tls-creds", json!(id)), ("tls-hostname", json!(""))]).unwrap();
}

/// A migration of `version` and back to it, with TLS on both ways.
struct Case {
    version: Version,
    machine: &'static str,
    /// Channels of the source; 0 for none.
    channels: u8,
    return_path: bool,
    /// The way back is a postcopy with a preempt connection.
    postcopy: bool,
}

fn guest_moves(case: &Case) {
    let Some(installed) = Installed::require(case.version) else { return };
    time_limit(TEST_LIMIT, || {
        let dir = TempDir::new().unwrap();
        let (file, tls) = (dir.join("checkpoint"), certificates(&dir, "tls", "127.0.0.1"));
        let tls_dir = format!("--tls-dir={}", tls.display());
        let settings = Settings { channels: case.channels, return_path: case.return_path, ..Settings::default() };
        let mut source = vm(&installed, case.machine).start().unwrap();
        match case.channels {
            0 => source.qmp().set_capabilities(&[("return-path", case.return_path)]).unwrap(),
            _ => settings.apply(&mut source),
        }
        source.qmp().set_parameters(&[("max-bandwidth", json!(10u64 << 30))]).unwrap();
        encrypt(&mut source, &tls, "client");
        source.wait_passes(3, LIMIT).unwrap();
        let (receive, uri) = Multifd::receive(TCP, &file, &["--digest", &tls_dir]);
        migrate_away(&mut source, &uri);
        let received = receive.done();
        assert_eq!(received["channels"], case.channels);
        assert_same_memory(&mut source, &received);

        let mut destination = vm(&installed, case.machine).incoming().start().unwrap();
        let postcopy: &[&str] = if case.postcopy {
            destination.qmp().set_capabilities(&[("postcopy-ram", true), ("postcopy-preempt", true)]).unwrap();
            &["--postcopy", "--preempt"]
        } else {
            let settings = Settings { channels: 2, ..Settings::default() };
            settings.apply(&mut destination);
            &["--channels", "2"]
        };
        encrypt(&mut destination, &tls, "server");
        let uri = listen(&mut destination, true);
        let file = file.display().to_string();
        Multifd::start(["send", &file, &uri, &tls_dir].iter().chain(postcopy)).done();
        assert_goes_on(&source, &mut destination);
    });
    let Case { version, machine, channels, return_path, postcopy } = case;
    report(
        TABLE,
        &format!(
            "{:4} {machine:15} {channels} channels, return path {return_path:5}, postcopy back {postcopy:5} ok",
            version.name()
        ),
    );
}

const fn case(version: Version, machine: &'static str, channels: u8, return_path: bool, postcopy: bool) -> Case {
    Case { version, machine, channels, return_path, postcopy }
}

#[test]
fn a_guest_of_7_2_moves() {
    guest_moves(&case(Version::V7_2, "pc-i440fx-7.2", 4, true, false));
}

/// Without return path QEMU does not wait for anything, and what it sent last must not be lost.
#[test]
fn a_guest_of_7_2_moves_without_return_path() {
    guest_moves(&case(Version::V7_2, "pc-q35-7.2", 2, false, true));
}

#[test]
fn a_guest_of_10_0_moves() {
    guest_moves(&case(Version::V10_0, "pc-q35-10.0", 4, true, true));
}

#[test]
fn a_guest_of_10_0_moves_without_return_path() {
    guest_moves(&case(Version::V10_0, "pc-i440fx-10.0", 2, false, false));
}

#[test]
fn a_guest_of_11_1_moves() {
    guest_moves(&case(Version::V11_1, "pc-i440fx-11.1", 4, true, false));
}

#[test]
fn a_guest_of_11_1_moves_over_one_connection() {
    guest_moves(&case(Version::V11_1, "pc-q35-11.1", 0, false, true));
}

/// A source that switches to postcopy opens a connection that says nothing for a while after its handshake.
#[test]
fn a_source_that_switches_to_postcopy_is_taken_whole() {
    let Some(installed) = Installed::require(Version::V11_1) else { return };
    time_limit(TEST_LIMIT, || {
        let dir = TempDir::new().unwrap();
        let tls = certificates(&dir, "tls", "127.0.0.1");
        let mut source = vm(&installed, "pc-q35-11.1").start().unwrap();
        source.qmp().set_capabilities(&[("postcopy-ram", true), ("postcopy-preempt", true)]).unwrap();
        source.qmp().set_parameters(&[("max-bandwidth", json!(60 << 20)), ("downtime-limit", json!(1))]).unwrap();
        encrypt(&mut source, &tls, "client");
        source.wait_passes(3, LIMIT).unwrap();
        let more = ["--digest", "--tls-dir", &tls.display().to_string()];
        let (receive, uri) = Multifd::receive(TCP, &dir.join("checkpoint"), &more);
        source.qmp().migrate(&uri).unwrap();
        crate::harness::wait_until_under_way(&mut source);
        source.qmp().execute("migrate-start-postcopy", json!({})).unwrap();
        let received = receive.done();
        assert_eq!(received["mode"], "postcopy");
        assert_same_memory(&mut source, &received);
    });
    report(TABLE, "11.1 switches to postcopy with preempt, into receive: ok");
}

/// A QEMU that is refused keeps its guest, and the next one is taken.
#[test]
fn a_qemu_without_tls_or_of_another_authority_is_refused_and_keeps_its_guest() {
    let Some(installed) = Installed::require(Version::V10_0) else { return };
    time_limit(TEST_LIMIT, || {
        let dir = TempDir::new().unwrap();
        let tls = certificates(&dir, "tls", "127.0.0.1");
        let other = certificates(&dir, "other", "127.0.0.1");
        let mut source = vm(&installed, "pc-i440fx-10.0").start().unwrap();
        Settings::default().apply(&mut source);
        source.wait_passes(3, LIMIT).unwrap();
        let file = dir.join("checkpoint");
        let (mut receive, uri) = Multifd::receive(TCP, &file, &["--tls-dir", &tls.display().to_string()]);
        for (certificates, why) in [
            (None, "the source migrates without TLS"),
            (Some(&other), "the source shows no certificate of the CA in ca-cert.pem here"),
        ] {
            if let Some(certificates) = certificates {
                encrypt(&mut source, certificates, "client");
            }
            source.qmp().migrate(&uri).unwrap();
            receive.wait_line_with(why);
            source.qmp().wait_migration(&[Status::Failed], LIMIT).unwrap();
            assert_runs_on_after(&mut source, 2);
            assert!(!file.exists());
        }
        encrypt(&mut source, &tls, "client");
        migrate_away(&mut source, &uri);
        receive.done();
    });
    report(TABLE, "10.0 refused without TLS and of another CA, then taken: ok");
}

/// A destination that refuses our certificate has not got the VM, and says so.
#[test]
fn a_qemu_that_refuses_us_is_not_given_anything() {
    let Some(installed) = Installed::require(Version::V11_1) else { return };
    time_limit(TEST_LIMIT, || {
        let dir = TempDir::new().unwrap();
        let (tls, other) = (certificates(&dir, "tls", "127.0.0.1"), certificates(&dir, "other", "127.0.0.1"));
        let file = dir.join("checkpoint");
        let mut source = vm(&installed, "pc-i440fx-11.1").start().unwrap();
        Settings::default().apply(&mut source);
        let (receive, uri) = Multifd::receive(TCP, &file, &[]);
        migrate_away(&mut source, &uri);
        receive.done();
        let file = file.display().to_string();
        let mut destination = vm(&installed, "pc-i440fx-11.1").incoming().start().unwrap();
        Settings::default().apply(&mut destination);
        encrypt(&mut destination, &tls, "server");
        let uri = listen(&mut destination, true);
        let send = |more: &[&str]| Multifd::start(["send", &file, &uri].iter().chain(more)).end();
        let tls_dir = |dir: &Path| format!("--tls-dir={}", dir.display());
        send(&[&tls_dir(&other)]).failed(1, "the certificate of the destination is not of the CA in ca-cert.pem here");
        let named = send(&[&tls_dir(&tls), "--tls-hostname=elsewhere.example"]);
        named.failed(1, "the certificate of the destination is not for elsewhere.example");
    });
    report(TABLE, "11.1 refused by us for its CA and its name: ok");
}

/// The verbs that drive a QEMU give it the certificates, and take them away again.
#[test]
fn checkpoint_and_restore_have_qemu_use_tls() {
    let Some(installed) = Installed::require(Version::V10_0) else { return };
    time_limit(TEST_LIMIT, || {
        let dir = TempDir::new().unwrap();
        let (file, tls) = (dir.join("checkpoint").display().to_string(), certificates(&dir, "tls", "127.0.0.1"));
        let monitor = |name: &str| {
            let path = dir.join(name);
            (format!("unix:{},server=on,wait=off", path.display()), format!("unix:{}", path.display()))
        };
        let tls_dir = tls.display().to_string();
        let more = ["--listen", TCP, "--tls-dir", &tls_dir];
        let (argument, qmp) = monitor("source");
        let mut source = vm(&installed, "pc-i440fx-10.0").arguments(&["-qmp", &argument]).start().unwrap();
        source.wait_passes(3, LIMIT).unwrap();
        Multifd::start(["checkpoint", &qmp, "--output", &file, "--resume"].iter().chain(&more)).done();
        let objects = |qemu: &mut Qemu| qemu.qmp().execute("qom-list", json!({ "path": "/objects" })).unwrap();
        let creds = |qemu: &mut Qemu| {
            let parameters = qemu.qmp().execute("query-migrate-parameters", json!({})).unwrap();
            parameters["tls-creds"].clone()
        };
        assert!(!objects(&mut source).to_string().contains("multifd-tls"));
        assert_eq!(creds(&mut source), "");
        assert_runs_on(&mut source);

        let (argument, qmp) = monitor("destination");
        let shape = vm(&installed, "pc-i440fx-10.0").arguments(&["-qmp", &argument]);
        let mut destination = shape.incoming().start().unwrap();
        Multifd::start(["restore", &file, &qmp].iter().chain(&more)).done();
        assert!(!objects(&mut destination).to_string().contains("multifd-tls"));
        destination.qmp().wait_run_state("running", LIMIT).unwrap();
        destination.wait_passes(2, LIMIT).unwrap();
    });
    report(TABLE, "10.0 checkpoint and restore: ok");
}
