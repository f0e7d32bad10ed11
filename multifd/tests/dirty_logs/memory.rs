//! Guest memory for the tests: mapped, so that the kernel can track it.

use std::{
    ffi::CString,
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, FromRawFd},
    ptr::NonNull,
};

use multifd::ram::{self, MemoryFile, Ram, RamBlock};
use multifd_proto::BlockName;

/// Where the pages come from, and whether the block says so.
#[derive(Clone, Copy, Debug)]
pub enum Backing {
    /// Private anonymous memory.
    Anonymous,
    /// The same, and nothing is said.
    Foreign,
    /// A memfd, mapped shared.
    Memfd,
    /// The same, and nothing is said.
    ForeignMemfd,
}

/// Blocks of pages of 4096 bytes, and the memfds behind them.
pub fn map(backing: Backing, blocks: &[(&str, usize)]) -> (Ram, Vec<File>) {
    map_with_pages(backing, 4096, blocks)
}

/// The same with pages of another size; the numbers of pages are in that size.
pub fn map_with_pages(backing: Backing, page_size: usize, blocks: &[(&str, usize)]) -> (Ram, Vec<File>) {
    let (mut files, mut guest_address) = (Vec::new(), FIRST_GUEST_ADDRESS);
    let blocks = blocks.iter().map(|&(name, pages)| {
        let len = pages * page_size;
        let mapping = match backing {
            Backing::Anonymous | Backing::Foreign => Mapping::anonymous(len),
            Backing::Memfd | Backing::ForeignMemfd => {
                let file = memfd(name, len);
                let mapping = Mapping::of_file(&file, len);
                files.push(file);
                mapping
            }
        };
        let base = mapping.base;
        // SAFETY: the mapping is that long, is unmapped only when the owner is dropped, and is used through this block.
        let block = unsafe { RamBlock::from_raw(BlockName::new(name).unwrap(), base, len, Box::new(mapping)) }.fresh();
        let block = block.at(guest_address);
        guest_address += len.next_multiple_of(4096) as u64 + HOLE;
        match (backing, files.last()) {
            (Backing::Anonymous, _) => block.backed_by(ram::Backing::Anonymous),
            (Backing::Memfd, Some(file)) => {
                block.backed_by(ram::Backing::MemoryFile(MemoryFile::new(file.as_fd(), 0).unwrap()))
            }
            _ => block,
        }
    });
    let ram = Ram::new(page_size, blocks.collect()).unwrap();
    (ram, files)
}

/// Where the guest has the first block, for logs that speak its addresses; and what lies between two blocks.
const FIRST_GUEST_ADDRESS: u64 = 5 << 12;
const HOLE: u64 = 3 << 12;

/// The second half of a memfd of `2 * pages` pages.
pub fn second_half(pages: usize) -> Ram {
    let (len, name) = (pages * 4096, BlockName::new("half").unwrap());
    let file = memfd("both", 2 * len);
    let mapping = Mapping::of_file(&file, 2 * len);
    let base = NonNull::new(mapping.base.as_ptr().wrapping_add(len)).unwrap();
    // SAFETY: the half of a mapping that is unmapped only when the owner is dropped, and is used through this block.
    let block = unsafe { RamBlock::from_raw(name, base, len, Box::new(mapping)) };
    let half = MemoryFile::new(file.as_fd(), len as u64).unwrap();
    Ram::new(4096, vec![block.backed_by(ram::Backing::MemoryFile(half))]).unwrap()
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
