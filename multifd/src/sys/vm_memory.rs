//! RAM blocks over the mappings of the `vm-memory` crate.

use std::{any::Any, os::fd::AsFd, ptr::NonNull, sync::Arc};

use multifd_proto::BlockName;
use vm_memory::{GuestMemoryRegion, MemoryRegionAddress, MmapRegion, bitmap::Bitmap};

use crate::ram::{Backing, MemoryFile, RamBlock};

/// All of `mapping` as a RAM block, which keeps it mapped; `None` where it is not mapped for this process, or not for reading.
pub(crate) fn block<B: Bitmap + Send + Sync + 'static>(
    name: BlockName,
    mapping: Arc<MmapRegion<B>>,
) -> Option<RamBlock> {
    let (base, len, backing) = (NonNull::new(mapping.as_ptr())?, mapping.size(), backing(&mapping));
    if mapping.prot() & libc::PROT_READ == 0 {
        return None;
    }
    if mapping.prot() & libc::PROT_WRITE == 0 {
        // SAFETY: as below, for memory that is mapped for reading.
        let block = unsafe { RamBlock::read_only_from_raw(name, base, len, Box::new(mapping)) };
        return Some(block.backed_by(backing));
    }
    // SAFETY: a mapping of `vm-memory` is unmapped when the last clone of its `Arc` is dropped, and the block owns one.
    // The crate itself hands out no references to the bytes, only volatile and atomic access.
    let block = unsafe { RamBlock::from_raw(name, base, len, Box::new(mapping)) };
    Some(block.backed_by(backing))
}

/// All of `region` as a RAM block, which `owner` keeps mapped; `None` where it is not mapped for this process.
///
/// # Safety
/// As for [`RamBlock::from_raw`], for the bytes of `region`.
pub(crate) unsafe fn region_block<R: GuestMemoryRegion>(
    name: BlockName,
    region: &R,
    owner: Box<dyn Any + Send + Sync>,
) -> Option<RamBlock> {
    let base = NonNull::new(region.get_host_address(MemoryRegionAddress(0)).ok()?)?;
    let len = usize::try_from(region.len()).ok()?;
    // SAFETY: as the caller promises.
    let block = unsafe { RamBlock::from_raw(name, base, len, owner) };
    Some(block)
}

/// What `mapping` is made of, as the VMM told `vm-memory`. Of private memory without a file it is not known whether a userfaultfd fills
/// it in, so that is looked up.
fn backing<B: Bitmap>(mapping: &MmapRegion<B>) -> Backing {
    match mapping.file_offset() {
        Some(file) if mapping.flags() & libc::MAP_SHARED != 0 => {
            // A file on a disk, for example.
            MemoryFile::new(file.file().as_fd(), file.start()).map_or(Backing::Foreign, Backing::MemoryFile)
        }
        _ => Backing::Foreign,
    }
}
