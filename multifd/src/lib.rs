//! Multi-channel live migration of virtual machines, in QEMU's multifd format.
//!
//! A VMM implements [`SourceVm`](vm::SourceVm) and [`DestinationVm`](vm::DestinationVm); the engine moves its memory
//! over N connections beside the main one while the guest runs, and its device state while it is paused for some
//! milliseconds.

#![deny(unsafe_code)]

pub mod beside_ram;
pub mod checkpoint;
pub mod clock;
mod compress;
pub mod destination;
pub mod dirty;
pub mod error;
pub mod inspect;
mod limiter;
pub mod memory;
pub mod postcopy;
pub mod progress;
mod pulse;
mod round;
pub mod sections;
pub mod source;
pub mod stop;
mod sync;
mod sys;
pub mod testing;
pub mod threads;
pub mod transport;
pub mod vm;
mod watchdog;

pub use memory::{dirty_bitmap, layout, ram};
pub use multifd_proto;

/// The example in the README has to compile.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
