//! KVM's memory slots, and which pages of which RAM blocks they are.
//!
//! A RAM block may be spread over several slots (below and above a hole in guest addresses), and a slot may cover a part
//! of a block or run over several that are mapped side by side.

use std::io;

use crate::{dirty_bitmap::DirtyBitmap, ram::Ram, sys::kvm::system_page_size};

/// A memory slot, as the VMM passed it to KVM_SET_USER_MEMORY_REGION.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvmSlot {
    /// Number of the slot, with the address space in the upper 16 bits.
    pub slot: u32,
    /// Guest physical address of its first byte.
    pub guest_address: u64,
    /// Address of its first byte in this process.
    pub host_address: u64,
    /// Bytes in it.
    pub bytes: u64,
    /// Its flags; KVM_MEM_LOG_DIRTY_PAGES is set and cleared by the log.
    pub flags: u32,
}

/// A slot of which every byte lies in a RAM block. Keeps the blocks mapped.
#[derive(Clone, Debug)]
pub(crate) struct TrackedSlot {
    description: KvmSlot,
    parts: Vec<Part>,
    kvm_page: u64,
    page_size: u64,
    _ram: Ram,
}

/// The part of a slot that lies in one block.
#[derive(Clone, Debug)]
struct Part {
    /// Page of the slot that is the first of the part, in KVM's pages.
    in_slot: u64,
    /// How many of KVM's pages.
    pages: u64,
    /// Number of the first page of the block, and where in the block the part begins, in bytes.
    first_page: u64,
    in_block: u64,
}

impl TrackedSlot {
    /// Finds the blocks of `slot`.
    ///
    /// # Errors
    /// If it does not lie in RAM blocks, or is not made of whole pages.
    pub(crate) fn new(slot: KvmSlot, ram: &Ram) -> io::Result<TrackedSlot> {
        let refused = |why| {
            let message = format!("slot {} ({:#x} bytes at {:#x}) {why}", slot.slot, slot.bytes, slot.host_address);
            io::Error::new(io::ErrorKind::InvalidInput, message)
        };
        let kvm_page = system_page_size();
        let end = slot.host_address.checked_add(slot.bytes).ok_or_else(|| refused("runs over"))?;
        let mut parts = Vec::new();
        for (block, layout) in ram.blocks().iter().zip(ram.layout().blocks()) {
            let from = slot.host_address.max(block.address());
            let to = end.min(block.address() + block.bytes() as u64);
            if from >= to {
                continue;
            }
            let (in_slot, bytes) = (from - slot.host_address, to - from);
            if !in_slot.is_multiple_of(kvm_page) || !bytes.is_multiple_of(kvm_page) {
                return Err(refused("does not meet its RAM block at whole pages"));
            }
            parts.push(Part {
                in_slot: in_slot / kvm_page,
                pages: bytes / kvm_page,
                first_page: layout.first_page(),
                in_block: from - block.address(),
            });
        }
        let covered: u64 = parts.iter().map(|part| part.pages * kvm_page).sum();
        if covered != slot.bytes || slot.bytes == 0 {
            return Err(refused("does not lie in RAM blocks"));
        }
        let page_size = ram.layout().page_size() as u64;
        Ok(TrackedSlot { description: slot, parts, kvm_page, page_size, _ram: ram.clone() })
    }

    /// Finds the blocks of all `slots`.
    pub(crate) fn all(slots: &[KvmSlot], ram: &Ram) -> io::Result<Vec<TrackedSlot>> {
        slots.iter().map(|slot| TrackedSlot::new(*slot, ram)).collect()
    }

    /// How the VMM described it.
    pub(crate) fn description(&self) -> &KvmSlot {
        &self.description
    }

    /// Pages in the slot, in KVM's size.
    pub(crate) fn pages(&self) -> u64 {
        self.description.bytes / self.kvm_page
    }

    /// Adds the pages whose bit is set in `bitmap`, KVM's bitmap of this slot, to `into`.
    pub(crate) fn merge(&self, bitmap: &[u64], into: &mut DirtyBitmap) {
        for part in &self.parts {
            for done in (0..part.pages).step_by(64) {
                let bits = bits_at(bitmap, part.in_slot + done, 64.min(part.pages - done));
                if bits == 0 {
                    continue;
                }
                if self.kvm_page == self.page_size {
                    // 64 pages of the slot lie in one word of the layout, or in two.
                    let page = part.first_page + part.in_block / self.page_size + done;
                    let (word, shift) = ((page / 64) as usize, page % 64);
                    into.merge_word(word, bits << shift);
                    if shift != 0 && bits >> (64 - shift) != 0 {
                        into.merge_word(word + 1, bits >> (64 - shift));
                    }
                } else {
                    for bit in (0..64).filter(|bit| bits >> bit & 1 == 1) {
                        self.mark(part, done + bit, into);
                    }
                }
            }
        }
    }

    /// Adds page `page` of the slot, if it has one with that number.
    pub(crate) fn merge_page(&self, page: u64, into: &mut DirtyBitmap) {
        let part = self.parts.iter().find(|part| (part.in_slot..part.in_slot + part.pages).contains(&page));
        if let Some(part) = part {
            self.mark(part, page - part.in_slot, into);
        }
    }

    /// Adds what lies in KVM's page number `page` of `part`.
    fn mark(&self, part: &Part, page: u64, into: &mut DirtyBitmap) {
        let start = part.in_block + page * self.kvm_page;
        let first = start / self.page_size;
        let end = (start + self.kvm_page).div_ceil(self.page_size);
        into.set_range(part.first_page + first..part.first_page + end);
    }
}

/// `count` bits of `bitmap` from bit `from` on, at most 64, in the lowest bits.
fn bits_at(bitmap: &[u64], from: u64, count: u64) -> u64 {
    let (word, shift) = ((from / 64) as usize, from % 64);
    let low = bitmap[word] >> shift;
    let high = if shift == 0 || shift + count <= 64 { 0 } else { bitmap[word + 1] << (64 - shift) };
    (low | high) & (!0 >> (64 - count))
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    fn slot(ram: &Ram, block: usize, page: u64, pages: u64) -> KvmSlot {
        let host_address = ram.blocks()[block].address() + page * 4096;
        KvmSlot { slot: 3, guest_address: 0, host_address, bytes: pages * 4096, flags: 0 }
    }

    /// Word by word as page by page: every single page, through every offset of a slot in a block.
    #[test]
    fn a_slot_anywhere_in_a_block_reports_the_right_pages() {
        for page_size in [4096, 1024, 65536] {
            let ram = Ram::for_test_with_pages(page_size, &[("a", 128), ("b", 2048 * 4096 / page_size)]);
            let layout = &ram.layout().blocks()[1];
            for (page, pages) in [(0, 200), (1, 130), (63, 64), (64, 1), (70, 129), (127, 2)] {
                let tracked = TrackedSlot::new(slot(&ram, 1, page, pages), &ram).unwrap();
                for dirty in 0..pages {
                    let mut bitmap = vec![0u64; pages.div_ceil(64) as usize];
                    bitmap[(dirty / 64) as usize] |= 1 << (dirty % 64);
                    let (mut whole, mut single) = (DirtyBitmap::new(ram.layout()), DirtyBitmap::new(ram.layout()));
                    tracked.merge(&bitmap, &mut whole);
                    tracked.merge_page(dirty, &mut single);
                    let start = (page + dirty) * 4096;
                    let expected = layout.page_at(start)..=layout.page_at(start + 4095);
                    assert!(whole.iter().eq(expected.clone()), "page {dirty} of {pages} at {page}");
                    assert!(single.iter().eq(expected));
                }
                let mut all = DirtyBitmap::new(ram.layout());
                // Bits behind the end of the slot, which KVM leaves 0, are not taken for pages.
                tracked.merge(&vec![!0; pages.div_ceil(64) as usize], &mut all);
                let (first, last) = (layout.page_at(page * 4096), layout.page_at((page + pages) * 4096 - 1));
                assert!(all.iter().eq(first..=last));
            }
        }
    }

    #[test]
    fn a_slot_outside_all_blocks_is_refused() {
        let ram = Ram::for_test(&[("a", 10)]);
        for (page, pages) in [(5, 6), (10, 1), (0, 0)] {
            assert!(TrackedSlot::new(slot(&ram, 0, page, pages), &ram).is_err());
        }
        let wraps = KvmSlot { bytes: u64::MAX - 4095, ..slot(&ram, 0, 1, 1) };
        assert!(TrackedSlot::new(wraps, &ram).is_err());
        let uneven = KvmSlot { bytes: 4097, ..slot(&ram, 0, 1, 1) };
        assert!(TrackedSlot::new(uneven, &ram).is_err());
    }
}
