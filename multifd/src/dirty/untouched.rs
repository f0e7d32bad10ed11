//! Finds pages that were never touched, so that they need not be read to learn that they are zero.
//!
//! Reading an untouched page populates page tables, and in a memfd allocates it; a guest of which a tenth is in use
//! would be made ten times as large by migrating it. The kernel knows better: a page of private anonymous memory that is
//! neither in memory nor in swap reads as zeros, and so does a hole in a memfd.
//!
//! Nothing is claimed about memory of other kinds: private mappings of files, files on disks, shared memory whose
//! descriptor is not at hand. Memory whose missing pages are filled in by another (a userfaultfd registered for
//! MISSING, as after a postcopy) must not be passed in: there, absent does not mean zero.

use std::{fs::File, io, os::fd::BorrowedFd};

use crate::{
    dirty::mappings::{self, FileId, Mapping},
    dirty_bitmap::DirtyBitmap,
    layout::BlockLayout,
    ram::{Ram, RamBlock},
    sys::{
        holes,
        pagemap::{PFNZERO, PRESENT, Pagemap, Query, SWAPPED},
    },
};

/// Adds the pages of `ram` that read as zeros because they were never written to `into`; what
/// [`SourceVm::untouched`](crate::vm::SourceVm::untouched) asks for.
///
/// `files` are the memfds, or files in a tmpfs, that back shared blocks; blocks backed by others add nothing. Each page
/// added was zero at some moment during the call.
///
/// # Errors
/// The kernel's; what was added by then is right. A kernel without PAGEMAP_SCAN (before Linux 6.7) is one.
pub fn untouched(ram: &Ram, files: &[BorrowedFd<'_>], into: &mut DirtyBitmap) -> io::Result<()> {
    let files: Vec<(FileId, File)> =
        files.iter().map(|file| holes::open_shared_memory(*file)).collect::<io::Result<_>>()?;
    let mut pagemap = Pagemap::open()?;
    for (block, layout) in ram.blocks().iter().zip(ram.layout().blocks()) {
        let mut target = Target { block, layout, page_size: ram.layout().page_size() as u64, into };
        for mapping in mappings::of_block(block)? {
            match (mapping.shared, mapping.file) {
                (false, None) => anonymous(&mut pagemap, &mapping, &mut target)?,
                (true, Some(id)) => {
                    if let Some((_, file)) = files.iter().find(|(file, _)| *file == id) {
                        file_holes(file, &mapping, &mut target)?;
                    }
                }
                _ => {}
            }
        }
    }
    Ok(())
}

fn anonymous(pagemap: &mut Pagemap, mapping: &Mapping, target: &mut Target<'_>) -> io::Result<()> {
    let absent = PRESENT | SWAPPED;
    let nowhere = Query { all_of: absent, inverted: absent, returned: absent, ..Query::default() };
    pagemap.scan(mapping.addresses.clone(), nowhere, |found| target.add(found.start, found.end))?;
    // Read before, never written: the kernel's one page of zeros.
    let zero = Query { all_of: PRESENT | PFNZERO, returned: PFNZERO, ..Query::default() };
    pagemap.scan(mapping.addresses.clone(), zero, |found| target.add(found.start, found.end))
}

fn file_holes(file: &File, mapping: &Mapping, target: &mut Target<'_>) -> io::Result<()> {
    let begin = mapping.file_offset;
    let end = begin + (mapping.addresses.end - mapping.addresses.start);
    let address = |offset: u64| mapping.addresses.start + (offset - begin);
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
