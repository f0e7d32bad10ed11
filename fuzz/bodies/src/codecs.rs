//! The codecs of `multifd-proto`, and the decompressors.

use multifd_proto::{
    BlockName, Codec, Step,
    device_state::{HEAD_LEN, MAX_STATE, StatePacket, device_state_refusal},
    encoder::MainEncoder,
    packet::{self, Compression, Hello, PacketHeader, Prefix, RamPacket},
    return_path::Message,
    shared_memory,
    stream::{Item, MainDecoder},
    vmdesc::{self, TailScanner, VmDescription},
};

/// Headers of all kinds. Whatever decodes has counts and offsets within bounds, and encodes to what decodes the same.
pub(crate) fn packet(input: &[u8]) {
    let Some((&first, input)) = input.split_first() else { return };
    let page_size = [4096, 1024, 16384, 65536][usize::from(first % 4)];
    if let Some(bytes) = input.first_chunk()
        && let Ok(hello) = Hello::decode(bytes)
    {
        assert_eq!(Hello::decode(&hello.encode()), Ok(hello));
    }
    device_state_refusal(input).to_string();
    if let Ok(state) = StatePacket::decode(input) {
        assert!((1..=MAX_STATE).contains(&state.len));
        let mut head = vec![0xaa; HEAD_LEN];
        state.encode_into(&mut head);
        assert_eq!(StatePacket::decode(&head), Ok(state));
    }
    let Some(prefix) = input.first_chunk() else { return };
    let prefix = Prefix::decode(prefix);
    let ram = RamPacket::decode(input, page_size);
    if let (Err(_), Ok(_)) = (&prefix, &ram) {
        panic!("a packet with a prefix that does not decode");
    }
    let Ok(ram) = ram else { return };
    let (normal, zero): (Vec<u64>, Vec<u64>) = (ram.normal.clone().collect(), ram.zero.clone().collect());
    assert!(normal.len() + zero.len() <= packet::capacity(page_size));
    assert!(ram.payload_len <= packet::capacity(page_size) * page_size * 2 + (1 << 20), "{}", ram.payload_len);
    let block = BlockName::new("any").expect("a valid name");
    if ram.check_pages(&block, 1 << 20, page_size).is_ok() {
        assert!(normal.iter().chain(&zero).all(|at| at % page_size as u64 == 0 && at + page_size as u64 <= 1 << 20));
    }
    let Ok(name) = ram.block_name() else { return };
    let header = PacketHeader {
        sync: ram.sync,
        compression: ram.compression,
        packet_num: ram.packet_num,
        block: name,
        normal: &normal,
        zero: &zero,
        payload_len: ram.payload_len as u32,
    };
    let mut bytes = vec![0xaa; packet::header_len(page_size)];
    header.encode_into(&mut bytes, page_size);
    let again = RamPacket::decode(&bytes, page_size).expect("what we encode decodes");
    assert_eq!(again.normal.clone().collect::<Vec<_>>(), normal);
    assert_eq!(again.zero.clone().collect::<Vec<_>>(), zero);
    assert_eq!((again.sync, again.payload_len), (ram.sync, ram.payload_len));
}

/// A whole main. Decoded in one piece and with no byte more than asked for it gives the same items; encoded again, too.
pub(crate) fn main_stream(input: &[u8]) {
    let whole = items(input, |rest, _| rest.len());
    // A decoder that is shown only what it asks for.
    let sparing = items(input, |rest, asked| asked.min(rest.len()));
    assert_eq!(whole.items.len(), sparing.items.len());
    assert!(whole.items.iter().zip(&sparing.items).all(|(one, other)| one.0 == other.0));
    assert_eq!(whole.error, sparing.error);
    // What follows the items follows again: behind a block, the decoder looks at it.
    let encoded = [&encode(&whole.items), whole.rest].concat();
    let again = items(&encoded, |rest, _| rest.len());
    for (index, ((one, _), (other, _))) in whole.items.iter().zip(&again.items).enumerate() {
        assert_eq!(one, other, "item {index}");
    }
    assert!(again.items.len() >= whole.items.len(), "{:?}", again.error);
}

struct Items<'a> {
    /// Each with its payload, or the body of its section.
    items: Vec<(Item, &'a [u8])>,
    /// Behind the last of them.
    rest: &'a [u8],
    error: Option<String>,
}

/// What a decoder finds in `input`, of which `window` tells how much it is shown of the rest when it asks for so many bytes.
fn items(input: &[u8], window: impl Fn(&[u8], usize) -> usize) -> Items<'_> {
    let mut decoder = MainDecoder::new(4096);
    let (mut rest, mut asked) = (input, 1);
    let mut found = Items { items: Vec::new(), rest: input, error: None };
    loop {
        let shown = window(rest, asked);
        match decoder.step(&rest[..shown]) {
            Err(error) => {
                assert!(error.offset <= input.len() as u64);
                found.error = Some(error.to_string());
                return found;
            }
            Ok(Step::Need(total)) => {
                assert!(total > shown, "asked for {total} of {shown}");
                assert!(total < 70_000, "asked for {total}");
                if shown == rest.len() {
                    return found;
                }
                asked = total;
            }
            Ok(Step::Item { item, used }) => {
                rest = &rest[used..];
                // Nothing tells how long a body is: any length will do, and the input chooses one.
                let len = match &item {
                    Item::Section(_) => rest.first().map_or(0, |&len| usize::from(len)) as u64,
                    item => item.payload_len(),
                };
                let Some(payload) = usize::try_from(len).ok().and_then(|len| rest.get(..len)) else { return found };
                rest = &rest[payload.len()..];
                if matches!(item, Item::Section(_)) {
                    decoder.body_taken(len);
                }
                found.items.push((item, payload));
                found.rest = rest;
                asked = 1;
            }
        }
    }
}

fn encode(items: &[(Item, &[u8])]) -> Vec<u8> {
    let mut encoder = MainEncoder::default();
    let (mut ram, mut blocks) = (0, Vec::new());
    for (item, payload) in items {
        let len = payload.len();
        match item {
            Item::Header => encoder.header(),
            Item::Configuration { machine } => encoder.configuration(machine),
            Item::ConfigPageBits(bits) => encoder.config_page_bits(*bits),
            Item::ConfigCapabilities(names) => encoder.config_capabilities(names),
            Item::ConfigUuid(uuid) => encoder.config_uuid(uuid),
            Item::ConfigOffer(offer) => encoder.config_offer(offer),
            Item::Command(command) => encoder.command(command),
            Item::RamStart { section_id, total } => {
                ram = *section_id;
                encoder.ram_start(ram, *total)
            }
            Item::Block(entry) => {
                blocks.push(entry.name.clone());
                encoder.block(entry)
            }
            Item::BlocksEnd => &mut encoder,
            Item::RamPart { end } => encoder.ram_part(ram, *end),
            Item::ZeroPage { block, offset } => encoder.zero_page(&blocks[*block], *offset),
            Item::Page { block, offset, .. } => encoder.page(&blocks[*block], *offset),
            Item::Xbzrle { block, offset, .. } => encoder.xbzrle(&blocks[*block], *offset, len as u16),
            Item::CompressPage { block, offset, .. } => encoder.compress_page(&blocks[*block], *offset, len as u32),
            Item::Flush => encoder.flush(),
            Item::Eos => encoder.eos(),
            Item::Footer { section_id } => encoder.footer(*section_id),
            Item::Section(section) => encoder.section(section),
            Item::Eof => encoder.eof(),
            Item::VmDescription { .. } => {
                encoder.vm_description(payload);
                continue;
            }
        };
        encoder.raw(payload);
    }
    encoder.bytes.clone()
}

/// Messages one after the other. And the whole as a list of memory that is handed over.
pub(crate) fn return_path(mut input: &[u8]) {
    if let Ok(blocks) = shared_memory::decode(input) {
        assert!((1..=shared_memory::MAX_SHARED_BLOCKS).contains(&blocks.len()));
        assert!(shared_memory::encode(&blocks) == input, "{blocks:?}");
    }
    loop {
        match Message::decode(input) {
            Err(_) => return,
            Ok(Step::Need(total)) => {
                assert!(total > input.len() && total <= 4 + 512);
                return;
            }
            Ok(Step::Item { item, used }) => {
                let mut encoded = Vec::new();
                item.encode(&mut encoded);
                let Ok(Step::Item { item: again, used: all }) = Message::decode(&encoded) else {
                    panic!("{item:?} does not decode");
                };
                assert_eq!(all, encoded.len());
                match (&item, &again) {
                    // What was no text takes more bytes as one, and a reason that is too long is cut.
                    (Message::Reason(text), Message::Reason(cut)) => assert!(text.starts_with(cut.as_str())),
                    _ => assert_eq!(again, item),
                }
                let mut twice = Vec::new();
                again.encode(&mut twice);
                assert_eq!(twice, encoded);
                input = &input[used..];
            }
        }
    }
}

/// A description and device state: a 16-bit length, so many bytes of JSON, and state.
pub(crate) fn vmdesc(input: &[u8]) {
    let Some((len, rest)) = input.split_first_chunk() else { return };
    let (json, blob) = rest.split_at(usize::from(u16::from_be_bytes(*len)).min(rest.len()));
    if let Ok(description) = VmDescription::parse(json) {
        let again = VmDescription::parse(&description.to_json()).expect("what we write parses");
        assert_eq!(again.to_json(), description.to_json());
        for device in &description.devices {
            device.values(blob);
        }
        if let Ok(sections) = vmdesc::cut(blob, &description) {
            let mut end = 0;
            for section in sections {
                assert!(section.body.start >= end && section.body.end <= blob.len());
                assert!(section.device < description.devices.len());
                end = section.body.end;
            }
        }
    }
    // The end of main is the same however it came in.
    let mut scanner = TailScanner::default();
    let step = 1 + rest.len() / 23;
    let mut end = None;
    for len in (0..rest.len()).step_by(step).chain([rest.len()]) {
        end = scanner.scan(&rest[..len]);
    }
    assert_eq!(end, TailScanner::default().scan(rest));
    if let Some(end) = end {
        assert!(end.eof_at < end.json.start && end.json.end == rest.len());
    }
}

/// Payloads of one channel: a byte for the method, then a 16-bit length before each.
pub(crate) fn decompress(input: &[u8]) {
    let Some((&first, mut rest)) = input.split_first() else { return };
    let pages = 1 + usize::from(first / 4 % 8);
    if first % 4 == 2 {
        if let Ok(page) = multifd::testing::fuzzing::inflate_page(rest, 4096) {
            assert_eq!(page.len(), 4096);
        }
        return;
    }
    let method = if first % 2 == 0 { Compression::Zlib } else { Compression::Zstd };
    let mut payloads = Vec::new();
    while let Some((len, after)) = rest.split_first_chunk() {
        let (payload, after) = after.split_at(usize::from(u16::from_be_bytes(*len)).min(after.len()));
        payloads.push(payload);
        rest = after;
    }
    // Right or wrong, it ends and stays within bounds.
    drop(multifd::testing::fuzzing::decompress(method, payloads, pages * 4096));
}

#[cfg(test)]
mod tests {
    #[test]
    fn seeds_of_main_are_decoded_up_to_where_they_were_cut() {
        let mut complete = 0;
        for (index, seed) in crate::seeds::mains().iter().enumerate() {
            let items = super::items(seed, |rest, _| rest.len());
            assert!(items.items.len() >= 5, "seed {index}: {:?}", items.error);
            complete += usize::from(items.error.is_none());
        }
        assert!(complete > 0);
    }
}
