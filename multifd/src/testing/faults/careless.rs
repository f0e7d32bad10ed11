//! What a careless embedder does: callbacks that panic where the migration ends, memory that changes, clocks that go back, closures that
//! ask for what they change.

use std::{
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

use test_support::time_limit;

use super::injected::small;
use crate::{
    clock::Clock,
    destination::{self, Destination},
    dirty::DirtyLog,
    dirty_bitmap::DirtyBitmap,
    error::{Error, Mismatch},
    ram::{GuestRange, Ram},
    sections::Sections,
    source::{self, Source},
    testing::{
        memory::{self, MemoryListener},
        vm::{TestDestination, TestSource},
    },
    transport::{Connect, Listen, Pending, RecvHalf, SendHalf, Stopper, Stream, wrapped},
    vm::{DestinationVm, SectionId, SourceVm, VmError},
};

const BLOCKS: [(&str, usize); 1] = [("ram", 40)];

/// What goes wrong at the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AtSource {
    Nothing,
    /// `save` fails, and so the lock of its log is poisoned, as far as it goes: the log's `stop` panics.
    LogStopPanics,
    /// The same without a failure before.
    LogStopPanicsAtTheEnd,
    /// `save` fails, and `resume` panics.
    ResumePanics,
    /// It has another block once it is paused.
    MemoryAdded,
    /// It has the same memory in another `Ram`.
    MemoryPutTogetherAgain,
    /// The log returns a set of its own, for more pages than there are.
    LogReturnsAnotherSet,
    /// The end of a channel waits until the connection is stopped.
    TheEndIsNotTaken,
}

/// A VM with such a fault.
struct Careless {
    vm: TestSource,
    fault: AtSource,
    other: Ram,
    paused: bool,
}

impl Careless {
    fn new(fault: AtSource) -> Careless {
        let mut vm = TestSource::new(Ram::for_test(&BLOCKS));
        if matches!(fault, AtSource::LogStopPanics | AtSource::ResumePanics) {
            vm.at_save = Some(Box::new(|_| Err("told to fail".into())));
        }
        let other = match fault {
            AtSource::MemoryPutTogetherAgain => vm.writer_ram().put_together_again(),
            _ => Ram::for_test(&[BLOCKS[0], ("hotplugged", 3)]),
        };
        Careless { vm, fault, other, paused: false }
    }
}

impl SourceVm for Careless {
    fn ram(&self) -> &Ram {
        let changes = matches!(self.fault, AtSource::MemoryAdded | AtSource::MemoryPutTogetherAgain);
        if changes && self.paused { &self.other } else { self.vm.ram() }
    }

    fn dirty_log(&mut self) -> &mut dyn DirtyLog {
        self
    }

    fn pause(&mut self) -> Result<(), VmError> {
        self.paused = true;
        self.vm.pause()
    }

    fn save(&mut self, out: &mut Sections) -> Result<(), VmError> {
        self.vm.save(out)
    }

    fn resume(&mut self) -> Result<(), VmError> {
        assert!(self.fault != AtSource::ResumePanics, "told to panic at resume");
        self.vm.resume()
    }
}

impl DirtyLog for Careless {
    fn name(&self) -> &'static str {
        "careless"
    }

    fn start(&mut self, ram: &Ram) -> io::Result<()> {
        self.vm.start(ram)
    }

    fn drain(&mut self, into: &mut DirtyBitmap) -> io::Result<()> {
        if self.fault == AtSource::LogReturnsAnotherSet {
            *into = DirtyBitmap::full(Ram::for_test(&[("ram", 1000)]).layout());
        }
        self.vm.drain(into)
    }

    fn stop(&mut self) -> io::Result<()> {
        let panics = matches!(self.fault, AtSource::LogStopPanics | AtSource::LogStopPanicsAtTheEnd);
        assert!(!panics, "told to panic when the log stops");
        self.vm.stop()
    }
}

/// What goes wrong at the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AtDestination {
    Nothing,
    /// Some of its vCPUs run by then.
    StartPanics,
    /// It has other memory once devices are loaded.
    MemoryChanged,
}

struct Receiving {
    vm: TestDestination,
    fault: AtDestination,
    other: Ram,
    loaded: bool,
}

impl DestinationVm for Receiving {
    fn prepare(&mut self, description: &[u8]) -> Result<Vec<u8>, VmError> {
        self.vm.prepare(description)
    }

    fn ram(&self) -> &Ram {
        if self.loaded && self.fault == AtDestination::MemoryChanged { &self.other } else { self.vm.ram() }
    }

    fn load(&mut self, section: &SectionId, input: &mut dyn io::Read) -> Result<(), VmError> {
        self.loaded = true;
        self.vm.load(section, input)
    }

    fn start(&mut self) -> Result<(), VmError> {
        self.vm.start()?;
        assert!(self.fault != AtDestination::StartPanics, "no thread for the second vCPU");
        Ok(())
    }

    fn abandon(&mut self) {
        self.vm.abandon();
    }
}

struct Outcome {
    sent: Result<(), Error>,
    received: Result<(), Error>,
    /// The guest runs at the source, and was started at the destination.
    here: bool,
    there: bool,
    abandoned: bool,
}

fn migrate(at_source: AtSource, at_destination: AtDestination, receiving: destination::Options) -> Outcome {
    migrate_over(at_source, at_destination, receiving, |listener| Box::new(listener))
}

fn migrate_over(
    at_source: AtSource,
    at_destination: AtDestination,
    receiving: destination::Options,
    wrap: impl FnOnce(MemoryListener) -> Box<dyn Listen>,
) -> Outcome {
    time_limit(Duration::from_secs(60), || {
        let (listener, connector) = memory::listener(1 << 15);
        let connector = Lingering { inner: connector, lingers: at_source == AtSource::TheEndIsNotTaken };
        let mut from = Careless::new(at_source);
        let (vm, other) = (TestDestination::new(Ram::for_test(&BLOCKS)), Ram::for_test(&BLOCKS));
        let mut to = Receiving { vm, fault: at_destination, other, loaded: false };
        let destination = Destination::new(receiving);
        let (stop, listener) = (destination.stop_handle(), wrap(listener));
        let (sent, received) = std::thread::scope(|scope| {
            let to = &mut to;
            let receiving = scope.spawn(move || destination.run(to, listener, &mut ()).map(drop));
            let mut options = small();
            if at_source == AtSource::TheEndIsNotTaken {
                options.parameters.pause_limit = Some(Duration::from_secs(1));
            }
            let sent = Source::new(options).run(&mut from, &connector, &mut ()).map(drop);
            if sent.is_err() {
                stop.cancel();
            }
            (sent, receiving.join().unwrap())
        });
        let calls = to.vm.calls();
        Outcome {
            sent,
            received,
            here: from.vm.writer.is_running(),
            there: calls.contains(&"start"),
            abandoned: calls.contains(&"abandon"),
        }
    })
}

/// The guest stayed paused on both sides, and `run` ended by a panic.
#[test]
fn the_guest_runs_on_when_its_dirty_log_cannot_even_be_stopped() {
    let outcome = migrate(AtSource::LogStopPanics, AtDestination::Nothing, Default::default());
    let error = outcome.sent.unwrap_err().to_string();
    assert_eq!(error, "the VM could not save its state: told to fail");
    assert!(outcome.here && !outcome.there);
}

/// The guest ran at the destination, and the source's `run` did not say so but panicked.
#[test]
fn a_migration_that_is_done_is_reported_when_the_dirty_log_cannot_be_stopped() {
    let outcome = migrate(AtSource::LogStopPanicsAtTheEnd, AtDestination::Nothing, Default::default());
    assert!(outcome.sent.is_ok() && outcome.received.is_ok(), "{:?}", outcome.sent);
    assert!(!outcome.here && outcome.there);
}

#[test]
fn a_panic_of_resume_is_a_guest_that_could_not_resume() {
    let outcome = migrate(AtSource::ResumePanics, AtDestination::Nothing, Default::default());
    match outcome.sent {
        Err(Error::NotResumed { first, resume }) => {
            assert_eq!(first.to_string(), "the VM could not save its state: told to fail");
            assert!(resume.to_string().contains("told to panic at resume"), "{resume}");
        }
        other => panic!("{other:?}"),
    }
}

/// A VM of which some vCPUs ran was said not to run, and the source resumed its own.
#[test]
fn a_panic_in_the_start_of_the_vm_leaves_the_source_in_doubt() {
    let outcome = migrate(AtSource::Nothing, AtDestination::StartPanics, Default::default());
    assert!(outcome.there && !outcome.here, "{:?}", outcome.sent);
    assert!(matches!(outcome.sent, Err(Error::InDoubt { .. })), "{:?}", outcome.sent);
    let error = outcome.received.unwrap_err().to_string();
    assert!(error.contains("no thread for the second vCPU") && error.contains("it may run here"), "{error}");
    assert!(!outcome.abandoned, "its vCPUs use what would be freed");
}

/// Both sides reported success, and the guest lacked what had been added.
#[test]
fn memory_that_is_added_while_a_vm_migrates_ends_the_migration() {
    let outcome = migrate(AtSource::MemoryAdded, AtDestination::Nothing, Default::default());
    let error = outcome.sent.unwrap_err().to_string();
    assert!(error.starts_with("the VM could not keep its memory: it has other RAM blocks"), "{error}");
    assert!(outcome.here && !outcome.there && outcome.received.is_err());
    let outcome = migrate(AtSource::MemoryPutTogetherAgain, AtDestination::Nothing, Default::default());
    assert!(outcome.sent.is_ok() && outcome.there, "{:?}", outcome.sent);
}

/// A channel was given a page that there is not, and panicked.
#[test]
fn a_set_of_pages_that_is_not_the_migrations_ends_it() {
    let outcome = migrate(AtSource::LogReturnsAnotherSet, AtDestination::Nothing, Default::default());
    let error = outcome.sent.unwrap_err().to_string();
    assert!(error.contains("a set of another size"), "{error}");
    assert!(outcome.here && !outcome.there);
}

/// The pages were in the memory that the VM had before, and both sides reported success.
#[test]
fn a_destination_whose_memory_is_another_than_the_pages_went_to_does_not_start() {
    let outcome = migrate(AtSource::Nothing, AtDestination::MemoryChanged, Default::default());
    assert!(outcome.here && !outcome.there, "{:?}", outcome.received);
    let error = outcome.received.unwrap_err().to_string();
    assert!(error.starts_with("the VM could not keep its memory"), "{error}");
    let told = outcome.sent.unwrap_err().to_string();
    assert!(told.contains("the VM could not keep its memory"), "{told}");
}

/// The destination had started its VM, panicked over the time that took, and told the source that the VM does not run.
#[test]
fn a_clock_that_goes_back_leaves_the_guest_with_one_side() {
    for every in 1..40 {
        let calls = AtomicU64::new(0);
        let clock = Clock::from_fn(move || {
            let call = calls.fetch_add(1, SeqCst);
            Duration::from_millis(if call % (every + 1) == every { 1000 } else { 2000 + call })
        });
        let options = destination::Options { clock, ..Default::default() };
        let outcome = migrate(AtSource::Nothing, AtDestination::Nothing, options);
        assert!(outcome.sent.is_ok() && outcome.received.is_ok(), "every {every}: {:?}", outcome.received);
        assert!(outcome.there && !outcome.here, "every {every}");
    }
}

/// A listener whose waiting is ended by a signal, as a system call is.
struct Interrupted {
    inner: MemoryListener,
    signals: u32,
}

impl Listen for Interrupted {
    fn accept(&mut self, timeout: Option<Duration>) -> io::Result<Box<dyn Pending>> {
        match self.signals.checked_sub(1) {
            Some(left) => {
                self.signals = left;
                Err(io::ErrorKind::Interrupted.into())
            }
            None => self.inner.accept(timeout),
        }
    }

    fn try_accept(&mut self) -> io::Result<Option<Box<dyn Pending>>> {
        self.inner.try_accept()
    }

    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        self.inner.stopper()
    }
}

/// The listener was closed, as if all connections had come, and the destination waited for main without an end.
#[test]
fn a_listener_that_a_signal_interrupts_goes_on() {
    let wrap = |inner| Box::new(Interrupted { inner, signals: 3 }) as Box<dyn Listen>;
    let outcome = migrate_over(AtSource::Nothing, AtDestination::Nothing, Default::default(), wrap);
    assert!(outcome.sent.is_ok() && outcome.received.is_ok(), "{:?}", outcome.sent);
}

/// The source was left in doubt: the connections ended before they had been used for the answer.
#[test]
fn a_destination_that_waits_for_no_close_still_tells_the_source() {
    for _ in 0..50 {
        let options = destination::Options { close_timeout: Duration::ZERO, ..Default::default() };
        let outcome = migrate(AtSource::Nothing, AtDestination::Nothing, options);
        assert!(outcome.sent.is_ok() && outcome.received.is_ok(), "{:?}", outcome.sent);
    }
}

/// Connections whose end waits until they are stopped, as the last record of TLS does where the peer has ceased to read.
struct Lingering {
    inner: memory::MemoryConnector,
    lingers: bool,
}

impl Connect for Lingering {
    fn dial(&self) -> io::Result<Box<dyn Pending>> {
        let pending = self.inner.dial()?;
        match self.lingers {
            true => Ok(wrapped(pending, |inner| Ok(Box::new(LingeringStream { inner, stopped: Arc::default() })))),
            false => Ok(pending),
        }
    }
}

struct LingeringStream {
    inner: Box<dyn Stream>,
    stopped: Arc<AtomicBool>,
}

impl SendHalf for LingeringStream {
    fn write(&mut self, header: &[u8], pages: &[GuestRange<'_>]) -> io::Result<()> {
        self.inner.write(header, pages)
    }

    fn finish(&mut self) -> io::Result<()> {
        while !self.stopped.load(SeqCst) {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.inner.finish()
    }
}

receives_as_inner!(LingeringStream);

impl Stream for LingeringStream {
    /// Main ends as it does.
    fn split(self: Box<Self>) -> io::Result<(Box<dyn SendHalf>, Box<dyn RecvHalf>)> {
        self.inner.split()
    }

    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        Ok(Box::new(StopsLingering(self.inner.stopper()?, self.stopped.clone())))
    }

    fn peer(&self) -> String {
        self.inner.peer()
    }
}

struct StopsLingering(Box<dyn Stopper>, Arc<AtomicBool>);

impl Stopper for StopsLingering {
    fn stop(&self) {
        self.1.store(true, SeqCst);
        self.0.stop();
    }
}

/// `run` did not return after the destination had said that it has the VM: nothing ended that wait any more.
#[test]
fn a_connection_that_does_not_take_its_end_is_ended_by_the_limit_of_the_pause() {
    let outcome = migrate(AtSource::TheEndIsNotTaken, AtDestination::Nothing, Default::default());
    assert!(outcome.sent.is_ok() && outcome.received.is_ok(), "{:?}", outcome.sent);
    assert!(outcome.there && !outcome.here);
}

/// It waited for itself, and the migration for it.
#[test]
fn a_change_of_parameters_may_ask_for_them() {
    let (told, done) = (Arc::new(Mutex::new(None)), Arc::new(AtomicBool::new(false)));
    time_limit(Duration::from_secs(60), || {
        let handle = Source::new(source::Options::default()).handle();
        handle.set_parameters(|parameters| {
            parameters.max_bandwidth = Some(7);
            *told.lock().unwrap() = Some(handle.parameters().max_bandwidth);
        });
        done.store(handle.parameters().max_bandwidth == Some(7), SeqCst);
    });
    assert_eq!(*told.lock().unwrap(), Some(None), "those in force");
    assert!(done.load(SeqCst));
}

/// A destination made the memory of a guest that was being migrated zero, and all four sides reported success.
#[test]
fn memory_is_used_by_one_migration_at_a_time() {
    let refusal = |result: Result<(), Error>| match result {
        Err(Error::Mismatch(Mismatch::MemoryInUse)) => {}
        other => panic!("{other:?}"),
    };
    time_limit(Duration::from_secs(60), move || {
        let mut from = TestSource::new(Ram::for_test(&BLOCKS));
        assert!((0..40).all(|page| from.writer.write(page, 100 + page)));
        let ram = from.ram().clone();
        let mut tried = false;
        from.at_drain = Box::new(move |_| {
            if std::mem::replace(&mut tried, true) {
                return;
            }
            let (_listener, connector) = memory::listener(1 << 16);
            refusal(Source::new(small()).run(&mut TestSource::new(ram.clone()), &connector, &mut ()).map(drop));

            let (listener, connector) = memory::listener(1 << 16);
            let mut into = TestDestination::new(ram.clone());
            std::thread::scope(|scope| {
                scope.spawn(move || {
                    let mut other = TestSource::new(Ram::for_test(&BLOCKS));
                    let sent = Source::new(small()).run(&mut other, &connector, &mut ());
                    assert!(sent.unwrap_err().to_string().contains("another migration uses the memory of this VM"));
                    assert!(other.writer.is_running());
                });
                refusal(Destination::new(Default::default()).run(&mut into, Box::new(listener), &mut ()).map(drop));
            });
            assert_eq!(into.calls(), ["prepare", "abandon"]);
        });
        // The second time the memory is free again.
        for _ in 0..2 {
            let (listener, connector) = memory::listener(1 << 16);
            let mut to = TestDestination::new(Ram::for_test(&BLOCKS));
            std::thread::scope(|scope| {
                let to = &mut to;
                scope.spawn(move || Destination::new(Default::default()).run(to, Box::new(listener), &mut ()).unwrap());
                Source::new(small()).run(&mut from, &connector, &mut ()).unwrap();
            });
            assert!((0..40).all(|page| from.ram().page_bytes(page) == to.ram.page_bytes(page)));
            from.resume().unwrap();
        }
    });
}
