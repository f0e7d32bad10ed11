//! Each rule of device state on channels that a source can break, and each operation that can go wrong meanwhile.

use std::{collections::BTreeMap, time::Duration};

use multifd_proto::{
    command::{BodyLength, Command},
    device_state::{HEAD_LEN, MAX_STATE, StatePacket},
    encoder::MainEncoder,
    extension::{Extension, Extensions, Offer},
    packet::HELLO_LEN,
    ram::BlockEntry,
    stream::{Section, SectionKind},
};

use super::{
    injected::{self, Attempt, Guest, Owner, Plans, migrate, settle},
    late::receive_with_reset,
    script::*,
};
use crate::{
    destination::Options,
    error::Error,
    section_body::chunk_head,
    sections::{PACKET_STATE, Sections},
    testing::faulty::Fault,
};

/// Main of a source of ours up to the end of the last round.
fn main_of_ours() -> MainEncoder {
    let mut encoder = MainEncoder::default();
    let extensions = Extensions::known();
    encoder.header().configuration("multifd").config_offer(&Offer { channels: 1, token: None, extensions });
    encoder.command(&Command::OpenReturnPath);
    encoder.ram_start(1, BLOCKS.iter().map(|(_, pages)| (pages * PAGE) as u64).sum());
    for (name, pages) in BLOCKS {
        encoder.block(&BlockEntry::new(block(name), (pages * PAGE) as u64));
    }
    encoder.flush().eos().footer(1).ram_part(1, true).flush().eos().footer(1);
    encoder
}

/// The same with the section of a device, whose state is `said` to be so long and comes in packets of these lengths.
fn main_with(said: Option<u64>, lens: &[u32]) -> Wire {
    let mut encoder = main_of_ours();
    encoder.command(&Command::SectionLength(BodyLength::Packets(said)));
    let (kind, name) = (SectionKind::Full, "live".to_owned());
    encoder.section(&Section { kind, id: 2, name, instance: 4, version: 1 });
    for &len in lens {
        encoder.raw(&chunk_head(len));
    }
    encoder.raw(&chunk_head(0)).footer(2).eof().vm_description(b"{}");
    Wire::from_encoder(&encoder)
}

const FIRST: StatePacket<'static> = StatePacket { name: "live", instance: 4, number: 0, len: 3 };

fn state(packet: &StatePacket<'_>) -> Vec<u8> {
    let mut bytes = vec![0; HEAD_LEN];
    packet.encode_into(&mut bytes);
    bytes.resize(HEAD_LEN + packet.len as usize, 7);
    bytes
}

/// The same with the 32-bit field at `at` overwritten.
fn state_but(at: usize, value: u32) -> Vec<u8> {
    let mut bytes = state(&FIRST);
    bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
    bytes
}

/// A channel that has reached the end of the last round.
fn channel() -> Wire {
    Wire::raw(told_hello(0, 1).encode()).sync_number(0).sync_number(1)
}

/// Where what follows begins.
const BEHIND: usize = HELLO_LEN + 2 * HEADER;

#[track_caller]
fn refused_state(rule: &str, main: Wire, packets: impl AsRef<[u8]>, message: &str) {
    let wires = [main, channel().then(packets)];
    let received = refused(rule, &wires, Options::default(), channel_at(0, BEHIND), message);
    assert!(received.outcome.unwrap_err().is_peers_fault(), "{rule}");
}

#[test]
fn a_packet_that_breaks_a_rule_is_refused_with_the_rule_and_its_place() {
    let good = || main_with(None, &[3]);
    let limit = MAX_STATE + 8;
    for size in [0, 8, limit + 1, u32::MAX] {
        let message = format!("device-state packet with {size} bytes, expected 9 to {limit}");
        refused_state("size", good(), state_but(272, size), &message);
    }
    let message = "block name \"\" is not 1 to 255 bytes of UTF-8 without NUL";
    refused_state("no name", good(), state_but(12, 0), message);
    let said = "and main says 3 bytes of \"live\" instance 4";
    for (rule, packet, message) in [
        ("name", StatePacket { name: "nic", ..FIRST }, "device-state packet 0 has 3 bytes of \"nic\" instance 4"),
        ("instance", StatePacket { instance: 5, ..FIRST }, "device-state packet 0 has 3 bytes of \"live\" instance 5"),
        ("longer", StatePacket { len: 4, ..FIRST }, "device-state packet 0 has 4 bytes of \"live\" instance 4"),
        ("shorter", StatePacket { len: 2, ..FIRST }, "device-state packet 0 has 2 bytes of \"live\" instance 4"),
    ] {
        refused_state(rule, good(), state(&packet), &format!("{message}, {said}"));
    }
}

#[test]
fn a_packet_that_comes_too_early_or_was_not_agreed_on_is_refused() {
    let hello = Wire::raw(told_hello(0, 1).encode());
    let wires = [main_with(None, &[3]), hello.clone().then(state(&FIRST))];
    let message = "device-state packet before its first SYNC";
    refused("before the first SYNC", &wires, Options::default(), channel_at(0, HELLO_LEN), message);

    let wires = [main_with(None, &[3]), hello.sync_number(0).then(state(&FIRST))];
    let message = "device-state packet before the last round is over";
    refused("in a round", &wires, Options::default(), channel_at(0, HELLO_LEN + HEADER), message);

    let options = || Options { extensions: Extensions::known().without(Extension::StatePackets), ..Options::default() };
    let by_main = [main_with(None, &[3]), channel()];
    let received = receive(&by_main, options());
    let error = received.outcome.unwrap_err().to_string();
    assert!(error.ends_with("SECTION_PACKETS without being agreed on"), "{error}");
    assert!(received.calls.is_empty());
    // Main waits in the last round, and says nothing of state.
    let main = Wire::from_encoder(&main_of_ours());
    let wires = [main, channel().then(state(&FIRST))];
    let message = "device-state packet for \"live\" instance 4: nothing here can take a part of its state from a channel; a checkpoint \
                   of a QEMU's whole VM can (multifd receive, multifd checkpoint), or unplug this device before the migration";
    refused("not agreed on", &wires, options(), channel_at(0, BEHIND), message);
}

/// Bytes behind one packet are read with it, and are the beginning of one that may not follow.
#[test]
fn a_reset_within_a_packet_whose_beginning_was_read_with_the_one_before_is_no_end() {
    let second = state(&StatePacket { number: 1, ..FIRST });
    let read = 100;
    let channel = channel().then(state(&FIRST)).then(&second[..read]);
    let error = receive_with_reset(&main_with(None, &[3, 3]), 1, &channel).unwrap_err();
    let Error::Io { at, source } = &error else { panic!("{error}") };
    assert_eq!(*at, channel_at(0, channel.bytes.len()), "{error}");
    assert_eq!(source.kind(), std::io::ErrorKind::ConnectionReset, "{error}");
}

#[test]
fn a_number_that_comes_twice_is_refused() {
    for number in [0, 1] {
        let packets = [state(&FIRST), state(&StatePacket { number, ..FIRST }), state(&StatePacket { number, ..FIRST })];
        let wires = [main_with(None, &[3, 3, 3]), channel().then(packets.concat())];
        let received = receive(&wires, Options::default());
        let error = received.outcome.unwrap_err().to_string();
        assert!(error.ends_with(&format!("device-state packet {number} came before")), "{error}");
        assert!(!received.calls.contains(&"start"));
    }
}

#[test]
fn state_of_another_length_than_announced_is_refused() {
    for (said, found) in [(2, 3), (7, 6), (5, 6)] {
        let packets = [state(&FIRST), state(&StatePacket { number: 1, ..FIRST })].concat();
        let wires = [main_with(Some(said), &[3, 3]), channel().then(packets)];
        let received = receive(&wires, Options::default());
        let error = received.outcome.unwrap_err().to_string();
        assert!(error.starts_with("main, at byte "), "{error}");
        assert!(error.ends_with(&format!(": the state has {found} bytes, and {said} were announced")), "{error}");
        assert!(!received.calls.contains(&"start"));
    }
}

#[test]
fn a_packet_of_no_section_ends_the_migration() {
    for main in [main_with(None, &[3]), Wire::from_encoder(main_of_ours().eof().vm_description(b"{}"))] {
        let packets = [state(&FIRST), state(&StatePacket { number: 1, ..FIRST })].concat();
        let received = receive(&[main, channel().then(packets)], Options::default());
        let error = received.outcome.unwrap_err().to_string();
        assert!(error.ends_with("is not a part of any section"), "{error}");
        assert!(!received.calls.contains(&"start"));
    }
}

#[test]
fn a_packet_that_is_missing_is_not_waited_for_without_end() {
    let gap = || state(&StatePacket { number: 1, ..FIRST });
    // The channel ends: what is missing cannot come any more.
    for packets in [Vec::new(), gap()] {
        let end = BEHIND + packets.len();
        let wires = [main_with(None, &[3]), channel().then(packets).ends()];
        let message = "the connection ended in the middle";
        let received = refused("the channel ends", &wires, Options::default(), channel_at(0, end), message);
        assert_eq!(received.calls, ["load"]);
    }
    // It is at a packet for which there is no room before that.
    for number in [WINDOW_ENDS, u64::MAX] {
        let wires = [main_with(None, &[3]), channel().then(state(&StatePacket { number, ..FIRST }))];
        let received = receive(&wires, Options::default());
        let error = received.outcome.unwrap_err();
        let message = "device-state packet 0 does not come, all channels are further on";
        assert!(error.to_string().ends_with(message) && error.is_peers_fault(), "{error}");
        assert_eq!(received.calls, ["load"]);
    }
    // It stays open and says nothing.
    for packets in [vec![], gap()] {
        let wires = [main_with(None, &[3]), channel().then(packets)];
        let options = Options { stall_limit: Some(Duration::from_millis(500)), ..Options::default() };
        let received = receive(&wires, options);
        let error = received.outcome.unwrap_err();
        assert!(matches!(error, Error::Stalled { .. }), "{error}");
        assert_eq!(received.calls, ["load"]);
    }
}

#[test]
fn an_end_inside_of_a_packet_is_an_error_with_its_place() {
    for (rule, cut, offset) in [
        ("inside the prefix", HEAD_LEN - 2, BEHIND + 5),
        ("inside the header", 20, BEHIND + HEAD_LEN - 17),
        ("inside the number", 5, BEHIND + HEAD_LEN - 2),
        ("before the state", 3, BEHIND + HEAD_LEN),
        ("inside the state", 1, BEHIND + HEAD_LEN + 2),
    ] {
        let wires = [main_with(None, &[3]), channel().then(state(&FIRST)).cut_by(cut)];
        let message = "the connection ended in the middle";
        refused(rule, &wires, Options::default(), channel_at(0, offset), message);
    }
}

/// It found that a channel which failed there left others to themselves, and with them the guest's memory in their hands.
#[test]
fn each_operation_goes_wrong_once_while_state_is_on_the_channels() {
    let guest = || {
        let mut guest = Guest::new();
        guest.vm.at_save = Some(Box::new(|out: &mut Sections| {
            out.section("live", 0, 1, &vec![5; PACKET_STATE + 1])?;
            out.section_from("live", 1, 1, &mut |out| Ok(out.write_all(&vec![6; PACKET_STATE + 1])?))
        }));
        guest
    };
    let (mut owners, mut injected) = (BTreeMap::<Owner, usize>::new(), 0);
    for on_source in [true, false] {
        for connection in 0..=usize::from(injected::CHANNELS) {
            for fault in [Fault::Cut, Fault::Shorten(300)] {
                for operation in 0.. {
                    let plans = Plans::one(connection, operation, fault.clone());
                    let mut attempt = Attempt::new(injected::small());
                    *(if on_source { &mut attempt.source } else { &mut attempt.destination }) = plans.clone();
                    let mut guest = guest();
                    let outcome = migrate(&mut guest, attempt, |_, _| {});
                    if plans.0[connection].operations() <= operation {
                        break;
                    }
                    injected += 1;
                    let side = if on_source { "source" } else { "destination" };
                    let context =
                        format!("{fault:?} at operation {operation} of connection {connection} of the {side}");
                    let complete = outcome.to.live.iter().all(|(_, state)| state.len() == PACKET_STATE + 1);
                    let loaded = outcome.to.live.len();
                    let owner = settle(&mut guest, outcome, &context);
                    assert!(owner != Owner::Destination || (complete && loaded == 2), "{context}: {loaded}");
                    *owners.entry(owner).or_default() += 1;
                }
            }
        }
    }
    assert!(owners[&Owner::Source] > 50, "{owners:?}");
    test_support::report("faults", &format!("device state on channels: faults injected {injected}, {owners:?}"));
}

/// The first number beyond the window.
const WINDOW_ENDS: u64 = crate::destination::STATE_WINDOW;
