//! Each rule that main can break, and each part of QEMU's format that is refused there.

use multifd_proto::{
    encoder::MainEncoder,
    ram::BlockEntry,
    stream::{Section, SectionKind},
};

use super::script::*;
use crate::{
    destination::{Destination, Options},
    error::Error,
    ram::Ram,
    testing::memory,
    testing::vm::TestDestination,
    transport::Connect,
};

/// Main whose `bad` part begins behind `good`, beside a channel that has reached the first sync point.
fn check(rule: &str, good: &Wire, bad: impl AsRef<[u8]>, message: &str) -> Received {
    let wires = [good.clone().then(bad), Wire::channel(0).sync()];
    let received = refused(rule, &wires, Options::default(), main_at(good.len()), message);
    assert!(!received.calls.contains(&"load"), "{rule}: loaded");
    received
}

fn encoded(encode: impl FnOnce(&mut MainEncoder) -> &mut MainEncoder) -> Vec<u8> {
    let mut encoder = MainEncoder::default();
    encode(&mut encoder).bytes.clone()
}

fn command(number: u16, payload: &[u8]) -> Vec<u8> {
    [&[COMMAND][..], &number.to_be_bytes(), &(payload.len() as u16).to_be_bytes(), payload].concat()
}

/// Pages that follow each other are put into place together, and whatever else is said of one of them comes after that.
#[test]
fn what_main_says_last_of_a_page_counts() {
    let [ram, rom] = ["ram", "rom"].map(block);
    let mut part = MainEncoder::default();
    part.ram_part(1, false);
    let mut page = |name, index: usize, value: u8| {
        part.page(name, (index * PAGE) as u64).raw(&[value; PAGE]);
    };
    for index in [0, 1, 2, 5, 6] {
        page(&ram, index, 0x11);
    }
    page(&ram, 6, 0x22);
    page(&ram, 5, 0x33);
    page(&rom, 0, 0x44);
    page(&ram, 7, 0x55);
    part.zero_page(&ram, 7 * PAGE as u64).zero_page(&ram, PAGE as u64);
    // Eight bytes behind the first two.
    part.page(&ram, 3 * PAGE as u64)
        .raw(&[0x66; PAGE])
        .xbzrle(&ram, 3 * PAGE as u64, 10)
        .raw(b"\x02\x08\x77\x77\x77\x77\x77\x77\x77\x77");
    part.page(&ram, PAGE as u64).raw(&[0; PAGE]).page(&rom, PAGE as u64).raw(&[0x88; PAGE]);
    part.flush().eos().footer(1);
    let main = Wire::main().then(&part.bytes).then(&main_end().bytes);
    let received = receive(&[main, Wire::channel(0).sync().sync().sync()], Options::default());
    received.outcome.unwrap();
    let mut changed = [0x66; PAGE];
    changed[2..10].fill(0x77);
    let (zeros, filled) = ([0; PAGE], |value| [value; PAGE]);
    let expected = [
        filled(0x11),
        zeros,
        filled(0x11),
        changed,
        zeros,
        filled(0x33),
        filled(0x22),
        zeros,
        filled(0x44),
        filled(0x88),
    ];
    for (page, expected) in (0u64..).zip(expected) {
        // Blocks begin at multiples of 64 pages in the numbers of pages.
        let page = if page < 8 { page } else { page - 8 + received.ram.layout().blocks()[1].first_page() };
        assert!(received.ram.page_bytes(page) == expected, "page {page}");
    }
}

/// A display counter decided that RAM was complete, at the first device: a VM without devices started with whatever its
/// memory held before.
#[test]
fn a_vm_without_devices_starts_with_zeros_where_no_page_was_sent() {
    test_support::time_limit(std::time::Duration::from_secs(60), || {
        let ram = Ram::for_test(&BLOCKS).not_fresh();
        let stale = ram.blocks()[0].range(5 * PAGE as u64, PAGE).unwrap();
        stale.write(&[0x77; PAGE]);
        let (listener, connector) = memory::listener(1 << 20);
        let wires = [Wire::main().then(&main_end().bytes), Wire::channel(0).sync().sync()];
        let streams: Vec<_> = wires
            .iter()
            .map(|wire| {
                let mut stream = connector.connect().unwrap();
                stream.write(&wire.bytes, &[]).unwrap();
                stream
            })
            .collect();
        let mut vm = TestDestination::new(ram.clone());
        let close_timeout = std::time::Duration::from_millis(100);
        let options = Options { channels: Some(1), close_timeout, ..Options::default() };
        Destination::new(options).run(&mut vm, Box::new(listener), &mut ()).unwrap();
        drop(streams);
        assert_eq!(vm.calls(), ["prepare", "start"]);
        assert!(ram.page_bytes(5) == [0; PAGE]);
    });
}

#[test]
fn what_main_must_not_begin_with_is_refused() {
    let version = Wire::raw(*b"QEVM\0\0\0\x02");
    refused("version", &[version], Options::default(), main_at(0), "stream version 2 instead of 3");
}

#[test]
fn a_configuration_that_does_not_fit_is_refused() {
    let head = Wire::from_encoder(MainEncoder::default().header().configuration("multifd"));
    let bare = Wire::from_encoder(MainEncoder::default().header());
    for (rule, good, bad, message) in [
        (
            "no configuration",
            &bare,
            vec![1],
            "the stream has no configuration: machine types before 2.4 (such as pc-i440fx-2.3) are not supported",
        ),
        ("no configuration but a footer", &bare, vec![0x7e], "footer instead of the configuration"),
        (
            "endless machine type",
            &bare,
            vec![7, 0xff, 0xff, 0xff, 0xff],
            "length of the machine type of 4294967295 exceeds 255",
        ),
        ("page size", &head, encoded(|e| e.config_page_bits(14)), "page size 0x4000 of the peer is not ours (0x1000)"),
        (
            "page size beyond 2^64",
            &head,
            encoded(|e| e.config_page_bits(200)),
            "page size 0x0 of the peer is not ours (0x1000)",
        ),
        (
            "capability",
            &head,
            encoded(|e| e.config_capabilities(&["colour"])),
            "capability \"colour\" of the peer is not supported",
        ),
        (
            "subsection",
            &head,
            [&[SUBSECTION, 3][..], b"abc", &[0, 0, 0, 1]].concat(),
            "configuration subsection \"abc\" version 1 is not understood",
        ),
    ] {
        let received = receive(&[good.clone().then(&bad)], Options::default());
        let error = received.outcome.unwrap_err();
        assert_eq!(error.to_string(), format!("{}: {message}", main_at(good.len())), "{rule}");
        assert!(error.is_peers_fault());
    }
}

/// A checkpoint of such a stream would have zeros in place of the guest's memory.
#[test]
fn memory_that_is_not_in_the_stream_is_said_to_be_elsewhere() {
    let mut main = MainEncoder::default();
    main.header().configuration("multifd").config_capabilities(&["x-ignore-shared"]);
    let received = receive(&[Wire::from_encoder(&main)], Options::default());
    let error = received.outcome.unwrap_err();
    assert!(error.to_string().contains("memory in files that both sides map is not in its stream"), "{error}");
    assert!(error.is_peers_fault());
}

#[test]
fn commands_of_postcopy_and_replication_are_refused_by_name() {
    let good = Wire::main();
    for (number, payload, message) in [
        (4, &b""[..], "POSTCOPY_LISTEN outside of a package"),
        (5, b"", "POSTCOPY_RUN outside of a package"),
        (6, b"\0\x03ram\0", "POSTCOPY_RAM_DISCARD from a source that has not announced postcopy"),
        (7, b"\0\0\x10\0", "PACKAGED from a source that has not announced postcopy"),
        (8, b"", "ENABLE_COLO: continuous replication is refused"),
        (
            9,
            b"",
            "POSTCOPY_RESUME: an interrupted postcopy migration cannot be continued here, take it from its beginning",
        ),
        (
            10,
            b"\x03ram",
            "RECV_BITMAP: an interrupted postcopy migration cannot be continued here, take it from its beginning",
        ),
        (0, b"", "command 0 is unknown"),
        (12, b"", "command 12 is unknown"),
        (2, b"\0", "command PING with 1 bytes of payload"),
        (1, b"", "OPEN_RETURN_PATH a second time"),
    ] {
        check(message, &good, command(number, payload), message);
    }
    let early = Wire::from_encoder(MainEncoder::default().header().configuration("multifd"));
    check("ping", &early, command(2, &[0; 4]), "PING without an open return path");
}

#[test]
fn a_block_list_that_breaks_a_rule_is_refused() {
    let start =
        |total| Wire::from_encoder(MainEncoder::default().header().configuration("multifd").ram_start(1, total));
    let entry = |name: &str, len| encoded(|e| e.block(&BlockEntry::new(block(name), len)));
    check("too long", &start(0x8000), entry("ram", 0x9000), "block list announces 0x8000 bytes and lists 0x9000");
    check(
        "sum beyond 2^64",
        &start(0x8000).then(entry("a", 0x1000)),
        entry("b", 0xffff_ffff_ffff_f000),
        "block list announces 0x8000 bytes and lists 0xffffffffffffffff",
    );
    check("twice", &start(0x8000).then(entry("ram", 0x1000)), entry("ram", 0x1000), "block \"ram\" is listed twice");
    check("no length", &start(0x8000), entry("ram", 0), "block \"ram\" has length 0x0");
    check("part of a page", &start(0x8000), entry("ram", 0x1001), "block \"ram\" has length 0x1001");
    check("no name", &start(0x8000), [0; 9], "block name \"\" is not 1 to 255 bytes of UTF-8 without NUL");
}

#[test]
fn blocks_that_are_not_ours_are_refused_before_any_page() {
    let list = |blocks: &[(&str, u64)]| {
        let mut encoder = MainEncoder::default();
        encoder.header().configuration("multifd").ram_start(1, blocks.iter().map(|(_, len)| len).sum());
        for (name, len) in blocks {
            encoder.block(&BlockEntry::new(block(name), *len));
        }
        Wire::from_encoder(encoder.flush().eos().footer(1))
    };
    for (blocks, message) in [
        (&[("ram", 0x8000)][..], "this VM has RAM block \"rom\", which the source does not have"),
        (&[("ram", 0x9000), ("rom", 0x2000)], "RAM block \"ram\" has 0x9000 bytes on the source and 0x8000 here"),
        (
            &[("ram", 0x8000), ("rom", 0x2000), ("vga", 0x1000)],
            "the source has RAM block \"vga\" (0x1000 bytes), which this VM does not have",
        ),
        (
            &[("ram", 1 << 62), ("rom", 0x2000)],
            "RAM block \"ram\" has 0x4000000000000000 bytes on the source and 0x8000 here",
        ),
    ] {
        let received = receive(&[list(blocks), Wire::channel(0).sync()], Options::default());
        let error = received.outcome.unwrap_err();
        assert_eq!(error.to_string(), message);
        assert!(error.is_peers_fault());
        assert_eq!(received.calls, Vec::<&str>::new());
    }
}

#[test]
fn a_list_of_endless_blocks_is_refused() {
    let mut encoder = MainEncoder::default();
    encoder.header().configuration("multifd").ram_start(1, !0xfff);
    for index in 0..4096 {
        encoder.block(&BlockEntry::new(block(&format!("b{index}")), 0x1000));
    }
    let bad = encoded(|e| e.block(&BlockEntry::new(block("one more"), 0x1000)));
    check("too many blocks", &Wire::from_encoder(&encoder), bad, "more than 4096 RAM blocks");
}

#[test]
fn words_of_ram_that_break_a_rule_are_refused() {
    let part = Wire::main().then(encoded(|e| e.ram_part(1, false)));
    let word = |word: u64, rest: &[u8]| [&word.to_be_bytes()[..], rest].concat();
    let named = Wire { ..part.clone().then(word(0x1002, b"\x03ram\0")) };
    for (rule, good, bad, message) in [
        ("page outside", &part, word(0x8008, b"\x03ram"), "page at 0x8000 lies outside \"ram\" (0x8000 bytes)"),
        ("zero page outside", &part, word(0x8002, b"\x03ram\0"), "page at 0x8000 lies outside \"ram\" (0x8000 bytes)"),
        (
            "continued page outside",
            &named,
            word(0xffff_ffff_ffff_f022, b"\0"),
            "page at 0xfffffffffffff000 lies outside \"ram\" (0x8000 bytes)",
        ),
        ("unknown block", &part, word(8, b"\x04disk"), "block \"disk\" is unknown"),
        (
            "block continued from nowhere",
            &part,
            word(0x28, b""),
            "page at 0x0 continues a block, and no block was named before",
        ),
        ("fill byte", &part, word(2, b"\x03ram\x01"), "zero page at 0x0 has fill byte 0x01"),
        ("RDMA", &part, word(0x80, b""), "RAM word 0x80 belongs to RDMA, which is refused"),
        ("unknown flags", &part, word(0x400, b""), "RAM word 0x400 has flags 0x400"),
        ("unaligned page", &part, word(0x1009, b"\x03ram"), "RAM word 0x1009 has flags 0x9"),
        ("second list", &part, word(0x8004, b""), "block list after the first word of ram"),
        ("XBZRLE header", &part, word(0x40, b"\x03ram\x02\0\x01"), "XBZRLE: unknown header at byte 0 of the diff"),
        (
            "XBZRLE length",
            &part,
            word(0x40, b"\x03ram\x01\xff\xff"),
            "XBZRLE: longer than a page at byte 65535 of the diff",
        ),
        ("page of nothing", &part, word(0x100, b"\x03ram\0\0\0\0"), "compressed page of 0 bytes at 0x0"),
        ("page of 4 GiB", &part, word(0x100, b"\x03ram\xff\xff\xff\xff"), "compressed page of 4294967295 bytes at 0x0"),
    ] {
        check(rule, good, bad, message);
    }
    let before = Wire::from_encoder(&main_start());
    check("page before the first sync point", &before, word(8, b"\x03ram"), "page before the first sync point");
    let section = Wire::from_encoder(main_start().eos().footer(1)).then(encoded(|e| e.ram_part(1, false)));
    let message = "FLUSH in a stream without one in the START section of ram";
    check("late FLUSH", &section, word(0x200, b""), message);
}

#[test]
fn elements_in_the_wrong_place_are_refused() {
    let good = Wire::main();
    let device = |kind, id, name: &str| {
        encoded(|e| e.section(&Section { kind, id, name: name.to_owned(), instance: 0, version: 1 }))
    };
    for (rule, bad, message) in [
        ("EOF", vec![0], "EOF before the END section of ram"),
        ("unknown element", vec![0x55], "element type 0x55 is unknown"),
        ("footer", vec![0x7e, 0, 0, 0, 1], "footer between sections"),
        ("unknown section", encoded(|e| e.ram_part(9, false)), "section id 9 is unknown"),
        ("ram twice", device(SectionKind::Start, 4, "ram"), "section \"ram\" with id 4 was started before"),
        ("id twice", device(SectionKind::Start, 1, "disk"), "section \"disk\" with id 1 was started before"),
        ("FULL ram", device(SectionKind::Full, 4, "ram"), "FULL section for ram, which is transferred in parts"),
    ] {
        check(rule, &good, bad, message);
    }
    let body = Wire::from_encoder(main_start().flush().eos());
    check("footer of another", &body, [0x7e, 0, 0, 0, 2], "footer of section 1 has id 2");
    check("no footer", &body, [3, 0, 0, 0, 1], "section 1 ends with 0x03 instead of a footer");
    let parts = [good.clone().then(device(SectionKind::Start, 5, "disk")), Wire::channel(0).sync()];
    let error = receive(&parts, Options::default()).outcome.unwrap_err();
    assert!(error.to_string().starts_with("section \"disk\" comes in parts, which only ram may; "), "{error}");
}

/// A VMM can do nothing with bitmaps of QEMU's disks. A source that has the capability and no bitmap says so.
#[test]
fn dirty_bitmaps_are_refused_unless_there_are_none() {
    let start = Section { kind: SectionKind::Start, id: 5, name: "dirty-bitmap".to_owned(), instance: 0, version: 1 };
    for (body, refused) in [(&b"\x01"[..], false), (b"\x1c\x02d0\x02bm\0\x01\0\0\x01\x01", true)] {
        let main = Wire::main().then(encoded(|e| e.section(&start).raw(body).footer(5))).then(&main_end().bytes);
        let received = receive(&[main, Wire::channel(0).sync().sync()], Options::default());
        match received.outcome {
            Ok(_) => assert!(!refused),
            Err(error) => {
                assert!(refused, "{error}");
                let message = error.to_string();
                assert!(
                    message.starts_with("section \"dirty-bitmap\" comes in parts, which only ram may; "),
                    "{message}"
                );
            }
        }
    }
}

#[test]
fn a_vmdescription_beyond_the_limit_is_refused_before_it_is_read() {
    let mut end = MainEncoder::default();
    end.ram_part(1, true).flush().eos().footer(1).eof();
    let good = Wire::main().then(&end.bytes);
    let wires = [good.clone().then([6, 0xff, 0xff, 0xff, 0xff]), Wire::channel(0).sync().sync()];
    let message = "vmdescription of 4294967295 bytes exceeds 16777216";
    refused("vmdescription", &wires, Options::default(), main_at(good.len()), message);
}

#[test]
fn bytes_behind_the_end_of_the_stream_are_refused() {
    let good = Wire::main().then(&main_end().bytes);
    for more in [&b"x"[..], b"\0", b"QEVM"] {
        let wires = [good.clone().then(more), Wire::channel(0).sync().sync()];
        let message = "more bytes after the end of the stream";
        refused("more bytes", &wires, Options::default(), main_at(good.len()), message);
    }
}

#[test]
fn an_end_anywhere_inside_main_is_an_error() {
    let whole = Wire::main().then(encoded(|e| {
        e.ram_part(1, false).zero_page(&block("rom"), 0x1000).page(&block("ram"), 0).raw(&[7; PAGE]).eos().footer(1)
    }));
    let whole = whole.then(encoded(|e| {
        let cpu = Section { kind: SectionKind::Full, id: 2, name: "cpu".to_owned(), instance: 0, version: 1 };
        e.ram_part(1, true)
            .flush()
            .eos()
            .footer(1)
            .section(&cpu)
            .raw(b"state of cpu 0")
            .footer(2)
            .eof()
            .vm_description(b"{}")
    }));
    let channel = || Wire::channel(0).sync().sync().ends();
    receive(&[whole.clone(), channel()], Options::default()).outcome.unwrap();
    let mut ends = 0;
    // Each byte of what is not a page's content, and some of that.
    // What ends before its first four bytes is not main yet, and a receiver waits for the source.
    for cut in (1..=whole.bytes.len() - 4).filter(|cut| cut % 97 == 0 || !(100..4000).contains(cut)) {
        let received = receive(&[whole.clone().cut_by(cut), channel()], Options::default());
        let error = received.outcome.err().unwrap_or_else(|| panic!("without the last {cut} bytes: accepted"));
        let text = error.to_string();
        // On a machine that is busy, main is found to have ended before the channel has joined.
        let gone = matches!(error, Error::SourceGone { .. });
        assert!(gone || text.ends_with("the connection ended in the middle"), "{cut}: {text}");
        assert!(text.starts_with("main, at byte "), "{cut}: {text}");
        assert!(!received.calls.contains(&"start"));
        ends += 1;
    }
    test_support::report("hostile bytes", &format!("ends inside main: {ends}"));
}

/// Element types, as they stand on the wire.
const SUBSECTION: u8 = 5;
const COMMAND: u8 = 8;
