//! The source against destinations that play a part: right ones, hostile ones, and ones that leave.

mod deaths;
mod recovery;
mod steered;

use std::{
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use multifd_proto::{
    BlockName, Codec, DecodeError, ProtocolError, Step, Violation,
    command::{Command, PostcopyAdvice},
    encoder::MainEncoder,
    mapped_ram::BlockHeader,
    postcopy::{DiscardRange, Package, PreemptDecoder, PreemptItem, received},
    ram::BlockEntry,
    return_path::Message,
    stream::{MAPPED_RAM, Section, SectionKind},
};
use test_support::{TempDir, time_limit};

use super::*;
use crate::{
    checkpoint::CheckpointError,
    testing::memory::{self, MemoryConnector, MemoryListener},
    transport::{Listen, Stream},
};

const LIMIT: Duration = Duration::from_secs(60);
const PAGE: usize = 4096;
/// Pages of each block, and those of them that have content.
const RAM: (u64, &[u64]) = (200, &[0, 1, 2, 3, 64, 65, 130, 199]);
const BIOS: (u64, &[u64]) = (3, &[1]);
const MACHINE: &str = "pc-i440fx-10.0";
/// What fits into each direction of a connection: less than all pages.
const ROOM: usize = 16 << 10;

fn name(text: &str) -> BlockName {
    BlockName::new(text).unwrap()
}

fn blocks() -> Vec<BlockEntry> {
    [("pc.ram", RAM.0), ("pc.bios", BIOS.0)]
        .map(|(block, pages)| BlockEntry::new(name(block), pages * PAGE as u64))
        .into()
}

/// The sections of all devices.
fn devices() -> Vec<u8> {
    let section = Section { kind: SectionKind::Full, id: 7, name: "cpu".to_owned(), instance: 0, version: 1 };
    let mut encoder = MainEncoder::default();
    encoder.section(&section).raw(b"registers").footer(7);
    encoder.bytes.clone()
}

/// What page `page` of block `block` holds.
fn content(block: usize, page: u64) -> Vec<u8> {
    vec![1 + block as u8 * 100 + (page % 100) as u8; PAGE]
}

/// Writes a checkpoint with the blocks above.
fn checkpoint(dir: &TempDir) -> PathBuf {
    let mut encoder = MainEncoder::default();
    let total: u64 = blocks().iter().map(|block| block.used_len).sum();
    encoder.header().configuration(MACHINE).config_capabilities(&[MAPPED_RAM]).ram_start(2, total);
    let mut file = encoder.bytes.clone();
    for (index, (entry, pages)) in blocks().into_iter().zip([RAM.1, BIOS.1]).enumerate() {
        let head = |header| {
            let entry = BlockEntry { mapped_ram: Some(header), ..entry.clone() };
            MainEncoder::default().block(&entry).bytes.clone()
        };
        let len = head(BlockHeader::place(0, entry.used_len, PAGE as u64)).len() as u64;
        let header = BlockHeader::place(file.len() as u64 + len, entry.used_len, PAGE as u64);
        file.extend(head(header));
        let mut bitmap = vec![0; (entry.used_len / PAGE as u64).div_ceil(64) as usize * 8];
        pages.iter().for_each(|&page| multifd_proto::mapped_ram::set(&mut bitmap, page as usize));
        file.resize(header.bitmap_offset as usize, 0);
        file.extend(bitmap);
        file.resize((header.pages_offset + entry.used_len) as usize, 0);
        for &page in pages {
            let at = header.pages_offset as usize + page as usize * PAGE;
            file[at..at + PAGE].copy_from_slice(&content(index, page));
        }
    }
    let mut encoder = MainEncoder::default();
    encoder.eos().footer(2).ram_part(2, true).eos().footer(2).raw(&devices()).eof();
    encoder.vm_description(
        br#"{"page_size":4096,"devices":[{"name":"cpu","instance_id":0,"version":1,"fields":[{"name":"data","type":"buffer","size":9}]}]}"#,
    );
    file.extend_from_slice(&encoder.bytes);
    let path = dir.join("checkpoint");
    fs::write(&path, file).unwrap();
    path
}

fn source(path: &Path, options: Options) -> Source {
    Source::new(&Checkpoint::open(path).unwrap(), options).unwrap()
}

/// As long as a test may take for the signs of a destination.
fn patient() -> Options {
    Options { set_up_limit: None, loading_limit: LIMIT, ..Options::default() }
}

fn preempt() -> Options {
    Options { preempt: true, ..Options::default() }
}

/// Everything before PART: what belongs before RUN, and all of it.
fn opening() -> (usize, Vec<u8>) {
    let mut encoder = MainEncoder::default();
    let advice = PostcopyAdvice { page_size_summary: 4096, page_size: 4096 };
    encoder.header().configuration(MACHINE);
    encoder
        .command(&Command::OpenReturnPath)
        .command(&Command::Ping(1))
        .command(&Command::PostcopyAdvise(Some(advice)));
    encoder.ram_start(2, blocks().iter().map(|block| block.used_len).sum());
    blocks().iter().for_each(|block| _ = encoder.block(block));
    encoder.eos().footer(2).command(&Command::SwitchoverStart);
    for block in blocks() {
        let ranges = vec![DiscardRange { start: 0, len: block.used_len }];
        encoder.command(&Command::PostcopyRamDiscard { block: block.name, ranges });
    }
    encoder.command(&Command::Ping(2));
    let mut bytes = encoder.bytes.clone();
    let before_run = bytes.len() + Package::encode(&devices(), &mut Vec::new());
    Package::encode(&devices(), &mut bytes);
    bytes.extend_from_slice(b"\x08\0\x02\0\x04\0\0\0\x04");
    (before_run, bytes)
}

/// One connection as a destination sees it.
struct Incoming {
    stream: Box<dyn Stream>,
    words: PreemptDecoder,
    /// Pages by block and number, in order of their arrival; with content or not.
    pages: Vec<(usize, u64, bool)>,
}

impl Incoming {
    fn accept(listener: &mut MemoryListener) -> Incoming {
        Incoming {
            stream: listener.accept(None).unwrap().establish(None).unwrap(),
            words: PreemptDecoder::default(),
            pages: Vec::new(),
        }
    }

    fn take(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    fn expect(&mut self, bytes: &[u8]) {
        assert_eq!(self.take(bytes.len()), bytes);
    }

    fn say(&mut self, message: &Message) {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        self.say_bytes(&bytes);
    }

    fn say_bytes(&mut self, bytes: &[u8]) {
        // A source that has ended before takes nothing; how it ended is what tests ask for.
        let _ = self.stream.write(bytes, &[]);
    }

    /// Reads everything before the pages, and loads the devices.
    fn load(&mut self) {
        self.say(&Message::Pong(1));
        let (before_run, opening) = opening();
        self.expect(&opening[..before_run]);
        self.say(&Message::Pong(2));
        self.expect(&opening[before_run..]);
        self.say(&Message::Pong(4));
        self.say(&Message::Pong(3));
    }

    /// The same, but for the sign that the devices are loaded: a request is one as well.
    fn load_until_asked(&mut self) {
        self.say(&Message::Pong(2));
        self.expect(&opening().1);
    }

    fn ask(&mut self, block: &str, page: u64) {
        self.say(&Message::ReqPagesId { start: page * 4096, len: 4096, block: name(block) });
    }

    /// The next word; `false` at the end.
    fn word(&mut self) -> bool {
        let mut bytes = Vec::new();
        loop {
            match self.words.step(&bytes, &blocks(), PAGE).unwrap() {
                Step::Need(total) => {
                    let more = self.take(total - bytes.len());
                    bytes.extend(more);
                }
                Step::Item { item, used } => {
                    assert_eq!(used, bytes.len());
                    return self.item(item);
                }
            }
        }
    }

    fn item(&mut self, item: PreemptItem) -> bool {
        match item {
            PreemptItem::End => return false,
            PreemptItem::Zero { block, offset } => {
                assert!(![RAM.1, BIOS.1][block].contains(&(offset / 4096)), "page {offset:#x} has content");
                self.pages.push((block, offset / 4096, false));
            }
            PreemptItem::Page { block, offset } => {
                let page = offset / 4096;
                assert!(self.take(PAGE) == content(block, page), "page {page} of block {block}");
                self.pages.push((block, page, true));
            }
        }
        true
    }

    /// Reads all pages to the end of the stream.
    fn pages(&mut self) {
        self.expect(b"\x02\0\0\0\x02");
        while self.word() {}
        self.expect(b"\x7e\0\0\0\x02\x03\0\0\0\x02\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02\0");
    }
}

/// Every page there is, each once.
fn assert_all_pages(mut pages: Vec<(usize, u64, bool)>) {
    pages.sort_unstable();
    let all = [RAM, BIOS].into_iter().enumerate();
    let all = all.flat_map(|(block, (pages, with))| (0..pages).map(move |page| (block, page, with.contains(&page))));
    assert_eq!(pages, all.collect::<Vec<_>>());
}

/// Runs `destination` against a source that hands its VM over. Returns how that went.
fn hands_over(mut source: Source, destination: impl FnOnce(&mut MemoryListener) + Send) -> (Source, Result<(), Error>) {
    time_limit(LIMIT, || {
        let (mut listener, connector) = memory::listener(ROOM);
        let outcome = run_beside(|| source.hand_over(&connector, &mut || Ok(())), || destination(&mut listener));
        (source, outcome)
    })
}

fn run_beside<T>(run: impl FnOnce() -> T, beside: impl FnOnce() + Send) -> T {
    thread::scope(|scope| {
        let thread = scope.spawn(beside);
        let result = run();
        thread.join().unwrap();
        result
    })
}

/// The reason of an outcome in which the VM is at the destination.
fn incomplete((source, outcome): (Source, Result<(), Error>)) -> Error {
    assert_eq!(source.vm(), Whereabouts::There);
    match outcome {
        // Whether all of it was on its way is a matter of buffers.
        Err(Error::Incomplete { reason, .. } | Error::Unacknowledged { reason }) => *reason,
        other => panic!("{other:?}"),
    }
}

fn violation(error: Error) -> Violation {
    match error {
        Error::Protocol { source: ProtocolError::Violation(violation), .. } => violation,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_vm_is_handed_over_and_every_page_comes_once() {
    let dir = TempDir::new().unwrap();
    let options = Options { record_faults: true, ..patient() };
    let (source, outcome) = hands_over(source(&checkpoint(&dir), options), |listener| {
        let mut main = Incoming::accept(listener);
        main.load_until_asked();
        main.ask("pc.bios", 1);
        main.ask("pc.ram", 150);
        main.pages();
        main.say(&Message::Shut(0));
        assert_all_pages(main.pages);
    });
    outcome.unwrap();
    assert_eq!(source.vm(), Whereabouts::Complete);
    let report = source.report();
    assert_eq!((report.requests, report.left), (2, 0));
    // The first is a sign that the devices are loaded. The second may have been named with the others before it was asked for.
    assert!((1..=2).contains(&report.urgent_pages), "{report:?}");
    assert_eq!(report.zero_pages, RAM.0 + BIOS.0 - (RAM.1.len() + BIOS.1.len()) as u64);
    let faults: Vec<String> = source.faults().iter().map(PageAddress::to_string).collect();
    assert_eq!(faults, ["0x1000 pc.bios", "0x96000 pc.ram"]);
}

/// The VM had been handed over whole, and `hand_over` did not say so but panicked.
#[test]
fn an_observer_that_panics_in_the_end_does_not_change_it() {
    struct PanicsWhenDone;
    impl Observer for PanicsWhenDone {
        fn event(&mut self, event: &Event) {
            assert!(!matches!(event, Event::Phase(Phase::Done)), "told to panic");
        }
    }
    let dir = TempDir::new().unwrap();
    let mut observed = source(&checkpoint(&dir), patient());
    observed.observe(PanicsWhenDone);
    let (source, outcome) = hands_over(observed, |listener| {
        let mut main = Incoming::accept(listener);
        main.load_until_asked();
        main.ask("pc.bios", 1);
        main.pages();
        main.say(&Message::Shut(0));
    });
    outcome.unwrap();
    assert_eq!(source.vm(), Whereabouts::Complete);
}

#[test]
fn what_is_asked_for_comes_next_and_the_background_goes_on_from_there() {
    let dir = TempDir::new().unwrap();
    hands_over(source(&checkpoint(&dir), patient()), |listener| {
        let mut main = Incoming::accept(listener);
        // Before the devices are loaded nothing comes by itself.
        main.load_until_asked();
        main.ask("pc.ram", 64);
        main.expect(b"\x02\0\0\0\x02");
        assert!(main.word());
        assert_eq!(main.pages, [(0, 64, true)]);
        while main.word() {}
        assert_eq!(main.pages[1], (0, 65, true), "{:?}", &main.pages[..5]);
        main.expect(b"\x7e\0\0\0\x02\x03\0\0\0\x02\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02\0");
        main.say(&Message::Shut(0));
        assert_all_pages(main.pages);
    })
    .1
    .unwrap();
}

#[test]
fn pages_that_are_asked_for_come_on_the_preempt_connection_and_each_comes_once() {
    let dir = TempDir::new().unwrap();
    let (source, outcome) = hands_over(source(&checkpoint(&dir), preempt()), |listener| {
        let mut main = Incoming::accept(listener);
        let mut urgent = Incoming::accept(listener);
        main.load();
        main.ask("pc.ram", 199);
        main.ask("pc.ram", 7);
        thread::scope(|scope| {
            scope.spawn(|| while urgent.word() {});
            main.pages();
        });
        main.say(&Message::Shut(0));
        main.pages.extend(urgent.pages);
        assert_all_pages(main.pages);
    });
    outcome.unwrap();
    assert!(source.report().preempt_bytes >= 8);
}

#[test]
fn pages_that_are_listed_come_first() {
    let pages = ["0x41000 pc.ram", "0x1000 pc.bios", "0x2000 pc.ram", "0x5000 pc.ram", "0x0 vga"];
    for when in [Prefetch::BeforeRun, Prefetch::AfterRun] {
        let dir = TempDir::new().unwrap();
        let prefetch = pages.iter().map(|page| page.parse().unwrap()).collect();
        let options = Options { prefetch, prefetch_when: when, ..Options::default() };
        let (source, outcome) = hands_over(source(&checkpoint(&dir), options), |listener| {
            let mut main = Incoming::accept(listener);
            let listed = [(0, 65, true), (1, 1, true), (0, 2, true)];
            if when == Prefetch::AfterRun {
                main.load();
                main.pages();
                assert_eq!(main.pages[..3], listed);
            } else {
                main.say(&Message::Pong(2));
                // Up to the end of the block list nothing changes.
                let switchover = b"\x08\0\x0b\0\0";
                let opening = opening().1;
                let at = opening.windows(5).position(|bytes| bytes == switchover).unwrap();
                main.expect(&opening[..at]);
                main.expect(b"\x02\0\0\0\x02");
                while main.word() {}
                assert_eq!(main.pages, listed);
                main.expect(b"\x7e\0\0\0\x02");
                main.expect(switchover);
                // What was sent is not discarded.
                let command = |block: &str, ranges: &[(u64, u64)]| {
                    let ranges =
                        ranges.iter().map(|&(page, pages)| DiscardRange { start: page * 4096, len: pages * 4096 });
                    let ranges = ranges.collect();
                    let mut encoder = MainEncoder::default();
                    encoder.command(&Command::PostcopyRamDiscard { block: name(block), ranges });
                    encoder.bytes.clone()
                };
                main.expect(&command("pc.ram", &[(0, 2), (3, 62), (66, 134)]));
                main.expect(&command("pc.bios", &[(0, 1), (2, 1)]));
                let ping = opening.windows(9).position(|bytes| bytes == b"\x08\0\x02\0\x04\0\0\0\x02").unwrap();
                main.expect(&opening[ping..]);
                main.say(&Message::Pong(3));
                main.words = {
                    // The block of the word before is the same across sections.
                    let mut words = PreemptDecoder::default();
                    words.step(b"\0\0\0\0\0\0\0\x02\x06pc.ram\0", &blocks(), PAGE).unwrap();
                    words
                };
                main.pages();
            }
            main.say(&Message::Shut(0));
            assert_all_pages(main.pages);
        });
        outcome.unwrap();
        assert_eq!(source.report().prefetched_pages, 3);
    }
}

/// What a destination may not say once the guest runs. The VM stays where it is, and can go on.
#[test]
fn a_destination_that_breaks_a_rule_ends_the_attempt() {
    let ask = |start, len, block: &str| Message::ReqPagesId { start, len, block: name(block) };
    let bad = |start, len| Violation::BadRequest { block: name("pc.bios"), start, len, block_len: 0x3000 };
    let unexpected = |element, place| Violation::UnexpectedElement { element, place };
    let cases = [
        (ask(0, 0x1000, "vga.vram"), Violation::UnknownBlock { name: name("vga.vram") }),
        (ask(0x800, 0x1000, "pc.bios"), bad(0x800, 0x1000)),
        (ask(0x3000, 0x1000, "pc.bios"), bad(0x3000, 0x1000)),
        (ask(0x2000, 0x2000, "pc.bios"), bad(0x2000, 0x2000)),
        (ask(0, 0, "pc.bios"), bad(0, 0)),
        (Message::ReqPages { start: 0, len: 0x1000 }, Violation::FirstRequestWithoutBlock { start: 0 }),
        (Message::Shut(0), unexpected("SHUT with status 0", "before the end of the stream")),
        (Message::ResumeAck(2), unexpected("RESUME_ACK", "with another value than 1")),
        (
            Message::RecvBitmap { block: name("pc.ram") },
            unexpected("RECV_BITMAP", "that was not asked for, or in another order"),
        ),
    ];
    for (message, rule) in cases {
        let (dir, mut held) = (TempDir::new().unwrap(), None);
        let handed = hands_over(source(&checkpoint(&dir), Options::default()), |listener| {
            let mut main = Incoming::accept(listener);
            main.load();
            main.say(&message);
            // Not read, and not closed before the source has ended: it cannot send more than the connection holds.
            held = Some(main);
        });
        assert_eq!(violation(incomplete(handed)), rule);
    }
}

/// A destination that asks and takes nothing. How many it has to ask for before none is answered any more is up to the
/// threads, so the inbox is asked.
#[test]
fn requests_without_end_are_refused() {
    let inbox = inbox::Inbox::default();
    let urgent = inbox::Urgent { pages: 150..151, asked: std::time::Instant::now() };
    for _ in 0..inbox::MAX_OPEN {
        inbox.ask(urgent.clone()).unwrap();
    }
    assert_eq!(inbox.ask(urgent.clone()), Err(Violation::TooManyRequests { limit: inbox::MAX_OPEN }));
    inbox.take().unwrap();
    inbox.ask(urgent).unwrap();
}

#[test]
fn before_run_an_error_leaves_the_vm_in_the_checkpoint() {
    type Destination = fn(&mut Incoming);
    let cases: [(Destination, &str); 4] = [
        (|_| {}, "closed the connection"),
        (|main| main.say(&Message::Shut(1)), "status 1"),
        (|main| main.ask("pc.ram", 0), "a request for pages before RUN"),
        (|main| main.say_bytes(b"HTTP/1.1 400"), "return-path message type"),
    ];
    for (destination, what) in cases {
        let dir = TempDir::new().unwrap();
        let (source, outcome) = hands_over(source(&checkpoint(&dir), Options::default()), |listener| {
            let mut main = Incoming::accept(listener);
            let before_run = opening().0;
            main.take(before_run);
            destination(&mut main);
        });
        let error = outcome.unwrap_err();
        assert!(error.to_string().contains(what), "{error}");
        assert!(!matches!(error, Error::Incomplete { .. } | Error::InDoubt { .. }), "{error:?}");
        assert_eq!(source.vm(), Whereabouts::Here);
    }
}

#[test]
fn a_vm_whose_note_fails_is_not_handed_over() {
    let dir = TempDir::new().unwrap();
    let mut source = source(&checkpoint(&dir), Options::default());
    let (mut listener, connector) = memory::listener(ROOM);
    let error = time_limit(LIMIT, || {
        run_beside(
            || source.hand_over(&connector, &mut || Err(VmError::from("no space left on device"))).unwrap_err(),
            || {
                let mut main = Incoming::accept(&mut listener);
                main.take(opening().0);
                main.say(&Message::Pong(2));
                assert_eq!(main.stream.read(&mut [0; 8]).unwrap_or(0), 0, "RUN was sent");
            },
        )
    });
    assert!(error.to_string().contains("no space left"), "{error}");
    assert_eq!(source.vm(), Whereabouts::Here);
}

#[test]
fn a_destination_that_leaves_before_it_said_that_it_loaded_the_devices_leaves_doubt() {
    let dir = TempDir::new().unwrap();
    let (source, outcome) = hands_over(source(&checkpoint(&dir), Options::default()), |listener| {
        let mut main = Incoming::accept(listener);
        main.say(&Message::Pong(2));
        main.expect(&opening().1);
    });
    assert!(matches!(outcome, Err(Error::InDoubt { .. })), "{outcome:?}");
    assert_eq!(source.vm(), Whereabouts::InDoubt);
}

#[test]
fn a_destination_that_leaves_later_has_it() {
    let dir = TempDir::new().unwrap();
    let handed = hands_over(source(&checkpoint(&dir), Options::default()), |listener| {
        let mut main = Incoming::accept(listener);
        main.load();
    });
    incomplete(handed);
    // A page that is asked for is as good a sign.
    let handed = hands_over(source(&checkpoint(&dir), Options::default()), |listener| {
        let mut main = Incoming::accept(listener);
        main.say(&Message::Pong(2));
        main.expect(&opening().1);
        main.ask("pc.ram", 0);
        main.take(5 + 8);
    });
    incomplete(handed);
}

#[test]
fn a_destination_that_takes_nothing_is_given_up_and_so_is_one_that_only_asks() {
    for asks in [false, true] {
        let (dir, mut held) = (TempDir::new().unwrap(), None);
        let options = Options { stall_limit: Some(Duration::from_millis(400)), ..Options::default() };
        let handed = hands_over(source(&checkpoint(&dir), options), |listener| {
            let mut main = Incoming::accept(listener);
            main.load();
            if asks {
                let mut bytes = Vec::new();
                Message::ReqPagesId { start: 0, len: 4096, block: name("pc.ram") }.encode(&mut bytes);
                while main.stream.write(&bytes, &[]).is_ok() {
                    thread::sleep(Duration::from_millis(1));
                }
            }
            // It reads nothing, and is there until the source has given it up.
            held = Some(main);
        });
        let reason = incomplete(handed);
        assert!(matches!(reason, Error::Stalled { .. }), "{reason:?}");
    }
}

#[test]
fn a_cancel_ends_every_wait() {
    let dir = TempDir::new().unwrap();
    let source = source(&checkpoint(&dir), Options { stall_limit: None, ..Options::default() });
    let stop = source.stop_handle();
    let handed = hands_over(source, |listener| {
        let mut main = Incoming::accept(listener);
        main.load();
        main.take(5);
        stop.cancel();
        while main.stream.read(&mut [0; 4096]).is_ok_and(|n| n > 0) {}
    });
    let reason = incomplete(handed);
    assert!(matches!(reason, Error::Cancelled), "{reason:?}");
}

#[test]
fn a_file_that_becomes_shorter_is_an_error_and_no_signal() {
    let dir = TempDir::new().unwrap();
    let path = checkpoint(&dir);
    let handed = hands_over(source(&path, Options::default()), |listener| {
        let mut main = Incoming::accept(listener);
        main.say(&Message::Pong(2));
        main.expect(&opening().1);
        fs::File::options().write(true).open(&path).unwrap().set_len(2 << 20).unwrap();
        main.say(&Message::Pong(3));
        while main.stream.read(&mut [0; 4096]).is_ok_and(|n| n > 0) {}
    });
    let reason = incomplete(handed);
    assert!(matches!(reason, Error::Checkpoint(CheckpointError::Changed { .. })), "{reason:?}");
}

#[test]
fn a_file_that_is_written_to_is_not_handed_over() {
    let dir = TempDir::new().unwrap();
    let path = checkpoint(&dir);
    let opened = Checkpoint::open(&path).unwrap();
    let writer = fs::File::options().append(true).open(&path).unwrap();
    let Err(error) = Source::new(&opened, Options::default()) else { panic!("it is open for writing") };
    if !matches!(error, Error::Checkpoint(CheckpointError::BeingWritten { .. })) {
        return test_support::skip("this file system has no leases");
    }
    drop(writer);
    Source::new(&opened, Options::default()).unwrap();
}

/// What a source asks at the beginning of a recovery.
fn recovery() -> Vec<u8> {
    let mut encoder = MainEncoder::default();
    blocks().into_iter().for_each(|block| _ = encoder.command(&Command::RecvBitmap { block: block.name }));
    encoder.bytes.clone()
}

fn say_received(main: &mut Incoming, block: &str, pages: u64, received: &[u64]) {
    main.say(&Message::RecvBitmap { block: name(block) });
    let mut bytes = Vec::new();
    received::encode(pages, received.iter().copied(), &mut bytes);
    main.say_bytes(&bytes);
}

fn recovers(mut source: Source, destination: impl FnOnce(&mut MemoryListener) + Send) -> (Source, Result<(), Error>) {
    time_limit(LIMIT, || {
        let (mut listener, connector) = memory::listener(ROOM);
        let outcome = run_beside(|| source.recover(&connector), || destination(&mut listener));
        (source, outcome)
    })
}

/// Writes a checkpoint of one block of `bytes` of which its first page has content, and the file as little.
fn sparse_checkpoint(dir: &TempDir, bytes: u64) -> PathBuf {
    let entry = BlockEntry::new(name("pc.ram"), bytes);
    let mut encoder = MainEncoder::default();
    encoder.header().configuration(MACHINE).config_capabilities(&[MAPPED_RAM]).ram_start(2, bytes);
    let head = |header| {
        let entry = BlockEntry { mapped_ram: Some(header), ..entry.clone() };
        MainEncoder::default().block(&entry).bytes.clone()
    };
    let begin = encoder.bytes.len() + head(BlockHeader::place(0, bytes, PAGE as u64)).len();
    let header = BlockHeader::place(begin as u64, bytes, PAGE as u64);
    encoder.raw(&head(header));
    let path = dir.join("sparse");
    fs::write(&path, &encoder.bytes).unwrap();
    let file = fs::File::options().write(true).open(&path).unwrap();
    file.write_all_at(&[1], header.bitmap_offset).unwrap();
    file.write_all_at(&content(0, 0), header.pages_offset).unwrap();
    let mut encoder = MainEncoder::default();
    encoder.eos().footer(2).ram_part(2, true).eos().footer(2).raw(&devices()).eof();
    encoder.vm_description(
        br#"{"page_size":4096,"devices":[{"name":"cpu","instance_id":0,"version":1,"fields":[{"name":"data","type":"buffer","size":9}]}]}"#,
    );
    file.write_all_at(&encoder.bytes, header.pages_offset + bytes).unwrap();
    path
}

/// A guest runs as soon with 64 GiB as with 1 MiB: what is sent before RUN is as long, and there are no pages in it.
#[test]
fn what_comes_before_run_does_not_grow_with_memory() {
    let before_run = |bytes: u64| {
        let (dir, mut sent) = (TempDir::new().unwrap(), Vec::new());
        let handed = hands_over(source(&sparse_checkpoint(&dir, bytes), patient()), |listener| {
            let mut main = Incoming::accept(listener);
            main.say(&Message::Pong(2));
            let run = b"\x08\0\x05\0\0";
            while !sent.ends_with(run) {
                sent.extend(main.take(1));
            }
            main.say(&Message::Pong(3));
            // The only page with content comes after it.
            main.expect(b"\x08\0\x02\0\x04\0\0\0\x04\x02\0\0\0\x02");
            assert!(main.word());
        });
        incomplete(handed);
        sent.len()
    };
    let small = before_run(1 << 20);
    assert!(small < 1024, "{small}");
    assert_eq!(before_run(64 << 30), small);
}
