//! Makes memory of which it is not known what it holds read as zeros, before the first page comes.
//!
//! A page that the source never names is zero at the end. Memory that is [fresh](crate::ram::RamBlock::fresh) is so from
//! the start. For other memory this is done when the VM was made, and not when its guest is paused: what is absent
//! is left alone, what may be thrown away is thrown away, and only what is left is read, and cleared where it is not zero.

use std::io;

use crate::{
    dirty::untouched::{Kernel, untouched_block},
    dirty_bitmap::DirtyBitmap,
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
    pub(super) fn clean(&mut self, stop: &StopHandle, wanted: impl Fn(usize, &RamBlock) -> bool) {
        let ram = self.ram.clone();
        let mut kernel = None;
        for (index, block) in ram.blocks().iter().enumerate() {
            if !self.done[index] && wanted(index, block) {
                let kernel = kernel.get_or_insert_with(Kernel::new);
                self.done[index] = self.clean_block(index, kernel, stop);
            }
        }
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
    fn clean_block(&mut self, index: usize, kernel: &mut Kernel, stop: &StopHandle) -> bool {
        let (block, layout) = (&self.ram.blocks()[index], &self.ram.layout().blocks()[index]);
        let name = block.name().as_str();
        match discard(block) {
            Ok(()) => {
                self.absent.set_range(layout.page_range());
                return true;
            }
            Err(error) => tracing::debug!(block = name, %error, "its pages are not thrown away"),
        }
        if let Err(error) = untouched_block(&self.ram, index, kernel, &mut self.absent) {
            // Correct, and it may take a while, and the memory it costs.
            tracing::warn!(block = name, %error, "it is not known which pages are absent, so all are read");
        }
        for page in layout.page_range().filter(|&page| !self.absent.contains(page)) {
            if page % PAGES_BETWEEN_LOOKS == 0 && stop.is_stopped() {
                return false;
            }
            let range = self.ram.page(page).expect("a page of the block");
            if !range.is_zero() {
                range.clear();
            }
        }
        true
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
        Backing::MemoryFile(file) if !file.memory().is_huge => advice::discard_shared(block.whole()),
        _ => Err(io::Error::other("it is not known that they can be")),
    }
}

/// 64 MiB of small pages: some milliseconds.
const PAGES_BETWEEN_LOOKS: u64 = 1 << 14;
