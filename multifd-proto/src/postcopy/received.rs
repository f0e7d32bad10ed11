//! The bitmaps of a recovery: for each RECV_BITMAP the destination answers which pages of the block it has received.
//!
//! | bytes | field                                                                                   |
//! |------:|-----------------------------------------------------------------------------------------|
//! |     8 | length of the bitmap in bytes: one bit for each page, rounded up to a multiple of 8 bytes |
//! |     n | bit `i % 8` of byte `i / 8`: page `i` was received                                      |
//! |     8 | `0123456789abcdef`                                                                      |
//!
//! They follow the message RECV_BITMAP, outside of it. [`is_set`](crate::mapped_ram::is_set) reads them. Bits past the last page mean nothing.

use crate::mapped_ram::bitmap_len;
use crate::violation::{DecodeError, ProtocolError};
use crate::wire::{Step, Writer, step};

/// The bitmap at the start of `input`, for a block with `pages` pages.
///
/// The length is checked before more bytes are asked for, so a peer cannot have us wait for, or keep, more than the
/// block's own bitmap.
///
/// # Errors
/// [`DecodeError::BadReceivedBitmap`]: another length, or another end.
pub fn decode(input: &[u8], pages: u64) -> Result<Step<&[u8]>, ProtocolError> {
    step(input, |reader| {
        let (expected, found) = (bitmap_len(pages, 1), reader.u64()?);
        let bad = |what, expected, found| DecodeError::BadReceivedBitmap { what, expected, found };
        let Some(bytes) = usize::try_from(expected).ok().filter(|_| found == expected) else {
            return Err(bad("length", expected, found).into());
        };
        let bitmap = reader.bytes(bytes)?;
        match reader.u64()? {
            END => Ok(bitmap),
            end => Err(bad("end", END, end).into()),
        }
    })
}

/// Appends the bitmap of a block with `pages` pages, of which those numbered `received` were received.
///
/// # Panics
/// If one of them is not a page of the block, or the bitmap does not fit the address space.
pub fn encode(pages: u64, received: impl IntoIterator<Item = u64>, out: &mut Vec<u8>) {
    let bytes = bitmap_len(pages, 1);
    Writer::new(out).u64(bytes);
    let begin = out.len();
    out.resize(begin + usize::try_from(bytes).expect("the bitmap fits the address space"), 0);
    for page in received {
        assert!(page < pages, "page {page} of {pages}");
        out[begin + (page / 8) as usize] |= 1 << (page % 8);
    }
    Writer::new(out).u64(END);
}

/// Appends the bitmap of a block with `pages` pages, all of which were received.
///
/// # Panics
/// If the bitmap does not fit the address space.
pub fn encode_all(pages: u64, out: &mut Vec<u8>) {
    let bytes = bitmap_len(pages, 1);
    Writer::new(out).u64(bytes);
    let begin = out.len();
    let full = usize::try_from(pages / 8).expect("the bitmap fits the address space");
    out.resize(begin + full, 0xff);
    if !pages.is_multiple_of(8) {
        out.push((1 << (pages % 8)) - 1);
    }
    out.resize(begin + usize::try_from(bytes).expect("the bitmap fits the address space"), 0);
    Writer::new(out).u64(END);
}

const END: u64 = 0x0123_4567_89ab_cdef;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bitmap_is_rounded_up_to_eight_bytes() {
        assert_eq!([0, 1, 64, 65, 0x8000].map(|pages| bitmap_len(pages, 1)), [0, 8, 8, 16, 0x1000]);
        let mut bytes = Vec::new();
        encode(3, [0, 2], &mut bytes);
        assert_eq!(bytes, b"\0\0\0\0\0\0\0\x08\x05\0\0\0\0\0\0\0\x01\x23\x45\x67\x89\xab\xcd\xef");
    }

    #[test]
    fn all_pages_are_each_of_them() {
        for pages in [0, 1, 7, 8, 9, 63, 64, 65, 130] {
            let (mut each, mut all) = (Vec::new(), Vec::new());
            encode(pages, 0..pages, &mut each);
            encode_all(pages, &mut all);
            assert_eq!(all, each, "{pages}");
        }
    }

    #[test]
    fn truncated_asks_for_more_and_whole_is_read_back() {
        let mut bytes = Vec::new();
        encode(70, [1, 64, 69], &mut bytes);
        for len in 0..bytes.len() {
            let step = decode(&bytes[..len], 70).unwrap();
            assert!(matches!(step, Step::Need(total) if len < total && total <= bytes.len()), "{len}");
        }
        let Ok(Step::Item { item, used }) = decode(&bytes, 70) else { panic!("it is whole") };
        assert_eq!(used, bytes.len());
        let received: Vec<u64> = (0..70).filter(|&page| crate::mapped_ram::is_set(item, page as usize)).collect();
        assert_eq!(received, [1, 64, 69]);
    }

    #[test]
    fn a_wrong_length_is_refused_before_its_bytes_are_asked_for() {
        for found in [0, 8, 24, 1 << 40, u64::MAX] {
            let refused = DecodeError::BadReceivedBitmap { what: "length", expected: 16, found };
            assert_eq!(decode(&found.to_be_bytes(), 70), Err(refused.into()));
        }
        let mut bytes = Vec::new();
        encode(70, [], &mut bytes);
        *bytes.last_mut().unwrap() = 0;
        let refused = DecodeError::BadReceivedBitmap { what: "end", expected: END, found: 0x0123_4567_89ab_cd00 };
        assert_eq!(decode(&bytes, 70), Err(refused.into()));
    }
}
