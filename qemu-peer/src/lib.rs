//! A real QEMU as the peer in tests and benches: installing, starting, driving and ending it.
//!
//! [`install`] makes three QEMU versions available without changing the system, [`process`] starts one and ends it by
//! its pid, [`Qmp`] talks to it, and [`guest`] is a live guest of 512 bytes that proves its own memory. [`libvirt`] is a daemon
//! of one's own that starts QEMUs. Nothing in here waits forever: a mistake in the dialect of a migration stream freezes
//! QEMU's main loop and QMP with it, so each read has a time limit and each process a deadline that is kept from outside.

pub mod error;
pub mod guest;
pub mod install;
pub mod libvirt;
pub mod process;

pub use error::Error;
pub use guest::BootGuest;
pub use install::{Installed, Version};
pub use libvirt::Libvirt;
pub use multifd_qmp::{Client as Qmp, Status};
pub use process::{Memory, Qemu, QemuBuilder};
