//! `madvise` on guest memory: how the kernel is to back it.

use std::io;

use crate::ram::GuestRange;

/// Backs `range` with huge pages from now on, where the kernel can.
pub(crate) fn huge_pages(range: GuestRange<'_>) -> io::Result<()> {
    advise(range, libc::MADV_HUGEPAGE)
}

/// Makes all pages of `range` present and writable, as if each had been written with what it holds.
pub(crate) fn populate(range: GuestRange<'_>) -> io::Result<()> {
    advise(range, libc::MADV_POPULATE_WRITE)
}

fn advise(range: GuestRange<'_>, advice: i32) -> io::Result<()> {
    // SAFETY: a `GuestRange` is mapped; neither advice changes what the memory holds.
    let result = unsafe { libc::madvise(range.as_ptr().cast(), range.len(), advice) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
