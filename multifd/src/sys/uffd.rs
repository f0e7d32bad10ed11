//! userfaultfd, as far as asynchronous write protection and filling fresh memory need it.
//!
//! Raw, because the `userfaultfd` crate takes its feature flags from the headers it is built with and does not know
//! WP_ASYNC (Linux 6.7).

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
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
        let mut api = Api { api: 0xaa, features: WP_ASYNC | WP_UNPOPULATED | WP_HUGETLBFS_SHMEM, ioctls: 0 };
        // SAFETY: the kernel reads and writes one struct `uffdio_api`, which `api` is.
        let result = unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &raw mut api) };
        if result < 0 {
            return Err((Step::Features, io::Error::last_os_error()));
        }
        Ok(Userfaultfd { fd })
    }

    /// Registers the `len` bytes at `start` for write protection. Nothing is protected or populated by that.
    pub(crate) fn register(&self, start: u64, len: u64) -> io::Result<()> {
        let mut register = Register { range: Range { start, len }, mode: MODE_WP, ioctls: 0 };
        // SAFETY: the kernel reads and writes one struct `uffdio_register`. It changes how faults in the range are
        // resolved, not what the memory holds; with WP_ASYNC no fault waits for an answer.
        let result = unsafe { libc::ioctl(self.fd.as_raw_fd(), UFFDIO_REGISTER, &raw mut register) };
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
        let mut copy =
            Copy { dst: to.as_ptr() as u64, src: from.as_ptr() as u64, len: from.len() as u64, mode: 0, copy: 0 };
        // SAFETY: the kernel reads `len` bytes at `src`, which are ours, and writes guest memory in bounds of `to`.
        let result = unsafe { libc::ioctl(self.fd.as_raw_fd(), UFFDIO_COPY, &raw mut copy) };
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
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK | USER_MODE_ONLY) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just gave us this descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// For sandboxes that forbid the system call and pass the device.
fn by_device() -> io::Result<OwnedFd> {
    let device = File::open("/dev/userfaultfd")?;
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | USER_MODE_ONLY;
    // SAFETY: takes flags by value.
    let fd = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `struct uffdio_api`
#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_range`
#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}

/// `struct uffdio_register`
#[repr(C)]
struct Register {
    range: Range,
    mode: u64,
    ioctls: u64,
}

/// `struct uffdio_copy`
#[repr(C)]
struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    /// Bytes copied, or a negative error.
    copy: i64,
}

const _: () = assert!(size_of::<Copy>() == 40);
const _: () = assert!(size_of::<Api>() == 24);
const _: () = assert!(size_of::<Register>() == 32);

const USER_MODE_ONLY: i32 = 1;
/// UFFD_FEATURE_WP_HUGETLBFS_SHMEM, Linux 5.19.
const WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
/// UFFD_FEATURE_WP_UNPOPULATED, Linux 6.4; WP_ASYNC implies it.
const WP_UNPOPULATED: u64 = 1 << 13;
/// UFFD_FEATURE_WP_ASYNC, Linux 6.7.
const WP_ASYNC: u64 = 1 << 15;
/// UFFDIO_REGISTER_MODE_WP
const MODE_WP: u64 = 1 << 1;
/// `_IO(0xaa, 0x00)`
const USERFAULTFD_IOC_NEW: libc::Ioctl = 0xaa00;
/// `_IOWR(0xaa, 0x3f, struct uffdio_api)`
const UFFDIO_API: libc::Ioctl = 0xc018_aa3f_u32 as libc::Ioctl;
/// `_IOWR(0xaa, 0x03, struct uffdio_copy)`
const UFFDIO_COPY: libc::Ioctl = 0xc028_aa03_u32 as libc::Ioctl;
/// `_IOWR(0xaa, 0x00, struct uffdio_register)`
const UFFDIO_REGISTER: libc::Ioctl = 0xc020_aa00_u32 as libc::Ioctl;
