//! Checkpoints written from whole migrations, read and sent again; and files that lie.

use std::{fs, io::Read, os::unix::fs::FileExt, path::Path, time::Duration};

use multifd_proto::{
    BlockName,
    encoder::MainEncoder,
    machine::{Dialect, ZeroPages},
    mapped_ram::BlockHeader,
    ram::BlockEntry,
    stream::{Section, SectionKind},
    vmdesc::{OpaqueSection, VmDescription},
};
use test_support::TempDir;

use super::{Checkpoint, CheckpointError, CheckpointSource, Writer};
use crate::{
    destination::{self, Destination},
    error::Error,
    ram::Ram,
    source::{self, Source},
    testing::memory,
    testing::vm::{TestDestination, TestSource},
    transport::Connect,
    vm::SourceVm,
};

pub(super) const BLOCKS: [(&str, usize); 3] = [("pc.ram", 700), ("rom", 1), ("vga", 130)];

/// Memory of which every third page is zeros.
pub(super) fn filled() -> Ram {
    let ram = Ram::for_test(&BLOCKS);
    for block in ram.layout().blocks() {
        for page in block.page_range().filter(|page| page % 3 != 0) {
            ram.page(page).unwrap().write(&(page + 1).to_ne_bytes().repeat(4096 / 8));
        }
    }
    ram
}

/// Migrates `vm` into the file `path`.
pub(super) fn receive(
    vm: &mut dyn SourceVm,
    path: &Path,
    options: source::Options,
) -> (Result<source::Report, Error>, Result<destination::Report, Error>) {
    let (listener, connector) = memory::listener(100_000);
    let path = path.to_owned();
    let receiver = std::thread::spawn(move || {
        let mut writer = Writer::create(&path, false)?;
        let options = destination::Options::default();
        let report = writer.receive(Destination::new(options), Box::new(listener), &mut ());
        assert_eq!(writer.is_published(), report.is_ok());
        report
    });
    let sent = Source::new(options).run(vm, &connector, &mut ());
    (sent, receiver.join().unwrap())
}

pub(super) fn contents(checkpoint: &Checkpoint, block: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    checkpoint.block_reader(block).read_to_end(&mut bytes).unwrap();
    bytes
}

pub(super) fn memory_of(ram: &Ram, block: usize) -> Vec<u8> {
    ram.layout().blocks()[block].page_range().flat_map(|page| ram.page_bytes(page)).collect()
}

#[test]
fn a_checkpoint_holds_the_memory_and_state_of_a_guest_that_was_writing() {
    for zero_pages in [ZeroPages::Multifd, ZeroPages::Legacy, ZeroPages::None] {
        for dialect in [Dialect::PerRound, Dialect::PerSection] {
            let dir = TempDir::new().unwrap();
            let path = dir.join("checkpoint");
            let mut vm = TestSource::new(filled());
            // Some pages become zeros after they had content, and the other way round.
            vm.at_drain = Box::new(|writer| {
                for page in 0..40 {
                    writer.write(page * 7, if page % 2 == 0 { 0 } else { page });
                }
            });
            let mut options = source::Options::default();
            options.qemu.zero_pages = zero_pages;
            options.qemu.dialect = dialect;
            options.qemu.machine = "pc-i440fx-10.0".to_owned();
            options.qemu.uuid = [7; 16];
            let (sent, received) = receive(&mut vm, &path, options);
            sent.unwrap();
            received.unwrap();

            let checkpoint = Checkpoint::open(&path).unwrap();
            assert_eq!(checkpoint.machine(), "pc-i440fx-10.0");
            assert_eq!(checkpoint.capabilities(), ["mapped-ram"]);
            assert_eq!(checkpoint.uuid(), Some([7; 16]));
            let ram = vm.writer_ram();
            for (index, block) in ram.layout().blocks().iter().enumerate() {
                assert!(contents(&checkpoint, index) == memory_of(&ram, index), "{}", block.name());
                let content = block.page_range().filter(|&page| !ram.page(page).unwrap().is_zero()).count() as u64;
                assert_eq!(checkpoint.blocks()[index].pages_present, content, "zero pages are holes");
                assert_eq!(checkpoint.blocks()[index].pages_offset % (1 << 20), 0);
            }

            // And again, as often as one likes.
            for _ in 0..2 {
                let mut to = TestDestination::new(Ram::for_test(&BLOCKS).not_fresh());
                let (listener, connector) = memory::listener(100_000);
                std::thread::scope(|scope| {
                    let to = &mut to;
                    let receiver =
                        scope.spawn(move || Destination::new(Default::default()).run(to, Box::new(listener), &mut ()));
                    let mut options = source::Options::default();
                    options.qemu.zero_pages = zero_pages;
                    options.qemu.dialect = dialect;
                    checkpoint.apply_to(&mut options);
                    let mut vm = CheckpointSource::new(&checkpoint).unwrap();
                    Source::new(options).run(&mut vm, &connector, &mut ()).unwrap();
                    let report = receiver.join().unwrap().unwrap();
                    assert_eq!(report.uuid, Some([7; 16]));
                });
                assert_eq!(to.calls(), ["prepare", "load", "load", "start"]);
                for index in 0..BLOCKS.len() {
                    assert!(memory_of(&to.ram, index) == memory_of(&ram, index));
                }
            }
        }
    }
}

#[test]
fn a_failed_migration_leaves_no_file_and_the_guest_running() {
    for fail_at in 0.. {
        let dir = TempDir::new().unwrap();
        let path = dir.join("checkpoint");
        let mut vm = TestSource::new(filled());
        vm.fail_at = Some(fail_at);
        let (sent, received) = receive(&mut vm, &path, Default::default());
        if sent.is_ok() {
            received.unwrap();
            assert!(fail_at > 4, "only {fail_at} calls may fail");
            break;
        }
        assert!(received.is_err());
        assert!(vm.writer.is_running());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}

#[test]
fn a_name_that_was_taken_meanwhile_fails_the_migration_and_the_guest_runs_on() {
    let dir = TempDir::new().unwrap();
    let path = dir.join("checkpoint");
    let mut vm = TestSource::new(filled());
    let theirs = path.clone();
    vm.at_drain = Box::new(move |_| fs::write(&theirs, "theirs").unwrap());
    let (sent, received) = receive(&mut vm, &path, Default::default());
    assert!(matches!(sent, Err(Error::Refused { status: 1, .. })), "{sent:?}");
    assert!(matches!(received, Err(Error::Checkpoint(CheckpointError::Exists { .. }))), "{received:?}");
    assert!(vm.writer.is_running());
    assert_eq!(fs::read(&path).unwrap(), b"theirs");
}

/// A checkpoint of [`filled`].
fn written(dir: &TempDir) -> std::path::PathBuf {
    let path = dir.join("checkpoint");
    let (sent, received) = receive(&mut TestSource::new(filled()), &path, Default::default());
    sent.unwrap();
    received.unwrap();
    path
}

#[test]
fn a_file_that_ends_early_is_refused_wherever_it_ends() {
    let dir = TempDir::new().unwrap();
    let path = written(&dir);
    let file = fs::File::options().write(true).open(&path).unwrap();
    let len = file.metadata().unwrap().len();
    let mut cuts: Vec<u64> = (0..200).chain((200..len).step_by(77_777)).chain(len - 300..len).collect();
    // What is left without the description is a whole stream: some machines send none.
    let description = Checkpoint::open(&path).unwrap().vmdescription().len() as u64;
    cuts.retain(|&cut| cut != len - description - 5);
    cuts.reverse();
    for cut in cuts {
        file.set_len(cut).unwrap();
        let error = Checkpoint::open(&path).err().unwrap_or_else(|| panic!("cut at {cut} of {len}"));
        assert!(Error::from(error).is_peers_fault(), "cut at {cut}");
    }
}

#[test]
fn a_file_with_any_wrong_byte_is_refused_or_read_within_its_bounds() {
    let dir = TempDir::new().unwrap();
    let path = written(&dir);
    let file = fs::File::options().read(true).write(true).open(&path).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    // Everything but pages: the beginning with the first bitmap, and the entries behind each block.
    let mut places: Vec<u64> = (0..300).collect();
    for block in checkpoint.blocks() {
        let end = block.pages_offset + block.bytes;
        places.extend(end..end + 120);
    }
    drop(checkpoint);
    let (mut refused, mut read) = (0, 0);
    for at in places {
        let mut byte = [0];
        if file.read_at(&mut byte, at).unwrap() == 0 {
            continue;
        }
        for wrong in [byte[0] ^ 1, byte[0] ^ 0x80, 0xff] {
            file.write_all_at(&[wrong], at).unwrap();
            match Checkpoint::open(&path) {
                Err(_) => refused += 1,
                Ok(checkpoint) => {
                    read += 1;
                    let blocks = checkpoint.blocks().len();
                    assert!((0..blocks).all(|index| {
                        contents(&checkpoint, index).len() as u64 == checkpoint.blocks()[index].bytes
                    }));
                    CheckpointSource::new(&checkpoint).unwrap();
                }
            }
        }
        file.write_all_at(&byte, at).unwrap();
    }
    assert!(refused > 300 && read > 100, "{refused} refused, {read} read");
    Checkpoint::open(&path).unwrap();
}

#[test]
fn what_is_no_checkpoint_is_named() {
    let dir = TempDir::new().unwrap();
    let path = dir.join("x");
    for (bytes, message) in [
        (&b""[..], "is empty"),
        (b"QEVM\0\0", "ends in the middle, at byte 6"),
        (b"\x1f\x8b\x08\0", "is compressed with gzip: `gunzip -c FILE` unpacks it"),
        (b"QEVM\0\0\0\x03\x01", "machine types before 2.4 (such as pc-i440fx-2.3) are not supported"),
        (b"GET / HTTP/1.1\r\n", "at byte 0: magic 0x47455420 instead of 0x5145564d"),
        (
            b"QEVM\0\0\0\x03\x07\0\0\0\x01x\x01\0\0\0\x01\x03ram\0\0\0\0\0\0\0\x04\0\0\0\0\0\0\x10\x04",
            "is a migration stream without the capability mapped-ram",
        ),
    ] {
        fs::write(&path, bytes).unwrap();
        let error = Checkpoint::open(&path).err().unwrap().to_string();
        assert!(error.ends_with(message), "{error}");
    }
    let error = Checkpoint::open(dir.path()).err().unwrap().to_string();
    assert!(error.ends_with("is a directory, where a file is expected"), "{error}");
}

#[test]
fn a_reader_passes_over_holes_without_reading_them() {
    let dir = TempDir::new().unwrap();
    let checkpoint = Checkpoint::open(&written(&dir)).unwrap();
    let mut reader = checkpoint.block_reader(0);
    let mut runs = Vec::new();
    while let (bytes @ 1.., zeros) = reader.run() {
        runs.push((bytes, zeros));
        reader.skip(bytes);
    }
    assert_eq!(runs[..4], [(4096, true), (8192, false), (4096, true), (8192, false)]);
    assert_eq!(runs.iter().map(|(bytes, _)| bytes).sum::<u64>(), 700 * 4096);
}

/// Main of a migration without channels, up to the sections that come before the pages.
fn begun(out: &mut MainEncoder) -> &mut MainEncoder {
    out.header().configuration("multifd").ram_start(1, 4096);
    out.block(&BlockEntry::new(BlockName::new("ram").unwrap(), 4096)).eos().footer(1)
}

fn full(id: u32, name: &str) -> Section {
    Section { kind: SectionKind::Full, id, name: name.to_owned(), instance: 0, version: 1 }
}

/// What becomes of a migration without channels whose source writes `parts` to main, one after the other.
fn receive_parts(parts: Vec<Vec<u8>>) -> (TempDir, Result<destination::Report, Error>) {
    let dir = TempDir::new().unwrap();
    let path = dir.join("checkpoint");
    let received = test_support::time_limit(Duration::from_secs(120), move || {
        let (listener, connector) = memory::listener(1 << 16);
        let source = std::thread::spawn(move || {
            let mut main = connector.connect().unwrap();
            // The destination ends the connection when it has had enough.
            let _ = parts.iter().try_for_each(|part| main.write(part, &[]));
            main
        });
        let mut writer = Writer::create(&path, false).unwrap();
        let report = writer.receive(Destination::new(Default::default()), Box::new(listener), &mut ());
        drop(source.join().unwrap());
        report
    });
    (dir, received)
}

/// Nothing but the vmdescription at the end says how long they are: 4.7 GB of them were kept in memory.
#[test]
fn early_sections_without_end_are_refused_at_a_limit_that_they_share() {
    let part = vec![0x5a; 1 << 20];
    let mut one = vec![begun(&mut MainEncoder::default()).section(&full(2, "early")).bytes.clone()];
    one.resize(100, part.clone());
    let mut many = vec![begun(&mut MainEncoder::default()).bytes.clone()];
    many.extend((0..100).map(|_| MainEncoder::default().section(&full(2, "early")).raw(&part).footer(2).bytes.clone()));
    for parts in [one, many] {
        let (dir, received) = receive_parts(parts);
        let error = received.unwrap_err();
        assert_eq!(error.to_string(), "more than 67108864 bytes of device state before the pages");
        assert!(error.is_peers_fault());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}

/// Its search went over all bytes again for each piece that was read: hours for a file that takes 8 KB on disk.
#[test]
fn a_file_with_an_early_section_without_end_is_refused_at_the_limit() {
    let dir = TempDir::new().unwrap();
    let path = dir.join("x");
    let mut out = MainEncoder::default();
    out.header().configuration("multifd").config_capabilities(&["mapped-ram"]).ram_start(1, 4096);
    let mut entry = BlockEntry::new(BlockName::new("ram").unwrap(), 4096);
    let header_end = (out.bytes.len() + 1 + 3 + 8 + BlockHeader::LEN) as u64;
    let header = BlockHeader::place(header_end, 4096, 4096);
    entry.mapped_ram = Some(header);
    out.block(&entry);
    let file = fs::File::create(&path).unwrap();
    file.write_all_at(&out.bytes, 0).unwrap();
    let mut out = MainEncoder::default();
    out.eos().footer(1).section(&full(2, "early"));
    file.write_all_at(&out.bytes, header.next_entry(4096)).unwrap();
    file.set_len(1 << 40).unwrap();
    let error = test_support::time_limit(Duration::from_secs(60), move || Checkpoint::open(&path).err().unwrap());
    assert!(matches!(error, CheckpointError::TooMuchEarlyState { .. }), "{error}");
}

/// Sends `checkpoint` to a VM. `meanwhile` happens when its source was made and has sent nothing.
fn send(checkpoint: &Checkpoint, meanwhile: impl FnOnce()) -> (Result<source::Report, Error>, Vec<&'static str>) {
    let mut to = TestDestination::new(Ram::for_test(&BLOCKS));
    let (listener, connector) = memory::listener(100_000);
    let mut options = source::Options::default();
    checkpoint.apply_to(&mut options);
    let mut vm = CheckpointSource::new(checkpoint).unwrap();
    meanwhile();
    let sent = std::thread::scope(|scope| {
        let to = &mut to;
        scope.spawn(move || drop(Destination::new(Default::default()).run(to, Box::new(listener), &mut ())));
        Source::new(options).run(&mut vm, &connector, &mut ())
    });
    (sent, to.calls())
}

/// Its pages were read from a mapping of the file, and the process ended with SIGBUS.
#[test]
fn a_checkpoint_that_is_cut_or_written_while_it_is_sent_ends_the_migration() {
    let dir = TempDir::new().unwrap();
    let path = written(&dir);
    let file = fs::File::options().write(true).open(&path).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let (sent, calls) = send(&checkpoint, || {});
    sent.unwrap();
    assert!(calls.contains(&"start"));
    let len = checkpoint.bytes();
    let begin = checkpoint.blocks()[0].pages_offset;
    let cases: [(&str, &dyn Fn()); 4] = [
        ("cut at its first page", &|| file.set_len(begin).unwrap()),
        ("cut inside a page", &|| file.set_len(begin + 4096 * 300 + 7).unwrap()),
        ("longer", &|| file.set_len(len + 1).unwrap()),
        ("written to", &|| {
            file.set_len(len).unwrap();
            file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
        }),
    ];
    for (case, change) in cases {
        let (sent, calls) = send(&checkpoint, change);
        let error = sent.unwrap_err().to_string();
        assert!(error.ends_with("was changed while it was read"), "{case}: {error}");
        assert!(!calls.contains(&"start"), "{case}");
    }
}

/// 8 TiB of guest memory that a peer claims took 8 GiB of ours.
#[test]
fn an_audit_of_more_memory_than_it_has_room_for_is_refused() {
    let mut out = MainEncoder::default();
    out.header().configuration("multifd").ram_start(1, 8 << 40);
    out.block(&BlockEntry::new(BlockName::new("ram").unwrap(), 8 << 40)).eos().footer(1);
    let dir = TempDir::new().unwrap();
    let (listener, connector) = memory::listener(1 << 16);
    let mut main = connector.connect().unwrap();
    main.write(&out.bytes, &[]).unwrap();
    let mut writer = Writer::create(&dir.join("checkpoint"), false).unwrap();
    let options = destination::Options { audit: true, ..Default::default() };
    let error = writer.receive(Destination::new(options), Box::new(listener), &mut ()).unwrap_err();
    assert!(error.to_string().starts_with("0x80000000000 bytes of RAM cannot be audited here"), "{error}");
}

/// The run of content was searched to its end again for each part that was read.
#[test]
fn a_long_run_of_content_is_told_in_parts() {
    let dir = TempDir::new().unwrap();
    let path = dir.join("checkpoint");
    let ram = Ram::for_test(&[("ram", 3000)]);
    for page in ram.layout().blocks()[0].page_range() {
        ram.page(page).unwrap().write(&[1; 4096]);
    }
    let (sent, received) = receive(&mut TestSource::new(ram), &path, Default::default());
    sent.unwrap();
    received.unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let mut reader = checkpoint.block_reader(0);
    let mut runs = Vec::new();
    while let (bytes @ 1.., false) = reader.run() {
        runs.push(bytes / 4096);
        reader.skip(bytes);
    }
    assert_eq!(runs, [1024, 1024, 952]);
    assert_eq!(contents(&checkpoint, 0), vec![1; 3000 * 4096]);
}

/// The kernel is told ahead of content alone, whatever lies between.
#[test]
fn a_reader_finds_the_content_that_is_ahead() {
    const PAGE: u64 = 4096;
    let dir = TempDir::new().unwrap();
    let checkpoint = Checkpoint::open(&written(&dir)).unwrap();
    for (block, pages) in [(0, 700), (2, 130)] {
        let first = checkpoint.layout().blocks()[block].page_range().start;
        let content = |page: u64| !(first + page).is_multiple_of(3);
        let reader = checkpoint.block_reader(block);
        for (from, to) in [(0, pages), (1, 2), (2, 3), (3, 4), (5, 5), (pages - 2, pages), (7, pages / 2)] {
            let mut told = Vec::new();
            let mut at = from * PAGE;
            while let Some(run) = reader.content_in(at..to * PAGE) {
                assert!(at <= run.start && run.start < run.end && run.end <= to * PAGE, "{run:?} in {from}..{to}");
                told.extend(run.start / PAGE..run.end / PAGE);
                at = run.end;
            }
            let expected: Vec<u64> = (from..to).filter(|&page| content(page)).collect();
            assert_eq!(told, expected, "pages {from} to {to} of block {block}");
        }
    }
    assert_eq!(contents(&checkpoint, 0), memory_of(&filled(), 0));
}

/// Sections before the RAM blocks were refused, and so was every section in parts.
#[test]
fn sections_beside_ram_keep_their_places() {
    let section = |kind, id, name: &str| Section { kind, ..full(id, name) };
    let encoded = |section: &Section, body: &[u8]| {
        let mut out = MainEncoder::default();
        out.section(section).raw(body).footer(section.id).bytes.clone()
    };
    let part = |kind, body: &[u8]| encoded(&section(kind, 4, "dirty-bitmap"), body);
    let before = encoded(&full(2, "before"), b"needed before the RAM blocks");
    let behind = encoded(&full(3, "behind"), b"needed before the pages");
    let start = part(SectionKind::Start, b"\x1c\x04disk\x03bm0\0\x01\0\0\x01\x01");
    let end = part(SectionKind::End, b"\x42\0\0\0\0\0\0\0\0\0\x02\0\0\x20\x01");
    let device = encoded(&full(5, "device"), b"state");

    let mut main = MainEncoder::default();
    main.header().configuration("multifd").raw(&before).ram_start(1, 4096);
    main.block(&BlockEntry::new(BlockName::new("ram").unwrap(), 4096)).eos().footer(1);
    let page = BlockName::new("ram").unwrap();
    main.raw(&behind)
        .raw(&start)
        .ram_part(1, true)
        .page(&page, 0)
        .raw(&[1; 4096])
        .eos()
        .footer(1)
        .raw(&end)
        .raw(&device)
        .eof();
    let described = [("before", 28), ("behind", 23), ("device", 5)].map(|(name, len)| OpaqueSection {
        name,
        instance: 0,
        version: 1,
        len,
    });
    main.vm_description(&VmDescription::opaque(4096, described).to_json());
    for pieces in [main.bytes.len(), 1] {
        let parts = main.bytes.chunks(pieces).map(<[u8]>::to_vec).collect();
        let (dir, received) = receive_parts(parts);
        received.unwrap();
        let checkpoint = Checkpoint::open(&dir.join("checkpoint")).unwrap();
        let kept = checkpoint.beside_ram();
        assert_eq!((kept.before_ram(), kept.behind_ram_start()), (&before[..], &behind[..]));
        assert_eq!(kept.in_parts(), [&start[..], &end].concat());
        assert_eq!(checkpoint.sections(), device);
    }
}

#[test]
fn a_section_in_parts_of_unknown_length_is_refused_by_name() {
    let block = Section { kind: SectionKind::Start, ..full(4, "block") };
    let parts = vec![begun(&mut MainEncoder::default()).section(&block).bytes.clone()];
    let (dir, received) = receive_parts(parts);
    let error = received.unwrap_err();
    assert!(error.is_peers_fault());
    assert!(error.to_string().contains("switch the capability block off"), "{error}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

/// Opening a FIFO waited for its other end.
#[test]
fn what_is_no_file_is_named_without_waiting_for_it() {
    let dir = TempDir::new().unwrap();
    let fifo = dir.join("fifo");
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RUSR).unwrap();
    let socket = dir.join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let error = |path: std::path::PathBuf| {
        test_support::time_limit(Duration::from_secs(20), move || Checkpoint::open(&path).err().unwrap())
    };
    let message = error(fifo).to_string();
    assert!(message.contains("is a FIFO, and a checkpoint is read in several places: `cat FIFO > FILE`"), "{message}");
    assert!(error("/dev/null".into()).to_string().contains("is a device"));
    assert!(matches!(error(socket), CheckpointError::Io { doing: "opening it", .. }));
}

#[test]
fn a_padded_checkpoint_is_described_as_one() {
    let dir = TempDir::new().unwrap();
    let path = written(&dir);
    let file = fs::File::options().write(true).open(&path).unwrap();
    let len = file.metadata().unwrap().len();
    for more in [1, 512, 100_000] {
        file.set_len(len + more).unwrap();
        let error = Checkpoint::open(&path).err().unwrap().to_string();
        let message = format!("a stream that ends at byte {len}, and {more} more bytes");
        assert!(error.contains(&message), "{error}");
    }
    file.set_len(len).unwrap();
    Checkpoint::open(&path).unwrap();
}
