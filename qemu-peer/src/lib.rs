//! A real QEMU as the peer in tests and benches: installing, starting, driving and ending it.
//!
//! [`install`] makes two QEMU versions available without changing the system, and [`qmp`] talks to one. Nothing in here
//! waits for ever: a mistake in the dialect of a migration stream freezes QEMU's main loop and QMP with it, so each read has a
//! time limit.

pub mod error;

pub mod install;

pub mod qmp;

pub use error::Error;
pub use install::{Installed, Version};

pub use qmp::{Qmp, Status};
