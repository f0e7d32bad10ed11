//! Has the kernel begin to write a file to disk.

use std::{fs::File, io, os::fd::AsRawFd};

/// Begins to write what was written to `file` to disk, and does not wait for it: a later `fsync` has less to do.
///
/// # Errors
/// The kernel's, for a file system that cannot do that. Nothing depends on it.
pub(crate) fn begin(file: &File) -> io::Result<()> {
    // SAFETY: takes numbers only. A length of 0 means to the end of the file.
    let result = unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, libc::SYNC_FILE_RANGE_WRITE) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
