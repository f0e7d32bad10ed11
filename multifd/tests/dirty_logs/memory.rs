//! Guest memory for the tests: mapped, so that the kernel can track it.

use std::{
    ffi::CString,
    fs::File,
    io,
    os::fd::{AsRawFd, FromRawFd},
    ptr::NonNull,
};

use multifd::ram::{Ram, RamBlock};
use multifd_proto::BlockName;

/// Where the pages come from.
#[derive(Clone, Copy, Debug)]
pub enum Backing {
    /// Private anonymous memory.
    Anonymous,
    /// A memfd, mapped shared.
    Memfd,
}

/// Blocks of pages of 4096 bytes, and the memfds behind them.
pub fn map(backing: Backing, blocks: &[(&str, usize)]) -> (Ram, Vec<File>) {
    map_with_pages(backing, 4096, blocks)
}

/// The same with pages of another size; the numbers of pages are in that size.
pub fn map_with_pages(backing: Backing, page_size: usize, blocks: &[(&str, usize)]) -> (Ram, Vec<File>) {
    let mut files = Vec::new();
    let blocks = blocks.iter().map(|&(name, pages)| {
        let len = pages * page_size;
        let mapping = match backing {
            Backing::Anonymous => Mapping::anonymous(len),
            Backing::Memfd => {
                let file = memfd(name, len);
                let mapping = Mapping::of_file(&file, len);
                files.push(file);
                mapping
            }
        };
        let base = mapping.base;
        // SAFETY: the mapping is that long, is unmapped only when the owner is dropped, and is used through this block.
        unsafe { RamBlock::from_raw(BlockName::new(name).unwrap(), base, len, Box::new(mapping)) }.fresh()
    });
    let ram = Ram::new(page_size, blocks.collect()).unwrap();
    (ram, files)
}

/// Memory that is unmapped when this is dropped.
pub struct Mapping {
    pub base: NonNull<u8>,
    len: usize,
}

// SAFETY: plain memory; only its address is used, and only to unmap it.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    pub fn anonymous(len: usize) -> Mapping {
        Mapping::map(len, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE, -1)
    }

    pub fn of_file(file: &File, len: usize) -> Mapping {
        Mapping::map(len, libc::MAP_SHARED | libc::MAP_NORESERVE, file.as_raw_fd())
    }

    fn map(len: usize, flags: i32, fd: i32) -> Mapping {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, fd, 0) };
        assert_ne!(base, libc::MAP_FAILED, "{}", io::Error::last_os_error());
        Mapping { base: NonNull::new(base.cast()).unwrap(), len }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this length; nobody uses it any more.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

fn memfd(name: &str, len: usize) -> File {
    let name = CString::new(name).unwrap();
    // SAFETY: a terminated name and flags.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0, "{}", io::Error::last_os_error());
    // SAFETY: just created, known to nobody else.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len as u64).unwrap();
    file
}

/// Stores `value` to the first word of page number `page`.
pub fn write(ram: &Ram, page: u64, value: u64) {
    ram.page(page).unwrap().slice(0, 8).unwrap().write(&value.to_ne_bytes());
}

/// Loads the first word of page number `page`.
pub fn read(ram: &Ram, page: u64) -> u64 {
    let mut word = [0; 8];
    ram.page(page).unwrap().slice(0, 8).unwrap().read(&mut word);
    u64::from_ne_bytes(word)
}
