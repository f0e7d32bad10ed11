//! Each rule that a channel can break: the migration ends with the rule, the channel and the byte, and nothing was
//! written outside of a block. And what is told of channels that break none.

use multifd_proto::{
    packet::{self, Compression, PacketHeader},
    return_path::Message,
};

use super::script::*;
use crate::{destination::Options, error::Error, ram::Ram};

/// Main, and a channel whose second packet is `bad`; both stay open.
fn behind_first_sync(bad: impl AsRef<[u8]>) -> [Wire; 2] {
    [Wire::main(), Wire::channel(0).sync().then(bad)]
}

/// Flags of a packet, as they stand on the wire.
const ZLIB: u32 = 0x02;
const ZSTD: u32 = 0x04;
const DEVICE_STATE: u32 = 0x40;

/// Where that packet begins: behind the hello and a SYNC packet.
const SECOND: usize = packet::HELLO_LEN + HEADER;

#[test]
fn a_packet_that_breaks_a_rule_is_refused_with_the_rule_and_its_place() {
    let mut no_name = pages(&[0x1000]);
    no_name[64..320].fill(0);
    let mut long_name = pages(&[0x1000]);
    long_name[64..320].fill(b'a');
    let mut latin_name = pages(&[0x1000]);
    latin_name[64] = 0xe9;
    let named =
        |name: &'static str| packet(&PacketHeader { block: name, normal: &[0], ..PacketHeader::sync_packet(1) });
    let unknown = PacketHeader { block: "disk", normal: &[0], payload_len: 4096, ..PacketHeader::sync_packet(1) };
    assert_eq!(named("ram").len(), HEADER);
    let zeros = |offset| packet(&PacketHeader { block: "ram", zero: &[offset], ..PacketHeader::sync_packet(1) });
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("magic", pages_but(&[0], 0, 0x1122_3345), "magic 0x11223345 instead of 0x11223344"),
        ("version", pages_but(&[0], 4, 2), "packet version 2 instead of 1"),
        ("unknown flag", pages_but(&[0], 8, 0x80), "packet flags 0x80"),
        ("two methods", pages_but(&[0], 8, 0x06), "packet flags 0x6"),
        ("IAA", pages_but(&[0], 8, 0x08), "compression QPL is not supported; none, zlib and zstd are"),
        ("UADK", pages_but(&[0], 8, 0x10), "compression UADK is not supported; none, zlib and zstd are"),
        ("QAT", pages_but(&[0], 8, 0x20), "compression QATzip is not supported; none, zlib and zstd are"),
        ("device state with SYNC", pages_but(&[0], 8, 0x41), "packet flags 0x41"),
        ("no block", no_name, "packet with pages but without a block name"),
        ("unknown block", packet(&unknown), "block \"disk\" is unknown"),
        ("page behind the end", pages(&[0x8000]), "page at 0x8000 lies outside \"ram\" (0x8000 bytes)"),
        (
            "page at the end of addresses",
            pages(&[0xffff_ffff_ffff_f000]),
            "page at 0xfffffffffffff000 lies outside \"ram\" (0x8000 bytes)",
        ),
        ("second page behind the end", pages(&[0, 0x9000]), "page at 0x9000 lies outside \"ram\" (0x8000 bytes)"),
        ("zero page behind the end", zeros(0x8000), "page at 0x8000 lies outside \"ram\" (0x8000 bytes)"),
        ("unaligned page", pages(&[0x1008]), "page at 0x1008 of \"ram\" is not aligned to 0x1000 bytes"),
        ("unaligned zero page", zeros(1), "page at 0x1 of \"ram\" is not aligned to 0x1000 bytes"),
        ("room for too many", pages_but(&[0], 12, 129), "1 normal and 0 zero pages with room for 129 of at most 128"),
        (
            "more pages than a packet has",
            pages_but(&[0], 16, 129),
            "129 normal and 0 zero pages with room for 128 of at most 128",
        ),
        (
            "as many pages as a number can say",
            pages_but(&[0], 16, u32::MAX),
            "4294967295 normal and 0 zero pages with room for 128 of at most 128",
        ),
        (
            "counts that wrap around together",
            pages_but(&[0], 32, u32::MAX),
            "1 normal and 4294967295 zero pages with room for 128 of at most 128",
        ),
        (
            "one byte of payload too many",
            pages_but(&[0], 20, 4097),
            "none payload of 4097 bytes for 1 pages of 0x1000 bytes",
        ),
        ("no payload for a page", pages_but(&[0], 20, 0), "none payload of 0 bytes for 1 pages of 0x1000 bytes"),
        (
            "4 GiB of payload",
            pages_but(&[0], 20, u32::MAX),
            "none payload of 4294967295 bytes for 1 pages of 0x1000 bytes",
        ),
    ];
    for (rule, bad, message) in &cases {
        let received = refused(rule, &behind_first_sync(bad), Options::default(), channel_at(0, SECOND), message);
        assert!(received.outcome.unwrap_err().is_peers_fault(), "{rule}");
        assert!(untouched(&received.ram), "{rule}: memory was written");
        assert!(!received.answers.contains(&Message::Shut(0)), "{rule}: confirmed");
    }
    // QEMU ends the name with the last byte of its field, whatever stands there.
    let message = format!("block \"{}\" is unknown", "a".repeat(255));
    refused("endless name", &behind_first_sync(long_name), Options::default(), channel_at(0, SECOND), &message);
    let message = "block name \"\\xe9am\" is not 1 to 255 bytes of UTF-8 without NUL";
    refused("not UTF-8", &behind_first_sync(latin_name), Options::default(), channel_at(0, SECOND), message);
    test_support::report("hostile bytes", &format!("packets on a channel: {} rules", cases.len() + 2));
}

#[test]
fn good_pages_before_a_bad_packet_are_in_place_and_nothing_else_is() {
    let wires = behind_first_sync([pages(&[0x2000, 0x5000]), pages(&[0x3000, 0x8000])].concat());
    let second = channel_at(0, SECOND + HEADER + 2 * PAGE);
    let message = "page at 0x8000 lies outside \"ram\" (0x8000 bytes)";
    let received = refused("page behind the end", &wires, Options::default(), second, message);
    for page in 0..8 {
        let expected = if page == 2 || page == 5 { 0x5a } else { 0 };
        assert_eq!(received.ram.page_bytes(page), [expected; PAGE], "page {page}");
    }
}

#[test]
fn a_packet_with_device_state_is_refused_by_name() {
    let mut bad = vec![0; packet::DEVICE_STATE_LEN];
    bad[..12].copy_from_slice(&pages_but(&[0], 8, DEVICE_STATE)[..12]);
    bad[12..16].copy_from_slice(b"vfio");
    bad[271] = 3;
    let message = "device-state packet for \"vfio\" instance 3: nothing here can take a part of its state from a channel; a checkpoint \
                   of a QEMU's whole VM can (multifd receive, multifd checkpoint), or unplug this device before the migration";
    refused("device state", &behind_first_sync(bad), Options::default(), channel_at(0, SECOND), message);
}

#[test]
fn a_page_before_the_first_sync_point_is_refused() {
    let wires = [Wire::main(), Wire::channel(0).then(pages(&[0]))];
    let message = "page before the first sync point";
    let received = refused("early page", &wires, Options::default(), channel_at(0, 64), message);
    assert!(untouched(&received.ram));
}

#[test]
fn an_end_inside_a_packet_is_an_error_and_between_two_it_is_missed_by_main() {
    let good = Wire::channel(0).sync().then(pages(&[0x1000]));
    let message = "the connection ended in the middle";
    for (rule, cut, offset) in [
        ("inside the prefix", HEADER + PAGE - 5, SECOND + 5),
        ("inside the header", HEADER + PAGE - 500, SECOND + 500),
        ("before the payload", PAGE, SECOND + HEADER),
        ("inside the payload", 1, SECOND + HEADER),
    ] {
        let wires = [Wire::main(), good.clone().cut_by(cut)];
        let received = refused(rule, &wires, Options::default(), channel_at(0, offset), message);
        assert!(!received.outcome.unwrap_err().is_peers_fault(), "{rule}: the network may have done that");
        for page in (0..8).filter(|page| *page != 1) {
            assert_eq!(received.ram.page_bytes(page), [0; PAGE], "{rule}");
        }
    }
    // Between two packets a channel may end, but not before its SYNC when main waits for that.
    let wires = [Wire::main().then(&main_end().bytes), good.ends()];
    let missing = "channel 0 ended without the SYNC packet of round 1";
    let error = receive(&wires, Options::default()).outcome.unwrap_err();
    assert!(error.to_string().ends_with(missing), "{error}");
    assert!(!error.is_peers_fault(), "the source may have been killed there, or cancelled");
}

#[test]
fn payloads_that_do_not_decompress_are_refused_and_cost_no_more_than_a_packet() {
    let compressed = |method: Compression, payload: &[u8]| {
        let payload_len = payload.len() as u32;
        let header = PacketHeader {
            compression: method,
            block: "ram",
            normal: &[0],
            payload_len,
            ..PacketHeader::sync_packet(1)
        };
        [packet(&PacketHeader { sync: false, ..header }), payload.to_vec()].concat()
    };
    let bomb = {
        // 64 MiB of zeros in a page's packet.
        let mut encoder = crate::compress::Compressor::new(Compression::Zstd, 1).unwrap();
        let ram = Ram::for_test(&[("zeros", 128)]);
        let page: Vec<_> = (0..128).map(|page| ram.page(page).unwrap()).collect();
        let mut out = Vec::new();
        encoder.compress(&page, &mut out).unwrap();
        out.repeat(128)
    };
    for (rule, method, payload, expected) in [
        ("noise as zlib", Compression::Zlib, &[0xff; 100][..], "zlib: "),
        ("noise as zstd", Compression::Zstd, &[0xff; 100][..], "zstd: "),
        (
            "empty zstd frame",
            Compression::Zstd,
            &[0x28, 0xb5, 0x2f, 0xfd, 0x20, 0, 1, 0, 0][..],
            "the payload decompresses to 0 bytes",
        ),
        ("bomb", Compression::Zstd, &bomb, "the payload decompresses to more than 4096 bytes"),
    ] {
        let received = receive(&behind_first_sync(compressed(method, payload)), Options::default());
        let error = received.outcome.unwrap_err().to_string();
        assert!(error.starts_with(&format!("channel 0, at byte 2,752: {expected}")), "{rule}: {error}");
        assert!(untouched(&received.ram), "{rule}");
        assert!(!received.calls.contains(&"start"));
    }
    for (method, size) in [(ZLIB, 0), (ZSTD, 0), (ZLIB, u32::MAX), (ZSTD, 64 << 20)] {
        let mut bad = pages_but(&[0], 8, method);
        bad[20..24].copy_from_slice(&u32::to_be_bytes(size));
        let name = if method == ZLIB { "zlib" } else { "zstd" };
        let message = format!("{name} payload of {size} bytes for 1 pages of 0x1000 bytes");
        refused("compressed size", &behind_first_sync(bad), Options::default(), channel_at(0, SECOND), &message);
    }
}

#[test]
fn another_compression_than_required_is_refused() {
    let options = Options { compression: Some(Compression::Zstd), ..Options::default() };
    let message = "channels are configured for compression zstd, the packet has none";
    refused("compression", &behind_first_sync(pages(&[0])), options, channel_at(0, SECOND), message);
}

#[test]
fn a_channel_that_goes_on_without_its_sync_holds_the_round_until_it_ends() {
    // Main has announced round 1 and channel 1 has ended it, but channel 0 brings page after page.
    let main = Wire::main().then(&main_end().bytes);
    let without_sync = Wire::channel(0).sync().then(pages(&[0x1000])).then(pages(&[0x2000])).ends();
    let ahead = Wire::channel(1).sync().sync().then(pages(&[0x1000]));
    let received = receive(&[main, without_sync, ahead], Options::default());
    let error = received.outcome.unwrap_err();
    assert!(error.to_string().ends_with("channel 0 ended without the SYNC packet of round 1"), "{error}");
    assert!(matches!(error, Error::Protocol { .. }), "{error}");
    assert_eq!(received.calls, Vec::<&str>::new(), "nothing behind the round was loaded");
}

#[test]
fn each_page_is_counted_in_its_own_round() {
    let mut rounds = main_start();
    rounds.flush().eos().footer(1);
    for _ in 0..2 {
        rounds.ram_part(1, false).flush().eos().footer(1);
    }
    let main = Wire::from_encoder(&rounds).then(&main_end().bytes);
    let channel = Wire::channel(0).sync().then(pages(&[0x1000])).sync().then(pages(&[0x2000, 0x3000])).sync().sync();
    let report = receive(&[main, channel], Options::default()).outcome.unwrap();
    let normal: Vec<u64> = report.rounds.iter().map(|round| round.normal).collect();
    assert_eq!(normal, [1, 2, 0]);
}

/// A packet without content says a method all the same, and a source may have chosen none for it.
#[test]
fn the_compression_that_is_told_is_that_of_the_first_content() {
    let zeros = packet(&PacketHeader { sync: false, block: "ram", zero: &[0x2000], ..PacketHeader::sync_packet(1) });
    let ram = Ram::for_test(&[("page", 1)]);
    let mut payload = Vec::new();
    let mut compressor = crate::compress::Compressor::new(Compression::Zstd, 1).unwrap();
    compressor.compress(&[ram.page(0).unwrap()], &mut payload).unwrap();
    let payload_len = payload.len() as u32;
    let header = PacketHeader { block: "ram", normal: &[0x1000], payload_len, ..PacketHeader::sync_packet(2) };
    let content = packet(&PacketHeader { sync: false, compression: Compression::Zstd, ..header });
    let channel = Wire::channel(0).sync().then(zeros).then(content).then(payload).sync();
    let main = Wire::main().then(&main_end().bytes);
    let report = receive(&[main.clone(), channel], Options::default()).outcome.unwrap();
    assert_eq!(report.compression, Some(Compression::Zstd));
    let nothing = Wire::channel(0).sync().sync();
    assert_eq!(receive(&[main, nothing], Options::default()).outcome.unwrap().compression, None);
}

/// Nothing but zeros in all blocks.
fn untouched(ram: &Ram) -> bool {
    ram.layout().blocks().iter().flat_map(|block| block.page_range()).all(|page| ram.page(page).unwrap().is_zero())
}
