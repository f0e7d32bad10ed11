//! userfaultfd, as far as asynchronous write protection and filling fresh memory need it.
//!
//! Raw, because the `userfaultfd` crate takes its feature flags from the headers it is built with and does not know
//! WP_ASYNC (Linux 6.7).

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

use linux_raw_sys::{
    general::{
        UFFD_API, UFFD_FEATURE_WP_ASYNC, UFFD_FEATURE_WP_HUGETLBFS_SHMEM, UFFD_FEATURE_WP_UNPOPULATED,
        UFFD_USER_MODE_ONLY, UFFDIO_REGISTER_MODE_WP, uffdio_api, uffdio_copy, uffdio_range, uffdio_register,
    },
    ioctl,
};

use crate::ram::GuestRange;

/// A userfaultfd with asynchronous write protection: a write to a protected page unprotects it, and nobody has to be
/// there to answer.
#[derive(Debug)]
pub(crate) struct Userfaultfd {
    fd: OwnedFd,
}

/// At which step the kernel refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Nobody hands out a userfaultfd to this process.
    Open,
    /// It has no asynchronous write protection for all kinds of memory.
    Features,
}

impl Userfaultfd {
    /// Opens one.
    ///
    /// # Errors
    /// The step, and the kernel's error.
    pub(crate) fn open() -> Result<Userfaultfd, (Step, io::Error)> {
        // User mode only needs no privilege. It limits faults that are handed to user space; asynchronous write
        // protection never does that, and writes by the kernel are tracked all the same (a test says so).
        let fd =
            by_system_call().or_else(|error| by_device().map_err(|_| error)).map_err(|error| (Step::Open, error))?;
        let mut api = uffdio_api { api: u64::from(UFFD_API), features: FEATURES, ioctls: 0 };
        // SAFETY: the kernel reads and writes one struct `uffdio_api`, which `api` is.
        let result = unsafe { libc::ioctl(fd.as_raw_fd(), ioctl::UFFDIO_API as libc::Ioctl, &raw mut api) };
        if result < 0 {
            return Err((Step::Features, io::Error::last_os_error()));
        }
        Ok(Userfaultfd { fd })
    }

    /// Registers the `len` bytes at `start` for write protection. Nothing is protected or populated by that.
    pub(crate) fn register(&self, start: u64, len: u64) -> io::Result<()> {
        let mut register =
            uffdio_register { range: uffdio_range { start, len }, mode: u64::from(UFFDIO_REGISTER_MODE_WP), ioctls: 0 };
        // SAFETY: the kernel reads and writes one struct `uffdio_register`. It changes how faults in the range are
        // resolved, not what the memory holds; with WP_ASYNC no fault waits for an answer.
        let result =
            unsafe { libc::ioctl(self.fd.as_raw_fd(), ioctl::UFFDIO_REGISTER as libc::Ioctl, &raw mut register) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Ends what [`register`](Self::register) began for the `len` bytes at `start`. Pages that are there stay as they are.
    ///
    /// The kernel walks the page tables of these bytes with the address space locked, and again not when the userfaultfd
    /// is closed.
    pub(crate) fn unregister(&self, start: u64, len: u64) -> io::Result<()> {
        let mut range = uffdio_range { start, len };
        // SAFETY: the kernel reads one struct `uffdio_range`. What the memory holds does not change.
        let result =
            unsafe { libc::ioctl(self.fd.as_raw_fd(), ioctl::UFFDIO_UNREGISTER as libc::Ioctl, &raw mut range) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Fills pages that nobody has touched yet with the start of `from`, beginning with the first of `to`, which is
    /// registered. Returns how many bytes were filled: less than asked for where the next page is already present, or
    /// where the kernel wants to be asked again.
    ///
    /// Saves the page fault and the zeroing that a plain write costs. Registered for write protection only, no access of
    /// anybody to these pages ever waits for us.
    pub(crate) fn fill(&self, to: GuestRange<'_>, from: &[u8]) -> io::Result<usize> {
        assert_eq!(to.len(), from.len());
        to.require_writable()?;
        let mut copy = uffdio_copy {
            dst: to.as_ptr() as u64,
            src: from.as_ptr() as u64,
            len: from.len() as u64,
            mode: 0,
            copy: 0,
        };
        // SAFETY: the kernel reads `len` bytes at `src`, which are ours, and writes guest memory in bounds of `to`.
        let result = unsafe { libc::ioctl(self.fd.as_raw_fd(), ioctl::UFFDIO_COPY as libc::Ioctl, &raw mut copy) };
        if result == 0 || copy.copy > 0 {
            return Ok(usize::try_from(copy.copy).unwrap_or(0));
        }
        match io::Error::last_os_error() {
            error if matches!(error.raw_os_error(), Some(libc::EEXIST | libc::EAGAIN)) => Ok(0),
            error => Err(error),
        }
    }
}

fn by_system_call() -> io::Result<OwnedFd> {
    // SAFETY: takes flags only.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, OPEN_FLAGS) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just gave us this descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// For sandboxes that forbid the system call and pass the device.
fn by_device() -> io::Result<OwnedFd> {
    let device = File::open("/dev/userfaultfd")?;
    // SAFETY: takes flags by value.
    let fd = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, OPEN_FLAGS) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Linux 5.19, 6.4 and 6.7. The last implies the one before.
const FEATURES: u64 = (UFFD_FEATURE_WP_HUGETLBFS_SHMEM | UFFD_FEATURE_WP_UNPOPULATED | UFFD_FEATURE_WP_ASYNC) as u64;
const OPEN_FLAGS: i32 = libc::O_CLOEXEC | libc::O_NONBLOCK | UFFD_USER_MODE_ONLY as i32;
/// `_IO(0xaa, 0x00)`, which `linux-raw-sys` does not have.
const USERFAULTFD_IOC_NEW: libc::Ioctl = 0xaa00;
