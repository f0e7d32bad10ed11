//! Multi-channel live migration of virtual machines, in QEMU's multifd format.
//!
//! A VMM implements [`SourceVm`](vm::SourceVm) and [`DestinationVm`](vm::DestinationVm); the engine moves its memory
//! over N connections beside the main one while the guest runs, and its device state while it stands still for some
//! milliseconds.

#![deny(unsafe_code)]

pub mod dirty;
pub mod dirty_bitmap;
pub mod error;
pub mod layout;
pub mod ram;
pub mod sections;
pub mod stop;
mod sync;
mod sys;
pub mod transport;
pub mod vm;
