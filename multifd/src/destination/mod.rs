//! The receiving side of a migration: [`Destination::run`] is the list of its phases.
//!
//! The thread that calls it is the main thread: it reads main and owns the VM. One thread accepts connections; each
//! connection has a thread of its own from its first byte, which finds out whether it is main, a channel or a stranger's.
//! Pages go from a channel's socket to guest memory without passing through here. All meet at the round barrier, where no
//! round with pages ends before it is known that all channels have come.

mod accept;
mod channel;
mod connections;
mod first_touch;
mod greeting;
mod main_reader;
mod main_watch;
mod named;
mod options;
mod report;
mod sink;
mod switchover_ack;
mod target;

use std::time::Duration;

use multifd_proto::{
    ChannelId, Violation,
    command::Command,
    commit::{DestinationAction, DestinationCommit, DestinationEvent},
    extension::{Extension, Extensions, Offer},
    machine::Dialect,
    membership::Stranger,
    packet::{Compression, Hello},
    ram::BlockEntry,
    return_path::Message,
    rounds::{Party, Sync},
    stream::{Item, Section, SectionKind},
    violation, xbzrle,
};

#[cfg(feature = "bench")]
pub(crate) use self::first_touch::Filler;
use self::{
    accept::Acceptor, connections::Connections, named::NamedPages, switchover_ack::AckTiming, target::VmTarget,
};
pub use self::{
    first_touch::FirstTouch,
    options::{Options, SwitchoverAck},
    report::{Mode, Report},
};
pub(crate) use self::{
    main_reader::{MainReader, more_bytes},
    sink::{PageBits, PageSink, Scratch},
    target::{Body, StreamHead, Target},
};
pub use crate::round::audit::{Findings, StaleWrite};
use crate::{
    checkpoint::MAX_DEVICE_STATE,
    compress::Windows,
    error::{Error, Mismatch, Place},
    layout::Layout,
    progress::{Event, Observer, Phase, Progress, RoundStats},
    pulse::Pulse,
    ram::Access,
    round::audit::Audit,
    round::barrier::{Passed, RoundBarrier},
    stop::StopHandle,
    sync::{
        Arc, Condvar, Deadline, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
        lock, wait, wait_for,
    },
    threads::caught,
    transport::{Listen, Stopper, Stream},
    vm::DestinationVm,
    watchdog::Watchdog,
};

/// Receives a VM from a source.
pub struct Destination {
    options: Options,
    stop: StopHandle,
    progress: Progress,
}

impl Destination {
    /// A migration that has not begun.
    pub fn new(options: Options) -> Destination {
        Destination { options, stop: StopHandle::new(), progress: Progress::new() }
    }

    /// What cancels this migration from another thread.
    pub fn stop_handle(&self) -> StopHandle {
        self.stop.clone()
    }

    /// The counters of this migration.
    pub fn progress(&self) -> Progress {
        self.progress.clone()
    }

    /// Waits for a source at `from`, receives its VM into `vm` and starts it.
    ///
    /// On `Ok` the VM runs here. On `Err` it does not and never will, and the source was not told that we have it, so that it
    /// can run there. With a source that is not one of ours there is an exception: where [`DestinationVm::start`] fails, the
    /// source was told before.
    ///
    /// # Errors
    /// The first thing that went wrong on any connection, with its place; [`Error::Mismatch`] where `vm` is not like the
    /// source's; [`Error::Cancelled`].
    pub fn run(
        self,
        vm: &mut dyn DestinationVm,
        from: Box<dyn Listen>,
        observer: &mut dyn Observer,
    ) -> Result<Report, Error> {
        let page_size = vm.ram().layout().page_size();
        if let Some(block) = vm.ram().blocks().iter().find(|block| block.access() != Access::ReadWrite) {
            return Err(Mismatch::BlockReadOnly { name: block.name().clone() }.into());
        }
        let first_touch = self.options.first_touch;
        self.receive(&mut VmTarget::new(vm, first_touch), page_size, from, observer)
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

/// What all threads of one destination share.
pub(super) struct Shared {
    page_size: usize,
    barrier: RoundBarrier,
    /// The memory of all decompressors.
    windows: Arc<Windows>,
    progress: Progress,
    /// What all connections moved; by it the migration notices that the source is silent.
    pulse: Pulse,
    stop: StopHandle,
    options: Options,
    /// Main, once a connection turned out to be it.
    main: Mutex<MainSlot>,
    main_changed: Condvar,
    /// Where pages go; set before main reaches the first sync point, so every channel finds it behind that.
    pages: Mutex<Option<Pages>>,
    seen: Mutex<Seen>,
    /// Pages named on all channels. Main compares it with itself; nothing is ordered by it.
    channel_pages: AtomicU64,
    /// A SYNC packet has come that QEMU 7.2 does not send.
    newer_packets: AtomicBool,
    /// Ends every connection: they outlive the migration's own end by [`StopHandle`].
    connections: Arc<Connections>,
    #[cfg(any(test, feature = "broken-variants"))]
    loose: crate::testing::broken::LooseBarrier,
}

/// Where pages go, and the blocks that they may name.
#[derive(Clone)]
pub(super) struct Pages {
    layout: Arc<Layout>,
    sink: Arc<dyn PageSink>,
    audit: Option<Arc<Audit>>,
}

/// What the connections have said so far.
#[derive(Default)]
pub(super) struct Seen {
    /// In the configuration of main.
    main_uuid: Option<[u8; 16]>,
    /// In the offer of main: what its channels say in place of the uuid.
    main_token: Option<[u8; 16]>,
    /// Of the first channel that has joined. It is the same on all.
    uuid: Option<[u8; 16]>,
    /// Of the first payload, on any channel.
    compression: Option<Compression>,
    /// Connections that were dropped.
    strangers: u64,
    /// Who the last of them was, and what it did.
    last_stranger: Option<String>,
    /// The last that said it is a channel which there cannot be with the number that was required, and that number.
    beyond: Option<(ChannelId, usize)>,
}

impl Shared {
    /// Reaches the end of the round, whose number it returns; `None` where there is nothing to wait for.
    fn arrive(&self, party: Party, place: Place) -> Result<Option<u64>, Error> {
        #[cfg(any(test, feature = "broken-variants"))]
        if let Some(passed) = self.loose.arrive(party) {
            return passed.map(|()| None);
        }
        self.barrier.arrive(party, place).map(Some)
    }

    /// The channel that said `hello` is at its first SYNC and joins. Returns the round to wait for, if there is one.
    fn join(&self, hello: &Hello, sync: Sync, place: Place) -> Result<Result<Option<u64>, Stranger>, Error> {
        let joined = self.barrier.join(hello.channel, hello.channels, sync, place)?;
        #[cfg(any(test, feature = "broken-variants"))]
        if joined.is_ok() {
            // The first time it only counts.
            let _ = self.loose.arrive(Party::Channel(hello.channel));
        }
        Ok(joined)
    }

    /// A channel is at a SYNC. Returns the number of the round; `None` where there is nothing to wait for.
    fn sync(&self, id: ChannelId, sync: Sync, place: Place) -> Result<Option<u64>, Error> {
        #[cfg(any(test, feature = "broken-variants"))]
        if let Some(passed) = self.loose.arrive(Party::Channel(id)) {
            return passed.map(|()| None);
        }
        self.barrier.sync(id, sync, place).map(Some)
    }

    /// A channel has brought the first pages of a round.
    fn begin(&self, id: ChannelId, place: Place) -> Result<(), Error> {
        #[cfg(any(test, feature = "broken-variants"))]
        if self.loose.is_active() {
            return Ok(());
        }
        self.barrier.begin(id, place)
    }

    /// Waits for all others at the end of `round`.
    fn pass(&self, round: Option<u64>) -> Result<(), Error> {
        round.map_or(Ok(()), |round| self.barrier.pass(round))
    }

    /// Main has said whose migration it is: channels can be told from strangers.
    fn identified(&self) {
        lock(&self.main).identified = true;
        self.main_changed.notify_all();
    }

    fn is_identified(&self) -> bool {
        lock(&self.main).identified
    }

    /// Waits until main has said whose migration it is.
    ///
    /// # Errors
    /// [`Error::Stopped`], also when the migration is over.
    fn await_identified(&self) -> Result<(), Error> {
        let mut slot = lock(&self.main);
        while !slot.identified {
            if slot.stopped {
                return Err(Error::Stopped);
            }
            slot = wait(&self.main_changed, slot);
        }
        Ok(())
    }

    /// Lets `time` pass, or less if the migration ends. Returns whether it has.
    fn pause(&self, time: Duration) -> bool {
        let deadline = Deadline::after(Some(time));
        let mut slot = lock(&self.main);
        while !slot.stopped && !deadline.is_over() {
            slot = wait_for(&self.main_changed, slot, deadline.left());
        }
        slot.stopped
    }

    /// Which channels have come.
    fn channels_here(&self) -> String {
        let (joined, known) = self.barrier.members(|members| (members.joined(), members.channels()));
        match (joined, known) {
            (joined, Some(channels)) => format!("{joined} of {channels} channels came"),
            (0, None) => "no channel came".to_owned(),
            (joined, None) => format!(
                "{joined} channels came, and the numbers of their packets show that there are more (if there are not, \
                 give the number of channels): these did not come"
            ),
        }
    }

    /// The channels that are missing did not come in time.
    fn channels_missing(&self) -> Error {
        let mut what = self.channels_here();
        if let Some(stranger) = &lock(&self.seen).last_stranger {
            what = format!("a connection was dropped ({stranger}), and {what}");
        }
        Error::SetupTimeout { what, seconds: self.options.setup_timeout.unwrap_or_default().as_secs() }
    }

    /// What is behind `error` where a channel of the source's may have been dropped: a QEMU whose channel is closed ends all
    /// connections, or says nothing any more.
    fn explained(&self, error: Error) -> Error {
        use std::io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
        let is_the_sources_end = match &error {
            Error::Io { source, .. } => {
                matches!(source.kind(), UnexpectedEof | ConnectionReset | ConnectionAborted | BrokenPipe)
            }
            Error::SourceGone { .. } | Error::Stalled { .. } => true,
            _ => false,
        };
        match lock(&self.seen).beyond.filter(|_| is_the_sources_end) {
            Some((id, expected)) => Mismatch::ChannelBeyond { id, expected, then: error.to_string() }.into(),
            None => error,
        }
    }
}

/// Releases the threads that wait for main, or for what it says.
pub(super) struct MainSlotStopper(pub(super) Arc<Shared>);

impl Stopper for MainSlotStopper {
    fn stop(&self) {
        lock(&self.0.main).stopped = true;
        self.0.main_changed.notify_all();
    }
}

#[derive(Default)]
struct MainSlot {
    /// With the bytes that were read from it.
    stream: Option<(Box<dyn Stream>, Vec<u8>)>,
    taken: bool,
    /// Main has said whose migration it is.
    identified: bool,
    stopped: bool,
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
    /// What the source offered, and what both ends agreed on.
    offer: Option<Offer>,
    extensions: Extensions,
    watchdog: Watchdog,
    /// The phase entered last, and whether the guest is paused at the source.
    phase: Option<Phase>,
    paused: bool,
    /// Sync points that main has passed.
    rounds: u64,
    /// Whether main has said whose migration it is.
    identified: bool,
    /// Whether all channels are here, and known to be all.
    complete: bool,
    /// Pages that main has named, as long as there may be no channels, or the stream may be a background snapshot.
    named: Option<NamedPages>,
    sink: Option<Arc<dyn PageSink>>,
    audit: Option<Arc<Audit>>,
    begun: Duration,
    round_begun: Duration,
    round_totals: (u64, u64, u64),
}

impl Run {
    fn new(destination: Destination, page_size: usize, from: Box<dyn Listen>) -> Result<Run, Error> {
        let Destination { options, stop, progress } = destination;
        let watchdog = Watchdog::start(&*options.threads, &stop)?;
        let begun = options.clock.now();
        let ack_timing = AckTiming::new(options.switchover_ack);
        let shared = Arc::new(Shared {
            page_size,
            barrier: RoundBarrier::open(options.channels.map(usize::from)),
            windows: Arc::default(),
            #[cfg(any(test, feature = "broken-variants"))]
            loose: crate::testing::broken::LooseBarrier::new(options.broken),
            progress,
            pulse: Pulse::default(),
            stop,
            options,
            main: Mutex::new(MainSlot::default()),
            main_changed: Condvar::new(),
            pages: Mutex::new(None),
            seen: Mutex::default(),
            channel_pages: AtomicU64::new(0),
            newer_packets: AtomicBool::new(false),
            connections: Arc::new(Connections::new()),
        });
        shared.stop.register(Box::new(shared.barrier.clone()));
        #[cfg(any(test, feature = "broken-variants"))]
        shared.stop.register(Box::new(shared.loose.clone()));
        shared.stop.register(Box::new(MainSlotStopper(shared.clone())));
        shared.stop.register(Box::new(ConnectionsStopper(shared.connections.clone())));
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
            offer: None,
            extensions: Extensions::default(),
            watchdog,
            phase: None,
            paused: false,
            rounds: 0,
            identified: false,
            complete: false,
            named: None,
            sink: None,
            audit: None,
            begun,
            round_begun: begun,
            round_totals: (0, 0, 0),
        })
    }

    /// The migration from beginning to end.
    fn phases(&mut self, target: &mut dyn Target, observer: &mut dyn Observer) -> Result<(), Error> {
        self.enter(Phase::Connect, observer);
        self.await_main()?;
        self.enter(Phase::Setup, observer);
        self.stream(target, observer)?;
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
        self.shared.progress.set_phase(phase);
        observer.event(&Event::Phase(phase));
    }

    /// Waits until a connection says that it is main.
    fn await_main(&mut self) -> Result<(), Error> {
        let mut slot = lock(&self.shared.main);
        let (stream, heard) = loop {
            if let Some(main) = slot.stream.take() {
                break main;
            }
            if slot.stopped {
                return Err(Error::Stopped);
            }
            slot = wait(&self.shared.main_changed, slot);
        };
        drop(slot);
        self.begun = self.shared.options.clock.now();
        let shared = &self.shared;
        let stall_limit = shared.options.stall_limit;
        shared.pulse.watch(self.watchdog.timers(), move || stall_limit, &shared.stop);
        let main = MainReader::new(stream, &heard, shared.page_size, shared.progress.clone(), shared.pulse.clone());
        self.main = Some(main);
        Ok(())
    }

    /// Reads main to the end of the stream.
    fn stream(&mut self, target: &mut dyn Target, observer: &mut dyn Observer) -> Result<(), Error> {
        loop {
            let item = self.main().next_item()?;
            if !self.identified && !is_configuration(&item) {
                self.check_uuid()?;
                self.identified = true;
                self.shared.identified();
            }
            match item {
                Item::Header | Item::Footer { .. } | Item::Block(_) | Item::ConfigPageBits(_) => {}
                Item::Configuration { machine } => self.configuration(machine)?,
                Item::ConfigCapabilities(names) => {
                    refuse_capabilities(names).map_err(Error::protocol(self.main().place()))?
                }
                Item::ConfigUuid(uuid) => {
                    lock(&self.shared.seen).main_uuid = Some(uuid);
                    self.report.uuid = Some(uuid);
                }
                Item::ConfigOffer(offer) => {
                    let (opened, barrier) = (usize::from(offer.channels), &self.shared.barrier);
                    if let (Err(_), Some(expected)) =
                        barrier.members(|members| (members.tell(opened), members.channels()))
                    {
                        return Err(Mismatch::Channels { opened, expected }.into());
                    }
                    lock(&self.shared.seen).main_token = offer.token;
                    self.offer = Some(offer);
                }
                Item::Command(command) => self.command(&command)?,
                Item::RamStart { .. } => {}
                Item::BlocksEnd => self.open_ram(target)?,
                Item::RamPart { end } => self.ram_part(end, observer)?,
                Item::ZeroPage { block, offset } => {
                    self.sink().zero(block, &[offset]).map_err(Error::io(self.main().place()))?;
                    self.wrote(block, offset);
                    self.shared.progress.add_pages(0, 1);
                    self.name(block, offset)?;
                }
                Item::Page { block, offset, len } => self.page(block, offset, len)?,
                Item::Xbzrle { block, offset, len } => self.xbzrle(block, offset, len)?,
                Item::CompressPage { block, offset, len } => self.compressed_page(block, offset, len)?,
                Item::Flush => {
                    self.shared.barrier.members(|members| members.expect_channels());
                    self.sync_point(observer)?;
                }
                Item::Eos => {
                    self.report.dialect = self.main().decoder().dialect();
                    if self.report.dialect == Some(Dialect::PerSection) {
                        self.sync_point(observer)?;
                    }
                    if self.main().decoder().ram_ended() {
                        // Every page is in place, also in a VM without devices.
                        self.sink().ram_complete().map_err(Error::io(self.main().place()))?;
                    }
                }
                Item::Section(section) => {
                    if self.section(&section, target, observer)? == Body::RestOfStream {
                        if !self.main().decoder().ram_ended() {
                            self.report.mode = Mode::Snapshot;
                        }
                        return Ok(());
                    }
                }
                Item::Eof => {
                    if self.main().decoder().is_snapshot() {
                        self.report.mode = Mode::Snapshot;
                    }
                    if !self.main().vmdescription_follows()? {
                        return Ok(());
                    }
                }
                Item::VmDescription { len } => {
                    self.main().skip(len)?;
                    return self.main().nothing_follows();
                }
            }
        }
    }

    /// Compares the uuid of a VM whose channels do not name it with the one that is expected.
    fn check_uuid(&mut self) -> Result<(), Error> {
        let (main_uuid, main_token) = {
            let seen = lock(&self.shared.seen);
            (seen.main_uuid, seen.main_token)
        };
        let found = main_uuid.unwrap_or_default();
        match self.shared.options.uuid {
            Some(expected) if main_token.is_some() && expected != found => {
                Err(Error::protocol(self.main().place())(violation::Mismatch::Uuid { expected, found }))
            }
            _ => Ok(()),
        }
    }

    fn configuration(&mut self, machine: String) -> Result<(), Error> {
        match &self.shared.options.machine {
            Some(ours) if *ours != machine => Err(Mismatch::Machine { theirs: machine, ours: ours.clone() }.into()),
            _ => {
                self.report.machine = machine;
                Ok(())
            }
        }
    }

    fn command(&mut self, command: &Command) -> Result<(), Error> {
        match command {
            Command::OpenReturnPath => {
                self.return_path = true;
                if let Some(offer) = &self.offer {
                    self.extensions = offer.extensions.and(&self.shared.options.extensions);
                    let accepted = Message::Accepted(self.extensions.clone());
                    self.main().reply(&accepted)?;
                }
                if self.ack_timing.due_at_once(&self.report.machine) {
                    self.main().reply(&Message::SwitchoverAck)?;
                }
                Ok(())
            }
            Command::Ping(value) => self.main().reply(&Message::Pong(*value)),
            _ => Ok(()),
        }
    }

    /// The block list is complete: finds out where its pages go.
    fn open_ram(&mut self, target: &mut dyn Target) -> Result<(), Error> {
        let decoder = self.main().decoder();
        let blocks: Vec<BlockEntry> = decoder.blocks().to_vec();
        let page_size = self.shared.page_size;
        let layout = Layout::new(page_size, blocks.iter().map(|block| (block.name.clone(), block.used_len)))?;
        self.shared.progress.set_pages_total(layout.pages());
        self.report.blocks = blocks.iter().map(|block| (block.name.clone(), block.used_len)).collect();
        let ram_section = self.main().decoder().ram_section().expect("its block list was read");
        let (machine, return_path) = (self.report.machine.clone(), self.return_path);
        let head = StreamHead { machine, return_path, ram_section, blocks, layout };
        let sink = target.open_ram(&head)?;
        let layout = Arc::new(head.layout);
        self.audit = match self.shared.options.audit {
            true => Some(Arc::new(Audit::new(layout.clone())?)),
            false => None,
        };
        *lock(&self.shared.pages) = Some(Pages { layout, sink: sink.clone(), audit: self.audit.clone() });
        self.sink = Some(sink);
        Ok(())
    }

    fn ram_part(&mut self, end: bool, observer: &mut dyn Observer) -> Result<(), Error> {
        if !end && self.return_path {
            let pages = self.main_pages + self.shared.channel_pages.load(Ordering::Relaxed);
            let newer_packets = self.shared.newer_packets.load(Ordering::Relaxed);
            if self.ack_timing.due_in_part(&self.report.machine, pages, newer_packets) {
                tracing::info!("the source goes on without a page left to send: it is told that it may switch over");
                self.main().reply(&Message::SwitchoverAck)?;
            }
        }
        self.paused = end;
        self.enter_once(if end { Phase::Switchover } else { Phase::Rounds }, observer);
        Ok(())
    }

    /// Enters `phase`, unless it was entered last.
    fn enter_once(&mut self, phase: Phase, observer: &mut dyn Observer) {
        if self.phase != Some(phase) {
            self.enter(phase, observer);
        }
    }

    fn page(&mut self, block: usize, offset: u64, len: usize) -> Result<(), Error> {
        let payload = self.main().payload(len)?.to_vec();
        self.store(block, offset, &payload)
    }

    fn xbzrle(&mut self, block: usize, offset: u64, len: usize) -> Result<(), Error> {
        let place = self.main().place();
        let diff = self.main().payload(len)?.to_vec();
        let mut page = vec![0; self.shared.page_size];
        self.sink().load(block, offset, &mut page).map_err(Error::io(place))?;
        xbzrle::apply(&diff, &mut page).map_err(Error::protocol(place))?;
        self.store(block, offset, &page)
    }

    fn compressed_page(&mut self, block: usize, offset: u64, len: usize) -> Result<(), Error> {
        let place = self.main().place();
        let payload = self.main().payload(len)?.to_vec();
        let mut page = vec![0; self.shared.page_size];
        crate::compress::inflate_page(&payload, &mut page).map_err(Error::payload(place))?;
        self.store(block, offset, &page)
    }

    fn store(&mut self, block: usize, offset: u64, page: &[u8]) -> Result<(), Error> {
        self.sink().store(block, &[offset], page).map_err(Error::io(self.main().place()))?;
        self.wrote(block, offset);
        self.shared.progress.add_pages(1, 0);
        self.name(block, offset)?;
        if !self.complete {
            self.shared.barrier.members(|members| members.plain_page());
            self.look_at_members();
        }
        Ok(())
    }

    /// Main has named a page.
    fn name(&mut self, block: usize, offset: u64) -> Result<(), Error> {
        if self.complete && !self.main().decoder().may_be_snapshot() {
            self.named = None;
            return Ok(());
        }
        let place = self.main().place();
        if let Some(Pages { layout, .. }) = &*lock(&self.shared.pages) {
            if self.named.is_none() {
                self.named = Some(NamedPages::new(layout).map_err(Error::io(place))?);
            }
            let named = self.named.as_mut().expect("made above");
            named.name(layout.blocks()[block].page_at(offset));
        }
        Ok(())
    }

    /// Main has written a page.
    fn wrote(&mut self, block: usize, offset: u64) {
        self.main_pages += 1;
        if let Some(audit) = &self.audit {
            audit.wrote(block, &[offset], Party::Main, self.rounds);
        }
    }

    /// The end of a round, or of a section in the dialect that ends each of them.
    fn sync_point(&mut self, observer: &mut dyn Observer) -> Result<(), Error> {
        let place = self.main().place();
        let round = self.shared.arrive(Party::Main, place)?;
        if let Some(round) = round {
            self.pass(round)?;
        }
        #[cfg(any(test, feature = "broken-variants"))]
        self.shared.loose.fix_channels(self.shared.barrier.members(|members| members.joined()));
        self.look_at_members();
        self.count_round(observer);
        Ok(())
    }

    /// Finds out whether all channels are here. Then no further connection is needed.
    fn look_at_members(&mut self) {
        if self.complete {
            return;
        }
        let (complete, joined, evidence) =
            self.shared.barrier.members(|members| (members.is_complete(), members.joined(), members.evidence()));
        self.report.channels = joined;
        if complete {
            tracing::debug!(channels = joined, ?evidence, "all channels are here");
            self.complete = true;
            self.acceptor.close();
        }
    }

    /// All that carries pages is over: verifies that no page can be missing or still come.
    ///
    /// # Errors
    /// A channel goes on behind the last sync point, or nothing shows that all channels have come.
    fn nothing_is_missing(&mut self) -> Result<(), Error> {
        let place = self.main().place();
        self.shared.barrier.close(place)?;
        self.look_at_members();
        if self.complete {
            return Ok(());
        }
        if let (opened, Some(expected)) = self.shared.barrier.members(|members| (members.joined(), members.channels()))
        {
            return Err(Mismatch::Channels { opened, expected }.into());
        }
        let named = self.named.as_ref().map_or(0, NamedPages::count);
        match lock(&self.shared.pages).as_ref().is_some_and(|pages| pages.layout.pages() == named) {
            true => Ok(()),
            false => Err(Mismatch::ChannelsUnknown.into()),
        }
    }

    /// The stream of a background snapshot is over: verifies that it is one that `target` can take, and that every page came.
    fn snapshot_is_whole(&mut self, target: &dyn Target) -> Result<(), Error> {
        if !target.takes_snapshots() {
            return Err(Mismatch::SnapshotRunsOn.into());
        }
        let pages = lock(&self.shared.pages).clone();
        if let (Some(named), Some(Pages { layout, .. })) = (&self.named, pages) {
            return Ok(named.verify_each_once(&layout)?);
        }
        Err(Mismatch::ChannelsUnknown.into())
    }

    fn count_round(&mut self, observer: &mut dyn Observer) {
        let now = self.shared.options.clock.now();
        let snapshot = self.shared.progress.snapshot();
        let (normal, zero, bytes) = self.round_totals;
        self.round_totals = (snapshot.normal, snapshot.zero, snapshot.bytes());
        let stats = RoundStats {
            round: self.rounds,
            dirty_pages: snapshot.normal + snapshot.zero - normal - zero,
            normal: snapshot.normal - normal,
            zero: snapshot.zero - zero,
            bytes: snapshot.bytes() - bytes,
            took: now - self.round_begun,
            guest_running: !self.paused,
            dirty_after: 0,
            expected_downtime: Duration::ZERO,
            throttle: 0,
        };
        self.round_begun = now;
        self.shared.progress.open_round(stats.round + 1, 0);
        observer.event(&Event::Round(stats.clone()));
        self.rounds += 1;
        stats.keep_in(&mut self.report.rounds);
    }

    /// The state of one device.
    fn section(
        &mut self,
        section: &Section,
        target: &mut dyn Target,
        observer: &mut dyn Observer,
    ) -> Result<Body, Error> {
        if section.kind != SectionKind::Full {
            self.ack_timing.more_than_ram();
            return target.section_part(section, self.main()).map(|()| Body::Section);
        }
        let ram_ended = self.main().decoder().ram_ended();
        if ram_ended {
            self.enter_once(Phase::Devices, observer);
        }
        target.section(section, ram_ended, self.main())
    }

    /// Takes the VM over, as [`DestinationCommit`] decides by the messages of the source.
    fn confirm(&mut self, target: &mut dyn Target) -> Result<(), Error> {
        let place = self.main().place();
        if self.report.mode == Mode::Snapshot {
            self.snapshot_is_whole(target)?;
        } else if !self.main().decoder().ram_ended() {
            return Err(Error::protocol(place)(Violation::UnexpectedElement {
                element: "end of the stream",
                place: "before the END section of ram",
            }));
        }
        self.nothing_is_missing()?;
        // A source without uuid names one of zeros.
        let named = lock(&self.shared.seen).uuid.filter(|uuid| *uuid != [0; 16]);
        // What it takes to make everything durable is not the source's silence.
        Pulse::rest(self.watchdog.timers());
        target.prepare(self.report.uuid.or(named))?;
        let two_step = self.extensions.contains(Extension::TwoStepCommit);
        let mut commit = if two_step { DestinationCommit::two_step() } else { DestinationCommit::one_step() };
        let mut action = commit.on(DestinationEvent::Loaded);
        if action == DestinationAction::WriteReady {
            let stall_limit = self.shared.options.stall_limit;
            self.shared.pulse.watch(self.watchdog.timers(), move || stall_limit, &self.shared.stop);
            self.main().reply(&Message::Ready)?;
            self.main().await_go()?;
            Pulse::rest(self.watchdog.timers());
            action = commit.on(DestinationEvent::Go);
        }
        debug_assert_eq!(action, DestinationAction::Start);
        // A cancel that came before wins.
        self.shared.stop.decide()?;
        let mut kept = target.commit();
        if two_step && kept.is_ok() {
            kept = target.start();
        }
        let _ = commit.on(if kept.is_ok() { DestinationEvent::Started } else { DestinationEvent::StartFailed });
        // What is left to do needs the source, and has a limit.
        self.bound_the_end();
        let told = match &kept {
            Ok(()) if self.return_path => self.main().reply(&Message::Shut(0)),
            Ok(()) => Ok(()),
            Err(error) => {
                refuse(self.main.as_mut(), self.return_path, two_step, error);
                Ok(())
            }
        };
        kept?;
        if two_step {
            // The VM runs here, and the source will not resume it, whether it heard of that or not.
            if let Err(error) = told {
                tracing::warn!(%error, "the VM runs here, and the source could not be told");
            }
            return Ok(());
        }
        // Without GO the source may resume when it has not heard of it: then the VM must not start here.
        told.map_err(|error| Error::InDoubt { reason: Box::new(error) })?;
        target.start()
    }

    /// From now on the connections end when the limit has passed, whatever they wait for.
    fn bound_the_end(&self) {
        let shared = self.shared.clone();
        self.watchdog.timers().set("end", self.shared.options.close_timeout, move || {
            shared.connections.stop();
            None
        });
    }

    /// Waits until the source has closed main, for a while: it may not like to lose connections it still uses. The VM
    /// runs by now, so a source that does not is only logged.
    fn await_close(&mut self, target: &mut dyn Target) -> Result<(), Error> {
        let timeout = self.shared.options.close_timeout;
        let mut rest = Vec::new();
        if let Err(error) = self.main().await_close(timeout, &mut rest, MAX_DEVICE_STATE) {
            tracing::debug!(%error, "while waiting for the source to close main");
        }
        if rest.is_empty() { Ok(()) } else { target.rest(&rest) }
    }

    fn main(&mut self) -> &mut MainReader {
        self.main.as_mut().expect("set by await_main")
    }

    fn sink(&self) -> &dyn PageSink {
        &**self.sink.as_ref().expect("the decoder lets no page pass before the block list")
    }

    /// Ends all threads.
    fn finish(mut self, target: &mut dyn Target, outcome: Result<(), Error>) -> Result<Report, Error> {
        self.bound_the_end();
        let failure = outcome.err().map(|error| {
            let stop = self.shared.stop.clone();
            // The source learns it sooner than by a closed connection; it is no matter if it does not.
            let reason = error.to_string();
            let two_step = self.extensions.contains(Extension::TwoStepCommit);
            stop.stop_after(error, || refuse(self.main.as_mut(), self.return_path, two_step, &reason))
        });
        // Channels may wait at the end of a round that never comes.
        self.shared.barrier.stop();
        let late = self.acceptor.finish();
        drop(self.main.take());
        *lock(&self.shared.pages) = None;
        let first = self.shared.stop.take_first();
        // What is still registered refers to what is about to go away.
        let _ = self.shared.stop.decide();
        let Some(not_first) = failure else {
            self.report.audit = self.audit.map(|audit| audit.findings());
            self.report.compression = lock(&self.shared.seen).compression;
            self.report.finish(&self.shared.progress, self.shared.options.clock.now() - self.begun);
            return Ok(self.report);
        };
        target.abandon();
        Err(self.shared.explained(first.or(not_first).or(late).unwrap_or(Error::Stopped)))
    }
}

/// Tells the source that the VM does not run here and never will, if it listens; why, if it understands that.
fn refuse(main: Option<&mut MainReader>, return_path: bool, ours: bool, reason: &dyn std::fmt::Display) {
    let Some(main) = main.filter(|_| return_path) else { return };
    let reason = ours.then(|| main.reply(&Message::Reason(reason.to_string())));
    if let Err(error) = reason.unwrap_or(Ok(())).and_then(|()| main.reply(&Message::Shut(1))) {
        tracing::debug!(%error, "the source could not be told that the VM does not run here");
    }
}

/// Ends all connections when the migration is stopped.
struct ConnectionsStopper(Arc<Connections>);

impl Stopper for ConnectionsStopper {
    fn stop(&self) {
        self.0.stop();
    }
}

/// Whether `item` comes before it is known whose migration it is.
fn is_configuration(item: &Item) -> bool {
    matches!(
        item,
        Item::Header
            | Item::Configuration { .. }
            | Item::ConfigPageBits(_)
            | Item::ConfigCapabilities(_)
            | Item::ConfigUuid(_)
            | Item::ConfigOffer(_)
    )
}

/// Refuses streams that leave out a part of the VM, or put it elsewhere.
fn refuse_capabilities(names: Vec<String>) -> Result<(), violation::Mismatch> {
    // The decoder knows no capabilities that need nothing of us.
    names.into_iter().next().map_or(Ok(()), |name| Err(violation::Mismatch::Capability { name }))
}
