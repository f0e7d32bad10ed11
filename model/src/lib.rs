//! The round protocol as a model small enough to be explored completely.
//!
//! A source (main and N senders) and a destination (main and N receivers) with a connection for each pair: bytes arrive in
//! order on each, in no order between them. The adversary chooses which pages the guest writes in each round, which channel
//! takes which page, who runs when, and, if asked to, where one thing goes wrong. Both sides decide who has arrived at the
//! end of a round by [`multifd_proto::rounds::Rounds`], the code that ships.
//!
//! [`protocol`] is the model, [`search`] visits all its states, [`variants`] lists what is asked of it: the protocol as it
//! is, and with single parts left out.

pub mod protocol;
pub mod search;
pub mod variants;
