//! Pages as a difference to the copy the receiver already has (capability `xbzrle`; never together with multifd).
//!
//! A diff is a sequence of { run to skip, run to write, that many bytes }. Both run lengths are ULEB128 of at most two bytes;
//! a run to skip at the end of the page is left out.

use crate::violation::DecodeError;

/// The longest diff accepted: one that is longer than the page gains nothing, and QEMU sends the page instead.
pub(crate) const MAX_DIFF: usize = 4096;

/// The byte in front of the diff's length.
pub(crate) const HEADER: u8 = 1;

/// Applies `diff` to `page`, its old content.
///
/// On an error a part of the diff may have been applied; nothing outside `page` is ever touched.
pub fn apply(diff: &[u8], page: &mut [u8]) -> Result<(), DecodeError> {
    let malformed = |what, at| DecodeError::XbzrleMalformed { what, at };
    let (mut at, mut offset) = (0, 0);
    while at < diff.len() {
        let (skip, skip_len) = uleb128(&diff[at..]).ok_or(malformed("run to skip", at))?;
        at += skip_len;
        let (write, write_len) = uleb128(&diff[at..]).ok_or(malformed("run to write", at))?;
        at += write_len;
        if write == 0 {
            return Err(malformed("empty run to write", at));
        }
        let bytes = diff.get(at..at + write).ok_or(malformed("run past the end of the diff", at))?;
        offset += skip;
        let target = page.get_mut(offset..offset + write).ok_or(malformed("run past the end of the page", at))?;
        target.copy_from_slice(bytes);
        at += write;
        offset += write;
    }
    Ok(())
}

/// A number of at most 14 bits and how many bytes it took.
fn uleb128(bytes: &[u8]) -> Option<(usize, usize)> {
    match *bytes {
        [low, ..] if low < 0x80 => Some((usize::from(low), 1)),
        [low, high, ..] if high < 0x80 => Some((usize::from(low & 0x7f) | usize::from(high) << 7, 2)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_skipped_and_written() {
        let mut page = [0xaa; 400];
        apply(b"\x00\x01\x88\x82\x02\x02\x11\x22", &mut page).unwrap();
        let mut expected = [0xaa; 400];
        expected[0] = 0x88;
        expected[259] = 0x11;
        expected[260] = 0x22;
        assert_eq!(page, expected);
    }

    #[test]
    fn a_diff_that_lies_about_itself_is_refused() {
        for (diff, what) in [
            (&b"\x80"[..], "run to skip"),
            (b"\x80\x80\x01", "run to skip"),
            (b"\x05", "run to write"),
            (b"\x05\xff", "run to write"),
            (b"\x05\x00", "empty run to write"),
            (b"\x00\x02\x01", "run past the end of the diff"),
            (b"\x10\x01\x01", "run past the end of the page"),
            (b"\x0f\x02\x01\x01", "run past the end of the page"),
            (b"\xff\x7f\x01\x01", "run past the end of the page"),
        ] {
            let result = apply(diff, &mut [0; 16]);
            assert!(
                matches!(result, Err(DecodeError::XbzrleMalformed { what: w, .. }) if w == what),
                "{diff:?} {result:?}"
            );
        }
    }
}
