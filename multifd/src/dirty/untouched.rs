//! Finds pages that were never touched, so that they need not be read to learn that they are zero.
//!
//! Reading an untouched page populates page tables, and in a memfd allocates it; a guest of which a tenth is in use
//! would be made ten times as large by migrating it. The kernel knows better: a page of private anonymous memory that is
//! neither in memory nor in swap reads as zeros, and so does a hole in a memfd.
//!
//! What a block is made of is what its [`Backing`] says. Nothing is claimed about memory of other kinds: private mappings of files,
//! files on disks, shared memory whose file the VMM has not named, and memory whose missing pages a userfaultfd fills in, as after a
//! postcopy: there, absent does not mean zero.

use std::io;

use crate::{
    dirty::mappings::{self, Mapping},
    dirty_bitmap::DirtyBitmap,
    layout::BlockLayout,
    ram::{Backing, MemoryFile, Ram, RamBlock},
    sys::{
        holes,
        pagemap::{PFNZERO, PRESENT, Pagemap, Query, SWAPPED},
    },
};

/// Adds the pages of `ram` that read as zeros because they were never written to `into`; what
/// [`SourceVm::untouched`](crate::vm::SourceVm::untouched) asks for.
///
/// Each page added was zero at some moment during the call.
///
/// # Errors
/// The kernel's; what was added by then is right. A kernel without PAGEMAP_SCAN (before Linux 6.7) is one.
pub fn untouched(ram: &Ram, into: &mut DirtyBitmap) -> io::Result<()> {
    let mut pagemap = Pagemap::open()?;
    for (block, layout) in ram.blocks().iter().zip(ram.layout().blocks()) {
        let mut target = Target { block, layout, page_size: ram.layout().page_size() as u64, into };
        if let Backing::MemoryFile(file) = block.backing() {
            file_holes(file, &mut target)?;
            continue;
        }
        for mapping in mappings::of_block(block)?.iter().filter(|mapping| mapping.absent_is_zero) {
            absent(&mut pagemap, mapping, &mut target)?;
        }
    }
    Ok(())
}

fn absent(pagemap: &mut Pagemap, mapping: &Mapping, target: &mut Target<'_>) -> io::Result<()> {
    let absent = PRESENT | SWAPPED;
    let nowhere = Query { all_of: absent, inverted: absent, returned: absent, ..Query::default() };
    pagemap.scan(mapping.addresses.clone(), nowhere, |found| target.add(found.start, found.end))?;
    // Read before, never written: the kernel's one page of zeros.
    let zero = Query { all_of: PRESENT | PFNZERO, returned: PFNZERO, ..Query::default() };
    pagemap.scan(mapping.addresses.clone(), zero, |found| target.add(found.start, found.end))
}

fn file_holes(memory: &MemoryFile, target: &mut Target<'_>) -> io::Result<()> {
    let (file, begin, start) = (memory.file(), memory.offset(), target.block.address());
    let end = begin.checked_add(target.block.bytes() as u64).ok_or(io::ErrorKind::InvalidInput)?;
    let address = |offset: u64| start + (offset - begin);
    let mut from = begin;
    while from < end {
        // What lies behind the end of the file cannot be read at all; `None` covers holes up to there.
        let data = holes::next_data(file, from)?.unwrap_or(end).min(end);
        if from < data {
            target.add(address(from), address(data));
        }
        from = if data < end { holes::next_hole(file, data)?.min(end) } else { end };
    }
    Ok(())
}

struct Target<'a> {
    block: &'a RamBlock,
    layout: &'a BlockLayout,
    page_size: u64,
    into: &'a mut DirtyBitmap,
}

impl Target<'_> {
    /// Adds the pages that lie between two addresses in whole.
    fn add(&mut self, start: u64, end: u64) {
        let first = (start - self.block.address()).div_ceil(self.page_size);
        let end = (end - self.block.address()) / self.page_size;
        if first < end {
            self.into.set_range(self.layout.first_page() + first..self.layout.first_page() + end);
        }
    }
}
