//! Every recorded stream of a real QEMU: decoded, compared with what an independent decoder found, applied to memory, and
//! encoded back byte for byte.

mod common;

use std::collections::{BTreeSet, HashMap};
use std::io::Read;

use common::{Capture, ExpectChannel, ExpectMain, sha256};
use flate2::{Decompress, FlushDecompress};
use multifd_proto::encoder::MainEncoder;
use multifd_proto::machine::{Dialect, MachineDefaults};
use multifd_proto::packet::{Compression, HELLO_LEN, Hello, PREFIX_LEN, PacketHeader, Prefix, RamPacket, header_len};
use multifd_proto::stream::{Item, MainDecoder};
use multifd_proto::vmdesc::{TailScanner, VmDescription, cut};
use multifd_proto::{BlockName, Codec, Step, xbzrle};

const PAGE: usize = 4096;

/// End of state, element type and length in front of the vmdescription.
const TAIL_HEAD: usize = 6;

#[test]
fn the_recordings_cover_what_they_were_chosen_for() {
    let captures = Capture::all();
    assert_eq!(captures.len(), 9);
    let size = std::fs::metadata(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/captures/streams.tar.xz")).unwrap().len();
    assert!(size < 1_000_000, "{size} bytes");
    for qemu in ["7.2", "10.0"] {
        for compression in ["none", "zlib"] {
            assert!(captures.iter().any(|capture| capture.qemu == qemu && capture.compression == compression));
        }
    }
}

#[test]
fn every_stream_decodes_to_what_is_expected_and_to_the_memory_of_the_source() {
    for capture in Capture::all() {
        let mut account = Account::default();
        let mut ram = Ram::default();
        let mut channels: Vec<_> = (0..capture.channels).map(|id| Channel::new(&capture, id as u8)).collect();
        let expect = &capture.expect;
        let dialect = MachineDefaults::of(&capture.machine).unwrap().dialect;
        decode_main(capture.main(), |decoder, at, item, payload| {
            account.count(at, item);
            ram.apply(decoder, item, payload);
            let sync_point = match dialect {
                Dialect::PerRound => Item::Flush,
                Dialect::PerSection => Item::Eos,
            };
            if capture.channels > 0 && *item == sync_point {
                account.sync_points += 1;
                channels.iter_mut().for_each(|channel| channel.run_to_sync(&mut ram));
            }
            if matches!(item, Item::Footer { .. }) && decoder.dialect().is_some() && capture.channels > 0 {
                assert_eq!(decoder.dialect(), Some(dialect), "{}", capture.name);
                assert_eq!(expect.sync_mode, dialect.to_string());
            }
        });
        assert_eq!(account.machine, capture.machine);
        assert_eq!(account.uuid, expect.config.first().map(|(_, _, uuid)| uuid.clone()), "{}", capture.name);
        assert_eq!(account.commands, expect.commands, "{}", capture.name);
        assert_eq!(account.sync_points, expect.sync_points_on_main, "{}", capture.name);
        account.main.flags_seen = account.flags.iter().map(|flags| format!("{flags:#x}")).collect();
        account.main.flags_seen.sort();
        assert_eq!(account.main, expect.main, "{}", capture.name);
        assert_eq!(ram.order, expect.blocks.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>());
        for (name, len) in &expect.blocks {
            assert_eq!(ram.blocks[name.as_str()].len() as u64, *len);
            assert_eq!(sha256(&ram.blocks[name.as_str()]), expect.ram_sha256[name], "{} {name}", capture.name);
        }
        for (channel, expected) in channels.iter().zip(&capture.per_channel) {
            assert_eq!(
                channel.at,
                channel.bytes.len(),
                "{}: nothing follows the last SYNC but empty packets",
                capture.name
            );
            assert_eq!(channel.account, *expected, "{}", capture.name);
        }
        let packets: usize = channels.iter().map(|channel| channel.account.packets - channel.account.empty).sum();
        assert_eq!(packets, expect.packets, "{}", capture.name);
    }
}

/// The memory is wrong when the last packet with pages of a channel is dropped: the comparison above can fail. (An earlier one
/// would not show: the guest writes all its pages again and again.)
#[test]
fn a_dropped_packet_shows_in_the_digest() {
    let captures = Capture::all();
    let capture = captures.iter().find(|capture| capture.name == "q10.0-none-2ch").unwrap();
    let mut ram = Ram::default();
    let mut channels: Vec<_> = (0..2).map(|id| Channel::new(capture, id)).collect();
    let mut last = Channel::new(capture, 1);
    let mut scratch = Ram::default();
    scratch.blocks.extend(capture.expect.blocks.iter().map(|(name, len)| (name.clone(), vec![0; *len as usize])));
    while last.at < last.bytes.len() {
        let pages = last.account.normal;
        last.packet(&mut scratch);
        if last.account.normal > pages {
            channels[1].drop_packet = Some(last.account.packets);
        }
    }
    decode_main(capture.main(), |decoder, _, item, payload| {
        ram.apply(decoder, item, payload);
        if matches!(item, Item::Flush) {
            channels.iter_mut().for_each(|channel| channel.run_to_sync(&mut ram));
        }
    });
    assert_ne!(sha256(&ram.blocks["pc.ram"]), capture.expect.ram_sha256["pc.ram"]);
}

#[test]
fn device_state_is_found_and_cut_by_its_description() {
    for capture in Capture::all() {
        let main = capture.main();
        let (blob, json) = tail(main);
        assert_eq!((blob.len(), json.len()), (capture.expect.device_blob, capture.expect.vmdesc), "{}", capture.name);
        assert_eq!(sha256(blob), capture.expect.devices_sha256, "{}", capture.name);
        let description = VmDescription::parse(json).unwrap();
        assert_eq!(description.page_size, PAGE as u64);
        let sections = cut(blob, &description).unwrap();
        assert_eq!((sections.len(), description.devices.len()), (capture.expect.devices, capture.expect.devices));
        for section in &sections {
            let device = &description.devices[section.device];
            let values = device.values(&blob[section.body.clone()]);
            assert!(values.is_some(), "{}: {} does not fit its description", capture.name, section.name);
        }
        let state = sections.iter().find(|section| section.name == "globalstate").unwrap();
        assert_eq!(state.body.len(), 104);
        assert!(blob[state.body.clone()][4..].starts_with(b"running\0"), "{}", capture.name);
        // Received in pieces, the end is found at the last byte and not before it.
        let start = main.len() - json.len() - TAIL_HEAD - blob.len();
        let mut scanner = TailScanner::default();
        for end in (start..main.len()).step_by(1448) {
            assert_eq!(scanner.scan(&main[start..end]), None);
        }
        let end = scanner.scan(&main[start..]).unwrap();
        assert_eq!(&main[start..][end.json], json);
    }
}

#[test]
fn main_encodes_back_to_the_recorded_bytes() {
    for capture in Capture::all() {
        let main = capture.main();
        let mut encoder = MainEncoder::default();
        let mut end = 0;
        let mut back = Vec::with_capacity(main.len());
        decode_main(main, |decoder, at, item, payload| {
            let name = |block: usize| &decoder.blocks()[block].name;
            let description = match item {
                Item::VmDescription { .. } => payload,
                _ => &[],
            };
            match item {
                Item::Header => encoder.header(),
                Item::Configuration { machine } => encoder.configuration(machine),
                Item::ConfigPageBits(bits) => encoder.config_page_bits(*bits),
                Item::ConfigCapabilities(names) => encoder.config_capabilities(names),
                Item::ConfigUuid(uuid) => encoder.config_uuid(uuid),
                Item::Command(command) => encoder.command(command),
                Item::RamStart { section_id, total } => encoder.ram_start(*section_id, *total),
                Item::Block(entry) => encoder.block(entry),
                Item::BlocksEnd => &mut encoder,
                Item::RamPart { end } => encoder.ram_part(decoder.ram_section().unwrap(), *end),
                Item::ZeroPage { block, offset } => encoder.zero_page(name(*block), *offset),
                Item::Page { block, offset, .. } => encoder.page(name(*block), *offset),
                Item::Xbzrle { block, offset, len } => encoder.xbzrle(name(*block), *offset, *len as u16),
                Item::CompressPage { block, offset, len } => encoder.compress_page(name(*block), *offset, *len as u32),
                Item::Flush => encoder.flush(),
                Item::Eos => encoder.eos(),
                Item::Footer { section_id } => encoder.footer(*section_id),
                Item::Section(section) => encoder.section(section),
                Item::Eof => encoder.eof(),
                Item::VmDescription { .. } => encoder.vm_description(description),
                Item::ConfigOffer(offer) => encoder.config_offer(offer),
            };
            assert_eq!(back.len() as u64, at);
            back.extend_from_slice(&encoder.bytes);
            if description.is_empty() {
                back.extend_from_slice(payload);
            }
            encoder.bytes.clear();
            end = back.len();
        });
        assert_eq!(end, main.len(), "{}", capture.name);
        assert!(back == main, "{}: bytes differ", capture.name);
    }
}

#[test]
fn packet_headers_encode_back_to_the_recorded_bytes() {
    let (mut equal, mut with_stale_fields) = (0, 0);
    for capture in Capture::all() {
        for id in 0..capture.channels as u8 {
            let bytes = capture.channel(id);
            let hello: &[u8; HELLO_LEN] = bytes.first_chunk().unwrap();
            let decoded = Hello::decode(hello).unwrap();
            assert_eq!((decoded.channel.0, decoded.encode()), (id, *hello));
            let mut at = HELLO_LEN;
            while at < bytes.len() {
                let header = &bytes[at..at + header_len(PAGE)];
                let packet = RamPacket::decode(header, PAGE).unwrap();
                let normal: Vec<_> = packet.normal.clone().collect();
                let zero: Vec<_> = packet.zero.clone().collect();
                let mut back = vec![0xff; header_len(PAGE)];
                PacketHeader {
                    sync: packet.sync,
                    compression: packet.compression,
                    packet_num: packet.packet_num,
                    block: if packet.is_empty() { "" } else { packet.block_name().unwrap() },
                    normal: &normal,
                    zero: &zero,
                    payload_len: packet.payload_len as u32,
                }
                .encode_into(&mut back, PAGE);
                if capture.qemu != "7.2" {
                    assert!(back == header, "{} channel {id} at {at}", capture.name);
                    equal += 1;
                } else {
                    // QEMU 7.2 leaves room, size, name and slots of earlier packets where they mean nothing.
                    let used = 320 + 8 * (normal.len() + zero.len());
                    assert_eq!(back[..12], header[..12]);
                    assert_eq!(back[16..20], header[16..20]);
                    assert_eq!(back[24..64], header[24..64]);
                    assert_eq!(back[320..used], header[320..used]);
                    if !packet.is_empty() {
                        assert_eq!(back[..320], header[..320], "{} channel {id} at {at}", capture.name);
                    }
                    with_stale_fields += usize::from(back != header);
                }
                at += header_len(PAGE) + packet.payload_len;
            }
        }
    }
    assert_eq!(equal, 31 + 42 + 23 + 18 + 45 + 30);
    assert!(with_stale_fields > 0, "the recordings of 7.2 have stale fields");
}

/// Device state and vmdescription of a complete main.
fn tail(main: &[u8]) -> (&[u8], &[u8]) {
    let end = TailScanner::default().scan(main).expect("the recording is complete");
    let mut decoder = MainDecoder::new(PAGE);
    let mut at = 0;
    // Up to the first section head behind RAM; whose bytes belong to the blob.
    loop {
        let (item, next) = next(&mut decoder, main, at);
        if matches!(item, Item::Section(_)) && decoder.ram_ended() {
            return (&main[at..end.eof_at], &main[end.json]);
        }
        at = next;
    }
}

/// Decodes all of main and shows each item with its position and what follows it: payload, or body of its section.
fn decode_main<'a>(main: &'a [u8], mut each: impl FnMut(&MainDecoder, u64, &Item, &'a [u8])) {
    let (blob, json) = tail(main);
    let blob_at = main.len() - json.len() - TAIL_HEAD - blob.len();
    let bodies: HashMap<usize, usize> = cut(blob, &VmDescription::parse(json).unwrap())
        .unwrap()
        .iter()
        .map(|section| (blob_at + section.body.start, section.body.len()))
        .collect();
    let mut decoder = MainDecoder::new(PAGE);
    let mut at = 0;
    while !decoder.finished() {
        let start = at;
        let (item, next) = next(&mut decoder, main, at);
        let payload_at = next - item.payload_len() as usize;
        let mut end = next;
        if matches!(item, Item::Section(_)) {
            end += bodies[&next];
            decoder.body_taken(bodies[&next] as u64);
        }
        each(&decoder, start as u64, &item, &main[payload_at..end]);
        at = end;
        assert_eq!(decoder.position(), at as u64);
    }
    assert_eq!(at, main.len());
}

/// Shows the decoder only as many bytes as it asks for. Returns the item and where the bytes behind its payload begin.
fn next(decoder: &mut MainDecoder, main: &[u8], at: usize) -> (Item, usize) {
    let mut shown = 0;
    loop {
        match decoder.step(&main[at..at + shown]).unwrap() {
            Step::Need(total) => {
                assert!(total > shown && total <= 600, "asked for {total} after {shown}");
                shown = total;
            }
            Step::Item { item, used } => {
                assert_eq!(used, shown, "asked for more than {item:?} has");
                let next = at + used + item.payload_len() as usize;
                return (item, next);
            }
        }
    }
}

/// What main contained.
#[derive(Default)]
struct Account {
    machine: String,
    uuid: Option<String>,
    commands: Vec<(String, String, u64)>,
    sync_points: usize,
    main: ExpectMain,
    flags: BTreeSet<u64>,
    /// Whether a page word came before: the first one names its block.
    last: Option<usize>,
}

impl Account {
    fn count(&mut self, at: u64, item: &Item) {
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        match item {
            Item::Configuration { machine } => self.machine = machine.clone(),
            Item::ConfigUuid(uuid) => self.uuid = Some(hex(uuid)),
            Item::Command(command) => {
                let mut bytes = Vec::new();
                command.encode(&mut bytes);
                self.commands.push((command.to_string(), hex(&bytes[4..]), at));
            }
            Item::RamStart { .. } => self.word(MEM_SIZE),
            Item::RamPart { end } => self.main.parts += usize::from(!end),
            Item::ZeroPage { block, .. } => {
                self.main.zero += 1;
                self.page_word(*block, ZERO);
            }
            Item::Page { block, .. } => {
                self.main.page += 1;
                self.page_word(*block, PAGE_FLAG);
            }
            Item::Xbzrle { block, .. } => {
                self.main.xbzrle += 1;
                self.page_word(*block, XBZRLE);
            }
            Item::Flush => {
                self.main.flush += 1;
                self.word(FLUSH);
            }
            Item::Eos => {
                self.main.eos += 1;
                self.word(EOS);
            }
            _ => (),
        }
    }

    fn page_word(&mut self, block: usize, flag: u64) {
        self.word(if self.last == Some(block) { flag | CONTINUE } else { flag });
        self.last = Some(block);
    }

    fn word(&mut self, flags: u64) {
        self.flags.insert(flags);
    }
}

/// The flags of RAM words.
const ZERO: u64 = 0x002;
const MEM_SIZE: u64 = 0x004;
const PAGE_FLAG: u64 = 0x008;
const EOS: u64 = 0x010;
const CONTINUE: u64 = 0x020;
const XBZRLE: u64 = 0x040;
const FLUSH: u64 = 0x200;

/// The destination's memory, zeroed at first.
#[derive(Default)]
struct Ram {
    order: Vec<String>,
    blocks: HashMap<String, Vec<u8>>,
}

impl Ram {
    fn apply(&mut self, decoder: &MainDecoder, item: &Item, payload: &[u8]) {
        let name = |block: usize| decoder.blocks()[block].name.as_str();
        match item {
            Item::Block(entry) => {
                self.order.push(entry.name.as_str().to_owned());
                self.blocks.insert(entry.name.as_str().to_owned(), vec![0; entry.used_len as usize]);
            }
            Item::ZeroPage { block, offset } => self.page(name(*block), *offset).fill(0),
            Item::Page { block, offset, .. } => self.page(name(*block), *offset).copy_from_slice(payload),
            Item::Xbzrle { block, offset, .. } => xbzrle::apply(payload, self.page(name(*block), *offset)).unwrap(),
            _ => (),
        }
    }

    fn page(&mut self, block: &str, offset: u64) -> &mut [u8] {
        &mut self.blocks.get_mut(block).expect("the block was listed")[offset as usize..][..PAGE]
    }
}

/// One channel's recording on its way into memory.
struct Channel {
    bytes: &'static [u8],
    at: usize,
    account: ExpectChannel,
    decompressor: Decompressor,
    compression: Compression,
    /// Number of a packet to be left out.
    drop_packet: Option<usize>,
}

enum Decompressor {
    None,
    Zlib(Decompress),
    /// The whole channel's zstd stream, which never ends: packets are fed one by one.
    Zstd(zstd::stream::read::Decoder<'static, std::io::BufReader<Feed>>, Feed),
}

/// Bytes that arrive packet by packet.
#[derive(Clone, Default)]
struct Feed(std::rc::Rc<std::cell::RefCell<std::collections::VecDeque<u8>>>);

impl Read for Feed {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        self.0.borrow_mut().read(buf)
    }
}

impl Channel {
    fn new(capture: &Capture, id: u8) -> Self {
        let (decompressor, compression) = match capture.compression.as_str() {
            "zlib" => (Decompressor::Zlib(Decompress::new(true)), Compression::Zlib),
            "zstd" => {
                let feed = Feed::default();
                let decoder = zstd::stream::read::Decoder::new(feed.clone()).unwrap();
                (Decompressor::Zstd(decoder, feed), Compression::Zstd)
            }
            _ => (Decompressor::None, Compression::None),
        };
        let bytes = capture.channel(id);
        let hello = Hello::decode(bytes.first_chunk().unwrap()).unwrap();
        assert_eq!(hello.channel.0, id);
        let account = ExpectChannel { id, bytes: bytes.len(), ..ExpectChannel::default() };
        Self { bytes, at: HELLO_LEN, account, decompressor, compression, drop_packet: None }
    }

    /// Applies packets up to the SYNC, and the packet without anything that QEMU 7.2 sends behind some of them.
    fn run_to_sync(&mut self, ram: &mut Ram) {
        while !self.packet(ram) {}
        while self.at < self.bytes.len() && self.peek().is_empty() && !self.peek().sync {
            self.packet(ram);
        }
    }

    fn peek(&self) -> RamPacket<'static> {
        let prefix = Prefix::decode(self.bytes[self.at..self.at + PREFIX_LEN].first_chunk().unwrap()).unwrap();
        RamPacket::decode(&self.bytes[self.at..self.at + prefix.header_len(PAGE)], PAGE).unwrap()
    }

    /// Applies one packet and says whether it was a SYNC.
    fn packet(&mut self, ram: &mut Ram) -> bool {
        let packet = self.peek();
        let payload = &self.bytes[self.at + header_len(PAGE)..][..packet.payload_len];
        self.at += header_len(PAGE) + payload.len();
        let account = &mut self.account;
        account.packets += 1;
        account.sync += usize::from(packet.sync);
        account.sync_with_data += usize::from(packet.sync && !packet.is_empty());
        account.empty += usize::from(!packet.sync && packet.is_empty());
        account.stale_size += usize::from(packet.normal.len() == 0 && packet.payload_field != 0);
        account.normal += packet.normal.len();
        account.zero += packet.zero.len();
        account.payload += payload.len();
        if packet.is_empty() {
            return packet.sync;
        }
        assert_eq!(packet.compression, self.compression);
        let block = BlockName::new(packet.block_name().unwrap()).unwrap();
        packet.check_pages(&block, ram.blocks[block.as_str()].len() as u64, PAGE).unwrap();
        let mut pages = vec![0; packet.normal.len() * PAGE];
        self.decompressor.decompress(payload, &mut pages);
        if self.drop_packet == Some(self.account.packets) {
            return packet.sync;
        }
        for (offset, page) in packet.normal.clone().zip(pages.chunks(PAGE)) {
            ram.page(block.as_str(), offset).copy_from_slice(page);
        }
        for offset in packet.zero.clone() {
            ram.page(block.as_str(), offset).fill(0);
        }
        packet.sync
    }
}

impl Decompressor {
    fn decompress(&mut self, payload: &[u8], pages: &mut [u8]) {
        match self {
            Self::None => pages.copy_from_slice(payload),
            Self::Zlib(stream) => {
                let (read, written) = (stream.total_in(), stream.total_out());
                // The output fills up before the empty block of the flush is read.
                while stream.total_in() - read < payload.len() as u64 {
                    let input = &payload[(stream.total_in() - read) as usize..];
                    let output = &mut pages[(stream.total_out() - written) as usize..];
                    let before = (stream.total_in(), stream.total_out());
                    stream.decompress(input, output, FlushDecompress::Sync).unwrap();
                    assert_ne!(before, (stream.total_in(), stream.total_out()), "no progress");
                }
                assert_eq!(stream.total_out() - written, pages.len() as u64);
            }
            Self::Zstd(stream, feed) => {
                feed.0.borrow_mut().extend(payload);
                stream.read_exact(pages).unwrap();
                assert!(feed.0.borrow().is_empty(), "payload is left");
            }
        }
    }
}
