//! Guest memory: `vm-memory`'s `GuestMemoryMmap`, two regions, with a bitmap of the pages that devices write.

use std::{fs::File, io, num::NonZeroUsize, str::FromStr, sync::Arc};

use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, bitmap::AtomicBitmap, mmap::MmapRegionBuilder,
};

use crate::{Failure, guest};

/// The memory of a VM.
pub type Memory = GuestMemoryMmap<AtomicBitmap>;

/// What it is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Backing {
    /// Private pages of 4 KiB.
    #[default]
    Anonymous,
    /// A file in memory that other processes can map, too.
    Memfd,
    /// The same in pages of 2 MiB, all of which the host keeps ready from the start.
    Huge,
    /// The same, of which the host has ready what it has: a VM that uses more is ended.
    HugeUnreserved,
}

impl FromStr for Backing {
    type Err = String;

    fn from_str(name: &str) -> Result<Backing, String> {
        match name {
            "anonymous" => Ok(Backing::Anonymous),
            "memfd" => Ok(Backing::Memfd),
            "huge" => Ok(Backing::Huge),
            "huge-unreserved" => Ok(Backing::HugeUnreserved),
            _ => Err(format!("{name:?} is none of anonymous, memfd, huge, huge-unreserved")),
        }
    }
}

/// The system region and `ram_bytes` of RAM: untouched, or what is in `files` from the places on that go with them.
pub fn map(backing: Backing, ram_bytes: usize, files: Vec<(File, u64)>) -> Result<Memory, Failure> {
    if !files.is_empty() && files.len() != 2 {
        return Err(format!("the source's memory is {} files, and this VM's would be 2", files.len()).into());
    }
    let mut files = files.into_iter();
    let regions = [(0, guest::SYSTEM_BYTES), (guest::RAM, ram_bytes)].map(|(address, len)| {
        let bitmap = AtomicBitmap::new(len, PAGE);
        let builder =
            MmapRegionBuilder::new_with_bitmap(len, bitmap).with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE);
        let builder = match (files.next(), backing) {
            (Some((file, offset)), backing) => {
                builder.with_mmap_flags(shared(backing)).with_file_offset(FileOffset::new(file, offset))
            }
            (None, Backing::Anonymous) => {
                builder.with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
            }
            (None, Backing::Memfd) => {
                builder.with_mmap_flags(shared(backing)).with_file_offset(memfd(len, MemfdFlags::empty())?)
            }
            (None, Backing::Huge | Backing::HugeUnreserved) => {
                builder.with_mmap_flags(shared(backing)).with_file_offset(memfd(len, MemfdFlags::HUGETLB)?)
            }
        };
        let region = GuestRegionMmap::new(builder.build()?, GuestAddress(address));
        Ok::<_, Failure>(Arc::new(region.ok_or("a region does not fit into the address space")?))
    });
    Ok(GuestMemoryMmap::from_arc_regions(regions.into_iter().collect::<Result<_, _>>()?)?)
}

fn shared(backing: Backing) -> libc::c_int {
    if backing == Backing::HugeUnreserved { libc::MAP_SHARED | libc::MAP_NORESERVE } else { libc::MAP_SHARED }
}

fn memfd(len: usize, flags: MemfdFlags) -> io::Result<FileOffset> {
    // A file that can be sealed can be handed over.
    let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | flags)?);
    file.set_len(len as u64)?;
    Ok(FileOffset::new(file, 0))
}

const PAGE: NonZeroUsize = NonZeroUsize::new(4096).expect("not 0");
