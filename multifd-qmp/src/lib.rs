//! QMP, the monitor protocol of QEMU, for clients and for servers.
//!
//! [`Client`] drives a QEMU, or another server of the protocol, over its unix socket. It has a time limit on every wait:
//! a QEMU whose main loop is blocked by a broken migration still takes bytes and never answers.
//!
//! [`Server`] takes commands as a QEMU does, in its words: names, types, classes of errors, events. What the commands do is up to a
//! [`server::Handler`].
//!
//! Peers are not trusted: the length of a message and the number of events that are kept are bounded, and no input panics.
//! Commands with typed arguments and answers come from [`qapi_qmp`]. Answers in which each QEMU has more names than the one
//! before (capabilities, parameters, states) are read as JSON, since a type made for one version would refuse the next.

pub mod client;
pub mod codec;
mod error;
pub mod migration;
pub mod server;

pub use qapi_qmp;
pub use qapi_spec;

pub use self::{
    client::{Client, Event, Version},
    error::Error,
    migration::Status,
    server::Server,
};
