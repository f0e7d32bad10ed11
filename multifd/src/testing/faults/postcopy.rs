//! Sources that switch to postcopy: what is taken, and each rule that one can break on main or on a preempt connection.

use multifd_proto::{
    command::{Command, PostcopyAdvice},
    encoder::MainEncoder,
    postcopy::{DiscardRange, Package},
    return_path::Message,
    stream::{Section, SectionKind},
};

use super::script::*;
use crate::destination::{Mode, Options};

pub(super) const LEN: u64 = PAGE as u64;
/// The element type of a command.
const COMMAND: u8 = 8;

pub(super) fn encoded(encode: impl FnOnce(&mut MainEncoder) -> &mut MainEncoder) -> Vec<u8> {
    let mut encoder = MainEncoder::default();
    encode(&mut encoder).bytes.clone()
}

/// Main up to the first page, from a source that may switch.
pub(super) fn announced(channels: bool) -> Wire {
    let mut start = MainEncoder::default();
    start.header().configuration("multifd").command(&Command::OpenReturnPath).command(&Command::Ping(1));
    let advice = PostcopyAdvice { page_size_summary: LEN, page_size: LEN };
    start.command(&Command::PostcopyAdvise(Some(advice)));
    start.ram_start(1, BLOCKS.iter().map(|(_, pages)| (pages * PAGE) as u64).sum());
    for (name, pages) in BLOCKS {
        start.block(&multifd_proto::ram::BlockEntry::new(block(name), (pages * PAGE) as u64));
    }
    if channels {
        start.flush();
    }
    Wire::from_encoder(start.eos().footer(1))
}

/// A section of ram with these pages, each filled with its byte; 0 is a page of zeros.
pub(super) fn part(pages: &[(&str, u64, u8)], end: bool) -> Vec<u8> {
    let mut out = MainEncoder::default();
    out.ram_part(1, end);
    for &(name, page, fill) in pages {
        match fill {
            0 => out.zero_page(&block(name), page * LEN),
            fill => out.page(&block(name), page * LEN).raw(&[fill; PAGE]),
        };
    }
    out.eos().footer(1).bytes.clone()
}

/// RAM_DISCARD of these pages.
pub(super) fn discard(name: &str, pages: std::ops::Range<u64>) -> Vec<u8> {
    let ranges = vec![DiscardRange { start: pages.start * LEN, len: (pages.end - pages.start) * LEN }];
    encoded(|out| out.command(&Command::PostcopyRamDiscard { block: block(name), ranges }))
}

fn cpu() -> Vec<u8> {
    let cpu = Section { kind: SectionKind::Full, id: 7, name: "cpu".to_owned(), instance: 0, version: 1 };
    encoded(|out| out.section(&cpu).raw(b"state of cpu 0").footer(7))
}

/// PACKAGED with the state of one CPU, and PING 4.
pub(super) fn packaged() -> Vec<u8> {
    let mut bytes = Vec::new();
    Package::encode(&cpu(), &mut bytes);
    [bytes, encoded(|out| out.command(&Command::Ping(4)))].concat()
}

pub(super) fn end() -> Vec<u8> {
    [part(&[], true), encoded(|out| out.eof())].concat()
}

/// A source without channels up to the switch: pages 0 to 5 of `ram` came, 2 to 4 are dirty again, 6 and 7 and `rom` were not sent.
fn switched() -> Wire {
    let pages: Vec<_> = (0..6).map(|page| ("ram", page, 0x10 + page as u8)).collect();
    let wire = announced(false).then(part(&pages, false));
    wire.then(discard("ram", 2..5)).then(discard("ram", 6..8)).then(discard("rom", 0..2))
}

/// What was discarded by [`switched`].
pub(super) const DISCARDED: [(&str, u64, u8); 7] = [
    ("ram", 2, 0x72),
    ("ram", 3, 0),
    ("ram", 4, 0x74),
    ("ram", 6, 0x76),
    ("ram", 7, 0),
    ("rom", 0, 0x80),
    ("rom", 1, 0x81),
];

/// The same behind the package.
pub(super) fn given_away() -> Wire {
    switched().then(encoded(|out| out.command(&Command::Ping(2)))).then(packaged())
}

/// Without any channel, whether told so or not.
pub(super) fn no_channels(told: bool) -> Options {
    Options { channels: told.then_some(0), ..Options::default() }
}

#[track_caller]
fn assert_taken(received: &Received) {
    let report = received.outcome.as_ref().unwrap();
    assert_eq!(report.mode, Mode::Postcopy);
    assert_eq!(received.calls, ["load", "start"]);
    let first_byte = |page: u64| received.ram.page_bytes(page)[PAGE - 1];
    assert_eq!((0..8).map(first_byte).collect::<Vec<_>>(), [0x10, 0x11, 0x72, 0, 0x74, 0x15, 0x76, 0]);
    let rom = received.ram.layout().blocks()[1].first_page();
    assert_eq!([first_byte(rom), first_byte(rom + 1)], [0x80, 0x81]);
    let pongs = [1, 2, 3, 4].map(Message::Pong);
    assert_eq!(received.answers, [&pongs[..], &[Message::Shut(0)]].concat());
}

#[test]
fn every_page_that_was_discarded_is_taken_again_and_the_devices_after_them() {
    for told in [true, false] {
        for parts in [1, 2, 7] {
            let mut wire = given_away();
            for pages in DISCARDED.chunks(parts) {
                wire = wire.then(part(pages, false));
            }
            assert_taken(&receive_untold(&[wire.then(end())], no_channels(told)));
        }
    }
}

/// A source that switches before it has sent a page.
#[test]
fn a_source_that_switches_at_once_is_taken() {
    let all: Vec<_> = (0..8).map(|page| ("ram", page, 0x10)).chain((0..2).map(|page| ("rom", page, 0x20))).collect();
    let wire = announced(false).then(discard("ram", 0..8)).then(discard("rom", 0..2)).then(packaged());
    let received = receive_untold(&[wire.then(part(&all, false)).then(end())], no_channels(false));
    assert_eq!(received.outcome.unwrap().mode, Mode::Postcopy);
    assert!(received.ram.page_bytes(7) == [0x10; PAGE]);
}

#[test]
fn pages_on_a_preempt_connection_count_as_those_of_main_do() {
    let preempt = |pages: &[(&str, u64, u8)], end: bool| {
        // A section without its head, its end and its footer.
        let bytes = part(pages, false);
        let words = &bytes[5..bytes.len() - 8 - 5];
        Wire::raw(words).then(if end { &b"\0\0\0\0\0\0\0\x10"[..] } else { b"" })
    };
    for split in 0..=DISCARDED.len() {
        let (on_main, on_preempt) = DISCARDED.split_at(split);
        let main = given_away().then(part(on_main, false)).then(end());
        // QEMU 7.2 sends the word at the end, newer ones may close the connection without it.
        for (end, ends) in [(true, true), (false, true), (true, false)] {
            let mut other = preempt(on_preempt, end);
            other.ends = ends;
            for wires in [[main.clone(), other.clone()], [other, main.clone()]] {
                assert_taken(&receive(&wires, no_channels(true)));
            }
        }
    }
    // Twice, on two connections or on one.
    let main = given_away().then(part(&DISCARDED, false)).then(end());
    let received = receive(&[main, preempt(&DISCARDED[..1], true).ends()], no_channels(true));
    let error = received.outcome.map(drop).map_err(|error| error.to_string());
    // Main may have ended before the other connection has said anything.
    let twice = "page at 0x2000 of \"ram\" comes in postcopy and is not one that was discarded and is missing";
    assert!(error.as_ref().is_ok() || error.as_ref().is_err_and(|error| error.contains(twice)), "{error:?}");
    // Two pages are missing on main: what comes twice comes while one of them is still missing, whatever the order.
    let main = given_away().then(part(&DISCARDED[2..], false)).then(end());
    let twice_on_one = preempt(&[DISCARDED[0], DISCARDED[0], DISCARDED[1]], true).ends();
    let received = receive(&[main, twice_on_one], no_channels(true));
    let error = received.outcome.unwrap_err().to_string();
    assert!(error.contains("comes in postcopy and is not one that was discarded"), "{error}");
    assert!(!received.calls.contains(&"start"));
    // In the middle of a page.
    let main = given_away().then(part(&DISCARDED[1..], false)).then(end());
    let received = receive(&[main, preempt(&DISCARDED[..1], false).cut_by(1)], no_channels(true));
    let error = received.outcome.unwrap_err().to_string();
    assert!(error.starts_with("preempt connection, at byte"), "{error}");
}

/// Strangers that begin as a preempt connection might, or as a migration that goes on elsewhere.
#[test]
fn a_connection_that_brings_no_page_of_this_migration_is_a_strangers() {
    let main = given_away().then(part(&DISCARDED, false)).then(end());
    for bytes in [
        &b"\0\0\0\0\0\0\x10\x08\x01x"[..],
        b"\0\0\0\0\0\0\x10\x28",
        b"\0\0\0\0\0\xff\x10\x08\x03ram",
        b"\0\0\0\0",
        b"\x08\0\x0a\0\x04\x03ram",
        b"GET / HTTP",
    ] {
        for ends in [true, false] {
            let mut stranger = Wire::raw(bytes);
            stranger.ends = ends;
            assert_taken(&receive(&[stranger, main.clone()], no_channels(true)));
        }
    }
}

/// Each is refused by name. Behind the package the error says what became of the VM.
#[test]
fn a_switch_that_breaks_a_rule_is_refused() {
    let command = |number: u16, payload: &[u8]| {
        [&[COMMAND][..], &number.to_be_bytes(), &(payload.len() as u16).to_be_bytes(), payload].concat()
    };
    let announced = announced(false);
    for (good, bad, message) in [
        (&announced, command(4, b""), "POSTCOPY_LISTEN outside of a package"),
        (&announced, command(5, b""), "POSTCOPY_RUN outside of a package"),
        (
            &announced,
            command(9, b""),
            "POSTCOPY_RESUME: an interrupted postcopy migration cannot be continued here, take it from its beginning",
        ),
        (&announced, discard("vga", 0..1), "block \"vga\" is unknown"),
        (
            &announced,
            discard("rom", 0..3),
            "range to discard at 0x0, 0x3000 bytes, does not fit \"rom\" (0x2000 bytes)",
        ),
        (
            &announced,
            discard("rom", 1..1),
            "range to discard at 0x1000, 0x0 bytes, does not fit \"rom\" (0x2000 bytes)",
        ),
        (&announced, command(7, b"\x40\0\0\x01"), "package of 1073741825 bytes exceeds 1073741824"),
        (&switched(), part(&[], false), "SECTION_PART between POSTCOPY_RAM_DISCARD and PACKAGED"),
        (
            &switched(),
            discard("ram", 4..5),
            "range to discard at 0x4000 of \"ram\" has pages that were discarded before",
        ),
        (&switched(), cpu(), "SECTION_FULL after the switch to postcopy"),
    ] {
        let received = receive(&[good.clone().then(&bad)], no_channels(true));
        let error = received.outcome.unwrap_err();
        assert!(error.to_string().contains(message), "{error}");
        assert!(error.is_peers_fault() && received.calls.is_empty(), "{message}");
        // After the switch has begun it is not refused: QEMU 7.2 would not take its VM back.
        let refused = received.answers.last() == Some(&Message::Shut(1));
        assert_eq!(refused, good.len() == announced.len(), "{message}: {:?}", received.answers);
    }
    let outside = "page at 0x1000 of \"ram\" comes in postcopy and is not one that was discarded and is missing";
    for (bad, message) in [
        (part(&[("ram", 1, 7)], false), outside),
        (part(&[("ram", 1, 0)], false), outside),
        (
            part(&[("ram", 2, 7), ("ram", 2, 7)], false),
            "page at 0x2000 of \"ram\" comes in postcopy and is not one that was discarded and is missing",
        ),
        (discard("ram", 0..1), "POSTCOPY_RAM_DISCARD after the package"),
        (packaged(), "PACKAGED after the package"),
        (cpu(), "SECTION_FULL after the switch to postcopy"),
        (
            encoded(|out| out.ram_part(1, false).flush()),
            "a word other than a whole page in postcopy is not allowed in this stream",
        ),
        (
            [part(&DISCARDED, false), end(), b"\x06\0\0\0\x02{}".to_vec()].concat(),
            "more bytes after the end of the stream",
        ),
        (
            [part(&DISCARDED[1..], false), end()].concat(),
            "the stream ended and 1 of the 7 pages that were discarded at the switch to postcopy are missing",
        ),
    ] {
        let received = receive(&[given_away().then(&bad)], no_channels(true));
        let error = received.outcome.unwrap_err();
        let crate::error::Error::AfterRun { reason, .. } = &error else { panic!("{message}: {error}") };
        assert!(reason.to_string().ends_with(message), "{reason} and not {message}");
        assert!(error.is_peers_fault() && received.calls.is_empty(), "{message}");
    }
}

/// The source has not announced it, or could not be told that all is well.
#[test]
fn a_switch_without_announcement_is_refused() {
    for bad in [discard("ram", 0..1), packaged()] {
        let received = receive(&[Wire::main().then(bad), Wire::channel(0).sync()], Options::default());
        let error = received.outcome.unwrap_err().to_string();
        assert!(error.ends_with("from a source that has not announced postcopy"), "{error}");
    }
}

/// A package that is cut, or without one of its ends.
#[test]
fn a_package_that_is_not_whole_is_refused_and_the_vm_is_at_the_source() {
    let whole = packaged();
    let package = &whole[9..whole.len() - 9];
    for len in [0, 4, 5, 20, package.len() - 5, package.len() - 1] {
        let bad = [&[8, 0, 7, 0, 4, 0, 0, 0, len as u8][..], &package[..len]].concat();
        let received = receive(&[switched().then(bad)], no_channels(true));
        let error = received.outcome.unwrap_err();
        assert!(matches!(error, crate::error::Error::AfterRun { .. }), "{len}: {error}");
        assert!(error.to_string().contains("package of"), "{len}: {error}");
    }
}

/// The connection breaks at each byte of what follows the package: nothing is started, and the error says where the VM is.
#[test]
fn a_source_that_ends_behind_the_package_has_the_vm() {
    let whole = given_away().then(part(&DISCARDED, false)).then(end());
    let before = given_away().len() as usize;
    for len in (before..whole.bytes.len()).step_by(997).chain([whole.bytes.len() - 1]) {
        let received = receive(&[Wire::raw(&whole.bytes[..len]).ends()], no_channels(true));
        let error = received.outcome.unwrap_err().to_string();
        assert!(received.calls.is_empty());
        // Its end may be noticed as early as with the answer to the first PING.
        let noticed_before = error.starts_with("return path");
        assert!(noticed_before || error.contains("its VM is whole there, and paused"), "{error}");
    }
}

/// The third law: what the rounds brought is in place before anything is discarded, and no packet of a round comes later. Its pages would
/// be over those that were pushed since.
#[test]
fn no_packet_of_a_round_may_come_after_the_switch() {
    let round = encoded(|out| out.ram_part(1, false).flush().eos().footer(1));
    let main = announced(true).then(round).then(discard("ram", 0..8)).then(discard("rom", 0..2)).then(packaged());
    let all: Vec<_> = (0..8).map(|page| ("ram", page, 0x10)).chain((0..2).map(|page| ("rom", page, 0x20))).collect();
    let main = main.then(part(&all, false)).then(end());
    let channel = Wire::channel(0).sync().then(pages(&[0x1000])).sync();
    let received = receive(&[main.clone(), channel.clone()], Options::default());
    assert_eq!(received.outcome.unwrap().mode, Mode::Postcopy);
    assert!(received.ram.page_bytes(1) == [0x10; PAGE], "what was pushed is there, not what the channel brought");
    // Whichever of the two is read first.
    for order in [[0, 1], [1, 0]] {
        let late = channel.clone().then(pages(&[0x1000]));
        let wires = [&main, &late];
        let received = receive(&order.map(|index| wires[index].clone()), Options::default());
        let error = received.outcome.map(drop).map_err(|error| error.to_string());
        let refused = "channel 0 has pages after the last sync point";
        // Main may have come to its end before the channel is read on: then it is ended with all connections.
        assert!(error.is_ok() || error.as_ref().is_err_and(|error| error.contains(refused)), "{error:?}");
        assert!(received.ram.page_bytes(1) == [0x10; PAGE] || error.is_err());
        assert!(received.ram.page_bytes(1) != [0x5a; PAGE] || !received.calls.contains(&"start"));
    }
}

/// A package before the last channel has come: what it would have brought in the rounds is not known.
#[test]
fn a_switch_before_all_channels_have_come_is_refused() {
    let kept = announced(false).then(discard("ram", 1..8)).then(discard("rom", 0..2)).then(packaged());
    let received = receive_untold(&[kept], no_channels(false));
    let error = received.outcome.unwrap_err().to_string();
    assert!(error.contains("no channel came, and main has not named every page"), "{error}");
}
