//! Background snapshots: the state of one instant, of a guest that runs on and writes as fast as it can.

use qemu_peer::{BootGuest, Installed, Memory, Qemu, QemuBuilder, Status, Version};
use serde_json::{Value, json};
use test_support::{TempDir, report, time_limit};

use crate::harness::{
    LIMIT, MIB, Multifd, Settings, TEST_LIMIT, assert_runs_on_after, block, digest, entries, listen, load_file,
    receive_uri, vm, wait_until_under_way,
};

const TABLE: &str = "background snapshots";

const SOURCES: [(Version, &str); 3] =
    [(Version::V7_2, "pc-i440fx-7.2"), (Version::V10_0, "pc-q35-10.0"), (Version::V11_1, "pc-i440fx-11.1")];

/// A guest that never waits between two pages.
fn guest() -> BootGuest {
    BootGuest::filling(MIB)
}

fn shape(installed: &Installed, machine: &str) -> QemuBuilder {
    vm(installed, machine).guest(guest())
}

/// Has `source` write a background snapshot to `uri`, and waits until it says that it has.
fn snapshot(source: &mut Qemu, uri: &str) {
    source.qmp().set_capabilities(&[("background-snapshot", true)]).unwrap();
    source.qmp().migrate(uri).unwrap();
    source
        .qmp()
        .wait_migration(&[Status::Completed], LIMIT)
        .unwrap_or_else(|error| panic!("{error}\n{}", source.log()));
}

/// Checks that `report` is that of a snapshot in which every page came once.
fn assert_is_of_one_instant(report: &Value) {
    assert_eq!((report["mode"].as_str(), report["instant"].as_str()), (Some("snapshot"), Some("start")), "{report}");
    let ram = &report["ram"];
    let named = ram["normal"].as_u64().unwrap() + ram["duplicate"].as_u64().unwrap();
    assert_eq!(named * 4096, ram["total"].as_u64().unwrap(), "{ram}");
}

#[test]
fn a_guest_that_writes_as_fast_as_it_can_is_kept_as_it_was_at_the_start() {
    for (version, machine) in SOURCES {
        let Some(installed) = Installed::require(version) else { continue };
        time_limit(TEST_LIMIT, || {
            let dir = TempDir::new().unwrap();
            let file = dir.join("checkpoint");
            let path = file.display().to_string();
            let mut source = shape(&installed, machine).memory(Memory::Anonymous).start().unwrap();
            let before = source.wait_passes(3, LIMIT).unwrap();
            let (receive, uri) = Multifd::receive(&receive_uri(dir.path(), false), &file, &["--digest"]);
            snapshot(&mut source, &uri);
            let received = receive.done();
            assert_is_of_one_instant(&received);

            // All pages are of one instant: the host sees it, before any guest has run on them.
            let ram = dir.join("ram");
            let to = ram.display().to_string();
            let inspected =
                Multifd::start(["inspect", &path, "--extract", "pc.ram", "--output", &to, "--digest"]).done();
            assert_eq!(digest(&ram), block(&received, "pc.ram")["digest"]);
            assert_eq!(inspected["devices-cut"], true, "{}", inspected["devices-problem"]);
            let cursor = guest().check_ram_file(&ram).unwrap();

            // The source has never stopped for long, and its memory is its own.
            let after = assert_runs_on_after(&mut source, 3);
            // The snapshot is of a pass between those that had ended before and the last one.
            let snapshot_pass = cursor.pass as usize;
            assert!(
                before.passes() <= snapshot_pass && snapshot_pass <= after.passes(),
                "{before:?} {cursor:?} {after:?}"
            );

            let mut loaded = match version {
                Version::V7_2 => {
                    let mut destination = shape(&installed, machine).incoming().start().unwrap();
                    Settings::default().apply(&mut destination);
                    let uri = listen(&mut destination, false);
                    Multifd::start(["send", &path, &uri]).done();
                    destination
                }
                _ => load_file(shape(&installed, machine), &file, &[]),
            };
            loaded.qmp().wait_migration(&[Status::Completed], LIMIT).unwrap();
            loaded.qmp().wait_run_state("running", LIMIT).unwrap();
            let later = loaded.wait_passes(4, LIMIT).unwrap();
            assert!(!later.is_corrupted(), "{later:?}");
            // It ends the pass that the snapshot was taken in, or the next one if nothing of that was left.
            let letters = &after.letters[snapshot_pass - 1..=snapshot_pass];
            let begun = usize::from(later.letters[0] != letters[0]);
            assert_eq!(later.letters[0], letters[begun], "{cursor:?} {after:?} {later:?}");
            assert!(begun == 0 || cursor.written == guest().pages(), "{cursor:?} {after:?} {later:?}");
            loaded.qmp().stop().unwrap();
            let went_on = guest().check_ram_file(&loaded.ram_file().unwrap()).unwrap();
            assert!(went_on.pass > cursor.pass, "{cursor:?} {went_on:?}");
        });
        report(TABLE, &format!("{:4} {machine}, guest at full speed: ok", version.name()));
    }
}

/// Has QEMU take a snapshot to a stream of its own, which only `inspect` sees.
#[test]
fn a_recorded_snapshot_is_inspected() {
    for (version, machine) in SOURCES {
        let Some(installed) = Installed::require(version) else { continue };
        time_limit(TEST_LIMIT, || {
            let dir = TempDir::new().unwrap();
            let record = dir.join("recorded").display().to_string();
            let mut source = shape(&installed, machine).memory(Memory::Anonymous).start().unwrap();
            source.wait_passes(2, LIMIT).unwrap();
            let more = ["--record", &record, "--digest"];
            let (receive, uri) = Multifd::receive(&receive_uri(dir.path(), true), &dir.join("checkpoint"), &more);
            snapshot(&mut source, &uri);
            let received = receive.done();
            let inspected = Multifd::start(["inspect", &record, "--digest"]).done();
            assert_eq!((&inspected["mode"], &inspected["broken-rule"]), (&"snapshot".into(), &Value::Null));
            for known in received["ram-blocks"].as_array().unwrap() {
                assert_eq!(block(&inspected, known["name"].as_str().unwrap())["digest"], known["digest"], "{known}");
            }
            assert_eq!(inspected["devices"].as_array().unwrap().len(), received["devices"].as_array().unwrap().len());
        });
        report(TABLE, &format!("{:4} {machine}, recorded and inspected: ok", version.name()));
    }
}

#[test]
fn a_machine_that_describes_nothing_and_shared_memory_make_no_difference() {
    for (version, machine) in SOURCES {
        let Some(installed) = Installed::require(version) else { continue };
        time_limit(TEST_LIMIT, || {
            let dir = TempDir::new().unwrap();
            let file = dir.join("checkpoint");
            // The memory is a shared file here.
            let mut source = shape(&installed, &format!("{machine},suppress-vmdesc=on")).start().unwrap();
            source.wait_passes(2, LIMIT).unwrap();
            let (receive, uri) = Multifd::receive(&receive_uri(dir.path(), true), &file, &[]);
            snapshot(&mut source, &uri);
            assert_is_of_one_instant(&receive.done());
            assert_runs_on_after(&mut source, 3);
        });
        report(TABLE, &format!("{:4} {machine}, suppress-vmdesc=on, memory in a shared file: ok", version.name()));
    }
}

#[test]
fn a_source_that_is_killed_in_the_middle_leaves_no_file() {
    for (version, machine) in SOURCES {
        let Some(installed) = Installed::require(version) else { continue };
        time_limit(TEST_LIMIT, || {
            let dir = TempDir::new().unwrap();
            let mut source = shape(&installed, machine).memory(Memory::Anonymous).start().unwrap();
            source.wait_passes(2, LIMIT).unwrap();
            source.qmp().set_capabilities(&[("background-snapshot", true)]).unwrap();
            source.qmp().set_parameters(&[("max-bandwidth", json!(8 << 20))]).unwrap();
            let (receive, uri) = Multifd::receive(&receive_uri(dir.path(), true), &dir.join("checkpoint"), &[]);
            source.qmp().migrate(&uri).unwrap();
            wait_until_under_way(&mut source);
            source.kill().unwrap();
            let ended = receive.end();
            assert!(matches!(ended.status.code(), Some(1 | 4)), "{} {}", ended.status, ended.log);
            assert_eq!(entries(dir.path()), [""; 0]);
        });
        report(TABLE, &format!("{:4} {machine}, source killed in the middle: ok", version.name()));
    }
}
