//! RAM blocks on the heap.

use std::ptr::NonNull;

use multifd_proto::BlockName;

use crate::ram::RamBlock;

/// A fresh block of `len` zero bytes, a multiple of 8, that is freed with its last user.
///
/// It never begins at a page of the host, so that a userfaultfd never fills it: of blocks where the allocator puts them, one in some
/// hundred would be filled so, and a test would see another way than before.
pub(crate) fn zeroed_block(name: BlockName, len: usize) -> RamBlock {
    assert!(len > 0 && len.is_multiple_of(8), "blocks are whole pages");
    let words = Box::into_raw(vec![0u64; len / 8 + 1].into_boxed_slice());
    let begin = NonNull::new(words.cast::<u64>()).expect("a box is not null");
    let at_page = begin.addr().get().is_multiple_of(4096);
    // SAFETY: the box has one word more.
    let base = unsafe { begin.add(usize::from(at_page)) }.cast::<u8>();
    // SAFETY: the box is `len` bytes long behind `base`, aligned for u64, freed by its owner only, and no reference to it exists.
    unsafe { RamBlock::from_raw(name, base, len, Box::new(Owner(words))) }.fresh()
}

/// Frees the memory.
struct Owner(*mut [u64]);

// SAFETY: it only frees, once, whoever drops it.
unsafe impl Send for Owner {}
// SAFETY: nothing is reachable through a shared reference.
unsafe impl Sync for Owner {}

impl Drop for Owner {
    fn drop(&mut self) {
        // SAFETY: made by `Box::into_raw` and freed nowhere else.
        drop(unsafe { Box::from_raw(self.0) });
    }
}
