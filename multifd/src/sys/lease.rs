//! Whether a file is open for writing, by a read lease: the kernel gives one only where it is not.

use std::{fs::File, io, os::fd::AsRawFd};

/// Whether any process has `file` open for writing, or mapped for it. `None` where the kernel does not say: file systems without
/// leases, files of other users.
///
/// The lease is given back at once: while it is held, a process that opens the file for writing has to wait.
pub(crate) fn is_open_for_writing(file: &File) -> Option<bool> {
    // Were a process to open the file just now, we would be sent a signal: one that is ignored unless it is caught.
    // SAFETY: takes a number.
    let signal = unsafe { libc::fcntl(file.as_raw_fd(), F_SETSIG, libc::SIGURG) };
    if signal != 0 {
        return None;
    }
    // SAFETY: as above.
    let taken = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_RDLCK) };
    if taken != 0 {
        let error = io::Error::last_os_error();
        return (error.raw_os_error() == Some(libc::EAGAIN)).then_some(true);
    }
    // SAFETY: as above.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_UNLCK) };
    Some(false)
}

/// Linux's, which libc does not name on all targets.
const F_SETSIG: libc::c_int = 10;

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use test_support::TempDir;

    use super::*;

    #[test]
    fn a_writer_is_noticed_while_it_has_the_file_open() {
        let dir = TempDir::new().unwrap();
        let writer = File::create(dir.join("x")).unwrap();
        let file = File::open(dir.join("x")).unwrap();
        let Some(open) = is_open_for_writing(&file) else {
            return test_support::skip("this file system has no leases");
        };
        assert!(open);
        drop(writer);
        assert_eq!(is_open_for_writing(&file), Some(false));
        // The lease was given back: this would wait for 45 s otherwise.
        File::options().write(true).open(dir.join("x")).unwrap();
        assert_eq!(is_open_for_writing(&file), Some(false));
    }
}
