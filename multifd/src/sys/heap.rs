//! RAM blocks on the heap.

use std::ptr::NonNull;

use multifd_proto::BlockName;

use crate::ram::RamBlock;

/// A fresh block of `len` zero bytes, a multiple of 8, that is freed with its last user.
pub(crate) fn zeroed_block(name: BlockName, len: usize) -> RamBlock {
    assert!(len > 0 && len.is_multiple_of(8), "blocks are whole pages");
    let words = Box::into_raw(vec![0u64; len / 8].into_boxed_slice());
    let base = NonNull::new(words.cast::<u8>()).expect("a box is not null");
    // SAFETY: the box is `len` bytes long, aligned for u64, freed by its owner only, and no reference to it exists.
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
