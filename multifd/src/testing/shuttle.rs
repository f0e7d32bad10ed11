//! Whole migrations under random and priority-based schedules, with a guest that writes meanwhile.
//!
//! `RUSTFLAGS="--cfg shuttle" cargo test -p multifd --release testing::shuttle`. The code under test is [`Source::run`] and
//! [`Destination::run`] as they ship; connections are those of [`memory`]. A thread that is left behind is a deadlock for
//! shuttle, so each test also says that all threads were joined. `MULTIFD_SCHEDULES` sets how many schedules of each kind
//! each test tries.
//!
//! However a migration of these tests ends, its guest is in exactly one place, as [`Outcome::settle`] says: no schedule has
//! an exception.
//!
//! Random schedules alone are not enough: they switch threads all the time, and an old page is overtaken only when one
//! channel stands still for long. PCT gives threads priorities and changes them a few times.

mod failing;
mod legacy;
mod state;
mod vanishing;
mod watching;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::atomic::{AtomicU64 as Plain, Ordering::Relaxed as PlainRelaxed},
    time::{Duration, Instant},
};

use multifd_proto::machine::{Dialect, ZeroPages};
use shuttle::{
    Config, FailurePersistence, Runner,
    rand::{Rng, thread_rng},
    scheduler::{PctScheduler, RandomScheduler},
};

use self::{
    failing::Fault,
    legacy::Legacy,
    vanishing::Vanishing,
    watching::{Watched, WatchingConnector},
};
use crate::{
    clock::Clock,
    destination::{self, Destination},
    dirty_bitmap::DirtyBitmap,
    error::Error,
    progress::Phase,
    ram::Ram,
    source::{self, Flush, Peer, Source},
    sync::{Arc, Mutex, lock, thread},
    testing::broken::Broken,
    testing::far::Far,
    testing::machine,
    testing::memory,
    testing::trace::Trace,
    testing::vm::{TestDestination, TestSource, Writer},
    transport::{Connect, Listen},
    vm::SourceVm,
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
    /// A peer of ours has the commit in two steps, a QEMU in one.
    peer: Peer,
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
    peer: Peer::Multifd,
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
/// As towards QEMU: the destination is told nothing that QEMU would not understand.
const ONE_STEP: Mode = Mode { peer: Peer::Qemu, ..LATE };
const MODES: [(&str, Mode); 10] = [
    ("FLUSH late", LATE),
    ("FLUSH early", EARLY),
    ("per section", PER_SECTION),
    ("SYNC with pages", CARRYING),
    ("legacy zero pages", LEGACY),
    ("legacy zero pages per section", Mode { dialect: Dialect::PerSection, ..LEGACY }),
    ("connections that hold less than a header", Mode { capacity: 2000, ..EARLY }),
    ("3 channels", Mode { channels: 3, ..EARLY }),
    ("1 channel", Mode { channels: 1, ..EARLY }),
    ("one step", ONE_STEP),
];

impl Mode {
    /// Whether a destination that enters `phase` may not know yet whether its channels are complete.
    fn sets_up(self, phase: Option<Phase>) -> bool {
        match phase {
            None | Some(Phase::Connect | Phase::Setup) => true,
            // It is told by the numbers of the SYNC packets, in one of the rounds.
            Some(Phase::Rounds | Phase::Switchover) => self.peer == Peer::Qemu,
            Some(_) => false,
        }
    }

    fn source(self) -> source::Options {
        let mut options = source::Options::default();
        options.peer = self.peer;
        options.plan.channels = self.channels;
        options.qemu.dialect = self.dialect;
        options.qemu.flush = self.flush;
        options.qemu.zero_pages = self.zero_pages;
        options.clock = counting_clock();
        // Round after round until the guest has nothing more to write.
        options.parameters.limits.downtime = Duration::ZERO;
        options.parameters.limits.rounds = None;
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
    mode: Mode,
    /// The source wrote GO, or tried to.
    go: bool,
    /// The steps of both sides.
    trace: Trace,
}

/// What goes on beside a migration.
struct Beside {
    connect: Box<dyn Fn(memory::MemoryConnector) -> Box<dyn Connect>>,
    listen: Box<dyn Fn(memory::MemoryListener) -> Box<dyn Listen>>,
    cancel_source: bool,
    cancel_destination: bool,
    /// Operations of the source before that.
    cancel_after: usize,
    at_go: AtGo,
}

impl Default for Beside {
    fn default() -> Beside {
        Beside {
            connect: Box::new(|connector| Box::new(connector)),
            listen: Box::new(|listener| Box::new(listener)),
            cancel_source: false,
            cancel_destination: false,
            cancel_after: 0,
            at_go: AtGo::Sent,
        }
    }
}

/// What happens to the message that lets the destination start.
#[derive(Clone, Copy, Debug)]
enum AtGo {
    /// It is sent.
    Sent,
    /// The connection breaks before it.
    Lost,
    /// The connection breaks in the middle of it.
    Cut,
    /// It is sent, and the connection breaks then.
    Reset,
    /// It is sent, and the source sees a failure.
    Failed,
    /// It is sent, and the source is cancelled then.
    SourceCancelled,
    /// It is sent, and the destination is cancelled meanwhile.
    DestinationCancelled,
}

fn migrate(
    mut vm: TestSource,
    mut to: TestDestination,
    mode: Mode,
    mut options: source::Options,
    mut receiving: destination::Options,
    beside: Beside,
) -> Outcome {
    let is_broken = options.broken.is_some() || receiving.broken.is_some();
    let trace = Trace::recording();
    options.trace = trace.clone();
    receiving.trace = trace.clone();
    let (listener, connector) = memory::listener(mode.capacity);
    let mut connect = (beside.connect)(connector);
    let listener = (beside.listen)(listener);
    if mode.sync_carries_pages {
        connect = Box::new(Legacy(connect));
    }
    let guest = guest(vm.writer.clone());
    let destination = Destination::new(receiving);
    let source = Source::new(options);
    let cancelling = Arc::new(Mutex::new(Vec::new()));
    let go = Arc::new(Mutex::new(false));
    let stops = [source.stop_handle(), destination.stop_handle()];
    let cancelled = [beside.cancel_source, beside.cancel_destination];
    let watched = Watched {
        go: go.clone(),
        at_go: beside.at_go,
        left: Arc::new(Mutex::new(beside.cancel_after)),
        cancelled: stops
            .iter()
            .zip(cancelled)
            .filter(|(_, cancelled)| *cancelled)
            .map(|(stop, _)| stop.clone())
            .collect(),
        stops,
        cancelling: cancelling.clone(),
    };
    let connect = WatchingConnector { inner: connect, watched };
    let (progress, limit) = (destination.progress(), destination.stop_handle());
    let destination = thread::spawn(move || {
        let received = destination.run(&mut to, listener, &mut ());
        (to, received)
    });
    let sent = source.run(&mut vm, &connect, &mut ());
    drop(connect);
    if sent.is_err() && mode.sets_up(progress.snapshot().phase) {
        // It waits for another source, or for channels that will not come: until a limit passes, and here is no clock.
        limit.cancel();
    }
    let (to, received) = destination.join().unwrap();
    guest.join().unwrap();
    let cancelling = std::mem::take(&mut *lock(&cancelling));
    cancelling.into_iter().for_each(|thread| thread.join().unwrap());
    let go = *lock(&go);
    let outcome = Outcome { vm, to, sent, received, mode, go, trace };
    if !is_broken {
        // However it ended.
        outcome.assert_allowed();
    }
    outcome
}

fn assert_same(vm: &TestSource, to: &TestDestination) {
    for page in pages() {
        let (source, destination) = (vm.writer_ram().page_bytes(page), to.ram.page_bytes(page));
        assert!(source == destination, "page {page} differs: {} instead of {}", destination[0], source[0]);
    }
}

impl Outcome {
    /// Asserts that each step was one of the machine that is proved.
    fn assert_allowed(&self) -> machine::Machine {
        match machine::check(&self.trace.steps(), self.mode.channels.into()) {
            Ok(machine) => machine,
            Err(refused) => panic!("{refused}"),
        }
    }

    fn assert_migrated(&self) {
        let failures: Vec<String> =
            self.sent.as_ref().err().into_iter().chain(self.received.as_ref().err()).map(ToString::to_string).collect();
        assert!(failures.is_empty(), "{failures:?}");
        assert_same(&self.vm, &self.to);
        let findings = self.received.as_ref().unwrap().audit.as_ref().unwrap();
        assert_eq!(findings.stale_writes, 0, "a page differs in its round: {:?}", findings.first);
        let loads = vec!["load"; 2 + self.to.live.len()];
        assert_eq!(self.to.calls(), [&["prepare"], &loads[..], &["start"]].concat());
        state::assert_state(&self.vm, &self.to);
        assert!(!self.vm.writer.is_running(), "the VM belongs to the destination");
    }

    /// Asserts that the guest is in exactly one place, and whole there: it runs at the destination, or at the source, or
    /// it is paused at the source, in doubt, because the destination was allowed to start it. Returns which.
    fn settle(self) -> Ending {
        let runs_there = self.to.calls().contains(&"start") && self.to.fail != Some("start");
        let runs_here = self.vm.writer.is_running();
        assert!(!(runs_here && runs_there), "the guest runs on both sides: {:?}", self.sent.as_ref().err());
        assert_eq!(
            runs_there,
            self.received.is_ok(),
            "what the destination reports: {:?}",
            self.received.as_ref().err()
        );
        match &self.sent {
            Ok(_) => {
                self.assert_migrated();
                Ending::Moved
            }
            Err(error @ Error::InDoubt { .. }) => {
                assert!(!runs_here, "the guest runs in doubt: {error}");
                assert!(self.go || self.mode.peer == Peer::Qemu, "in doubt without GO: {error}");
                if runs_there {
                    assert_same(&self.vm, &self.to);
                    return Ending::InDoubtThere;
                }
                // An operator sees that it does not run there.
                let mut resumed = self;
                resumed.vm.resume().unwrap();
                resumed.try_again();
                Ending::InDoubtHere
            }
            Err(error) => {
                assert!(runs_here, "the guest runs nowhere after {error}");
                self.try_again();
                Ending::Stayed
            }
        }
    }

    /// Asserts that the guest of the source is whole: it can be migrated.
    fn try_again(self) {
        let (mut vm, mode) = (self.vm, self.mode);
        vm.fail_at = None;
        let to = TestDestination::new(ram());
        migrate(vm, to, mode, mode.source(), receiving(), Beside::default()).assert_migrated();
    }
}

/// Where the guest is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    /// At the destination, and the source knows it.
    Moved,
    /// At the source.
    Stayed,
    /// At the destination; paused in doubt at the source.
    InDoubtThere,
    /// Nowhere else; paused in doubt at the source.
    InDoubtHere,
}

/// How often which ending was seen.
#[derive(Default)]
struct Endings([Plain; 4]);

impl Endings {
    fn count(&self, ending: Ending) {
        self.0[ending as usize].fetch_add(1, PlainRelaxed);
    }

    fn of(&self, ending: Ending) -> u64 {
        self.0[ending as usize].load(PlainRelaxed)
    }

    fn text(&self) -> String {
        let names = ["moved", "stayed", "in doubt and there", "in doubt and not there"];
        let seen = names.iter().zip(&self.0).map(|(name, count)| format!("{name} {}", count.load(PlainRelaxed)));
        seen.collect::<Vec<_>>().join(", ")
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

/// Runs `body` under random and under PCT schedules. Returns how the migrations ended.
fn explore_endings(name: &str, count: usize, body: impl Fn() -> Outcome + Send + Sync + 'static) -> Arc<Endings> {
    let endings = Arc::new(Endings::default());
    let counted = endings.clone();
    let text = endings.clone();
    explore_and_tell(name, count, move || counted.count(body().settle()), move || format!(": {}", text.text()));
    endings
}

/// Runs `body` under random and under PCT schedules.
pub(super) fn explore(name: &str, count: usize, body: impl Fn() + Send + Sync + 'static) {
    explore_and_tell(name, count, body, String::new);
}

fn explore_and_tell(name: &str, count: usize, body: impl Fn() + Send + Sync + 'static, tell: impl FnOnce() -> String) {
    let begun = Instant::now();
    let (count, body) = (schedules(count), Arc::new(body));
    let random = body.clone();
    Runner::new(RandomScheduler::new(count), config()).run(move || random());
    Runner::new(PctScheduler::new(PCT_DEPTH, count), config()).run(move || body());
    let seconds = begun.elapsed().as_secs_f64();
    test_support::report(
        "proof",
        &format!("shuttle | {name} | {} schedules{} | - | {seconds:.1} s", 2 * count, tell()),
    );
}

/// Asserts that some schedule makes `body` fail with a message that contains `how`.
pub(super) fn must_be_caught(name: &str, how: &str, body: impl Fn() + Send + Sync + 'static) {
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
            let outcome = migrate(source_vm(), to, mode, mode.source(), receiving(), Beside::default());
            outcome.assert_migrated();
            let seen = outcome.assert_allowed();
            assert!(seen.started && seen.applied >= pages().len(), "{seen:?}");
        });
    }
}

/// A destination whose source lets a few channels take pages at first, and the others wait for their turn.
fn far() -> Beside {
    let away = Duration::from_millis(1);
    let connect = move |inner| Box::new(Far::new(inner, |_| Some(Box::new(|| Ok(0u64)) as _)).away(away)) as _;
    Beside { connect: Box::new(connect), ..Default::default() }
}

/// Whether a channel has its turn or none, and however the migration ends meanwhile.
#[test]
fn channels_that_wait_for_their_turn_leave_one_guest() {
    for (name, mode) in [("FLUSH early", EARLY), ("per section", PER_SECTION), ("one step", ONE_STEP)] {
        let mode = Mode { channels: 3, ..mode };
        explore(&format!("channels in turn, {name}"), 300, move || {
            let outcome = migrate(source_vm(), TestDestination::new(ram()), mode, mode.source(), receiving(), far());
            outcome.assert_migrated();
            outcome.assert_allowed();
        });
        explore_endings(&format!("channels in turn, a cancel, {name}"), 150, move || {
            let beside = Beside { cancel_source: true, cancel_after: thread_rng().gen_range(0..60), ..far() };
            migrate(source_vm(), TestDestination::new(ram()), mode, mode.source(), receiving(), beside)
        });
    }
}

#[test]
fn cancels_at_any_moment_leave_one_guest() {
    let modes =
        [("FLUSH early", EARLY), ("per section", PER_SECTION), ("legacy zero pages", LEGACY), ("one step", ONE_STEP)];
    for (name, mode) in modes {
        for (side, cancel_source, cancel_destination) in
            [("the source", true, false), ("the destination", false, true), ("both ends", true, true)]
        {
            let endings = explore_endings(&format!("cancel at {side}, {name}"), 150, move || {
                let cancel_after = thread_rng().gen_range(0..60);
                let beside = Beside { cancel_source, cancel_destination, cancel_after, ..Default::default() };
                migrate(source_vm(), TestDestination::new(ram()), mode, mode.source(), receiving(), beside)
            });
            // A destination that is cancelled says so before it goes.
            let doubts = endings.of(Ending::InDoubtHere) + endings.of(Ending::InDoubtThere);
            assert!(cancel_source || doubts == 0, "{name}: {}", endings.text());
        }
    }
}

#[test]
fn whatever_happens_to_go_leaves_one_guest() {
    let explore = |at_go| {
        explore_endings(&format!("GO: {at_go:?}"), 200, move || {
            let beside = Beside { at_go, ..Default::default() };
            migrate(source_vm(), TestDestination::new(ram()), EARLY, EARLY.source(), receiving(), beside)
        })
    };
    for at_go in [AtGo::Lost, AtGo::Cut] {
        let endings = explore(at_go);
        assert_eq!(
            endings.text(),
            format!("moved 0, stayed 0, in doubt and there 0, in doubt and not there {}", 2 * schedules(200))
        );
    }
    for at_go in [AtGo::Reset, AtGo::Failed, AtGo::SourceCancelled, AtGo::DestinationCancelled] {
        let endings = explore(at_go);
        // Nothing but a refusal would allow that, and this destination has no reason for one.
        assert!(endings.of(Ending::Stayed) == 0 || matches!(at_go, AtGo::DestinationCancelled), "{}", endings.text());
        assert!(endings.of(Ending::Moved) + endings.of(Ending::InDoubtThere) > 0, "{}", endings.text());
        let doubts = endings.of(Ending::InDoubtHere);
        assert!(doubts == 0 || !matches!(at_go, AtGo::DestinationCancelled), "{}", endings.text());
    }
}

#[test]
fn a_channel_that_fails_at_any_operation_leaves_one_guest() {
    for (name, mode) in
        [("FLUSH late", LATE), ("FLUSH early", EARLY), ("SYNC with pages", CARRYING), ("one step", ONE_STEP)]
    {
        explore_endings(&format!("a channel fails at the k-th operation, {name}"), 300, move || {
            let connection = thread_rng().gen_range(1..=usize::from(mode.channels));
            let fault = Fault::new(Some(connection), thread_rng().gen_range(0..14));
            migrate(source_vm(), TestDestination::new(ram()), mode, mode.source(), receiving(), fault.at_source())
        });
    }
}

#[test]
fn main_that_fails_at_any_operation_leaves_one_guest() {
    for (name, mode) in [("FLUSH early", EARLY), ("per section", PER_SECTION), ("one step", ONE_STEP)] {
        explore_endings(&format!("main fails at the k-th operation of the source, {name}"), 300, move || {
            let fault = Fault::new(Some(0), thread_rng().gen_range(0..40));
            migrate(source_vm(), TestDestination::new(ram()), mode, mode.source(), receiving(), fault.at_source())
        });
    }
    explore_endings("main fails at the k-th operation of the destination", 300, || {
        let fault = Fault::new(Some(0), thread_rng().gen_range(0..40));
        migrate(source_vm(), TestDestination::new(ram()), EARLY, EARLY.source(), receiving(), fault.at_destination())
    });
}

#[test]
fn a_failing_callback_of_either_vm_leaves_one_guest() {
    explore_endings("a call to the source's VM fails", 300, || {
        let mut vm = source_vm();
        vm.fail_at = Some(thread_rng().gen_range(0..9));
        migrate(vm, TestDestination::new(ram()), EARLY, EARLY.source(), receiving(), Beside::default())
    });
    for call in ["load", "start"] {
        for (name, mode) in [("FLUSH early", EARLY), ("per section", PER_SECTION)] {
            let endings = explore_endings(&format!("the destination's VM does not {call}, {name}"), 150, move || {
                let mut to = TestDestination::new(ram());
                to.fail = Some(call);
                let outcome = migrate(source_vm(), to, mode, mode.source(), receiving(), Beside::default());
                match &outcome.received {
                    Err(Error::Load { .. }) if call == "load" => {}
                    Err(Error::Vm { call: "start", .. }) if call == "start" => {}
                    other => panic!("{other:?}"),
                }
                outcome
            });
            // The source is told, also after GO.
            assert_eq!(endings.of(Ending::Stayed), 2 * schedules(150) as u64, "{}", endings.text());
        }
    }
}

#[test]
fn in_one_step_a_destination_whose_vm_does_not_start_has_all_of_it() {
    explore("the destination's VM does not start, one step", 300, move || {
        let mut to = TestDestination::new(ram());
        to.fail = Some("start");
        let outcome = migrate(source_vm(), to, ONE_STEP, ONE_STEP.source(), receiving(), Beside::default());
        // The VM was confirmed by then: the source must not run it, whatever becomes of it over there.
        let failure = outcome.received.as_ref().unwrap_err();
        assert!(matches!(failure, Error::Vm { call: "start", .. }), "{failure}");
        assert!(outcome.sent.is_ok(), "{:?}", outcome.sent.as_ref().err());
        assert!(!outcome.vm.writer.is_running(), "the VM belongs to the destination");
        assert_eq!(outcome.to.calls(), ["prepare", "load", "load", "start"]);
        assert_same(&outcome.vm, &outcome.to);
    });
}

#[test]
fn a_source_that_vanishes_leaves_one_guest_and_no_destination_waiting() {
    for (name, mode) in
        [("FLUSH late", LATE), ("FLUSH early", EARLY), ("per section", PER_SECTION), ("one step", ONE_STEP)]
    {
        let endings = explore_endings(&format!("a source that vanishes at any byte, {name}"), 300, move || {
            // Most migrations say a little less; whatever is cut later is cut after the end.
            let left = Arc::new(Mutex::new(thread_rng().gen_range(0..90_000)));
            let connect = move |inner| Box::new(Vanishing { inner, left: left.clone(), all: Arc::default() }) as _;
            let beside = Beside { connect: Box::new(connect), ..Default::default() };
            migrate(source_vm(), TestDestination::new(ram()), mode, mode.source(), receiving(), beside)
        });
        assert!(endings.of(Ending::Stayed) > 0, "no source vanished in the middle: {}", endings.text());
    }
}

#[test]
fn a_destination_that_vanishes_leaves_one_guest_and_no_source_waiting() {
    for (name, mode) in [("FLUSH late", LATE), ("FLUSH early", EARLY), ("per section", PER_SECTION)] {
        let endings =
            explore_endings(&format!("a destination that vanishes at any operation, {name}"), 300, move || {
                let fault = Fault::new(None, thread_rng().gen_range(0..120));
                migrate(
                    source_vm(),
                    TestDestination::new(ram()),
                    mode,
                    mode.source(),
                    receiving(),
                    fault.at_destination(),
                )
            });
        assert!(endings.of(Ending::Stayed) > 0, "no destination vanished in the middle: {}", endings.text());
    }
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
                accepted.extend(listener.accept(None).and_then(|pending| pending.establish(None)));
            }
            if let Some(stream) = accepted.get_mut(which) {
                // Ends early where the source has.
                let _ = stream.read_exact(&mut vec![0; bytes]);
            }
        });
        // It answers nothing, so the source must not wait for an answer.
        let mut options = EARLY.source();
        options.peer = Peer::Qemu;
        let sent = Source::new(options).run(&mut vm, &connector, &mut ());
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
fn the_machine_of_the_proof_does_not_allow_what_broken_destinations_do() {
    for (name, broken, mode) in [
        ("destination without barrier", Broken::NoBarrier, EARLY),
        ("barrier released one party early", Broken::BarrierShort, EARLY),
        ("pages of SYNC packets dropped", Broken::SyncPagesDropped, CARRYING),
    ] {
        must_be_caught(&format!("{name}, by its steps"), "is not allowed", move || {
            let receiving = destination::Options { broken: Some(broken), ..receiving() };
            let outcome =
                migrate(source_vm(), TestDestination::new(ram()), mode, mode.source(), receiving, Beside::default());
            outcome.assert_allowed();
        });
    }
}

/// The steps show a broken barrier also where no page was overtaken.
#[test]
fn steps_that_are_not_allowed_are_found_where_memory_is_equal() {
    let (refused, equal) = (Arc::new(Plain::new(0)), Arc::new(Plain::new(0)));
    let counted = (refused.clone(), equal.clone());
    let count = schedules(300);
    Runner::new(PctScheduler::new(PCT_DEPTH, count), config()).run(move || {
        let receiving = destination::Options { broken: Some(Broken::NoBarrier), ..receiving() };
        let outcome =
            migrate(source_vm(), TestDestination::new(ram()), EARLY, EARLY.source(), receiving, Beside::default());
        if machine::check(&outcome.trace.steps(), EARLY.channels.into()).is_err() {
            counted.0.fetch_add(1, PlainRelaxed);
            let same =
                pages().iter().all(|&page| outcome.vm.writer_ram().page_bytes(page) == outcome.to.ram.page_bytes(page));
            counted.1.fetch_add(same.into(), PlainRelaxed);
        }
    });
    let (refused, equal) = (refused.load(PlainRelaxed), equal.load(PlainRelaxed));
    test_support::report(
        "proof",
        &format!(
            "shuttle | broken: no barrier, found by its steps while memory is equal | {equal} of {refused} schedules of {count} | caught | -"
        ),
    );
    assert!(equal > 0, "{refused} of {count} schedules had such steps");
}

#[test]
fn tracking_that_starts_late_is_caught() {
    must_be_caught("tracking starts after reading", "differs", || {
        let mut options = EARLY.source();
        options.broken = Some(Broken::TrackingStartsLate);
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
