//! Checkpoints: a VM in one file, which is a mapped-ram migration stream as QEMU writes and reads it.
//!
//! ```text
//! header, configuration { mapped-ram, uuid } · [early devices] · START ram { name, length, header | bitmap | pages; … } · [packets]
//!     · early devices
//!     · END ram · FULL device … · end of state · vmdescription
//! ```
//!
//! Every page has its place, so channels write in any order and a newer copy replaces an older one: the file is as large as
//! the guest's memory at most, however long the migration took. Pages of zeros are holes.
//!
//! [`Writer`] takes a migration into a file, which gets its name when it is complete and on disk, and only then is the
//! source told that its VM is safe. [`Checkpoint`] reads such a file, of ours or of QEMU's, and
//! [`CheckpointSource`] is the VM in it, to be sent like any other.

mod directory;
mod error;
mod kept_packets;
mod kind;
mod output;
mod page_file;
mod pages;
mod pending;
mod read;
mod source;
mod stream;
mod tail;
mod write;

#[cfg(all(test, not(any(loom, shuttle))))]
mod elsewhere;
#[cfg(all(test, not(any(loom, shuttle))))]
mod end_token;
#[cfg(all(test, not(any(loom, shuttle))))]
mod forged_ends;
#[cfg(all(test, not(any(loom, shuttle))))]
mod one_way_tests;
#[cfg(all(test, not(any(loom, shuttle))))]
mod packets_tests;
#[cfg(all(test, not(any(loom, shuttle))))]
mod snapshots;
#[cfg(all(test, not(any(loom, shuttle))))]
mod tests;

pub(crate) use self::{
    directory::unnamed_file,
    page_file::PageFile,
    pages::FilePages,
    read::Stamp,
    tail::{QUIET, Tail, section_beside_ram},
};
pub use multifd_proto::vmdesc::CutError;

pub use self::{
    error::{BlockNames, CheckpointError},
    kept_packets::{KeptPackets, PacketedDevice},
    page_file::DirectWrites,
    read::{BlockReader, Checkpoint, CheckpointBlock},
    source::CheckpointSource,
    write::Writer,
};

/// The page size of all checkpoints: x86 has no other, and nothing else was tried.
pub const PAGE_SIZE: usize = 4096;

/// The most guest memory of a checkpoint, so that a peer cannot ask for bitmaps that do not fit memory.
pub const MAX_RAM: u64 = 16 << 40;

/// The most device state of a checkpoint: it is kept in memory until its end is found. Real ones have kilobytes, some
/// hundred megabytes with assigned GPUs.
pub const MAX_DEVICE_STATE: usize = 1 << 30;

/// The most device state that comes before the pages, of all devices together. Its end is searched for, and it is kept in
/// memory. Real ones, of virtio-mem, have some hundred bytes and one for each of their blocks.
pub const MAX_EARLY_STATE: usize = 64 << 20;
