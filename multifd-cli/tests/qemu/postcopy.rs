//! Checkpoints whose VM runs at once: real QEMUs as destinations of `multifd send --postcopy`.

use std::{
    fs,
    io::{self, Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use qemu_peer::{BootGuest, Installed, Qemu, Status, Version};
use serde_json::Value;
use test_support::{HugePages, TempDir, report, time_limit};

use crate::harness::{
    LIMIT, MIB, Multifd, Settings, TEST_LIMIT, assert_goes_on, entries, guest, listen, migrate_away, receive_uri, vm,
};

pub const TABLE: &str = "postcopy";

/// A checkpoint of a guest on `installed` that has made some passes, and the QEMU that it ran on.
pub fn checkpoint(installed: &Installed, machine: &str, file: &Path, dir: &TempDir) -> Qemu {
    let mut source = vm(installed, machine).start().unwrap();
    Settings::default().apply(&mut source);
    source.wait_passes(3, LIMIT).unwrap();
    let (receive, uri) = Multifd::receive(&receive_uri(dir.path(), false), file, &[]);
    migrate_away(&mut source, &uri);
    receive.done();
    source
}

/// A QEMU that waits for a VM to run before its memory is there, and where.
pub fn destination(installed: &Installed, machine: &str, preempt: bool, tcp: bool) -> (Qemu, String) {
    let mut destination = vm(installed, machine).incoming().start().unwrap();
    destination.qmp().set_capabilities(&[("postcopy-ram", true), ("postcopy-preempt", preempt)]).unwrap();
    let uri = listen(&mut destination, tcp);
    (destination, uri)
}

/// `multifd send --postcopy`, with what `more` says.
pub fn send(file: &Path, uri: &str, preempt: bool, more: &[&str]) -> Multifd {
    let file = file.display().to_string();
    let preempt: &[&str] = if preempt { &["--preempt"] } else { &[] };
    Multifd::start(["send", &file, uri, "--postcopy"].iter().chain(preempt).chain(more))
}

/// A number of the report about the postcopy.
pub fn figure(report: &Value, name: &str) -> u64 {
    report["postcopy"][name].as_u64().unwrap_or_else(|| panic!("no {name} in {report}"))
}

/// Waits until the VM in the checkpoint `file` is noted as handed over.
pub fn wait_handed_over(file: &Path) {
    let note = format!("{}.postcopy", file.display());
    let deadline = Instant::now() + LIMIT;
    while !fs::read_to_string(&note).unwrap_or_default().contains("\"handed-over\": 1") {
        assert!(Instant::now() < deadline, "it is not handed over");
        thread::sleep(Duration::from_millis(10));
    }
}

/// A VM of a checkpoint runs at once and gets all of its memory; the guest finds nothing wrong with it.
fn a_checkpoint_runs_at_once(version: Version, machine: &str, preempt: bool, tcp: bool) {
    let Some(installed) = Installed::require(version) else { return };
    time_limit(TEST_LIMIT, || {
        let dir = TempDir::new().unwrap();
        let file = dir.join("checkpoint");
        let source = checkpoint(&installed, machine, &file, &dir);
        let (mut destination, uri) = destination(&installed, machine, preempt, tcp);
        let sent = send(&file, &uri, preempt, &[]).done();
        assert_goes_on(&source, &mut destination);
        let pages = |name| figure(&sent, name);
        // Each page was sent once.
        let inspected = Multifd::start(["inspect", &file.display().to_string()]).done();
        let blocks = inspected["ram-blocks"].as_array().unwrap();
        let with_content: u64 = blocks.iter().map(|block| block["normal"].as_u64().unwrap()).sum();
        let total: u64 = blocks.iter().map(|block| block["pages"].as_u64().unwrap()).sum();
        assert_eq!(sent["ram"]["normal"].as_u64().unwrap(), with_content);
        assert_eq!(sent["ram"]["duplicate"].as_u64().unwrap(), total - with_content);
        assert_eq!(pages("zero-pages"), total - with_content);
        assert!(pages("urgent-pages") + pages("background-pages") >= with_content);
        assert!(pages("requests") >= pages("urgent-pages"));
        assert_eq!(pages("preempt-bytes") > 0, preempt);
        assert_eq!(entries(dir.path()), ["checkpoint"], "no note is left behind");
        report(
            TABLE,
            &format!(
                "{} {machine}, preempt {preempt}, tcp {tcp}: told to run after {} ms, {} requests, {} asked for, {} in the background, \
                 latency {}",
                version.name(),
                sent["postcopy"]["resume-time"],
                pages("requests"),
                pages("urgent-pages"),
                pages("background-pages"),
                sent["postcopy"]["request-latency-us"],
            ),
        );
    });
}

#[test]
fn a_checkpoint_of_7_2_runs_at_once() {
    a_checkpoint_runs_at_once(Version::V7_2, "pc-i440fx-7.2", false, false);
}

#[test]
fn a_checkpoint_of_7_2_runs_at_once_with_preempt() {
    a_checkpoint_runs_at_once(Version::V7_2, "pc-q35-7.2", true, true);
}

#[test]
fn a_checkpoint_of_10_0_runs_at_once() {
    a_checkpoint_runs_at_once(Version::V10_0, "pc-q35-10.0", false, true);
}

#[test]
fn a_checkpoint_of_10_0_runs_at_once_with_preempt() {
    a_checkpoint_runs_at_once(Version::V10_0, "pc-i440fx-10.0", true, false);
}

#[test]
fn a_checkpoint_of_11_1_runs_at_once() {
    a_checkpoint_runs_at_once(Version::V11_1, "pc-i440fx-11.1", false, false);
}

#[test]
fn a_checkpoint_of_11_1_runs_at_once_with_preempt() {
    a_checkpoint_runs_at_once(Version::V11_1, "pc-q35-11.1", true, true);
}

/// How much memory of the process is resident, in bytes.
fn resident(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

/// A guest of 2 GiB that uses 16 MiB: a restore costs these, on the host and on the wire, whichever way its memory comes.
#[test]
fn a_restore_costs_the_memory_in_use() {
    const BIG_MIB: u32 = 2048;
    const USED_MIB: u32 = 16;
    for (version, machine) in
        [(Version::V7_2, "pc-i440fx-7.2"), (Version::V10_0, "pc-q35-10.0"), (Version::V11_1, "pc-i440fx-11.1")]
    {
        let Some(installed) = Installed::require(version) else { continue };
        time_limit(TEST_LIMIT, || {
            let dir = TempDir::new().unwrap();
            let file = dir.join("checkpoint");
            let sparse = || {
                let builder = Qemu::builder(&installed).machine(machine).memory_mib(BIG_MIB).limit(TEST_LIMIT);
                builder.guest(BootGuest::filling(USED_MIB).slowed(2000))
            };
            let mut source = sparse().start().unwrap();
            Settings::default().apply(&mut source);
            source.wait_passes(3, LIMIT).unwrap();
            let (receive, uri) = Multifd::receive(&receive_uri(dir.path(), false), &file, &[]);
            migrate_away(&mut source, &uri);
            let blocks = receive.done()["ram-blocks"].clone();
            let count = |name: &str| blocks.as_array().unwrap().iter().map(|block| block[name].as_u64().unwrap()).sum();
            let (used, zeros): (u64, u64) = (count("normal"), count("zero"));
            assert!(used * 4096 < u64::from(2 * USED_MIB) << 20, "{blocks}");

            for postcopy in [false, true] {
                let mut destination = sparse().incoming().start().unwrap();
                let before = resident(destination.pid());
                let sent = if postcopy {
                    destination.qmp().set_capabilities(&[("postcopy-ram", true)]).unwrap();
                    let uri = listen(&mut destination, false);
                    send(&file, &uri, false, &["--clone"]).done()
                } else {
                    Settings::default().apply(&mut destination);
                    let uri = listen(&mut destination, false);
                    Multifd::start(["send", &file.display().to_string(), &uri]).done()
                };
                destination.qmp().wait_migration(&[Status::Completed], LIMIT).unwrap();
                destination.qmp().wait_run_state("running", LIMIT).unwrap();
                let output = destination.wait_passes(3, LIMIT).unwrap();
                assert!(!output.is_corrupted(), "{output:?}");
                let (added, wire) =
                    (resident(destination.pid()).saturating_sub(before), sent["ram"]["transferred"].as_u64().unwrap());
                // Of a page of zeros the name, of nine bytes; with the heads of pages, the devices and the rest.
                assert!(wire < used * 4200 + zeros * 10 + (1 << 20), "{wire} bytes for {used} pages and {zeros} zeros");
                // What QEMU itself takes for a guest that runs (code of TCG, threads) is in it.
                assert!(added < used * 4096 + (96 << 20), "{added} bytes more for {used} pages");
                let row = format!(
                    "{:4} {machine}, 2 GiB, {used} pages in use, {}: {} MiB more resident, {} KiB on the wire",
                    version.name(),
                    if postcopy { "--postcopy" } else { "send" },
                    added >> 20,
                    wire >> 10
                );
                report(TABLE, &row);
            }
        });
    }
}

/// Passes a connection on to `to`, from source to destination in pieces that are `late` each.
fn pass_on(from: TcpStream, to: &str, late: Duration) {
    let to = TcpStream::connect(to).unwrap();
    let (mut back_from, mut back_to) = (to.try_clone().unwrap(), from.try_clone().unwrap());
    thread::spawn(move || {
        let _ = io::copy(&mut back_from, &mut back_to);
        let _ = back_to.shutdown(Shutdown::Both);
    });
    let (mut from, mut to) = (from, to);
    thread::spawn(move || {
        let mut piece = vec![0; 64 << 10];
        while let Ok(len @ 1..) = from.read(&mut piece) {
            thread::sleep(late);
            if to.write_all(&piece[..len]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Both);
    });
}

/// Where the second of two connections is slow: the one for pages that the guest waits for.
fn with_a_slow_preempt_connection(uri: &str, late: Duration) -> String {
    let to = uri.strip_prefix("tcp:").unwrap().to_owned();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for late in [Duration::ZERO, late] {
            let Ok((stream, _)) = listener.accept() else { return };
            pass_on(stream, &to, late);
        }
    });
    format!("tcp:{address}")
}

/// The end of main overtakes the last pages that the guest waits for, on the other connection.
fn a_page_that_is_later_than_the_end_is_not_lost(version: Version, machine: &str) {
    let Some(installed) = Installed::require(version) else { return };
    time_limit(TEST_LIMIT, || {
        let dir = TempDir::new().unwrap();
        let file = dir.join("checkpoint");
        let source = checkpoint(&installed, machine, &file, &dir);
        let (mut destination, uri) = destination(&installed, machine, true, true);
        let uri = with_a_slow_preempt_connection(&uri, Duration::from_millis(1500));
        let sent = send(&file, &uri, true, &[]).done();
        assert!(figure(&sent, "urgent-pages") > 0);
        assert_goes_on(&source, &mut destination);
    });
    report(
        TABLE,
        &format!("{} {machine}: main ends before the last page that was asked for arrives: ok", version.name()),
    );
}

#[test]
fn a_page_that_is_later_than_the_end_is_not_lost_in_7_2() {
    a_page_that_is_later_than_the_end_is_not_lost(Version::V7_2, "pc-i440fx-7.2");
}

#[test]
fn a_page_that_is_later_than_the_end_is_not_lost_in_10_0() {
    a_page_that_is_later_than_the_end_is_not_lost(Version::V10_0, "pc-i440fx-10.0");
}

#[test]
fn a_page_that_is_later_than_the_end_is_not_lost_in_11_1() {
    a_page_that_is_later_than_the_end_is_not_lost(Version::V11_1, "pc-i440fx-11.1");
}

#[test]
fn a_destination_that_is_set_up_otherwise_or_dies_is_told_apart() {
    let Some(installed) = Installed::require(Version::V10_0) else { return };
    time_limit(TEST_LIMIT, || {
        let dir = TempDir::new().unwrap();
        let file = dir.join("checkpoint");
        let machine = "pc-i440fx-10.0";
        drop(checkpoint(&installed, machine, &file, &dir));
        // Another machine, and one without the capability.
        let (_other, uri) = destination(&installed, "pc-q35-10.0", false, true);
        send(&file, &uri, false, &[]).end().failed(1, "The VM does not run there");
        let mut plain = vm(&installed, machine).incoming().start().unwrap();
        let uri = listen(&mut plain, true);
        send(&file, &uri, false, &[]).end().failed(1, "postcopy-ram");
        assert_eq!(entries(dir.path()), ["checkpoint"]);
        // One that dies with a part of the memory: the file has it still, and the note says so.
        let (mut dies, uri) = destination(&installed, machine, true, true);
        let sending = send(&file, &uri, true, &["--max-bandwidth=8MB/s", "--recover-timeout=0s"]);
        wait_handed_over(&file);
        dies.wait_passes(1, LIMIT).unwrap();
        dies.kill().unwrap();
        let ended = sending.end();
        ended.failed(8, "the VM is at the destination, which lacks at least");
        assert_eq!(ended.report["incomplete"], true);
        assert_eq!(entries(dir.path()), ["checkpoint", "checkpoint.postcopy"]);
    });
}

/// What one guest asked for is sent first to the next one.
#[test]
fn pages_that_a_guest_asked_for_are_sent_first() {
    let Some(installed) = Installed::require(Version::V10_0) else { return };
    time_limit(TEST_LIMIT, || {
        let dir = TempDir::new().unwrap();
        let file = dir.join("checkpoint");
        let machine = "pc-i440fx-10.0";
        let source = checkpoint(&installed, machine, &file, &dir);
        let list = dir.join("faults").display().to_string();
        let (mut qemu, uri) = destination(&installed, machine, false, true);
        let slow = "--max-bandwidth=20MB/s";
        let sent = send(&file, &uri, false, &["--record-faults", &list, slow]).done();
        assert_goes_on(&source, &mut qemu);
        let faults = fs::read_to_string(&list).unwrap();
        let faults: Vec<&str> = faults.lines().filter(|line| line.starts_with("0x")).collect();
        assert!(!faults.is_empty() && faults.len() as u64 <= figure(&sent, "requests"), "{faults:?}");
        for when in ["before-run", "after-run"] {
            let (mut qemu, uri) = destination(&installed, machine, false, true);
            let again = send(&file, &uri, false, &["--prefetch", &list, "--prefetch-when", when, slow]).done();
            assert_goes_on(&source, &mut qemu);
            assert!(figure(&again, "prefetched-pages") > 0, "{again}");
            report(
                TABLE,
                &format!(
                    "{machine} at 20 MB/s, {} pages listed, {when}: told to run after {} ms, {} requests instead of {}, {} asked \
                     for instead of {}",
                    faults.len(),
                    again["postcopy"]["resume-time"],
                    figure(&again, "requests"),
                    figure(&sent, "requests"),
                    figure(&again, "urgent-pages"),
                    figure(&sent, "urgent-pages"),
                ),
            );
        }
    });
}

/// QEMU compares the sizes of pages before it runs anything. It says nothing on the connection, so the error names it.
#[test]
fn a_destination_with_huge_pages_is_refused_before_it_runs() {
    let installed: Vec<_> = Version::ALL.into_iter().filter_map(Installed::require).collect();
    // Each that is missing has said so.
    let Some(first) = installed.first() else { return };
    let Some(_pages) = HugePages::reserve(u64::from(MIB) / 2) else {
        return test_support::skip("no huge pages can be reserved here (as root)");
    };
    time_limit(TEST_LIMIT, || {
        let dir = TempDir::new().unwrap();
        let file = dir.join("checkpoint");
        let machine = "pc-i440fx-7.2";
        let source = checkpoint(first, machine, &file, &dir);
        drop(source);
        for installed in &installed {
            let memory = format!("memory-backend-memfd,id=pc.ram,size={MIB}M,hugetlb=on,hugetlbsize=2M");
            let shape = Qemu::builder(installed).machine(machine).memory_mib(MIB).guest(guest()).incoming();
            let shape = shape.arguments(&["-object", &memory, "-machine", "memory-backend=pc.ram"]);
            let mut destination = shape.limit(TEST_LIMIT).start().unwrap();
            destination.qmp().set_capabilities(&[("postcopy-ram", true)]).unwrap();
            let uri = listen(&mut destination, false);
            let ended = send(&file, &uri, false, &[]).end();
            ended.failed(1, "its memory must not be huge pages");
            assert_eq!(entries(dir.path()), ["checkpoint"], "the VM does not run there, so there is no note");
            assert!(destination.log().contains("page sizes"), "{}", destination.log());
        }
    });
}
