//! Every operation of a small migration goes wrong once, on each connection, on either side; and every call of either VM.
//!
//! Afterwards the guest belongs to exactly one side, with its memory as it should be; both sides have ended all threads;
//! and wherever the guest is still at the source, a second attempt succeeds. Two cases are open by nature of a network, see
//! [`Owner`].

use std::{
    collections::BTreeMap,
    io,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use multifd_proto::{
    Codec,
    machine::{Dialect, ZeroPages},
    return_path::Message,
};
use test_support::{report, time_limit};

use crate::{
    destination::{self, Destination},
    error::Error,
    progress::Phase,
    ram::Ram,
    source::{self, Source},
    sync::Arc,
    testing::trace::Trace,
    testing::vm::{TestDestination, TestSource},
    testing::{
        faulty::{Fault, Faults},
        memory::{self, MemoryConnector, MemoryListener},
    },
    testing::{machine, main_alone},
    threads::{StdThreads, Threads},
    transport::{Connect, Listen, Pending, RecvHalf, SendHalf, Stopper, Stream, wrapped},
    vm::SourceVm,
};

pub(super) const BLOCKS: [(&str, usize); 2] = [("ram", 90), ("rom", 1)];
pub(super) const CHANNELS: u8 = 2;

/// A plan for each connection, main first. Which connection an operation belongs to is then not up to the threads.
#[derive(Clone)]
pub(super) struct Plans(pub(super) Vec<Faults>);

impl Plans {
    /// Nothing goes wrong.
    pub(super) fn none() -> Plans {
        Plans((0..=CHANNELS).map(|_| Faults::new()).collect())
    }

    /// `fault` at operation `operation` of `connection`.
    pub(super) fn one(connection: usize, operation: u64, fault: Fault) -> Plans {
        let mut plans = Plans::none();
        plans.0[connection] = Faults::new().at(operation, fault);
        plans
    }
}

/// One end of a migration whose connections have the faults of their plans.
struct Planned<T> {
    inner: T,
    plans: Plans,
    next: AtomicUsize,
}

impl<T> Planned<T> {
    fn new(inner: T, plans: Plans) -> Planned<T> {
        Planned { inner, plans, next: AtomicUsize::new(0) }
    }

    fn wrap(&self, pending: Box<dyn Pending>) -> Box<dyn Pending> {
        let plan = self.plans.0.get(self.next.fetch_add(1, SeqCst)).cloned().unwrap_or_default();
        wrapped(pending, move |stream| Ok(Box::new(plan.stream(stream))))
    }
}

impl Connect for Planned<MemoryConnector> {
    fn dial(&self) -> io::Result<Box<dyn Pending>> {
        Ok(self.wrap(self.inner.dial()?))
    }
}

impl Listen for Planned<MemoryListener> {
    fn accept(&mut self, timeout: Option<Duration>) -> io::Result<Box<dyn Pending>> {
        let stream = self.inner.accept(timeout)?;
        Ok(self.wrap(stream))
    }

    fn try_accept(&mut self) -> io::Result<Option<Box<dyn Pending>>> {
        Ok(self.inner.try_accept()?.map(|stream| self.wrap(stream)))
    }

    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        self.inner.stopper()
    }
}

/// A guest that writes while it moves, and what its memory has to hold.
pub(super) struct Guest {
    pub(super) vm: TestSource,
    /// What was written to each page, by the guest itself.
    written: Arc<Mutex<BTreeMap<u64, u64>>>,
}

impl Guest {
    pub(super) fn new() -> Guest {
        let mut vm = TestSource::new(Ram::for_test(&BLOCKS));
        let written = Arc::new(Mutex::new(BTreeMap::new()));
        let log = written.clone();
        let mut value = 0;
        vm.at_drain = Box::new(move |writer| {
            for page in [3, 4, 30, 31, 80 + value % 7] {
                value += 1;
                if writer.write(page, value) {
                    log.lock().unwrap().insert(page, value);
                }
            }
        });
        for page in (0..90).step_by(2) {
            vm.writer.write(page, 1000 + page);
            written.lock().unwrap().insert(page, 1000 + page);
        }
        Guest { vm, written }
    }

    /// Asserts that `ram` holds what the guest wrote, and nothing else.
    fn check(&self, ram: &Ram, context: &str) {
        let written = self.written.lock().unwrap();
        for page in ram.layout().blocks().iter().flat_map(|block| block.page_range()) {
            let value = written.get(&page).copied().unwrap_or(0);
            assert!(ram.page_bytes(page) == value.to_ne_bytes().repeat(512), "{context}: page {page} differs");
        }
    }
}

/// Both sides' plans and what else may go wrong.
pub(super) struct Attempt {
    pub(super) source: Plans,
    pub(super) destination: Plans,
    pub(super) options: source::Options,
    /// The call of the destination's VM that fails.
    pub(super) load_fails_at: Option<usize>,
    /// It panics instead.
    pub(super) load_panics: bool,
    /// How the destination's threads are made.
    pub(super) receiving_threads: Arc<dyn Threads>,
}

impl Attempt {
    pub(super) fn new(options: source::Options) -> Attempt {
        Attempt {
            source: Plans::none(),
            destination: Plans::none(),
            options,
            load_fails_at: None,
            load_panics: false,
            receiving_threads: Arc::new(StdThreads),
        }
    }
}

pub(super) struct Outcome {
    pub(super) sent: Result<source::Report, Error>,
    pub(super) received: Result<destination::Report, Error>,
    pub(super) to: TestDestination,
}

/// Migrates `guest` as `attempt` says, and calls `meanwhile` with what cancels either side.
pub(super) fn migrate(
    guest: &mut Guest,
    attempt: Attempt,
    meanwhile: impl FnOnce(&crate::stop::StopHandle, &crate::stop::StopHandle) + Send,
) -> Outcome {
    time_limit(Duration::from_secs(120), || {
        let (listener, connector) = memory::listener(1 << 15);
        let connector = Planned::new(connector, attempt.source);
        let listener = Planned::new(listener, attempt.destination);
        let ram = Ram::for_test(&BLOCKS);
        let mut to = TestDestination::new(ram.clone());
        to.fail_at = attempt.load_fails_at;
        to.panics = attempt.load_panics;
        let trace = Trace::recording();
        let mut options = attempt.options;
        options.trace = trace.clone();
        let channels = options.plan.channels;
        let receiving = destination::Options {
            channels: Some(channels),
            trace: trace.clone(),
            threads: attempt.receiving_threads,
            // Channels that broke before they joined are waited for.
            setup_timeout: Some(Duration::from_secs(3)),
            ..Default::default()
        };
        let (source, destination) = (Source::new(options), Destination::new(receiving));
        let (stop_source, stop_destination) = (source.stop_handle(), destination.stop_handle());
        let (waiting, progress) = (destination.stop_handle(), destination.progress());
        let before = guest.vm.writer_ram().handles();
        let (sent, received) = std::thread::scope(|scope| {
            let meanwhile = scope.spawn(move || meanwhile(&stop_source, &stop_destination));
            let to = &mut to;
            let receiving = scope.spawn(move || destination.run(to, Box::new(listener), &mut ()));
            let sent = source.run(&mut guest.vm, &connector, &mut ());
            drop(connector);
            // A source that has ended before it said that it is one leaves the destination waiting for one. Any other is
            // noticed, in its own time.
            let still_waits =
                || matches!(progress.snapshot().phase, None | Some(Phase::Connect)) && !receiving.is_finished();
            let begin = Instant::now();
            while sent.is_err() && still_waits() {
                if begin.elapsed() > Duration::from_millis(500) {
                    waiting.cancel();
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            let received = receiving.join().unwrap();
            meanwhile.join().unwrap();
            (sent, received)
        });
        assert_eq!(guest.vm.writer_ram().handles(), before, "a thread of the source still has the memory");
        assert_eq!(ram.handles(), 2, "a thread of the destination still has the memory");
        // Whatever went wrong, each step was one of the machine that is proved.
        let checked = match channels {
            0 => main_alone::check(&trace.steps()),
            _ => machine::check(&trace.steps(), channels.into()),
        };
        match checked {
            Ok(machine) => assert!(received.is_err() || (machine.started && machine.applied > 0), "{machine:?}"),
            Err(refused) => panic!("{refused}"),
        }
        Outcome { sent, received, to }
    })
}

/// Who has the guest after a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Owner {
    Source,
    Destination,
    /// The source does not know whether the destination has it, and says so. It is paused there, unharmed.
    InDoubt,
}

/// Asserts all that has to hold after a migration with a fault, and finds the owner of the guest.
pub(super) fn settle(guest: &mut Guest, outcome: Outcome, context: &str) -> Owner {
    let Outcome { sent, received, to } = outcome;
    let here = guest.vm.writer.is_running();
    let started = to.calls().contains(&"start");
    let there = started && received.is_ok();
    let calls = to.calls();
    // A destination without an answer, or whose start panicked.
    let may_run = received.is_err() && (matches!(received, Err(Error::InDoubt { .. })) || (started && to.panics));
    assert!(!(here && may_run), "{context}: it may run at the destination, too: {received:?}");
    let abandoned = calls.contains(&"prepare") && received.is_err() && !may_run;
    assert_eq!(calls.iter().filter(|call| **call == "abandon").count(), usize::from(abandoned), "{context}: {calls:?}");
    assert!(!abandoned || calls.last() == Some(&"abandon"), "{context}: {calls:?}");
    let owner = match (here, there) {
        (true, false) => Owner::Source,
        (false, true) => Owner::Destination,
        (true, true) => panic!("{context}: both run after {sent:?}"),
        (false, false) => Owner::InDoubt,
    };
    guest.check(&guest.vm.writer_ram(), context);
    match owner {
        Owner::Source => {
            assert!(sent.is_err(), "{context}: {sent:?}");
            assert!(received.is_err(), "{context}: {received:?}");
        }
        Owner::Destination => {
            guest.check(&to.ram, context);
            if let Err(error) = &sent {
                assert!(matches!(error, Error::InDoubt { .. }), "{context}: {error}");
            }
        }
        Owner::InDoubt => assert!(matches!(sent, Err(Error::InDoubt { .. })), "{context}: {sent:?}"),
    }
    // An operator who finds out that the destination does not have it may resume it.
    if owner == Owner::InDoubt {
        guest.vm.resume().unwrap();
    }
    if matches!(owner, Owner::Source | Owner::InDoubt) {
        guest.vm.fail_at = None;
        let again = migrate(guest, Attempt::new(small()), |_, _| {});
        again.received.unwrap_or_else(|error| panic!("{context}: the second attempt: {error}"));
        again.sent.unwrap_or_else(|error| panic!("{context}: the second attempt: {error}"));
        guest.check(&again.to.ram, context);
        assert!(!guest.vm.writer.is_running());
    }
    owner
}

pub(super) fn small() -> source::Options {
    let mut options = source::Options::default();
    options.plan.channels = CHANNELS;
    options
}

/// In which modes the operations are gone through: they differ in what main does.
pub(super) fn modes() -> Vec<(&'static str, source::Options)> {
    let mut per_section = small();
    per_section.qemu.dialect = Dialect::PerSection;
    per_section.qemu.zero_pages = ZeroPages::Legacy;
    let mut main_alone = small();
    main_alone.plan.channels = 0;
    vec![("per round", small()), ("per section, legacy zero pages", per_section), ("main alone", main_alone)]
}

pub(super) fn print(table: &str, injected: usize, owners: &BTreeMap<Owner, usize>) {
    let count = |owner| owners.get(&owner).copied().unwrap_or(0);
    // A guest that nobody has, and nobody says so, fails the tests above before this is printed.
    let row = format!(
        "{table}: faults injected {injected}, guests lost 0, doubled 0; still at the source {}, at the destination {}, in \
         doubt and paused {}",
        count(Owner::Source),
        count(Owner::Destination),
        count(Owner::InDoubt),
    );
    report("faults", &row);
}

#[test]
fn each_operation_of_each_connection_goes_wrong_once_on_either_side() {
    let (mut injected, mut owners) = (0, BTreeMap::new());
    for (mode, options) in modes() {
        for on_source in [true, false] {
            for connection in 0..=usize::from(options.plan.channels) {
                // Into the payload of a packet; not all of SHUT, which no kernel sends and then calls it an error.
                let long = if connection == 0 { 7 } else { 2000 };
                for fault in [
                    Fault::Fail(io::ErrorKind::TimedOut),
                    Fault::Cut,
                    Fault::Shorten(1),
                    Fault::Shorten(long),
                    Fault::Delay(Duration::from_millis(2)),
                ] {
                    for operation in 0.. {
                        let plans = Plans::one(connection, operation, fault.clone());
                        let plan = plans.0[connection].clone();
                        let mut attempt = Attempt::new(options.clone());
                        *(if on_source { &mut attempt.source } else { &mut attempt.destination }) = plans;
                        let side = if on_source { "source" } else { "destination" };
                        let context =
                            format!("{mode}, {side}, connection {connection}, operation {operation}, {fault:?}");
                        let mut guest = Guest::new();
                        let outcome = migrate(&mut guest, attempt, |_, _| {});
                        // All operations have had their turn, and this one did not happen any more.
                        if plan.operations() <= operation {
                            assert!(operation > 5, "{context}: there are only so many");
                            outcome.sent.unwrap();
                            outcome.received.unwrap();
                            break;
                        }
                        let owner = settle(&mut guest, outcome, &context);
                        if matches!(fault, Fault::Delay(_)) {
                            assert_eq!(owner, Owner::Destination, "{context}: a delay is no failure");
                        }
                        injected += 1;
                        *owners.entry(owner).or_insert(0) += 1;
                    }
                }
            }
        }
    }
    print("connections", injected, &owners);
    assert!(injected > 300, "{injected}");
    assert!(owners.contains_key(&Owner::Source) && owners.contains_key(&Owner::Destination));
}

#[test]
fn a_connection_that_is_slow_throughout_loses_nothing() {
    for on_source in [true, false] {
        for connection in 0..=usize::from(CHANNELS) {
            let mut attempt = Attempt::new(small());
            let side = if on_source { &mut attempt.source } else { &mut attempt.destination };
            side.0[connection] = Faults::new().from(0, Fault::Delay(Duration::from_millis(1)));
            let mut guest = Guest::new();
            let outcome = migrate(&mut guest, attempt, |_, _| {});
            assert_eq!(settle(&mut guest, outcome, "slow"), Owner::Destination);
        }
    }
}

/// A connection whose last answer is lost: whoever reads it gets an error in its place.
struct Deaf<S: ?Sized = dyn Stream> {
    error: io::ErrorKind,
    stream: Box<S>,
}

impl SendHalf for Deaf {
    fn write(&mut self, header: &[u8], pages: &[crate::ram::GuestRange<'_>]) -> io::Result<()> {
        self.stream.write(header, pages)
    }

    fn finish(&mut self) -> io::Result<()> {
        self.stream.finish()
    }
}

impl<S: RecvHalf + ?Sized> RecvHalf for Deaf<S> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.stream.read(buf)?;
        let mut shut = Vec::new();
        Message::Shut(0).encode(&mut shut);
        if buf[..n].ends_with(&shut) { Err(self.error.into()) } else { Ok(n) }
    }

    fn read_pages(&mut self, pages: &[crate::ram::GuestRange<'_>]) -> io::Result<()> {
        self.stream.read_pages(pages)
    }

    fn interrupter(&mut self) -> io::Result<Box<dyn Stopper>> {
        self.stream.interrupter()
    }
}

impl Stream for Deaf {
    fn split(self: Box<Self>) -> io::Result<(Box<dyn SendHalf>, Box<dyn RecvHalf>)> {
        let Deaf { error, stream } = *self;
        let (sends, stream) = stream.split()?;
        Ok((sends, Box::new(Deaf { error, stream })))
    }

    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        self.stream.stopper()
    }

    fn peer(&self) -> String {
        self.stream.peer()
    }
}

struct DeafConnector {
    inner: MemoryConnector,
    error: io::ErrorKind,
}

impl Connect for DeafConnector {
    fn dial(&self) -> io::Result<Box<dyn Pending>> {
        let error = self.error;
        Ok(wrapped(self.inner.dial()?, move |stream| Ok(Box::new(Deaf { error, stream }))))
    }
}

/// The guest would run twice, if the source took every broken connection for a destination that has died: both would
/// write to its disks.
#[test]
fn a_confirmation_that_is_lost_on_the_way_does_not_start_the_guest_twice() {
    for error in [
        io::ErrorKind::TimedOut,
        io::ErrorKind::HostUnreachable,
        io::ErrorKind::Other,
        io::ErrorKind::ConnectionReset,
        io::ErrorKind::UnexpectedEof,
    ] {
        let mut guest = Guest::new();
        let (listener, inner) = memory::listener(1 << 15);
        let mut to = TestDestination::new(Ram::for_test(&BLOCKS));
        let (sent, received) = time_limit(Duration::from_secs(60), || {
            std::thread::scope(|scope| {
                let to = &mut to;
                let receiving =
                    scope.spawn(|| Destination::new(Default::default()).run(to, Box::new(listener), &mut ()));
                let sent = Source::new(small()).run(&mut guest.vm, &DeafConnector { inner, error }, &mut ());
                (sent, receiving.join().unwrap())
            })
        });
        assert!(sent.is_err());
        let owner = settle(&mut guest, Outcome { sent, received, to }, &format!("{error:?}"));
        assert_eq!(owner, Owner::Destination, "{error:?}");
        assert!(!guest.vm.calls().contains(&"resume"), "{error:?}");
    }
}

#[test]
fn each_call_of_the_source_vm_fails_once() {
    let (mut injected, mut owners) = (0, BTreeMap::new());
    for (mode, options) in modes() {
        for call in 0.. {
            let mut guest = Guest::new();
            guest.vm.fail_at = Some(call);
            let outcome = migrate(&mut guest, Attempt::new(options.clone()), |_, _| {});
            if outcome.sent.is_ok() {
                assert!(call > 5);
                break;
            }
            let context = format!("{mode}, call {call}");
            assert!(outcome.sent.as_ref().unwrap_err().to_string().contains("told to fail"), "{context}");
            let owner = settle(&mut guest, outcome, &context);
            assert_eq!(owner, Owner::Source, "{context}");
            injected += 1;
            *owners.entry(owner).or_insert(0) += 1;
        }
    }
    print("calls of the source VM", injected, &owners);
}

#[test]
fn each_call_of_the_destination_vm_fails_once() {
    let (mut injected, mut owners) = (0, BTreeMap::new());
    for call in 0.. {
        let mut guest = Guest::new();
        let attempt = Attempt { load_fails_at: Some(call), ..Attempt::new(small()) };
        let outcome = migrate(&mut guest, attempt, |_, _| {});
        if outcome.received.is_ok() {
            assert_eq!(call, 4, "the VM is made, two devices are loaded, then it is started");
            break;
        }
        let owner = settle(&mut guest, outcome, &format!("call {call}"));
        // The source is told after the start: what cannot start there runs on here.
        assert_eq!(owner, Owner::Source, "call {call}");
        injected += 1;
        *owners.entry(owner).or_insert(0) += 1;
    }
    print("calls of the destination VM", injected, &owners);
}
