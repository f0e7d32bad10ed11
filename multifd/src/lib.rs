//! Live migration for a virtual machine monitor: the guest moves to another process or host while it runs, its memory over
//! several connections at once, in the format of QEMU's multifd.
//!
//! You implement two traits of a few methods each: [`SourceVm`](vm::SourceVm) where the guest runs, and
//! [`DestinationVm`](vm::DestinationVm) where it goes. The engine does the rest, in the order that makes it safe: it tracks
//! what the guest writes, sends pages in rounds while it runs, pauses it for the last few milliseconds, moves the state of its
//! devices, and hands it over in two steps, so that it never runs twice.
//!
//! # A whole program
//!
//! A guest that writes while it moves, both sides in one process (`cargo run --example minimal`):
//!
#![doc = concat!("```\n", include_str!("../examples/minimal.rs"), "```")]
//!
//! # What happens
//!
//! | the source | the destination |
//! |---|---|
//! | connects, [`describe`](vm::SourceVm::describe)s the VM and the RAM blocks | waits, [`prepare`](vm::DestinationVm::prepare)s the VM; makes memory zero that is not known to be |
//! | switches the [dirty log](dirty) on, sends all pages that are in use | puts pages in place as they come |
//! | *rounds*: sends what was written meanwhile, until the rest fits the downtime limit | every channel ends a round before any begins the next |
//! | [`pause`](vm::SourceVm::pause), the last round, [`save`](vm::SourceVm::save) | [`load`](vm::DestinationVm::load) for each section |
//! | allows the start, and does not resume from then on | [`start`](vm::DestinationVm::start), and says so |
//!
//! All methods of a VM are called by the thread that called [`Source::run`](source::Source::run) or
//! [`Destination::run`](destination::Destination::run). The engine makes other threads only for connections ([`threads`] says
//! which, and lets you make them), and has joined them when `run` returns. There is no runtime to bring.
//!
//! # What is guaranteed
//!
//! On `Ok` at the source the guest is paused there and runs at the destination. On `Err` it runs at the source as before:
//! [`resume`](vm::SourceVm::resume) was called if it had been paused. Two errors are exceptions and have names:
//! [`InDoubt`](error::Error::InDoubt), where the answer of the destination was lost and only an operator can find out which
//! side has the guest, and [`NotResumed`](error::Error::NotResumed), where your own `resume` failed. A peer that is hostile, slow or dead changes
//! nothing about this: every wait ends by its event, by a limit, or by [`stop`].
//!
//! # Memory
//!
//! Guest memory is a [`Ram`](ram::Ram): named blocks. [`RamBlock::from_raw`](ram::RamBlock::from_raw) takes any mapping and a value that keeps it mapped;
//! with the feature `vm-memory`, `dirty::vm_memory` takes that crate's. Say what you know: [`fresh`](ram::RamBlock::fresh)
//! for memory that was just mapped, [`backed_by`](ram::RamBlock::backed_by) for what it is made of,
//! [`pinned`](ram::RamBlock::pinned) where devices hold its pages. What you do not say is looked up or done the slow way, never assumed.
//!
//! # Dirty logs
//!
//! | who writes | log |
//! |---|---|
//! | vCPUs of KVM | [`KvmDirtyLog`](dirty::kvm_log::KvmDirtyLog); [`KvmDirtyRing`](dirty::kvm_ring::KvmDirtyRing) where the VM was made with rings |
//! | devices in your process | [`AtomicDirtyBitmap`](dirty::bitmap::AtomicDirtyBitmap), or the bitmaps of `vm-memory` |
//! | anything, where there is no such log | [`UffdWpLog`](dirty::uffd_wp::UffdWpLog): write protection by userfaultfd |
//! | several of them | [`MergedLog`](dirty::merged::MergedLog) |
//!
//! Take the log rather than the ring for guests that write fast: a ring that is full stops its vCPU.
//!
//! # Transports
//!
//! [`Uri`](transport::uri::Uri) knows `tcp:`, `unix:`, `vsock:` and inherited descriptors; [`transport::fd`] takes sockets that exist; `transport::tls` (feature `tls`) puts TLS around any of
//! them; [`Connect`](transport::Connect), [`Listen`](transport::Listen) and [`Stream`](transport::Stream) are for connections of your own.
//!
//! # Towards QEMU
//!
//! Both directions, to and from QEMU 7.2, 10.0 and 11.1: [`source::Peer`], [`source::QemuFormat`]. Between two ends of this crate more is agreed on
//! at the start: the number of channels, a token, the two steps of the commit. Checkpoints are files that QEMU loads ([`checkpoint`]).
//!
//! # Features
//!
//! `zlib` and `zstd` (on by default) compress channels; `tls`; `vm-memory`; `conformance` has suites and faulty connections for
//! tests of your own. Events go to [`tracing`](https://docs.rs/tracing); a program that uses `log` sees them with that crate's feature `log`.
//!
//! How to embed it step by step, with recipes for several VMMs, is in
//! [embedding.md](https://github.com/multifd/multifd/blob/main/docs/embedding.md).

#![deny(unsafe_code)]
// A type that a caller meets has a name that the caller can write.
#![warn(unnameable_types)]

pub mod beside_ram;
mod channel_end;
pub mod checkpoint;
pub mod clock;
mod compress;
#[cfg(any(feature = "conformance", all(test, not(any(loom, shuttle)))))]
pub mod conformance;
pub mod destination;
pub mod dirty;
pub mod error;
pub mod host;
pub mod inspect;
mod limiter;
pub mod memory;
pub mod postcopy;
pub mod progress;
mod pulse;
mod round;
mod section_body;
pub mod sections;
pub mod source;
pub mod stop;
mod sync;
mod sys;
mod system_calls;
pub mod testing;
pub mod threads;
pub mod transport;
pub mod vm;
mod watchdog;
mod watched;

pub use memory::{dirty_bitmap, layout, ram};
pub use multifd_proto;
#[cfg(feature = "vm-memory")]
pub use vm_memory;

/// The example in the README has to compile.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

/// So have those in the book.
#[cfg(all(doctest, feature = "vm-memory"))]
#[doc = include_str!("../../docs/embedding.md")]
struct Embedding;
