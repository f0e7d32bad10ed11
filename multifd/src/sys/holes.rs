//! Which parts of a file in memory were never written: SEEK_DATA and SEEK_HOLE.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsRawFd, BorrowedFd},
        unix::fs::MetadataExt,
    },
};

/// A file that is in memory only, as [`open_shared_memory`] finds it.
#[derive(Debug)]
pub(crate) struct SharedMemory {
    pub(crate) file: File,
    /// Whether looking for holes moves no position but our own.
    pub(crate) has_own_position: bool,
    /// Bytes in a huge page, where it is made of such; then the kernel does not tell its holes.
    pub(crate) huge_page: Option<u64>,
}

/// Opens a memfd, or a file in a tmpfs or hugetlbfs, once more, so that looking for holes does not move the caller's
/// position. Where that cannot be done, because `/proc` is not mounted, it is the same open file.
///
/// # Errors
/// Also for a file of another kind: only memory tells without delay what was written through a mapping.
pub(crate) fn open_shared_memory(file: BorrowedFd<'_>) -> io::Result<SharedMemory> {
    let mut system = std::mem::MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: the kernel fills one struct statfs.
    let result = unsafe { libc::fstatfs(file.as_raw_fd(), system.as_mut_ptr()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: filled above; zeros are valid as well.
    let system = unsafe { system.assume_init() };
    // The C libraries do not agree on the type.
    let [kind, tmpfs, hugetlbfs] =
        [i128::from(system.f_type), i128::from(libc::TMPFS_MAGIC), i128::from(libc::HUGETLBFS_MAGIC)];
    if kind != tmpfs && kind != hugetlbfs {
        let message = "neither a memfd nor a file in a tmpfs or hugetlbfs";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    let opened = File::open(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let has_own_position = opened.is_ok();
    let file = opened.or_else(|_| file.try_clone_to_owned().map(File::from))?;
    let huge_page = if kind == hugetlbfs { u64::try_from(system.f_bsize).ok() } else { None };
    Ok(SharedMemory { file, has_own_position, huge_page })
}

/// Bytes for which the file has memory, wherever they are mapped.
pub(crate) fn allocated(file: &File) -> io::Result<u64> {
    Ok(file.metadata()?.blocks() * 512)
}

/// The first byte at or behind `from` that lies in a page which was written; `None` where only a hole follows.
pub(crate) fn next_data(file: &File, from: u64) -> io::Result<Option<u64>> {
    match seek(file, from, libc::SEEK_DATA) {
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        found => found.map(Some),
    }
}

/// The first byte at or behind `from`, which lies in the file, that lies in a hole or at the end of the file.
pub(crate) fn next_hole(file: &File, from: u64) -> io::Result<u64> {
    seek(file, from, libc::SEEK_HOLE)
}

fn seek(file: &File, from: u64, whence: i32) -> io::Result<u64> {
    let from = libc::off_t::try_from(from).map_err(io::Error::other)?;
    // SAFETY: takes numbers only.
    let found = unsafe { libc::lseek(file.as_raw_fd(), from, whence) };
    u64::try_from(found).map_err(|_| io::Error::last_os_error())
}
