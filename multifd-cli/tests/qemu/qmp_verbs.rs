//! `multifd checkpoint` and `multifd restore`, which drive a QEMU by its monitor: its guest is never lost, its settings are
//! put back, and what does not fit is a sentence before a byte moves.

use std::{
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use qemu_peer::{BootGuest, Installed, Memory, Qemu, QemuBuilder, Qmp, Status, Version};
use rustix::process::Signal;
use serde_json::{Value, json};
use test_support::{TempDir, report, time_limit};

use crate::{
    harness::{LIMIT, MIB, Multifd, TEST_LIMIT, UUID, assert_goes_on, assert_runs_on, entries, guest, vm},
    monitor_proxy::{Fault, HeldAnswers, MonitorProxy, Uncleared},
    snapshot::pauses,
};

const TABLE: &str = "qmp verbs";

fn each_version(test: &str, body: impl Fn(&Installed, &str)) {
    for (version, machine) in
        [(Version::V7_2, "pc-i440fx-7.2"), (Version::V10_0, "pc-i440fx-10.0"), (Version::V11_1, "pc-q35-11.1")]
    {
        let Some(installed) = Installed::require(version) else { continue };
        time_limit(TEST_LIMIT, || body(&installed, machine));
        report(TABLE, &format!("{test:48} {:4} ok", version.name()));
    }
}

fn newest(test: &str, body: impl Fn(&Installed, &str)) {
    let Some(installed) = Installed::require(Version::V11_1) else { return };
    time_limit(TEST_LIMIT, || body(&installed, "pc-i440fx-11.1"));
    report(TABLE, &format!("{test:48} {:4} ok", Version::V11_1.name()));
}

/// A QEMU with a second monitor at the path that is returned.
fn start(dir: &TempDir, name: &str, builder: QemuBuilder) -> (Qemu, PathBuf) {
    let path = dir.join(name);
    let qmp = format!("unix:{},server=on,wait=off", path.display());
    (builder.arguments(&["-qmp", &qmp]).start().unwrap(), path)
}

/// A running guest whose QEMU has settings that a careless operator would trip over.
fn odd_source(dir: &TempDir, installed: &Installed, machine: &str) -> (Qemu, PathBuf) {
    let (mut qemu, path) = start(dir, "source-qmp", vm(installed, machine).uuid(UUID));
    qemu.qmp().set_capabilities(&[("pause-before-switchover", true), ("release-ram", true), ("xbzrle", true)]).unwrap();
    let parameters =
        [("multifd-channels", json!(7)), ("multifd-compression", json!("zlib")), ("max-bandwidth", json!(3 << 20))];
    qemu.qmp().set_parameters(&parameters).unwrap();
    qemu.wait_passes(3, LIMIT).unwrap();
    (qemu, path)
}

fn settings(qmp: &mut Qmp) -> [Value; 2] {
    ["query-migrate-capabilities", "query-migrate-parameters"].map(|query| qmp.execute(query, json!({})).unwrap())
}

fn uri(path: &Path) -> String {
    format!("unix:{}", path.display())
}

fn checkpoint(qmp: &Path, file: &Path, more: &[&str]) -> Multifd {
    let (qmp, file) = (uri(qmp), file.display().to_string());
    Multifd::start(["checkpoint", &qmp, "--output", &file].iter().chain(more))
}

fn restore(file: &Path, qmp: &Path, more: &[&str]) -> Multifd {
    let (qmp, file) = (uri(qmp), file.display().to_string());
    Multifd::start(["restore", &file, &qmp].iter().chain(more))
}

/// The guest of a checkpoint runs in `qemu`, without a wrong byte.
fn assert_restored(qemu: &mut Qemu) {
    assert_guest_restored(qemu, guest());
}

fn assert_guest_restored(qemu: &mut Qemu, guest: BootGuest) {
    qemu.qmp().wait_run_state("running", LIMIT).unwrap();
    let output = qemu.wait_passes(4, LIMIT).unwrap();
    assert!(!output.is_corrupted(), "{output:?}");
    qemu.qmp().stop().unwrap();
    guest.check_ram_file(&qemu.ram_file().unwrap()).unwrap();
}

#[test]
fn a_guest_is_checkpointed_runs_on_and_is_restored() {
    each_version("live, resumed, restored", |installed, machine| {
        let dir = TempDir::new().unwrap();
        let (mut source, qmp) = odd_source(&dir, installed, machine);
        let before = settings(source.qmp());
        let file = dir.join("checkpoint");
        let report = checkpoint(&qmp, &file, &["--resume", "--channels=3", "--digest"]).done();
        assert_eq!(
            (&report["guest-state"], &report["mode"], &report["channels"]),
            (&json!("running"), &json!("live"), &json!(3))
        );
        assert_eq!(report["qemu"]["machine"], machine);
        assert_eq!(report["qemu"]["memory"], json!(48 << 20));
        assert!(report["downtime"].is_u64() && report["checkpoint"]["bytes"].is_u64(), "{report}");
        assert_eq!(settings(source.qmp()), before);
        assert_runs_on(&mut source);

        let (mut destination, qmp) = start(&dir, "destination-qmp", vm(installed, machine).uuid(UUID).incoming());
        destination
            .qmp()
            .set_parameters(&[("multifd-channels", json!(9)), ("multifd-compression", json!("zstd"))])
            .unwrap();
        let before = settings(destination.qmp());
        let report = restore(&file, &qmp, &["--channels=2"]).done();
        assert_eq!((&report["guest-state"], &report["channels"]), (&json!("running"), &json!(2)));
        assert_eq!(settings(destination.qmp()), before);
        assert_restored(&mut destination);
        assert_eq!(entries(dir.path()), ["checkpoint", "destination-qmp", "source-qmp"]);
    });
}

#[test]
fn a_guest_moves_through_a_checkpoint() {
    each_version("live, left paused, restored", |installed, machine| {
        let dir = TempDir::new().unwrap();
        let (mut source, qmp) = odd_source(&dir, installed, machine);
        let before = settings(source.qmp());
        let file = dir.join("checkpoint");
        let report = checkpoint(&qmp, &file, &["--compression=zstd"]).done();
        assert_eq!((&report["guest-state"], &report["compression"]), (&json!("postmigrate"), &json!("zstd")));
        assert_eq!(settings(source.qmp()), before);
        // It says what to do.
        checkpoint(&qmp, &dir.join("second"), &[]).end().failed(1, "cont resumes it");

        let (mut destination, qmp) = start(&dir, "destination-qmp", vm(installed, machine).uuid(UUID).incoming());
        restore(&file, &qmp, &["--compression=zlib"]).done();
        assert_goes_on(&source, &mut destination);
    });
}

/// It writes its memory again and again, faster than a migration can send it.
#[test]
fn a_guest_that_writes_faster_than_the_link_is_checkpointed_at_one_instant() {
    for (version, machine) in
        [(Version::V7_2, "pc-i440fx-7.2"), (Version::V10_0, "pc-i440fx-10.0"), (Version::V11_1, "pc-q35-11.1")]
    {
        let Some(installed) = Installed::require(version) else { continue };
        time_limit(TEST_LIMIT, || {
            let dir = TempDir::new().unwrap();
            // A memory file cannot be write-protected by every kernel.
            let busy = BootGuest::filling(MIB);
            let shape = vm(&installed, machine).memory(Memory::Anonymous).guest(busy);
            let (mut source, qmp) = start(&dir, "source-qmp", shape);
            source.wait_passes(2, LIMIT).unwrap();
            // QEMU refuses a snapshot with each of these.
            let refused = ["auto-converge", "late-block-activate", "postcopy-blocktime", "validate-uuid"];
            source.qmp().set_capabilities(&refused.map(|name| (name, true))).unwrap();
            let before = settings(source.qmp());
            source.qmp().take_events();
            let file = dir.join("checkpoint");
            let taken = checkpoint(&qmp, &file, &["--mode=snapshot"]).done();
            assert_eq!((&taken["mode"], &taken["guest-state"]), (&json!("snapshot"), &json!("running")));
            assert_eq!(settings(source.qmp()), before);
            let pauses = pauses(&mut source);
            let &[paused] = &*pauses else { panic!("expected one pause: {pauses:?}") };
            let all = taken["total-time"].as_f64().unwrap();
            let passes = source.output().unwrap().passes();
            assert!(!source.wait_passes(passes + 3, LIMIT).unwrap().is_corrupted());
            // Its guest may be left paused as well, later than the instant.
            let second = checkpoint(&qmp, &dir.join("second"), &["--mode=snapshot", "--no-resume"]).done();
            assert_eq!(second["guest-state"], "paused");

            let (mut destination, qmp) = start(&dir, "destination-qmp", vm(&installed, machine).guest(busy).incoming());
            restore(&file, &qmp, &[]).done();
            assert_guest_restored(&mut destination, busy);
            for wrong in ["--channels=2", "--compression=zstd", "--max-bandwidth=16M", "--downtime-limit=1s"] {
                let ended = checkpoint(&qmp, &dir.join("third"), &["--mode=snapshot", wrong]).end();
                assert_eq!(ended.status.code(), Some(2), "{wrong}: {}", ended.log);
            }
            let row = format!(
                "{:48} {:4} paused for {paused:.1} ms of {all:.0} ms from STOP to RESUME; QEMU says {} ms",
                "snapshot",
                version.name(),
                taken["downtime"]
            );
            report(TABLE, &row);
        });
    }
}

/// Its memory comes while it runs; what the QEMU was set to is back in the end.
#[test]
fn a_guest_is_restored_before_its_memory_is_there() {
    each_version("restore --postcopy", |installed, machine| {
        let dir = TempDir::new().unwrap();
        let (mut source, qmp) = odd_source(&dir, installed, machine);
        let file = dir.join("checkpoint");
        checkpoint(&qmp, &file, &["--resume"]).done();
        assert_runs_on(&mut source);
        for (name, more) in [("plain", &["--postcopy"][..]), ("preempt", &["--postcopy", "--preempt"])] {
            let (mut destination, qmp) = start(&dir, name, vm(installed, machine).uuid(UUID).incoming());
            let before = settings(destination.qmp());
            let report = restore(&file, &qmp, more).done();
            assert!(report["postcopy"]["resume-time"].is_number() && report["guest-state"] == "running", "{report}");
            assert_eq!(settings(destination.qmp()), before);
            assert_restored(&mut destination);
        }
        let ended = restore(&file, &qmp, &["--postcopy", "--channels=2"]).end();
        assert_eq!(ended.status.code(), Some(2), "{}", ended.log);
    });
}

#[test]
fn another_host_is_reached_by_an_address() {
    newest("--listen", |installed, machine| {
        let dir = TempDir::new().unwrap();
        let (mut source, qmp) = odd_source(&dir, installed, machine);
        let file = dir.join("checkpoint");
        checkpoint(&qmp, &file, &["--listen=tcp:127.0.0.1:0", "--resume"]).done();
        assert_runs_on(&mut source);
        let (mut destination, qmp) = start(&dir, "destination-qmp", vm(installed, machine).uuid(UUID).incoming());
        restore(&file, &qmp, &["--listen=tcp:127.0.0.1:0"]).done();
        assert_restored(&mut destination);
        for wrong in ["tcp:0.0.0.0:0", "unix:relative", "fd:3", "tcp:[::]:1"] {
            let ended = checkpoint(&qmp, &file, &[&format!("--listen={wrong}")]).end();
            assert_eq!(ended.status.code(), Some(2), "{wrong}: {}", ended.log);
        }
    });
}

#[test]
fn a_paused_guest_stays_paused() {
    newest("paused before", |installed, machine| {
        let dir = TempDir::new().unwrap();
        let (mut source, qmp) = odd_source(&dir, installed, machine);
        source.qmp().stop().unwrap();
        checkpoint(&qmp, &dir.join("snapshot"), &["--mode=snapshot"]).end().failed(1, "expected --mode live");
        assert_eq!(source.qmp().run_state().unwrap(), "paused");
        let file = dir.join("checkpoint");
        checkpoint(&qmp, &file, &[]).done();
        let (mut destination, qmp) = start(&dir, "destination-qmp", vm(installed, machine).uuid(UUID).incoming());
        let report = restore(&file, &qmp, &[]).done();
        assert_eq!(report["guest-state"], "paused");
        destination.qmp().cont().unwrap();
        assert_restored(&mut destination);
    });
}

#[test]
fn a_qemu_that_cannot_be_checkpointed_now_says_why() {
    each_version("checkpoint in the wrong state", |installed, machine| {
        let dir = TempDir::new().unwrap();
        let (_waiting, waiting) = start(&dir, "waiting", vm(installed, machine).incoming());
        checkpoint(&waiting, &dir.join("checkpoint"), &[]).end().failed(1, "inmigrate");
        // One that is migrating already is left alone.
        let (mut source, qmp) = odd_source(&dir, installed, machine);
        let (_sink, sink) = start(&dir, "sink", vm(installed, machine).incoming());
        drop(sink);
        source.qmp().set_parameters(&[("max-bandwidth", json!(1 << 20))]).unwrap();
        let socket = dir.join("elsewhere");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        source.qmp().migrate(&uri(&socket)).unwrap();
        checkpoint(&qmp, &dir.join("checkpoint"), &[]).end().failed(1, "migrating already");
        assert!(!source.qmp().migration_status().unwrap().is_final(), "it is not cancelled");
        assert!(!dir.join("checkpoint").exists());
    });
}

#[test]
fn a_checkpoint_that_does_not_fit_is_refused_before_a_byte_moves() {
    each_version("restore into the wrong QEMU", |installed, machine| {
        let dir = TempDir::new().unwrap();
        let (mut source, qmp) = odd_source(&dir, installed, machine);
        let file = dir.join("checkpoint");
        checkpoint(&qmp, &file, &["--resume"]).done();
        restore(&file, &qmp, &[]).end().failed(1, "-incoming defer");
        assert_runs_on(&mut source);

        let other_machine = if machine.contains("q35") { "pc-i440fx-7.2" } else { "pc-q35-7.2" };
        let shapes = [
            ("machine", vm(installed, other_machine).incoming(), 4, other_machine),
            ("memory", vm(installed, machine).memory_mib(64).incoming(), 4, "of memory in pc.ram"),
        ];
        for (name, shape, exit, what) in shapes {
            let (mut qemu, qmp) = start(&dir, name, shape);
            let before = settings(qemu.qmp());
            restore(&file, &qmp, &[]).end().failed(exit, what);
            // It may still be given the right one.
            assert_eq!(qemu.qmp().migration_status().unwrap(), Status::None);
            assert_eq!(settings(qemu.qmp()), before);
        }
        // It listens already.
        let (mut qemu, qmp) = start(&dir, "listening", vm(installed, machine).incoming());
        qemu.qmp().migrate_incoming(&uri(&dir.join("s"))).unwrap();
        restore(&file, &qmp, &[]).end().failed(1, "begun to wait");
    });
}

/// QEMU finds out by itself what cannot be asked, such as a device that is missing.
#[test]
fn what_qemu_finds_wrong_is_passed_on() {
    each_version("restore without a device", |installed, machine| {
        let dir = TempDir::new().unwrap();
        let shape = vm(installed, machine).uuid(UUID).arguments(&["-device", "virtio-balloon-pci"]);
        let (mut source, qmp) = start(&dir, "source-qmp", shape);
        source.wait_passes(1, LIMIT).unwrap();
        let file = dir.join("checkpoint");
        checkpoint(&qmp, &file, &["--resume"]).done();
        assert_runs_on(&mut source);
        let shape = vm(installed, machine).uuid(UUID).incoming();
        let (mut destination, qmp) = start(&dir, "destination-qmp", shape);
        let ended = restore(&file, &qmp, &[]).end();
        let error = ended.report["error"].as_str().unwrap();
        assert!(error.contains("QEMU"), "{error}");
        if installed.version() != Version::V7_2 {
            assert!(error.contains("load of migration failed") && error.contains("start it again"), "{error}");
            assert_eq!(destination.qmp().run_state().unwrap(), "inmigrate");
        }
    });
}

#[test]
fn a_socket_that_is_no_monitor_is_named() {
    time_limit(TEST_LIMIT, || {
        let dir = TempDir::new().unwrap();
        let file = dir.join("checkpoint");
        for (fault, exit, what) in [
            (Fault::Silence, 1, "no QMP greeting within 300ms"),
            (Fault::Close, 1, "closed"),
            (Fault::Garbage, 4, "expected the socket of a QEMU's -qmp option"),
            (Fault::Endless, 4, "expected the socket of a QEMU's -qmp option"),
        ] {
            let proxy = MonitorProxy::alone(&dir.join("proxy"), fault);
            checkpoint(&proxy.path, &file, &["--qmp-timeout=300ms"]).end().failed(exit, what);
        }
        checkpoint(&dir.join("missing"), &file, &[]).end().failed(1, "server=on");
        std::fs::write(dir.join("file"), "").unwrap();
        checkpoint(&dir.join("file"), &file, &[]).end().failed(1, "unix:");
        // An interrupt ends the wait.
        let proxy = MonitorProxy::alone(&dir.join("proxy"), Fault::Silence);
        let waiting = checkpoint(&proxy.path, &file, &[]);
        assert!(proxy.wait_connected(LIMIT));
        waiting.signal(Signal::INT);
        waiting.end().failed(3, "cancelled");
        drop(proxy);
        assert_eq!(entries(dir.path()), ["file"]);
    });
}

/// How often commands are given until the migration runs; the one after that polls.
const COMMANDS: usize = 17;

/// Whatever the monitor does at whatever command: the command ends, the guest runs on, and there is a whole file or none.
///
/// With the newest QEMU only: in those before, one migration in thirty whose destination goes away in the set-up stays in
/// `setup`, or blocks the main loop, whatever the destination is.
#[test]
fn a_monitor_that_fails_at_any_command_leaves_the_guest_running() {
    newest("the monitor fails at each command", |installed, machine| {
        let dir = TempDir::new().unwrap();
        let (mut source, qmp) = odd_source(&dir, installed, machine);
        let (mut whole, mut none) = (0, 0);
        for fault in [Fault::Close, Fault::Garbage, Fault::Silence, Fault::Hangup] {
            for at in (1..COMMANDS + 8).step_by(if fault == Fault::Hangup { 1 } else { 2 }) {
                let file = dir.join("checkpoint");
                let proxy = MonitorProxy::before(&dir.join("proxy"), &qmp, fault, at);
                let ended = checkpoint(&proxy.path, &file, &["--resume", "--qmp-timeout=2s"]).end();
                drop(proxy);
                let code = ended.status.code().unwrap();
                let is_there = file.exists();
                let context = format!("{fault:?} at {at}: {code} {}", ended.report);
                match code {
                    0 => assert!(is_there, "{context}"),
                    // Complete, and only the settings or the state could not be asked for.
                    1 | 7 if is_there => {
                        assert!(ended.report["error"].as_str().unwrap().contains("is complete"), "{context}")
                    }
                    1 | 4 => assert!(!is_there, "{context}"),
                    _ => panic!("{context}"),
                }
                if fault == Fault::Hangup {
                    assert!(!ended.log.contains("not put back"), "{context}");
                }
                if is_there {
                    whole += 1;
                    std::fs::remove_file(&file).unwrap();
                } else {
                    none += 1;
                }
                // In doubt, or with the monitor gone, the operator looks at it.
                let deadline = Instant::now() + LIMIT;
                loop {
                    let status = source.qmp().migration_status();
                    let status = status.unwrap_or_else(|error| panic!("{error}: {context} {}", source.log()));
                    if status.is_final() || status == Status::None {
                        break;
                    }
                    assert!(Instant::now() < deadline, "{context}");
                    thread::sleep(Duration::from_millis(10));
                }
                if source.qmp().run_state().unwrap() != "running" {
                    assert!(is_there, "the only copy is paused: {context}");
                    assert_eq!(code, 7, "{context}");
                    source.qmp().cont().unwrap();
                }
                source.qmp().wait_run_state("running", LIMIT).unwrap();
            }
        }
        assert_runs_on(&mut source);
        assert!(whole > 0 && none > 0, "{whole} {none}");
        report(TABLE, &format!("{:48} {whole} whole, {none} none", "checkpoints of a monitor that fails"));
    });
}

#[test]
fn an_interrupted_checkpoint_leaves_no_file_and_the_guest_runs_on() {
    each_version("checkpoint is interrupted", |installed, machine| {
        let dir = TempDir::new().unwrap();
        let (mut source, qmp) = odd_source(&dir, installed, machine);
        let before = settings(source.qmp());
        for signal in [Signal::INT, Signal::TERM] {
            let running = checkpoint(&qmp, &dir.join("checkpoint"), &["--max-bandwidth=4M"]);
            wait_until_moving(&mut source);
            running.signal(signal);
            running.end().failed(3, "cancelled");
            assert_cancelled(&mut source);
            assert_eq!(settings(source.qmp()), before);
        }
        // At any moment: a whole file with a paused guest, or none with a running one.
        for milliseconds in [0, 30, 60, 100, 150, 220, 300, 400, 550, 700, 900] {
            let file = dir.join("checkpoint");
            let running = checkpoint(&qmp, &file, &[]);
            thread::sleep(Duration::from_millis(milliseconds));
            running.signal(Signal::INT);
            let ended = running.end();
            let state = source.qmp().run_state().unwrap();
            // A process that had not begun to listen for signals is ended by it.
            match ended.status.code() {
                Some(0) => {
                    assert_eq!((state.as_str(), file.exists()), ("postmigrate", true), "{}", ended.log);
                    std::fs::remove_file(&file).unwrap();
                    source.qmp().cont().unwrap();
                }
                // Cancelled in the moment in which all of it had been sent.
                Some(1)
                    if ended.log.contains("is complete, but QEMU calls the migration failed and runs its guest on") =>
                {
                    assert_eq!((state.as_str(), file.exists()), ("running", true), "{}", ended.log);
                    std::fs::remove_file(&file).unwrap();
                }
                code => {
                    assert!(matches!(code, Some(3) | None), "{code:?} {}", ended.log);
                    assert_eq!((state.as_str(), file.exists()), ("running", false), "{}", ended.log);
                }
            }
            assert_eq!(settings(source.qmp()), before);
        }
        assert_runs_on(&mut source);
        assert_eq!(entries(dir.path()), ["source-qmp"]);
    });
}

/// QEMU migrates, and the interrupted command does not know: it ends the migration before it puts the settings back, which a
/// QEMU that migrates refuses.
#[test]
fn a_checkpoint_that_is_interrupted_before_the_answer_to_migrate_ends_the_migration() {
    each_version("checkpoint is interrupted at migrate", |installed, machine| {
        let dir = TempDir::new().unwrap();
        let (mut source, qmp) = odd_source(&dir, installed, machine);
        let before = settings(source.qmp());
        let proxy = HeldAnswers::of(&dir.join("held"), &qmp, "migrate");
        let running = checkpoint(&proxy.path, &dir.join("checkpoint"), &["--max-bandwidth=1M"]);
        proxy.wait_lines(1, LIMIT);
        running.signal(Signal::INT);
        proxy.wait_lines(2, LIMIT);
        proxy.release();
        running.end().failed(3, "cancelled");
        assert_cancelled(&mut source);
        assert_eq!(settings(source.qmp()), before);
        assert_runs_on(&mut source);
        assert!(!dir.join("checkpoint").exists());
    });
}

#[test]
fn a_restore_that_is_interrupted_before_the_answer_to_migrate_incoming_says_what_qemu_may_do() {
    newest("restore is interrupted at migrate-incoming", |installed, machine| {
        let dir = TempDir::new().unwrap();
        let (_source, qmp) = odd_source(&dir, installed, machine);
        let file = dir.join("checkpoint");
        checkpoint(&qmp, &file, &["--resume"]).done();
        let builder = vm(installed, machine).uuid(UUID).incoming();
        let (_destination, qmp) = start(&dir, "destination-qmp", builder);
        let proxy = HeldAnswers::of(&dir.join("held"), &qmp, "migrate-incoming");
        let running = restore(&file, &proxy.path, &[]);
        proxy.wait_lines(1, LIMIT);
        running.signal(Signal::INT);
        proxy.wait_lines(2, LIMIT);
        proxy.release();
        running.end().failed(3, "end it with quit");
    });
}

#[test]
fn a_checkpoint_that_is_killed_leaves_no_file_and_the_guest_runs_on() {
    each_version("checkpoint is killed", |installed, machine| {
        let dir = TempDir::new().unwrap();
        let (mut source, qmp) = odd_source(&dir, installed, machine);
        let running = checkpoint(&qmp, &dir.join("checkpoint"), &["--max-bandwidth=4M"]);
        wait_until_moving(&mut source);
        running.signal(Signal::KILL);
        assert!(!running.end().status.success());
        source.qmp().wait_migration(&[Status::Failed], LIMIT).unwrap();
        assert_runs_on(&mut source);
        assert!(!dir.join("checkpoint").exists());
    });
}

#[test]
fn a_qemu_that_is_killed_ends_the_checkpoint() {
    each_version("QEMU is killed during a checkpoint", |installed, machine| {
        let dir = TempDir::new().unwrap();
        let (mut source, qmp) = odd_source(&dir, installed, machine);
        let running = checkpoint(&qmp, &dir.join("checkpoint"), &["--max-bandwidth=4M"]);
        wait_until_moving(&mut source);
        source.kill().unwrap();
        running.end().failed(1, "closed");
        assert!(!dir.join("checkpoint").exists());
    });
}

#[test]
fn a_qemu_that_is_stopped_ends_the_checkpoint_in_time() {
    newest("QEMU is stopped during a checkpoint", |installed, machine| {
        let dir = TempDir::new().unwrap();
        let (mut source, qmp) = odd_source(&dir, installed, machine);
        let running = checkpoint(&qmp, &dir.join("checkpoint"), &["--max-bandwidth=4M", "--qmp-timeout=1s"]);
        wait_until_moving(&mut source);
        let pid = rustix::process::Pid::from_raw(source.pid().try_into().unwrap()).unwrap();
        rustix::process::kill_process(pid, Signal::STOP).unwrap();
        let ended = running.end();
        ended.failed(1, "main loop may be blocked");
        ended.failed(1, "settings are not put back");
        assert!(!dir.join("checkpoint").exists());
        rustix::process::kill_process(pid, Signal::CONT).unwrap();
        source.qmp().wait_migration(&[Status::Failed], LIMIT).unwrap();
        assert_runs_on(&mut source);
        // A QEMU that gets these settings while it ends its migration ends with its guest, 25 times of 25.
        let [_, parameters] = settings(source.qmp());
        assert_ne!(parameters["multifd-channels"], 7);
    });
}

#[test]
fn a_restore_that_is_interrupted_or_whose_qemu_is_killed_leaves_the_checkpoint_alone() {
    each_version("restore is interrupted, QEMU is killed", |installed, machine| {
        let dir = TempDir::new().unwrap();
        let (mut source, qmp) = odd_source(&dir, installed, machine);
        let file = dir.join("checkpoint");
        let digest = |report: &Value| report["ram-blocks"].clone();
        let taken = checkpoint(&qmp, &file, &["--digest"]).done();
        for kill in [false, true] {
            let (mut destination, qmp) = start(&dir, "destination-qmp", vm(installed, machine).uuid(UUID).incoming());
            let running = restore(&file, &qmp, &["--max-bandwidth=2M"]);
            let deadline = Instant::now() + LIMIT;
            // A 7.2 says `active` from the first byte on, later ones from before.
            while !matches!(destination.qmp().migration_status().unwrap(), Status::Active) {
                assert!(Instant::now() < deadline);
                thread::sleep(Duration::from_millis(10));
            }
            thread::sleep(Duration::from_millis(300));
            if kill {
                destination.kill().unwrap();
                let ended = running.end();
                assert_eq!(ended.status.code(), Some(1), "{}", ended.log);
            } else {
                running.signal(Signal::INT);
                let ended = running.end();
                assert_eq!(ended.status.code(), Some(3), "{} {}", ended.report, ended.log);
            }
        }
        let mut inspected = Multifd::start(["inspect", &file.display().to_string(), "--digest"]).done();
        assert_eq!(digest(&inspected.take()), digest(&taken));
        let (mut destination, qmp) = start(&dir, "destination-qmp", vm(installed, machine).uuid(UUID).incoming());
        restore(&file, &qmp, &[]).done();
        assert_goes_on(&source, &mut destination);
        source.kill().unwrap();
    });
}

/// A full disk, a limit on rounds: the guest runs on, the settings are back.
#[test]
fn a_checkpoint_that_cannot_be_completed_leaves_the_guest_running() {
    each_version("no convergence, and a file that exists", |installed, machine| {
        let dir = TempDir::new().unwrap();
        let (mut source, qmp) = odd_source(&dir, installed, machine);
        let before = settings(source.qmp());
        let file = dir.join("checkpoint");
        let more = ["--max-bandwidth=8M", "--downtime-limit=1ms", "--max-rounds=2"];
        checkpoint(&qmp, &file, &more).end().failed(5, "--mode snapshot");
        assert_cancelled(&mut source);
        assert_eq!(settings(source.qmp()), before);
        std::fs::write(&file, "precious").unwrap();
        checkpoint(&qmp, &file, &[]).end().failed(1, "--force replaces it");
        assert_eq!(std::fs::read(&file).unwrap(), b"precious");
        checkpoint(&qmp, &file, &["--force", "--resume"]).done();
        assert_runs_on(&mut source);
    });
}

/// The last migration of `qemu` was cancelled, and another one can begin.
fn assert_cancelled(qemu: &mut Qemu) {
    let answer = qemu.qmp().query_migrate().unwrap();
    // A QEMU 10.0 whose channel notices first calls it failed.
    assert!(matches!(Status::of(&answer), Status::Cancelled | Status::Failed), "{answer}; {}", qemu.log());
    let instances = qemu.qmp().execute("query-yank", json!({})).unwrap();
    assert!(!instances.to_string().contains("\"migration\""), "{answer}; {instances}; {}", qemu.log());
}

/// A QEMU that has not cleared up its last migration may end at the next one.
#[test]
fn a_qemu_that_has_not_cleared_up_its_last_migration_is_left_alone() {
    newest("a migration that is not cleared up", |installed, machine| {
        let dir = TempDir::new().unwrap();
        let (mut source, qmp) = odd_source(&dir, installed, machine);
        let file = dir.join("checkpoint");
        let proxy = Uncleared::of(&dir.join("never"), &qmp, usize::MAX);
        checkpoint(&proxy.path, &file, &[]).end().failed(1, "its thread does not end");
        assert!(proxy.questions() > 0);
        assert_eq!(source.qmp().migration_status().unwrap(), Status::None);
        assert!(!file.exists());
        // One that takes its time is waited for, before and after.
        let proxy = Uncleared::of(&dir.join("late"), &qmp, 3);
        checkpoint(&proxy.path, &file, &["--resume"]).done();
        assert!(proxy.questions() > 4, "{}", proxy.questions());
        assert_runs_on(&mut source);
    });
}

/// Until a migration of `source` is under way that has moved some memory; an earlier one does not count.
fn wait_until_moving(source: &mut Qemu) {
    let deadline = Instant::now() + LIMIT;
    loop {
        let answer = source.qmp().query_migrate().unwrap();
        let moved = answer["ram"]["transferred"].as_u64().unwrap_or_default();
        if answer["status"] == "active" && moved > 2 << 20 {
            return;
        }
        assert!(Instant::now() < deadline, "{answer}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// An image that libvirt has saved: unpacked first where it is a plain stream, which cannot be done while the guest runs.
#[test]
fn an_image_of_libvirt_is_restored() {
    newest("a libvirt image restored", |installed, machine| {
        let dir = TempDir::new().unwrap();
        let (mut source, qmp) = start(&dir, "source-qmp", vm(installed, machine));
        source.wait_passes(3, LIMIT).unwrap();
        let (file, image, xml) = (dir.join("checkpoint"), dir.join("image"), dir.join("xml"));
        checkpoint(&qmp, &file, &[]).done();
        drop(source);
        let domain =
            format!("<domain type='qemu'><name>vm</name><os><type machine='{machine}'>hvm</type></os></domain>");
        std::fs::write(&xml, domain).unwrap();
        let [from, to, xml] = [&file, &image, &xml].map(|path| path.display().to_string());
        Multifd::start(["convert", &from, &to, "--libvirt-xml", &xml]).done();
        let (mut destination, qmp) = start(&dir, "destination-qmp", vm(installed, machine).incoming());
        restore(&image, &qmp, &["--postcopy"]).end().failed(4, "multifd convert");
        restore(&image, &qmp, &[]).done();
        assert_restored(&mut destination);
    });
}
