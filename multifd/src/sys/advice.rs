//! `madvise` on guest memory: how the kernel is to back it, or that it is to forget it.

use std::io;

use super::kvm::system_page_size;
use crate::ram::GuestRange;

/// Backs `range` with huge pages from now on, where the kernel can.
pub(crate) fn huge_pages(range: GuestRange<'_>) -> io::Result<()> {
    advise(range, libc::MADV_HUGEPAGE)
}

/// Makes all pages of `range` present and writable, as if each had been written with what it holds.
pub(crate) fn populate(range: GuestRange<'_>) -> io::Result<()> {
    advise(range, libc::MADV_POPULATE_WRITE)
}

/// Makes all pages of `range` present for reading, as if each had been read.
///
/// # Errors
/// `EFAULT` where to read one would end the process (SIGBUS): the kernel has none for it. `EINVAL` before Linux 5.14.
pub(crate) fn populate_for_reading(range: GuestRange<'_>) -> io::Result<()> {
    advise(range, libc::MADV_POPULATE_READ)
}

/// Throws all pages of `range` away, which is private memory without a file: it reads as zeros, and costs nothing.
///
/// # Errors
/// Pages of `range` may be as they were: the memory is locked, or its pages are huge ones; the range may not be written,
/// or is not made of whole pages.
pub(crate) fn discard_private(range: GuestRange<'_>) -> io::Result<()> {
    whole_small_pages(range, libc::MADV_DONTNEED)?;
    advise(range, libc::MADV_DONTNEED)
}

/// The same for a part of a file in memory that is mapped shared: a hole is punched into the file.
///
/// # Errors
/// As [`discard_private`]; the file may not be written.
pub(crate) fn discard_shared(range: GuestRange<'_>) -> io::Result<()> {
    whole_small_pages(range, libc::MADV_REMOVE)?;
    advise(range, libc::MADV_REMOVE)
}

/// Gives `advice`, which throws pages away, for the second page of `range`: the kernel refuses that within a huge page.
///
/// Huge pages are kept. What they were reserved for does not always survive, and a page that cannot be had again ends the
/// process.
fn whole_small_pages(range: GuestRange<'_>, advice: i32) -> io::Result<()> {
    range.require_writable()?;
    let page = system_page_size() as usize;
    // The kernel rounds lengths up: that would throw away what follows.
    if !(range.as_ptr() as usize).is_multiple_of(page) || !range.len().is_multiple_of(page) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    match range.slice(page, page) {
        Some(second) => advise(second, advice),
        None => Err(io::ErrorKind::InvalidInput.into()),
    }
}

fn advise(range: GuestRange<'_>, advice: i32) -> io::Result<()> {
    // SAFETY: a `GuestRange` is mapped. What it holds may change at any time, and that is all that the advice in this file
    // does to it, in whole pages of the range.
    let result = unsafe { libc::madvise(range.as_ptr().cast(), range.len(), advice) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
