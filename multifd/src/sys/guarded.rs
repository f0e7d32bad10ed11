//! RAM blocks between pages that nobody may touch, for tests and fuzzers.

use std::{io, ptr::NonNull};

use multifd_proto::BlockName;

use super::mapping::Mapping;
#[cfg(test)]
use crate::ram::GuestRange;
use crate::ram::RamBlock;

/// A fresh block of `len` zero bytes, whole pages of 4 KiB, with 64 KiB before and behind it that cannot be read or
/// written: whoever leaves the block ends the process, or gets `EFAULT` from the kernel.
pub(crate) fn block(name: BlockName, len: usize) -> io::Result<RamBlock> {
    assert!(len > 0 && len.is_multiple_of(4096), "blocks are whole pages");
    let mapping = Mapping::anonymous(len + 2 * GUARD)?;
    let start = mapping.base().as_ptr();
    for guard in [start, start.wrapping_add(GUARD + len)] {
        // SAFETY: the first and the last `GUARD` bytes of the mapping, to which nobody has a pointer yet.
        if unsafe { libc::mprotect(guard.cast(), GUARD, libc::PROT_NONE) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    let base = NonNull::new(start.wrapping_add(GUARD)).expect("inside of a mapping");
    // SAFETY: `len` bytes from `base` on stay mapped readable and writable until the mapping is dropped.
    Ok(unsafe { RamBlock::from_raw(name, base, len, Box::new(mapping)) }.fresh())
}

/// From now on nobody may read or write `pages`: a fault ends the process.
#[cfg(test)]
pub(crate) fn forbid(pages: &GuestRange<'_>) {
    protect(pages, libc::PROT_NONE);
}

/// The same pages can be read and written again.
#[cfg(test)]
pub(crate) fn permit(pages: &GuestRange<'_>) {
    protect(pages, libc::PROT_READ | libc::PROT_WRITE);
}

#[cfg(test)]
fn protect(pages: &GuestRange<'_>, access: libc::c_int) {
    // SAFETY: whole pages of a block, of which no Rust reference exists other than to atomics.
    let result = unsafe { libc::mprotect(pages.as_ptr().cast(), pages.len(), access) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
}

/// More than a packet's header or a page, so that a slip by one of them does not land in the next mapping.
const GUARD: usize = 64 << 10;
