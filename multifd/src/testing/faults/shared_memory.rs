//! Memory that is handed over: who may write it when, what ends the migration, and what a hostile source may hand over.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    time::Duration,
};

use multifd_proto::{
    Codec,
    command::Command,
    encoder::MainEncoder,
    extension::{Extension, Extensions, Offer},
    ram::BlockEntry,
    return_path::Message,
    shared_memory::{self, SharedBlock as Listed},
};
use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create, open};
use test_support::{TempDir, time_limit};

use super::script::{PAGE, Wire, block};
use crate::{
    destination::{self, Destination},
    error::{Error, Mismatch},
    ram::{Ram, RamBlock, SharedBlock},
    source::{self, Peer, Source},
    testing::{
        faulty::{Fault, Faults},
        memory,
        vm::TestSource,
    },
    transport::{
        Connect, Listen, RecvHalf,
        fd::FdConnector,
        socket::SocketStream,
        unix::{UnixConnector, listen},
    },
    vm::{DestinationVm, SectionId, SourceVm, VmError},
};

const LIMIT: Duration = Duration::from_secs(60);
const PAGES: u64 = 100;

/// What the guest has in `page`.
fn content(page: u64) -> Vec<u8> {
    (page * 3 + 1).to_ne_bytes().repeat(PAGE / 8)
}

/// What the destination writes to the first page when it starts.
const STARTED: [u8; PAGE] = [0xee; PAGE];

/// Memory of which `ram` is a memory file, and `rom` is as `rom` says.
fn memory_of(rom: fn(multifd_proto::BlockName, usize) -> io::Result<RamBlock>) -> Ram {
    let blocks = vec![
        RamBlock::memory_file(block("ram"), PAGES as usize * PAGE).unwrap(),
        rom(block("rom"), 64 * PAGE).unwrap(),
    ];
    let ram = Ram::new(PAGE, blocks).unwrap();
    for page in pages(&ram) {
        ram.page(page).unwrap().write(&content(page));
    }
    ram
}

fn pages(ram: &Ram) -> impl Iterator<Item = u64> + '_ {
    ram.layout().blocks().iter().flat_map(|block| block.page_range())
}

/// Asserts that `ram` holds what the guest has written, or also what a destination does that runs.
#[track_caller]
fn assert_unharmed(ram: &Ram, started: bool, context: &str) {
    for page in pages(ram) {
        let expected = if page == 0 && started { STARTED.to_vec() } else { content(page) };
        assert!(ram.page_bytes(page) == expected, "{context}: page {page}");
    }
}

/// A VM that takes what is handed over, and makes the rest.
#[derive(Default)]
struct Heir {
    taken: Vec<SharedBlock>,
    ram: Option<Ram>,
    calls: Vec<&'static str>,
    /// The call that fails.
    fails: Option<&'static str>,
    /// Makes other memory than it was given.
    ignores: bool,
    started: bool,
}

impl Heir {
    fn call(&mut self, name: &'static str) -> Result<(), VmError> {
        self.calls.push(name);
        if self.fails == Some(name) { Err(format!("told to fail at {name}").into()) } else { Ok(()) }
    }
}

impl DestinationVm for Heir {
    fn take_memory(&mut self, memory: Vec<SharedBlock>) -> Result<(), VmError> {
        self.call("take_memory")?;
        self.taken = memory;
        Ok(())
    }

    fn prepare(&mut self, _: &[u8]) -> Result<Vec<u8>, VmError> {
        self.call("prepare")?;
        let mut taken: Vec<_> = if self.ignores { Vec::new() } else { std::mem::take(&mut self.taken) };
        let mut blocks = Vec::new();
        for (name, pages) in [("ram", PAGES as usize), ("rom", 64)] {
            blocks.push(match taken.iter().position(|block| block.name() == name) {
                Some(index) => RamBlock::shared(taken.swap_remove(index))?,
                None => RamBlock::anonymous(block(name), pages * PAGE)?,
            });
        }
        self.ram = Some(Ram::new(PAGE, blocks)?);
        Ok(Vec::new())
    }

    fn ram(&self) -> &Ram {
        self.ram.as_ref().expect("prepared")
    }

    fn load(&mut self, section: &SectionId, input: &mut dyn Read) -> Result<(), VmError> {
        input.read_exact(&mut vec![0; if section.name == "cpu" { 14 } else { 0 }])?;
        self.call("load")
    }

    fn start(&mut self) -> Result<(), VmError> {
        self.call("start")?;
        self.ram().page(0).unwrap().write(&STARTED);
        self.started = true;
        Ok(())
    }

    fn abandon(&mut self) {
        self.calls.push("abandon");
    }
}

/// Whether the kernel may write to `page` for this process.
fn may_be_written(ram: &Ram, page: u64) -> bool {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(&ram.page_bytes(page)).unwrap();
    let outcome = SocketStream::new(OwnedFd::from(ours)).unwrap().read_pages(&[ram.page(page).unwrap()]);
    match outcome {
        Ok(()) => true,
        Err(error) if error.raw_os_error() == Some(libc::EFAULT) => false,
        Err(error) => panic!("{error}"),
    }
}

fn handing_over() -> source::Options {
    let mut options = source::Options::default();
    options.plan.hand_over = true;
    options.plan.channels = 1;
    options
}

/// Migrates `vm` to `to` over a unix socket whose connections have `faults` at the source.
fn migrate(
    vm: &mut dyn SourceVm,
    to: &mut (dyn DestinationVm + Send),
    options: source::Options,
    faults: &Faults,
) -> (Result<source::Report, Error>, Result<destination::Report, Error>) {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("s");
    let listener = listen(&path).unwrap();
    let connector = faults.connector(Box::new(UnixConnector::new(&path)));
    between(vm, to, options, Box::new(listener), &connector)
}

fn between(
    vm: &mut dyn SourceVm,
    to: &mut (dyn DestinationVm + Send),
    options: source::Options,
    listener: Box<dyn Listen>,
    connector: &dyn Connect,
) -> (Result<source::Report, Error>, Result<destination::Report, Error>) {
    time_limit(LIMIT, || {
        let destination = Destination::new(destination::Options::default());
        let stop = destination.stop_handle();
        std::thread::scope(|scope| {
            let receiving = scope.spawn(move || destination.run(to, listener, &mut ()));
            let sent = Source::new(options).run(vm, connector, &mut ());
            if sent.is_err() {
                stop.cancel();
            }
            (sent, receiving.join().unwrap())
        })
    })
}

#[test]
fn memory_that_is_handed_over_is_not_sent_and_is_the_destinations_when_it_starts() {
    let mut vm = TestSource::new(memory_of(RamBlock::memory_file));
    let mut to = Heir::default();
    let (sent, received) = migrate(&mut vm, &mut to, handing_over(), &Faults::new());
    let (sent, received) = (sent.unwrap(), received.unwrap());
    let bytes = (PAGES + 64) * PAGE as u64;
    assert_eq!((sent.handed_over, sent.normal + sent.zero + sent.skipped), (bytes, 0));
    assert_eq!((received.handed_over, received.normal + received.zero), (bytes, 0));
    assert_eq!(to.calls, ["take_memory", "prepare", "load", "load", "start"]);
    // No write to it is of interest, so none is tracked.
    assert_eq!(vm.calls(), ["describe", "agreed", "pause", "save"]);
    // It is one memory.
    assert_unharmed(&vm.writer_ram(), true, "at the source");
    assert_unharmed(to.ram(), true, "at the destination");
}

#[test]
fn other_memory_is_sent_beside_it() {
    let mut vm = TestSource::new(memory_of(RamBlock::anonymous));
    vm.at_drain = Box::new(|writer| {
        // Of what is reported only the pages of `rom` are sent.
        writer.report(5);
        let page = writer_page();
        writer.report(page);
    });
    let mut to = Heir::default();
    let (sent, received) = migrate(&mut vm, &mut to, handing_over(), &Faults::new());
    let sent = sent.unwrap();
    received.unwrap();
    assert_eq!(sent.handed_over, PAGES * PAGE as u64);
    assert!(sent.rounds.iter().all(|round| round.dirty_pages <= 64 && round.dirty_after <= 1), "{:?}", sent.rounds);
    assert_unharmed(to.ram(), true, "at the destination");
    to.ram().page(1).unwrap().clear();
    assert!(vm.writer_ram().page_bytes(1).iter().all(|byte| *byte == 0), "it is one memory");
    assert!(vm.writer_ram().page_bytes(writer_page()) == content(writer_page()), "and `rom` is a copy");
}

/// A page of `rom`.
fn writer_page() -> u64 {
    PAGES.next_multiple_of(64) + 3
}

/// A device that writes memory while it is loaded would have damaged a guest that goes on.
#[test]
fn the_destination_cannot_write_before_it_starts() {
    struct Curious(Heir, Vec<bool>);

    impl DestinationVm for Curious {
        fn take_memory(&mut self, memory: Vec<SharedBlock>) -> Result<(), VmError> {
            self.0.take_memory(memory)
        }

        fn prepare(&mut self, description: &[u8]) -> Result<Vec<u8>, VmError> {
            self.0.prepare(description)
        }

        fn ram(&self) -> &Ram {
            self.0.ram()
        }

        fn load(&mut self, section: &SectionId, input: &mut dyn Read) -> Result<(), VmError> {
            self.1.push(may_be_written(self.0.ram(), 7));
            self.1.push(may_be_written(self.0.ram(), writer_page()));
            self.0.load(section, input)
        }

        fn start(&mut self) -> Result<(), VmError> {
            self.1.push(may_be_written(self.0.ram(), 7));
            self.0.start()
        }
    }

    let mut vm = TestSource::new(memory_of(RamBlock::anonymous));
    let mut to = Curious(Heir::default(), Vec::new());
    let (sent, received) = migrate(&mut vm, &mut to, handing_over(), &Faults::new());
    sent.unwrap();
    received.unwrap();
    assert_eq!(to.1, [false, true, false, true, true], "`ram` is lent until the start, `rom` is not");
}

/// The memory has one owner at every moment, whatever breaks: the destination marks it when it starts.
#[test]
fn whatever_operation_breaks_the_memory_is_unharmed_with_the_side_that_runs_the_guest() {
    let operations = {
        let (faults, mut to) = (Faults::new(), Heir::default());
        let (sent, received) =
            migrate(&mut TestSource::new(memory_of(RamBlock::memory_file)), &mut to, handing_over(), &faults);
        sent.unwrap();
        received.unwrap();
        faults.operations()
    };
    assert!(operations > 10, "{operations}");
    for fault in [Fault::Cut, Fault::Fail(io::ErrorKind::Other), Fault::Shorten(3)] {
        // A few more: how often a connection is read is up to the threads.
        for operation in 0..operations + 3 {
            let context = format!("{fault:?} at {operation}");
            let (mut vm, mut to) = (TestSource::new(memory_of(RamBlock::memory_file)), Heir::default());
            let faults = Faults::new().at(operation, fault.clone());
            let (sent, received) = migrate(&mut vm, &mut to, handing_over(), &faults);
            assert_eq!(received.is_ok(), to.started, "{context}: {received:?}");
            match sent {
                Ok(_) => assert!(to.started, "{context}"),
                Err(Error::InDoubt { .. }) => assert!(!vm.writer.is_running(), "{context}"),
                Err(_) => assert!(!to.started && vm.writer.is_running(), "{context}"),
            }
            assert_unharmed(&vm.writer_ram(), to.started, &context);
            if vm.writer.is_running() {
                // The same memory, a second time.
                let (sent, received) = migrate(&mut vm, &mut Heir::default(), handing_over(), &Faults::new());
                sent.unwrap();
                received.unwrap();
            }
        }
    }
}

#[test]
fn whatever_call_fails_the_memory_stays_the_sources() {
    for call in ["take_memory", "prepare", "load", "start"] {
        let mut vm = TestSource::new(memory_of(RamBlock::memory_file));
        let mut to = Heir { fails: Some(call), ..Heir::default() };
        let (sent, received) = migrate(&mut vm, &mut to, handing_over(), &Faults::new());
        assert!(matches!(received, Err(Error::Vm { .. } | Error::Load { .. })), "{call}: {received:?}");
        let Err(Error::Refused { reason: Some(reason), .. }) = sent else { panic!("{call}: {sent:?}") };
        assert!(reason.ends_with(&format!("told to fail at {call}")), "{reason}");
        assert!(vm.writer.is_running() && to.calls.last() == Some(&"abandon"), "{call}: {:?}", to.calls);
        assert_unharmed(&vm.writer_ram(), false, call);
    }
}

/// A VMM that took no care kept the memory of another VM, and would have had it made zero.
#[test]
fn memory_that_was_lent_is_not_used_for_another_migration() {
    let mut vm = TestSource::new(memory_of(RamBlock::memory_file));
    let mut to = Heir { fails: Some("load"), ..Heir::default() };
    migrate(&mut vm, &mut to, handing_over(), &Faults::new()).0.unwrap_err();

    /// Keeps its memory.
    struct Careless(Heir);

    impl DestinationVm for Careless {
        fn ram(&self) -> &Ram {
            self.0.ram()
        }

        fn load(&mut self, section: &SectionId, input: &mut dyn Read) -> Result<(), VmError> {
            self.0.load(section, input)
        }

        fn start(&mut self) -> Result<(), VmError> {
            self.0.start()
        }
    }

    let mut to = Careless(Heir { fails: None, ..to });
    let mut other = TestSource::new(memory_of(RamBlock::anonymous));
    let (sent, received) = migrate(&mut other, &mut to, source::Options::default(), &Faults::new());
    let expected = r#"RAM block "ram" cannot be handed over: it is the memory of a VM that is not here"#;
    assert_eq!(received.unwrap_err().to_string(), expected);
    assert!(matches!(sent, Err(Error::Refused { .. })));
    assert_unharmed(&vm.writer_ram(), false, "the memory that was lent");
    // Nor at the source, once it has given its memory away.
    let mut heir = Heir::default();
    let (sent, received) = migrate(&mut vm, &mut heir, handing_over(), &Faults::new());
    sent.unwrap();
    received.unwrap();
    let mut to = Careless(Heir { ram: Some(vm.writer_ram()), ..Heir::default() });
    let (_, received) = migrate(&mut other, &mut to, source::Options::default(), &Faults::new());
    assert_eq!(received.unwrap_err().to_string(), expected);
    assert_unharmed(heir.ram(), true, "the memory that was given away");
}

#[test]
fn a_vm_that_was_made_with_other_memory_is_refused() {
    let mut vm = TestSource::new(memory_of(RamBlock::memory_file));
    let mut to = Heir { ignores: true, ..Heir::default() };
    let (sent, received) = migrate(&mut vm, &mut to, handing_over(), &Faults::new());
    let expected =
        r#"RAM block "ram" cannot be handed over: the source hands it over, and the VM was made with other memory"#;
    assert_eq!(received.unwrap_err().to_string(), expected);
    let Err(Error::Refused { reason: Some(reason), .. }) = sent else { panic!("{sent:?}") };
    assert_eq!(reason, expected);
    assert_unharmed(&vm.writer_ram(), false, "the source");
}

#[test]
fn a_connection_or_a_peer_that_takes_no_memory_ends_the_migration_with_a_sentence() {
    let (listener, connector) = memory::listener(1 << 16);
    let mut vm = TestSource::new(memory_of(RamBlock::memory_file));
    let (sent, _) = between(&mut vm, &mut Heir::default(), handing_over(), Box::new(listener), &connector);
    let error = sent.unwrap_err();
    assert!(matches!(error, Error::Mismatch(Mismatch::NoDescriptors { .. })), "{error}");
    assert!(error.to_string().contains("over a unix socket only"), "{error}");

    let qemu = source::Options { peer: Peer::Qemu, ..handing_over() };
    let (sent, _) = migrate(&mut vm, &mut Heir::default(), qemu, &Faults::new());
    assert!(matches!(sent, Err(Error::Mismatch(Mismatch::HandOverRefused))), "{sent:?}");

    let mut private = TestSource::new(Ram::for_test(&[("ram", 1)]));
    let (sent, _) = migrate(&mut private, &mut Heir::default(), handing_over(), &Faults::new());
    assert!(matches!(sent, Err(Error::Mismatch(Mismatch::NothingToHandOver))), "{sent:?}");
    assert!(vm.writer.is_running() && private.writer.is_running());
    assert!(vm.calls().iter().all(|call| *call == "resume"), "{:?}", vm.calls());
}

#[test]
fn a_destination_that_knows_nothing_of_it_ends_the_migration_and_the_guest_runs_on() {
    for missing in [Extension::SharedMemory, Extension::TwoStepCommit] {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut vm = TestSource::new(memory_of(RamBlock::memory_file));
        let accepted = Extensions::known().without(missing);
        let error = time_limit(LIMIT, || {
            std::thread::scope(|scope| {
                let peer = scope.spawn(move || {
                    let mut theirs = theirs;
                    let mut answer = Vec::new();
                    Message::Accepted(accepted.without(Extension::SharedMemory)).encode(&mut answer);
                    theirs.write_all(&answer).unwrap();
                    while matches!(theirs.read(&mut [0; 512]), Ok(1..)) {}
                });
                let connector = OneThenMemory::new(ours);
                let error = Source::new(handing_over()).run(&mut vm, &connector, &mut ()).unwrap_err();
                drop(connector);
                peer.join().unwrap();
                error
            })
        });
        assert!(matches!(error, Error::Mismatch(Mismatch::HandOverRefused)), "{error}");
        assert!(error.to_string().ends_with("let it be copied (source::Plan::hand_over)"), "{error}");
        assert!(vm.writer.is_running() && !vm.calls().contains(&"describe"));
    }
}

/// Main is one socket; channels go to a listener that never answers.
struct OneThenMemory {
    main: FdConnector,
    channels: (memory::MemoryListener, memory::MemoryConnector),
}

impl OneThenMemory {
    fn new(main: UnixStream) -> OneThenMemory {
        OneThenMemory { main: FdConnector::new(main.into()).unwrap(), channels: memory::listener(1 << 16) }
    }
}

impl Connect for OneThenMemory {
    fn dial(&self) -> io::Result<Box<dyn crate::transport::Pending>> {
        self.main.dial().or_else(|_| self.channels.1.dial())
    }
}

/// What a hostile source says on main before its descriptors: an offer of all `extensions`.
fn offered(extensions: Extensions) -> MainEncoder {
    let mut encoder = MainEncoder::default();
    encoder.header().configuration("multifd").config_offer(&Offer { channels: 1, token: None, extensions });
    encoder.command(&Command::OpenReturnPath);
    encoder
}

/// SHARED_MEMORY with `list`.
fn message(list: &[u8]) -> Vec<u8> {
    let mut encoder = MainEncoder::default();
    encoder.command(&Command::SharedMemory { len: list.len() as u32 }).raw(list);
    encoder.bytes.clone()
}

fn list(blocks: &[(&str, u64, u64)]) -> Vec<u8> {
    let listed = |&(name, offset, len): &(&str, u64, u64)| Listed { name: block(name), offset, len };
    shared_memory::encode(&blocks.iter().map(listed).collect::<Vec<_>>())
}

/// Lets a destination hear `begin`, then `bytes` with `descriptors` beside them, then `rest`, and a channel. Returns why it ends,
/// and its VM.
fn hears(begin: &MainEncoder, bytes: &[u8], descriptors: &[BorrowedFd<'_>], rest: &[u8]) -> (Error, Heir) {
    time_limit(LIMIT, || {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("s");
        let listener = listen(&path).unwrap();
        let mut to = Heir::default();
        let options = destination::Options { channels: Some(1), ..Default::default() };
        let error = std::thread::scope(|scope| {
            let to = &mut to;
            let running = scope.spawn(move || Destination::new(options).run(to, Box::new(listener), &mut ()));
            let mut main = UnixConnector::new(&path).connect().unwrap();
            main.write(&begin.bytes, &[]).unwrap();
            // Until it has answered; from then on it takes descriptors.
            let _ = main.read(&mut [0; 512]);
            // It may have given up before.
            let _ = main.write_with_descriptors(bytes, descriptors);
            let _ = main.write(rest, &[]);
            let channel = UnixConnector::new(&path).connect().map(|mut channel| {
                let _ = channel.write(&Wire::channel(0).sync().bytes, &[]);
                channel
            });
            // Not ended before: an end of main while the channel is on its way would be the reason.
            while matches!(main.read(&mut [0; 512]), Ok(1..)) {}
            drop(channel);
            running.join().unwrap().unwrap_err()
        });
        (error, to)
    })
}

/// A memory file of `len` bytes with `seals`.
fn memfd(len: u64, seals: SealFlags) -> OwnedFd {
    let file = memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&file, len).unwrap();
    fcntl_add_seals(&file, seals).unwrap();
    file
}

#[test]
fn descriptors_that_are_no_memory_that_stays_are_refused() {
    const LEN: u64 = PAGES * PAGE as u64;
    let sealed = || memfd(LEN, SealFlags::SHRINK);
    let read_only = {
        let file = sealed();
        open(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file)), OFlags::RDONLY, Mode::empty())
            .unwrap()
    };
    let path = open("/", OFlags::PATH, Mode::empty()).unwrap();
    let directory = TempDir::new().unwrap();
    let disk = File::options().read(true).write(true).create_new(true).open(directory.path().join("f")).unwrap();
    disk.set_len(LEN).unwrap();
    let socket = UnixStream::pair().unwrap().0;
    let null = File::options().read(true).write(true).open("/dev/null").unwrap();
    let whole = ("ram", 0, LEN);
    for (file, block, why) in [
        (memfd(LEN, SealFlags::GROW), whole, "its file is not sealed against becoming shorter (F_SEAL_SHRINK)"),
        (memfd(LEN, SealFlags::SHRINK | SealFlags::WRITE), whole, "its file is sealed against writing"),
        (memfd(LEN, SealFlags::SHRINK | SealFlags::FUTURE_WRITE), whole, "its file is sealed against writing"),
        (memfd(LEN - 1, SealFlags::SHRINK), whole, "its file has 0x63fff bytes, and the block 0x64000 from 0x0 on"),
        (sealed(), ("ram", 4096, LEN), "its file has 0x64000 bytes, and the block 0x64000 from 0x1000 on"),
        (sealed(), ("ram", 1 << 62, 1 << 62), "its file has 0x64000 bytes, and the block"),
        (read_only, whole, "its file is not open for reading and writing"),
        (path, whole, "its file is not open for reading and writing"),
        (disk.into(), whole, "its file is no memory file (memfd)"),
        (socket.into(), whole, "its file is no memory file (memfd)"),
        (null.into(), whole, "its file is no memory file (memfd)"),
    ] {
        if block.1 == 1 << 62 {
            // Beyond what a file can have: refused as it is read.
            let (error, heir) = hears(&offered(Extensions::known()), &message(&list(&[block])), &[file.as_fd()], &[]);
            assert!(error.to_string().contains("where no file has bytes"), "{error}");
            assert!(heir.calls.is_empty());
            continue;
        }
        let (error, heir) = hears(&offered(Extensions::known()), &message(&list(&[block])), &[file.as_fd()], &[]);
        assert!(matches!(&error, Error::Mismatch(Mismatch::NotShared { .. })), "{why}: {error}");
        assert!(error.to_string().contains(why), "{why}: {error}");
        assert!(heir.calls.is_empty(), "{:?}", heir.calls);
    }
}

#[test]
fn another_number_of_descriptors_than_blocks_is_refused() {
    let file = memfd(4096, SealFlags::SHRINK);
    let one = message(&list(&[("ram", 0, 4096)]));
    let two = message(&list(&[("ram", 0, 4096), ("rom", 0, 4096)]));
    for (bytes, count, expected) in [
        (&one, 0, "0 descriptors came for 1 blocks"),
        (&one, 2, "2 descriptors came for 1 blocks"),
        (&two, 1, "1 descriptors came for 2 blocks"),
        (&one, 129, "in 129 blocks, and at most 128"),
        (&one, 253, "in 253 blocks, and at most 128"),
    ] {
        let (error, heir) = hears(&offered(Extensions::known()), bytes, &vec![file.as_fd(); count], &[]);
        assert!(error.to_string().contains(expected), "{expected}: {error}");
        assert!(heir.calls.is_empty());
    }
}

#[test]
fn memory_that_was_not_agreed_on_or_comes_at_the_wrong_time_is_refused() {
    let file = memfd(4096, SealFlags::SHRINK);
    let good = message(&list(&[("ram", 0, 4096)]));
    let known = Extensions::known;
    let mut described = offered(known());
    described.command(&Command::Describe { len: 0 });
    let mut listed = offered(known());
    listed.ram_start(1, (PAGES + 64) * PAGE as u64);
    listed.block(&BlockEntry::new(block("ram"), PAGES * PAGE as u64));
    listed.block(&BlockEntry::new(block("rom"), 64 * PAGE as u64)).flush().eos().footer(1);
    for (begin, bytes, rest, expected) in [
        (offered(known().without(Extension::SharedMemory)), &good, &[][..], "from a source that has not offered it"),
        (offered(known().without(Extension::TwoStepCommit)), &good, &[], "SHARED_MEMORY without being agreed on"),
        (described, &good, &[], "SHARED_MEMORY after DESCRIBE"),
        (listed, &good, &[], "SHARED_MEMORY after the START section of ram"),
        (offered(known()), &good, &good, "SHARED_MEMORY a second time"),
        (offered(known()), &message(b"\0\x01\x03ra"), &[], "it is cut off"),
        (offered(known()), &message(b""), &[], "it is cut off"),
    ] {
        let (error, heir) = hears(&begin, bytes, &[file.as_fd()], rest);
        assert!(error.to_string().contains(expected), "{expected}: {error}");
        assert!(!heir.calls.contains(&"load") && !heir.calls.contains(&"start"), "{:?}", heir.calls);
    }
}

/// The engine would have written for the peer into memory that is not the destination's yet.
#[test]
fn a_page_of_memory_that_is_handed_over_is_refused() {
    const LEN: u64 = PAGES * PAGE as u64;
    let files = [memfd(LEN, SealFlags::SHRINK), memfd(64 * PAGE as u64, SealFlags::SHRINK)];
    let bytes = message(&list(&[("ram", 0, LEN), ("rom", 0, 64 * PAGE as u64)]));
    for zero in [true, false] {
        let mut rest = MainEncoder::default();
        rest.ram_start(1, LEN + 64 * PAGE as u64);
        rest.block(&BlockEntry::new(block("ram"), LEN)).block(&BlockEntry::new(block("rom"), 64 * PAGE as u64));
        rest.flush().eos().footer(1).ram_part(1, false);
        match zero {
            true => rest.zero_page(&block("ram"), 0x3000),
            false => rest.page(&block("ram"), 0x3000).raw(&[9; PAGE]),
        };
        let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        let (error, heir) = hears(&offered(Extensions::known()), &bytes, &files, &rest.bytes);
        assert!(error.to_string().contains(r#"a page of RAM block "ram", whose memory is handed over"#), "{error}");
        assert_eq!(heir.calls, ["take_memory", "prepare", "abandon"]);
        assert!(heir.ram().page(3).unwrap().is_zero());
    }
}

/// A destination that cannot seal memory says so; that of files which the VMM has made without seals.
#[test]
fn a_file_that_cannot_be_sealed_is_not_handed_over() {
    use crate::ram::{Backing, MemoryFile};
    let file = memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, 4096).unwrap();
    let memory = RamBlock::anonymous(block("ram"), 4096).unwrap();
    let memory = memory.backed_by(Backing::MemoryFile(MemoryFile::new(file.as_fd(), 0).unwrap()));
    let mut vm = TestSource::new(Ram::new(PAGE, vec![memory]).unwrap());
    let (sent, _) = migrate(&mut vm, &mut Heir::default(), handing_over(), &Faults::new());
    let error = sent.unwrap_err().to_string();
    assert!(error.ends_with("make it with MFD_ALLOW_SEALING") && error.contains("cannot be sealed"), "{error}");
}
