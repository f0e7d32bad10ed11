//! The memory of a guest: RAM blocks `ram` and `control`.
//!
//! `control` is small: a page per worker with its parameters and its report, and for a KVM guest also its code and page
//! tables. It is memory like any other and migrates like any other. It has one length for all guests, so that a
//! difference in anything but the memory size is found by a check with a better message than that of block lengths.

use std::{io, sync::Arc};

use multifd::ram::Ram;

use crate::{
    pattern::PAGE_SIZE,
    sys::{self, Mapping},
};

/// What is behind the memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Backing {
    /// Private memory in pages of 4 KiB.
    #[default]
    Anonymous,
    /// Private memory in pages of 2 MiB, where the kernel has them.
    AnonymousHuge,
    /// A file in memory, as VMMs use it that share memory with other processes.
    Memfd,
}

/// Mapped memory, as the engine sees it and as the guest does.
pub struct Memory {
    /// Both blocks, `ram` first.
    pub ram: Ram,
    pub(crate) ram_map: Arc<Mapping>,
    pub(crate) control: Arc<Mapping>,
}

/// Maps fresh memory. Nothing is touched.
///
/// # Errors
/// The kernel's; a length that is 0 or not a multiple of 4096.
pub fn allocate(bytes: u64, backing: Backing) -> io::Result<Memory> {
    let invalid = |message: String| io::Error::new(io::ErrorKind::InvalidInput, message);
    let len = usize::try_from(bytes).map_err(|_| invalid(format!("{bytes} bytes of memory cannot be addressed")))?;
    let map = |len| match backing {
        Backing::Anonymous | Backing::AnonymousHuge => Mapping::anonymous(len),
        Backing::Memfd => Mapping::memfd(len),
    };
    let (ram_map, control) = (Arc::new(map(len)?), Arc::new(map(CONTROL_BYTES)?));
    if backing == Backing::AnonymousHuge {
        ram_map.advise_huge();
    }
    let blocks = vec![sys::ram_block("ram", &ram_map).fresh(), sys::ram_block("control", &control).fresh()];
    let ram = Ram::new(PAGE_SIZE, blocks).map_err(|mismatch| invalid(mismatch.to_string()))?;
    Ok(Memory { ram, ram_map, control })
}

/// Length of block `control`.
pub const CONTROL_BYTES: usize = 2 << 20;

/// Where the page of worker `index` begins in block `control`.
pub(crate) fn worker_page(index: usize) -> usize {
    WORKER_PAGES + index * PAGE_SIZE
}

/// Before it are the code and two page tables of a KVM guest.
const WORKER_PAGES: usize = 3 * PAGE_SIZE;
/// How many workers a guest can have.
pub const MAX_WORKERS: usize = 64;

/// What is where in a worker's page, in bytes. The first half is written before the guest starts, the second by the
/// guest alone.
pub(crate) mod field {
    /// Words that are written per page.
    pub(crate) const WORDS: usize = 0;
    /// Bytes between the end of one written word and the next.
    pub(crate) const GAP: usize = 8;
    pub(crate) const WORD_STEP: usize = 16;
    pub(crate) const PASS_STEP: usize = 24;
    pub(crate) const PAGE_STEP: usize = 32;
    /// What is added to the value of the first word when a pass is over: back to the first page, on to the next pass.
    pub(crate) const VALUE_WRAP: usize = 40;
    /// The same for page + pass.
    pub(crate) const SUM_WRAP: usize = 48;
    /// Address of the first page of the worker's share, and of the byte behind it.
    pub(crate) const START: usize = 56;
    pub(crate) const END: usize = 64;
    pub(crate) const ZERO_MASK: usize = 72;

    /// Pages finished since the beginning.
    pub(crate) const PAGES_DONE: usize = 128;
    /// Words that were not what the pass before had left there.
    pub(crate) const WRONG_WORDS: usize = 136;
    /// Address of the last one.
    pub(crate) const WRONG_AT: usize = 144;
    /// The counter that the worker keeps in a register that only a complete vCPU state preserves.
    pub(crate) const REGISTER: usize = 152;
    /// How often that was not the number of pages finished.
    pub(crate) const REGISTER_ERRORS: usize = 160;
    /// How often `PAGES_DONE` was not what the worker had written there: this page itself was stale.
    pub(crate) const REPORT_ERRORS: usize = 168;
}
