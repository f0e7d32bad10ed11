//! Who has arrived at the end of which round: the decision behind the round barrier.
//!
//! The round law: nothing of round *r+1* is applied, on any channel including main, before every channel has passed the
//! end of round *r*. [`Rounds`] says when that is so. It neither waits nor locks, so that the engine's barrier, the
//! exhaustive model and the inspector all decide by the same lines. Which channels take part is the [`Membership`]'s
//! part: a receiver [joins](Rounds::join) each one with its first SYNC, and no round with pages ends before it is known that
//! all are here.
//!
//! A channel that ends cleanly leaves. If another party then reaches the end of another round, that round can never be
//! complete: a [`Violation::SyncMissing`], not an endless wait.

use std::num::NonZeroU8;

use crate::{
    ids::ChannelId,
    membership::{Evidence, Membership, Stranger, Verdict},
    violation::{Mismatch, ProtocolError, Violation},
};

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
    /// A channel that came late, at the SYNC that the others have passed: it goes on with the current round.
    Joins,
}

/// A SYNC packet, as far as the account needs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Sync {
    /// The number in the packet.
    pub number: u64,
    /// Packets with pages that its channel had since the SYNC before, this one included if it has some.
    pub packets: u64,
}

/// The account of one migration's rounds.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Rounds {
    /// The round whose end the parties are on their way to.
    round: u64,
    /// Which channels take part, for what main says about it. What follows from that is seen at the next arrival.
    pub members: Membership,
    main: Seat,
    /// By channel id; as long as the highest id that has joined.
    seats: Vec<Seat>,
    /// Main has passed its last sync point.
    closed: bool,
    last: Last,
}

/// Whether the rounds come to their end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Last {
    /// More may follow.
    No,
    /// Main has said that this round is the last.
    Open,
    /// It is over.
    Over,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Seat {
    /// Has not joined.
    Absent,
    /// Has passed the end of the round before, and is not known to have sent anything since.
    Ready,
    /// In the middle of the round.
    Running,
    /// At its end, waiting.
    Arrived,
    /// Ended; will not come back.
    Left,
}

impl Rounds {
    /// Round 0 with `channels` channels, which are all here: the view of a source.
    pub fn new(channels: usize) -> Rounds {
        Rounds { seats: vec![Seat::Ready; channels], ..Rounds::with(Membership::fixed(channels)) }
    }

    /// Round 0 without any channel so far: the view of a receiver, which needs `required` channels or as many as turn out.
    pub fn open(required: Option<usize>) -> Rounds {
        Rounds::with(Membership::open(required))
    }

    fn with(members: Membership) -> Rounds {
        Rounds { round: 0, members, main: Seat::Ready, seats: Vec::new(), closed: false, last: Last::No }
    }

    /// The round whose end the parties are on their way to.
    pub fn round(&self) -> u64 {
        self.round
    }

    /// Whether the channel that says `id` and `told` may join.
    ///
    /// # Errors
    /// It is none of this migration, or comes too late.
    pub fn admit(&self, id: ChannelId, told: Option<NonZeroU8>) -> Result<(), Stranger> {
        let taken = self.seats.get(id.index()).is_some_and(|&seat| seat != Seat::Absent);
        self.members.admit(id, told, taken)
    }

    /// A channel that was [admitted](Self::admit) is at its first SYNC, before its first page. From here on it takes part.
    ///
    /// Where the first round, which has no pages, is over, the channel goes on at once: [`Arrival::Joins`].
    ///
    /// # Errors
    /// As [`sync`](Self::sync).
    pub fn join(&mut self, id: ChannelId, told: Option<NonZeroU8>, sync: Sync) -> Result<Arrival, ProtocolError> {
        if self.seats.len() <= id.index() {
            self.seats.resize(id.index() + 1, Seat::Absent);
        }
        self.seats[id.index()] = Seat::Ready;
        self.members.join(told);
        if self.round == 0 {
            return self.sync(id, sync);
        }
        // It is none of the current round's, so its number does not count there.
        Ok(Arrival::Joins)
    }

    /// The channel is at a SYNC.
    ///
    /// # Errors
    /// As [`arrive`](Self::arrive).
    pub fn sync(&mut self, id: ChannelId, sync: Sync) -> Result<Arrival, ProtocolError> {
        self.members.count(sync.number, sync.packets);
        self.arrive(Party::Channel(id))
    }

    /// `party` has reached the end of the round.
    ///
    /// # Errors
    /// A channel has left without its SYNC, main has no further sync point, or it cannot be known whether all channels are
    /// here. The account is then of no further use.
    pub fn arrive(&mut self, party: Party) -> Result<Arrival, ProtocolError> {
        if let (true, Party::Channel(channel)) = (self.closed, party) {
            return Err(Violation::SyncAfterLast { channel }.into());
        }
        *self.seat(party)? = Seat::Arrived;
        if let Some(gone) = self.find(Seat::Left) {
            return Err(Violation::SyncMissing { channel: gone, round: self.round }.into());
        }
        let on_the_way = |seat: &Seat| matches!(seat, Seat::Ready | Seat::Running);
        if self.main != Seat::Arrived || self.seats.iter().any(on_the_way) || self.verdict()? == Verdict::Missing {
            return Ok(Arrival::Waits);
        }
        self.end_round();
        Ok(Arrival::Completes)
    }

    /// Main has arrived and no further channel comes: ends the round without any, if that is possible. Returns whether it
    /// is.
    pub fn go_alone(&mut self) -> bool {
        let alone = self.main == Seat::Arrived && self.members.go_alone();
        if alone {
            self.end_round();
        }
        alone
    }

    /// Whether only channels that have not joined hold the round.
    pub fn awaits_strangers_only(&self) -> bool {
        self.main == Seat::Arrived && self.seats.iter().all(|&seat| matches!(seat, Seat::Arrived | Seat::Absent))
    }

    /// Whether all channels are at the end of the round, and main is still on its way.
    pub fn awaits_main_only(&self) -> bool {
        self.members.is_complete() && self.main != Seat::Arrived && self.seats.iter().all(|&seat| seat == Seat::Arrived)
    }

    /// `channel` has brought a page of the current round, which is not in place yet.
    ///
    /// # Errors
    /// Main has passed its last sync point.
    pub fn begin(&mut self, channel: ChannelId) -> Result<(), Violation> {
        if self.closed {
            return Err(Violation::PageAfterLastSync { channel });
        }
        let seat = self.seat(Party::Channel(channel))?;
        if *seat == Seat::Ready {
            *seat = Seat::Running;
        }
        Ok(())
    }

    /// Main has said that this round is the last.
    pub fn is_last(&mut self) {
        if self.last == Last::No {
            self.last = Last::Open;
        }
    }

    /// Whether the last round is over: all that belongs to it is there, on every channel.
    pub fn are_over(&self) -> bool {
        self.last == Last::Over
    }

    /// Main has passed its last sync point.
    ///
    /// # Errors
    /// A channel has gone on after it.
    pub fn close(&mut self) -> Result<(), Violation> {
        self.closed = true;
        if let Some(channel) = self.find(Seat::Running) {
            return Err(Violation::PageAfterLastSync { channel });
        }
        match self.find(Seat::Arrived) {
            Some(channel) => Err(Violation::SyncAfterLast { channel }),
            None => Ok(()),
        }
    }

    /// `channel` has ended at a packet boundary and takes no part in later rounds.
    ///
    /// # Errors
    /// Another party waits at the end of the round, which this channel has not reached; or the id is not one of ours.
    pub fn leave(&mut self, channel: ChannelId) -> Result<(), Violation> {
        *self.seat(Party::Channel(channel))? = Seat::Left;
        if self.main == Seat::Arrived || self.seats.contains(&Seat::Arrived) {
            return Err(Violation::SyncMissing { channel, round: self.round });
        }
        Ok(())
    }

    /// What is known at the end of the round. Ids are not part of the proof by numbers, so they are compared with it.
    fn verdict(&mut self) -> Result<Verdict, ProtocolError> {
        let verdict = self.members.verdict(self.round)?;
        if verdict == Verdict::Complete
            && self.members.evidence() == Some(Evidence::Numbers)
            && self.seats.len() != self.members.joined()
        {
            return Err(Mismatch::ChannelsUnproven { joined: self.members.joined() }.into());
        }
        Ok(verdict)
    }

    fn end_round(&mut self) {
        self.round += 1;
        if self.last == Last::Open {
            self.last = Last::Over;
        }
        self.main = Seat::Ready;
        for seat in self.seats.iter_mut().filter(|seat| **seat == Seat::Arrived) {
            *seat = Seat::Ready;
        }
        self.members.next_round();
    }

    fn find(&self, seat: Seat) -> Option<ChannelId> {
        let index = self.seats.iter().position(|&other| other == seat)?;
        Some(ChannelId(u8::try_from(index).expect("seats are made for ids")))
    }

    fn seat(&mut self, party: Party) -> Result<&mut Seat, Violation> {
        let Party::Channel(id) = party else { return Ok(&mut self.main) };
        let channels = self.members.joined();
        match self.seats.get_mut(id.index()) {
            Some(Seat::Absent) | None => Err(Violation::ChannelIdOutOfRange { id, channels }),
            Some(seat) => Ok(seat),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAIN: Party = Party::Main;
    const ID: ChannelId = ChannelId(0);
    const OTHER: ChannelId = ChannelId(1);

    fn channel(id: u8) -> Party {
        Party::Channel(ChannelId(id))
    }

    fn sync(number: u64, packets: u64) -> Sync {
        Sync { number, packets }
    }

    fn told(channels: u8) -> Option<NonZeroU8> {
        NonZeroU8::new(channels)
    }

    #[test]
    fn a_round_ends_with_the_last_arrival_in_any_order() {
        for order in [[MAIN, channel(0), channel(1)], [channel(1), MAIN, channel(0)], [channel(0), channel(1), MAIN]] {
            let mut rounds = Rounds::new(2);
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
        let mut rounds = Rounds::new(2);
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
        let mut unknown = Rounds::open(None);
        unknown.join(ID, None, sync(0, 0)).unwrap();
        assert!(!unknown.awaits_main_only());
    }

    #[test]
    fn main_alone_never_waits_where_no_channel_is_required() {
        for mut rounds in [Rounds::new(0), Rounds::open(Some(0))] {
            assert_eq!(rounds.arrive(MAIN), Ok(Arrival::Completes));
            assert_eq!(rounds.arrive(MAIN), Ok(Arrival::Completes));
        }
    }

    #[test]
    fn no_round_ends_before_all_channels_of_a_known_number_are_here() {
        for (mut rounds, says) in [(Rounds::open(Some(3)), None), (Rounds::open(None), told(3))] {
            assert_eq!(rounds.join(ChannelId(2), says, sync(0, 0)), Ok(Arrival::Waits));
            assert_eq!(rounds.join(ID, says, sync(1, 0)), Ok(Arrival::Waits));
            assert_eq!(rounds.arrive(MAIN), Ok(Arrival::Waits));
            assert!(rounds.awaits_strangers_only());
            assert_eq!(rounds.admit(ID, says), Err(Stranger::Twice { id: ID }));
            assert_eq!(rounds.admit(OTHER, says), Ok(()));
            assert_eq!(rounds.join(OTHER, says, sync(2, 0)), Ok(Arrival::Completes));
            assert!(rounds.members.is_complete());
            let beyond = Stranger::OutOfRange { id: ChannelId(3), channels: 3 };
            assert_eq!(rounds.admit(ChannelId(3), says), Err(beyond));
        }
    }

    #[test]
    fn a_channel_that_says_another_number_is_a_stranger() {
        let mut rounds = Rounds::open(None);
        rounds.join(ID, told(2), sync(0, 0)).unwrap();
        assert_eq!(rounds.admit(OTHER, told(4)), Err(Stranger::OtherCount { id: OTHER, told: 4, channels: 2 }));
        assert_eq!(rounds.admit(OTHER, None), Err(Stranger::OtherKind { id: OTHER }));
        let mut untold = Rounds::open(None);
        untold.join(ID, None, sync(0, 0)).unwrap();
        assert_eq!(untold.admit(OTHER, told(2)), Err(Stranger::OtherKind { id: OTHER }));
        assert_eq!(Rounds::open(None).admit(ChannelId(4), told(4)), {
            Err(Stranger::OutOfRange { id: ChannelId(4), channels: 4 })
        });
    }

    /// Two channels of QEMU 10.0: numbers 0 and 1 at the set-up, then one packet with pages on each.
    #[test]
    fn a_late_channel_joins_the_first_round_with_pages_and_is_part_of_it() {
        let mut rounds = Rounds::open(None);
        assert_eq!(rounds.join(ID, None, sync(0, 0)), Ok(Arrival::Waits));
        assert_eq!(rounds.arrive(MAIN), Ok(Arrival::Completes), "no page comes before the set-up is over");
        assert_eq!(rounds.arrive(MAIN), Ok(Arrival::Waits));
        assert_eq!(rounds.sync(ID, sync(4, 1)), Ok(Arrival::Waits), "one channel cannot have had five packets");
        assert!(rounds.awaits_strangers_only());
        assert_eq!(rounds.join(OTHER, None, sync(1, 0)), Ok(Arrival::Joins));
        assert!(!rounds.awaits_strangers_only());
        assert_eq!(rounds.sync(OTHER, sync(5, 1)), Ok(Arrival::Completes));
        assert_eq!(rounds.members.evidence(), Some(Evidence::Numbers));
        let id = ChannelId(2);
        assert_eq!(rounds.admit(id, None), Err(Stranger::OutOfRange { id, channels: 2 }));
    }

    #[test]
    fn numbers_that_prove_nothing_end_the_migration_and_no_round() {
        let mut rounds = Rounds::open(None);
        rounds.join(ID, None, sync(0, 0)).unwrap();
        rounds.arrive(MAIN).unwrap();
        rounds.arrive(MAIN).unwrap();
        assert_eq!(rounds.sync(ID, sync(0, 1)), Err(Mismatch::ChannelsUnproven { joined: 1 }.into()));
    }

    /// The numbers of one channel are right, but it calls itself the third.
    #[test]
    fn ids_have_to_agree_with_the_numbers() {
        let mut rounds = Rounds::open(None);
        rounds.join(ChannelId(2), None, sync(0, 0)).unwrap();
        rounds.arrive(MAIN).unwrap();
        rounds.arrive(MAIN).unwrap();
        assert_eq!(rounds.sync(ChannelId(2), sync(1, 0)), Err(Mismatch::ChannelsUnproven { joined: 1 }.into()));
    }

    #[test]
    fn numbers_that_no_longer_prove_what_they_proved_are_a_violation() {
        let mut rounds = Rounds::open(None);
        rounds.join(ID, None, sync(0, 0)).unwrap();
        rounds.arrive(MAIN).unwrap();
        rounds.arrive(MAIN).unwrap();
        assert_eq!(rounds.sync(ID, sync(2, 1)), Ok(Arrival::Completes));
        rounds.arrive(MAIN).unwrap();
        let mut lower = rounds.clone();
        assert_eq!(rounds.sync(ID, sync(5, 1)), Err(unbalanced(1, 2, 2, 5, 4).into()));
        assert_eq!(
            lower.sync(ID, sync(1, 1)),
            Err(unbalanced(1, 2, 2, 1, 4).into()),
            "the round before does not count"
        );
    }

    fn unbalanced(channels: usize, round: u64, packets: u64, highest: u64, expected: u64) -> Violation {
        Violation::PacketNumbers { channels, round, packets, highest, expected }
    }

    /// A source of ours whose channels had all come was complete whatever its packets said: a packet that was lost or doubled on the
    /// way to this side was not noticed.
    #[test]
    fn a_source_that_says_its_channels_has_to_number_its_packets() {
        for required in [None, Some(2)] {
            let mut rounds = Rounds::open(required);
            rounds.join(ID, told(2), sync(1, 0)).unwrap();
            rounds.join(OTHER, told(2), sync(0, 0)).unwrap();
            assert_eq!(rounds.arrive(MAIN), Ok(Arrival::Completes));
            let second = rounds.clone();
            // Three packets and two SYNCs.
            for (id, packets) in [(ID, 2), (OTHER, 1)] {
                rounds.sync(id, sync(5 + u64::from(id.0), packets)).unwrap();
            }
            assert_eq!(rounds.arrive(MAIN), Ok(Arrival::Completes));
            for (seen, expected) in [(1, 5), (3, 7)] {
                let mut rounds = second.clone();
                rounds.sync(ID, sync(6, seen)).unwrap();
                rounds.sync(OTHER, sync(5, 1)).unwrap();
                assert_eq!(rounds.arrive(MAIN), Err(unbalanced(2, 1, seen + 1, 6, expected).into()));
            }
        }
        let mut at_once = Rounds::open(None);
        at_once.members.tell(1).unwrap();
        at_once.arrive(MAIN).unwrap();
        assert_eq!(at_once.join(ID, None, sync(1, 0)), Err(unbalanced(1, 0, 0, 1, 0).into()));
        // A QEMU says nothing, and this side was told.
        let mut required = Rounds::open(Some(1));
        required.arrive(MAIN).unwrap();
        assert_eq!(required.join(ID, None, sync(1, 0)), Ok(Arrival::Completes));
    }

    #[test]
    fn without_channels_the_set_up_passes_and_the_next_round_waits_until_main_goes_alone() {
        let mut rounds = Rounds::open(None);
        assert_eq!(rounds.arrive(MAIN), Ok(Arrival::Completes));
        assert_eq!(rounds.arrive(MAIN), Ok(Arrival::Waits));
        assert!(rounds.go_alone());
        assert_eq!((rounds.round(), rounds.arrive(MAIN)), (2, Ok(Arrival::Completes)));
        assert_eq!(rounds.admit(ID, None), Err(Stranger::TooLate { id: ID }));
        let mut plain = Rounds::open(None);
        plain.arrive(MAIN).unwrap();
        plain.members.plain_page();
        assert_eq!(plain.arrive(MAIN), Ok(Arrival::Completes));
        assert_eq!(plain.admit(ID, None), Err(Stranger::OutOfRange { id: ID, channels: 0 }));
    }

    #[test]
    fn after_a_flush_main_never_goes_alone() {
        let mut rounds = Rounds::open(None);
        rounds.members.expect_channels();
        assert_eq!(rounds.arrive(MAIN), Ok(Arrival::Waits));
        assert!(!rounds.go_alone());
        rounds.members.plain_page();
        assert_eq!(rounds.join(ID, None, sync(0, 0)), Ok(Arrival::Completes));
    }

    #[test]
    fn what_main_says_has_to_agree_with_what_is_known() {
        let mut rounds = Rounds::open(Some(2));
        assert_eq!(rounds.members.tell(3), Err(Mismatch::ChannelCount { told: 3, known: 2 }));
        let mut rounds = Rounds::open(None);
        rounds.members.tell(2).unwrap();
        assert_eq!(rounds.members.tell(2), Ok(()), "once more");
        assert_eq!(rounds.admit(ID, told(4)), Err(Stranger::OtherCount { id: ID, told: 4, channels: 2 }));
        assert_eq!(rounds.admit(ID, told(2)), Ok(()));
    }

    #[test]
    fn a_channel_that_has_not_joined_takes_no_part() {
        let mut rounds = Rounds::open(None);
        rounds.join(OTHER, None, sync(0, 0)).unwrap();
        let out_of_range = Violation::ChannelIdOutOfRange { id: ID, channels: 1 };
        assert_eq!(rounds.arrive(channel(0)), Err(out_of_range.clone().into()));
        assert_eq!(rounds.leave(ID), Err(out_of_range.clone()));
        assert_eq!(rounds.begin(ID), Err(out_of_range));
    }

    #[test]
    fn a_channel_that_left_makes_the_next_round_a_violation() {
        let missing = Violation::SyncMissing { channel: ChannelId(1), round: 0 };
        for first in [MAIN, channel(0)] {
            let mut left_first = Rounds::new(2);
            left_first.leave(ChannelId(1)).unwrap();
            assert_eq!(left_first.arrive(first), Err(missing.clone().into()));
            let mut left_last = Rounds::new(2);
            left_last.arrive(first).unwrap();
            assert_eq!(left_last.leave(ChannelId(1)), Err(missing.clone()));
        }
    }

    #[test]
    fn all_may_leave_between_two_rounds() {
        let mut rounds = Rounds::new(2);
        for party in [MAIN, channel(0), channel(1)] {
            rounds.arrive(party).unwrap();
        }
        assert_eq!((rounds.leave(ChannelId(0)), rounds.leave(ChannelId(1))), (Ok(()), Ok(())));
        assert_eq!(rounds.close(), Ok(()));
    }

    /// A receiver hung there, published or running: the channel waited for a sync point that does not come.
    #[test]
    fn after_its_last_sync_point_main_is_followed_by_no_channel() {
        let rounds = || {
            let mut rounds = Rounds::new(1);
            rounds.arrive(MAIN).unwrap();
            rounds.arrive(channel(0)).unwrap();
            rounds
        };
        let (mut early, mut late) = (rounds(), rounds());
        early.arrive(channel(0)).unwrap();
        assert_eq!(early.close(), Err(Violation::SyncAfterLast { channel: ID }));
        assert_eq!(late.close(), Ok(()));
        assert_eq!(late.arrive(channel(0)), Err(Violation::SyncAfterLast { channel: ID }.into()));
        let (mut early, mut late) = (rounds(), rounds());
        early.begin(ID).unwrap();
        assert_eq!(early.close(), Err(Violation::PageAfterLastSync { channel: ID }));
        assert_eq!(late.close(), Ok(()));
        assert_eq!(late.begin(ID), Err(Violation::PageAfterLastSync { channel: ID }));
    }

    #[test]
    fn the_rounds_are_over_when_the_one_is_that_main_called_the_last() {
        let mut rounds = Rounds::new(1);
        let pass = |rounds: &mut Rounds| {
            for party in [Party::Main, Party::Channel(ChannelId(0))] {
                rounds.arrive(party).unwrap();
            }
        };
        pass(&mut rounds);
        rounds.is_last();
        assert!(!rounds.are_over());
        rounds.arrive(Party::Channel(ChannelId(0))).unwrap();
        assert!(!rounds.are_over(), "main is missing");
        rounds.arrive(Party::Main).unwrap();
        assert!(rounds.are_over());
    }
}
