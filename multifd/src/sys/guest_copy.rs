//! Copies between private memory and guest memory, which the guest may write at the same time.
//!
//! Guest memory is accessed in relaxed atomic words: whatever the guest does meanwhile, each word is one that somebody
//! wrote, the compiler reads it once, and nothing here is undefined. Where there is an instruction that copies words, it is used: it takes
//! three quarters of the time of a loop for memory that is in no cache, and two thirds for memory that is.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::ram::GuestRange;

/// The range as atomic words.
fn words<'a>(range: GuestRange<'a>) -> &'a [AtomicU64] {
    let first = range.as_ptr().cast::<AtomicU64>();
    // SAFETY: a `GuestRange` is mapped for its lifetime, aligned to 8 and a multiple of 8 long, and Rust references to
    // guest memory are to atomics only.
    unsafe { std::slice::from_raw_parts(first, range.len() / 8) }
}

/// Whether every byte of `range` is zero.
pub(crate) fn is_zero(range: GuestRange<'_>) -> bool {
    let words = words(range);
    // The head first: it tells of most pages with content, and of a page that is in no cache yet this is the one read that is waited
    // for. Then chunks of 256 bytes: long enough to keep the loads independent, short enough to leave early.
    let head = words.first().map_or(0, |word| word.load(Relaxed));
    head == 0 && words.chunks(32).all(|chunk| chunk.iter().fold(0, |any, word| any | word.load(Relaxed)) == 0)
}

/// Copies `range` into `into`.
pub(crate) fn read(range: GuestRange<'_>, into: &mut [u8]) {
    assert_eq!(range.len(), into.len());
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: a `GuestRange` is mapped for its lifetime and a multiple of 8 long; `into` is as long, and private.
    unsafe {
        copy_words(range.as_ptr(), into.as_mut_ptr(), range.len() / 8);
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    for (to, from) in into.chunks_exact_mut(8).zip(words(range)) {
        to.copy_from_slice(&from.load(Relaxed).to_ne_bytes());
    }
}

/// Copies `from` into `range`.
pub(crate) fn write(range: GuestRange<'_>, from: &[u8]) {
    assert_eq!(range.len(), from.len());
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: as in `read`, the other way.
    unsafe {
        copy_words(from.as_ptr(), range.as_ptr(), range.len() / 8);
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    for (to, from) in words(range).iter().zip(from.chunks_exact(8)) {
        to.store(u64::from_ne_bytes(from.try_into().expect("chunks of 8")), Relaxed);
    }
}

/// Copies `count` words of 8 bytes, each of which is read once and written once.
///
/// # Safety
/// `from` can be read and `to` be written for as long, they do not overlap, and only one of the two is guest memory.
#[cfg(all(target_arch = "x86_64", not(miri)))]
unsafe fn copy_words(from: *const u8, to: *mut u8, count: usize) {
    // SAFETY: the caller vouches for the memory. The direction flag is clear, as the ABI has it.
    unsafe {
        std::arch::asm!(
            "rep movsq",
            inout("rcx") count => _,
            inout("rsi") from => _,
            inout("rdi") to => _,
            options(nostack, preserves_flags)
        );
    }
}

/// Sets every byte of `range` to zero.
pub(crate) fn clear(range: GuestRange<'_>) {
    for word in words(range) {
        word.store(0, Relaxed);
    }
}
