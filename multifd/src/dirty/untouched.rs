//! Finds pages that were never touched, so that they need not be read to learn that they are zero.
//!
//! Reading an untouched page populates page tables, and in a memfd allocates it; a guest of which a tenth is in use
//! would be made ten times as large by migrating it. The kernel knows better: a page of private anonymous memory that is
//! neither in memory nor in swap reads as zeros, and so does a hole in a memfd.
//!
//! What a block is made of is what its [`Backing`] says. Nothing is claimed about memory of other kinds: private mappings of files,
//! files on disks, shared memory whose file the VMM has not named, and memory whose missing pages a userfaultfd fills in, as after a
//! postcopy: there, absent does not mean zero.
//!
//! The kernel is asked by PAGEMAP_SCAN, else through `/proc/self/pagemap`, else, where there is no `/proc`, by `mincore`.

use std::{io, ops::Range};

use crate::{
    dirty::mappings,
    dirty_bitmap::DirtyBitmap,
    layout::BlockLayout,
    ram::{Backing, MemoryFile, Ram, RamBlock},
    sys::{
        holes,
        pagemap::{PFNZERO, PRESENT, Pagemap, Query, SWAPPED},
        residency,
    },
};

/// Adds the pages of `ram` that read as zeros because they were never written to `into`; what
/// [`SourceVm::untouched`](crate::vm::SourceVm::untouched) asks for.
///
/// Each page added was zero at some moment during the call. Nothing is added for a block of which the kernel does not tell,
/// and the log (at `debug`) says why: in a jail without `/proc` that is memory of which the VMM has not said what it is made
/// of ([`RamBlock::backed_by`]), and all memory where there is swap.
///
/// # Errors
/// None so far.
pub fn untouched(ram: &Ram, into: &mut DirtyBitmap) -> io::Result<()> {
    let mut kernel = Kernel::new();
    for index in 0..ram.blocks().len() {
        if let Err(error) = untouched_block(ram, index, &mut kernel, into) {
            let block = ram.blocks()[index].name().as_str();
            tracing::debug!(block, %error, "it is not known which pages were never touched");
        }
    }
    Ok(())
}

/// The same for the block at `index`.
///
/// # Errors
/// The kernel does not tell; what was added by then is right.
pub(crate) fn untouched_block(ram: &Ram, index: usize, kernel: &mut Kernel, into: &mut DirtyBitmap) -> io::Result<()> {
    let (block, layout) = (&ram.blocks()[index], &ram.layout().blocks()[index]);
    let mut target = Target { block, layout, page_size: ram.layout().page_size() as u64, into };
    if let Backing::MemoryFile(file) = block.backing() {
        return match file.memory() {
            memory if memory.huge_page.is_some() => huge_file(kernel, file, &mut target),
            memory if memory.has_own_position => file_holes(file, &mut target),
            _ => residency::absent(block.whole()).map(|absent| target.add_all(absent)),
        };
    }
    for mapping in mappings::of_block(block)?.iter().filter(|mapping| mapping.absent_is_zero) {
        let absent = kernel.absent(block, mapping.addresses.clone())?;
        target.add_all(absent);
    }
    Ok(())
}

/// What tells which pages there are.
pub(crate) struct Kernel {
    /// `None` where there is no `/proc`.
    pagemap: Option<Pagemap>,
}

impl Kernel {
    pub(crate) fn new() -> Kernel {
        Kernel { pagemap: Pagemap::open().inspect_err(|error| tracing::debug!(%error, "no pagemap")).ok() }
    }

    /// The parts of `addresses`, which lie in `block`, of which this process has no page, or the kernel's one page of zeros.
    fn absent(&mut self, block: &RamBlock, addresses: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        let Some(pagemap) = &mut self.pagemap else {
            let len = usize::try_from(addresses.end - addresses.start).map_err(io::Error::other)?;
            let range = block.range(addresses.start - block.address(), len);
            return residency::absent(range.ok_or(io::ErrorKind::InvalidInput)?);
        };
        let mut found = Vec::new();
        let none = PRESENT | SWAPPED;
        let nowhere = Query { all_of: none, inverted: none, returned: none, ..Query::default() };
        if let Err(error) = pagemap.scan(addresses.clone(), nowhere, |range| found.push(range)) {
            tracing::debug!(%error, "no PAGEMAP_SCAN");
            found.clear();
            pagemap.absent(addresses, |range| found.push(range))?;
            return Ok(found);
        }
        // Read before, never written: the kernel's one page of zeros.
        let zero = Query { all_of: PRESENT | PFNZERO, returned: PFNZERO, ..Query::default() };
        pagemap.scan(addresses, zero, |range| found.push(range))?;
        Ok(found)
    }
}

fn file_holes(memory: &MemoryFile, target: &mut Target<'_>) -> io::Result<()> {
    let (file, begin, start) = (&memory.memory().file, memory.offset(), target.block.address());
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

/// A file of huge pages does not tell its holes, only how many bytes it has memory for. Where these are as many as are
/// mapped here, no other page of the file holds anything, in whichever process it is mapped.
fn huge_file(kernel: &mut Kernel, memory: &MemoryFile, target: &mut Target<'_>) -> io::Result<()> {
    let (block, file) = (target.block, &memory.memory().file);
    let before = holes::allocated(file)?;
    let absent = kernel.absent(block, block.address()..block.address() + block.bytes() as u64)?;
    let here = block.bytes() as u64 - absent.iter().map(|range| range.end - range.start).sum::<u64>();
    // Twice, as a hole may have been punched in between, and another page have been allocated before.
    if here == before && here == holes::allocated(file)? {
        target.add_all(absent);
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
    fn add_all(&mut self, ranges: Vec<Range<u64>>) {
        ranges.into_iter().for_each(|range| self.add(range.start, range.end));
    }

    /// Adds the pages that lie between two addresses in whole.
    fn add(&mut self, start: u64, end: u64) {
        let first = (start - self.block.address()).div_ceil(self.page_size);
        let end = (end.min(self.block.address() + self.block.bytes() as u64) - self.block.address()) / self.page_size;
        if first < end {
            self.into.set_range(self.layout.first_page() + first..self.layout.first_page() + end);
        }
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use multifd_proto::BlockName;

    use super::*;

    /// Kernels before 6.7 and jails: the same pages are found, by other means.
    #[test]
    fn each_way_of_asking_finds_the_same_pages() {
        let block = RamBlock::anonymous(BlockName::new("ram").unwrap(), 5000 * 4096).unwrap();
        let ram = Ram::new(4096, vec![block]).unwrap();
        let block = &ram.blocks()[0];
        for page in [0, 1, 63, 700, 4999] {
            ram.page(page).unwrap().write(&[1; 4096]);
        }
        let whole = block.address()..block.address() + block.bytes() as u64;
        let joined = |ranges: Vec<Range<u64>>| {
            let mut found = DirtyBitmap::new(ram.layout());
            Target { block, layout: &ram.layout().blocks()[0], page_size: 4096, into: &mut found }.add_all(ranges);
            found
        };
        let first = joined(Kernel::new().absent(block, whole.clone()).unwrap());
        assert_eq!(first.count(), 4995);
        let mut entries = Vec::new();
        Pagemap::open().unwrap().absent(whole.clone(), |range| entries.push(range)).unwrap();
        assert_eq!(joined(entries), first);
        match (Kernel { pagemap: None }).absent(block, whole) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => test_support::skip(&error.to_string()),
            found => assert_eq!(joined(found.unwrap()), first),
        }
    }
}
