//! Multi-channel live migration of virtual machines, in QEMU's multifd format.
//!
//! A VMM implements [`SourceVm`](vm::SourceVm) and [`DestinationVm`](vm::DestinationVm); the engine moves its memory
//! over N connections beside the main one while the guest runs, and its device state while it is paused for some
//! milliseconds.

#![deny(unsafe_code)]

mod barrier;
#[cfg(feature = "bench")]
#[doc(hidden)]
pub mod bench;
pub mod beside_ram;
#[cfg(any(test, feature = "broken-variants"))]
pub mod broken;
pub mod checkpoint;
pub mod clock;
#[cfg(all(test, not(any(loom, shuttle))))]
mod close_order;
mod compress;
pub mod destination;
pub mod dirty;
pub mod dirty_bitmap;
pub mod error;
#[cfg(all(test, not(any(loom, shuttle))))]
mod faults;
#[cfg(all(feature = "fuzzing", not(any(loom, shuttle))))]
#[doc(hidden)]
pub mod fuzzing;
pub mod inspect;
pub mod layout;
mod limiter;
#[cfg(all(test, loom))]
mod loom_tests;
pub mod progress;
mod pulse;
pub mod ram;
mod scan;
pub mod sections;
#[cfg(all(test, shuttle))]
mod shuttle_tests;
pub mod source;
pub mod stop;
mod sync;
mod sys;
#[cfg(all(test, not(loom)))]
mod test_vm;
#[cfg(all(test, not(any(loom, shuttle))))]
mod tests;
pub mod threads;
pub mod transport;
pub mod vm;
mod watchdog;

pub use multifd_proto;

/// The example in the README has to compile.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
