//! Small guests that prove their own memory, for the demo, the tests and the benches.
//!
//! A guest rewrites its working set forever, in passes, and checks each page before it rewrites it. What every byte
//! has to be at any moment is a formula ([`pattern`]), so at a pause the host can compare every page exactly. There are
//! two kinds behind one type, [`Guest`](guest::Guest): a vCPU under KVM that runs 64-bit code in user mode, and a thread
//! of this process for machines without `/dev/kvm`.
//!
//! ```text
//!            guest.rs            SourceVm and DestinationVm; configuration and digests as sections of their own
//!           /        \
//!   kvm/mod.rs    process.rs     who writes; state as sections; how it is stopped exactly
//!           \        /
//!   monitor.rs · error.rs        what a guest says of itself; why there is none
//!   worker.rs · pace.rs          pause, throttle, write rate: one worker's reins
//!   pattern.rs · memory.rs       what memory has to be; where it is
//! ```

#![deny(unsafe_code)]

pub mod body;
mod error;
pub mod guest;
pub mod host_kvm;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
pub mod kvm;
pub mod log;
pub mod memory;
mod monitor;
pub mod pace;
pub mod pattern;
pub mod process;
mod sys;
pub mod verify;
pub mod view;
mod worker;
