//! Memory that is handed over: the destination maps it, and no page of it is sent.

use multifd_proto::{extension::Extension, shared_memory};

use super::{Peer, Run};
use crate::{
    dirty_bitmap::DirtyBitmap,
    error::{Error, Mismatch},
    memory::shared,
    ram::Ram,
};

/// The blocks that are handed over.
pub(super) struct HandedOver {
    /// By index.
    blocks: Vec<usize>,
    pages: DirtyBitmap,
    /// There are no others.
    is_all: bool,
}

impl HandedOver {
    /// All of `ram` that is made of memory files.
    ///
    /// # Errors
    /// It cannot be handed over; `peer` takes no memory.
    pub(super) fn of(ram: &Ram, peer: Peer) -> Result<HandedOver, Mismatch> {
        if peer != Peer::Multifd {
            return Err(Mismatch::HandOverRefused);
        }
        let blocks = shared::lend(ram)?;
        let mut pages = DirtyBitmap::new(ram.layout());
        for &index in &blocks {
            pages.set_range(ram.layout().blocks()[index].page_range());
        }
        Ok(HandedOver { is_all: blocks.len() == ram.blocks().len(), blocks, pages })
    }

    /// How many pages there are.
    pub(super) fn count(&self) -> u64 {
        self.pages.count()
    }
}

impl Run {
    /// Hands the memory over, where the plan says so.
    pub(super) fn hand_over(&mut self) -> Result<(), Error> {
        let Some(handed) = &self.handed_over else { return Ok(()) };
        if !self.extensions.contains(Extension::SharedMemory) {
            return Err(Mismatch::HandOverRefused.into());
        }
        let ram = self.shared.ram.clone();
        let (blocks, descriptors) = shared::listed(&ram, &handed.blocks);
        self.report.handed_over = blocks.iter().map(|block| block.len).sum();
        self.main().shared_memory(&shared_memory::encode(&blocks), &descriptors)
    }

    /// Whether all memory is handed over: no write to it is of interest.
    pub(super) fn all_is_handed_over(&self) -> bool {
        self.handed_over.as_ref().is_some_and(|handed| handed.is_all)
    }

    /// Takes the pages out of `pages` that the destination has mapped.
    pub(super) fn leave_out_handed_over(&self, pages: &mut DirtyBitmap) {
        if let Some(handed) = &self.handed_over {
            pages.subtract(&handed.pages);
        }
    }

    /// From now on the memory is the destination's, or it is ours again: a migration to this process must not make it zero.
    pub(super) fn lend(&self, lent: bool) {
        for &index in self.handed_over.iter().flat_map(|handed| &handed.blocks) {
            self.shared.ram.blocks()[index].set_lent(lent);
        }
    }
}
