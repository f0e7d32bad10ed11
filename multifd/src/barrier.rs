//! Where main and all channels meet at the end of a round, on the source and on the destination.
//!
//! [`Rounds`] decides who has arrived; this adds the waiting. Nobody passes before all have arrived, and nobody waits for
//! ever: a party that left, a broken rule or [`RoundBarrier::stop`] releases everyone. Who has something to do between
//! arriving and passing does it without being woken twice.

use multifd_proto::{
    ChannelId, Violation,
    rounds::{Arrival, Party, Rounds},
};

use crate::{
    error::{Error, Place},
    sync::{Arc, Condvar, Mutex, lock, wait},
    transport::Stopper,
};

/// The meeting point of one side of a migration. Clones are the same barrier.
#[derive(Clone)]
pub(crate) struct RoundBarrier {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    /// The round is over.
    over: Condvar,
    /// Only main is missing.
    gathered: Condvar,
}

struct State {
    rounds: Rounds,
    /// Everybody leaves, whoever has not arrived.
    stopped: bool,
}

impl RoundBarrier {
    /// A barrier for main and `channels` channels; `None` where their number is not known yet.
    pub(crate) fn new(channels: Option<usize>) -> RoundBarrier {
        let state = State { rounds: Rounds::new(channels), stopped: false };
        RoundBarrier {
            shared: Arc::new(Shared { state: Mutex::new(state), over: Condvar::new(), gathered: Condvar::new() }),
        }
    }

    /// States that there are `channels` channels.
    ///
    /// # Errors
    /// A channel with a higher id was here before.
    pub(crate) fn fix_channels(&self, channels: usize) -> Result<(), Violation> {
        lock(&self.shared.state).rounds.fix_channels(channels)
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

    /// Reaches the end of the round, whose number it returns, and waits for nobody.
    ///
    /// # Errors
    /// [`Error::Stopped`] after [`stop`](Self::stop); a violation (at `place`) where the round can never be complete.
    pub(crate) fn arrive(&self, party: Party, place: Place) -> Result<u64, Error> {
        let mut state = lock(&self.shared.state);
        if state.stopped {
            return Err(Error::Stopped);
        }
        let round = state.rounds.round();
        let arrival = state.rounds.arrive(party).map_err(Error::protocol(place))?;
        let gathered = state.rounds.awaits_main_only();
        drop(state);
        if arrival == Arrival::Completes {
            self.shared.over.notify_all();
        } else if gathered {
            self.shared.gathered.notify_one();
        }
        Ok(round)
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

    /// Has main wait until all channels have arrived. They stay until main arrives, too.
    ///
    /// # Errors
    /// [`Error::Stopped`] after [`stop`](Self::stop), if they had not all arrived by then.
    pub(crate) fn gather(&self) -> Result<(), Error> {
        let mut state = lock(&self.shared.state);
        while !state.rounds.awaits_main_only() {
            if state.stopped {
                return Err(Error::Stopped);
            }
            state = wait(&self.shared.gathered, state);
        }
        Ok(())
    }

    /// `channel` has ended cleanly and comes to no later round.
    ///
    /// # Errors
    /// Somebody waits at the end of a round that this channel has not reached: a violation at `place`.
    pub(crate) fn leave(&self, channel: ChannelId, place: Place) -> Result<(), Error> {
        lock(&self.shared.state).rounds.leave(channel).map_err(Error::protocol(place))
    }

    /// Releases everyone, now and from now on.
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
        let barrier = RoundBarrier::new(Some(2));
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
        let barrier = RoundBarrier::new(Some(2));
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
    fn stop_releases_who_waits_and_who_comes_later() {
        let barrier = RoundBarrier::new(Some(1));
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
}
