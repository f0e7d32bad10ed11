//! Fresh memory, mapped for RAM blocks.

use std::{fs::File, io, os::fd::AsRawFd, ptr::NonNull};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

/// A mapping that ends when it is dropped.
pub(crate) struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: an address and a length; whoever reaches the memory does so through `RamBlock`.
unsafe impl Send for Mapping {}
// SAFETY: as `Send`.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// `len` bytes of private memory without a file.
    pub(crate) fn anonymous(len: usize) -> io::Result<Mapping> {
        Mapping::new(len, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE, -1)
    }

    /// `len` bytes of a new memory file, which other processes can map too, and the file.
    pub(crate) fn memory_file(len: usize) -> io::Result<(Mapping, File)> {
        let fd = memfd_create("guest-ram", MemfdFlags::CLOEXEC)?;
        ftruncate(&fd, len as u64)?;
        let mapping = Mapping::new(len, libc::MAP_SHARED, fd.as_raw_fd())?;
        Ok((mapping, File::from(fd)))
    }

    fn new(len: usize, flags: i32, fd: i32) -> io::Result<Mapping> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: without an address asked for, nothing that exists is replaced.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), len, access, flags, fd, 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Mapping { base: NonNull::new(base.cast()).expect("the kernel does not map address 0 unasked"), len })
    }

    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, unmapped nowhere else; whoever used it held the owner.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}
