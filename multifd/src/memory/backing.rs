//! What the memory of a RAM block is made of: what the engine would otherwise have to guess from `/proc`.
//!
//! A page of which the kernel has nothing reads as zeros in memory of its own, and means something else where another
//! part of the process fills it in. Only the VMM knows which of the two it is, so it says so.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

pub use crate::sys::file_block::FileMemory;
use crate::sys::holes::{self, SharedMemory};

/// What the memory of a RAM block is made of. Blocks that this crate maps know it; the VMM says it of its own, by
/// [`RamBlock::backed_by`](crate::ram::RamBlock::backed_by).
#[derive(Debug)]
#[non_exhaustive]
pub enum Backing {
    /// Private memory without a file, in which a page that is absent reads as zeros: no userfaultfd fills it in.
    Anonymous,
    /// A part of a file that is in memory only, mapped shared. A hole in the file reads as zeros.
    MemoryFile(MemoryFile),
    /// A part of a file that is read when a source sends it, as the blocks of a checkpoint.
    File(FileMemory),
    /// Memory of which nothing was said. It is looked up in `/proc/self/smaps` where it matters: private memory without a file that
    /// no userfaultfd fills in counts as [`Anonymous`](Backing::Anonymous), and nothing is assumed of any other.
    Foreign,
}

/// A memfd, or a file in a tmpfs or hugetlbfs, from some offset on.
#[derive(Debug)]
pub struct MemoryFile {
    memory: SharedMemory,
    offset: u64,
    /// The file as the VMM has opened it, where [`SharedMemory`] has opened it once more, for reading.
    as_given: Option<OwnedFd>,
}

impl MemoryFile {
    /// The bytes of `file` from `offset` on, where the block is mapped from. The file is opened once more, so that the caller's
    /// position in it does not move; where `/proc` is not mounted, the position is not used.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] for a file of another kind: only memory tells without delay what was written through a
    /// mapping; the kernel's.
    pub fn new(file: BorrowedFd<'_>, offset: u64) -> io::Result<MemoryFile> {
        let memory = holes::open_shared_memory(file)?;
        let as_given = if memory.has_own_position { Some(file.try_clone_to_owned()?) } else { None };
        Ok(MemoryFile { memory, offset, as_given })
    }

    /// A memory file of small pages, whose position is of no importance to any other part of the process.
    pub(super) fn own(file: File) -> MemoryFile {
        MemoryFile { memory: SharedMemory { file, has_own_position: true, huge_page: None }, offset: 0, as_given: None }
    }

    pub(crate) fn memory(&self) -> &SharedMemory {
        &self.memory
    }

    /// The file as the VMM has opened it.
    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.as_given.as_ref().map_or(self.memory.file.as_fd(), OwnedFd::as_fd)
    }

    /// Where in the file the block begins.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }
}
