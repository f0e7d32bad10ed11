//! Guest memory: `vm-memory`'s `GuestMemoryMmap`, two regions, with a bitmap of the pages that devices write.

// `memfd_create` is a system call.
#![allow(unsafe_code)]

use std::{fs::File, io, num::NonZeroUsize, os::fd::FromRawFd, str::FromStr, sync::Arc};

use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, bitmap::AtomicBitmap, mmap::MmapRegionBuilder,
};

use crate::{Failure, guest};

/// The memory of a VM.
pub type Memory = GuestMemoryMmap<AtomicBitmap>;

/// What it is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Private pages of 4 KiB.
    Anonymous,
    /// A file in memory that other processes can map, too.
    Memfd,
    /// The same in pages of 2 MiB.
    Huge,
}

impl FromStr for Backing {
    type Err = String;

    fn from_str(name: &str) -> Result<Backing, String> {
        match name {
            "anonymous" => Ok(Backing::Anonymous),
            "memfd" => Ok(Backing::Memfd),
            "huge" => Ok(Backing::Huge),
            _ => Err(format!("{name:?} is none of anonymous, memfd, huge")),
        }
    }
}

/// The system region and `ram_bytes` of RAM, untouched.
pub fn allocate(backing: Backing, ram_bytes: usize) -> Result<Memory, Failure> {
    let regions = [(0, guest::SYSTEM_BYTES), (guest::RAM, ram_bytes)].map(|(address, len)| {
        let bitmap = AtomicBitmap::new(len, PAGE);
        let builder =
            MmapRegionBuilder::new_with_bitmap(len, bitmap).with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE);
        let builder = match backing {
            Backing::Anonymous => {
                builder.with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
            }
            Backing::Memfd => builder.with_mmap_flags(libc::MAP_SHARED).with_file_offset(memfd(len, 0)?),
            Backing::Huge => builder.with_mmap_flags(libc::MAP_SHARED).with_file_offset(memfd(len, libc::MFD_HUGETLB)?),
        };
        let region = GuestRegionMmap::new(builder.build()?, GuestAddress(address));
        Ok::<_, Failure>(Arc::new(region.ok_or("a region does not fit into the address space")?))
    });
    Ok(GuestMemoryMmap::from_arc_regions(regions.into_iter().collect::<Result<_, _>>()?)?)
}

fn memfd(len: usize, flags: libc::c_uint) -> io::Result<FileOffset> {
    // SAFETY: a terminated name and flags.
    let fd = unsafe { libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC | flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just created, known to nothing else.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len as u64)?;
    Ok(FileOffset::new(file, 0))
}

const PAGE: NonZeroUsize = NonZeroUsize::new(4096).expect("not 0");
