//! Which channels take part in a migration, and how that is known.
//!
//! The number of channels is not in QEMU's stream, and connections arrive in any order and late. A round that ends without
//! a channel that is still on its way breaks the round law, and a migration that ends without it has lost pages. So no
//! round with pages ends before it is *known* that all channels are here. [`Membership`] says what is known:
//!
//! - **Required**: this side was told the number.
//! - **Told**: the source says the number, in each [`Hello`](crate::packet::Hello) or on main. Our own source does. Its numbers have to
//!   add up all the same, see below: with all channels here, the balance is 0 at every sync point.
//! - **Numbers**: the numbers of the SYNC packets prove it, see below. So it is with every QEMU.
//! - **Plain**: main carries contents of pages, so the stream has no channels.
//!
//! # What the numbers of SYNC packets prove
//!
//! A source numbers the packets of all channels with one counter. It takes a number for each packet with pages, and one for
//! each SYNC on each channel; QEMU 7.2 may send both as one packet, which has the later number. At sync point *s*, counted
//! from 0, with *N* channels, the highest number *h* in its SYNC packets is the last that was taken:
//!
//! ```text
//! 1 + h = p + N × (s + 1)        p: packets with pages up to here, those with SYNC included
//! ```
//!
//! It holds at every sync point of all recorded streams of QEMU 7.2 and 10.0. A receiver that sees only *k* of the channels
//! counts only *p'* of the packets, and its highest number *h'* is one of theirs. All numbers up to *h'* were taken before
//! the SYNC packet that carries it was made, and what the receiver has counted is a part of that. The *balance*
//!
//! ```text
//! 1 + h' − p' − k × (s + 1)
//! ```
//!
//! is therefore how many of the numbers up to *h'* belong to channels that it does not see. A source begins no round before
//! all channels have sent the SYNC of the round before it, so each unseen channel has at least *s* of them. From *s* = 1 on a
//! balance of 0 proves that no channel is missing, and one above 0 proves that some are. Below 0 the source counts otherwise
//! and its numbers prove nothing. At *s* = 0 they do not matter: no page comes before it, and a channel that
//! comes later joins with its own first SYNC, before its first page. The project's `proof/membership.py` proves this for every number of
//! channels.

use std::num::NonZeroU8;

use crate::{
    ids::ChannelId,
    violation::{Mismatch, ProtocolError, Violation},
};

/// Which channels take part, and how that is known.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Membership {
    count: Count,
    /// What the first hello said, if one has come.
    told: Option<Option<NonZeroU8>>,
    /// How many channels have joined.
    joined: usize,
    /// Main was at a FLUSH, which only sources with channels send.
    expected: bool,
    /// No channel came in time, so rounds end without any.
    alone: bool,
    /// Packets with pages so far, on all channels.
    packets: u64,
    /// The highest number of a SYNC packet of the current round.
    highest: Option<u64>,
}

/// How many channels there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Count {
    /// It is not known.
    Open,
    /// This many, because of this.
    Known(usize, Evidence),
}

/// Why the number of channels is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Evidence {
    /// This side was told.
    Required,
    /// The source said so.
    Told,
    /// The numbers of SYNC packets prove it.
    Numbers,
    /// Main carries the contents of pages: there are no channels.
    Plain,
}

/// What is known at the end of a round, where main and all channels that have joined are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Verdict {
    /// Nothing of the round is missing.
    Complete,
    /// A channel is still to come.
    Missing,
}

/// Why a connection that says it is a channel is none of this migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum Stranger {
    /// Another connection has joined as this channel.
    #[error("channel {id} is here already")]
    Twice {
        /// The id.
        id: ChannelId,
    },
    /// Channel ids are smaller than the number of channels.
    #[error("channel id {id} with {channels} channels")]
    OutOfRange {
        /// The id.
        id: ChannelId,
        /// The number of channels.
        channels: usize,
    },
    /// It says another number of channels than what is known.
    #[error("channel {id} is one of {told}, this migration has {channels}")]
    OtherCount {
        /// The id.
        id: ChannelId,
        /// What it says.
        told: usize,
        /// What is known.
        channels: usize,
    },
    /// Some channels of a source say how many there are, and others do not.
    #[error("channel {id} does not say how many channels there are as the others do")]
    OtherKind {
        /// The id.
        id: ChannelId,
    },
    /// It comes after the end of a round that went without any channel: pages may be missing.
    #[error("channel {id} comes too late: a round was over without channels")]
    TooLate {
        /// The id.
        id: ChannelId,
    },
}

impl Membership {
    /// `channels` channels, which are all here.
    pub(crate) const fn fixed(channels: usize) -> Membership {
        Membership { count: Count::Known(channels, Evidence::Required), joined: channels, ..Membership::open(None) }
    }

    /// No channel is here yet. There have to be `required`, or as many as turn out.
    pub(crate) const fn open(required: Option<usize>) -> Membership {
        Membership {
            count: match required {
                Some(channels) => Count::Known(channels, Evidence::Required),
                None => Count::Open,
            },
            told: None,
            joined: 0,
            expected: false,
            alone: false,
            packets: 0,
            highest: None,
        }
    }

    /// How many channels there are, once that is known.
    pub const fn channels(&self) -> Option<usize> {
        match self.count {
            Count::Known(channels, _) => Some(channels),
            Count::Open => None,
        }
    }

    /// Why the number of channels is known.
    pub const fn evidence(&self) -> Option<Evidence> {
        match self.count {
            Count::Known(_, evidence) => Some(evidence),
            Count::Open => None,
        }
    }

    /// How many channels have joined.
    pub const fn joined(&self) -> usize {
        self.joined
    }

    /// Whether it is known how many channels there are, and all of them have joined.
    pub fn is_complete(&self) -> bool {
        self.channels() == Some(self.joined)
    }

    /// The source says on main that there are `channels`.
    ///
    /// # Errors
    /// Another number is known.
    pub fn tell(&mut self, channels: usize) -> Result<(), Mismatch> {
        match self.channels() {
            Some(known) if known != channels => Err(Mismatch::ChannelCount { told: channels, known }),
            Some(_) => Ok(()),
            None => {
                self.count = Count::Known(channels, Evidence::Told);
                Ok(())
            }
        }
    }

    /// Main carries the contents of a page: there are no channels, unless there is evidence of any.
    pub fn plain_page(&mut self) {
        if self.count == Count::Open && self.joined == 0 && !self.expected {
            self.count = Count::Known(0, Evidence::Plain);
        }
    }

    /// Main is at a FLUSH: there is at least one channel.
    pub fn expect_channels(&mut self) {
        self.expected = true;
    }

    /// No channel has come in time, and rounds go on without. Returns whether that is possible: there is no evidence of
    /// any channel.
    pub(crate) fn go_alone(&mut self) -> bool {
        self.alone = self.count == Count::Open && self.joined == 0 && !self.expected;
        self.alone
    }

    /// Whether the channel that says `id` and `told` may join; `taken` says whether one with this id has.
    ///
    /// # Errors
    /// It is none of this migration, or comes too late.
    pub(crate) fn admit(&self, id: ChannelId, told: Option<NonZeroU8>, taken: bool) -> Result<(), Stranger> {
        let said = told.map(|told| usize::from(told.get()));
        if let (Some(told), Some(channels)) = (said, self.channels())
            && told != channels
        {
            return Err(Stranger::OtherCount { id, told, channels });
        }
        if self.told.is_some_and(|first| first != told) {
            return Err(Stranger::OtherKind { id });
        }
        if let Some(channels) = self.channels().or(said)
            && id.index() >= channels
        {
            return Err(Stranger::OutOfRange { id, channels });
        }
        if taken {
            return Err(Stranger::Twice { id });
        }
        if self.alone { Err(Stranger::TooLate { id }) } else { Ok(()) }
    }

    /// A channel that was admitted joins, with its first SYNC.
    pub(crate) fn join(&mut self, told: Option<NonZeroU8>) {
        self.joined += 1;
        self.told = Some(told);
        if let (Some(told), Count::Open) = (told, self.count) {
            self.count = Count::Known(usize::from(told.get()), Evidence::Told);
        }
    }

    /// A SYNC packet with number `number` has come; since the one before, its channel had `packets` packets with pages, the
    /// SYNC packet included if it has some.
    pub(crate) fn count(&mut self, number: u64, packets: u64) {
        self.packets = self.packets.saturating_add(packets);
        self.highest = self.highest.max(Some(number));
    }

    /// What is known at the end of round `round`, counted from 0, when all that have joined are there.
    ///
    /// # Errors
    /// The numbers of the SYNC packets prove nothing, and nothing else does; or they contradict what they proved before, or
    /// what the source has said.
    pub(crate) fn verdict(&mut self, round: u64) -> Result<Verdict, ProtocolError> {
        match self.count {
            Count::Known(channels, _) if channels != self.joined => Ok(Verdict::Missing),
            Count::Known(..) if self.has_to_balance() && self.balance(round) != 0 => Err(self.unbalanced(round).into()),
            Count::Known(..) => Ok(Verdict::Complete),
            Count::Open if self.joined == 0 => {
                // Without channels a sync point is the end of a section, and the first has no pages.
                let passes = !self.expected && (round == 0 || self.alone);
                Ok(if passes { Verdict::Complete } else { Verdict::Missing })
            }
            Count::Open if round == 0 => Ok(Verdict::Complete),
            Count::Open => match self.balance(round) {
                0 => {
                    self.count = Count::Known(self.joined, Evidence::Numbers);
                    Ok(Verdict::Complete)
                }
                1.. => Ok(Verdict::Missing),
                _ => Err(Mismatch::ChannelsUnproven { joined: self.joined }.into()),
            },
        }
    }

    /// The round is over: SYNC packets belong to the next one from here on.
    pub(crate) fn next_round(&mut self) {
        self.highest = None;
    }

    /// Whether the numbers have to add up once all channels are here: they have before, or the source says how many channels it has, and
    /// then numbers its packets, also where this side was told the same.
    fn has_to_balance(&self) -> bool {
        let source_says = self.told.flatten().is_some();
        source_says || matches!(self.evidence(), Some(Evidence::Told | Evidence::Numbers))
    }

    fn unbalanced(&self, round: u64) -> Violation {
        let syncs = (self.joined as u64).saturating_mul(round.saturating_add(1));
        Violation::PacketNumbers {
            channels: self.joined,
            round,
            packets: self.packets,
            highest: self.highest.unwrap_or(0),
            expected: self.packets.saturating_add(syncs).saturating_sub(1),
        }
    }

    /// How many numbers up to the highest belong to channels that are not here.
    fn balance(&self, round: u64) -> i128 {
        let taken = self.highest.map_or(0, |highest| i128::from(highest) + 1);
        taken - i128::from(self.packets) - self.joined as i128 * (i128::from(round) + 1)
    }
}

#[cfg(test)]
mod recorded;
