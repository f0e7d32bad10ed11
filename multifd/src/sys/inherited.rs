//! Takes over file descriptors that the process was started with.
//!
//! A number alone does not say who owns a descriptor: safe code can open one that looks inherited. So the program says once,
//! at its start, that all it has then are inherited, and each of those is given away at most once.

use std::{
    collections::BTreeSet,
    io,
    os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd},
    // Not from `crate::sync`: model checkers open no descriptors.
    sync::{Mutex, PoisonError},
};

use rustix::io::{Errno, FdFlags, fcntl_getfd, fcntl_setfd};

/// Remembers the descriptors that are open now as those that may be taken. Later calls change nothing.
///
/// # Safety
/// No part of this process owns a descriptor that is open now without close-on-exec, other than 0, 1 and 2, or will use or
/// close one that it did not [`take`].
pub(crate) unsafe fn claim() {
    UNOWNED.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(Unowned::now);
}

/// Descriptor `number`, which was claimed and which nothing took before.
///
/// # Errors
/// Where the descriptor is a standard stream, is not open, was not inherited or was taken before; where the program claimed
/// none.
pub(crate) fn take(number: RawFd) -> io::Result<OwnedFd> {
    let refused = |why| Err(io::Error::new(io::ErrorKind::InvalidInput, why));
    if number < 3 {
        return refused("0, 1 and 2 are the standard streams");
    }
    match &mut *UNOWNED.lock().unwrap_or_else(PoisonError::into_inner) {
        Some(unowned) => unowned.take(number),
        None => {
            refused("this program has not claimed its inherited descriptors (multifd::transport::fd::claim_inherited)")
        }
    }
}

/// Numbers of descriptors that were inherited and not taken since. `None` before they were claimed.
static UNOWNED: Mutex<Option<Unowned>> = Mutex::new(None);

/// Each number is that of an open descriptor without an owner, as far as [`claim`]'s caller keeps its promise.
struct Unowned(BTreeSet<RawFd>);

impl Unowned {
    fn now() -> Unowned {
        let numbers: Vec<RawFd> = match std::fs::read_dir("/proc/self/fd") {
            Ok(entries) => entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect(),
            // Without /proc the kernel has no list.
            Err(_) => (3..LAST_PROBED).collect(),
        };
        // With close-on-exec it would not have survived the start of this program.
        let inherited =
            |&number: &RawFd| number >= 3 && flags(number).is_ok_and(|flags| !flags.contains(FdFlags::CLOEXEC));
        Unowned(numbers.into_iter().filter(inherited).collect())
    }

    fn take(&mut self, number: RawFd) -> io::Result<OwnedFd> {
        let flags = match flags(number) {
            Err(Errno::BADF) => return Err(io::Error::new(io::ErrorKind::NotFound, "it is not open")),
            other => other?,
        };
        if !self.0.remove(&number) {
            let message = "it was not inherited, or is in use already";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        // SAFETY: it was open and had no owner when it was claimed, and its number was just taken from the set, so this is
        // the only owner.
        let owned = unsafe { OwnedFd::from_raw_fd(number) };
        fcntl_setfd(&owned, flags | FdFlags::CLOEXEC)?;
        Ok(owned)
    }
}

fn flags(number: RawFd) -> Result<FdFlags, Errno> {
    // SAFETY: the number is not -1; it is used for this question only, and the kernel answers EBADF where it is not open.
    fcntl_getfd(unsafe { BorrowedFd::borrow_raw(number) })
}

/// A service manager and a shell give low numbers.
const LAST_PROBED: RawFd = 1024;

#[cfg(test)]
mod tests {
    use std::os::{fd::AsRawFd, unix::net::UnixStream};

    use super::*;

    /// As a parent leaves it: without close-on-exec and without an owner.
    fn inherit(socket: UnixStream) -> RawFd {
        fcntl_setfd(&socket, FdFlags::empty()).unwrap();
        let number = socket.as_raw_fd();
        std::mem::forget(socket);
        number
    }

    #[test]
    fn only_an_inherited_descriptor_is_taken_and_only_once() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let number = inherit(theirs);
        let mut unowned = Unowned::now();
        assert!(!unowned.0.contains(&ours.as_raw_fd()) && unowned.0.iter().all(|number| *number >= 3));
        let taken = unowned.take(number).unwrap();
        assert!(unowned.take(number).unwrap_err().to_string().contains("in use already"));
        drop(taken);
        assert_eq!(unowned.take(1_000_000).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    /// Two owners closed one descriptor, and with it one that somebody else had opened between.
    #[test]
    fn a_descriptor_that_was_opened_without_close_on_exec_is_not_taken() {
        let mut unowned = Unowned::now();
        let (ours, _theirs) = UnixStream::pair().unwrap();
        fcntl_setfd(&ours, FdFlags::empty()).unwrap();
        // Its number may have been that of an inherited one which other code of this process has closed since.
        unowned.0.remove(&ours.as_raw_fd());
        assert!(unowned.take(ours.as_raw_fd()).unwrap_err().to_string().contains("was not inherited"));
    }

    #[test]
    fn nothing_is_taken_that_was_not_claimed() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        fcntl_setfd(&ours, FdFlags::empty()).unwrap();
        // No test of this crate claims.
        assert!(take(ours.as_raw_fd()).unwrap_err().to_string().contains("claim_inherited"));
        assert!(take(1).unwrap_err().to_string().contains("standard streams"));
    }
}
