//! Makes memory of which it is not known what it holds read as zeros, before the first page comes.
//!
//! A page that the source never names is zero at the end. Memory that is [fresh](crate::ram::RamBlock::fresh) is so from
//! the start. For other memory this is done when the VM was made, and not when its guest is paused: what is absent
//! is left alone, what may be thrown away is thrown away, and only what is left is read, and cleared where it is not zero.

use std::{io, ops::Range};

use crate::{
    dirty::untouched::{Kernel, untouched_block},
    dirty_bitmap::DirtyBitmap,
    error::Mismatch,
    ram::{Backing, Ram, RamBlock},
    stop::StopHandle,
    sys::advice,
};

/// Memory that is being made zero, block by block.
pub(super) struct CleanMemory {
    ram: Ram,
    /// For each block whether all of it reads as zeros.
    done: Vec<bool>,
    /// The pages that cost no memory, of the blocks that are done.
    absent: DirtyBitmap,
}

impl CleanMemory {
    /// Nothing is known of `ram`.
    pub(super) fn new(ram: &Ram) -> CleanMemory {
        CleanMemory { ram: ram.clone(), done: vec![false; ram.blocks().len()], absent: DirtyBitmap::new(ram.layout()) }
    }

    /// Makes the blocks zero that `wanted` picks, unless they were made so before. Ends early where the migration is stopped.
    ///
    /// # Errors
    /// [`Mismatch::BlockWithoutMemory`]
    pub(super) fn clean(
        &mut self,
        stop: &StopHandle,
        wanted: impl Fn(usize, &RamBlock) -> bool,
    ) -> Result<(), Mismatch> {
        let ram = self.ram.clone();
        let mut kernel = None;
        for (index, block) in ram.blocks().iter().enumerate() {
            if !self.done[index] && wanted(index, block) {
                let kernel = kernel.get_or_insert_with(Kernel::new);
                self.done[index] = self.clean_block(index, kernel, stop)?;
            }
        }
        Ok(())
    }

    /// Whether this is about the memory of `ram`.
    pub(super) fn is_of(&self, ram: &Ram) -> bool {
        self.ram.is_same(ram)
    }

    /// The memory.
    pub(super) fn ram(&self) -> &Ram {
        &self.ram
    }

    /// Whether a page of a block that was made zero costs no memory.
    pub(super) fn is_absent(&self, page: u64) -> bool {
        self.absent.contains(page)
    }

    /// Whether any page costs no memory.
    pub(super) fn has_absent(&self) -> bool {
        !self.absent.is_empty()
    }

    /// Whether the block reads as zeros now; it does not where the migration was stopped.
    fn clean_block(&mut self, index: usize, kernel: &mut Kernel, stop: &StopHandle) -> Result<bool, Mismatch> {
        let (block, layout) = (&self.ram.blocks()[index], &self.ram.layout().blocks()[index]);
        let name = block.name().as_str();
        match discard(block) {
            Ok(()) => {
                self.absent.set_range(layout.page_range());
                return Ok(true);
            }
            Err(error) => tracing::debug!(block = name, %error, "its pages are not thrown away"),
        }
        if let Err(error) = untouched_block(&self.ram, index, kernel, &mut self.absent) {
            // Correct, and it may take a while, and the memory it costs.
            tracing::warn!(block = name, %error, "it is not known which pages are absent, so all are read");
        }
        let (mut next, end) = (layout.page_range().start, layout.page_range().end);
        while let Some(start) = (next..end).find(|&page| !self.absent.contains(page)) {
            if stop.is_stopped() {
                return Ok(false);
            }
            let most = end.min(start + PAGES_AT_ONCE);
            next = (start..most).find(|&page| self.absent.contains(page)).unwrap_or(most);
            self.clear(block, layout.offset_of(start), start..next)?;
        }
        Ok(true)
    }

    /// Clears those of `pages` that are not zero, none of which is absent. They begin `offset` bytes into `block`.
    fn clear(&self, block: &RamBlock, offset: u64, pages: Range<u64>) -> Result<(), Mismatch> {
        let bytes = (pages.end - pages.start) as usize * self.ram.layout().page_size();
        let range = block.range(offset, bytes).expect("pages of the block");
        // A page that cannot be had would end the process.
        match advice::populate_for_reading(range) {
            Err(error) if error.raw_os_error() == Some(libc::EFAULT) => {
                return Err(Mismatch::BlockWithoutMemory { name: block.name().clone() });
            }
            // A kernel before 5.14, or memory that it does not do this for.
            Err(error) => tracing::debug!(block = block.name().as_str(), %error, "whether there is room is not known"),
            Ok(()) => {}
        }
        for page in pages {
            let range = self.ram.page(page).expect("a page of the block");
            if !range.is_zero() {
                range.clear();
            }
        }
        Ok(())
    }
}

/// Throws all pages of `block` away, so that it reads as zeros.
///
/// # Errors
/// It may hold what it held: the VMM has not said that its pages can be thrown away, or the kernel does not do it.
fn discard(block: &RamBlock) -> io::Result<()> {
    match block.backing() {
        _ if block.is_pinned() => Err(io::Error::other("devices hold them")),
        Backing::Anonymous => advice::discard_private(block.whole()),
        Backing::MemoryFile(file) if file.memory().huge_page.is_none() => advice::discard_shared(block.whole()),
        _ => Err(io::Error::other("it is not known that they can be")),
    }
}

/// 2 MiB of small pages: a huge page where they are together. After so many it is looked whether the migration was stopped.
const PAGES_AT_ONCE: u64 = 512;

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use std::fs::File;

    use super::*;
    use crate::ram::BlockName;

    /// A file that is too short, as the file system that it is in may be full: an access ends the process.
    #[test]
    fn memory_that_cannot_be_had_is_refused_and_not_touched() {
        let block = RamBlock::memory_file(BlockName::new("ram").unwrap(), 2000 * 4096).unwrap();
        let Backing::MemoryFile(memory) = block.backing() else { panic!("it was made so") };
        let file = File::from(memory.descriptor().try_clone_to_owned().unwrap());
        file.set_len(1500 * 4096).unwrap();
        let ram = Ram::new(4096, vec![block.backed_by(Backing::Foreign)]).unwrap().not_fresh();
        let refused = CleanMemory::new(&ram).clean(&StopHandle::new(), |_, _| true);
        assert_eq!(refused, Err(Mismatch::BlockWithoutMemory { name: BlockName::new("ram").unwrap() }));

        file.set_len(2000 * 4096).unwrap();
        for page in [0, 511, 512, 1999] {
            ram.page(page).unwrap().write(&[7; 4096]);
        }
        CleanMemory::new(&ram).clean(&StopHandle::new(), |_, _| true).unwrap();
        assert!((0..2000).all(|page| ram.page(page).unwrap().is_zero()));
    }
}
