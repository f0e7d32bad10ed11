//! Whether this process may write to a RAM block at all: `mprotect`.

use std::{io, ops::Range};

use crate::ram::{Access, RamBlock};

/// From now on a write to `block` is a fault: SIGSEGV for code of this process, `EFAULT` for the kernel.
///
/// # Errors
/// The kernel's: the block does not begin and end at pages of its memory.
pub(crate) fn forbid_writing(block: &RamBlock) -> io::Result<()> {
    protect(block, libc::PROT_READ)
}

/// From now on `block`, which may be written, can be.
///
/// # Errors
/// The kernel's; also for a block that is only to be read.
pub(crate) fn permit_writing(block: &RamBlock) -> io::Result<()> {
    match block.access() {
        Access::ReadWrite => protect(block, libc::PROT_READ | libc::PROT_WRITE),
        Access::ReadOnly => Err(io::ErrorKind::PermissionDenied.into()),
    }
}

fn protect(block: &RamBlock, access: libc::c_int) -> io::Result<()> {
    let whole = block.whole();
    // The kernel rounds lengths up: that would change what follows.
    if !whole.len().is_multiple_of(super::kvm::system_page_size() as usize) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it ends within a page"));
    }
    for piece in pieces(whole.as_ptr() as usize, whole.len()) {
        let (address, len) = (piece.start as *mut libc::c_void, piece.len());
        // SAFETY: all of the range is mapped and is whole pages of the block; no Rust reference to it exists other than to
        // atomics, and a write that comes while it is forbidden is a fault and nothing else.
        if unsafe { libc::mprotect(address, len, access) } < 0 {
            let error = io::Error::last_os_error();
            return Err(match error.kind() {
                io::ErrorKind::InvalidInput => {
                    io::Error::new(error.kind(), "it has huge pages, and does not begin and end at one")
                }
                _ => error,
            });
        }
    }
    Ok(())
}

/// The addresses from `start` on, cut at multiples of [`PIECE`].
fn pieces(start: usize, len: usize) -> impl Iterator<Item = Range<usize>> {
    let (mut at, end) = (start, start + len);
    std::iter::from_fn(move || {
        let piece = at..(at / PIECE + 1).saturating_mul(PIECE).min(end);
        at = piece.end;
        (!piece.is_empty()).then_some(piece)
    })
}

/// What one directory of page tables maps, on most machines. The kernel passes directories over that map nothing, and tells KVM of all the others,
/// from where it stands to the end of what it was asked for. KVM looks through that page by page where it has no page tables of
/// the processor's: 5 ms for 64 GiB of which little is in use, while the guest waits, and 0.3 ms in pieces.
const PIECE: usize = 1 << 30;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_all_of_the_block_and_end_at_multiples() {
        const MIB: usize = 1 << 20;
        for (start, len) in
            [(PIECE, 3 * PIECE), (5 * MIB, MIB), (PIECE - MIB, 2 * MIB), (7 * MIB, 2 * PIECE), (0, PIECE)]
        {
            let pieces: Vec<_> = pieces(start, len).collect();
            assert_eq!((pieces[0].start, pieces.last().unwrap().end), (start, start + len));
            assert!(
                pieces.windows(2).all(|pair| pair[0].end == pair[1].start && pair[0].end % PIECE == 0),
                "{pieces:?}"
            );
            assert!(pieces.iter().all(|piece| !piece.is_empty() && piece.start / PIECE == (piece.end - 1) / PIECE));
        }
        assert_eq!(pieces(PIECE, 0).count(), 0);
    }
}
