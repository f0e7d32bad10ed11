//! The wire format of QEMU's multifd migration streams: pure encoders, decoders and protocol decisions.
//!
//! Nothing here opens a connection, starts a thread or reads a clock. Decoders are fed slices, say how many more bytes they
//! need, and never allocate by a number that a peer sent beyond the limits documented beside them. Page bytes never pass through
//! this crate: it describes where they go.
//!
//! # The complete stream
//!
//! A migration uses one main connection and N channels. The first four bytes of a connection tell which it is.
//!
//! ```text
//!  main                                     channel 0 … N-1
//!  ────                                     ───────────────
//!  "QEVM" 3                  stream         Hello { uuid, channel id }       packet
//!  configuration: machine type
//!  [OPEN_RETURN_PATH, PING]  command
//!  START ram: block list     ram
//!    first sync point ◀───────────────────▶ SYNC packet on every channel
//!  PART ram                                 packet: header, up to 512 KiB of pages of one block
//!    [words for zero pages]                 packet …
//!    sync point ◀─────────────────────────▶ SYNC packet on every channel     end of a round
//!  PART ram …                               …
//!  [SWITCHOVER_START]                       (the guest has stopped)
//!  END ram                                  the last pages
//!    sync point ◀─────────────────────────▶ SYNC packet on every channel
//!  FULL device, FULL device …               (closed when the migration is over)
//!  end of state
//!  vmdescription             vmdesc
//!
//!  main, the other way: PONG, SHUT          return_path
//! ```
//!
//! What a sync point on main looks like is the [dialect](machine::Dialect): a FLUSH word (*per-round*), or the end of every
//! section of `ram` (*per-section*). [`rounds`] keeps the account of who has arrived, and
//! [`commit`] which side has the guest in the end.
//!
//! # Example
//!
//! ```
//! use multifd_proto::Step;
//! use multifd_proto::stream::{Item, MainDecoder};
//!
//! let received = b"QEVM\0\0\0\x03\x07\0\0\0\x0epc-i440fx-10.0";
//! let mut decoder = MainDecoder::new(4096);
//! assert_eq!(decoder.step(&received[..5])?, Step::Need(8));
//! assert_eq!(decoder.step(received)?, Step::Item { item: Item::Header, used: 8 });
//! let machine = "pc-i440fx-10.0".to_owned();
//! assert_eq!(decoder.step(&received[8..])?, Step::Item { item: Item::Configuration { machine }, used: 19 });
//! # Ok::<_, multifd_proto::stream::StreamError>(())
//! ```
#![forbid(unsafe_code)]

pub mod bodies;
pub mod channel_end;
pub mod command;
pub mod commit;
pub mod device_state;
pub mod encoder;
pub mod extension;
mod ids;
pub mod machine;
pub mod mapped_ram;
pub mod membership;
pub mod packet;
pub mod postcopy;
pub mod ram;
pub mod return_path;
pub mod rounds;
pub mod shared_memory;
pub mod stream;
mod violation;
pub mod vmdesc;
mod wire;
pub mod xbzrle;

pub use ids::{BlockName, ChannelId};
pub use violation::{DecodeError, Mismatch, ProtocolError, Violation};
pub use wire::{Codec, Step};

#[cfg(test)]
mod properties;
