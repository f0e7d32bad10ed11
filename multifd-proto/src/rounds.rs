//! Who has arrived at the end of which round: the decision behind the round barrier.
//!
//! The round law: nothing of round *r+1* is applied, on any channel including main, before every channel has passed the
//! end of round *r*. [`Rounds`] says when that is so. It neither waits nor locks, so that the engine's barrier, the
//! exhaustive model and the inspector all decide by the same lines.
//!
//! A channel that ends cleanly leaves. If anybody then reaches the end of another round, that round can never be
//! complete: a [`Violation::SyncMissing`], not a wait for ever.

use crate::{ids::ChannelId, violation::Violation};

/// One of those who meet at the end of a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Party {
    /// The main connection, at its sync point (FLUSH, or end of section).
    Main,
    /// A channel, at its SYNC packet.
    Channel(ChannelId),
}

/// What an arrival means for the one who arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Arrival {
    /// Others are still on their way: wait until [`Rounds::round`] has changed.
    Waits,
    /// The last one: the round is over and all may go on.
    Completes,
}

/// The account of one migration's rounds.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Rounds {
    /// The round whose end the parties are on their way to.
    round: u64,
    /// How many channels take part; `None` as long as it is being discovered, and no round ends before it is known.
    channels: Option<usize>,
    main: Seat,
    /// By channel id; as long as the highest id seen, or as `channels`.
    seats: Vec<Seat>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Seat {
    /// In the middle of the round.
    Running,
    /// At its end, waiting.
    Arrived,
    /// Ended; will not come back.
    Left,
}

impl Rounds {
    /// Round 0 with `channels` channels; `None` where the number is not known yet.
    pub fn new(channels: Option<usize>) -> Rounds {
        Rounds { round: 0, channels, main: Seat::Running, seats: vec![Seat::Running; channels.unwrap_or(0)] }
    }

    /// The round whose end the parties are on their way to.
    pub fn round(&self) -> u64 {
        self.round
    }

    /// How many channels take part, once it is known.
    pub fn channels(&self) -> Option<usize> {
        self.channels
    }

    /// States that there are `channels` channels, with ids from 0 on.
    ///
    /// # Errors
    /// A channel with a higher id has arrived or left before.
    pub fn fix_channels(&mut self, channels: usize) -> Result<(), Violation> {
        if self.seats.len() > channels {
            let id = ChannelId(u8::try_from(self.seats.len() - 1).expect("seats are made for ids"));
            return Err(Violation::ChannelIdOutOfRange { id, channels });
        }
        self.channels = Some(channels);
        self.seats.resize(channels, Seat::Running);
        Ok(())
    }

    /// `party` has reached the end of the round.
    ///
    /// # Errors
    /// A channel has left without its SYNC, or the id is not one of ours. The account is then of no further use.
    pub fn arrive(&mut self, party: Party) -> Result<Arrival, Violation> {
        *self.seat(party)? = Seat::Arrived;
        if let Some(gone) = self.seats.iter().position(|&seat| seat == Seat::Left) {
            let channel = ChannelId(u8::try_from(gone).expect("seats are made for ids"));
            return Err(Violation::SyncMissing { channel, round: self.round });
        }
        if self.channels.is_none() || self.main != Seat::Arrived || self.seats.contains(&Seat::Running) {
            return Ok(Arrival::Waits);
        }
        self.round += 1;
        self.main = Seat::Running;
        self.seats.fill(Seat::Running);
        Ok(Arrival::Completes)
    }

    /// Whether all channels are at the end of the round, and main is still on its way.
    pub fn awaits_main_only(&self) -> bool {
        self.channels.is_some() && self.main == Seat::Running && self.seats.iter().all(|&seat| seat == Seat::Arrived)
    }

    /// `channel` has ended at a packet boundary and takes no part in later rounds.
    ///
    /// # Errors
    /// Somebody waits at the end of the round, which this channel has not reached; or the id is not one of ours.
    pub fn leave(&mut self, channel: ChannelId) -> Result<(), Violation> {
        *self.seat(Party::Channel(channel))? = Seat::Left;
        if self.main == Seat::Arrived || self.seats.contains(&Seat::Arrived) {
            return Err(Violation::SyncMissing { channel, round: self.round });
        }
        Ok(())
    }

    fn seat(&mut self, party: Party) -> Result<&mut Seat, Violation> {
        let Party::Channel(id) = party else { return Ok(&mut self.main) };
        if id.index() >= self.seats.len() {
            if let Some(channels) = self.channels {
                return Err(Violation::ChannelIdOutOfRange { id, channels });
            }
            self.seats.resize(id.index() + 1, Seat::Running);
        }
        Ok(&mut self.seats[id.index()])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAIN: Party = Party::Main;

    fn channel(id: u8) -> Party {
        Party::Channel(ChannelId(id))
    }

    #[test]
    fn a_round_ends_with_the_last_arrival_in_any_order() {
        for order in [[MAIN, channel(0), channel(1)], [channel(1), MAIN, channel(0)], [channel(0), channel(1), MAIN]] {
            let mut rounds = Rounds::new(Some(2));
            for round in 0..3 {
                assert_eq!(rounds.round(), round);
                assert_eq!(rounds.arrive(order[0]), Ok(Arrival::Waits));
                assert_eq!(rounds.arrive(order[1]), Ok(Arrival::Waits));
                assert_eq!(rounds.arrive(order[2]), Ok(Arrival::Completes));
            }
        }
    }

    #[test]
    fn main_can_tell_when_all_channels_are_there() {
        let mut rounds = Rounds::new(Some(2));
        for _ in 0..2 {
            rounds.arrive(channel(1)).unwrap();
            assert!(!rounds.awaits_main_only());
            rounds.arrive(channel(0)).unwrap();
            assert!(rounds.awaits_main_only());
            assert_eq!(rounds.arrive(MAIN), Ok(Arrival::Completes));
            assert!(!rounds.awaits_main_only());
        }
        rounds.arrive(MAIN).unwrap();
        rounds.arrive(channel(0)).unwrap();
        assert!(!rounds.awaits_main_only());
        let mut unknown = Rounds::new(None);
        unknown.arrive(channel(0)).unwrap();
        assert!(!unknown.awaits_main_only());
    }

    #[test]
    fn main_alone_never_waits() {
        let mut rounds = Rounds::new(Some(0));
        assert_eq!(rounds.arrive(MAIN), Ok(Arrival::Completes));
    }

    #[test]
    fn no_round_ends_before_the_number_of_channels_is_known() {
        let mut rounds = Rounds::new(None);
        assert_eq!(rounds.arrive(channel(2)), Ok(Arrival::Waits));
        assert_eq!(rounds.arrive(channel(0)), Ok(Arrival::Waits));
        rounds.fix_channels(3).unwrap();
        assert_eq!(rounds.arrive(MAIN), Ok(Arrival::Waits));
        assert_eq!(rounds.arrive(channel(1)), Ok(Arrival::Completes));
    }

    #[test]
    fn an_id_beyond_the_channels_is_refused_before_and_after_their_number_is_known() {
        let out_of_range = Violation::ChannelIdOutOfRange { id: ChannelId(2), channels: 2 };
        let mut rounds = Rounds::new(None);
        rounds.arrive(channel(2)).unwrap();
        assert_eq!(rounds.fix_channels(2), Err(out_of_range.clone()));
        assert_eq!(Rounds::new(Some(2)).arrive(channel(2)), Err(out_of_range.clone()));
        assert_eq!(Rounds::new(Some(2)).leave(ChannelId(2)), Err(out_of_range));
    }

    #[test]
    fn a_channel_that_left_makes_the_next_round_a_violation() {
        let missing = Violation::SyncMissing { channel: ChannelId(1), round: 0 };
        for first in [MAIN, channel(0)] {
            let mut left_first = Rounds::new(Some(2));
            left_first.leave(ChannelId(1)).unwrap();
            assert_eq!(left_first.arrive(first), Err(missing.clone()));
            let mut left_last = Rounds::new(Some(2));
            left_last.arrive(first).unwrap();
            assert_eq!(left_last.leave(ChannelId(1)), Err(missing.clone()));
        }
    }

    #[test]
    fn all_may_leave_between_two_rounds() {
        let mut rounds = Rounds::new(Some(2));
        for party in [MAIN, channel(0), channel(1)] {
            rounds.arrive(party).unwrap();
        }
        assert_eq!((rounds.leave(ChannelId(0)), rounds.leave(ChannelId(1))), (Ok(()), Ok(())));
    }
}
