//! Words in a memory file, which other processes set bits in.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd},
    sync::atomic::AtomicU64,
};

use rustix::fs::{SealFlags, fcntl_add_seals};

use super::mapping::Mapping;

/// The words, all zero to begin with. No process that has the file can change its length.
pub(crate) struct SharedWords {
    mapping: Mapping,
    file: File,
    len: usize,
}

impl SharedWords {
    /// `len` words.
    pub(crate) fn new(len: usize) -> io::Result<SharedWords> {
        let bytes = len.checked_mul(size_of::<AtomicU64>()).ok_or(io::ErrorKind::OutOfMemory)?;
        let (mapping, file) = Mapping::memory_file(bytes)?;
        // In a file that another process has made shorter, a load is a fault.
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok(SharedWords { mapping, file, len })
    }

    pub(crate) fn words(&self) -> &[AtomicU64] {
        // SAFETY: so many words are mapped, at a page's begin, as long as `self` lives; the file cannot become shorter. All bits are
        // a value, and every access of this process is atomic.
        unsafe { std::slice::from_raw_parts(self.mapping.base().as_ptr().cast_const().cast(), self.len) }
    }

    /// Where they are mapped.
    pub(crate) fn address(&self) -> u64 {
        self.mapping.base().addr().get() as u64
    }

    /// The file that they are all of.
    pub(crate) fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
