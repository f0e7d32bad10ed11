//! Memory that a source hands over by its descriptor, instead of copying it: for a VMM that is replaced on the same host.
//!
//! Until the source has allowed the start, the memory is the source's, whose guest may run on. So the destination maps it, and
//! may not write a byte of it: the engine takes the right to write away from the mapping when
//! [`prepare`](crate::vm::DestinationVm::prepare) has returned, and gives it back before
//! [`start`](crate::vm::DestinationVm::start). Of what arrives only files are taken that are in memory and sealed against
//! becoming shorter, so that an access is never beyond the end of the file.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use multifd_proto::{BlockName, shared_memory};
use rustix::fs::{OFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fcntl_getfl, fstat};

use crate::{
    error::Mismatch,
    ram::{Backing, Ram, RamBlock},
};

/// Memory of one RAM block of the source's, as [`take_memory`](crate::vm::DestinationVm::take_memory) gets it.
///
/// It was checked: the file is a memory file (memfd), of small or huge pages, that can be read and written, all of the block is
/// in it, and it never becomes shorter. What it holds is the source's to change until [`start`](crate::vm::DestinationVm::start).
#[derive(Debug)]
pub struct SharedBlock {
    name: BlockName,
    offset: u64,
    bytes: usize,
    file: File,
}

impl SharedBlock {
    /// What `descriptor` brings of the block that was `listed`.
    ///
    /// # Errors
    /// It is not what [`SharedBlock`] promises.
    pub(crate) fn received(
        listed: shared_memory::SharedBlock,
        descriptor: OwnedFd,
    ) -> Result<(SharedBlock, Identity), Mismatch> {
        let shared_memory::SharedBlock { name, offset, len } = listed;
        let refused = |why: String| Mismatch::NotShared { name: name.clone(), why };
        check(descriptor.as_fd(), offset, len).map_err(refused)?;
        let bytes = usize::try_from(len).map_err(|_| refused("it is larger than an address space".to_owned()))?;
        let file = file_number(descriptor.as_fd()).map_err(|error| refused(error.to_string()))?;
        let identity = Identity { name: name.clone(), offset, len, file };
        Ok((SharedBlock { name, offset, bytes, file: File::from(descriptor) }, identity))
    }

    /// The name of the block.
    pub fn name(&self) -> &BlockName {
        &self.name
    }

    /// Bytes in the block.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Where in the file the block begins, in bytes.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The file, to be mapped shared (`MAP_SHARED`) from [`offset`](Self::offset) on.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The file as one's own, and [where in it](Self::offset) the block begins. Several blocks may be parts of one file; each
    /// then has a descriptor of its own.
    pub fn into_file(self) -> (File, u64) {
        (self.file, self.offset)
    }
}

/// Which memory was handed over: by it the engine finds the blocks of the VM that are made of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    name: BlockName,
    offset: u64,
    len: u64,
    /// Device and inode.
    file: (u64, u64),
}

/// The blocks of `ram` that are made of memory that was handed over, by index: one for each of `taken`.
///
/// # Errors
/// The VM has other memory in the place of one, or another block that lies in such a file: it would be made zero, and the
/// guest of the source lost.
pub(crate) fn find(ram: &Ram, taken: &[Identity]) -> Result<Vec<usize>, Mismatch> {
    let refused = |name: &BlockName, why: &str| Mismatch::NotShared { name: name.clone(), why: why.to_owned() };
    let mut found = Vec::new();
    for (index, block) in ram.blocks().iter().enumerate() {
        let identity = identity_of(block).map_err(|error| refused(block.name(), &error.to_string()))?;
        match identity {
            Some(identity) if taken.contains(&identity) => found.push(index),
            Some(identity) if taken.iter().any(|taken| taken.file == identity.file) => {
                return Err(refused(block.name(), "the VM has mapped another part of what the source hands over"));
            }
            _ if block.is_lent() => {
                return Err(refused(block.name(), "it is the memory of a VM that is not here"));
            }
            _ => {}
        }
    }
    let missing =
        taken.iter().find(|identity| !found.iter().any(|&index| *ram.blocks()[index].name() == identity.name));
    match missing {
        Some(identity) => {
            Err(refused(&identity.name, "the source hands it over, and the VM was made with other memory"))
        }
        None => Ok(found),
    }
}

/// What `block` is made of, if that is a memory file.
fn identity_of(block: &RamBlock) -> io::Result<Option<Identity>> {
    let Backing::MemoryFile(memory) = block.backing() else { return Ok(None) };
    let file = file_number(memory.descriptor())?;
    Ok(Some(Identity { name: block.name().clone(), offset: memory.offset(), len: block.bytes() as u64, file }))
}

/// What of `ram` a source can hand over: all blocks that are made of a memory file, by index.
///
/// # Errors
/// There is none; one cannot be sealed against becoming shorter, or written by another process.
pub(crate) fn lend(ram: &Ram) -> Result<Vec<usize>, Mismatch> {
    let mut lent = Vec::new();
    for (index, block) in ram.blocks().iter().enumerate() {
        let Backing::MemoryFile(memory) = block.backing() else { continue };
        let refused = |why| Mismatch::NotShared { name: block.name().clone(), why };
        seal(memory.descriptor()).map_err(refused)?;
        check(memory.descriptor(), memory.offset(), block.bytes() as u64).map_err(refused)?;
        lent.push(index);
    }
    match lent.len() {
        0 => Err(Mismatch::NothingToHandOver),
        1..=shared_memory::MAX_SHARED_BLOCKS => Ok(lent),
        blocks => Err(Mismatch::TooManyShared { blocks, limit: shared_memory::MAX_SHARED_BLOCKS }),
    }
}

/// The list of the blocks `lent` of `ram`, with their descriptors.
pub(crate) fn listed<'a>(ram: &'a Ram, lent: &[usize]) -> (Vec<shared_memory::SharedBlock>, Vec<BorrowedFd<'a>>) {
    let entry = |&index: &usize| {
        let block = &ram.blocks()[index];
        let Backing::MemoryFile(memory) = block.backing() else { unreachable!("only memory files are lent") };
        let (name, len) = (block.name().clone(), block.bytes() as u64);
        (shared_memory::SharedBlock { name, offset: memory.offset(), len }, memory.descriptor())
    };
    lent.iter().map(entry).unzip()
}

/// Sees to it that the file never becomes shorter.
fn seal(file: BorrowedFd<'_>) -> Result<(), String> {
    let seals = fcntl_get_seals(file).unwrap_or(SealFlags::empty());
    if seals.contains(SealFlags::SHRINK) {
        return Ok(());
    }
    fcntl_add_seals(file, SealFlags::SHRINK).map_err(|error| {
        format!("its file cannot be sealed against becoming shorter ({error}): make it with MFD_ALLOW_SEALING")
    })
}

/// Checks that the `len` bytes from `offset` on of what may be any file are memory that stays. In this order: only files in
/// memory have seals, and the kernel asks no one else for them; and a sealed file has its size for good.
fn check(file: BorrowedFd<'_>, offset: u64, len: u64) -> Result<(), String> {
    let kernel = |error: rustix::io::Errno| format!("its descriptor: {error}");
    let flags = fcntl_getfl(file).map_err(kernel)?;
    if flags.contains(OFlags::PATH) || flags & OFlags::RWMODE != OFlags::RDWR {
        return Err("its file is not open for reading and writing".to_owned());
    }
    let seals = fcntl_get_seals(file).map_err(|_| "its file is no memory file (memfd)".to_owned())?;
    if !seals.contains(SealFlags::SHRINK) {
        return Err("its file is not sealed against becoming shorter (F_SEAL_SHRINK)".to_owned());
    }
    if seals.intersects(SealFlags::WRITE | SealFlags::FUTURE_WRITE) {
        return Err("its file is sealed against writing".to_owned());
    }
    let size = u64::try_from(fstat(file).map_err(kernel)?.st_size).unwrap_or(0);
    match offset.checked_add(len) {
        Some(end) if end <= size => Ok(()),
        _ => Err(format!("its file has {size:#x} bytes, and the block {len:#x} from {offset:#x} on")),
    }
}

fn file_number(file: BorrowedFd<'_>) -> io::Result<(u64, u64)> {
    let stat = fstat(file)?;
    Ok((stat.st_dev, stat.st_ino))
}
