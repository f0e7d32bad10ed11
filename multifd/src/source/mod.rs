//! The sending side of a migration: [`Source::run`] is the list of its phases.
//!
//! The thread that calls it is the main thread. It owns main, the VM and the dirty bitmap; one thread for each channel
//! pulls batches from the shared page scan. They meet at the round barrier when a section opens; a channel that has sent
//! its SYNC waits there for the next one.

mod auto_compression;
mod channel;
mod connections;
mod handle;
mod main_channel;
mod options;
mod parameters;
mod pause_limit;
mod report;
mod return_path;

use std::{io, time::Duration};

use multifd_proto::{
    commit::{SourceAction, SourceCommit, SourceEvent},
    convergence::{Convergence, Decision, RoundReport},
    extension::{Extension, Extensions},
    machine::{Dialect, ZeroPages},
    packet,
    rounds::Party,
};

pub use self::{
    auto_compression::ChannelCompression,
    handle::Handle,
    options::{Flush, Options, Peer, Plan, Replay, StreamFormat, Untouched},
    parameters::Parameters,
    report::{Downtime, Report, ZeroCopy},
};
use self::{
    channel::SendChannel, main_channel::MainChannel, parameters::Live, pause_limit::PauseLimit, return_path::ReturnPath,
};
use crate::{
    dirty_bitmap::DirtyBitmap,
    error::{Connection, Error, Mismatch, Place},
    progress::{Event, Observer, Phase, Progress, RoundStats},
    pulse::Pulse,
    ram::Ram,
    round::barrier::RoundBarrier,
    round::scan::PageScan,
    sections::Sections,
    stop::StopHandle,
    sync::{Arc, Mutex, atomic::AtomicBool, atomic::Ordering, lock},
    threads::{Task, caught},
    transport::{Connect, ZeroCopyCounters},
    vm::{SourceVm, Throttled},
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

/// What all threads of one source share.
pub(super) struct Shared {
    ram: Ram,
    /// One page of zeros, to send a page that is zero without reading it.
    zero_page: Ram,
    scan: PageScan,
    barrier: RoundBarrier,
    live: Live,
    progress: Progress,
    /// What all connections moved; by it the migration notices that the destination is silent.
    pulse: Pulse,
    stop: StopHandle,
    options: Options,
    /// Zero pages that channels found and main has to name, in legacy mode.
    legacy_zeros: Mutex<Option<DirtyBitmap>>,
    /// Counts what is sent without a copy, where that was asked for; and why it is not possible, if so.
    zero_copy: Option<Arc<ZeroCopyCounters>>,
    copies_because: Mutex<Option<String>>,
    /// No section follows; read by channels after the barrier has opened, which orders it.
    finished: AtomicBool,
}

/// The main thread's state.
struct Run {
    shared: Arc<Shared>,
    main: Option<MainChannel>,
    channels: Vec<Task<Result<SendChannel, Error>>>,
    /// Channels that have ended; their connections stay open until the destination has confirmed.
    ended: Vec<SendChannel>,
    return_path: Option<ReturnPath>,
    /// What both ends agreed on.
    extensions: Extensions,
    /// Who has the VM.
    commit: SourceCommit,
    watchdog: Watchdog,
    convergence: Convergence,
    report: Report,
    tracking: bool,
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
        if options.peer == Peer::Multifd && options.format.token.is_none() {
            // Connections of an earlier attempt may still be on their way, through a proxy for example: their pages are
            // older than those of this one, and the packets would fit.
            options.format.token =
                Some(fresh_token().map_err(Error::io(Place { connection: Connection::Main, offset: 0 }))?);
        }
        if options.plan.channels == 0 {
            return Err(Mismatch::Channels { opened: 0, expected: 1 }.into());
        }
        // Its guest writes to it.
        ram.forget_fresh();
        let page_size = ram.layout().page_size();
        let scan = PageScan::new(ram.layout().clone(), packet::capacity(page_size));
        let barrier = RoundBarrier::new(usize::from(options.plan.channels));
        stop.register(Box::new(barrier.clone()));
        stop.register(live.limiter.stopper());
        progress.set_pages_total(ram.layout().pages());
        let legacy_zeros = (options.format.zero_pages == ZeroPages::Legacy).then(|| DirtyBitmap::new(ram.layout()));
        let begun = options.clock.now();
        let report = Report::new(&options, ram.layout());
        let zero_copy = report.zero_copy.as_ref().map(|_| Arc::default());
        Ok(Run {
            convergence: Convergence::new(live.get().limits),
            report,
            watchdog: Watchdog::start(&*options.threads, &stop)?,
            extensions: Extensions::default(),
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
                stop,
                options,
                legacy_zeros: Mutex::new(legacy_zeros),
                zero_copy,
                copies_because: Mutex::default(),
                finished: AtomicBool::new(false),
            }),
            main: None,
            channels: Vec::new(),
            ended: Vec::new(),
            return_path: None,
            tracking: false,
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
        self.connect(to)?;
        self.enter(Phase::Setup, observer);
        self.set_up()?;
        self.enter(Phase::Rounds, observer);
        let mut dirty = self.start_tracking(vm)?;
        loop {
            self.round(&mut dirty, vm)?;
            match self.decide(&dirty, observer) {
                Decision::Continue => {}
                Decision::Throttle(percent) => self.throttle(percent, vm, observer),
                Decision::SwitchOver => break,
                Decision::GiveUp => return Err(self.does_not_converge(&dirty)),
            }
        }
        self.enter(Phase::Switchover, observer);
        self.pause(vm)?;
        self.last_round(&mut dirty, vm, observer)?;
        self.enter(Phase::Devices, observer);
        self.devices(vm)?;
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

    /// Announces the RAM blocks and meets all channels for the first time.
    fn set_up(&mut self) -> Result<(), Error> {
        if self.shared.options.peer == Peer::Multifd {
            self.extensions = self.return_path().wait_for_agreement()?;
        }
        self.main().ram_start()?;
        self.section(0)?;
        self.main().sections_beside_ram()?;
        self.report.setup = self.now() - self.begun;
        Ok(())
    }

    /// Switches dirty tracking on and returns the pages of round 0: all of them, but for those never touched where the
    /// destination needs not be told.
    fn start_tracking(&mut self, vm: &mut dyn SourceVm) -> Result<DirtyBitmap, Error> {
        self.report.dirty_log = vm.dirty_log().name();
        self.tracking = true;
        let ram = self.shared.ram.clone();
        if !self.tracking_starts_late() {
            vm.dirty_log().start(&ram).map_err(Error::dirty_log)?;
        }
        let mut dirty = DirtyBitmap::full(ram.layout());
        let mut untouched = DirtyBitmap::new(ram.layout());
        vm.untouched(&mut untouched).map_err(Error::vm("tell which pages were never touched"))?;
        match self.shared.options.format.untouched {
            Untouched::Skip => {
                dirty.subtract(&untouched);
                self.report.skipped = untouched.count();
                self.shared.progress.add_skipped(self.report.skipped);
                self.shared.scan.set_zeros(None);
            }
            Untouched::Name => self.shared.scan.set_zeros(Some(untouched)),
        }
        self.rounds_begun = self.now();
        Ok(dirty)
    }

    /// Sends all pages of `dirty` while the guest runs, then puts those written meanwhile into it.
    fn round(&mut self, dirty: &mut DirtyBitmap, vm: &mut dyn SourceVm) -> Result<(), Error> {
        let mut stats = self.open_round(dirty, true);
        let begun = self.now();
        loop {
            let pages = self.section_budget();
            self.main().ram_part()?;
            let section_begun = self.now();
            self.section(pages)?;
            self.measure_section(pages, self.now() - section_begun);
            if self.shared.scan.is_empty() {
                break;
            }
        }
        // Zeros known from the beginning say nothing about what was written since.
        self.shared.scan.set_zeros(None);
        stats.took = self.now() - begun;
        if self.tracking_starts_late() && self.rounds == 0 {
            let ram = self.shared.ram.clone();
            vm.dirty_log().start(&ram).map_err(Error::dirty_log)?;
        }
        vm.dirty_log().drain(dirty).map_err(Error::dirty_log)?;
        stats.dirty_after = dirty.count();
        self.close_round(stats);
        Ok(())
    }

    /// Only in tests: see [`Broken`](crate::testing::broken::Broken).
    #[cfg(any(test, feature = "broken-variants"))]
    fn tracking_starts_late(&self) -> bool {
        self.shared.options.broken == Some(crate::testing::broken::Broken::TrackingStartsLate)
    }

    #[cfg(not(any(test, feature = "broken-variants")))]
    const fn tracking_starts_late(&self) -> bool {
        false
    }

    /// Compares what is left with what the pause may take.
    fn decide(&mut self, dirty: &DirtyBitmap, observer: &mut dyn Observer) -> Decision {
        let page_size = self.shared.ram.layout().page_size() as u64;
        let elapsed = self.now() - self.rounds_begun;
        self.convergence.set_limits(self.shared.live.get().limits);
        let last = self.report.rounds.last_mut().expect("a round was sent");
        let decision = self.convergence.decide(&RoundReport {
            rounds: last.round + 1,
            sent: last.normal * page_size,
            took: last.took,
            dirty: last.dirty_after * page_size,
            elapsed,
        });
        last.expected_downtime = self.convergence.expected_downtime(dirty.count() * page_size);
        observer.event(&Event::Round(last.clone()));
        decision
    }

    fn throttle(&mut self, percent: u8, vm: &mut dyn SourceVm, observer: &mut dyn Observer) {
        match vm.throttle(percent) {
            Throttled::Applied => {
                self.report.throttle = percent;
                observer.event(&Event::Throttle(percent));
            }
            Throttled::Unsupported => self.convergence.throttle_unsupported(),
        }
    }

    fn does_not_converge(&self, dirty: &DirtyBitmap) -> Error {
        let remaining = dirty.count() * self.shared.ram.layout().page_size() as u64;
        Error::DoesNotConverge {
            rounds: self.rounds,
            seconds: (self.now() - self.rounds_begun).as_secs_f64(),
            remaining,
            bytes_per_second: self.convergence.bytes_per_second(),
            expected_downtime_ms: self.convergence.expected_downtime(remaining).as_secs_f64() * 1e3,
            downtime_limit_ms: self.shared.live.get().limits.downtime.as_secs_f64() * 1e3,
        }
    }

    /// From here on, memory does not change.
    fn pause(&mut self, vm: &mut dyn SourceVm) -> Result<(), Error> {
        if self.shared.stop.is_stopped() {
            return Err(Error::Stopped);
        }
        self.paused_at = self.now();
        self.paused = true;
        // From here on the limit of the pause bounds every wait.
        Pulse::rest(self.watchdog.timers());
        self.shared.live.pause_limit.begin(self.watchdog.timers());
        vm.pause().map_err(Error::vm("pause"))?;
        self.report.downtime.pause = self.now() - self.paused_at;
        Ok(())
    }

    /// A round like any other, with the guest paused: the pages still left, and those written until the pause.
    fn last_round(
        &mut self,
        dirty: &mut DirtyBitmap,
        vm: &mut dyn SourceVm,
        observer: &mut dyn Observer,
    ) -> Result<(), Error> {
        let drain_begun = self.now();
        vm.dirty_log().drain(dirty).map_err(Error::dirty_log)?;
        let begun = self.now();
        self.report.downtime.drain = begun - drain_begun;
        // The limit protects other traffic from a long migration; the pause is short and the guest waits.
        self.shared.live.limiter.set_unlimited();
        let mut stats = self.open_round(dirty, false);
        self.main().switchover_start()?;
        self.main().ram_end()?;
        self.section(u64::MAX)?;
        stats.took = self.now() - begun;
        self.report.downtime.last_round = stats.took;
        self.close_round(stats);
        if let Some(last) = self.report.rounds.last() {
            observer.event(&Event::Round(last.clone()));
        }
        self.end_channels()
    }

    /// The channels have nothing more to send. Their connections stay open: an early end would look like a failure.
    fn end_channels(&mut self) -> Result<(), Error> {
        self.shared.finished.store(true, Ordering::Release);
        self.meet()?;
        for channel in self.channels.drain(..) {
            self.ended.push(join(channel)?);
        }
        Ok(())
    }

    /// Sends the state of vCPUs and devices, up to the last byte that may still be taken back.
    fn devices(&mut self, vm: &mut dyn SourceVm) -> Result<(), Error> {
        let begun = self.now();
        let mut sections = Sections::new();
        vm.save(&mut sections).map_err(Error::vm("save its state"))?;
        self.main().sections(sections)?;
        self.report.downtime.devices = self.now() - begun;
        Ok(())
    }

    /// Hands the VM over: the messages of both sides, as [`SourceCommit`] decides by them.
    fn confirm(&mut self) -> Result<(), Error> {
        let begun = self.now();
        let two_step = self.extensions.contains(Extension::TwoStepCommit);
        self.commit = if two_step { SourceCommit::two_step() } else { SourceCommit::one_step() };
        if !two_step {
            // The destination starts the VM by itself when it has the last byte.
            self.shared.stop.commit()?;
        }
        let _ = self.commit.on(SourceEvent::EndBegins);
        self.return_path().expect_answer();
        let mut written = self.main().end();
        if two_step && written.is_err() {
            return written;
        }
        loop {
            if written.is_err() {
                // The destination hears no more. What it says now is its answer: it has what it needs to start, or refuses.
                if self.main().finish().is_err() {
                    self.return_path().hang_up();
                }
            }
            let (event, error) = self.return_path().next_answer();
            // A cancel that came before READY wins.
            let cancelled = event == SourceEvent::Ready && self.shared.stop.commit().is_err();
            match self.commit.on(if cancelled { SourceEvent::Stopped } else { event }) {
                SourceAction::WriteGo => written = self.main().go(),
                SourceAction::Finish => break,
                SourceAction::Resume => return Err(error),
                SourceAction::StayPaused | SourceAction::Nothing => {
                    return Err(Error::InDoubt { reason: Box::new(written.err().unwrap_or(error)) });
                }
            }
        }
        let now = self.now();
        self.report.downtime.confirm = now - begun;
        self.report.downtime.total = now - self.paused_at;
        Ok(())
    }

    /// One section, behind its head: opens the scan for `pages`, ends with a sync point and the footer.
    fn section(&mut self, pages: u64) -> Result<(), Error> {
        let early = self.shared.options.plan.flush == Flush::Early
            && self.shared.options.format.zero_pages != ZeroPages::Legacy;
        let per_round = self.shared.options.format.dialect == Dialect::PerRound;
        self.shared.scan.allow(pages);
        self.meet()?;
        if per_round && early {
            self.main().flush_word()?;
        }
        // Every channel has sent its SYNC.
        self.shared.barrier.gather()?;
        self.name_zeros()?;
        if per_round && !early {
            self.main().flush_word()?;
        }
        self.main().section_end()
    }

    /// Names the zero pages that the channels found, in legacy mode.
    fn name_zeros(&mut self) -> Result<(), Error> {
        let shared = self.shared.clone();
        if let Some(zeros) = &mut *lock(&shared.legacy_zeros) {
            self.main().zero_words(zeros)?;
            zeros.clear();
        }
        Ok(())
    }

    /// Meets all channels at the barrier.
    fn meet(&mut self) -> Result<(), Error> {
        let at = self.main().place();
        self.shared.barrier.meet(Party::Main, at).map(drop)
    }

    fn section_budget(&self) -> u64 {
        match self.shared.options.format.dialect {
            Dialect::PerRound => u64::MAX,
            Dialect::PerSection => self.section_pages,
        }
    }

    /// Sizes the next section of the per-section dialect so that it takes as long as the options say.
    fn measure_section(&mut self, pages: u64, took: Duration) {
        if pages == u64::MAX || took.is_zero() {
            return;
        }
        let ideal = pages as f64 * self.shared.options.plan.section_time.as_secs_f64() / took.as_secs_f64();
        // At most doubled, so that one section of zero pages does not open the next one for seconds of content.
        self.section_pages =
            (ideal as u64).clamp(FIRST_SECTION_PAGES / 4, pages.saturating_mul(2).max(FIRST_SECTION_PAGES));
    }

    fn open_round(&mut self, dirty: &mut DirtyBitmap, guest_running: bool) -> RoundStats {
        let round = self.rounds;
        let dirty_pages = dirty.count();
        self.shared.progress.open_round(round, dirty_pages);
        self.shared.scan.load(dirty);
        let before = self.shared.progress.snapshot();
        RoundStats {
            round,
            dirty_pages,
            // Totals so far, to be subtracted when the round is over.
            normal: before.normal,
            zero: before.zero,
            bytes: before.bytes(),
            took: Duration::ZERO,
            guest_running,
            dirty_after: 0,
            expected_downtime: Duration::ZERO,
            throttle: self.report.throttle,
        }
    }

    fn close_round(&mut self, mut stats: RoundStats) {
        let now = self.shared.progress.snapshot();
        stats.normal = now.normal - stats.normal;
        stats.zero = now.zero - stats.zero;
        stats.bytes = now.bytes() - stats.bytes;
        tracing::debug!(?stats, "round");
        self.rounds += 1;
        stats.keep_in(&mut self.report.rounds);
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

    /// Ends all threads, and gives the VM back to whom it belongs to.
    fn finish(mut self, vm: &mut dyn SourceVm, outcome: Result<(), Error>) -> Result<Report, Error> {
        let failure = outcome.err().map(|error| self.fail(error));
        // What is still registered refers to what is about to go away.
        let _ = self.shared.stop.decide();
        if failure.is_none() {
            self.say_goodbye();
        }
        // The connections close here; on success the destination has said that it needs them no longer.
        drop(self.main.take());
        self.report.auto_compression = self.ended.drain(..).filter_map(|channel| channel.compression()).collect();
        drop(self.return_path.take());
        self.shared.live.pause_limit.end();
        if self.tracking
            && let Err(error) = vm.dirty_log().stop()
        {
            tracing::warn!(%error, "dirty log does not stop");
        }
        if self.report.throttle > 0 {
            vm.throttle(0);
        }
        let Some(error) = failure else {
            if let (Some(report), Some(counters)) = (&mut self.report.zero_copy, &self.shared.zero_copy) {
                report.count(counters);
                report.refused = lock(&self.shared.copies_because).take();
            }
            self.report.finish(&self.shared.progress, self.shared.options.clock.now() - self.begun);
            return Ok(self.report);
        };
        if self.paused
            && !matches!(error, Error::InDoubt { .. })
            && let Err(resume) = vm.resume()
        {
            return Err(Error::NotResumed { first: Box::new(error), resume });
        }
        Err(error)
    }

    /// Ends all threads. Returns the first error of the migration, of which `error` is one.
    fn fail(&mut self, error: Error) -> Error {
        let not_first = self.shared.stop.stop(error);
        for channel in self.channels.drain(..) {
            // What they ran into is known: the first of it, or a consequence.
            drop(join(channel));
        }
        let refused = self.return_path.take().and_then(ReturnPath::end);
        let first = self.shared.stop.take_first();
        match (not_first, first) {
            // What interrupted the wait is the reason, and not the connection that ended with it.
            (Some(Error::InDoubt { .. }), Some(interruption)) => Error::InDoubt { reason: Box::new(interruption) },
            (Some(error @ (Error::InDoubt { .. } | Error::Refused { .. })), _) => error,
            // A connection that broke because the destination left: it may have said why.
            (_, Some(error @ Error::Io { .. })) => refused.unwrap_or(error),
            (not_first, first) => first.or(not_first).unwrap_or(Error::Unconfirmed),
        }
    }
}

/// What no other migration has.
fn fresh_token() -> io::Result<[u8; 16]> {
    let mut token = [0; 16];
    while token == [0; 16] {
        rustix::rand::getrandom(&mut token, rustix::rand::GetRandomFlags::empty())?;
    }
    Ok(token)
}

fn join(channel: Task<Result<SendChannel, Error>>) -> Result<SendChannel, Error> {
    channel.join()?
}

/// 32 MiB of 4 KiB pages: what a first section sends before any speed was measured.
const FIRST_SECTION_PAGES: u64 = 8192;
