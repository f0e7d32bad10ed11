//! What all threads of one destination share.

use std::time::Duration;

use multifd_proto::{
    ChannelId,
    membership::Stranger,
    packet::{Compression, Hello},
    rounds::{Party, Sync},
};

use super::{
    Options, PageSink,
    connections::Connections,
    opaque_state::{Opaque, OpaqueState},
    postcopy::{Switch, SwitchStopper},
    state_window::StateWindow,
};
use crate::{
    compress::Windows,
    error::{Error, Place},
    layout::Layout,
    progress::Progress,
    pulse::Pulse,
    round::{audit::Audit, barrier::RoundBarrier},
    stop::StopHandle,
    sync::{
        Arc, Condvar, Deadline, Mutex,
        atomic::{AtomicBool, AtomicU64},
        lock, wait, wait_for,
    },
    transport::{FarEnd, RecvHalf, SendHalf, Stopper},
    watchdog::Timers,
};

/// What all threads of one destination share.
pub(super) struct Shared {
    pub(super) page_size: usize,
    /// There is one connection, so there are no channels.
    pub(super) single: bool,
    pub(super) barrier: RoundBarrier,
    /// The memory of all decompressors.
    pub(super) windows: Arc<Windows>,
    pub(super) progress: Progress,
    /// What all connections moved; by it the migration notices that the source is silent.
    pub(super) pulse: Pulse,
    pub(super) stop: StopHandle,
    /// What the watchdog waits for.
    pub(super) timers: Timers,
    pub(super) options: Options,
    /// Main, once a connection turned out to be it.
    pub(super) main: Mutex<MainSlot>,
    pub(super) main_changed: Condvar,
    /// Where pages go; set before main reaches the first sync point, so every channel finds it behind that.
    pub(super) pages: Mutex<Option<Pages>>,
    pub(super) seen: Mutex<Seen>,
    /// Pages named on all channels. Main compares it with itself; nothing is ordered by it.
    pub(super) channel_pages: AtomicU64,
    /// A SYNC packet has come that QEMU 7.2 does not send.
    pub(super) newer_packets: AtomicBool,
    /// Device state that comes on channels.
    pub(super) state: StateWindow,
    /// Device state that comes on channels and is kept as it is.
    pub(super) opaque: OpaqueState,
    /// The switch to postcopy.
    pub(super) switch: Arc<Switch>,
    /// Ends every connection: they outlive the migration's own end by [`StopHandle`].
    pub(super) connections: Arc<Connections>,
    #[cfg(any(test, feature = "__broken-variants"))]
    pub(super) loose: crate::testing::broken::LooseBarrier,
}

/// Where pages go, and the blocks that they may name.
#[derive(Clone)]
pub(super) struct Pages {
    pub(super) layout: Arc<Layout>,
    pub(super) sink: Arc<dyn PageSink>,
    pub(super) audit: Option<Arc<Audit>>,
    /// Where device-state packets go that nothing here understands, if there is a place for them.
    pub(super) opaque: Option<Opaque>,
}

/// What the connections have said so far.
#[derive(Default)]
pub(super) struct Seen {
    /// In the configuration of main.
    pub(super) main_uuid: Option<[u8; 16]>,
    /// In the offer of main: what its channels say in place of the uuid.
    pub(super) main_token: Option<[u8; 16]>,
    /// Of the first channel that has joined. It is the same on all.
    pub(super) uuid: Option<[u8; 16]>,
    /// Of the first payload, on any channel.
    pub(super) compression: Option<Compression>,
    /// Connections that were dropped.
    pub(super) strangers: u64,
    /// Who the last of them was, and what it did.
    pub(super) last_stranger: Option<String>,
    /// The last that said it is a channel which there cannot be with the number that was required, and that number.
    pub(super) beyond: Option<(ChannelId, usize)>,
}

impl Shared {
    /// What a migration that has not begun shares, over a `single` connection or as many as it has. `stop` ends all that
    /// waits in it.
    pub(super) fn new(
        options: Options,
        page_size: usize,
        single: bool,
        stop: StopHandle,
        progress: Progress,
        timers: Timers,
    ) -> Arc<Shared> {
        let connections = Arc::new(Connections::new(options.max_unidentified));
        let switch = SwitchStopper::registered(&stop);
        let state = StateWindow::new(&options.trace);
        let shared = Arc::new(Shared {
            page_size,
            single,
            switch,
            barrier: RoundBarrier::open(options.channels.map(usize::from)),
            windows: Arc::default(),
            #[cfg(any(test, feature = "__broken-variants"))]
            loose: crate::testing::broken::LooseBarrier::new(options.broken),
            progress,
            pulse: Pulse::default(),
            stop,
            timers,
            options,
            main: Mutex::new(MainSlot::default()),
            main_changed: Condvar::new(),
            pages: Mutex::new(None),
            seen: Mutex::default(),
            channel_pages: AtomicU64::new(0),
            newer_packets: AtomicBool::new(false),
            state,
            opaque: OpaqueState::default(),
            connections,
        });
        shared.stop.register(Box::new(shared.barrier.clone()));
        shared.stop.register(shared.state.stopper());
        shared.stop.register(shared.opaque.stopper());
        #[cfg(any(test, feature = "__broken-variants"))]
        shared.stop.register(Box::new(shared.loose.clone()));
        shared.stop.register(Box::new(MainSlotStopper(shared.clone())));
        let (connections, limit) = (shared.connections.clone(), shared.options.close_timeout);
        shared.stop.register(Box::new(LastWord { connections, timers: shared.timers.clone(), limit }));
        shared
    }

    /// From now on the connections end when the limit of the end has passed, whatever they wait for.
    pub(super) fn bound_the_end(&self) {
        bound_the_end(&self.connections, &self.timers, self.options.close_timeout);
    }

    /// Reaches the end of the round, whose number it returns; `None` where there is nothing to wait for.
    pub(super) fn arrive(&self, party: Party, place: Place) -> Result<Option<u64>, Error> {
        #[cfg(any(test, feature = "__broken-variants"))]
        if let Some(passed) = self.loose.arrive(party) {
            return passed.map(|()| None);
        }
        self.barrier.arrive(party, place).map(Some)
    }

    /// The channel that said `hello` is at its first SYNC and joins. Returns the round to wait for, if there is one.
    pub(super) fn join(&self, hello: &Hello, sync: Sync, place: Place) -> Result<Result<Option<u64>, Stranger>, Error> {
        let joined = self.barrier.join(hello.channel, hello.channels, sync, place)?;
        #[cfg(any(test, feature = "__broken-variants"))]
        if joined.is_ok() {
            // The first time it only counts.
            let _ = self.loose.arrive(Party::Channel(hello.channel));
        }
        Ok(joined)
    }

    /// A channel is at a SYNC. Returns the number of the round; `None` where there is nothing to wait for.
    pub(super) fn sync(&self, id: ChannelId, sync: Sync, place: Place) -> Result<Option<u64>, Error> {
        #[cfg(any(test, feature = "__broken-variants"))]
        if let Some(passed) = self.loose.arrive(Party::Channel(id)) {
            return passed.map(|()| None);
        }
        self.barrier.sync(id, sync, place).map(Some)
    }

    /// Whether the last round is over.
    pub(super) fn rounds_are_over(&self) -> bool {
        #[cfg(any(test, feature = "__broken-variants"))]
        if self.loose.is_active() {
            return true;
        }
        self.barrier.rounds_are_over()
    }

    /// A channel has brought the first pages of a round.
    pub(super) fn begin(&self, id: ChannelId, place: Place) -> Result<(), Error> {
        #[cfg(any(test, feature = "__broken-variants"))]
        if self.loose.is_active() {
            return Ok(());
        }
        self.barrier.begin(id, place)
    }

    /// Waits for all others at the end of `round`.
    pub(super) fn pass(&self, round: Option<u64>) -> Result<(), Error> {
        round.map_or(Ok(()), |round| self.barrier.pass(round))
    }

    /// Main has said whose migration it is: channels can be told from strangers.
    pub(super) fn identified(&self) {
        lock(&self.main).identified = true;
        self.main_changed.notify_all();
    }

    pub(super) fn is_identified(&self) -> bool {
        lock(&self.main).identified
    }

    /// Whether main is here. It says whose migration it is, or the migration ends.
    pub(super) fn has_main(&self) -> bool {
        lock(&self.main).taken
    }

    /// Waits until main has said whose migration it is. Returns whether it has; it has not where there is no main at `deadline`.
    ///
    /// # Errors
    /// [`Error::Stopped`], also when the migration is over.
    pub(super) fn await_identified(&self, deadline: Deadline) -> Result<bool, Error> {
        let mut slot = lock(&self.main);
        while !slot.identified {
            if slot.stopped {
                return Err(Error::Stopped);
            }
            if slot.taken {
                slot = wait(&self.main_changed, slot);
            } else if deadline.is_over() {
                return Ok(false);
            } else {
                slot = wait_for(&self.main_changed, slot, deadline.left());
            }
        }
        Ok(true)
    }

    /// Lets `time` pass, or less if the migration ends. Returns whether it has.
    pub(super) fn pause(&self, time: Duration) -> bool {
        let deadline = Deadline::after(Some(time));
        let mut slot = lock(&self.main);
        while !slot.stopped && !deadline.is_over() {
            slot = wait_for(&self.main_changed, slot, deadline.left());
        }
        slot.stopped
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

/// A connection that said it is main.
pub(super) struct MainConnection {
    pub(super) sends: Box<dyn SendHalf>,
    pub(super) receives: Box<dyn RecvHalf>,
    pub(super) far_end: FarEnd,
    /// The other end, for messages.
    pub(super) peer: String,
    /// The bytes that were read from it.
    pub(super) heard: Vec<u8>,
}

#[derive(Default)]
pub(super) struct MainSlot {
    /// Until the main thread has it.
    pub(super) connection: Option<MainConnection>,
    pub(super) taken: bool,
    /// The main of a source that goes on, with the number of the connection, until the one before has broken.
    pub(super) next: Option<(usize, MainConnection)>,
    /// Main has said whose migration it is.
    pub(super) identified: bool,
    pub(super) stopped: bool,
}

/// When the migration is stopped, main no longer waits for its source, says why it ends, and ends the connections. It is
/// given so long for that: it may be in a call of the VM, or write to a source that does not read.
struct LastWord {
    connections: Arc<Connections>,
    timers: Timers,
    limit: Duration,
}

impl Stopper for LastWord {
    fn stop(&self) {
        self.connections.interrupt_main();
        bound_the_end(&self.connections, &self.timers, self.limit);
    }
}

/// From now on the connections end when `limit` has passed, whatever they wait for. There is always time to say how it ends.
fn bound_the_end(connections: &Arc<Connections>, timers: &Timers, limit: Duration) {
    let connections = connections.clone();
    timers.set("end", limit.max(TO_SAY_IT), move || {
        connections.stop();
        None
    });
}

/// What the source is told takes a moment, however little it is waited for afterwards.
const TO_SAY_IT: Duration = Duration::from_secs(1);
