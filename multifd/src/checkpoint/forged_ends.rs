//! Guests that put an end of the stream into their own devices' state, to have their checkpoint cut there.

use std::{thread, time::Duration};

use multifd_proto::{
    BlockName,
    command::Command,
    encoder::MainEncoder,
    ram::BlockEntry,
    stream::{Section, SectionKind},
    vmdesc::{OpaqueSection, VmDescription},
};
use test_support::TempDir;

use super::{
    Checkpoint, CheckpointError, Tail, Writer,
    tail::{QUIET, QUIET_UNDESCRIBED},
};
use crate::{
    destination::{Destination, Options},
    error::Error,
    testing::memory,
    transport::{Connect, Stream},
};

/// The state of a network card is `BEFORE`, bytes that the guest chose, and `AFTER`.
const BEFORE: &[u8] = b"registers of the card";
const AFTER: &[u8] = b"more registers";
pub(super) const TIMER: &[u8] = b"\0\0\0\x06\0\0\0\x02{}";
const CPU: &[u8] = b"state of the cpu";

fn section(id: u32, name: &str) -> Section {
    Section { kind: SectionKind::Full, id, name: name.to_owned(), instance: 0, version: 1 }
}

/// A description of devices with these bodies.
pub(super) fn description(devices: &[(&str, usize)]) -> Vec<u8> {
    let opaque = devices.iter().map(|&(name, len)| OpaqueSection { name, instance: 0, version: 1, len: len as u64 });
    VmDescription::opaque(4096, opaque).to_json()
}

/// End of state, and a description of these devices.
pub(super) fn end(devices: &[(&str, usize)]) -> Vec<u8> {
    let mut out = MainEncoder::default();
    out.eof().vm_description(&description(devices)).bytes.clone()
}

/// The device state of a VM with what its guest `chose` in it, and the description. The first section is also returned
/// alone: what comes before the bytes of the guest.
pub(super) fn state(chosen: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let nic = [BEFORE, chosen, AFTER].concat();
    let mut out = MainEncoder::default();
    out.section(&section(2, "timer")).raw(TIMER).footer(2);
    out.section(&section(3, "nic")).raw(&nic).footer(3);
    out.section(&section(4, "cpu")).raw(CPU).footer(4);
    let description = description(&[("timer", TIMER.len()), ("nic", nic.len()), ("cpu", CPU.len())]);
    (out.bytes.clone(), description)
}

/// What guests choose: each ends with the last byte of an end.
pub(super) fn forgeries() -> Vec<(&'static str, Vec<u8>)> {
    let footer = |id: u32| MainEncoder::default().footer(id).bytes.clone();
    let own = end(&[("timer", TIMER.len()), ("nic", BEFORE.len())]);
    let fake_cpu = MainEncoder::default().section(&section(4, "cpu")).raw(b"mine").footer(4).bytes.clone();
    vec![
        ("JSON", [&b"\0\x06\0\0\0\x02"[..], b"{}"].concat()),
        ("a description without the card", [footer(3), end(&[("timer", TIMER.len())])].concat()),
        ("a description without a footer", own.clone()),
        ("a description and the footer of another section", [footer(2), own.clone()].concat()),
        ("a description that fits", [footer(3), own.clone()].concat()),
        (
            "a description that fits, and a section of its own",
            [footer(3), fake_cpu, end(&[("timer", TIMER.len()), ("nic", BEFORE.len()), ("cpu", 4)])].concat(),
        ),
        ("two descriptions that fit", [footer(3), own.clone(), own].concat()),
    ]
}

/// Main of a migration without channels, whose source waits for our answer: up to device state.
fn beginning(early: &[u8]) -> Vec<u8> {
    let mut out = MainEncoder::default();
    out.header().configuration("multifd").command(&Command::OpenReturnPath).ram_start(1, 4096);
    out.block(&BlockEntry::new(BlockName::new("ram").unwrap(), 4096)).eos().footer(1);
    // A page with content, as only a source without channels has it on main.
    out.raw(early).ram_part(1, true).page(&BlockName::new("ram").unwrap(), 0).raw(&[1; 4096]).eos().footer(1);
    out.bytes.clone()
}

/// Receives a stream of `parts`, each with a pause before it, from a source that then waits for the answer and closes main.
fn receive(parts: Vec<(Duration, Vec<u8>)>) -> (TempDir, Result<(), Error>) {
    let dir = TempDir::new().unwrap();
    let path = dir.join("checkpoint");
    let received = test_support::time_limit(Duration::from_secs(120), move || {
        let (listener, connector) = memory::listener(1 << 20);
        let source = thread::spawn(move || {
            let mut main = connector.connect().unwrap();
            for (pause, part) in parts {
                thread::sleep(pause);
                main.write(&part, &[]).unwrap();
            }
            answer(&mut *main)
        });
        let mut writer = Writer::create(&path, false).unwrap();
        let report = writer.receive(Destination::new(Options::default()), Box::new(listener), &mut ());
        // A source is told exactly if the file is there.
        assert_eq!(source.join().unwrap() == Some(0), writer.is_published(), "{report:?}");
        report.map(drop)
    });
    (dir, received)
}

/// The status of the destination's SHUT.
fn answer(main: &mut dyn Stream) -> Option<u8> {
    let mut shut = [0; 8];
    main.read_exact(&mut shut).ok()?;
    assert_eq!(shut[..4], [0, 1, 0, 4], "SHUT");
    Some(shut[7])
}

/// Everything that the guest had must be in the checkpoint.
#[track_caller]
pub(super) fn assert_whole(
    case: &str,
    dir: &TempDir,
    received: Result<(), Error>,
    sections: &[u8],
    description: &[u8],
) {
    received.unwrap_or_else(|error| panic!("{case}: {error}"));
    let checkpoint = Checkpoint::open(&dir.join("checkpoint")).unwrap();
    assert_eq!(checkpoint.sections().len(), sections.len(), "{case}");
    assert_eq!(checkpoint.sections(), sections, "{case}");
    assert_eq!(checkpoint.vmdescription(), description, "{case}");
}

/// A boot sector in the memory of a network card cut its own checkpoint to 32,755 of 62,657 bytes. QEMU said that the
/// migration is complete, and the file does not load.
#[test]
fn an_end_inside_a_device_is_none_wherever_the_stream_is_cut_and_however_long_it_pauses() {
    thread::scope(|scope| {
        for (name, chosen) in forgeries() {
            let (sections, description) = state(&chosen);
            let stream = [
                &beginning(b"")[..],
                &sections,
                MainEncoder::default().eof().vm_description(&description).bytes.as_slice(),
            ]
            .concat();
            let forged = beginning(b"").len()
                + sections.windows(chosen.len()).position(|part| part == chosen).unwrap()
                + chosen.len();
            let pauses = [QUIET / 5, QUIET * 3 / 5, QUIET * 2, QUIET_UNDESCRIBED + Duration::from_millis(500)];
            for pause in pauses {
                for cut in [forged - 1, forged, forged + 1] {
                    let parts = vec![(Duration::ZERO, stream[..cut].to_vec()), (pause, stream[cut..].to_vec())];
                    let (sections, description) = (sections.clone(), description.clone());
                    scope.spawn(move || {
                        let case = format!("{name}, cut at {cut} ({forged}) for {pause:?}");
                        let (dir, received) = receive(parts);
                        assert_whole(&case, &dir, received, &sections, &description);
                    });
                }
            }
        }
    });
}

/// Each byte is a read of its own, so that each end is one of what has arrived.
#[test]
fn an_end_inside_a_device_is_none_when_bytes_come_one_by_one() {
    thread::scope(|scope| {
        for (name, chosen) in forgeries() {
            scope.spawn(move || {
                let (sections, description) = state(&chosen);
                let tail = [&sections[..], MainEncoder::default().eof().vm_description(&description).bytes.as_slice()]
                    .concat();
                let mut parts = vec![(Duration::ZERO, beginning(b""))];
                parts.extend(tail.iter().map(|byte| (Duration::from_micros(200), vec![*byte])));
                let (dir, received) = receive(parts);
                assert_whole(name, &dir, received, &sections, &description);
            });
        }
    });
}

/// Without a description, the footer of the section under way and an end of state are enough for a shape.
#[test]
fn a_footer_inside_a_device_ends_no_state_that_is_not_described() {
    let chosen = [MainEncoder::default().footer(3).bytes.as_slice(), b"\0"].concat();
    let (sections, _) = state(&chosen);
    let stream = [&beginning(b"")[..], &sections, b"\0"].concat();
    let cut = beginning(b"").len() + sections.windows(6).position(|part| part == chosen).unwrap() + 6;
    thread::scope(|scope| {
        for pause in [QUIET_UNDESCRIBED * 3 / 10, QUIET_UNDESCRIBED + Duration::from_millis(500)] {
            let parts = vec![(Duration::ZERO, stream[..cut].to_vec()), (pause, stream[cut..].to_vec())];
            let sections = &sections;
            scope.spawn(move || {
                let (dir, received) = receive(parts);
                assert_whole(&format!("{pause:?}"), &dir, received, sections, b"");
            });
        }
    });
}

/// A state that is not what its description says is refused while the source can still be told so.
#[test]
fn a_description_that_does_not_fit_is_refused() {
    let (sections, _) = state(b"");
    for devices in [&[][..], &[("timer", TIMER.len())], &[("timer", TIMER.len()), ("nic", 1), ("cpu", CPU.len())]] {
        let stream = [&beginning(b"")[..], &sections, &end(devices)].concat();
        let (dir, received) = receive(vec![(Duration::ZERO, stream)]);
        let error = received.unwrap_err();
        assert!(matches!(error, Error::Checkpoint(CheckpointError::NotDescribed { .. })), "{error}");
        assert!(error.is_peers_fault() && !dir.join("checkpoint").exists());
    }
}

/// Early sections have no length either. A guest that ends one early has to make up all the rest of the stream, and what
/// really follows shows that it did.
#[test]
fn an_early_section_that_ends_itself_is_never_accepted_as_the_whole() {
    let mut rest = MainEncoder::default();
    rest.footer(7).ram_part(1, true).eos().footer(1).section(&section(4, "cpu")).raw(b"mine").footer(4);
    let forged = [rest.bytes.as_slice(), &end(&[("early", 5), ("cpu", 4)])].concat();
    let early = |body: &[u8]| MainEncoder::default().section(&section(7, "early")).raw(body).footer(7).bytes.clone();
    let (sections, _) = state(b"");
    for (body, is_good) in [(&b"state"[..], true), (&[b"state", &forged[..], b"more"].concat(), false)] {
        let beginning = beginning(&early(body));
        let all =
            [("early", body.len()), ("timer", TIMER.len()), ("nic", BEFORE.len() + AFTER.len()), ("cpu", CPU.len())];
        let stream = [&beginning[..], &sections, &end(&all)].concat();
        let cut = beginning.len() - 40;
        let parts =
            vec![(Duration::ZERO, stream[..cut].to_vec()), (Duration::from_millis(200), stream[cut..].to_vec())];
        let (dir, received) = receive(parts);
        if is_good {
            assert_whole("early", &dir, received, &sections, &description(&all));
            continue;
        }
        received.unwrap_err();
        assert!(!dir.join("checkpoint").exists());
    }
    // An early section that the description does not have.
    let stream =
        [&beginning(&early(b"state"))[..], &sections, &end(&[("timer", TIMER.len()), ("nic", 35), ("cpu", 16)])];
    let (_dir, received) = receive(vec![(Duration::ZERO, stream.concat())]);
    assert!(matches!(received.unwrap_err(), Error::Checkpoint(CheckpointError::NotDescribed { .. })));
}

/// What a source sends after it was told that all is well does not vanish.
#[test]
fn bytes_after_the_confirmation_that_make_no_whole_are_reported() {
    let (sections, description) = state(b"");
    let stream =
        [&beginning(b"")[..], &sections, MainEncoder::default().eof().vm_description(&description).bytes.as_slice()]
            .concat();
    let parts = vec![(Duration::ZERO, stream), (QUIET + Duration::from_millis(500), b"more".to_vec())];
    let (dir, received) = receive(parts);
    let error = received.unwrap_err();
    let expected = "the source sent 4 bytes after the end of the stream, and the whole is no complete device state";
    assert_eq!(error.to_string(), expected);
    assert!(dir.join("checkpoint").exists());
}

#[test]
fn a_tail_is_its_bytes() {
    let (sections, vmdescription) = state(b"x");
    let described = Tail { sections: sections.clone(), vmdescription };
    for tail in [described, Tail { sections, vmdescription: Vec::new() }] {
        assert_eq!(Tail::in_file(&tail.to_bytes(), b""), Ok(tail));
    }
}
