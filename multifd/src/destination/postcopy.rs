//! The switch to postcopy, of a source whose memory is taken whole before anything runs here.
//!
//! The source discards what it is going to send again, sends the devices in a package, and pushes every discarded page, on main or,
//! where a page was asked for, on a preempt connection. No page is asked for here. Each comes exactly once; when none is missing the
//! migration is committed as any other. Until then the VM runs nowhere, and its source does not let it run again by itself.

use std::time::Duration;

use multifd_proto::{
    BlockName, DecodeError, Violation,
    postcopy::{DiscardRange, package::Package},
    ram::BlockEntry,
    return_path::Message,
    vmdesc,
};

use super::{Mode, Run, Target, shared::Pages};
use crate::{
    error::{Error, Mismatch, Place},
    progress::{Observer, Phase},
    round::discarded::Discarded,
    stop::StopHandle,
    sync::{Arc, Condvar, Deadline, Mutex, lock, wait, wait_for},
    transport::Stopper,
};

/// What main and preempt connections share.
#[derive(Default)]
pub(super) struct Switch {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Whether the source may switch, so that there may be a preempt connection; once main has come to the RAM blocks.
    announced: Option<bool>,
    /// What was discarded, once the switch has begun.
    discarded: Option<Discarded>,
    /// The block list, once the package has come: pages may be placed.
    blocks: Option<Arc<[BlockEntry]>>,
    /// Pages that were claimed and are not in place yet.
    placing: u64,
    /// Preempt connections that have spoken and have not ended.
    preempts: usize,
    stopped: bool,
}

impl Switch {
    /// Main has said whether the source may switch to postcopy. What it says first counts.
    pub(super) fn announce(&self, may_switch: bool) {
        lock(&self.state).announced.get_or_insert(may_switch);
        self.changed.notify_all();
    }

    /// Whether the source may switch to postcopy, as far as main has said.
    pub(super) fn is_announced(&self) -> bool {
        lock(&self.state).announced == Some(true)
    }

    /// Waits until main has said whether the source may switch to postcopy. It has not at `deadline` or when the migration is stopped.
    pub(super) fn await_announcement(&self, deadline: Deadline) -> bool {
        let mut state = lock(&self.state);
        loop {
            match state.announced {
                Some(announced) => return announced,
                None if state.stopped || deadline.is_over() => return false,
                None => state = wait_for(&self.changed, state, deadline.left()),
            }
        }
    }

    /// Waits until the package has come, and returns the block list.
    ///
    /// # Errors
    /// [`Error::Stopped`].
    pub(super) fn await_package(&self) -> Result<Arc<[BlockEntry]>, Error> {
        let mut state = lock(&self.state);
        loop {
            if state.stopped {
                return Err(Error::Stopped);
            }
            if let Some(blocks) = &state.blocks {
                return Ok(blocks.clone());
            }
            state = wait(&self.changed, state);
        }
    }

    /// A preempt connection has spoken.
    pub(super) fn preempt_begins(&self) {
        lock(&self.state).preempts += 1;
    }

    /// A preempt connection that has spoken has ended.
    pub(super) fn preempt_ends(&self) {
        lock(&self.state).preempts -= 1;
        self.changed.notify_all();
    }

    /// A connection that had not spoken has ended: those who wait look again.
    pub(super) fn look_again(&self) {
        // A thread that waits either waits by now or looks after this.
        drop(lock(&self.state));
        self.changed.notify_all();
    }

    /// Places the page at `offset` of block `block`, if it is one that is missing.
    ///
    /// # Errors
    /// [`Violation::PageNotMissing`] at `place`; that of `put`.
    pub(super) fn place(
        &self,
        pages: &Pages,
        block: usize,
        offset: u64,
        place: Place,
        put: impl FnOnce() -> std::io::Result<()>,
    ) -> Result<(), Error> {
        let mut state = lock(&self.state);
        let layout = &pages.layout.blocks()[block];
        let claimed = match &mut state.discarded {
            Some(discarded) => discarded.claim(layout, offset),
            None => Err(Violation::PageNotMissing { block: layout.name().clone(), offset }),
        };
        claimed.map_err(Error::protocol(place))?;
        state.placing += 1;
        drop(state);
        let placed = put();
        lock(&self.state).placing -= 1;
        self.changed.notify_all();
        placed.map_err(Error::io(place))
    }

    /// Main has ended: waits until all that was discarded is in place. For what a preempt connection brings, it waits no longer than
    /// `patience`, where there is one; otherwise for [`ON_ITS_WAY`].
    ///
    /// # Errors
    /// [`Mismatch::PagesMissing`]; [`Error::Stopped`].
    fn await_pages(&self, patience: Option<Duration>, more_may_come: impl Fn() -> bool) -> Result<(), Error> {
        let (deadline, grace) = (
            Deadline::after(patience),
            Deadline::after(Some(patience.map_or(ON_ITS_WAY, |patience| patience.min(ON_ITS_WAY)))),
        );
        let mut state = lock(&self.state);
        loop {
            if state.stopped {
                return Err(Error::Stopped);
            }
            let (missing, discarded) =
                state.discarded.as_ref().map_or((0, 0), |discarded| (discarded.missing(), discarded.pages()));
            if state.placing == 0 && missing == 0 {
                return Ok(());
            }
            let known = state.preempts > 0 || more_may_come();
            let over = deadline.is_over() || !known && grace.is_over();
            if state.placing == 0 && over {
                return Err(Mismatch::PagesMissing { missing, discarded }.into());
            }
            state = match over {
                true => wait(&self.changed, state),
                false => wait_for(&self.changed, state, if known { deadline.left() } else { grace.left() }),
            };
        }
    }
}

/// Releases the threads that wait for the switch.
pub(super) struct SwitchStopper(pub(super) Arc<Switch>);

impl SwitchStopper {
    /// A switch that `stop` ends.
    pub(super) fn registered(stop: &StopHandle) -> Arc<Switch> {
        let switch = Arc::new(Switch::default());
        stop.register(Box::new(SwitchStopper(switch.clone())));
        switch
    }
}

impl Stopper for SwitchStopper {
    fn stop(&self) {
        lock(&self.0.state).stopped = true;
        self.0.changed.notify_all();
    }
}

impl Run {
    /// The source has discarded `ranges` of `block`, which the decoder has checked.
    pub(super) fn discard(
        &mut self,
        block: &BlockName,
        ranges: &[DiscardRange],
        observer: &mut dyn Observer,
    ) -> Result<(), Error> {
        let place = self.main().place();
        let pages = self.pages();
        self.begin_switch(&pages, observer)?;
        let index = pages.layout.index_of(block.as_str()).expect("the decoder knows the block");
        let layout = &pages.layout.blocks()[index];
        let mut state = lock(&self.shared.switch.state);
        let discarded = state.discarded.as_mut().expect("the switch has begun");
        for range in ranges {
            let page_size = self.shared.page_size as u64;
            let range = range.check(block, layout.bytes(), page_size).map_err(Error::protocol(place))?;
            discarded.discard(layout, &range).map_err(Error::protocol(place))?;
            pages.sink.discard(index, range).map_err(Error::io(place))?;
        }
        Ok(())
    }

    /// The first sign of the switch: the rounds are over.
    ///
    /// The third law: no packet of a round may arrive later than what is discarded. All channels have passed the last sync point with
    /// main, and none has gone on since; from here on one that does is refused.
    fn begin_switch(&mut self, pages: &Pages, observer: &mut dyn Observer) -> Result<(), Error> {
        if lock(&self.shared.switch.state).discarded.is_some() {
            return Ok(());
        }
        let place = self.main().place();
        self.paused = true;
        self.enter_once(Phase::Switchover, observer);
        self.shared.barrier.close(place)?;
        self.look_at_members();
        let discarded = Discarded::new(&pages.layout).map_err(Error::io(place))?;
        lock(&self.shared.switch.state).discarded = Some(discarded);
        Ok(())
    }

    /// Takes the package of `len` bytes.
    pub(super) fn package(&mut self, len: u32, observer: &mut dyn Observer) -> Result<(), Error> {
        // The source has sent RUN, or is about to.
        self.report.mode = Mode::Postcopy;
        let pages = self.pages();
        self.begin_switch(&pages, observer)?;
        let place = self.main().place();
        let bytes = self.main().payload(len as usize)?;
        let package = Package::of(bytes).map_err(Error::protocol(place))?;
        let devices = bytes[package.devices].to_vec();
        if devices.is_empty() || !vmdesc::look_whole(&devices) {
            let what = "its devices are not whole sections";
            return Err(Error::protocol(place)(DecodeError::BadPackage { len: len as usize, what }));
        }
        self.package = Some(devices);
        self.no_round_is_missing(&pages)?;
        for value in package.pings {
            self.main().reply(&Message::Pong(value))?;
        }
        let blocks = self.main().decoder().blocks().into();
        lock(&self.shared.switch.state).blocks = Some(blocks);
        self.shared.switch.changed.notify_all();
        Ok(())
    }

    /// Verifies that what the rounds brought is complete: all channels were here, or nothing that they could have brought is kept.
    fn no_round_is_missing(&mut self, pages: &Pages) -> Result<(), Error> {
        if self.complete {
            return Ok(());
        }
        if let (opened, Some(expected)) = self.shared.barrier.members(|members| (members.joined(), members.channels()))
        {
            return Err(Mismatch::Channels { opened, expected }.into());
        }
        let state = lock(&self.shared.switch.state);
        let discarded = state.discarded.as_ref().expect("the switch has begun");
        match discarded.covers_with(self.named.as_ref().map(|named| named.pages()), &pages.layout) {
            true => Ok(()),
            false => Err(Mismatch::ChannelsUnknown.into()),
        }
    }

    /// Takes a page that main pushes after the switch: the payload of `content` bytes, or zeros.
    pub(super) fn pushed_page(&mut self, block: usize, offset: u64, content: Option<usize>) -> Result<(), Error> {
        let (pages, place) = (self.pages(), self.main().place());
        let payload = content.map(|len| self.main().payload(len).map(<[u8]>::to_vec)).transpose()?;
        let put = || match &payload {
            Some(payload) => pages.sink.store(block, &[offset], payload),
            None => pages.sink.zero(block, &[offset]),
        };
        self.shared.switch.place(&pages, block, offset, place, put)?;
        self.wrote(block, offset);
        let content = u64::from(payload.is_some());
        self.shared.progress.add_pages(content, 1 - content);
        Ok(())
    }

    /// Main has ended after the switch: takes what preempt connections still bring, and hands the devices over.
    ///
    /// # Errors
    /// Pages are missing; the target's.
    pub(super) fn postcopy_is_whole(&mut self, target: &mut dyn Target) -> Result<(), Error> {
        let connections = self.shared.connections.clone();
        let patience = self.shared.options.setup_timeout;
        self.shared.switch.await_pages(patience, || connections.any_is_silent())?;
        self.sink().settle(true);
        let devices = self.package.take().expect("the decoder ends no postcopy without its package");
        target.devices(&devices, self.shared.page_size)
    }

    fn pages(&self) -> Pages {
        lock(&self.shared.pages).clone().expect("the decoder lets no switch pass before the block list")
    }
}

/// How long after the end of main a connection that is not here may still bring what is missing: one that main has overtaken.
const ON_ITS_WAY: Duration = Duration::from_secs(1);
