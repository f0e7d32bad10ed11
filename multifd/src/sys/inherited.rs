//! Takes over a file descriptor that the process was started with.

use std::{
    io,
    os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use rustix::io::{Errno, FdFlags, fcntl_getfd, fcntl_setfd};

/// Descriptor `number`, which must have been inherited and which nobody took before.
///
/// # Errors
/// Where there is no such descriptor, where it is a standard stream, or where this process opened it or took it before.
pub(crate) fn take(number: RawFd) -> io::Result<OwnedFd> {
    // So that of two threads only one sees the flag unset. Not from `crate::sync`: model checkers open no descriptors.
    static ONE_AT_A_TIME: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if number < 3 {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "0, 1 and 2 are the standard streams"));
    }
    // SAFETY: the number is not -1; it is used for this check only, and the kernel answers EBADF where it is not open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    let flags = match fcntl_getfd(borrowed) {
        Err(Errno::BADF) => return Err(io::Error::new(io::ErrorKind::NotFound, "it is not open")),
        other => other?,
    };
    // A descriptor with this flag does not survive the start of a program, so this process opened it (Rust sets it on
    // everything it opens) or has taken it here before: somebody else owns it.
    if flags.contains(FdFlags::CLOEXEC) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is in use, not inherited (close-on-exec is set)"));
    }
    fcntl_setfd(borrowed, flags | FdFlags::CLOEXEC)?;
    // SAFETY: open, and owned by nobody: it was inherited, and the flag just set keeps others from taking it here.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

#[cfg(test)]
mod tests {
    use std::os::{fd::AsRawFd, unix::net::UnixStream};

    use super::*;

    #[test]
    fn only_an_inherited_descriptor_is_taken_and_only_once() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let number = theirs.as_raw_fd();
        assert!(take(number).unwrap_err().to_string().contains("in use"));
        // As a parent leaves it: without the flag and without an owner.
        fcntl_setfd(&theirs, FdFlags::empty()).unwrap();
        std::mem::forget(theirs);
        let taken = take(number).unwrap();
        assert!(take(number).unwrap_err().to_string().contains("in use"));
        drop(taken);
        drop(ours);
        assert!(take(1).is_err());
        assert_eq!(take(1_000_000).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
