//! The sending side of a migration: [`Source::run`] is the list of its phases.
//!
//! The thread that calls it is the main thread. It owns main, the VM and the dirty bitmap; one thread for each channel
//! pulls batches from the shared page scan. They meet at the round barrier when a section opens; a channel that has sent
//! its SYNC waits there for the next one.

mod agreement;
mod auto_compression;
mod backlog;
mod channel;
mod commit;
mod connections;
mod convergence;
mod ending;
mod excluded;
mod handle;
mod incoming;
mod live_state;
mod main_channel;
mod main_pages;
mod openings;
mod options;
mod parameters;
mod pause_limit;
mod postponed;
mod report;
mod return_path;
mod room;
mod rounds;
mod sections;
mod shared;
mod shared_memory;
mod spread;
mod state_queue;
mod steering;
mod switchover;

use std::time::Duration;

use multifd_proto::{commit::SourceCommit, packet};

pub use multifd_proto::{
    BlockName,
    extension::Extensions,
    machine::{Dialect, ZeroPages},
    packet::Compression,
    ram::BlockEntry,
};

pub use self::{
    auto_compression::ChannelCompression,
    convergence::{AtLimit, Limits},
    handle::Handle,
    options::{Flush, Options, Peer, Plan, QemuFormat, Replay, StreamFormat, Untouched},
    parameters::Parameters,
    report::{Downtime, Report, ZeroCopy},
};
use self::{
    backlog::Backlog,
    channel::SendChannel,
    convergence::{Convergence, Decision},
    excluded::Excluded,
    live_state::LiveState,
    main_channel::MainChannel,
    openings::Openings,
    options::fresh_token,
    parameters::Live,
    pause_limit::PauseLimit,
    postponed::Peeking,
    return_path::ReturnPath,
    sections::FIRST_SECTION_PAGES,
    shared::Shared,
    shared_memory::HandedOver,
    spread::Spread,
    state_queue::StateQueue,
};
use crate::{
    dirty_bitmap::DirtyBitmap,
    error::{Connection, Error, Place},
    progress::{Event, Observer, Phase, Progress},
    pulse::Pulse,
    ram::{InUse, Ram},
    round::{barrier::RoundBarrier, scan::PageScan},
    stop::StopHandle,
    sync::{Arc, Mutex, atomic::AtomicBool},
    threads::{Task, caught},
    transport::Connect,
    vm::SourceVm,
    watchdog::Watchdog,
};

/// Sends a running VM to a destination.
pub struct Source {
    options: Options,
    handle: Handle,
}

impl Source {
    /// A migration that has not begun.
    pub fn new(options: Options) -> Source {
        let stop = StopHandle::new();
        let pause_limit = PauseLimit::new(options.parameters.pause_limit, stop.clone());
        let live = Live::new(options.parameters.clone(), pause_limit);
        Source { options, handle: Handle { stop, progress: Progress::new(), live } }
    }

    /// What watches and steers this migration from other threads.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// What cancels this migration from another thread.
    pub fn stop_handle(&self) -> StopHandle {
        self.handle.stop.clone()
    }

    /// The counters of this migration.
    pub fn progress(&self) -> Progress {
        self.handle.progress()
    }

    /// Sends `vm` over connections from `to` and returns when the destination has confirmed that it has it.
    ///
    /// On `Ok` the VM is paused and belongs to the destination. On `Err` it runs, as before, and another attempt may be
    /// made. There are two exceptions, in which it stays paused: [`Error::NotResumed`], which says why it could not resume,
    /// and [`Error::InDoubt`], where it must not, because the destination may run it. A VM that was paused before the
    /// migration began is resumed on `Err`, too; a VMM that migrates paused VMs keeps that state and does not resume then.
    ///
    /// # Errors
    /// The first thing that went wrong on any connection, with its place; [`Error::DoesNotConverge`];
    /// [`Error::Cancelled`].
    pub fn run(self, vm: &mut dyn SourceVm, to: &dyn Connect, observer: &mut dyn Observer) -> Result<Report, Error> {
        let mut run = Run::new(self, vm.ram().clone())?;
        let outcome = caught(|| run.phases(vm, to, observer)).map_err(|error| match error {
            Error::Panicked { .. } if !run.commit.may_resume() => Error::InDoubt { reason: Box::new(error) },
            error => error,
        });
        run.finish(vm, outcome)
    }
}

/// The main thread's state.
struct Run {
    shared: Arc<Shared>,
    /// No other migration uses the memory, until this one has let the VM go on.
    _in_use: InUse,
    main: Option<MainChannel>,
    /// By id.
    channels: Vec<Task<Result<SendChannel, Error>>>,
    /// Channels that have ended; their connections stay open until the destination has confirmed.
    ended: Vec<SendChannel>,
    return_path: Option<ReturnPath>,
    /// What both ends agreed on.
    extensions: Extensions,
    /// Memory that is not sent.
    handed_over: Option<HandedOver>,
    excluded: Excluded,
    /// Who has the VM.
    commit: SourceCommit,
    watchdog: Watchdog,
    convergence: Convergence,
    peeking: Peeking,
    live_state: LiveState,
    report: Report,
    tracking: bool,
    /// What the connections hold is let out before the pause only as far as it has to be.
    hurries: bool,
    paused: bool,
    /// Rounds sent so far.
    rounds: u64,
    /// When the migration, its first round and its pause began.
    begun: Duration,
    rounds_begun: Duration,
    paused_at: Duration,
    /// Pages per section, in the per-section dialect.
    section_pages: u64,
}

impl Run {
    fn new(source: Source, ram: Ram) -> Result<Run, Error> {
        let Source { mut options, handle: Handle { stop, progress, live } } = source;
        let in_use = ram.begin_use()?;
        if options.peer == Peer::Multifd && options.format.token.is_none() {
            // Connections of an earlier attempt may still be on their way, through a proxy for example: their pages are
            // older than those of this one, and the packets would fit.
            options.format.token =
                Some(fresh_token().map_err(Error::io(Place { connection: Connection::Main, offset: 0 }))?);
        }
        if options.is_main_alone() {
            options.check_main_alone()?;
            // Such a stream has no FLUSH.
            options.qemu.dialect = Dialect::PerSection;
        }
        options.check_kept_packets()?;
        let handed_over = match options.plan.hand_over {
            true => Some(HandedOver::of(&ram, options.peer)?),
            false => None,
        };
        // Its guest writes to it.
        ram.forget_fresh();
        let page_size = ram.layout().page_size();
        let channels = usize::from(options.plan.channels);
        let scan = PageScan::new(ram.layout().clone(), packet::capacity(page_size), channels);
        let barrier = RoundBarrier::new(channels);
        stop.register(Box::new(barrier.clone()));
        stop.register(live.limiter.stopper());
        let backlog = Backlog::default();
        stop.register(backlog.stopper());
        let openings = Openings::default();
        stop.register(openings.stopper());
        stop.register(live.steering.stopper());
        let state = StateQueue::new(options.plan.channels, &options.trace);
        stop.register(state.stopper());
        let spread = Spread::new(channels);
        stop.register(spread.stopper());
        let pages = ram.layout().pages() - handed_over.as_ref().map_or(0, HandedOver::count);
        progress.set_pages_total(pages);
        let legacy_zeros = (options.qemu.zero_pages == ZeroPages::Legacy).then(|| DirtyBitmap::new(ram.layout()));
        let begun = options.clock.now();
        let report = Report::new(&options, ram.layout());
        let zero_copy = report.zero_copy.as_ref().map(|_| Arc::default());
        Ok(Run {
            _in_use: in_use,
            convergence: Convergence::new(live.get().limits),
            report,
            peeking: Peeking::default(),
            live_state: LiveState::default(),
            watchdog: Watchdog::start(&*options.threads, &stop)?,
            extensions: Extensions::default(),
            handed_over,
            excluded: None,
            commit: SourceCommit::one_step(),
            rounds: 0,
            shared: Arc::new(Shared {
                zero_page: Ram::zeros(page_size)?,
                ram,
                scan,
                barrier,
                live,
                progress,
                pulse: Pulse::default(),
                backlog,
                openings,
                stop,
                options,
                legacy_zeros: Mutex::new(legacy_zeros),
                zero_copy,
                copies_because: Mutex::default(),
                finished: AtomicBool::new(false),
                last_section: AtomicBool::new(false),
                state,
                spread,
            }),
            main: None,
            channels: Vec::new(),
            ended: Vec::new(),
            return_path: None,
            tracking: false,
            hurries: false,
            paused: false,
            begun,
            rounds_begun: begun,
            paused_at: begun,
            section_pages: FIRST_SECTION_PAGES,
        })
    }

    /// The migration from beginning to end.
    fn phases(&mut self, vm: &mut dyn SourceVm, to: &dyn Connect, observer: &mut dyn Observer) -> Result<(), Error> {
        self.enter(Phase::Connect, observer);
        let live = self.shared.live.clone();
        self.shared.pulse.watch(self.watchdog.timers(), move || live.get().stall_limit, &self.shared.stop);
        self.connect(vm, to)?;
        self.enter(Phase::Setup, observer);
        self.set_up(vm)?;
        self.enter(Phase::Rounds, observer);
        let mut dirty = self.start_tracking(vm)?;
        self.begin_to_spread();
        self.watch_channels();
        loop {
            self.round(&mut dirty, vm)?;
            match self.decide(&mut dirty, vm, observer)? {
                Decision::Continue => self.rest_where_nothing_was_sent()?,
                Decision::Throttle(percent) => self.throttle(percent, vm, observer),
                Decision::Hold => self.shared.live.steering.wait_while_held(self.rest()),
                Decision::SwitchOver => break,
                Decision::GiveUp => return Err(self.does_not_converge(&dirty)),
            }
        }
        self.enter(Phase::Switchover, observer);
        self.pause(vm)?;
        let saved = self.save_first(vm)?;
        self.last_round(&mut dirty, vm, observer)?;
        self.enter(Phase::Devices, observer);
        self.devices(vm, saved)?;
        self.enter(Phase::Confirm, observer);
        self.confirm()?;
        self.enter(Phase::Done, observer);
        Ok(())
    }

    fn enter(&mut self, phase: Phase, observer: &mut dyn Observer) {
        tracing::debug!(phase = phase.name(), "enters");
        self.shared.progress.set_phase(phase);
        observer.event(&Event::Phase(phase));
    }

    /// Agrees with the destination, announces the RAM blocks and meets all channels for the first time.
    fn set_up(&mut self, vm: &mut dyn SourceVm) -> Result<(), Error> {
        self.agree(vm)?;
        self.main().ram_start()?;
        self.section(0, None)?;
        self.main().sections_beside_ram()?;
        self.report.setup = self.now() - self.begun;
        Ok(())
    }

    fn now(&self) -> Duration {
        self.shared.options.clock.now()
    }

    fn main(&mut self) -> &mut MainChannel {
        self.main.as_mut().expect("connected")
    }

    fn return_path(&self) -> &ReturnPath {
        self.return_path.as_ref().expect("connected")
    }
}
