//! Checkpoints of a VM a part of whose memory is elsewhere (`x-ignore-shared`): what is kept, and that none passes for a whole VM.

use std::{fs, io::Read, path::Path};

use multifd_proto::{
    BlockName, Codec, Step,
    encoder::MainEncoder,
    mapped_ram::BlockHeader,
    ram::BlockEntry,
    stream::{Item, MainDecoder, Section, SectionKind, X_IGNORE_SHARED},
};
use test_support::TempDir;

use super::{Checkpoint, CheckpointError, CheckpointSource, PAGE_SIZE, Writer};
use crate::{
    destination::{self, Destination},
    error::Error,
    postcopy,
    ram::Ram,
    source::{self, Source},
    testing::{memory, vm::TestDestination},
    transport::one_way::OneWayListener,
};

const PAGE: u64 = PAGE_SIZE as u64;
/// RAM blocks: name, pages, address.
const BLOCKS: [(&str, u64, u64); 4] =
    [("pc.rom", 2, 0xc_0000), ("pc.ram", 300, 0), ("pc.bios", 64, 0xfffc_0000), ("vga", 3, 0)];
/// The one whose memory is elsewhere.
const ELSEWHERE: &str = "pc.ram";

fn name(text: &str) -> BlockName {
    BlockName::new(text).unwrap()
}

fn content(page: u64) -> [u8; PAGE_SIZE] {
    [(page % 251) as u8 + 1; PAGE_SIZE]
}

fn devices(encoder: &mut MainEncoder) {
    let section = Section { kind: SectionKind::Full, id: 7, name: "cpu".to_owned(), instance: 0, version: 1 };
    encoder.section(&section).raw(b"state").footer(7).eof();
}

/// A plain stream with `capabilities`, in which each page of the blocks `named` comes: those of ROMs as zeros.
fn stream(capabilities: &[&str], named: impl Fn(&str) -> bool) -> Vec<u8> {
    let mut encoder = MainEncoder::default();
    encoder.header().configuration("pc-i440fx-10.0");
    if !capabilities.is_empty() {
        encoder.config_capabilities(capabilities);
    }
    encoder.config_uuid(&[7; 16]).ram_start(2, BLOCKS.iter().map(|(_, pages, _)| pages * PAGE).sum());
    let lists_addresses = capabilities.contains(&X_IGNORE_SHARED);
    for (block, pages, gpa) in BLOCKS {
        encoder
            .block(&BlockEntry { gpa: lists_addresses.then_some(gpa), ..BlockEntry::new(name(block), pages * PAGE) });
    }
    encoder.eos().footer(2).ram_part(2, false);
    for (block, pages, _) in BLOCKS.into_iter().filter(|(block, ..)| named(block)) {
        for page in 0..pages {
            match block {
                "pc.rom" => _ = encoder.zero_page(&name(block), page * PAGE),
                _ => _ = encoder.page(&name(block), page * PAGE).raw(&content(page)),
            }
        }
    }
    encoder.eos().footer(2).ram_part(2, true).eos().footer(2);
    devices(&mut encoder);
    encoder.bytes
}

/// Takes `stream` into the file `to`.
fn take(stream: Vec<u8>, to: &Path) -> Result<destination::Report, Error> {
    let from = OneWayListener::of_reader(Box::new(std::io::Cursor::new(stream)), "test".to_owned()).unwrap();
    Writer::create(to, false)?.receive(Destination::new(destination::Options::default()), Box::new(from), &mut ())
}

/// A checkpoint whose `pc.ram` is elsewhere.
fn devices_alone(dir: &TempDir) -> Checkpoint {
    let path = dir.join("checkpoint");
    let report = take(stream(&[X_IGNORE_SHARED], |block| block != ELSEWHERE), &path).unwrap();
    assert_eq!(report.memory_elsewhere, [name(ELSEWHERE)]);
    Checkpoint::open(&path).unwrap()
}

/// The items of the stream in `bytes`, up to the END section of `ram`, without what pages hold.
fn items(bytes: &[u8]) -> Vec<Item> {
    let mut decoder = MainDecoder::new(PAGE_SIZE);
    let (mut items, mut at) = (Vec::new(), 0);
    while !decoder.ram_ended() {
        match decoder.step(&bytes[at..]).unwrap() {
            Step::Item { item, used } => {
                at += used + item.payload_len() as usize;
                items.push(item);
            }
            Step::Need(total) => panic!("{total} bytes at {at} of {}", bytes.len()),
        }
    }
    items
}

#[test]
fn the_devices_are_kept_and_the_memory_is_said_to_be_elsewhere() {
    let dir = TempDir::new().unwrap();
    let checkpoint = devices_alone(&dir);
    assert_eq!(checkpoint.capabilities(), [X_IGNORE_SHARED, "mapped-ram"]);
    for (block, (expected, pages, gpa)) in checkpoint.blocks().iter().zip(BLOCKS) {
        let found = (block.name.as_str(), block.bytes, block.gpa, block.elsewhere);
        assert_eq!(found, (expected, pages * PAGE, Some(gpa), expected == ELSEWHERE));
    }
    // A block of zeros came; only one of which nothing came is elsewhere.
    let present: Vec<_> = checkpoint.blocks().iter().map(|block| block.pages_present).collect();
    assert_eq!(present, [0, 0, 64, 3]);
    let mut rom = Vec::new();
    checkpoint.block_reader(0).read_to_end(&mut rom).unwrap();
    assert_eq!(rom, [0; 2 * PAGE_SIZE]);
    let mut vga = Vec::new();
    checkpoint.block_reader(3).read_to_end(&mut vga).unwrap();
    assert_eq!(vga, [content(0), content(1), content(2)].concat());
    let mut expected = MainEncoder::default();
    devices(&mut expected);
    assert_eq!(checkpoint.sections(), expected.bytes.strip_suffix(&[0]).unwrap());
}

/// The memory would be zeros to a guest that runs on them.
#[test]
fn nothing_takes_memory_that_is_elsewhere_for_zeros() {
    let dir = TempDir::new().unwrap();
    let checkpoint = devices_alone(&dir);
    let error = checkpoint.block_reader(1).read(&mut [0; 10]).unwrap_err();
    assert!(error.to_string().contains("not in the checkpoint"), "{error}");
    let refused = |error: Error| {
        assert!(matches!(error, Error::Checkpoint(CheckpointError::MemoryElsewhere { .. })), "{error}");
        let said = error.to_string();
        assert!(said.contains("the devices of a VM and not its memory: pc.ram was in a file"), "{said}");
        assert!(error.is_peers_fault());
    };
    refused(checkpoint.check_whole().unwrap_err().into());
    refused(postcopy::Source::new(&checkpoint, postcopy::Options::default()).err().unwrap());
}

/// As QEMU does that sends such a VM: all blocks are listed, with addresses, and the pages of those that are here come.
#[test]
fn it_is_sent_as_the_stream_that_it_came_from() {
    let dir = TempDir::new().unwrap();
    let checkpoint = devices_alone(&dir);
    let original = items(&stream(&[X_IGNORE_SHARED], |block| block != ELSEWHERE));
    let mut plain = Vec::new();
    checkpoint.write_stream(&mut plain).unwrap();
    let to = dir.join("again");
    take(plain.clone(), &to).unwrap();
    assert!(fs::read(&to).unwrap() == fs::read(checkpoint.path()).unwrap());
    let (pages, blocks) = (
        |item: &Item| matches!(item, Item::Page { .. } | Item::ZeroPage { .. }),
        |item: &Item| matches!(item, Item::Block(_) | Item::ConfigCapabilities(_) | Item::RamStart { .. }),
    );
    let of = |items: &[Item], kind: &dyn Fn(&Item) -> bool| -> Vec<Item> {
        items.iter().filter(|item| kind(item)).cloned().collect()
    };
    let again = items(&plain);
    assert_eq!(of(&again, &pages), of(&original, &pages));
    assert_eq!(of(&again, &blocks), of(&original, &blocks));
}

/// Over channels, into another checkpoint, which is the same.
#[test]
fn it_is_sent_over_channels() {
    for peer in [source::Peer::Qemu, source::Peer::Multifd] {
        let dir = TempDir::new().unwrap();
        let checkpoint = devices_alone(&dir);
        let (listener, connector) = memory::listener(100_000);
        let to = dir.join("again");
        std::thread::scope(|scope| {
            let receiver = scope.spawn(|| {
                let options = destination::Options { channels: Some(2), ..destination::Options::default() };
                Writer::create(&to, false)?.receive(Destination::new(options), Box::new(listener), &mut ())
            });
            let mut options = source::Options::default();
            options.plan.channels = 2;
            options.peer = peer;
            checkpoint.apply_to(&mut options);
            let mut vm = CheckpointSource::new(&checkpoint).unwrap();
            Source::new(options).run(&mut vm, &connector, &mut ()).unwrap();
            let report = receiver.join().unwrap().unwrap();
            assert_eq!(report.memory_elsewhere, [name(ELSEWHERE)]);
        });
        assert!(fs::read(&to).unwrap() == fs::read(checkpoint.path()).unwrap(), "{peer:?}");
    }
}

/// Its QEMU shares no memory, so all of it came, and the checkpoint is like any other.
#[test]
fn a_source_that_leaves_nothing_out_makes_a_whole_checkpoint() {
    let dir = TempDir::new().unwrap();
    let (with, without) = (dir.join("with"), dir.join("without"));
    let report = take(stream(&[X_IGNORE_SHARED], |_| true), &with).unwrap();
    assert!(report.memory_elsewhere.is_empty());
    take(stream(&[], |_| true), &without).unwrap();
    let [with, without] = [with, without].map(|path| Checkpoint::open(&path).unwrap());
    assert_eq!(with.capabilities(), without.capabilities());
    for (block, expected) in with.blocks().iter().zip(without.blocks()) {
        assert_eq!((&block.name, block.gpa, block.elsewhere), (&expected.name, None, false));
        assert_eq!(block.pages_present, expected.pages_present);
    }
    assert_eq!(with.sections(), without.sections());
    with.check_whole().unwrap();
}

/// A VM that is to run here needs all of its memory.
#[test]
fn no_vm_is_made_of_it() {
    let dir = TempDir::new().unwrap();
    let checkpoint = devices_alone(&dir);
    let mut vm = TestDestination::new(Ram::for_test(&BLOCKS.map(|(name, pages, _)| (name, pages as usize))));
    let (listener, connector) = memory::listener(100_000);
    std::thread::scope(|scope| {
        let receiver =
            scope.spawn(|| Destination::new(destination::Options::default()).run(&mut vm, Box::new(listener), &mut ()));
        let mut options = source::Options::default();
        checkpoint.apply_to(&mut options);
        let mut vm = CheckpointSource::new(&checkpoint).unwrap();
        let sent = Source::new(options).run(&mut vm, &connector, &mut ());
        let refused = receiver.join().unwrap().unwrap_err();
        assert!(refused.to_string().contains("x-ignore-shared"), "{refused}");
        assert!(sent.is_err());
    });
    assert!(!vm.calls().contains(&"start"), "{:?}", vm.calls());
}

/// Headers that lie: a place where there is none, and none where the capability is off.
#[test]
fn a_file_that_lies_about_where_its_memory_is_is_refused() {
    let dir = TempDir::new().unwrap();
    let checkpoint = devices_alone(&dir);
    let good = fs::read(checkpoint.path()).unwrap();
    let mut header = Vec::new();
    BlockHeader::elsewhere(PAGE).encode(&mut header);
    let at = good.windows(header.len()).position(|window| window == header).unwrap();
    let opened = |bytes: &[u8]| {
        let path = dir.join("lies");
        fs::write(&path, bytes).unwrap();
        Checkpoint::open(&path).err().unwrap().to_string()
    };
    for (field, value) in [(4, 8192u64), (12, at as u64 + 28), (20, 1 << 20)] {
        let mut bytes = good.clone();
        bytes[at + field..][..8].copy_from_slice(&value.to_be_bytes());
        let said = opened(&bytes);
        assert!(said.contains("at byte") || said.contains("ends in the middle"), "{field}: {said}");
    }
    for len in [at - 1, at + 5, at + 28, at + 40] {
        assert!(opened(&good[..len]).contains("ends in the middle"), "{len}");
    }
}
