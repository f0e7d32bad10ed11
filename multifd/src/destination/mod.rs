//! The receiving side of a migration: [`Destination::run`] is the list of its phases.
//!
//! The thread that calls it is the main thread: it reads main and owns the VM. One thread accepts connections; each
//! connection has a thread of its own from its first byte, which finds out whether it is main, a channel or a stranger's.
//! Pages go from a channel's socket to guest memory without passing through here. All meet at the round barrier, where no
//! round with pages ends before it is known that all channels have come.

mod accept;
mod bounded_body;
mod channel;
mod clean;
mod commit;
mod connections;
mod first_touch;
mod give_back;
mod greeting;
mod handle;
mod main_loop;
mod main_pages;
mod main_reader;
mod main_watch;
mod members;
mod named;
mod opaque_state;
mod options;
mod packeted_body;
mod postcopy;
mod preempt;
mod prepare;
mod recovery;
mod report;
mod rounds;
mod shared;
mod shared_memory;
mod sink;
mod state_window;
mod switchover_ack;
mod target;

use std::time::Duration;

pub use multifd_proto::{BlockName, extension::Extensions, machine::Dialect, packet::Compression};
use multifd_proto::{command::BodyLength, extension::Offer};

#[cfg(feature = "__bench")]
pub(crate) use self::first_touch::Filler;
pub(crate) use self::state_window::WINDOW as STATE_WINDOW;
use self::{
    accept::Acceptor, named::NamedPages, recovery::Recoveries, shared::Shared, switchover_ack::AckTiming,
    target::VmTarget,
};
pub(crate) use self::{
    bounded_body::take_bounded,
    main_reader::{MainReader, more_bytes},
    opaque_state::OpaqueSink,
    sink::{PageBits, PageSink, Scratch},
    target::{Body, StreamHead, Target},
};
pub use self::{
    first_touch::{FirstTouch, FreshMemory},
    give_back::give_back,
    handle::Handle,
    options::{Options, SwitchoverAck},
    report::{Mode, Report},
};
pub use crate::round::audit::{Findings, StaleWrite};
use crate::{
    error::Error,
    layout::check_page_size,
    progress::{Event, Observer, Phase, Progress},
    round::audit::Audit,
    stop::StopHandle,
    sync::{Arc, lock, wait},
    threads::caught,
    transport::Listen,
    vm::DestinationVm,
    watchdog::Watchdog,
};

/// Receives a VM from a source.
pub struct Destination {
    options: Options,
    stop: StopHandle,
    progress: Progress,
    handle: Handle,
}

impl Destination {
    /// A migration that has not begun.
    pub fn new(options: Options) -> Destination {
        Destination { options, stop: StopHandle::new(), progress: Progress::new(), handle: Handle::default() }
    }

    /// What cancels this migration from another thread.
    pub fn stop_handle(&self) -> StopHandle {
        self.stop.clone()
    }

    /// What steers this migration from other threads.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// The counters of this migration.
    pub fn progress(&self) -> Progress {
        self.progress.clone()
    }

    /// Waits for a source at `from`, receives its VM into `vm` and starts it.
    ///
    /// On `Ok` the VM runs here. On `Err` it does not and never will, and the source was not told that we have it, so that it
    /// can run there. With a source that is not one of ours there are exceptions: where [`DestinationVm::start`] fails, the
    /// source was told before; one that has switched to postcopy does not let its VM run again by itself
    /// ([`Error::AfterRun`]); and where telling the source failed, everything is here, the VM is paused, and the source may run on or
    /// not ([`Error::InDoubt`]). A checkpoint has one more, [`Error::StateOnChannels`].
    ///
    /// # Errors
    /// The first thing that went wrong on any connection, with its place; [`Error::Mismatch`] where `vm` is not like the
    /// source's, or its memory may not be written; [`Error::Cancelled`].
    pub fn run(
        self,
        vm: &mut dyn DestinationVm,
        from: Box<dyn Listen>,
        observer: &mut dyn Observer,
    ) -> Result<Report, Error> {
        let page_size = vm.page_size();
        check_page_size(page_size)?;
        let mut target = VmTarget::new(vm, page_size, self.options.first_touch, self.stop.clone());
        self.receive(&mut target, page_size, from, observer)
    }

    /// The same for anything that can take a stream.
    pub(crate) fn receive(
        self,
        target: &mut dyn Target,
        page_size: usize,
        from: Box<dyn Listen>,
        observer: &mut dyn Observer,
    ) -> Result<Report, Error> {
        let mut run = Run::new(self, page_size, from).inspect_err(|_| target.abandon())?;
        let outcome = caught(|| run.phases(target, observer));
        run.finish(target, outcome)
    }
}

/// The main thread's state.
struct Run {
    shared: Arc<Shared>,
    acceptor: Acceptor,
    main: Option<MainReader>,
    report: Report,
    return_path: bool,
    ack_timing: AckTiming,
    /// Pages named on main.
    main_pages: u64,
    /// Device-state packets that are made to last.
    opaque_packets: u64,
    /// Pages of main that are going to be put into place together.
    gathered: main_pages::Gathered,
    /// What the source offered, and what both ends agreed on.
    offer: Option<Offer>,
    /// What the source says of the section that follows.
    section_length: Option<BodyLength>,
    extensions: Extensions,
    watchdog: Watchdog,
    /// SHUT was written, or is being written: nothing else may be said.
    answered: bool,
    /// The phase entered last, and whether the guest is paused at the source.
    phase: Option<Phase>,
    paused: bool,
    /// Sync points that main has passed.
    rounds: u64,
    /// When the guest was known to be paused at the source.
    paused_at: Option<Duration>,
    /// Whether main has said whose migration it is.
    identified: bool,
    /// Whether the VM was made, or is being made.
    prepared: bool,
    /// The source was told that the VM is here, and keeps it paused: it is not given up, whatever happens.
    has_the_vm: bool,
    /// Whether all channels are here, and known to be all.
    complete: bool,
    /// Pages that main has named, as long as there may be no channels, or the stream may be a background snapshot.
    named: Option<NamedPages>,
    /// The state of all devices, once a package of postcopy has brought it.
    package: Option<Vec<u8>>,
    recoveries: Recoveries,
    sink: Option<Arc<dyn PageSink>>,
    audit: Option<Arc<Audit>>,
    begun: Duration,
    /// Bytes on all connections at the last sync point.
    bytes_before: u64,
}

impl Run {
    fn new(destination: Destination, page_size: usize, from: Box<dyn Listen>) -> Result<Run, Error> {
        let Destination { options, stop, progress, handle } = destination;
        let watchdog = Watchdog::start(&*options.threads, &stop)?;
        let begun = options.clock.now();
        let ack_timing = AckTiming::new(options.switchover_ack);
        let timers = watchdog.timers().clone();
        let shared = Shared::new(options, page_size, from.is_single(), stop, progress, timers);
        handle.begin(&shared);
        let acceptor = Acceptor::spawn(from, &shared).map_err(|error| {
            // Ends what has been registered, which has `shared` in turn.
            let not_first = shared.stop.stop(error);
            shared.stop.take_first().or(not_first).unwrap_or(Error::Stopped)
        })?;
        Ok(Run {
            shared,
            acceptor,
            main: None,
            report: Report::default(),
            return_path: false,
            ack_timing,
            main_pages: 0,
            opaque_packets: 0,
            gathered: main_pages::Gathered::default(),
            offer: None,
            section_length: None,
            extensions: Extensions::default(),
            watchdog,
            answered: false,
            phase: None,
            paused: false,
            rounds: 0,
            paused_at: None,
            identified: false,
            prepared: false,
            has_the_vm: false,
            complete: false,
            named: None,
            package: None,
            recoveries: Recoveries::default(),
            sink: None,
            audit: None,
            begun,
            bytes_before: 0,
        })
    }

    /// The migration from beginning to end.
    fn phases(&mut self, target: &mut dyn Target, observer: &mut dyn Observer) -> Result<(), Error> {
        self.enter(Phase::Connect, observer);
        self.await_main()?;
        self.enter(Phase::Setup, observer);
        self.take(target, observer)?;
        self.enter(Phase::Confirm, observer);
        self.confirm(target)?;
        // The VM runs here. Nothing that goes wrong from now on may say that it does not.
        let told = caught(|| {
            self.enter(Phase::Done, observer);
            self.await_close(target)
        });
        match told {
            Err(error @ Error::Panicked { .. }) => {
                tracing::error!(%error, "after the VM was started");
                Ok(())
            }
            told => told,
        }
    }

    fn enter(&mut self, phase: Phase, observer: &mut dyn Observer) {
        tracing::debug!(phase = phase.name(), "enters");
        self.phase = Some(phase);
        self.note_times(phase);
        self.shared.progress.set_phase(phase);
        observer.event(&Event::Phase(phase));
    }

    fn note_times(&mut self, phase: Phase) {
        let now = self.shared.options.clock.now();
        match phase {
            Phase::Rounds | Phase::Switchover if self.report.setup.is_zero() => self.report.setup = now - self.begun,
            _ => {}
        }
        match phase {
            Phase::Switchover => self.paused_at = self.paused_at.or(Some(now)),
            Phase::Done if self.report.mode != Mode::Snapshot => {
                self.report.downtime = self.paused_at.map(|paused| now - paused);
            }
            _ => {}
        }
    }

    /// Waits until a connection says that it is main.
    fn await_main(&mut self) -> Result<(), Error> {
        let mut slot = lock(&self.shared.main);
        let main = loop {
            if let Some(main) = slot.connection.take() {
                break main;
            }
            if slot.stopped {
                return Err(Error::Stopped);
            }
            slot = wait(&self.shared.main_changed, slot);
        };
        drop(slot);
        self.begun = self.shared.options.clock.now();
        self.watch_the_source();
        let shared = &self.shared;
        let (progress, pulse) = (shared.progress.clone(), shared.pulse.clone());
        self.main = Some(MainReader::new(main, shared.page_size, progress, pulse));
        Ok(())
    }

    /// Enters `phase`, unless it was entered last.
    fn enter_once(&mut self, phase: Phase, observer: &mut dyn Observer) {
        if self.phase != Some(phase) {
            self.enter(phase, observer);
        }
    }

    fn main(&mut self) -> &mut MainReader {
        self.main.as_mut().expect("set by await_main")
    }

    fn sink(&self) -> &dyn PageSink {
        &**self.sink.as_ref().expect("the decoder lets no page pass before the block list")
    }

    /// Ends all threads.
    fn finish(mut self, target: &mut dyn Target, outcome: Result<(), Error>) -> Result<Report, Error> {
        self.shared.bound_the_end();
        let switched = self.main.as_ref().is_some_and(|main| main.decoder().switches_to_postcopy());
        let failure = outcome.err().map(|error| {
            let not_first = self.shared.stop.stop(error);
            // The source learns it sooner than by a closed connection; it is no matter if it does not.
            let reason = self.shared.stop.reason().or_else(|| not_first.as_ref().map(Error::to_string));
            let refused = caught(|| {
                self.refuse(&reason.unwrap_or_default());
                Ok(())
            });
            if let Err(error) = refused {
                tracing::error!(%error, "while the source was told");
            }
            not_first
        });
        if let Some(main) = self.main.as_mut().filter(|_| self.answered) {
            let finished = caught(|| {
                main.finish();
                Ok(())
            });
            if let Err(error) = finished {
                tracing::error!(%error, "at the end of main");
            }
        }
        // Channels may wait at the end of a round that never comes.
        self.shared.barrier.stop();
        let late = self.acceptor.finish();
        drop(self.main.take());
        *lock(&self.shared.pages) = None;
        let first = self.shared.stop.take_first();
        // What is still registered refers to what is about to go away.
        let _ = self.shared.stop.decide();
        let Some(not_first) = failure else {
            self.report.fresh_memory = self.sink.as_ref().map_or_else(Vec::new, |sink| sink.fresh_memory());
            self.report.audit = self.audit.map(|audit| audit.findings());
            self.report.compression = lock(&self.shared.seen).compression;
            self.report.finish(&self.shared.progress, self.shared.options.clock.now() - self.begun);
            return Ok(self.report);
        };
        let error = self.shared.explained(first.or(not_first).or(late).unwrap_or(Error::Stopped));
        if !self.has_the_vm && !matches!(error, Error::InDoubt { .. }) {
            target.abandon();
        }
        Err(match error {
            Error::InDoubt { .. } => error,
            error if switched => Error::AfterRun { reason: Box::new(error), blocks: self.report.blocks },
            error => error,
        })
    }
}
