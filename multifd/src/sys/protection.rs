//! Whether this process may write to a RAM block at all: `mprotect`.

use std::io;

use crate::ram::{Access, RamBlock};

/// From now on a write to `block` is a fault: SIGSEGV for code of this process, `EFAULT` for the kernel.
///
/// # Errors
/// The kernel's: the block does not begin and end at pages of its memory.
pub(crate) fn forbid_writing(block: &RamBlock) -> io::Result<()> {
    protect(block, libc::PROT_READ)
}

/// From now on `block`, which may be written, can be.
///
/// # Errors
/// The kernel's; also for a block that is only to be read.
pub(crate) fn permit_writing(block: &RamBlock) -> io::Result<()> {
    match block.access() {
        Access::ReadWrite => protect(block, libc::PROT_READ | libc::PROT_WRITE),
        Access::ReadOnly => Err(io::ErrorKind::PermissionDenied.into()),
    }
}

fn protect(block: &RamBlock, access: libc::c_int) -> io::Result<()> {
    let whole = block.whole();
    // The kernel rounds lengths up: that would change what follows.
    if !whole.len().is_multiple_of(super::kvm::system_page_size() as usize) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it ends within a page"));
    }
    // SAFETY: all of the range is mapped and is whole pages of the block; no Rust reference to it exists other than to
    // atomics, and a write that comes while it is forbidden is a fault and nothing else.
    let result = unsafe { libc::mprotect(whole.as_ptr().cast(), whole.len(), access) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
