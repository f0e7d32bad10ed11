//! The switch to postcopy, of a source whose memory is taken whole before anything runs here.
//!
//! The source discards what it is going to send again, sends the devices in a package, and pushes every discarded page, on main or,
//! where a page was asked for, on a preempt connection. No page is asked for here. Each comes exactly once; when none is missing the
//! migration is committed as any other. Until then the VM runs nowhere. A source may let it run again by itself if we fail, or keep it paused.

use std::{collections::BTreeSet, time::Duration};

use multifd_proto::{
    BlockName, DecodeError, Violation,
    postcopy::{DiscardRange, Package, ReachedAfterSwitch as Reached},
    ram::BlockEntry,
    return_path::Message,
    vmdesc::WholeScanner,
};

use super::{
    Mode, Run, Target,
    shared::{Pages, Shared},
};
use crate::{
    channel_end::local,
    error::{Error, Mismatch, Place},
    layout::BlockLayout,
    postcopy::trace::{HandOver, Via},
    progress::{Observer, Phase},
    round::{discarded::Discarded, trace::Step},
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

struct State {
    /// Whether the source may switch, so that there may be a preempt connection; once main has come to the RAM blocks.
    announced: Option<bool>,
    /// What was discarded, once the switch has begun.
    discarded: Option<Discarded>,
    /// The block list, once the package has come: pages may be placed.
    blocks: Option<Arc<[BlockEntry]>>,
    /// Pages that were claimed and are not in place yet.
    placing: u64,
    /// The lowest number of a connection whose pages are taken; none while main is lost.
    taken_from: Option<usize>,
    /// Preempt connections whose words are read.
    reading: BTreeSet<usize>,
    /// How many of them have brought a page or their end.
    preempts: usize,
    /// Why all connections were given up, where it was not main that noticed it first.
    lost: Option<Error>,
    stopped: bool,
}

impl Default for State {
    /// Connections come in any order, so all are taken with the first main.
    fn default() -> State {
        State {
            announced: None,
            discarded: None,
            blocks: None,
            placing: 0,
            taken_from: Some(0),
            reading: BTreeSet::new(),
            preempts: 0,
            lost: None,
            stopped: false,
        }
    }
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

    /// Preempt connection `number` has something to say: waits until the package has come, and returns the block list. `None`: the
    /// connection belongs to a main that was lost, and its pages are not taken.
    ///
    /// # Errors
    /// [`Error::Stopped`].
    pub(super) fn preempt_begins(&self, number: usize) -> Result<Option<Arc<[BlockEntry]>>, Error> {
        let mut state = lock(&self.state);
        loop {
            if state.stopped {
                return Err(Error::Stopped);
            }
            match (state.taken_from, state.blocks.clone()) {
                (Some(first), Some(_)) if number < first => return Ok(None),
                (Some(_), Some(blocks)) => {
                    state.reading.insert(number);
                    return Ok(Some(blocks));
                }
                _ => state = wait(&self.changed, state),
            }
        }
    }

    /// The first word of a preempt connection was accepted.
    pub(super) fn preempt_is_accepted(&self) {
        lock(&self.state).preempts += 1;
    }

    /// Preempt connection `number`, which may have been accepted, has ended.
    pub(super) fn preempt_ends(&self, number: usize, accepted: bool) {
        let mut state = lock(&self.state);
        state.reading.remove(&number);
        state.preempts -= usize::from(accepted);
        drop(state);
        self.changed.notify_all();
    }

    /// Whether the package has come.
    pub(super) fn has_package(&self) -> bool {
        lock(&self.state).blocks.is_some()
    }

    /// How far the connections other than main have come.
    pub(super) fn reached(&self) -> Reached {
        let state = lock(&self.state);
        let is_whole = state.discarded.as_ref().is_some_and(|discarded| discarded.missing() == 0);
        if is_whole && state.blocks.is_some() { Reached::Whole } else { Reached::Pages }
    }

    /// All connections are given up because of `error`. Returns the preempt connections.
    pub(super) fn lose(&self, error: Error) -> BTreeSet<usize> {
        let mut state = lock(&self.state);
        state.lost.get_or_insert(error);
        self.changed.notify_all();
        state.reading.clone()
    }

    /// Main is lost: no preempt connection begins to bring pages until [`go_on_from`](Self::go_on_from). Returns those that have begun.
    pub(super) fn suspend(&self) -> BTreeSet<usize> {
        let mut state = lock(&self.state);
        state.taken_from = None;
        state.reading.clone()
    }

    /// Waits until no thread of an old connection places a page any more; `are_gone` says whether those of channels have ended.
    ///
    /// # Errors
    /// [`Error::Stopped`].
    pub(super) fn await_suspension(&self, are_gone: impl Fn() -> bool) -> Result<(), Error> {
        let mut state = lock(&self.state);
        while !(state.reading.is_empty() && state.placing == 0 && are_gone()) {
            if state.stopped {
                return Err(Error::Stopped);
            }
            state = wait(&self.changed, state);
        }
        // What the threads that ended met on their way is no news.
        state.lost = None;
        Ok(())
    }

    /// Connection `number` is main now. What preempt connections bring that came before it is not taken.
    pub(super) fn go_on_from(&self, number: usize) {
        lock(&self.state).taken_from = Some(number);
        self.changed.notify_all();
    }

    /// Main is lost, for the reason `error` if there was none before. Returns the first reason, and how many pages are missing.
    pub(super) fn lost(&self, error: Error) -> (Error, u64) {
        let mut state = lock(&self.state);
        let first = state.lost.take().unwrap_or(error);
        (first, state.discarded.as_ref().map_or(0, Discarded::missing))
    }

    /// Calls `tell` with the number of pages of `block`, and with those that are in place, counted from its first page.
    pub(super) fn received(&self, block: &BlockLayout, tell: impl FnOnce(u64, &mut dyn Iterator<Item = u64>)) {
        let state = lock(&self.state);
        let first = block.first_page();
        let is_here = |page: &u64| !state.discarded.as_ref().is_some_and(|discarded| discarded.lacks(first + page));
        tell(block.pages(), &mut (0..block.pages()).filter(is_here));
    }

    /// A connection that had not spoken has ended: those who wait look again.
    pub(super) fn look_again(&self) {
        // A thread that waits either waits by now or looks after this.
        drop(lock(&self.state));
        self.changed.notify_all();
    }

    /// Places the page at `offset` of `block`, if it is one that is missing.
    ///
    /// # Errors
    /// [`Violation::PageNotMissing`] at `place`; that of `put`.
    pub(super) fn place(
        &self,
        block: &BlockLayout,
        offset: u64,
        place: Place,
        put: impl FnOnce() -> std::io::Result<()>,
    ) -> Result<(), Error> {
        let mut state = lock(&self.state);
        let claimed = match &mut state.discarded {
            Some(discarded) => discarded.claim(block, offset),
            None => Err(Violation::PageNotMissing { block: block.name().clone(), offset }),
        };
        claimed.map_err(Error::protocol(place))?;
        state.placing += 1;
        drop(state);
        let placed = put();
        lock(&self.state).placing -= 1;
        self.changed.notify_all();
        placed.map_err(|error| Error::io(place)(local(error)))
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
            if state.placing == 0
                && let Some(lost) = state.lost.take()
            {
                return Err(lost);
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
            let given_up = discarded.discard(layout, &range).map_err(Error::protocol(place))?;
            self.shared.step(|| HandOver::Discard(given_up.collect()));
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
        self.shared.step(|| HandOver::Barrier);
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
        let (devices, pings) = (bytes[package.devices].to_vec(), package.pings);
        if devices.is_empty() || !WholeScanner::default().scan(&devices) {
            let what = "its devices are not whole sections";
            return Err(Error::protocol(place)(DecodeError::BadPackage { len: len as usize, what }));
        }
        self.package = Some(devices);
        self.no_round_is_missing(&pages)?;
        let blocks = self.main().decoder().blocks().into();
        self.shared.step(|| HandOver::Run);
        lock(&self.shared.switch.state).blocks = Some(blocks);
        self.shared.switch.changed.notify_all();
        if self.shared.may_go_on() {
            self.shared.watch_for_breaks(self.shared.options.stall_limit);
        }
        for value in pings {
            self.main().reply(&Message::Pong(value))?;
        }
        self.enter(Phase::Postcopy, observer);
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
        self.writes(block, &[offset]);
        self.shared.place(&pages, block, offset, place, put)?;
        self.count(block, &[offset]);
        let content = u64::from(payload.is_some());
        self.shared.progress.add_pages(content, 1 - content);
        Ok(())
    }

    /// Main has ended: takes what preempt connections still bring, after a switch.
    ///
    /// # Errors
    /// Pages are missing; a connection is lost; [`Error::Stopped`].
    pub(super) fn await_pushed_pages(&mut self) -> Result<(), Error> {
        if self.report.mode != Mode::Postcopy {
            return Ok(());
        }
        let connections = self.shared.connections.clone();
        let patience = self.shared.options.setup_timeout;
        self.shared.switch.await_pages(patience, || connections.any_is_silent())?;
        self.shared.step(|| HandOver::End);
        Ok(())
    }

    /// Every page is in place after a switch: hands the devices over.
    ///
    /// # Errors
    /// The target's.
    pub(super) fn postcopy_is_whole(&mut self, target: &mut dyn Target) -> Result<(), Error> {
        self.sink().settle(true);
        let devices = self.package.take().expect("the decoder ends no postcopy without its package");
        target.devices(&devices, self.shared.page_size)
    }

    pub(super) fn pages(&self) -> Pages {
        lock(&self.shared.pages).clone().expect("the decoder lets no switch pass before the block list")
    }
}

impl Shared {
    /// A step of the hand-over happens.
    pub(super) fn step(&self, step: impl FnOnce() -> HandOver) {
        self.options.trace.step(|| Step::HandOver(step()));
    }

    /// [Places](Switch::place) a page that came on the connection of `place`.
    pub(super) fn place(
        &self,
        pages: &Pages,
        block: usize,
        offset: u64,
        place: Place,
        put: impl FnOnce() -> std::io::Result<()>,
    ) -> Result<(), Error> {
        let layout = &pages.layout.blocks()[block];
        self.switch.place(layout, offset, place, || {
            self.step(|| HandOver::Place(Via::of(place.connection), layout.page_at(offset)));
            put()
        })
    }
}

/// How long after the end of main a connection that is not here may still bring what is missing: one that main has overtaken.
const ON_ITS_WAY: Duration = Duration::from_secs(1);

#[cfg(all(test, loom))]
mod loom;

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use std::io;

    use multifd_proto::channel_end::End;

    use super::*;
    use crate::{channel_end::end_by, error::Connection, layout::Layout};

    /// A page that a file on another host did not take was not missing any more, and the error was taken for one of the connection: the
    /// source went on with the others, and the checkpoint was published without that page.
    #[test]
    fn a_page_that_is_not_put_into_place_is_no_lost_connection() {
        let layout = Layout::new(4096, [(BlockName::new("ram").unwrap(), 8 * 4096)]).unwrap();
        let mut discarded = Discarded::new(&layout).unwrap();
        discarded.discard(&layout.blocks()[0], &(0..4096)).unwrap();
        let switch = Switch::default();
        lock(&switch.state).discarded = Some(discarded);
        let at = Place { connection: Connection::Main, offset: 0 };
        let error = switch.place(&layout.blocks()[0], 0, at, || Err(io::ErrorKind::TimedOut.into())).unwrap_err();
        assert_eq!(end_by(&error, false), End::Local, "{error}");
    }
}
