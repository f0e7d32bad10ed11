//! Fresh memory, mapped for RAM blocks.

use std::{fs::File, io, os::fd::AsRawFd, ptr::NonNull};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::kvm::system_page_size;

/// A mapping that ends when it is dropped.
pub(crate) struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: an address and a length; whoever reaches the memory does so through `RamBlock`.
unsafe impl Send for Mapping {}
// SAFETY: as `Send`.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// `len` bytes of private memory without a file.
    pub(crate) fn anonymous(len: usize) -> io::Result<Mapping> {
        Mapping::new(len, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE, -1, 0)
    }

    /// `len` bytes of a new memory file, which other processes can map too, and the file.
    pub(crate) fn memory_file(len: usize) -> io::Result<(Mapping, File)> {
        let fd = memfd_create("guest-ram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&fd, len as u64)?;
        let mapping = Mapping::new(len, libc::MAP_SHARED, fd.as_raw_fd(), 0)?;
        Ok((mapping, File::from(fd)))
    }

    /// The `len` bytes of `file` from `offset` on, which all processes see that map them.
    pub(crate) fn shared(file: &File, offset: u64, len: usize) -> io::Result<Mapping> {
        let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
        Mapping::new(len, libc::MAP_SHARED, file.as_raw_fd(), offset)
    }

    /// The `len` bytes of `file` from `offset` on, to ask the kernel about them: reading them may end the process.
    pub(crate) fn unread(file: &File, offset: u64, len: usize) -> io::Result<Mapping> {
        let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
        // SAFETY: without an address asked for, nothing that exists is replaced.
        let base =
            unsafe { mmap(std::ptr::null_mut(), len, libc::PROT_NONE, libc::MAP_SHARED, file.as_raw_fd(), offset) }?;
        Ok(Mapping { base, len })
    }

    /// Maps `len` bytes, at an address that is a multiple of a huge page if there is room for one: the kernel gives large
    /// pages only where an address and the offset in the file are alike modulo the size of the page.
    fn new(len: usize, flags: i32, fd: i32, offset: libc::off_t) -> io::Result<Mapping> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        if len < HUGE_PAGE {
            // SAFETY: without an address asked for, nothing that exists is replaced.
            let base = unsafe { mmap(std::ptr::null_mut(), len, access, flags, fd, offset) }?;
            return Ok(Mapping { base, len });
        }
        // Room is reserved first; what is left of it before and after the mapping goes back.
        let len = len.checked_next_multiple_of(system_page_size() as usize).ok_or(io::ErrorKind::OutOfMemory)?;
        let room_len = len.checked_add(HUGE_PAGE).ok_or(io::ErrorKind::OutOfMemory)?;
        let room_flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: as above.
        let base = unsafe { mmap(std::ptr::null_mut(), room_len, libc::PROT_NONE, room_flags, -1, 0) }?;
        let room = Mapping { base, len: room_len };
        let before = base.addr().get().next_multiple_of(HUGE_PAGE) - base.addr().get();
        let at = base.as_ptr().wrapping_add(before);
        // SAFETY: `len` bytes of the room, which is ours and holds nothing.
        let base = unsafe { mmap(at.cast(), len, access, flags | libc::MAP_FIXED, fd, offset) }?;
        std::mem::forget(room);
        for (start, len) in [(at.wrapping_sub(before), before), (at.wrapping_add(len), HUGE_PAGE - before)] {
            if len > 0 {
                // SAFETY: whole pages of the room before and behind the mapping; `room` does not unmap them any more.
                unsafe { libc::munmap(start.cast(), len) };
            }
        }
        Ok(Mapping { base, len })
    }

    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }
}

/// The kernel's `mmap`, from `offset` of the file on.
///
/// # Safety
/// With MAP_FIXED, nothing that is in use is mapped at the `len` bytes from `at` on.
unsafe fn mmap(
    at: *mut libc::c_void,
    len: usize,
    access: i32,
    flags: i32,
    fd: i32,
    offset: libc::off_t,
) -> io::Result<NonNull<u8>> {
    // SAFETY: as the caller promises; without MAP_FIXED the kernel chooses room that is free.
    let base = unsafe { libc::mmap(at, len, access, flags, fd, offset) };
    if base == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(NonNull::new(base.cast()).expect("the kernel does not map address 0 unasked"))
}

/// The largest page that the kernel gives without being asked for it by name, on most machines.
const HUGE_PAGE: usize = 2 << 20;

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, unmapped nowhere else; whoever used it held the owner.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    /// How many mappings this process has that begin within `within`.
    fn mappings(within: std::ops::Range<usize>) -> Vec<(usize, usize)> {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let parsed = maps.lines().filter_map(|line| {
            let (start, end) = line.split(' ').next()?.split_once('-')?;
            Some((usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?))
        });
        parsed.filter(|(start, end)| *start < within.end && *end > within.start).collect()
    }

    #[test]
    fn large_memory_begins_at_a_huge_page_and_takes_no_more_room_than_it_has() {
        for len in [HUGE_PAGE, HUGE_PAGE + 4096, 5 * HUGE_PAGE - 8192, 3 * HUGE_PAGE + 8] {
            for mapping in [Mapping::anonymous(len).unwrap(), Mapping::memory_file(len).unwrap().0] {
                let start = mapping.base().addr().get();
                assert_eq!(start % HUGE_PAGE, 0);
                let end = start + len.next_multiple_of(system_page_size() as usize);
                assert!(mappings(start..end).iter().any(|(from, to)| *from <= start && *to >= end), "mapped in whole");
                drop(mapping);
            }
        }
    }

    #[test]
    fn more_than_there_is_room_for_is_an_error() {
        for len in [usize::MAX, usize::MAX - HUGE_PAGE, 1 << 60] {
            assert!(Mapping::anonymous(len).is_err());
        }
    }
}
