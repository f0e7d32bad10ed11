//! Arrays of zeros whose length a peer decides.
//!
//! The kernel gives them pages as they are written, so that a peer that claims terabytes costs what it names. Where there is
//! no room for them, that is an error: `vec!` would end the process.

use std::io;

/// Types of which a value with all bits zero is valid.
///
/// # Safety
/// It is.
pub(crate) unsafe trait Zero: Sized {}

// SAFETY: an integer.
unsafe impl Zero for u64 {}

#[cfg(not(any(loom, shuttle)))]
mod atomics {
    use super::Zero;
    use crate::sync::atomic::{AtomicU32, AtomicU64};

    // SAFETY: the standard library's have the representation of the integer.
    unsafe impl Zero for AtomicU64 {}
    // SAFETY: as above.
    unsafe impl Zero for AtomicU32 {}

    /// `len` atomics of 0.
    pub(crate) fn zeroed_atomics<T: Zero + Default>(len: usize) -> std::io::Result<Vec<T>> {
        super::zeroed(len)
    }
}

#[cfg(any(loom, shuttle))]
mod atomics {
    /// `len` atomics of 0. Those of model checkers are no plain memory.
    pub(crate) fn zeroed_atomics<T: Default>(len: usize) -> std::io::Result<Vec<T>> {
        Ok(std::iter::repeat_with(T::default).take(len).collect())
    }
}

pub(crate) use atomics::zeroed_atomics;

/// `len` zeros.
///
/// # Errors
/// [`io::ErrorKind::OutOfMemory`]
pub(crate) fn zeroed<T: Zero>(len: usize) -> io::Result<Vec<T>> {
    let no_room = || {
        let bytes = (len as u128) * size_of::<T>() as u128;
        io::Error::new(io::ErrorKind::OutOfMemory, format!("no room for an array of {bytes} bytes in memory"))
    };
    let layout = std::alloc::Layout::array::<T>(len).map_err(|_| no_room())?;
    if layout.size() == 0 {
        return Ok(Vec::new());
    }
    // SAFETY: the size is not 0.
    let memory = unsafe { std::alloc::alloc_zeroed(layout) };
    if memory.is_null() {
        return Err(no_room());
    }
    // SAFETY: allocated just now by the global allocator with the layout of `len` values, which are valid as zeros.
    Ok(unsafe { Vec::from_raw_parts(memory.cast(), len, len) })
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use crate::sync::atomic::{AtomicU32, Ordering::Relaxed};

    #[test]
    fn zeros_are_zeros_and_too_many_are_an_error() {
        assert!(zeroed::<u64>(0).unwrap().is_empty());
        assert_eq!(zeroed::<u64>(3).unwrap(), [0; 3]);
        let words = zeroed_atomics::<AtomicU32>(1 << 20).unwrap();
        assert!(words.iter().all(|word| word.load(Relaxed) == 0));
        for len in [usize::MAX, usize::MAX / 8, 1 << 55] {
            assert_eq!(zeroed::<u64>(len).unwrap_err().kind(), io::ErrorKind::OutOfMemory);
        }
    }
}
