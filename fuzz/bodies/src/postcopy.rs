//! Postcopy: commands, packages, requests, preempt connections, bitmaps of a recovery. The first byte chooses.

use std::sync::LazyLock;

use multifd_proto::{
    BlockName, Codec, Step,
    command::Command,
    encoder::MainEncoder,
    mapped_ram::{bitmap_len, is_set},
    postcopy::{DiscardRange, Package, PreemptDecoder, PreemptItem, Request, Requests, received},
    ram::BlockEntry,
    return_path::Message,
};

pub(crate) fn postcopy(input: &[u8]) {
    let Some((&first, input)) = input.split_first() else { return };
    match first % 5 {
        0 => commands(input),
        1 => packaged(input),
        2 => requests(input),
        3 => preempt(input),
        _ => bitmap(input, u64::from(first)),
    }
}

/// Commands one after the other; what is discarded lies inside its block.
fn commands(mut input: &[u8]) {
    while let Ok(Step::Item { item, used }) = Command::decode(input) {
        let mut encoded = Vec::new();
        item.encode(&mut encoded);
        assert_eq!(encoded, input[..used], "{item:?}");
        input = &input[used..];
        let Command::PostcopyRamDiscard { block, ranges } = item else { continue };
        for range in ranges {
            if let Ok(bytes) = range.check(&block, LEN, PAGE as u64) {
                assert!(bytes.start < bytes.end && bytes.end <= LEN && bytes.start % PAGE as u64 == 0);
            }
        }
    }
}

fn packaged(input: &[u8]) {
    let Ok(found) = Package::of(input) else { return };
    let devices = &input[found.devices];
    if found.pings == [Package::PING] {
        let mut encoded = Vec::new();
        Package::encode(devices, &mut encoded);
        assert_eq!(encoded[9..], *input);
    }
}

/// Messages one after the other: a request that is accepted is for pages that exist, and is asked for in the same words.
fn requests(mut input: &[u8]) {
    let mut source = Requests::default();
    while let Ok(Step::Item { item, used }) = Message::decode(input) {
        input = &input[used..];
        let Ok(Some(request)) = source.accept(&item, &BLOCKS, PAGE as u64) else { continue };
        let Request { block, start, len } = request;
        assert!(len > 0 && start + u64::from(len) <= BLOCKS[block].used_len && start % PAGE as u64 == 0);
        let asked = Message::ReqPagesId { start, len, block: BLOCKS[block].name.clone() };
        assert_eq!(Requests::default().accept(&asked, &BLOCKS, PAGE as u64), Ok(Some(request)));
    }
}

/// The words that are accepted are those that our encoder writes, but for a name where CONTINUE would do.
fn preempt(input: &[u8]) {
    let mut decoder = PreemptDecoder::default();
    let mut encoder = MainEncoder::default();
    let (mut rest, mut items) = (input, Vec::new());
    while let Ok(step) = decoder.step(rest, &BLOCKS, PAGE) {
        let Step::Item { item, used } = step else {
            let Step::Need(total) = step else { unreachable!() };
            assert!(total > rest.len() && total <= rest.len() + 256);
            break;
        };
        rest = &rest[used..];
        items.push(item);
        match item {
            PreemptItem::Page { block, offset } => {
                assert!(offset + PAGE as u64 <= BLOCKS[block].used_len);
                let Some(page) = rest.get(..PAGE) else { break };
                encoder.page(&BLOCKS[block].name, offset).raw(page);
                rest = &rest[PAGE..];
            }
            PreemptItem::Zero { block, offset } => _ = encoder.zero_page(&BLOCKS[block].name, offset),
            PreemptItem::End => _ = encoder.eos(),
        }
    }
    let (mut decoder, mut rest) = (PreemptDecoder::default(), encoder.bytes.as_slice());
    for item in items {
        let Ok(Step::Item { item: again, used }) = decoder.step(rest, &BLOCKS, PAGE) else { return };
        assert_eq!(again, item);
        rest = &rest[used..];
        if matches!(item, PreemptItem::Page { .. }) {
            rest = rest.get(PAGE..).unwrap_or_default();
        }
    }
}

fn bitmap(input: &[u8], pages: u64) {
    match received::decode(input, pages) {
        Ok(Step::Need(total)) => assert!(total > input.len() && total as u64 <= bitmap_len(pages, 1) + 16),
        Ok(Step::Item { item, used }) => {
            let mut encoded = Vec::new();
            received::encode(pages, (0..pages).filter(|&page| is_set(item, page as usize)), &mut encoded);
            assert_eq!((encoded.len(), item.len() as u64), (used, bitmap_len(pages, 1)));
        }
        Err(_) => {}
    }
}

/// At least one of each kind.
pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let [ram, bios] = [0, 1].map(|block: usize| BLOCKS[block].name.clone());
    let mut encoder = MainEncoder::default();
    encoder.page(&ram, 0x1000).raw(&[7; PAGE]).zero_page(&ram, 0x3000).zero_page(&bios, 0).eos();
    let words = [&[3], encoder.bytes.as_slice()].concat();
    let ranges = [DiscardRange { start: 0, len: LEN }, DiscardRange { start: 0x1000, len: 0x2000 }];
    let mut commands = vec![0];
    for command in
        DiscardRange::commands(&ram, &ranges).chain([Command::RecvBitmap { block: bios }, Command::PostcopyResume])
    {
        command.encode(&mut commands);
    }
    let mut packaged = Vec::new();
    Package::encode(b"\x04\0\0\0\x07\x03cpu\0\0\0\0\0\0\0\x01state\x7e\0\0\0\x07", &mut packaged);
    let packaged = [&[1], &packaged[9..]].concat();
    let mut requests = vec![2];
    let len = 0x1000;
    let of = |block: usize, start| Message::ReqPagesId { start, len, block: BLOCKS[block].name.clone() };
    for request in [of(0, 0), Message::ReqPages { start: 0x1000, len }, of(1, 0), of(0, 0x3000)] {
        request.encode(&mut requests);
    }
    let mut bitmap = vec![4];
    received::encode(4, [0, 3], &mut bitmap);
    vec![words, commands, packaged, requests, bitmap]
}

static BLOCKS: LazyLock<Vec<BlockEntry>> = LazyLock::new(|| {
    ["pc.ram", "pc.bios"].map(|name| BlockEntry::new(BlockName::new(name).expect("a valid name"), LEN)).to_vec()
});

const LEN: u64 = 0x4000;
const PAGE: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    /// A seed that is refused at its first byte would have the fuzzer begin with nothing.
    #[test]
    fn seeds_get_behind_the_first_element() {
        let [words, commands, packaged, requests, bitmap] = &seeds()[..] else { panic!("five seeds") };
        assert!(matches!(PreemptDecoder::default().step(&words[1..], &BLOCKS, PAGE), Ok(Step::Item { .. })));
        assert!(matches!(Command::decode(&commands[1..]), Ok(Step::Item { .. })));
        assert!(Package::of(&packaged[1..]).is_ok());
        assert!(matches!(Message::decode(&requests[1..]), Ok(Step::Item { .. })));
        assert!(matches!(received::decode(&bitmap[1..], 4), Ok(Step::Item { .. })));
    }
}
