//! RAM blocks over the mappings of the `vm-memory` crate.

use std::{ptr::NonNull, sync::Arc};

use multifd_proto::BlockName;
use vm_memory::{MmapRegion, bitmap::Bitmap};

use crate::ram::RamBlock;

/// All of `mapping` as a RAM block, which keeps it mapped; `None` where it is not mapped for this process.
pub(crate) fn block<B: Bitmap + Send + Sync + 'static>(
    name: BlockName,
    mapping: Arc<MmapRegion<B>>,
) -> Option<RamBlock> {
    let (base, len) = (NonNull::new(mapping.as_ptr())?, mapping.size());
    if mapping.prot() & libc::PROT_WRITE == 0 {
        // SAFETY: as below, for memory that is mapped for reading.
        return Some(unsafe { RamBlock::read_only_from_raw(name, base, len, Box::new(mapping)) });
    }
    // SAFETY: a mapping of `vm-memory` is unmapped when the last clone of its `Arc` is dropped, and the block owns one.
    // The crate itself hands out no references to the bytes, only volatile and atomic access.
    Some(unsafe { RamBlock::from_raw(name, base, len, Box::new(mapping)) })
}
