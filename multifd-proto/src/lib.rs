//! The wire format of QEMU multifd migration streams.
#![forbid(unsafe_code)]

pub mod command;
pub mod convergence;
pub mod encoder;
pub mod ids;
pub mod machine;
pub mod mapped_ram;
pub mod packet;
pub mod ram;
pub mod return_path;
pub mod rounds;
pub mod stream;
pub mod violation;
pub mod vmdesc;
pub mod wire;
pub mod xbzrle;

pub use ids::{BlockName, ChannelId};
pub use violation::{DecodeError, ProtocolError, Violation};
