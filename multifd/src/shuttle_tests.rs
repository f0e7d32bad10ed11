//! Whole migrations under random and priority-based schedules, with a guest that writes meanwhile.
//!
//! `RUSTFLAGS="--cfg shuttle" cargo test -p multifd --release shuttle_tests`. The code under test is [`Source::run`] and
//! [`Destination::run`] as they ship; connections are those of [`memory`]. A thread that is left behind is a deadlock for
//! shuttle, so each test also says that all threads were joined. `MULTIFD_SCHEDULES` sets how many schedules of each kind
//! each test tries.
//!
//! Random schedules alone are not enough: they switch threads all the time, and an old page is overtaken only when one
//! channel stands still for long. PCT gives threads priorities and changes them a few times.

use std::{
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::atomic::{AtomicU64 as Plain, Ordering::Relaxed as PlainRelaxed},
    time::{Duration, Instant},
};

use multifd_proto::{
    machine::{Dialect, ZeroPages},
    packet::Prefix,
};
use shuttle::{
    Config, FailurePersistence, Runner,
    rand::{Rng, thread_rng},
    scheduler::{PctScheduler, RandomScheduler},
};

use crate::{
    broken::Broken,
    clock::Clock,
    destination::{self, Destination},
    dirty_bitmap::DirtyBitmap,
    error::Error,
    ram::{GuestRange, Ram},
    source::{self, Flush, Source},
    sync::{Arc, Mutex, lock, thread},
    test_vm::{TestDestination, TestSource, Writer},
    transport::{Connect, Listen, Stopper, Stream, memory},
};

const PAGE: usize = 1024;
/// One page each, so that each is a batch of its own.
const BLOCKS: [(&str, usize); 3] = [("a", 1), ("b", 1), ("c", 1)];
/// Bytes that fit into a connection: a page, the SYNC behind it and the page of the next round. With less, a sender cannot
/// be far enough ahead of its receiver for a page to be overtaken.
const CAPACITY: usize = 20_000;

/// One way to migrate.
#[derive(Clone, Copy, Debug)]
struct Mode {
    dialect: Dialect,
    flush: Flush,
    zero_pages: ZeroPages,
    /// As QEMU before 9.0: the last packet of a section carries SYNC.
    sync_carries_pages: bool,
    channels: u8,
    /// Bytes that fit into a connection.
    capacity: usize,
}

const LATE: Mode = Mode {
    dialect: Dialect::PerRound,
    flush: Flush::Late,
    zero_pages: ZeroPages::Multifd,
    sync_carries_pages: false,
    channels: 2,
    capacity: CAPACITY,
};
const EARLY: Mode = Mode { flush: Flush::Early, ..LATE };
const PER_SECTION: Mode = Mode { dialect: Dialect::PerSection, ..LATE };
const CARRYING: Mode = Mode { sync_carries_pages: true, ..PER_SECTION };
const LEGACY: Mode = Mode { zero_pages: ZeroPages::Legacy, ..LATE };
const MODES: [(&str, Mode); 9] = [
    ("FLUSH late", LATE),
    ("FLUSH early", EARLY),
    ("per section", PER_SECTION),
    ("SYNC with pages", CARRYING),
    ("legacy zero pages", LEGACY),
    ("legacy zero pages per section", Mode { dialect: Dialect::PerSection, ..LEGACY }),
    ("connections that hold less than a header", Mode { capacity: 2000, ..EARLY }),
    ("3 channels", Mode { channels: 3, ..EARLY }),
    ("1 channel", Mode { channels: 1, ..EARLY }),
];

impl Mode {
    fn source(self) -> source::Options {
        let mut options = source::Options {
            channels: self.channels,
            dialect: self.dialect,
            flush: self.flush,
            zero_pages: self.zero_pages,
            clock: counting_clock(),
            ..Default::default()
        };
        // Round after round until the guest has nothing more to write.
        options.limits.downtime = Duration::ZERO;
        options.limits.rounds = None;
        options
    }
}

fn receiving() -> destination::Options {
    destination::Options { audit: true, clock: counting_clock(), ..Default::default() }
}

/// A clock that moves on when somebody looks at it: the same in each run of a schedule.
fn counting_clock() -> Clock {
    let looks = Plain::new(0);
    Clock::from_fn(move || Duration::from_millis(looks.fetch_add(1, PlainRelaxed)))
}

fn ram() -> Ram {
    Ram::for_test_with_pages(PAGE, &BLOCKS)
}

/// Page numbers: blocks begin at multiples of 64.
fn pages() -> [u64; 3] {
    [0, 64, 128]
}

/// A VM whose pages have content, whose guest writes the same page in each of the first two rounds.
fn source_vm() -> TestSource {
    let ram = ram();
    for page in pages() {
        ram.page(page).unwrap().write(&(page + 1).to_ne_bytes().repeat(PAGE / 8));
    }
    let mut vm = TestSource::new(ram);
    let mut drains = 0;
    vm.at_drain = Box::new(move |writer| {
        drains += 1;
        if drains <= 2 {
            writer.write(0, 1000 + drains);
        }
    });
    vm
}

/// A guest that writes pages, also zeros, until it has done so a few times or is paused.
fn guest(writer: Writer) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        for (index, page) in [64, 0, 128, 0].into_iter().enumerate() {
            let value = if index == 2 { 0 } else { 2000 + index as u64 };
            writer.write(page, value);
            thread::yield_now();
        }
    })
}

struct Outcome {
    vm: TestSource,
    to: TestDestination,
    sent: Result<source::Report, Error>,
    received: Result<destination::Report, Error>,
}

/// What goes on beside a migration.
struct Beside {
    connect: Box<dyn Fn(memory::MemoryConnector) -> Box<dyn Connect>>,
    cancel_source: bool,
    cancel_destination: bool,
}

impl Default for Beside {
    fn default() -> Beside {
        Beside { connect: Box::new(|connector| Box::new(connector)), cancel_source: false, cancel_destination: false }
    }
}

fn migrate(
    mut vm: TestSource,
    mut to: TestDestination,
    mode: Mode,
    options: source::Options,
    receiving: destination::Options,
    beside: Beside,
) -> Outcome {
    let (listener, connector) = memory::listener(mode.capacity);
    let mut connect = (beside.connect)(connector);
    if mode.sync_carries_pages {
        connect = Box::new(Legacy(connect));
    }
    let guest = guest(vm.writer.clone());
    let destination = Destination::new(receiving);
    let source = Source::new(options);
    let mut cancelling = Vec::new();
    for stop in [
        beside.cancel_source.then(|| source.stop_handle()),
        beside.cancel_destination.then(|| destination.stop_handle()),
    ] {
        cancelling.extend(stop.map(|stop| thread::spawn(move || stop.cancel())));
    }
    let destination = thread::spawn(move || {
        let received = destination.run(&mut to, Box::new(listener), &mut ());
        (to, received)
    });
    let sent = source.run(&mut vm, &*connect, &mut ());
    drop(connect);
    let (to, received) = destination.join().unwrap();
    guest.join().unwrap();
    cancelling.into_iter().for_each(|thread| thread.join().unwrap());
    Outcome { vm, to, sent, received }
}

fn assert_same(vm: &TestSource, to: &TestDestination) {
    for page in pages() {
        let (source, destination) = (vm.writer_ram().page_bytes(page), to.ram.page_bytes(page));
        assert!(source == destination, "page {page} differs: {} instead of {}", destination[0], source[0]);
    }
}

impl Outcome {
    fn assert_migrated(&self) {
        let failures: Vec<String> =
            self.sent.as_ref().err().into_iter().chain(self.received.as_ref().err()).map(ToString::to_string).collect();
        assert!(failures.is_empty(), "{failures:?}");
        assert_same(&self.vm, &self.to);
        let findings = self.received.as_ref().unwrap().audit.as_ref().unwrap();
        assert_eq!(findings.stale_writes, 0, "a page differs in its round: {:?}", findings.first);
        assert_eq!(self.to.calls(), ["load", "load", "start"]);
        assert!(!self.vm.writer.is_running(), "the VM belongs to the destination");
    }

    /// Either it was migrated, or the guest runs on at the source and another attempt succeeds.
    fn assert_whole(self, mode: Mode) {
        let Err(error) = &self.sent else { return self.assert_migrated() };
        assert!(self.vm.writer.is_running(), "nobody runs the VM after {error}");
        assert!(!self.to.calls().contains(&"start"), "both run the VM after {error}");
        let mut vm = self.vm;
        vm.fail_at = None;
        migrate(vm, TestDestination::new(ram()), mode, mode.source(), receiving(), Beside::default()).assert_migrated();
    }
}

/// Schedules of each kind.
fn schedules(default: usize) -> usize {
    let factor: f64 = std::env::var("MULTIFD_SCHEDULES").ok().and_then(|text| text.parse().ok()).unwrap_or(1.0);
    (default as f64 * factor).ceil() as usize
}

fn config() -> Config {
    let mut config = Config::new();
    config.stack_size = 256 << 10;
    config.failure_persistence = FailurePersistence::None;
    config
}

/// Runs `body` under random and under PCT schedules.
fn explore(name: &str, count: usize, body: impl Fn() + Send + Sync + 'static) {
    let begun = Instant::now();
    let (count, body) = (schedules(count), Arc::new(body));
    let random = body.clone();
    Runner::new(RandomScheduler::new(count), config()).run(move || random());
    Runner::new(PctScheduler::new(PCT_DEPTH, count), config()).run(move || body());
    let seconds = begun.elapsed().as_secs_f64();
    test_support::report("proof", &format!("shuttle | {name} | {} schedules | - | {seconds:.1} s", 2 * count));
}

/// Asserts that some schedule makes `body` fail with a message that contains `how`.
fn must_be_caught(name: &str, how: &str, body: impl Fn() + Send + Sync + 'static) {
    let begun = Instant::now();
    // PCT stops at the first that fails; random schedules, for comparison, mostly go on to the end.
    let (count, random_count, body) = (3000, schedules(1000), Arc::new(body));
    let tried = Arc::new(Plain::new(0));
    let counted = |body: Arc<dyn Fn() + Send + Sync>| {
        let tried = tried.clone();
        move || {
            tried.fetch_add(1, PlainRelaxed);
            body();
        }
    };
    let fails = |run: &dyn Fn()| {
        tried.store(0, PlainRelaxed);
        let panic = catch_unwind(AssertUnwindSafe(run)).err()?;
        let message = panic.downcast_ref::<String>().cloned().unwrap_or_default();
        assert!(message.contains(how), "failed in another way than expected: {message}");
        Some(tried.load(PlainRelaxed))
    };
    let (for_pct, for_random) = (counted(body.clone()), counted(body));
    let pct = fails(&|| {
        Runner::new(PctScheduler::new(PCT_DEPTH, count), config()).run(for_pct.clone());
    });
    let random = fails(&|| {
        Runner::new(RandomScheduler::new(random_count), config()).run(for_random.clone());
    });
    let seconds = begun.elapsed().as_secs_f64();
    let text = |found: Option<u64>, of| found.map_or(format!("missed in {of}"), |tried| format!("schedule {tried}"));
    let (pct_text, random_text) = (text(pct, count), text(random, random_count));
    test_support::report(
        "proof",
        &format!("shuttle | broken: {name} | PCT: {pct_text}, random: {random_text} | caught | {seconds:.1} s"),
    );
    assert!(pct.is_some() || random.is_some(), "{name} was not caught in {count} schedules of each kind");
}

/// Priority changes in a schedule.
const PCT_DEPTH: usize = 4;

#[test]
fn memory_is_equal_in_every_mode() {
    for (name, mode) in MODES {
        explore(&format!("migration, {name}"), 300, move || {
            let to = TestDestination::new(ram());
            migrate(source_vm(), to, mode, mode.source(), receiving(), Beside::default()).assert_migrated();
        });
    }
}

#[test]
fn a_cancel_at_any_moment_leaves_one_guest() {
    for (name, mode) in [("FLUSH early", EARLY), ("per section", PER_SECTION), ("legacy zero pages", LEGACY)] {
        for cancel_source in [true, false] {
            let side = if cancel_source { "source" } else { "destination" };
            explore(&format!("cancel at the {side}, {name}"), 200, move || {
                let beside = Beside { cancel_source, cancel_destination: !cancel_source, ..Default::default() };
                let to = TestDestination::new(ram());
                migrate(source_vm(), to, mode, mode.source(), receiving(), beside).assert_whole(mode);
            });
        }
    }
}

#[test]
fn a_connection_that_fails_at_any_operation_leaves_one_guest() {
    for (name, mode) in [("FLUSH late", LATE), ("FLUSH early", EARLY), ("SYNC with pages", CARRYING)] {
        explore(&format!("a channel fails at the k-th operation, {name}"), 300, move || {
            let connection = thread_rng().gen_range(1..=usize::from(mode.channels));
            let after = thread_rng().gen_range(0..14);
            let connect = move |inner| Box::new(Failing { inner, connection, after, opened: Mutex::new(0) }) as _;
            let beside = Beside { connect: Box::new(connect), ..Default::default() };
            let to = TestDestination::new(ram());
            migrate(source_vm(), to, mode, mode.source(), receiving(), beside).assert_whole(mode);
        });
    }
}

#[test]
fn main_that_fails_leaves_a_guest() {
    explore("main fails at the k-th operation", 300, || {
        let after = thread_rng().gen_range(0..30);
        let connect = move |inner| Box::new(Failing { inner, connection: 0, after, opened: Mutex::new(0) }) as _;
        let beside = Beside { connect: Box::new(connect), ..Default::default() };
        let outcome = migrate(source_vm(), TestDestination::new(ram()), EARLY, EARLY.source(), receiving(), beside);
        match &outcome.sent {
            Ok(_) => outcome.assert_migrated(),
            // The confirmation died with the connection: nobody can know, and the guest is not lost.
            Err(error) if outcome.to.calls().contains(&"start") => {
                assert!(matches!(error, Error::Unconfirmed | Error::Io { .. }), "{error}");
                assert!(outcome.vm.writer.is_running());
            }
            Err(_) => outcome.assert_whole(EARLY),
        }
    });
}

#[test]
fn a_failing_callback_of_either_vm_leaves_one_guest() {
    explore("a call to the source's VM fails", 300, || {
        let mut vm = source_vm();
        vm.fail_at = Some(thread_rng().gen_range(0..9));
        migrate(vm, TestDestination::new(ram()), EARLY, EARLY.source(), receiving(), Beside::default())
            .assert_whole(EARLY);
    });
    explore("a call to the destination's VM fails", 300, || {
        let mut to = TestDestination::new(ram());
        to.fail = Some("load");
        let outcome = migrate(source_vm(), to, EARLY, EARLY.source(), receiving(), Beside::default());
        assert!(matches!(outcome.received, Err(Error::Load { .. })), "{:?}", outcome.received);
        assert!(outcome.sent.is_err());
        outcome.assert_whole(EARLY);
    });
}

#[test]
fn a_destination_whose_vm_does_not_start_has_all_of_it() {
    for (name, mode) in [("FLUSH early", EARLY), ("per section", PER_SECTION)] {
        explore(&format!("the destination's VM does not start, {name}"), 300, move || {
            let mut to = TestDestination::new(ram());
            to.fail = Some("start");
            let outcome = migrate(source_vm(), to, mode, mode.source(), receiving(), Beside::default());
            // The VM was confirmed by then: the source must not run it, whatever becomes of it over there.
            let failure = outcome.received.as_ref().unwrap_err();
            assert!(matches!(failure, Error::Vm { call: "start", .. }), "{failure}");
            assert!(outcome.sent.is_ok(), "{:?}", outcome.sent.as_ref().err());
            assert!(!outcome.vm.writer.is_running(), "the VM belongs to the destination");
            assert_eq!(outcome.to.calls(), ["load", "load", "start"]);
            assert_same(&outcome.vm, &outcome.to);
        });
    }
}

#[test]
fn a_source_that_vanishes_leaves_no_destination_waiting() {
    let refusals = Arc::new(Plain::new(0));
    for (name, mode) in [("FLUSH late", LATE), ("FLUSH early", EARLY), ("per section", PER_SECTION)] {
        let refusals = refusals.clone();
        explore(&format!("a source that vanishes at any byte, {name}"), 300, move || {
            // Most migrations say a little less; whatever is cut later is cut behind the end.
            let left = Arc::new(Mutex::new(thread_rng().gen_range(0..90_000)));
            let connect = move |inner| Box::new(Vanishing { inner, left: left.clone(), all: Arc::default() }) as _;
            let beside = Beside { connect: Box::new(connect), ..Default::default() };
            let outcome = migrate(source_vm(), TestDestination::new(ram()), mode, mode.source(), receiving(), beside);
            if outcome.sent.is_ok() {
                return outcome.assert_migrated();
            }
            // All was there and only the confirmation had nowhere to go, or it ends with an error and no VM.
            if !outcome.to.calls().contains(&"start") {
                refusals.fetch_add(1, PlainRelaxed);
                assert!(outcome.received.is_err(), "a migration without its end was taken for complete");
                outcome.assert_whole(mode);
            }
        });
    }
    assert!(refusals.load(PlainRelaxed) > 0, "no source vanished in the middle");
}

#[test]
fn a_peer_that_stops_in_the_middle_leaves_the_guest_running() {
    explore("a destination that stops reading and closes", 300, || {
        let (mut listener, connector) = memory::listener(CAPACITY);
        let mut vm = source_vm();
        let guest = guest(vm.writer.clone());
        // Main says more than this before it waits for anybody, and a channel begins with a hello and a SYNC packet.
        let which = thread_rng().gen_range(0..=2);
        let bytes = thread_rng().gen_range(0..if which == 0 { 80 } else { 4000 });
        let interrupt = listener.stopper().unwrap();
        let peer = thread::spawn(move || {
            let mut accepted = Vec::new();
            for _ in 0..=which {
                accepted.extend(listener.accept(None));
            }
            if let Some(stream) = accepted.get_mut(which) {
                // Ends early where the source has.
                let _ = stream.read_exact(&mut vec![0; bytes]);
            }
        });
        let sent = Source::new(EARLY.source()).run(&mut vm, &connector, &mut ());
        interrupt.stop();
        peer.join().unwrap();
        guest.join().unwrap();
        assert!(sent.is_err());
        assert!(vm.writer.is_running());
        migrate(vm, TestDestination::new(ram()), EARLY, EARLY.source(), receiving(), Beside::default())
            .assert_migrated();
    });
}

/// A destination with `broken`, in `mode`.
fn broken_destination(broken: Broken, mode: Mode) -> impl Fn() + Send + Sync {
    move || {
        let receiving = destination::Options { broken: Some(broken), ..receiving() };
        let to = TestDestination::new(ram());
        migrate(source_vm(), to, mode, mode.source(), receiving, Beside::default()).assert_migrated();
    }
}

#[test]
fn a_destination_without_barrier_is_caught() {
    must_be_caught("destination without barrier", "differs", broken_destination(Broken::NoBarrier, EARLY));
}

#[test]
fn the_audit_catches_a_destination_without_barrier() {
    must_be_caught("destination without barrier, by the audit", "over round", || {
        let receiving = destination::Options { broken: Some(Broken::NoBarrier), ..receiving() };
        let to = TestDestination::new(ram());
        let outcome = migrate(source_vm(), to, EARLY, EARLY.source(), receiving, Beside::default());
        let findings = outcome.received.unwrap().audit.unwrap();
        let told: Vec<String> = findings.first.iter().map(ToString::to_string).collect();
        assert!(told.is_empty(), "{told:?}");
    });
}

#[test]
fn a_barrier_that_releases_one_party_early_is_caught() {
    must_be_caught("barrier released one party early", "differs", broken_destination(Broken::BarrierShort, EARLY));
}

#[test]
fn dropped_pages_of_sync_packets_are_caught() {
    must_be_caught("pages of SYNC packets dropped", "differs", broken_destination(Broken::SyncPagesDropped, CARRYING));
}

#[test]
fn tracking_that_starts_late_is_caught() {
    must_be_caught("tracking starts after reading", "differs", || {
        let options = source::Options { broken: Some(Broken::TrackingStartsLate), ..EARLY.source() };
        let to = TestDestination::new(ram());
        migrate(source_vm(), to, EARLY, options, receiving(), Beside::default()).assert_migrated();
    });
}

#[test]
fn tracking_that_is_rearmed_after_reading_is_caught() {
    must_be_caught("tracking re-armed after reading", "differs", || {
        let mut vm = source_vm();
        vm.rearms_late = Some(DirtyBitmap::new(vm.writer_ram().layout()));
        migrate(vm, TestDestination::new(ram()), EARLY, EARLY.source(), receiving(), Beside::default())
            .assert_migrated();
    });
}

/// Channels whose last packet of a section carries SYNC.
struct Legacy(Box<dyn Connect>);

impl Connect for Legacy {
    fn connect(&self) -> io::Result<Box<dyn Stream>> {
        Ok(Box::new(LegacyStream { inner: self.0.connect()?, held: None }))
    }
}

struct LegacyStream {
    inner: Box<dyn Stream>,
    /// A packet that was not sent yet: SYNC may be next.
    held: Option<(Vec<u8>, Vec<u8>)>,
}

impl LegacyStream {
    fn send_held(&mut self) -> io::Result<()> {
        match self.held.take() {
            Some((header, payload)) => {
                self.inner.write(&header, &[])?;
                if payload.is_empty() { Ok(()) } else { self.inner.write(&payload, &[]) }
            }
            None => Ok(()),
        }
    }
}

impl Stream for LegacyStream {
    fn write(&mut self, header: &[u8], pages: &[GuestRange<'_>]) -> io::Result<()> {
        let prefix = header.first_chunk().map(Prefix::decode);
        let Some(Ok(prefix)) = prefix.filter(|_| header.len() > 100) else {
            // Main, or a hello.
            return self.inner.write(header, pages);
        };
        if let (true, Some((held, _))) = (prefix.flags.sync(), &mut self.held) {
            // The flags are the third word of a packet.
            for (held, sync) in held[8..12].iter_mut().zip(&header[8..12]) {
                *held |= sync;
            }
            return self.send_held();
        }
        self.send_held()?;
        if prefix.flags.sync() {
            return self.inner.write(header, pages);
        }
        let mut payload = Vec::new();
        for page in pages {
            let begin = payload.len();
            payload.resize(begin + page.len(), 0);
            page.read(&mut payload[begin..]);
        }
        self.held = Some((header.to_vec(), payload));
        Ok(())
    }

    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.inner.read(buf)
    }

    fn read_pages(&mut self, pages: &[GuestRange<'_>]) -> io::Result<()> {
        self.inner.read_pages(pages)
    }

    fn try_clone(&self) -> io::Result<Box<dyn Stream>> {
        self.inner.try_clone()
    }

    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        self.inner.stopper()
    }

    fn peer(&self) -> String {
        self.inner.peer()
    }
}

/// Connections of a process that is no more at one byte: what was written is read, and then all of them have ended.
struct Vanishing {
    inner: memory::MemoryConnector,
    /// Bytes that are still written, on all connections together.
    left: Arc<Mutex<usize>>,
    all: Arc<Mutex<Vec<Box<dyn Stopper>>>>,
}

impl Connect for Vanishing {
    fn connect(&self) -> io::Result<Box<dyn Stream>> {
        let inner = self.inner.connect()?;
        lock(&self.all).push(inner.stopper()?);
        Ok(Box::new(VanishingStream { inner, left: self.left.clone(), all: self.all.clone() }))
    }
}

struct VanishingStream {
    inner: Box<dyn Stream>,
    left: Arc<Mutex<usize>>,
    all: Arc<Mutex<Vec<Box<dyn Stopper>>>>,
}

impl Stream for VanishingStream {
    fn write(&mut self, header: &[u8], pages: &[GuestRange<'_>]) -> io::Result<()> {
        let mut bytes = header.to_vec();
        for page in pages {
            let begin = bytes.len();
            bytes.resize(begin + page.len(), 0);
            page.read(&mut bytes[begin..]);
        }
        let now = {
            let mut left = lock(&self.left);
            let now = bytes.len().min(*left);
            *left -= now;
            now
        };
        self.inner.write(&bytes[..now], &[])?;
        if now < bytes.len() {
            lock(&self.all).iter().for_each(|connection| connection.stop());
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        Ok(())
    }

    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.inner.read(buf)
    }

    fn read_pages(&mut self, pages: &[GuestRange<'_>]) -> io::Result<()> {
        self.inner.read_pages(pages)
    }

    fn try_clone(&self) -> io::Result<Box<dyn Stream>> {
        let inner = self.inner.try_clone()?;
        Ok(Box::new(VanishingStream { inner, left: self.left.clone(), all: self.all.clone() }))
    }

    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        self.inner.stopper()
    }

    fn peer(&self) -> String {
        self.inner.peer()
    }
}

/// Connections of which one dies at an operation.
struct Failing {
    inner: memory::MemoryConnector,
    /// Which, in the order in which they are opened; main is the first.
    connection: usize,
    /// Operations that succeed.
    after: usize,
    opened: Mutex<usize>,
}

impl Connect for Failing {
    fn connect(&self) -> io::Result<Box<dyn Stream>> {
        let stream = self.inner.connect()?;
        let mut opened = lock(&self.opened);
        *opened += 1;
        if *opened - 1 != self.connection {
            return Ok(stream);
        }
        Ok(Box::new(FailingStream { inner: stream, left: Arc::new(Mutex::new(self.after)) }))
    }
}

struct FailingStream {
    inner: Box<dyn Stream>,
    left: Arc<Mutex<usize>>,
}

impl FailingStream {
    fn operation(&mut self) -> io::Result<()> {
        let mut left = lock(&self.left);
        match left.checked_sub(1) {
            Some(fewer) => {
                *left = fewer;
                Ok(())
            }
            None => {
                drop(left);
                self.inner.stopper()?.stop();
                Err(io::ErrorKind::ConnectionReset.into())
            }
        }
    }
}

impl Stream for FailingStream {
    fn write(&mut self, header: &[u8], pages: &[GuestRange<'_>]) -> io::Result<()> {
        self.operation()?;
        self.inner.write(header, pages)
    }

    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.operation()?;
        self.inner.read(buf)
    }

    fn read_pages(&mut self, pages: &[GuestRange<'_>]) -> io::Result<()> {
        self.operation()?;
        self.inner.read_pages(pages)
    }

    fn try_clone(&self) -> io::Result<Box<dyn Stream>> {
        Ok(Box::new(FailingStream { inner: self.inner.try_clone()?, left: self.left.clone() }))
    }

    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        self.inner.stopper()
    }

    fn peer(&self) -> String {
        self.inner.peer()
    }
}
