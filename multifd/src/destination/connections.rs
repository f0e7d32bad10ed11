//! All connections of one destination, so that each can be ended, and so that those of strangers stay few.
//!
//! A connection is a stranger's until it has said that it is main, or a channel and has joined. Of those that have not said
//! what they are, and of those that wait to be judged, there is a bounded number: the oldest makes room for the newest.
//!
//! All connections of a source may come in one moment, and none of them has said anything then. So one that has just come does
//! not make room, as long as there are no more than a migration can have.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use crate::{
    stop::stop_one,
    sync::{Mutex, lock},
    transport::{Stopper, Stream},
};

/// Every connection that is open.
pub(super) struct Connections {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// How many there may be that have not said what they are.
    max_silent: usize,
    /// For how long one that is silent has just come.
    fresh_for: Duration,
    /// By number, in the order of their arrival.
    open: BTreeMap<usize, Entry>,
    /// The number of the next one.
    next: usize,
    /// Those whose threads have ended since [`Connections::ended`] was asked.
    ended: Vec<usize>,
    /// Only members are left in peace.
    complete: bool,
    /// What ends main's waiting for its source, and whether it is to be ended.
    interrupter: Option<Box<dyn Stopper>>,
    interrupted: bool,
    /// None is left in peace.
    stopped: bool,
    /// It was said that there are too many.
    crowded: bool,
}

struct Entry {
    stage: Stage,
    came: Instant,
    stopper: Box<dyn Stopper>,
    /// It had to make room, perhaps before it was established.
    dropped: bool,
    /// It outlives its thread: it is main.
    lives_on: bool,
    /// The connection itself, once its thread has failed.
    parked: Option<Box<dyn Stream>>,
}

/// What is known about a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// It has not said what it is.
    Silent,
    /// It says that it is a channel.
    Candidate,
    /// It says that it is main of a source that goes on, and the one before has not ended.
    Next,
    /// It is main, a channel that has joined, or a preempt connection that has brought a page or its end.
    Member,
}

impl Stage {
    /// Whether it belongs to the connections that a source has before it goes on over new ones.
    const fn is_old_member(self) -> bool {
        matches!(self, Stage::Candidate | Stage::Member)
    }
}

impl Connections {
    /// None yet; of those that have not said what they are, at most `max_silent`, and at least one.
    pub(super) fn new(max_silent: usize) -> Connections {
        let state = State { max_silent: max_silent.max(1), fresh_for: FRESH_FOR, ..State::default() };
        Connections { state: Mutex::new(state) }
    }

    /// A connection has come, which `stopper` ends. Returns its number.
    pub(super) fn add(&self, stopper: Box<dyn Stopper>) -> usize {
        let mut state = lock(&self.state);
        let number = state.next;
        state.next += 1;
        if state.stopped || state.complete {
            stop_one(&*stopper);
        }
        let (stage, came) = (Stage::Silent, Instant::now());
        state.open.insert(number, Entry { stage, came, stopper, dropped: false, lives_on: false, parked: None });
        state.make_room(Stage::Silent);
        number
    }

    /// A connection is established; from now on `stopper` ends it.
    pub(super) fn established(&self, number: usize, stopper: Box<dyn Stopper>) {
        let mut state = lock(&self.state);
        let ends = state.stopped || state.complete;
        if let Some(entry) = state.open.get_mut(&number) {
            if ends || std::mem::replace(&mut entry.dropped, false) {
                stop_one(&*stopper);
            }
            entry.stopper = stopper;
        }
    }

    /// More is known about a connection. Returns whether it may go on.
    pub(super) fn advance(&self, number: usize, stage: Stage) -> bool {
        let mut state = lock(&self.state);
        let goes_on = !state.stopped && (!state.complete || stage == Stage::Member);
        if let Some(entry) = state.open.get_mut(&number) {
            entry.stage = stage;
        }
        state.make_room(stage);
        goes_on
    }

    /// A connection's thread ends, and its connection with it, unless it is main.
    pub(super) fn remove(&self, number: usize) {
        let mut state = lock(&self.state);
        if !state.open.get(&number).is_some_and(|entry| entry.lives_on) {
            state.open.remove(&number);
        }
        state.ended.push(number);
    }

    /// A connection's thread has failed, which ends the migration: the connection stays until all are [stopped](Self::stop), so
    /// that its source hears why on main before it sees this one close.
    pub(super) fn park(&self, number: usize, stream: Box<dyn Stream>) {
        let mut state = lock(&self.state);
        state.ended.push(number);
        let stopped = state.stopped;
        let late = match state.open.get_mut(&number).filter(|_| !stopped) {
            Some(entry) => entry.parked.replace(stream),
            None => Some(stream),
        };
        drop(state);
        drop(late);
    }

    /// Connection `number` is main, whose waiting `interrupter` ends.
    pub(super) fn main_is_here(&self, number: usize, interrupter: Box<dyn Stopper>) {
        let mut state = lock(&self.state);
        if let Some(entry) = state.open.get_mut(&number) {
            entry.lives_on = true;
        }
        if state.interrupted {
            stop_one(&*interrupter);
        }
        state.interrupter = Some(interrupter);
    }

    /// Connection `number` outlives its thread, to be main when the one that is main has ended. Returns whether it may.
    pub(super) fn keep_for_later(&self, number: usize) -> bool {
        let mut state = lock(&self.state);
        let goes_on = !state.stopped;
        if let Some(entry) = state.open.get_mut(&number) {
            (entry.stage, entry.lives_on) = (Stage::Next, goes_on);
        }
        goes_on
    }

    /// Ends connection `number`, which has no thread.
    pub(super) fn forget(&self, number: usize) {
        let forgotten = lock(&self.state).open.remove(&number);
        if let Some(entry) = forgotten {
            stop_one(&*entry.stopper);
        }
    }

    /// Ends main, all channels, and the connections `others`. Silent ones stay, and the one that is to be main next.
    pub(super) fn end_members(&self, others: &BTreeSet<usize>) {
        let state = lock(&self.state);
        let is_old = |number: &usize, entry: &Entry| entry.stage.is_old_member() || others.contains(number);
        state
            .open
            .iter()
            .filter(|(number, entry)| is_old(number, entry))
            .for_each(|(_, entry)| stop_one(&*entry.stopper));
    }

    /// Whether a channel or a preempt connection that has brought something has a thread.
    pub(super) fn members_have_threads(&self) -> bool {
        lock(&self.state).open.values().any(|entry| entry.stage.is_old_member() && !entry.lives_on)
    }

    /// The connection that was main has ended.
    pub(super) fn forget_main(&self) {
        let mut state = lock(&self.state);
        state.open.retain(|_, entry| !(entry.lives_on && entry.stage.is_old_member()));
        state.interrupter = None;
    }

    /// Ends main's waiting for its source, now and from now on. All connections stay.
    pub(super) fn interrupt_main(&self) {
        let mut state = lock(&self.state);
        state.interrupted = true;
        if let Some(interrupter) = &state.interrupter {
            stop_one(&**interrupter);
        }
    }

    /// The numbers of connections whose threads have ended, each once.
    pub(super) fn ended(&self) -> Vec<usize> {
        std::mem::take(&mut lock(&self.state).ended)
    }

    /// All members are here: ends all others, now and from now on.
    pub(super) fn complete(&self) {
        let mut state = lock(&self.state);
        state.complete = true;
        state.open.values().filter(|entry| entry.stage != Stage::Member).for_each(|entry| stop_one(&*entry.stopper));
    }

    /// Whether main is here, and every connection has said what it is.
    pub(super) fn are_all_known(&self) -> bool {
        let state = lock(&self.state);
        state.interrupter.is_some() && state.open.values().all(|entry| entry.stage != Stage::Silent)
    }

    /// Whether there is a connection that has not said what it is.
    pub(super) fn any_is_silent(&self) -> bool {
        lock(&self.state).open.values().any(|entry| entry.stage == Stage::Silent)
    }

    /// Whether strangers are ended.
    pub(super) fn are_complete(&self) -> bool {
        let state = lock(&self.state);
        state.complete || state.stopped
    }
}

impl Stopper for Connections {
    /// Ends all, now and from now on.
    fn stop(&self) {
        let mut state = lock(&self.state);
        state.stopped = true;
        state.open.values().for_each(|entry| stop_one(&*entry.stopper));
        let parked: Vec<_> = state.open.values_mut().filter_map(|entry| entry.parked.take()).collect();
        drop(state);
        drop(parked);
    }
}

impl State {
    /// How many there may be at `stage`.
    fn limit(&self, stage: Stage) -> usize {
        match stage {
            Stage::Silent => self.max_silent,
            Stage::Candidate => MAX_CANDIDATES,
            // The newest takes the place of the one before.
            Stage::Next => usize::MAX,
            Stage::Member => usize::MAX,
        }
    }

    /// Ends the oldest at `stage` if there are too many. Its thread notices.
    fn make_room(&mut self, stage: Stage) {
        let alike = self.open.values().filter(|entry| entry.stage == stage).count();
        let limit = self.limit(stage);
        let too_many = alike.saturating_sub(limit);
        let (far_too_many, fresh_for) = (alike.saturating_sub(limit.max(OF_ONE_MIGRATION)), self.fresh_for);
        let mut crowded = self.crowded;
        let oldest = self.open.values_mut().filter(|entry| entry.stage == stage).take(too_many).enumerate();
        for (index, entry) in oldest {
            if index >= far_too_many && entry.came.elapsed() < fresh_for {
                break;
            }
            // A thread may not have noticed yet that its connection was dropped.
            if std::mem::replace(&mut entry.dropped, true) {
                continue;
            }
            // Said once: each is logged when its thread has noticed, as any stranger is.
            if !std::mem::replace(&mut crowded, true) {
                tracing::warn!(limit, "too many connections of strangers: the oldest are dropped, from now on");
            }
            stop_one(&*entry.stopper);
        }
        self.crowded = crowded;
    }
}

/// As many connections as one migration can have that have not said what they are, and some more.
const OF_ONE_MIGRATION: usize = 272;
/// Longer than a TLS handshake takes between distant hosts.
const FRESH_FOR: Duration = Duration::from_secs(3);
/// Connections that say they are channels and are not judged yet: all that there can be of one migration, and some more.
const MAX_CANDIDATES: usize = 320;

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    };

    use super::*;

    const MAX_SILENT: usize = 7;

    struct Count(Arc<AtomicUsize>);

    impl Stopper for Count {
        fn stop(&self) {
            self.0.fetch_add(1, Relaxed);
        }
    }

    fn counted(connections: &Connections) -> (usize, Arc<AtomicUsize>) {
        let count = Arc::new(AtomicUsize::new(0));
        (connections.add(Box::new(Count(count.clone()))), count)
    }

    #[test]
    fn the_oldest_silent_connection_makes_room_and_others_stay() {
        let connections = Connections::new(MAX_SILENT);
        lock(&connections.state).fresh_for = Duration::ZERO;
        let (main, main_stopped) = counted(&connections);
        assert!(connections.advance(main, Stage::Member));
        let all: Vec<_> = (0..=MAX_SILENT).map(|_| counted(&connections)).collect();
        let stopped: Vec<usize> = all.iter().map(|(_, stopped)| stopped.load(Relaxed)).collect();
        assert_eq!((stopped[0], stopped[1..].iter().sum::<usize>()), (1, 0));
        assert_eq!(main_stopped.load(Relaxed), 0);
    }

    /// 255 channels come at once, and the handshake of each takes a moment.
    #[test]
    fn connections_that_have_just_come_make_no_room_while_one_migration_can_have_as_many() {
        let connections = Connections::new(MAX_SILENT);
        lock(&connections.state).fresh_for = Duration::MAX;
        let all: Vec<_> = (0..=OF_ONE_MIGRATION).map(|_| counted(&connections)).collect();
        let stopped: Vec<usize> = all.iter().map(|(_, stopped)| stopped.load(Relaxed)).collect();
        assert_eq!((stopped[0], stopped[1..].iter().sum::<usize>()), (1, 0));
    }

    #[test]
    fn when_all_are_here_only_members_stay() {
        let connections = Connections::new(MAX_SILENT);
        let [(main, main_stopped), (_, silent), (channel, candidate)] = [(); 3].map(|()| counted(&connections));
        connections.advance(main, Stage::Member);
        connections.advance(channel, Stage::Candidate);
        connections.complete();
        assert_eq!([main_stopped, silent, candidate].map(|stopped| stopped.load(Relaxed)), [0, 1, 1]);
        let (late, late_stopped) = counted(&connections);
        assert_eq!(late_stopped.load(Relaxed), 1);
        assert!(!connections.advance(late, Stage::Candidate));
        connections.remove(late);
        assert_eq!((connections.ended(), connections.ended()), (vec![late], vec![]));
    }
}
