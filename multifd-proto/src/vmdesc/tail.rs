//! Where main ends, as its last bytes say.

use std::ops::Range;

use serde::de::IgnoredAny;

use crate::stream::{MAX_VMDESC, VMDESCRIPTION};
use crate::wire::Reader;

/// Finds the end of main in a buffer that grows while it is received.
///
/// The end is the byte `00` (end of state), `06`, a 32-bit length, and JSON of this length up to the last byte received. The
/// two bytes `00 06` are common inside device state, so that everything else is checked, too. No byte is looked at twice
/// except by the final parse: since JSON contains no byte `00`, any `00` rules out all beginnings before it.
#[derive(Debug, Clone, Default)]
pub struct TailScanner {
    /// `buf[..scanned]` was looked at.
    scanned: usize,
    /// Beginnings (positions of the `00`) that nothing has ruled out: at most three, since they overlap.
    pub(super) live: Vec<usize>,
    /// Those whose description ended before the last byte of the last scan.
    passed: Vec<usize>,
}

impl TailScanner {
    /// Looks at what was appended to `buf` since the last call and says where the stream ends, if `buf` ends with it.
    pub fn scan(&mut self, buf: &[u8]) -> Option<TailEnd> {
        let mut at = self.scanned;
        self.passed.clear();
        while at < buf.len() {
            if self.live.is_empty() {
                // Only a beginning matters, whose second byte may not be there yet.
                let begin = buf[at..].windows(2).position(|pair| pair == [0, VMDESCRIPTION]);
                at += begin.unwrap_or(buf.len() - at - 1);
            }
            // Behind the head of every beginning, only a zero matters.
            else if self.live.iter().all(|begin| at > begin + HEAD) {
                let zero = buf[at..].iter().position(|byte| *byte == 0);
                at += zero.unwrap_or(buf.len() - at);
            }
            match buf.get(at) {
                None => break,
                Some(0) => {
                    self.pass(buf, at);
                    self.live.retain(|begin| (begin + 2..begin + HEAD).contains(&at));
                    if buf.get(at + 1).is_none_or(|next| *next == VMDESCRIPTION) {
                        self.live.push(at);
                    }
                }
                // A beginning is a zero, then 06, a length that is not above the limit, and the brace of an object.
                Some(byte) => self.live.retain(|begin| match at - begin {
                    1 => *byte == VMDESCRIPTION,
                    HEAD => *byte == b'{' && vmdesc_len(buf, *begin) <= MAX_VMDESC as usize,
                    _ => true,
                }),
            }
            at += 1;
        }
        self.scanned = buf.len();
        self.pass(buf, buf.len().saturating_sub(1));
        let complete = |begin: &usize| begin + HEAD < buf.len() && begin + HEAD + vmdesc_len(buf, *begin) == buf.len();
        let is_json = |begin: &usize| serde_json::from_slice::<IgnoredAny>(&buf[begin + HEAD..]).is_ok();
        let begin = *self.live.iter().find(|begin| complete(begin) && is_json(begin))?;
        Some(TailEnd { eof_at: begin, json: begin + HEAD..buf.len() })
    }

    /// What looked like the end in the last scan of `buf`, and had more behind it. That is device state which looks like an
    /// end, unless all before it is what it describes: then nothing may follow.
    pub fn passed<'a>(&'a self, buf: &'a [u8]) -> impl Iterator<Item = TailEnd> + 'a {
        let end = |begin: usize| begin + HEAD + vmdesc_len(buf, begin);
        self.passed.iter().map(move |&begin| TailEnd { eof_at: begin, json: begin + HEAD..end(begin) })
    }

    /// Rules out the beginnings whose description ends at or before `at`, where there is a byte.
    fn pass(&mut self, buf: &[u8], at: usize) {
        let passed = &mut self.passed;
        self.live.retain(|begin| {
            let over = at >= begin + HEAD && begin + HEAD + vmdesc_len(buf, *begin) <= at;
            if over {
                passed.push(*begin);
            }
            !over
        });
    }
}

/// The length behind a beginning of which all of [`HEAD`] is there.
fn vmdesc_len(buf: &[u8], begin: usize) -> usize {
    let mut reader = Reader::new(&buf[begin + 2..]);
    reader.u32().map_or(usize::MAX / 2, |len| len as usize)
}

/// Where main ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TailEnd {
    /// Where the end-of-state byte stands; device state ends before it.
    pub eof_at: usize,
    /// Where the description stands.
    pub json: Range<usize>,
}

/// Bytes in front of the JSON: end of state, type, length.
pub(super) const HEAD: usize = 6;
