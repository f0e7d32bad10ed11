//! Round trips of everything that can be encoded, decoders that survive any bytes, and fast code beside naive code.

use crate::bodies::BodyScanner;
use crate::command::Command;
use crate::device_state::{MAX_STATE, StatePacket, device_state_refusal};
use crate::encoder::MainEncoder;
use crate::mapped_ram::{BlockHeader, bitmap_len, is_set, set};
use crate::packet::{Compression, Hello, PREFIX_LEN, PacketHeader, Prefix, RamPacket, capacity, header_len};
use crate::postcopy::{Beginning, DiscardRange, Package, PreemptDecoder, PreemptItem, Request, Requests, received};
use crate::ram::{BlockEntry, BlockLayout, RamWord};
use crate::return_path::Message;
use crate::stream::{Item, MainDecoder, Section, SectionKind};
use crate::vmdesc::{TailScanner, VmDescription, WholeScanner, cut, cut_by_shape, look_whole};
use crate::wire::Codec;
use crate::wire::Step;
use crate::{BlockName, ChannelId, xbzrle};
use proptest::collection::vec;
use proptest::prelude::*;

const PAGE: usize = 4096;

fn page_offset() -> impl Strategy<Value = u64> {
    (0..u64::MAX / 4096).prop_map(|page| page * 4096)
}

fn block_name() -> impl Strategy<Value = String> {
    "[a-zäλ/@:.]{1,60}"
}

proptest! {
    #[test]
    fn packets_survive_the_wire(
        sync: bool,
        (compression, payload) in (prop_oneof![Just(Compression::Zlib), Just(Compression::Zstd)], 1..1u32 << 20),
        plain: bool,
        packet_num: u64,
        block in block_name(),
        offsets in vec(page_offset(), 0..=128),
        normal in 0usize..=128,
    ) {
        let (normal, zero) = offsets.split_at(normal.min(offsets.len()));
        let compression = if plain { Compression::None } else { compression };
        let payload_len = match (normal.len(), plain) {
            (0, _) => 0,
            (pages, true) => (pages * PAGE) as u32,
            _ => payload,
        };
        let block = if offsets.is_empty() { "" } else { &block };
        let header = PacketHeader { sync, compression, packet_num, block, normal, zero, payload_len };
        let mut bytes = vec![0x55; header_len(PAGE)];
        header.encode_into(&mut bytes, PAGE);
        let packet = RamPacket::decode(&bytes, PAGE).unwrap();
        prop_assert_eq!(packet.sync, sync);
        prop_assert_eq!(packet.compression, compression);
        prop_assert_eq!(packet.packet_num, packet_num);
        prop_assert_eq!(packet.payload_len, payload_len as usize);
        prop_assert_eq!(packet.block_name().unwrap_or(""), block);
        prop_assert_eq!(packet.normal.clone().collect::<Vec<_>>(), normal);
        prop_assert_eq!(packet.zero.clone().collect::<Vec<_>>(), zero);
    }

    #[test]
    fn hello_survives_the_wire(uuid: [u8; 16], channel: u8, channels: u8) {
        let hello = Hello { uuid, channel: ChannelId(channel), channels: std::num::NonZeroU8::new(channels) };
        prop_assert_eq!(Hello::decode(&hello.encode()), Ok(hello));
    }

    #[test]
    fn words_survive_the_wire(word: u64) {
        if let Ok(decoded) = RamWord::decode(word, PAGE) {
            prop_assert_eq!(decoded.encode(), word);
        }
    }

    #[test]
    fn pages_on_main_survive_the_wire(pages in vec((0..3usize, 0..16u64, 0..4u8), 0..50)) {
        let blocks: Vec<_> =
            ["a", "b", "c"].map(|name| BlockEntry::new(BlockName::new(name).unwrap(), 0x1_0000)).into();
        let mut encoder = MainEncoder::default();
        encoder.header().configuration("pc-q35-9.0").ram_start(1, 0x3_0000);
        blocks.iter().for_each(|block| _ = encoder.block(block));
        encoder.eos().footer(1).ram_part(1, true);
        let mut bytes = encoder.bytes.clone();
        let mut expected = Vec::new();
        for (block, page, form) in pages {
            encoder.bytes.clear();
            let (name, offset) = (&blocks[block].name, page * 0x1000);
            let item = match form {
                0 => Item::ZeroPage { block, offset },
                1 => Item::Page { block, offset, len: PAGE },
                2 => Item::Xbzrle { block, offset, len: 7 },
                _ => Item::CompressPage { block, offset, len: 9 },
            };
            match form {
                0 => encoder.zero_page(name, offset),
                1 => encoder.page(name, offset),
                2 => encoder.xbzrle(name, offset, 7),
                _ => encoder.compress_page(name, offset, 9),
            };
            bytes.extend_from_slice(&encoder.bytes);
            bytes.resize(bytes.len() + item.payload_len() as usize, 0xff);
            expected.push(item);
        }
        let (mut items, complete) = decode(&bytes);
        prop_assert!(complete);
        items.retain(|item| matches!(item, Item::ZeroPage { .. } | Item::Page { .. } | Item::Xbzrle { .. } | Item::CompressPage { .. }));
        prop_assert_eq!(items, expected);
    }

    #[test]
    fn mapped_ram_headers_survive_the_file_and_place_passes_the_check(
        header_end in 0..1u64 << 40,
        pages in 1..1u64 << 28,
    ) {
        let len = pages * 4096;
        let header = BlockHeader::place(header_end, len, 4096);
        let mut bytes = Vec::new();
        header.encode(&mut bytes);
        prop_assert_eq!(BlockHeader::decode(&bytes), Ok(Step::Item { item: header, used: bytes.len() }));
        let block = BlockName::new("pc.ram").unwrap();
        prop_assert_eq!(header.check(&block, len, 4096, header_end, header.next_entry(len)), Ok(()));
    }

    #[test]
    fn discarded_ranges_survive_the_wire(block in block_name(), ranges in vec((page_offset(), page_offset()), 0..9000)) {
        let block = BlockName::new(&block).unwrap();
        let ranges: Vec<_> = ranges.into_iter().map(|(start, len)| DiscardRange { start, len }).collect();
        let mut decoded = Vec::new();
        for command in DiscardRange::commands(&block, &ranges) {
            let mut bytes = Vec::new();
            command.encode(&mut bytes);
            let used = bytes.len();
            prop_assert_eq!(Command::decode(&bytes), Ok(Step::Item { item: command.clone(), used }));
            if let Command::PostcopyRamDiscard { ranges, .. } = command {
                decoded.extend(ranges);
            }
        }
        prop_assert_eq!(decoded, ranges);
    }

    #[test]
    fn a_discarded_range_that_is_accepted_lies_inside_its_block(start: u64, len: u64, pages in 1..1u64 << 40, near: bool) {
        let block_len = pages * 4096;
        let (start, len) = if near { (start % (2 * block_len) / 4096 * 4096, len % 16 * 4096) } else { (start, len) };
        let range = DiscardRange { start, len }.check(&BlockName::new("a").unwrap(), block_len, 4096);
        let right = u128::from(start) + u128::from(len) <= u128::from(block_len) && len > 0 && start % 4096 == 0 && len % 4096 == 0;
        prop_assert_eq!(range.ok(), right.then(|| start..start + len));
    }

    #[test]
    fn a_package_of_sections_is_cut_where_it_was_put_together(bodies in vec(vec(any::<u8>(), 0..50), 0..5)) {
        let mut devices = MainEncoder::default();
        for (id, body) in (0..).zip(bodies) {
            let section = Section { kind: SectionKind::Full, id, name: "cpu".to_owned(), instance: id, version: 1 };
            devices.section(&section).raw(&body).footer(id);
        }
        let mut bytes = Vec::new();
        let before_run = Package::encode(&devices.bytes, &mut bytes);
        prop_assert_eq!(&bytes[before_run..], b"\x08\0\x05\0\0");
        let cut = Package::of(&bytes[9..]).unwrap();
        prop_assert_eq!(&bytes[9..][cut.devices], &devices.bytes);
        prop_assert_eq!(cut.pings, [3]);
    }

    #[test]
    fn requests_survive_the_wire(asked in vec((0..3usize, 0..16u64, 1..16u64), 0..40)) {
        let blocks: Vec<_> = ["a", "b", "c"].map(|name| BlockEntry::new(BlockName::new(name).unwrap(), 0x2_0000)).into();
        let (mut source, mut destination) = (Requests::default(), Requests::default());
        for (block, page, pages) in asked {
            let request = Request { block, start: page * 4096, len: (pages * 4096) as u32 };
            let mut bytes = Vec::new();
            destination.ask(request, &blocks).encode(&mut bytes);
            let Ok(Step::Item { item, used }) = Message::decode(&bytes) else { panic!("it is whole") };
            prop_assert_eq!(used, bytes.len());
            prop_assert_eq!(source.accept(&item, &blocks, 4096), Ok(Some(request)));
        }
    }

    #[test]
    fn words_of_a_preempt_connection_survive_the_wire(pages in vec((0..3usize, 0..16u64, any::<bool>()), 0..50)) {
        let blocks: Vec<_> = ["a", "b", "c"].map(|name| BlockEntry::new(BlockName::new(name).unwrap(), 0x1_0000)).into();
        let mut encoder = MainEncoder::default();
        for (block, page, zero) in &pages {
            let name = &blocks[*block].name;
            match zero {
                true => encoder.zero_page(name, page * 4096),
                false => encoder.page(name, page * 4096).raw(&[0xff; PAGE]),
            };
        }
        encoder.eos();
        if let Some(first) = encoder.bytes.first_chunk() {
            prop_assert_eq!(Beginning::of(*first), Beginning::Bare);
        }
        let (mut decoder, mut rest, mut found) = (PreemptDecoder::default(), encoder.bytes.as_slice(), Vec::new());
        while !decoder.ended() {
            let Ok(Step::Item { item, used }) = decoder.step(rest, &blocks, PAGE) else { panic!("it is whole") };
            rest = &rest[used..];
            match item {
                PreemptItem::Page { block, offset } => {
                    rest = &rest[PAGE..];
                    found.push((block, offset / 4096, false));
                }
                PreemptItem::Zero { block, offset } => found.push((block, offset / 4096, true)),
                PreemptItem::End => (),
            }
        }
        prop_assert_eq!(found, pages);
        prop_assert!(rest.is_empty());
    }

    #[test]
    fn bitmaps_of_a_recovery_survive_the_wire(pages in 1..3000u64, bits: u64) {
        let got: Vec<_> = (0..pages).filter(|page| bits >> (page % 61) & 1 == 1).collect();
        let mut bytes = Vec::new();
        received::encode(pages, got.iter().copied(), &mut bytes);
        let Ok(Step::Item { item, used }) = received::decode(&bytes, pages) else { panic!("it is whole") };
        prop_assert_eq!(used, bytes.len());
        prop_assert_eq!((0..pages).filter(|&page| is_set(item, page as usize)).collect::<Vec<_>>(), got);
    }

    #[test]
    fn postcopy_of_any_bytes_never_panics(bytes in vec(any::<u8>(), 0..600), pages in 0..5000u64) {
        let blocks = [BlockEntry::new(BlockName::new("a").unwrap(), 0x4000)];
        let _ = Package::of(&bytes);
        match PreemptDecoder::default().step(&bytes, &blocks, PAGE) {
            Ok(Step::Need(total)) => prop_assert!(total > bytes.len() && total <= bytes.len() + 256),
            Ok(Step::Item { used, .. }) => prop_assert!(used <= bytes.len()),
            Err(_) => (),
        }
        match received::decode(&bytes, pages) {
            Ok(Step::Need(total)) => prop_assert!(total > bytes.len() && total as u64 <= bitmap_len(pages, 1) + 16),
            Ok(Step::Item { used, .. }) => prop_assert!(used <= bytes.len()),
            Err(_) => (),
        }
    }

    #[test]
    fn bits_are_those_of_little_endian_words(pages in vec(0..256usize, 0..50)) {
        let mut bitmap = [0; 32];
        pages.iter().for_each(|page| set(&mut bitmap, *page));
        for page in 0..256 {
            let word = u64::from_le_bytes(*bitmap[page / 64 * 8..].first_chunk().unwrap());
            prop_assert_eq!(word >> (page % 64) & 1 == 1, pages.contains(&page));
            prop_assert_eq!(is_set(&bitmap, page), pages.contains(&page));
        }
    }

    /// Random bytes, with the first words right often enough to get behind them.
    #[test]
    fn packets_of_any_bytes_never_panic(mut bytes in vec(any::<u8>(), 0..1400), real: bool, flags in 0..0x80u32, counts: [u8; 3]) {
        if real && bytes.len() > 36 {
            bytes[..8].copy_from_slice(b"\x11\x22\x33\x44\0\0\0\x01");
            bytes[8..12].copy_from_slice(&flags.to_be_bytes());
            for (at, count) in [12, 16, 32].into_iter().zip(counts) {
                bytes[at..at + 4].copy_from_slice(&u32::from(count).to_be_bytes());
            }
        }
        if let Some(prefix) = bytes.first_chunk::<PREFIX_LEN>() {
            let _ = Prefix::decode(prefix);
        }
        if let Some(hello) = bytes.first_chunk() {
            let _ = Hello::decode(hello);
        }
        let _ = device_state_refusal(&bytes);
        if let Ok(packet) = StatePacket::decode(&bytes) {
            prop_assert!((1..=MAX_STATE).contains(&packet.len));
        }
        for page_size in [4096, 16384, 65536] {
            if let Ok(packet) = RamPacket::decode(&bytes, page_size) {
                prop_assert!(packet.normal.len() + packet.zero.len() <= capacity(page_size));
                prop_assert_eq!(packet.normal.len() + packet.zero.len(), packet.normal.len() + packet.zero.len());
                prop_assert!(packet.payload_len <= 1 << 20);
                let _ = (packet.block_name(), packet.check_pages(&BlockName::new("a").unwrap(), 0x1000, page_size));
            }
        }
    }

    #[test]
    fn main_of_any_bytes_never_panics(bytes in vec(any::<u8>(), 0..300)) {
        let _ = decode(&bytes);
    }

    /// Bytes that are likely at each place get far into the decoder.
    #[test]
    fn main_of_likely_bytes_never_panics(tokens in vec(0..14usize, 0..80), noise in vec((any::<prop::sample::Index>(), any::<u8>()), 0..3)) {
        let tokens: Vec<_> = tokens
            .iter()
            .flat_map(|token| {
                let token: &[u8] = match token {
                    0 => b"\x07\0\0\0\x02pc",
                    1 => b"\x01\0\0\0\x01\x03ram\0\0\0\0\0\0\0\x04\0\0\0\0\0\0\x20\x04",
                    2 => b"\x01a\0\0\0\0\0\0\x20\0",
                    3 => b"\0\0\0\0\0\0\x02\0",
                    4 => b"\0\0\0\0\0\0\0\x10",
                    5 => b"\x7e\0\0\0\x01",
                    6 => b"\x02\0\0\0\x01",
                    7 => b"\x03\0\0\0\x01",
                    8 => b"\0\0\0\0\0\0\x10\x02\x01a\0",
                    9 => b"\0\0\0\0\0\0\x10\x22\0",
                    10 => b"\x04\0\0\0\x02\x01x\0\0\0\0\0\0\0\x01",
                    11 => b"\x7e\0\0\0\x02",
                    12 => b"\0\x06\0\0\0\x02{}",
                    _ => b"\x08\0\x0b\0\0",
                };
                token.iter().copied()
            })
            .collect();
        let mut bytes = [&b"QEVM\0\0\0\x03\x07\0\0\0\x02pc\x01\0\0\0\x01\x03ram\0\0\0\0\0\0\0\x04\0\0\0\0\0\0\x20\x04\x01a\0\0\0\0\0\0\x20\0"[..], &tokens].concat();
        for (at, byte) in noise {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        let _ = decode(&bytes);
    }

    #[test]
    fn small_decoders_of_any_bytes_never_panic(bytes in vec(any::<u8>(), 0..600), layout: [bool; 3]) {
        let [backing_page_size, gpa, mapped_ram] = layout;
        for step in [
            Command::decode(&bytes).map(|step| step.map(|_| ())),
            Message::decode(&bytes).map(|step| step.map(|_| ())),
            BlockEntry::decode(&bytes, BlockLayout { backing_page_size, gpa, mapped_ram }, PAGE).map(|step| step.map(|_| ())),
        ] {
            match step {
                Ok(Step::Need(total)) => prop_assert!(total > bytes.len() && total <= bytes.len() + 0x1_0000),
                Ok(Step::Item { used, .. }) => prop_assert!(used <= bytes.len()),
                Err(_) => (),
            }
        }
    }

    /// Each end of an early section that the whole buffer has, whatever the pieces in which it comes.
    #[test]
    fn early_sections_end_where_a_search_of_all_bytes_says(
        parts in vec(proptest::sample::select(vec![
            &b"\x7e\0\0\0\x08"[..], b"\x7e", b"\x7e\0\0", b"\x02\0\0\0\x02", b"\x03\0\0", b"\x02", b"\x04\0\0", b"\x04",
            b"\x01\0\0", b"\x01\0", b"\x08\0", b"\x08", b"\0", b"state",
        ]), 0..12),
        pieces in vec(1usize..9, 1..4),
    ) {
        let buf = parts.concat();
        let naive = |buf: &[u8]| {
            (0..buf.len()).find(|&at| {
                buf[at..].strip_prefix(b"\x7e\0\0\0\x08").is_some_and(|behind| {
                    [&b"\x02\0\0\0\x02"[..], b"\x03\0\0\0\x02", b"\x01\0\0", b"\x04\0\0", b"\x08\0"].iter().any(|next| behind.starts_with(next))
                })
            })
        };
        let section = Section { kind: SectionKind::Full, id: 8, name: "early".to_owned(), instance: 0, version: 1 };
        let mut scanner = BodyScanner::new(&section, Some(2)).unwrap();
        let (mut end, mut pieces) = (0, pieces.iter().cycle());
        while end < buf.len() {
            end = buf.len().min(end + pieces.next().unwrap());
            let found = scanner.scan(&buf[..end]).unwrap();
            prop_assert_eq!(found, naive(&buf[..end]), "{:?}", &buf[..end]);
            if found.is_some() {
                break;
            }
        }
    }

    /// Bodies of any bytes, in pieces: never a panic, and an end that more bytes do not move.
    #[test]
    fn the_end_of_a_body_lies_in_what_was_received(
        bytes in vec(any::<u8>(), 0..400),
        name in proptest::sample::select(vec!["x/virtio-mem-device-early", "dirty-bitmap", "early"]),
        started in any::<bool>(),
    ) {
        let kind = if name == "dirty-bitmap" { SectionKind::Start } else { SectionKind::Full };
        let section = Section { kind, id: 8, name: name.to_owned(), instance: 0, version: 1 };
        let new = || BodyScanner::new(&section, started.then_some(2)).unwrap();
        let mut scanner = new();
        for received in 0..=bytes.len() {
            match scanner.scan(&bytes[..received]) {
                Ok(None) => {}
                Ok(Some(len)) => {
                    prop_assert!(len <= received);
                    prop_assert_eq!(new().scan(&bytes), Ok(Some(len)));
                    break;
                }
                Err(_) => break,
            }
        }
    }

    #[test]
    fn diffs_of_any_bytes_stay_inside_the_page(diff in vec(any::<u8>(), 0..200)) {
        let mut around = [0xcc; 64 + 8];
        let _ = xbzrle::apply(&diff, &mut around[..64]);
        prop_assert_eq!(&around[64..], [0xcc; 8]);
    }

    /// A diff made naively from two pages turns the one into the other.
    #[test]
    fn a_diff_turns_the_old_page_into_the_new(changes in vec((0..PAGE, any::<u8>()), 0..40)) {
        let old = vec![0xaa; PAGE];
        let mut new = old.clone();
        changes.iter().for_each(|(at, byte)| new[*at] = *byte);
        let mut diff = Vec::new();
        let uleb = |diff: &mut Vec<u8>, n: usize| match n {
            0..0x80 => diff.push(n as u8),
            _ => diff.extend([n as u8 | 0x80, (n >> 7) as u8]),
        };
        let mut at = 0;
        while let Some(skip) = (at..PAGE).position(|i| old[i] != new[i]) {
            let run = (at + skip..PAGE).take_while(|i| old[*i] != new[*i]).count();
            uleb(&mut diff, skip);
            uleb(&mut diff, run);
            diff.extend_from_slice(&new[at + skip..][..run]);
            at += skip + run;
        }
        let mut page = old;
        xbzrle::apply(&diff, &mut page).unwrap();
        prop_assert!(page == new);
    }

    #[test]
    fn the_scanner_finds_what_the_naive_search_finds(
        tokens in vec(0..7usize, 0..60),
        pieces in vec(1..9usize, 1..5),
    ) {
        let buf: Vec<u8> = tokens
            .iter()
            .flat_map(|token| {
                let token: &[u8] = match token {
                    0 => b"\0\x06",
                    1 => b"\0\0\0\x02",
                    2 => b"{}",
                    3 => b"\0\x06\0\0\0\x02{}",
                    4 => b"\0\x06\0\0\0\x08{",
                    5 => b"\"a\":{}}",
                    _ => b"\0",
                };
                token.iter().copied()
            })
            .collect();
        let naive = |buf: &[u8]| {
            (0..buf.len().saturating_sub(6)).find(|&at| {
                buf[at..].starts_with(b"\0\x06")
                    && u32::from_be_bytes(*buf[at + 2..].first_chunk().unwrap()) as usize == buf.len() - at - 6
                    && buf[at + 6] == b'{'
                    && serde_json::from_slice::<serde_json::Value>(&buf[at + 6..]).is_ok()
            })
        };
        let mut scanner = TailScanner::default();
        let (mut end, mut pieces) = (0, pieces.iter().cycle());
        while end < buf.len() {
            end = buf.len().min(end + pieces.next().unwrap());
            let found = scanner.scan(&buf[..end]);
            prop_assert_eq!(found.map(|tail| tail.eof_at), naive(&buf[..end]), "{:?}", &buf[..end]);
        }
    }

    /// Without a description, a state looks whole in the same places whatever the pieces in which it comes.
    #[test]
    fn undescribed_state_looks_whole_where_a_search_of_all_bytes_says(
        parts in vec(proptest::sample::select(vec![
            &b"\x04\0\0\0\x08\x01a\0\0\0\0\0\0\0\x01"[..], b"\x04\0\0\0\x09\x03cpu\0\0\0\0\0\0\0\x01", b"\x04\0\0\0\x09",
            b"\x7e\0\0\0\x08", b"\x7e\0\0\0\x09", b"\x7e", b"\x7e\0\0", b"\x04", b"\0", b"state", b"\x01",
        ]), 0..16),
        pieces in vec(1usize..9, 1..4),
    ) {
        let blob = [&b"\x04\0\0\0\x08\x01a\0\0\0\0\0\0\0\x01"[..], &parts.concat()].concat();
        let mut scanner = WholeScanner::default();
        let (mut end, mut pieces) = (0, pieces.iter().cycle());
        while end < blob.len() {
            end = blob.len().min(end + pieces.next().unwrap());
            prop_assert_eq!(scanner.scan(&blob[..end]), look_whole(&blob[..end]), "{:?}", &blob[..end]);
        }
        let cut = cut_by_shape(&blob);
        prop_assert_eq!(cut.is_some(), look_whole(&blob), "{:?}", &blob);
        // Nothing lies between two sections, and nothing behind the last.
        let lens = cut.iter().flatten().map(|section| 14 + section.name.len() + section.body.len() + 5);
        prop_assert!(cut.is_none() || lens.sum::<usize>() == blob.len(), "{:?}", cut);
    }

    #[test]
    fn descriptions_and_blobs_of_any_bytes_never_panic(blob in vec(any::<u8>(), 0..200), size: u64, array_len: u64) {
        let json = format!(
            r#"{{"page_size": 4096, "devices": [{{"name": "", "instance_id": 0, "fields": [
                {{"name": "x", "type": "uint8", "size": {size}, "array_len": {array_len}}}]}}]}}"#
        );
        let description = VmDescription::parse(json.as_bytes()).unwrap();
        let _ = cut(&blob, &description);
        let _ = cut(&[&b"\x04\0\0\0\0\0\0\0\0\0\0\0\0\0"[..], &blob].concat(), &description);
        let _ = description.devices[0].values(&blob);
        let _ = VmDescription::parse(&blob);
    }
}

/// Decodes as far as possible; bodies of sections are empty. Says whether the bytes ran out between two items' bytes.
fn decode(bytes: &[u8]) -> (Vec<Item>, bool) {
    let mut decoder = MainDecoder::new(PAGE);
    let (mut items, mut at) = (Vec::new(), 0);
    loop {
        let rest = &bytes[bytes.len().min(at)..];
        match decoder.step(rest) {
            Ok(Step::Item { item, used }) => {
                assert!(used <= rest.len());
                at = at.saturating_add(used).saturating_add(item.payload_len() as usize);
                items.push(item);
            }
            Ok(Step::Need(total)) => {
                assert!(total > rest.len() && total <= rest.len() + 600);
                return (items, at <= bytes.len());
            }
            Err(error) => {
                assert_eq!(error.offset, decoder.position());
                return (items, false);
            }
        }
    }
}
