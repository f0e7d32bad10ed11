//! RAM blocks that are parts of a file, for reading.

use std::{fs::File, io, os::fd::AsRawFd, ptr::NonNull};

use multifd_proto::BlockName;

use crate::ram::RamBlock;

/// The `len` bytes from `offset` on of `file`, whose end lies behind them. Nobody writes to the block.
///
/// The file must not become shorter: the pages behind its new end could no longer be read, which ends the process.
pub(crate) fn file_block(name: BlockName, file: &File, offset: u64, len: usize) -> io::Result<RamBlock> {
    let offset = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    let (protection, flags) = (libc::PROT_READ, libc::MAP_PRIVATE | libc::MAP_NORESERVE);
    // SAFETY: a new mapping at an address of the kernel's choice; the kernel checks the other arguments.
    let base = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, file.as_raw_fd(), offset) };
    if base == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let mapping = Mapping { base, len };
    // SAFETY: the mapping was just made and has this length. It is read front to back: advice, no effect on contents.
    let _ = unsafe { libc::madvise(mapping.base, len, libc::MADV_SEQUENTIAL) };
    let base = NonNull::new(mapping.base.cast::<u8>()).expect("the kernel maps nothing at 0 unasked");
    // SAFETY: `len` bytes are mapped readable at `base` until `mapping` is dropped, and no reference to them exists. A
    // source only reads its memory.
    Ok(unsafe { RamBlock::from_raw(name, base, len, Box::new(mapping)) })
}

/// Unmaps the file.
struct Mapping {
    base: *mut libc::c_void,
    len: usize,
}

// SAFETY: it only unmaps, once, whoever drops it.
unsafe impl Send for Mapping {}
// SAFETY: nothing is reachable through a shared reference.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: made by `mmap` with this length and unmapped nowhere else; the block that used it is gone.
        unsafe { libc::munmap(self.base, self.len) };
    }
}
