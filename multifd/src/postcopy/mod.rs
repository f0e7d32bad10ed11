//! The VM in a checkpoint as the source of a postcopy: the destination runs the guest at once, and gets its memory while it runs.
//!
//! ```text
//!  main:    header … RAM_DISCARD · PACKAGED { LISTEN · devices · PING 3 · RUN } · PING 4 · PART: pages … · END · EOF
//!  preempt: pages that the guest waits for … · EOS                      (a connection of its own, where both ends have it)
//!  answers: PONG … · requests for pages … · SHUT(0)
//! ```
//!
//! **No page is sent twice.** A page belongs to the thread that sets its bit in [`Claims`]: the one that answers requests
//! or the one that sends all others in the background. A page of zeros is not in the file; it is sent, as a word, when it is
//! asked for, or after all pages with content.
//!
//! **From RUN on the VM belongs to the destination.** Before the first byte of RUN is written, an error means that the VM does
//! not run there. Afterwards an error never means that the VM is lost: the guest waits at the next page it does not have,
//! and [`Source::recover`], in this process or another one with the same file, goes on with the pages that the
//! destination says it lacks. See [`Whereabouts`].

mod claims;
mod connection;
mod figures;
mod hand_over;
mod handle;
mod inbox;
mod link;
#[cfg(all(test, loom))]
mod loom;
mod options;
mod original;
mod pages;
mod push;
mod recovery;
mod return_path;
#[cfg(all(test, not(any(loom, shuttle))))]
mod tests;
pub(crate) mod trace;
mod whereabouts;

use multifd_proto::ram::BlockEntry;

use self::{
    claims::Claims, figures::Figures, hand_over::Opening, inbox::Inbox, link::Link, pages::FilePages, trace::HandOver,
};
pub use self::{
    figures::{Latency, Report},
    handle::Handle,
    options::{Options, PageAddress, Prefetch},
    original::Original,
    whereabouts::Whereabouts,
};
use crate::{
    checkpoint::Checkpoint,
    error::Error,
    progress::{Event, Observer, Phase, Progress},
    pulse::Pulse,
    round::trace::Step,
    stop::StopHandle,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    threads::caught,
    transport::{Connect, Stopper},
    vm::VmError,
    watchdog::Watchdog,
};

/// Hands the VM in a checkpoint over, and serves its memory.
pub struct Source {
    job: Arc<Job>,
    opening: Arc<Opening>,
    /// The id of the `ram` section.
    ram_section: u32,
    stop: StopHandle,
    vm: Whereabouts,
    /// Everything was sent, up to the end of the stream, and not confirmed.
    all_sent: bool,
    observer: Box<dyn Observer + Send>,
}

/// What all connections of one VM share, over all attempts.
struct Job {
    pages: Arc<FilePages>,
    /// The block list, to which requests refer.
    blocks: Arc<[BlockEntry]>,
    claims: Claims,
    figures: Figures,
    progress: Progress,
    options: Arc<Options>,
    /// What other threads steer it by.
    handle: Handle,
    /// The page behind the last one that was asked for, which the background goes on from; [`NO_FAULT`] once it does.
    after_fault: AtomicU64,
}

/// What the threads of one attempt share: connections, until one of them fails.
struct Attempt {
    job: Arc<Job>,
    inbox: Inbox,
    /// Bytes that the destination took.
    pulse: Pulse,
    /// A connection did not take a byte.
    refused: AtomicBool,
    stop: StopHandle,
}

impl Source {
    /// A source of the VM in `checkpoint`, of which nothing was sent.
    ///
    /// # Errors
    /// The kernel's, and [`CheckpointError::BeingWritten`](crate::checkpoint::CheckpointError::BeingWritten) where a process
    /// has the file open for writing, as far as the kernel tells.
    pub fn new(checkpoint: &Checkpoint, options: Options) -> Result<Source, Error> {
        Original::new(checkpoint, options)?.source()
    }

    /// What ends every wait, of all attempts, from another thread.
    pub fn stop_handle(&self) -> StopHandle {
        self.stop.clone()
    }

    /// Has `observer` told of each phase from now on, by the thread that calls [`hand_over`](Self::hand_over) or
    /// [`recover`](Self::recover). [`Phase::Done`] follows where that succeeds.
    pub fn observe(&mut self, observer: impl Observer + Send + 'static) {
        self.observer = Box::new(observer);
    }

    /// What steers it from other threads, over all attempts.
    pub fn handle(&self) -> Handle {
        self.job.handle.clone()
    }

    /// The counters.
    pub fn progress(&self) -> Progress {
        self.job.progress.clone()
    }

    /// Where the VM is.
    pub fn vm(&self) -> Whereabouts {
        self.vm
    }

    /// The figures so far.
    pub fn report(&self) -> Report {
        self.job.figures.report(&self.job)
    }

    /// The pages that the destination asked for, in the order of the requests. Of an endless list only the beginning is kept.
    pub fn faults(&self) -> Vec<PageAddress> {
        let layout = self.job.pages.layout();
        let pages = self.job.figures.faults();
        pages.into_iter().filter_map(|page| PageAddress::of(layout, page)).collect()
    }

    /// Has the destination run the VM, and sends it all of its memory. Returns when the destination has confirmed that it has
    /// everything.
    ///
    /// `about_to_run` is called once, right before the bytes that make the destination run the VM. Its error ends the attempt.
    ///
    /// # Errors
    /// The first thing that went wrong. [`Error::Incomplete`]: the VM is at the destination, and [`recover`](Self::recover)
    /// goes on. [`Error::InDoubt`]: it may be. [`Error::Unacknowledged`]: it is, and may have everything. All others: the destination
    /// does not run it.
    ///
    /// # Panics
    /// If the VM is not [`Here`](Whereabouts::Here) any more: a VM runs in one place.
    pub fn hand_over(
        &mut self,
        to: &dyn Connect,
        about_to_run: &mut dyn FnMut() -> Result<(), VmError>,
    ) -> Result<(), Error> {
        assert_eq!(self.vm, Whereabouts::Here, "the VM was handed over before");
        let opening = self.opening.clone();
        // What an attempt before has sent is at no destination that runs the VM.
        self.job.claims.clear();
        self.attempt(to, |link| {
            link.hand_over(&opening, about_to_run)?;
            link.push(opening.after_run())
        })
    }

    /// Says where the VM is that another process has handed over, for [`recover`](Self::recover): [`There`](Whereabouts::There) only
    /// where that process knew it. A source that is not told takes it for [in doubt](Whereabouts::InDoubt).
    ///
    /// # Panics
    /// If this source has handed it over itself, or has begun to recover.
    pub fn set_vm(&mut self, vm: Whereabouts) {
        assert_eq!(self.vm, Whereabouts::Here, "this source knows where the VM is");
        self.vm = vm;
    }

    /// Goes on after connections broke, here or in another process: asks the destination, which listens again, what it lacks,
    /// and sends that.
    ///
    /// # Errors
    /// [`Error::Incomplete`] or [`Error::Unacknowledged`] with the first thing that went wrong; [`Error::InDoubt`] where the
    /// VM was [in doubt](Whereabouts::InDoubt) and the destination did not say what it lacks. It may be called again.
    pub fn recover(&mut self, to: &dyn Connect) -> Result<(), Error> {
        match self.vm {
            Whereabouts::Here => self.vm = Whereabouts::InDoubt,
            // It would not listen again if it had everything.
            Whereabouts::Complete => self.vm = Whereabouts::There,
            Whereabouts::InDoubt | Whereabouts::There => {}
        }
        self.job.figures.add_recovery();
        self.attempt(to, |link| {
            link.recover()?;
            link.push(&[])
        })
    }

    /// Opens connections, runs `phases` over them, ends all threads, and finds out where the VM is now.
    fn attempt(&mut self, to: &dyn Connect, phases: impl FnOnce(&mut Link) -> Result<(), Error>) -> Result<(), Error> {
        let job = self.job.clone();
        let attempt = Arc::new(Attempt {
            job,
            inbox: Inbox::default(),
            pulse: Pulse::default(),
            refused: AtomicBool::new(false),
            stop: StopHandle::new(),
        });
        let _cancel = self.stop.register_for_now(Box::new(Cancel(attempt.stop.clone())));
        let watchdog = Watchdog::start(&*self.job.options.threads, &attempt.stop)?;
        let limit = self.job.options.stall_limit;
        attempt.pulse.watch(watchdog.timers(), move || limit, &attempt.stop);
        self.job.handle.begin(&attempt.stop, &attempt.inbox);
        let mut link = Link::new(to, attempt, &mut *self.observer, self.ram_section, (self.vm, self.all_sent));
        let outcome = caught(|| {
            phases(&mut link)?;
            link.finish()
        });
        let (vm, all_sent, outcome) = link.end(outcome);
        self.job.handle.end();
        (self.vm, self.all_sent) = (vm, all_sent);
        if outcome.is_ok() {
            self.job.progress.set_phase(Phase::Done);
            let told = caught(|| {
                self.observer.event(&Event::Phase(Phase::Done));
                Ok(())
            });
            if let Err(error) = told {
                tracing::error!(%error, "after all was sent");
            }
        }
        outcome
    }
}

impl Job {
    /// Claims `page`, which the destination asks for. `false`: another thread has, or has done so before.
    fn claim(&self, page: u64) -> bool {
        let free = self.claims.claim(page);
        #[cfg(any(test, feature = "__broken-variants"))]
        let free = free || self.options.broken == Some(crate::testing::broken::Broken::SourceIgnoresItsBits);
        free
    }

    /// A step happens.
    fn step(&self, step: impl FnOnce() -> HandOver) {
        self.options.trace.step(|| Step::HandOver(step()));
    }

    /// The destination waits for a page before `page`: the background goes on from there.
    fn go_on_from(&self, page: u64) {
        self.after_fault.store(page, Relaxed);
    }
}

/// Cancels an attempt when all of them are.
struct Cancel(StopHandle);

impl Stopper for Cancel {
    fn stop(&self) {
        self.0.cancel();
    }
}

/// No page has this number.
const NO_FAULT: u64 = u64::MAX;
