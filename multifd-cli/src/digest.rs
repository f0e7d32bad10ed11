//! The digest of what a reader has: one thread reads while another one hashes.
//!
//! A digest is one SHA-256 of all bytes in their order, which one processor computes at one time. So it takes as long as the slower of the
//! two, and not as both together.

use std::{
    io::{self, Read},
    sync::mpsc,
    thread,
};

use sha2::{Digest, Sha256};

use crate::describe::hex;

/// SHA-256 of everything that `from` has, in hexadecimal digits.
///
/// # Errors
/// Those of `from`; [`io::ErrorKind::Interrupted`] once `stopped`: a peer may have claimed terabytes of zeros.
pub fn of(from: &mut dyn Read, stopped: &dyn Fn() -> bool) -> io::Result<String> {
    let (filled, to_hash) = mpsc::sync_channel::<Piece>(PIECES);
    let (emptied, empty) = mpsc::channel();
    thread::scope(|scope| {
        let hash = move || {
            let mut hash = Sha256::new();
            for piece in to_hash {
                hash.update(&piece.bytes[..piece.len]);
                // The reader needs no more of them once it is done.
                let _ = emptied.send(piece);
            }
            hex(&hash.finalize())
        };
        let hasher = thread::Builder::new().name("digest".to_owned()).spawn_scoped(scope, hash)?;
        let mut read = || {
            for made in 0.. {
                if stopped() {
                    return Err(io::Error::new(
                        io::ErrorKind::Interrupted,
                        "interrupted before all digests were computed",
                    ));
                }
                let new = || Piece { bytes: vec![0; PIECE], len: 0 };
                let mut piece = if made < PIECES { new() } else { empty.recv().unwrap_or_else(|_| new()) };
                piece.len = from.read(&mut piece.bytes)?;
                // Without a hasher, which has panicked, there is no digest.
                if piece.len == 0 || filled.send(piece).is_err() {
                    break;
                }
            }
            Ok(())
        };
        let outcome = read();
        // The end, for the hasher.
        drop(filled);
        let digest = hasher.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        outcome.map(|()| digest)
    })
}

/// A part of what is read.
struct Piece {
    bytes: Vec<u8>,
    len: usize,
}

const PIECE: usize = 1 << 20;
/// Those that are read, wait and are hashed at one time.
const PIECES: usize = 4;

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives as many bytes at a time as it is told, in turn, and fails at the end if so told.
    struct Pieces {
        left: Vec<u8>,
        sizes: Vec<usize>,
        next: usize,
        fails: bool,
    }

    impl Read for Pieces {
        fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
            if self.left.is_empty() && self.fails {
                return Err(io::Error::other("told to fail"));
            }
            let size = self.sizes[self.next % self.sizes.len()].min(self.left.len()).min(into.len());
            self.next += 1;
            into[..size].copy_from_slice(&self.left[..size]);
            self.left.drain(..size);
            Ok(size)
        }
    }

    fn pieces(len: usize, sizes: &[usize], fails: bool) -> Pieces {
        let left = (0..len).map(|index| (index * 7 + index / 1000) as u8).collect();
        Pieces { left, sizes: sizes.to_vec(), next: 0, fails }
    }

    #[test]
    fn it_is_that_of_all_bytes_in_their_order_however_they_come() {
        for (len, sizes) in [(0, &[1][..]), (1, &[1]), (5000, &[1, 700, 3]), (9 << 20, &[usize::MAX, 1, 1 << 19])] {
            let whole = hex(&Sha256::digest(&pieces(len, sizes, false).left));
            assert_eq!(of(&mut pieces(len, sizes, false), &|| false).unwrap(), whole, "{len} bytes");
        }
    }

    #[test]
    fn an_error_and_an_interrupt_end_it() {
        let error = of(&mut pieces(3000, &[1000], true), &|| false).unwrap_err();
        assert_eq!(error.to_string(), "told to fail");
        let looks = std::cell::Cell::new(0);
        let stopped = || looks.replace(looks.get() + 1) == 2;
        let error = of(&mut io::repeat(0), &stopped).unwrap_err();
        assert_eq!((error.kind(), looks.get()), (io::ErrorKind::Interrupted, 3));
    }
}
