//! Background snapshots: the state of one instant, of a guest that runs on and writes as fast as it can.

use std::{
    env,
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use qemu_peer::{BootGuest, Installed, Memory, Qemu, QemuBuilder, Status, Version};
use serde_json::{Value, json};
use test_support::{TempDir, report, skip, time_limit};

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

/// How long the guest was paused each time, in milliseconds, by the events that came since they were taken last.
pub fn pauses(qemu: &mut Qemu) -> Vec<f64> {
    // All earlier events come before this answer.
    qemu.qmp().run_state().unwrap();
    let (mut pauses, mut stopped) = (Vec::new(), None);
    for event in qemu.qmp().take_events() {
        let part = |name: &str| event.timestamp[name].as_f64().unwrap();
        let time = || part("seconds") * 1e3 + part("microseconds") / 1e3;
        match event.name.as_str() {
            "STOP" => stopped = Some(time()),
            "RESUME" => pauses.extend(stopped.take().map(|stopped| time() - stopped)),
            _ => {}
        }
    }
    pauses
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

/// How many bytes of pages the guest of `source` makes dirty in a second.
fn dirty_rate(source: &mut Qemu) -> u64 {
    const PASSES: u16 = 10;
    let passes = source.output().unwrap().passes();
    let begun = Instant::now();
    let written = source.wait_passes(passes + usize::from(PASSES), LIMIT).unwrap().passes() - passes;
    (written as f64 * f64::from(guest().pages()) * 4096.0 / begun.elapsed().as_secs_f64()) as u64
}

/// Carries one connection to `path` on to `uri`, at `rate` bytes per second at most.
fn slow_link(path: &Path, uri: &str, rate: u64) -> thread::JoinHandle<()> {
    let listener = UnixListener::bind(path).unwrap();
    let onward = uri.strip_prefix("unix:").unwrap().to_owned();
    thread::spawn(move || {
        let (mut from, _) = listener.accept().unwrap();
        let mut to = UnixStream::connect(onward).unwrap();
        let (mut piece, mut carried, begun) = (vec![0; 64 << 10], 0, Instant::now());
        while let Ok(len @ 1..) = from.read(&mut piece) {
            carried += len as u64;
            let due = Duration::from_secs_f64(carried as f64 / rate as f64);
            thread::sleep(due.saturating_sub(begun.elapsed()));
            if to.write_all(&piece[..len]).is_err() {
                return;
            }
        }
    })
}

/// It is paused once, for none of its pages, whatever the link carries; it waits where it writes a page that has not been sent.
#[test]
fn a_guest_that_dirties_five_times_what_the_link_carries_is_kept_at_one_instant() {
    for (version, machine) in SOURCES {
        let Some(installed) = Installed::require(version) else { continue };
        time_limit(TEST_LIMIT, || {
            let dir = TempDir::new().unwrap();
            let file = dir.join("checkpoint");
            let mut source = shape(&installed, machine).memory(Memory::Anonymous).start().unwrap();
            source.wait_passes(2, LIMIT).unwrap();
            let dirty = dirty_rate(&mut source);
            let rate = (dirty / 5).min(SLOW);
            let (receive, uri) = Multifd::receive(&receive_uri(dir.path(), false), &file, &[]);
            let link = slow_link(&dir.join("link"), &uri, rate);
            source.qmp().take_events();
            let begun = Instant::now();
            snapshot(&mut source, &format!("unix:{}", dir.join("link").display()));
            assert_is_of_one_instant(&receive.done());
            let all = begun.elapsed().as_secs_f64() * 1e3;
            link.join().unwrap();
            let pauses = pauses(&mut source);
            let &[paused] = &*pauses else { panic!("expected one pause: {pauses:?}") };
            // The link alone takes more than two seconds for the memory.
            assert!(paused < all / 4.0, "paused for {paused} ms of {all} ms");
            let said = source.qmp().query_migrate().unwrap()["downtime"].clone();

            let ram = dir.join("ram");
            let (path, to) = (file.display().to_string(), ram.display().to_string());
            Multifd::start(["inspect", &path, "--extract", "pc.ram", "--output", &to]).done();
            guest().check_ram_file(&ram).unwrap();
            assert_runs_on_after(&mut source, 3);
            let row = format!(
                "{:4} {machine}, dirties {} MB/s, link {} MB/s: paused for {paused:.1} ms of {all:.0} ms (STOP to RESUME; QEMU says \
                 {said} ms)",
                version.name(),
                dirty / 1_000_000,
                rate / 1_000_000,
            );
            report(TABLE, &row);
        });
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

/// Measured where `MULTIFD_SNAPSHOT_PAUSES` says how often.
#[test]
fn how_long_a_guest_is_paused() {
    let Some(times) = env::var("MULTIFD_SNAPSHOT_PAUSES").ok().map(|text| text.parse::<usize>().expect("a number"))
    else {
        return skip("how long a guest is paused is measured where MULTIFD_SNAPSHOT_PAUSES says how often");
    };
    for (version, machine) in SOURCES {
        let Some(installed) = Installed::require(version) else { continue };
        for mib in [MIB, 512, 2048] {
            time_limit(RUN_LIMIT, || {
                let dir = TempDir::new().unwrap();
                let file = dir.join("checkpoint");
                let builder = Qemu::builder(&installed).machine(machine).memory_mib(mib).limit(RUN_LIMIT);
                let mut source = builder.guest(BootGuest::filling(mib)).start().unwrap();
                source.wait_passes(2, RUN_LIMIT).unwrap();
                let (mut paused, mut said) = (Vec::new(), Vec::new());
                for _ in 0..times {
                    source.qmp().take_events();
                    let (receive, uri) = Multifd::receive(&receive_uri(dir.path(), false), &file, &["--force"]);
                    snapshot(&mut source, &uri);
                    assert_is_of_one_instant(&receive.done_within(RUN_LIMIT));
                    paused.extend(pauses(&mut source));
                    said.push(source.qmp().query_migrate().unwrap()["downtime"].as_u64().unwrap());
                    assert_runs_on_after(&mut source, 1);
                }
                assert_eq!(paused.len(), times);
                paused.sort_by(f64::total_cmp);
                said.sort_unstable();
                let row = format!(
                    "{:4} {mib:4} MiB, all of it written: STOP to RESUME {:.1} ms (most {:.1}); QEMU says {} ms (most {})",
                    version.name(),
                    paused[times / 2],
                    paused[times - 1],
                    said[times / 2],
                    said[times - 1]
                );
                report(TABLE, &row);
            });
        }
    }
}

/// The most that a slow link carries in a test, in bytes per second.
const SLOW: u64 = 16_000_000;
const RUN_LIMIT: Duration = Duration::from_secs(900);
