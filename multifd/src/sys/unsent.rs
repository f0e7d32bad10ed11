//! Limits what a TCP connection keeps unsent, so that what is written next does not wait long.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

/// Has writes wait while about `bytes` are unsent (`TCP_NOTSENT_LOWAT`). Bytes that are on their way do not count, so long
/// links are as fast as before.
pub(crate) fn limit(socket: BorrowedFd<'_>, bytes: usize) -> io::Result<()> {
    let bytes = libc::c_int::try_from(bytes).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: the option takes an int, which `bytes` is, and the kernel only reads it.
    let status = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            TCP_NOTSENT_LOWAT,
            (&raw const bytes).cast(),
            size_of_val(&bytes) as libc::socklen_t,
        )
    };
    if status == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Linux's, which libc does not name on all targets.
const TCP_NOTSENT_LOWAT: libc::c_int = 25;
