//! Corpora to begin with: pieces of recorded QEMU streams, and what our own encoders make.

use std::{collections::HashMap, path::Path, sync::LazyLock};

use multifd_proto::{
    BlockName, ChannelId, Codec,
    command::{BodyLength, Command, PostcopyAdvice},
    device_state::{HEAD_LEN, StatePacket},
    encoder::MainEncoder,
    extension::{Extensions, Offer},
    mapped_ram::BlockHeader,
    packet::{self, Compression, Hello, PacketHeader, RamPacket},
    postcopy::{DiscardRange, Package},
    ram::BlockEntry,
    return_path::Message,
    stream::{MAPPED_RAM, Section, SectionKind, X_IGNORE_SHARED},
    vmdesc::TailScanner,
};

use crate::destination::{BLOCKS, LATER};

/// Headers from all recorded channels, a few of each, and hellos. The first byte chooses the page size.
pub(crate) fn packets() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for (name, bytes) in recorded() {
        if !name.contains("/ch") {
            continue;
        }
        seeds.push([&[0], &bytes[..packet::HELLO_LEN]].concat());
        let mut at = packet::HELLO_LEN;
        for index in 0..40 {
            let Some(header) = bytes.get(at..at + packet::header_len(4096)) else { break };
            let Ok(packet) = RamPacket::decode(header, 4096) else { break };
            if index % 8 == 0 || packet.sync {
                seeds.push([&[0], header].concat());
            }
            at += header.len() + packet.payload_len;
        }
    }
    let mut state = vec![0; 1 + packet::DEVICE_STATE_LEN];
    state[1..13].copy_from_slice(&[0x11, 0x22, 0x33, 0x44, 0, 0, 0, 1, 0, 0, 0, 0x40]);
    state[13..17].copy_from_slice(b"vfio");
    seeds.push(state);
    seeds.push([&[0], &state_packets()[..]].concat());
    seeds
}

/// Beginnings and ends of recorded mains, and one that has everything.
pub(crate) fn mains() -> Vec<Vec<u8>> {
    let mut seeds: Vec<Vec<u8>> = recorded()
        .filter(|(name, _)| name.ends_with("/main.bin"))
        .map(|(_, bytes)| bytes[..bytes.len().min(12_000)].to_vec())
        .collect();
    seeds.extend([true, false].map(|per_round| main(per_round, Words::All, None)));
    seeds.push([main(true, Words::All, Some(2)), go()].concat());
    seeds.push(huge_pages());
    seeds.extend([snapshot(), switched(0), switched(3)]);
    seeds
}

/// A block list of a peer with huge pages, cut behind a block. The first input that a fuzzer found: without what follows the
/// block it cannot be decoded, and the target had left that away.
fn huge_pages() -> Vec<u8> {
    let advice = PostcopyAdvice { page_size_summary: 1 << 21, page_size: 4096 };
    let mut encoder = MainEncoder::default();
    encoder.header().configuration("pc-i440fx-10.0").command(&Command::PostcopyAdvise(Some(advice)));
    encoder.ram_start(1, 0x88_2000);
    for (block, len, page_size) in [("pc.ram", 8 << 20, Some(1 << 21)), ("pc.bios", 1 << 18, None)] {
        encoder.block(&BlockEntry { page_size, ..BlockEntry::new(name(block), len) });
    }
    [encoder.bytes.as_slice(), b"\x06pc.rom\0\0"].concat()
}

/// One of each message.
pub(crate) fn return_paths() -> Vec<Vec<u8>> {
    let block = name("pc.ram");
    let messages = [
        Message::Pong(1),
        Message::Shut(0),
        Message::ReqPagesId { start: 0x1000, len: 0x1000, block: block.clone() },
        Message::ReqPages { start: 0x2000, len: 0x1000 },
        Message::RecvBitmap { block },
        Message::ResumeAck(1),
        Message::SwitchoverAck,
        Message::Accepted(Extensions::known()),
        Message::Prepared { len: 0 },
        Message::Reason("the device is busy".to_owned()),
        Message::Ready,
    ];
    let mut all = Vec::new();
    let mut seeds = Vec::new();
    for message in messages {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        all.extend_from_slice(&bytes);
        seeds.push(bytes);
    }
    seeds.push(all);
    // A reason that is no text: as one it is longer than may be sent.
    seeds.push([&[0x4d, 3, 0, 255][..], &[0xff; 255]].concat());
    seeds
}

/// The device states of recorded streams with their descriptions, as far as a 16-bit length reaches, and a small one.
pub(crate) fn vmdescs() -> Vec<Vec<u8>> {
    let both = |json: &[u8], blob: &[u8]| [&(json.len() as u16).to_be_bytes()[..], json, blob].concat();
    let mut seeds = Vec::new();
    for (_, bytes) in recorded().filter(|(name, _)| name.ends_with("/main.bin")) {
        // Behind the pages of main, where there are any.
        let bytes = &bytes[bytes.len().saturating_sub(200_000)..];
        let Some(end) = TailScanner::default().scan(bytes) else { continue };
        let json = &bytes[end.json.clone()];
        if json.len() < 1 << 16 {
            seeds.push(both(json, &bytes[end.eof_at.saturating_sub(3000)..end.eof_at]));
        }
        seeds.push(both(b"", &bytes[end.eof_at.saturating_sub(100)..]));
    }
    let small = br#"{"page_size":4096,"devices":[{"name":"cpu","instance_id":0,"version":1,"fields":[{"name":"data","type":"buffer","size":14}]}]}"#;
    let mut encoder = MainEncoder::default();
    encoder.section(&section("cpu")).raw(&[7; 14]).footer(2);
    seeds.push(both(small, &encoder.bytes));
    seeds
}

/// Mapped-ram files with two blocks of a few pages, closer together than QEMU puts them, and a header.
pub(crate) fn files() -> Vec<Vec<u8>> {
    let header = BlockHeader { page_size: 4096, bitmap_offset: 100, pages_offset: 1 << 20 };
    let mut bytes = Vec::new();
    header.encode(&mut bytes);
    vec![file(false), file(true), bytes]
}

/// A checkpoint; the memory of its first block may be `elsewhere`.
fn file(elsewhere: bool) -> Vec<u8> {
    let mut file = Vec::new();
    let mut encoder = MainEncoder::default();
    let capabilities: &[&str] = if elsewhere { &[X_IGNORE_SHARED, MAPPED_RAM] } else { &[MAPPED_RAM] };
    encoder.header().configuration("pc-i440fx-10.0").config_capabilities(capabilities).ram_start(1, 5 * 4096);
    file.extend_from_slice(&encoder.bytes);
    for (block, pages) in [("pc.ram", 3u64), ("pc.bios", 2)] {
        let entry = |bitmap_offset, pages_offset| BlockEntry {
            gpa: elsewhere.then_some(0),
            mapped_ram: Some(BlockHeader { page_size: 4096, bitmap_offset, pages_offset }),
            ..BlockEntry::new(name(block), pages * 4096)
        };
        let listed = |entry: &BlockEntry| MainEncoder::default().block(entry).bytes.clone();
        let bytes = listed(&entry(0, 0));
        if elsewhere && block == "pc.ram" {
            file.extend_from_slice(&bytes);
            continue;
        }
        let bitmap_offset = file.len() + bytes.len();
        let pages_offset = (bitmap_offset + 8).next_multiple_of(4096);
        let bytes = listed(&entry(bitmap_offset as u64, pages_offset as u64));
        file.extend_from_slice(&bytes);
        file.extend_from_slice(&[0b101, 0, 0, 0, 0, 0, 0, 0]);
        file.resize(pages_offset, 0);
        file.resize(pages_offset + pages as usize * 4096, 0x5a);
    }
    let mut encoder = MainEncoder::default();
    encoder.eos().footer(1).ram_part(1, true).eos().footer(1);
    encoder.section(&section("cpu")).raw(&[7; 14]).footer(2).eof();
    let json = br#"{"page_size":4096,"devices":[{"name":"cpu","instance_id":0,"version":1,"fields":[{"name":"data","type":"buffer","size":14}]}]}"#;
    encoder.vm_description(json);
    file.extend_from_slice(&encoder.bytes);
    file
}

/// Recorded payloads, and our own.
pub(crate) fn payloads() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for (method, first) in [(Compression::Zlib, 0), (Compression::Zstd, 1)] {
        for pages in [1, 8] {
            let payload = multifd::testing::fuzzing::compress(method, pages).expect("the method is part of the build");
            let frame = [&(payload.len() as u16).to_be_bytes()[..], &payload].concat();
            seeds.push([&[first + 4 * (pages as u8 - 1)], &frame[..], &frame[..]].concat());
        }
    }
    for (name, bytes) in
        recorded().filter(|(name, _)| name.contains("/ch0") && name.contains("zlib-") || name.contains("zstd-"))
    {
        let first = if name.contains("zlib-") { 0 } else { 1 };
        let mut at = packet::HELLO_LEN;
        while let Some(header) = bytes.get(at..at + packet::header_len(4096)) {
            let Ok(packet) = RamPacket::decode(header, 4096) else { break };
            at += header.len();
            let payload = &bytes[at..at + packet.payload_len];
            if (1..=8).contains(&packet.normal.len()) && payload.len() < 1 << 16 {
                let len = (payload.len() as u16).to_be_bytes();
                seeds.push([&[first + 4 * (packet.normal.len() as u8 - 1)], &len[..], payload].concat());
                break;
            }
            at += payload.len();
        }
    }
    seeds
}

/// Complete migrations of a small VM, in both dialects, with what channels and main can bring.
pub(crate) fn scripts() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for per_round in [true, false] {
        // In two steps.
        for channels in [1, 2] {
            let mut script = vec![0];
            frame(&mut script, 0, &main(per_round, Words::None, Some(channels)));
            for id in 0..channels {
                let pages = channel(id, channels, per_round, Compression::None);
                let state = if channels == 1 { state_packets() } else { Vec::new() };
                frame(&mut script, 1 + id, &[pages, state].concat());
            }
            frame(&mut script, LATER, &go());
            seeds.push(script);
        }
        for channels in [1, 2] {
            for method in [Compression::None, Compression::Zlib, Compression::Zstd] {
                let words = if channels == 1 { Words::All } else { Words::None };
                let mut script = vec![0];
                frame(&mut script, 0, &main(per_round, words, None));
                for id in 0..channels {
                    frame(&mut script, 1 + id, &channel(id, channels, per_round, method));
                }
                if method == Compression::None {
                    // The same where the number of channels is required.
                    seeds.push([&[channels], &script[1..]].concat());
                }
                seeds.push(script);
            }
        }
    }
    // A switch to postcopy, with all pages on main and with some on a preempt connection.
    for on_preempt in [0, 3] {
        let mut script = vec![0];
        frame(&mut script, 0, &switched(on_preempt));
        if on_preempt > 0 {
            frame(&mut script, 1, &preempt(on_preempt));
        }
        seeds.push(script);
    }
    seeds
}

/// Every page of [`BLOCKS`].
fn all_pages() -> Vec<(BlockName, u64)> {
    BLOCKS.iter().flat_map(|&(block, pages)| (0..pages as u64).map(move |page| (name(block), page * 4096))).collect()
}

/// `pages`, every other one zeros.
fn words(encoder: &mut MainEncoder, pages: &[(BlockName, u64)]) {
    for (index, (block, offset)) in pages.iter().enumerate() {
        match index % 2 {
            0 => encoder.zero_page(block, *offset),
            _ => encoder.page(block, *offset).raw(&[3; 4096]),
        };
    }
}

/// The block list behind `encoder`'s beginning of main.
fn block_list(encoder: &mut MainEncoder) {
    encoder.ram_start(1, BLOCKS.iter().map(|(_, pages)| *pages as u64 * 4096).sum());
    for (block, pages) in BLOCKS {
        encoder.block(&BlockEntry::new(name(block), pages as u64 * 4096));
    }
    encoder.eos().footer(1);
}

/// Main of a background snapshot: no END of ram.
fn snapshot() -> Vec<u8> {
    let mut encoder = MainEncoder::default();
    encoder.header().configuration("multifd");
    block_list(&mut encoder);
    encoder.ram_part(1, false);
    words(&mut encoder, &all_pages());
    encoder.eos().footer(1).section(&section("cpu")).raw(&[14; 14]).footer(2).eof().vm_description(b"{}");
    encoder.bytes.clone()
}

/// Main of a migration that switches to postcopy before its first page; all but the last `on_preempt` pages come on main.
fn switched(on_preempt: usize) -> Vec<u8> {
    let mut encoder = MainEncoder::default();
    let advice = PostcopyAdvice { page_size_summary: 4096, page_size: 4096 };
    encoder.header().configuration("multifd").command(&Command::OpenReturnPath).command(&Command::Ping(1));
    encoder.command(&Command::PostcopyAdvise(Some(advice)));
    block_list(&mut encoder);
    for (block, pages) in BLOCKS {
        let ranges = vec![DiscardRange { start: 0, len: pages as u64 * 4096 }];
        encoder.command(&Command::PostcopyRamDiscard { block: name(block), ranges });
    }
    let mut devices = MainEncoder::default();
    devices.section(&section("cpu")).raw(&[14; 14]).footer(2);
    let mut packaged = Vec::new();
    Package::encode(&devices.bytes, &mut packaged);
    encoder.command(&Command::Ping(2)).raw(&packaged).command(&Command::Ping(4)).ram_part(1, false);
    let pages = all_pages();
    words(&mut encoder, &pages[..pages.len() - on_preempt]);
    encoder.eos().footer(1).ram_part(1, true).eos().footer(1).eof();
    encoder.bytes.clone()
}

/// The preempt connection of the same.
fn preempt(pages: usize) -> Vec<u8> {
    let mut encoder = MainEncoder::default();
    let all = all_pages();
    words(&mut encoder, &all[all.len() - pages..]);
    encoder.eos();
    encoder.bytes.clone()
}

/// The same as recordings, with the contents and without.
pub(crate) fn recordings() -> Vec<Vec<u8>> {
    let mut scripts = scripts();
    // The last one has a preempt connection, and all but main are channels here.
    scripts.pop();
    let mut script = vec![0];
    frame(&mut script, 0, &snapshot());
    scripts.push(script);
    scripts.into_iter().enumerate().map(|(index, script)| [&[index as u8 % 2], &script[1..]].concat()).collect()
}

/// What main carries itself.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Words {
    None,
    All,
}

/// Main of a complete migration of [`BLOCKS`]; two sync points behind the first.
/// A source that offers its number of channels and its extensions says GO later.
fn main(per_round: bool, words: Words, offers: Option<u8>) -> Vec<u8> {
    let mut encoder = MainEncoder::default();
    let sync = |encoder: &mut MainEncoder| {
        if per_round {
            encoder.flush();
        }
        encoder.eos().footer(1);
    };
    encoder.header().configuration("multifd");
    if words == Words::All {
        encoder.config_page_bits(12).config_uuid(&[0; 16]);
    }
    if let Some(channels) = offers {
        encoder.config_offer(&Offer { channels, token: None, extensions: Extensions::known() });
    }
    encoder.command(&Command::OpenReturnPath).command(&Command::Ping(1));
    if offers.is_some() {
        encoder.command(&Command::Describe { len: 9 }).raw(b"two vCPUs");
    }
    encoder.ram_start(1, BLOCKS.iter().map(|(_, pages)| *pages as u64 * 4096).sum());
    for (block, pages) in BLOCKS {
        encoder.block(&BlockEntry::new(name(block), pages as u64 * 4096));
    }
    sync(&mut encoder);
    encoder.ram_part(1, false);
    if words == Words::All {
        encoder.zero_page(&name("ram"), 0x1000).page(&name("ram"), 0x2000).raw(&[9; 4096]);
        encoder.zero_page(&name("rom"), 0);
        // A diff that leaves two bytes and replaces one.
        encoder.xbzrle(&name("ram"), 0x2000, 3).raw(&[2, 1, 0x77]);
    }
    sync(&mut encoder);
    // The first byte of a body tells the target of `codecs` how long it is.
    if offers.is_some() {
        let live = section("live");
        encoder.command(&Command::SectionLength(BodyLength::Bytes(5))).section(&live).raw(&[5; 5]).footer(2);
        // One chunk of three bytes; the head of a chunk begins with a zero.
        encoder.command(&Command::SectionLength(BodyLength::Chunks)).section(&live);
        encoder.raw(&[0, 0, 0, 3, 7, 7, 7, 0, 0, 0, 0]).footer(2);
    }
    encoder.command(&Command::SwitchoverStart).ram_part(1, true);
    sync(&mut encoder);
    // Of two packets, where one channel brings both: those of a script end with their last byte, and one that has ended may have had a
    // packet that has not come yet.
    if offers == Some(1) {
        let state = Section { instance: 1, ..section("live") };
        encoder.command(&Command::SectionLength(BodyLength::Packets(Some(4)))).section(&state);
        encoder.raw(&[0, 0, 0, 3, 0, 0, 0, 1, 0, 0, 0, 0]).footer(2);
    }
    if offers.is_some() {
        encoder.command(&Command::SectionLength(BodyLength::Bytes(14)));
    }
    encoder.section(&section("cpu")).raw(&[14; 14]).footer(2).eof().vm_description(b"{}");
    encoder.bytes.clone()
}

/// What main says when the destination is ready.
fn go() -> Vec<u8> {
    let mut encoder = MainEncoder::default();
    encoder.command(&Command::Go);
    encoder.bytes.clone()
}

/// Channel `id` of `channels` of the same migration. All take turns, so their packets have the numbers that prove that all
/// channels are here; a packet that carries SYNC has taken two.
fn channel(id: u8, channels: u8, per_round: bool, method: Compression) -> Vec<u8> {
    let mut bytes = Hello { uuid: [0; 16], channel: ChannelId(id), channels: None }.encode().to_vec();
    let mut put = |header: PacketHeader<'_>, payload: &[u8]| {
        let mut head = vec![0; packet::header_len(4096)];
        header.encode_into(&mut head, 4096);
        bytes.extend_from_slice(&head);
        bytes.extend_from_slice(payload);
    };
    let number = |turn: u64| turn * u64::from(channels) + u64::from(id);
    let sync = |turn| PacketHeader::sync_packet(number(turn));
    put(sync(0), &[]);
    let offset = 0x3000 + u64::from(id) * 0x1000;
    let payload = match method {
        Compression::None => vec![3; 4096],
        method => multifd::testing::fuzzing::compress(method, 1).expect("the method is part of the build"),
    };
    let pages = PacketHeader {
        sync: !per_round,
        compression: method,
        block: "ram",
        normal: &[offset],
        zero: &[0x6000],
        payload_len: payload.len() as u32,
        ..sync(if per_round { 1 } else { 2 })
    };
    put(pages, &payload);
    if per_round {
        put(sync(2), &[]);
    }
    put(PacketHeader { sync: false, block: "rom", zero: &[0x1000], ..sync(3) }, &[]);
    put(sync(4), &[]);
    bytes
}

/// The device state that the only channel brings after that.
fn state_packets() -> Vec<u8> {
    let mut bytes = Vec::new();
    for (number, len) in (0..).zip([3, 1]) {
        let mut head = vec![0; HEAD_LEN];
        StatePacket { name: "live", instance: 1, number, len }.encode_into(&mut head);
        bytes.extend_from_slice(&head);
        bytes.resize(bytes.len() + len as usize, 7);
    }
    bytes
}

/// Appends what `connection` says next, in frames.
fn frame(script: &mut Vec<u8>, connection: u8, bytes: &[u8]) {
    for part in bytes.chunks(0xffff) {
        script.push(connection);
        script.extend_from_slice(&(part.len() as u16).to_be_bytes());
        script.extend_from_slice(part);
    }
}

fn section(name: &str) -> Section {
    Section { kind: SectionKind::Full, id: 2, name: name.to_owned(), instance: 0, version: 1 }
}

fn name(text: &str) -> BlockName {
    BlockName::new(text).expect("a valid name")
}

/// The recorded files by name, in the order of their names.
fn recorded() -> impl Iterator<Item = (&'static str, &'static [u8])> {
    let mut names: Vec<&'static String> = FILES.keys().collect();
    names.sort();
    names.into_iter().map(|name| (name.as_str(), FILES[name].as_slice()))
}

static FILES: LazyLock<HashMap<String, Vec<u8>>> = LazyLock::new(|| {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../multifd-proto/tests/captures/streams.tar.xz");
    let archive = std::fs::File::open(path).expect("the archive is in the repository");
    test_support::untar(liblzma::read::XzDecoder::new(archive)).into_iter().collect()
});
