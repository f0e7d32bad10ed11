//! The round protocol and the commit as models small enough to be explored completely.
//!
//! A source (main and N senders) and a destination (main and N receivers) with a connection for each pair: bytes arrive in
//! order on each, in no order between them. The adversary chooses which pages the guest writes in each round, which channel
//! takes which page, who runs when, and, if asked to, where one thing goes wrong. Both sides decide who has arrived at the
//! end of a round by [`multifd_proto::rounds::Rounds`], the code that ships.
//!
//! The commit has a model of its own, since it needs one connection only and every kind of bad luck at every moment:
//! partitions, deaths, resets, failed writes, limits and cancels. Both sides decide by [`multifd_proto::commit`].
//!
//! Device state has one as well: in packets on the channels, on main while the guest runs, and up to the end of the stream.
//!
//! [`protocol`], [`commit`] and [`devices`] are the models, [`search`] visits all their states, [`variants`] and [`commit::variants`] list
//! what is asked of them: each protocol as it is, and with single parts left out.

pub mod commit;
pub mod devices;
pub mod protocol;
pub mod search;
pub mod variants;
