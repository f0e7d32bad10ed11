//! Where main and all channels meet at the end of a round, on the source and on the destination.
//!
//! [`Rounds`] decides who has arrived; this adds the waiting. Nobody who arrived leaves before all have, and nobody
//! waits for ever: a party that left, a broken rule or [`RoundBarrier::stop`] releases everyone.

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
    changed: Condvar,
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
        RoundBarrier { shared: Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() }) }
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
    /// [`Error::Stopped`] after [`stop`](Self::stop); a violation (at `place`) where the round can never be complete.
    pub(crate) fn arrive(&self, party: Party, place: Place) -> Result<u64, Error> {
        let mut state = lock(&self.shared.state);
        if state.stopped {
            return Err(Error::Stopped);
        }
        let round = state.rounds.round();
        match state.rounds.arrive(party).map_err(Error::protocol(place))? {
            Arrival::Completes => {
                drop(state);
                self.shared.changed.notify_all();
            }
            Arrival::Waits => {
                while state.rounds.round() == round {
                    if state.stopped {
                        return Err(Error::Stopped);
                    }
                    state = wait(&self.shared.changed, state);
                }
            }
        }
        Ok(round)
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
        self.shared.changed.notify_all();
    }
}

impl Stopper for RoundBarrier {
    fn stop(&self) {
        RoundBarrier::stop(self);
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use crate::error::Connection;

    const AT: Place = Place { connection: Connection::Main, offset: 0 };

    #[test]
    fn all_leave_together_with_the_number_of_the_round() {
        let barrier = RoundBarrier::new(Some(2));
        let channels: Vec<_> = (0..2)
            .map(|id| {
                let barrier = barrier.clone();
                std::thread::spawn(move || [(); 3].map(|()| barrier.arrive(Party::Channel(ChannelId(id)), AT).unwrap()))
            })
            .collect();
        let main = [(); 3].map(|()| barrier.arrive(Party::Main, AT).unwrap());
        assert_eq!(main, [0, 1, 2]);
        for channel in channels {
            assert_eq!(channel.join().unwrap(), [0, 1, 2]);
        }
    }

    #[test]
    fn stop_releases_who_waits_and_who_comes_later() {
        let barrier = RoundBarrier::new(Some(1));
        let waiting = {
            let barrier = barrier.clone();
            std::thread::spawn(move || barrier.arrive(Party::Main, AT).is_err())
        };
        barrier.stop();
        assert!(waiting.join().unwrap());
        assert!(matches!(barrier.arrive(Party::Channel(ChannelId(0)), AT), Err(Error::Stopped)));
    }
}
