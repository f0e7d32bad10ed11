//! Background snapshots: taken only if it is certain that every page came once and every device is whole.

use std::{fs, thread, time::Duration};

use multifd_proto::{
    BlockName,
    command::Command,
    encoder::MainEncoder,
    ram::BlockEntry,
    stream::{Section, SectionKind},
    vmdesc::{OpaqueSection, VmDescription},
};
use test_support::TempDir;

use super::{Checkpoint, CheckpointError, Writer};
use crate::{
    destination::{Destination, Mode, Options, Report},
    error::{Error, Mismatch},
    ram::Ram,
    testing::{memory, vm::TestDestination},
    transport::Connect,
};

const BLOCKS: [(&str, u64); 2] = [("pc.ram", 6), ("rom", 2)];
const PAGE: u64 = 4096;
const RAM: u32 = 3;
const CPU: &[u8] = b"state of the cpu";
const TIMER: &[u8] = b"\x7e\0\0\0\x05\0\x06\0\0\0\x02{}";

/// Every page, in the order of the blocks.
fn all_pages() -> Vec<(&'static str, u64)> {
    BLOCKS.iter().flat_map(|&(name, pages)| (0..pages).map(move |page| (name, page))).collect()
}

fn beginning(return_path: bool) -> MainEncoder {
    let mut out = MainEncoder::default();
    out.header().configuration("pc-i440fx-10.0");
    if return_path {
        out.command(&Command::OpenReturnPath);
    }
    out.ram_start(RAM, BLOCKS.iter().map(|(_, pages)| pages * PAGE).sum());
    for (name, pages) in BLOCKS {
        out.block(&BlockEntry::new(BlockName::new(name).unwrap(), pages * PAGE));
    }
    out.eos().footer(RAM);
    out
}

/// A PART or END section with these pages; every third is zeros.
fn part(out: &mut MainEncoder, end: bool, pages: &[(&str, u64)]) {
    out.ram_part(RAM, end);
    for &(name, page) in pages {
        let block = BlockName::new(name).unwrap();
        match page % 3 {
            0 => out.zero_page(&block, page * PAGE),
            _ => out.page(&block, page * PAGE).raw(&[page as u8; PAGE as usize]),
        };
    }
    out.eos().footer(RAM);
}

fn device(out: &mut MainEncoder, id: u32, name: &str, body: &[u8]) {
    let section = Section { kind: SectionKind::Full, id, name: name.to_owned(), instance: 0, version: 1 };
    out.section(&section).raw(body).footer(id);
}

fn description(devices: &[(&str, usize)]) -> Vec<u8> {
    let opaque = devices.iter().map(|&(name, len)| OpaqueSection { name, instance: 0, version: 1, len: len as u64 });
    VmDescription::opaque(PAGE, opaque).to_json()
}

/// The state of all devices, with the description.
fn devices(out: &mut MainEncoder) {
    device(out, 4, "timer", TIMER);
    device(out, 5, "cpu", CPU);
    out.eof().vm_description(&description(&[("timer", TIMER.len()), ("cpu", CPU.len())]));
}

/// A stream with `pages` in two PARTs.
fn snapshot(pages: &[(&str, u64)]) -> Vec<u8> {
    let mut out = beginning(false);
    let (first, second) = pages.split_at(pages.len() / 2);
    part(&mut out, false, first);
    part(&mut out, false, second);
    devices(&mut out);
    out.bytes.clone()
}

/// Takes `stream`, whose source closes main behind it, into a checkpoint.
fn receive(stream: &[u8]) -> (TempDir, Result<Report, Error>) {
    let dir = TempDir::new().unwrap();
    let path = dir.join("checkpoint");
    let stream = stream.to_vec();
    let received = test_support::time_limit(Duration::from_secs(60), move || {
        let (listener, connector) = memory::listener(1 << 20);
        let source = thread::spawn(move || connector.connect().unwrap().write(&stream, &[]).unwrap());
        let mut writer = Writer::create(&path, false).unwrap();
        let received = writer.receive(Destination::new(Options::default()), Box::new(listener), &mut ());
        source.join().unwrap();
        assert_eq!(writer.is_published(), received.is_ok());
        received
    });
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), usize::from(received.is_ok()));
    (dir, received)
}

/// All pages were read, and then the destination waited for an END of ram until the source closed main: no snapshot could be
/// taken.
#[test]
fn a_snapshot_becomes_a_checkpoint_without_an_end_of_ram() {
    let (dir, received) = receive(&snapshot(&all_pages()));
    let report = received.unwrap();
    assert_eq!((report.mode, report.normal + report.zero), (Mode::Snapshot, 8));
    let checkpoint = Checkpoint::open(&dir.join("checkpoint")).unwrap();
    assert_eq!(checkpoint.blocks().iter().map(|block| block.pages_present).collect::<Vec<_>>(), [4, 1]);
    assert!(checkpoint.beside_ram().early().is_empty());
    let mut expected = MainEncoder::default();
    devices(&mut expected);
    let mut found = MainEncoder::default();
    found.raw(checkpoint.sections()).eof().vm_description(checkpoint.vmdescription());
    assert_eq!(&found.bytes, &expected.bytes);
}

/// The source waits for no answer, so the end of main is the end of the stream: none of its beginnings is one.
#[test]
fn a_snapshot_that_ends_early_is_none_wherever_it_ends() {
    let whole = snapshot(&all_pages());
    let description = description(&[("timer", TIMER.len()), ("cpu", CPU.len())]).len() + 5;
    // A connection that ends before it has said that it is main is a stranger's.
    for len in 8..whole.len() {
        // A machine may describe no device; then this is a whole stream.
        if len == whole.len() - description || len % 7 > 0 && len < whole.len() - 300 {
            continue;
        }
        let (_dir, received) = receive(&whole[..len]);
        let error = received.err().unwrap_or_else(|| panic!("taken with {len} of {} bytes", whole.len()));
        // Where the bytes of a device look like an end, that end does not fit.
        let unfit = matches!(error, Error::Checkpoint(CheckpointError::NotDescribed { .. }));
        assert!(unfit || matches!(error, Error::Io { .. } | Error::Protocol { .. }), "{len}: {error}");
    }
}

#[test]
fn a_snapshot_of_a_machine_that_describes_nothing_is_taken() {
    let whole = snapshot(&all_pages());
    let description = description(&[("timer", TIMER.len()), ("cpu", CPU.len())]).len() + 5;
    let (_dir, received) = receive(&whole[..whole.len() - description]);
    assert_eq!(received.unwrap().mode, Mode::Snapshot);
}

#[test]
fn a_snapshot_with_a_page_missing_or_sent_twice_is_refused() {
    let all = all_pages();
    for leave_out in 0..all.len() {
        let pages: Vec<_> =
            all.iter().enumerate().filter(|(index, _)| *index != leave_out).map(|(_, page)| *page).collect();
        let error = receive(&snapshot(&pages)).1.unwrap_err();
        let expected = Mismatch::SnapshotIncomplete { missing: 1, pages: 8, again: 0 };
        assert!(matches!(&error, Error::Mismatch(found) if *found == expected), "{leave_out}: {error}");
        // The same number of pages, one of them in the place of the one that is missing.
        let pages = [&pages[..], &[pages[0]]].concat();
        let error = receive(&snapshot(&pages)).1.unwrap_err();
        let expected = Mismatch::SnapshotIncomplete { missing: 1, pages: 8, again: 1 };
        assert!(matches!(&error, Error::Mismatch(found) if *found == expected), "{leave_out}: {error}");
    }
    // Nothing is missing, and still it is not of one instant.
    let error = receive(&snapshot(&[&all[..], &all[3..4]].concat())).1.unwrap_err();
    assert!(error.to_string().contains("pages were sent again 1 times"), "{error}");
}

/// A device that is needed before the last pages may come between two sections of ram, in any stream.
#[test]
fn state_between_two_parts_is_early_state_and_no_snapshot() {
    let all = all_pages();
    for end in [false, true] {
        let mut out = beginning(false);
        part(&mut out, false, &all);
        device(&mut out, 9, "early", b"needed early");
        part(&mut out, end, &all[..2]);
        if !end {
            part(&mut out, true, &[]);
        }
        device(&mut out, 5, "cpu", CPU);
        out.eof().vm_description(&description(&[("early", 12), ("cpu", CPU.len())]));
        let (dir, received) = receive(&out.bytes);
        assert_eq!(received.unwrap().mode, Mode::Live);
        let checkpoint = Checkpoint::open(&dir.join("checkpoint")).unwrap();
        let mut early = MainEncoder::default();
        device(&mut early, 9, "early", b"needed early");
        assert_eq!(checkpoint.beside_ram().early(), &early.bytes);
    }
}

#[test]
fn devices_that_are_not_those_described_are_refused() {
    let mut out = beginning(false);
    part(&mut out, false, &all_pages());
    device(&mut out, 4, "timer", TIMER);
    device(&mut out, 5, "cpu", CPU);
    out.eof().vm_description(&description(&[("timer", TIMER.len()), ("cpu", CPU.len() + 1)]));
    let error = receive(&out.bytes).1.unwrap_err();
    assert!(matches!(error, Error::Checkpoint(CheckpointError::NotDescribed { .. })), "{error}");
}

/// It waits for our answer, so it is no snapshot, and it has not sent the end of its memory.
#[test]
fn a_source_that_waits_for_an_answer_must_send_the_end_of_ram() {
    let mut out = beginning(true);
    part(&mut out, false, &all_pages());
    devices(&mut out);
    let error = receive(&out.bytes).1.unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error}");
}

/// The VM of a snapshot runs on at the source. It would run twice.
#[test]
fn a_vm_is_not_started_from_a_snapshot() {
    test_support::time_limit(Duration::from_secs(60), || {
        let blocks = BLOCKS.map(|(name, pages)| (name, pages as usize));
        let mut vm = TestDestination::new(Ram::for_test(&blocks));
        let (listener, connector) = memory::listener(1 << 20);
        let mut out = beginning(false);
        part(&mut out, false, &all_pages());
        // This VM has no state.
        device(&mut out, 5, "none", b"");
        out.eof().vm_description(b"{}");
        connector.connect().unwrap().write(&out.bytes, &[]).unwrap();
        let error = Destination::new(Options::default()).run(&mut vm, Box::new(listener), &mut ()).unwrap_err();
        assert!(matches!(error, Error::Mismatch(Mismatch::SnapshotRunsOn)), "{error}");
        assert!(!vm.calls().contains(&"start"), "{:?}", vm.calls());
    });
}
