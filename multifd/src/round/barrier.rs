//! Where main and all channels meet at the end of a round, on the source and on the destination.
//!
//! [`Rounds`] decides who has arrived; this adds the waiting. No party passes before all have arrived, and every wait ends:
//! a party that left, a broken rule or [`RoundBarrier::stop`] releases all. A party that has something to do between
//! arriving and passing does it without being woken twice. Main's wait for channels that have not come has a limit.

use std::{num::NonZeroU8, time::Duration};

use multifd_proto::{
    ChannelId,
    membership::{Membership, Stranger},
    rounds::{Arrival, Party, Rounds, Sync},
};

use crate::{
    error::{Error, Place},
    sync::{Arc, Condvar, Deadline, Mutex, MutexGuard, lock, wait, wait_for},
    transport::Stopper,
};

/// The meeting point of one side of a migration. Clones are the same barrier.
#[derive(Clone)]
pub(crate) struct RoundBarrier {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    /// The round is over, or only channels that have not joined are missing.
    over: Condvar,
    /// Only main is missing.
    gathered: Condvar,
}

struct State {
    rounds: Rounds,
    /// All parties leave, also those that wait.
    stopped: bool,
}

/// What main's wait came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Passed {
    /// The round is over.
    Over,
    /// All that have joined are at its end, and a channel is missing that did not come within the limit.
    Missing,
    /// Nothing happened so far: main may look at something else and wait on.
    NotYet,
}

/// How long main waits at the end of one round.
pub(crate) struct Patience {
    /// For channels that have not joined, counted from when only they are missing; `None`: without end.
    limit: Option<Duration>,
    /// Set when only they were missing for the first time.
    deadline: Option<Deadline>,
    /// After how long main looks at something else. Model checkers have no clock: main never does there.
    slice: Option<Duration>,
}

impl Patience {
    /// Waits for missing channels for at most `limit`, and looks up every `slice`.
    pub(crate) fn new(limit: Option<Duration>, slice: Duration) -> Patience {
        Patience { limit, deadline: None, slice: Some(slice) }
    }

    /// The same without looking up.
    #[cfg(all(test, not(any(loom, shuttle))))]
    fn without_looking(limit: Option<Duration>) -> Patience {
        Patience { limit, deadline: None, slice: None }
    }
}

impl RoundBarrier {
    /// A barrier for main and `channels` channels, which are all here.
    pub(crate) fn new(channels: usize) -> RoundBarrier {
        RoundBarrier::with(Rounds::new(channels))
    }

    /// A barrier for main and the channels that will join: `required`, or as many as turn out.
    pub(crate) fn open(required: Option<usize>) -> RoundBarrier {
        RoundBarrier::with(Rounds::open(required))
    }

    fn with(rounds: Rounds) -> RoundBarrier {
        let state = State { rounds, stopped: false };
        RoundBarrier {
            shared: Arc::new(Shared { state: Mutex::new(state), over: Condvar::new(), gathered: Condvar::new() }),
        }
    }

    /// Looks at which channels take part, or adds what main says about it.
    pub(crate) fn members<T>(&self, look: impl FnOnce(&mut Membership) -> T) -> T {
        look(&mut lock(&self.shared.state).rounds.members)
    }

    /// Whether the channel that says `id` and `told` could join.
    ///
    /// # Errors
    /// It is none of this migration, or comes too late.
    pub(crate) fn admit(&self, id: ChannelId, told: Option<NonZeroU8>) -> Result<(), Stranger> {
        lock(&self.shared.state).rounds.admit(id, told)
    }

    /// The channel that says `id` and `told` is at its first SYNC and joins. Returns the round to wait for, if there is one.
    ///
    /// # Errors
    /// The outer one as [`sync`](Self::sync); the inner one as [`admit`](Self::admit).
    pub(crate) fn join(
        &self,
        id: ChannelId,
        told: Option<NonZeroU8>,
        sync: Sync,
        place: Place,
    ) -> Result<Result<Option<u64>, Stranger>, Error> {
        let mut state = lock(&self.shared.state);
        if state.stopped {
            return Err(Error::Stopped);
        }
        if let Err(stranger) = state.rounds.admit(id, told) {
            return Ok(Err(stranger));
        }
        let round = state.rounds.round();
        let arrival = state.rounds.join(id, told, sync).map_err(Error::protocol(place))?;
        Ok(Ok(self.announce(state, arrival).then_some(round)))
    }

    /// A channel is at a SYNC. Returns the number of the round, and does not wait.
    ///
    /// # Errors
    /// As [`arrive`](Self::arrive).
    pub(crate) fn sync(&self, id: ChannelId, sync: Sync, place: Place) -> Result<u64, Error> {
        self.arrives(place, |rounds| rounds.sync(id, sync))
    }

    /// A channel has brought pages of the current round, which are not in place yet.
    ///
    /// # Errors
    /// Main has passed its last sync point: a violation at `place`.
    pub(crate) fn begin(&self, id: ChannelId, place: Place) -> Result<(), Error> {
        lock(&self.shared.state).rounds.begin(id).map_err(Error::protocol(place))
    }

    /// Main has said that this round is the last.
    pub(crate) fn is_last(&self) {
        lock(&self.shared.state).rounds.is_last();
    }

    /// Whether the last round is over.
    pub(crate) fn rounds_are_over(&self) -> bool {
        lock(&self.shared.state).rounds.are_over()
    }

    /// Main has passed its last sync point.
    ///
    /// # Errors
    /// A channel has gone on after it: a violation at `place`.
    pub(crate) fn close(&self, place: Place) -> Result<(), Error> {
        lock(&self.shared.state).rounds.close().map_err(Error::protocol(place))
    }

    /// Reaches the end of the round and waits for all others. Returns the number of the round that is over.
    ///
    /// # Errors
    /// As [`arrive`](Self::arrive) and [`pass`](Self::pass).
    pub(crate) fn meet(&self, party: Party, place: Place) -> Result<u64, Error> {
        let round = self.arrive(party, place)?;
        self.pass(round)?;
        Ok(round)
    }

    /// Reaches the end of the round, whose number it returns, and does not wait.
    ///
    /// # Errors
    /// [`Error::Stopped`] after [`stop`](Self::stop); a violation (at `place`) where the round can never be complete.
    pub(crate) fn arrive(&self, party: Party, place: Place) -> Result<u64, Error> {
        self.arrives(place, |rounds| rounds.arrive(party))
    }

    fn arrives(
        &self,
        place: Place,
        arrive: impl FnOnce(&mut Rounds) -> Result<Arrival, multifd_proto::ProtocolError>,
    ) -> Result<u64, Error> {
        let mut state = lock(&self.shared.state);
        if state.stopped {
            return Err(Error::Stopped);
        }
        let round = state.rounds.round();
        let arrival = arrive(&mut state.rounds).map_err(Error::protocol(place))?;
        self.announce(state, arrival);
        Ok(round)
    }

    /// Wakes those for whom `arrival` makes a difference. Returns whether the one that arrives has something to wait for.
    fn announce(&self, state: MutexGuard<'_, State>, arrival: Arrival) -> bool {
        let over = arrival == Arrival::Completes || state.rounds.awaits_strangers_only();
        let gathered = state.rounds.awaits_main_only();
        // Those who wake look at the state at once, and would find it locked.
        drop(state);
        if over {
            self.shared.over.notify_all();
        } else if gathered {
            self.shared.gathered.notify_one();
        }
        arrival != Arrival::Joins
    }

    /// Waits until `round`, at whose end the caller has arrived, is over.
    ///
    /// # Errors
    /// [`Error::Stopped`] after [`stop`](Self::stop), if the round was not over by then.
    pub(crate) fn pass(&self, round: u64) -> Result<(), Error> {
        let mut state = lock(&self.shared.state);
        while state.rounds.round() == round {
            if state.stopped {
                return Err(Error::Stopped);
            }
            state = wait(&self.shared.over, state);
        }
        Ok(())
    }

    /// As [`pass`](Self::pass) for main, whose wait has limits.
    ///
    /// Where no channel comes and nothing says that there is one, the round ends without.
    ///
    /// # Errors
    /// As [`pass`](Self::pass).
    pub(crate) fn pass_within(&self, round: u64, patience: &mut Patience) -> Result<Passed, Error> {
        let slice = Deadline::after(patience.slice);
        let mut state = lock(&self.shared.state);
        while state.rounds.round() == round {
            if state.stopped {
                return Err(Error::Stopped);
            }
            let mut left = slice.left();
            if state.rounds.awaits_strangers_only() {
                let deadline = *patience.deadline.get_or_insert_with(|| Deadline::after(patience.limit));
                if deadline.is_over() {
                    if !state.rounds.go_alone() {
                        return Ok(Passed::Missing);
                    }
                    continue;
                }
                left = left.into_iter().chain(deadline.left()).min();
            }
            if slice.is_over() {
                return Ok(Passed::NotYet);
            }
            state = wait_for(&self.shared.over, state, left);
        }
        Ok(Passed::Over)
    }

    /// Has main wait until all channels have arrived. They stay until main arrives, too.
    ///
    /// # Errors
    /// [`Error::Stopped`] after [`stop`](Self::stop), if they had not all arrived by then.
    pub(crate) fn gather(&self) -> Result<(), Error> {
        self.gather_until(Deadline::after(None)).map(drop)
    }

    /// As [`gather`](Self::gather), and until `deadline` at the most. Returns whether all have arrived.
    ///
    /// # Errors
    /// As [`gather`](Self::gather).
    pub(crate) fn gather_until(&self, deadline: Deadline) -> Result<bool, Error> {
        let mut state = lock(&self.shared.state);
        while !state.rounds.awaits_main_only() {
            if state.stopped {
                return Err(Error::Stopped);
            }
            if deadline.is_over() {
                return Ok(false);
            }
            state = wait_for(&self.shared.gathered, state, deadline.left());
        }
        Ok(true)
    }

    /// `channel` has ended cleanly and comes to no later round.
    ///
    /// # Errors
    /// Another party waits at the end of a round that this channel has not reached: a violation at `place`.
    pub(crate) fn leave(&self, channel: ChannelId, place: Place) -> Result<(), Error> {
        lock(&self.shared.state).rounds.leave(channel).map_err(Error::protocol(place))
    }

    /// Releases all parties, now and from now on.
    pub(crate) fn stop(&self) {
        lock(&self.shared.state).stopped = true;
        self.shared.over.notify_all();
        self.shared.gathered.notify_all();
    }
}

impl Stopper for RoundBarrier {
    fn stop(&self) {
        RoundBarrier::stop(self);
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

    use super::*;
    use crate::error::Connection;

    const AT: Place = Place { connection: Connection::Main, offset: 0 };

    #[test]
    fn all_leave_together_with_the_number_of_the_round() {
        let barrier = RoundBarrier::new(2);
        let channels: Vec<_> = (0..2)
            .map(|id| {
                let barrier = barrier.clone();
                std::thread::spawn(move || [(); 3].map(|()| barrier.meet(Party::Channel(ChannelId(id)), AT).unwrap()))
            })
            .collect();
        let main = [(); 3].map(|()| barrier.meet(Party::Main, AT).unwrap());
        assert_eq!(main, [0, 1, 2]);
        for channel in channels {
            assert_eq!(channel.join().unwrap(), [0, 1, 2]);
        }
    }

    #[test]
    fn channels_that_main_has_gathered_stay_until_it_arrives() {
        let barrier = RoundBarrier::new(2);
        let passed = std::sync::Arc::new(AtomicUsize::new(0));
        let channels: Vec<_> = (0..2)
            .map(|id| {
                let (barrier, passed) = (barrier.clone(), passed.clone());
                std::thread::spawn(move || {
                    barrier.meet(Party::Channel(ChannelId(id)), AT).unwrap();
                    passed.fetch_add(1, Relaxed);
                })
            })
            .collect();
        barrier.gather().unwrap();
        assert_eq!(passed.load(Relaxed), 0);
        assert_eq!(barrier.arrive(Party::Main, AT).unwrap(), 0);
        barrier.pass(0).unwrap();
        channels.into_iter().for_each(|channel| channel.join().unwrap());
        assert_eq!(passed.load(Relaxed), 2);
    }

    #[test]
    fn main_gathers_until_a_deadline_and_again() {
        let barrier = RoundBarrier::new(1);
        assert!(!barrier.gather_until(Deadline::after(Some(Duration::ZERO))).unwrap());
        assert!(!barrier.gather_until(Deadline::after(Some(Duration::from_millis(1)))).unwrap());
        assert_eq!(barrier.arrive(Party::Channel(ChannelId(0)), AT).unwrap(), 0);
        assert!(barrier.gather_until(Deadline::after(Some(Duration::ZERO))).unwrap());
        let barrier = RoundBarrier::new(1);
        barrier.stop();
        assert!(matches!(barrier.gather_until(Deadline::after(None)), Err(Error::Stopped)));
    }

    #[test]
    fn stop_releases_who_waits_and_who_comes_later() {
        let barrier = RoundBarrier::new(1);
        let wait: [fn(RoundBarrier) -> bool; 2] =
            [|barrier| barrier.meet(Party::Main, AT).is_err(), |barrier| barrier.gather().is_err()];
        let waiting = wait.map(|wait| {
            let barrier = barrier.clone();
            std::thread::spawn(move || wait(barrier))
        });
        barrier.stop();
        assert!(waiting.map(|waiting| waiting.join().unwrap()).iter().all(|&stopped| stopped));
        assert!(matches!(barrier.meet(Party::Channel(ChannelId(0)), AT), Err(Error::Stopped)));
    }

    const SYNC: Sync = Sync { number: 0, packets: 0 };

    fn within(milliseconds: Option<u64>) -> Patience {
        Patience::without_looking(milliseconds.map(Duration::from_millis))
    }

    #[test]
    fn main_looks_up_while_it_waits_and_its_limit_counts_on() {
        let barrier = RoundBarrier::open(Some(1));
        let round = barrier.arrive(Party::Main, AT).unwrap();
        let mut patience = Patience::new(Some(Duration::from_millis(50)), Duration::from_millis(1));
        let mut looks = 0;
        while barrier.pass_within(round, &mut patience).unwrap() == Passed::NotYet {
            looks += 1;
        }
        assert!(looks > 0);
        assert_eq!(barrier.pass_within(round, &mut patience).unwrap(), Passed::Missing);
        barrier.join(ChannelId(0), None, SYNC, AT).unwrap().unwrap();
        assert_eq!(barrier.pass_within(round, &mut patience).unwrap(), Passed::Over);
    }

    #[test]
    fn main_waits_for_a_channel_that_is_told_of_and_not_longer_than_the_limit() {
        let barrier = RoundBarrier::open(Some(1));
        let round = barrier.arrive(Party::Main, AT).unwrap();
        assert_eq!(barrier.pass_within(round, &mut within(Some(20))).unwrap(), Passed::Missing);
        let late = barrier.clone();
        let late = std::thread::spawn(move || late.join(ChannelId(0), None, SYNC, AT).unwrap().unwrap());
        assert_eq!(barrier.pass_within(round, &mut within(None)).unwrap(), Passed::Over);
        assert_eq!(late.join().unwrap(), Some(round));
    }

    #[test]
    fn main_goes_on_without_channels_where_nothing_says_that_there_are_any() {
        let barrier = RoundBarrier::open(None);
        for limit in [None, Some(20), None] {
            let round = barrier.arrive(Party::Main, AT).unwrap();
            assert_eq!(barrier.pass_within(round, &mut within(limit)).unwrap(), Passed::Over);
        }
        let late = barrier.join(ChannelId(0), None, SYNC, AT).unwrap();
        assert_eq!(late, Err(Stranger::TooLate { id: ChannelId(0) }));
    }

    #[test]
    fn a_channel_that_is_none_of_the_migration_is_not_admitted() {
        let barrier = RoundBarrier::open(Some(1));
        let id = ChannelId(1);
        assert_eq!(barrier.admit(id, None), Err(Stranger::OutOfRange { id, channels: 1 }));
        assert_eq!(barrier.admit(ChannelId(0), None), Ok(()));
        barrier.join(ChannelId(0), None, SYNC, AT).unwrap().unwrap();
        assert_eq!(barrier.admit(ChannelId(0), None), Err(Stranger::Twice { id: ChannelId(0) }));
    }

    #[test]
    fn nothing_comes_behind_the_last_sync_point() {
        let barrier = RoundBarrier::new(1);
        barrier.close(AT).unwrap();
        assert!(barrier.begin(ChannelId(0), AT).is_err());
        let barrier = RoundBarrier::new(1);
        barrier.begin(ChannelId(0), AT).unwrap();
        assert!(barrier.close(AT).is_err(), "a page came before, of a round that does not end");
    }

    #[test]
    fn the_rounds_are_over_when_the_last_one_is() {
        let barrier = RoundBarrier::new(1);
        let round = || {
            barrier.arrive(Party::Channel(ChannelId(0)), AT).unwrap();
            barrier.arrive(Party::Main, AT).unwrap();
        };
        round();
        assert!(!barrier.rounds_are_over());
        barrier.is_last();
        assert!(!barrier.rounds_are_over(), "it is the last, and goes on");
        round();
        assert!(barrier.rounds_are_over());
    }

    #[test]
    fn a_round_that_a_channel_has_left_is_never_complete() {
        let barrier = RoundBarrier::new(2);
        barrier.leave(ChannelId(0), AT).unwrap();
        assert!(barrier.arrive(Party::Main, AT).is_err());
        let barrier = RoundBarrier::new(1);
        barrier.arrive(Party::Main, AT).unwrap();
        assert!(barrier.leave(ChannelId(0), AT).is_err());
    }

    #[test]
    fn what_is_registered_with_stop_stops_it() {
        let barrier = RoundBarrier::new(1);
        let stopper: Box<dyn Stopper> = Box::new(barrier.clone());
        stopper.stop();
        assert!(matches!(barrier.arrive(Party::Main, AT), Err(Error::Stopped)));
    }
}
