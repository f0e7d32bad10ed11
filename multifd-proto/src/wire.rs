//! Big-endian reading and writing over slices.
//!
//! [`Reader`] never reads past its slice and never allocates: when bytes are missing it says how many ([`Short`]), so the
//! caller can fetch them and start the same element again. [`Writer`] appends to a `Vec` the caller owns and reuses.

use crate::violation::{DecodeError, Mismatch, ProtocolError, Violation};

/// Reads big-endian integers and strings from the front of a slice.
#[derive(Debug, Clone)]
pub(crate) struct Reader<'a> {
    bytes: &'a [u8],
    /// `0 <= position <= bytes.len()`
    position: usize,
}

impl<'a> Reader<'a> {
    /// A reader at the start of `bytes`.
    pub(crate) const fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, position: 0 }
    }

    /// One byte.
    pub(crate) fn u8(&mut self) -> Result<u8, Short> {
        self.array::<1>().map(|[byte]| byte)
    }

    /// A 16-bit integer.
    pub(crate) fn u16(&mut self) -> Result<u16, Short> {
        self.array().map(u16::from_be_bytes)
    }

    /// A 32-bit integer.
    pub(crate) fn u32(&mut self) -> Result<u32, Short> {
        self.array().map(u32::from_be_bytes)
    }

    /// A 64-bit integer.
    pub(crate) fn u64(&mut self) -> Result<u64, Short> {
        self.array().map(u64::from_be_bytes)
    }

    /// The next `n` bytes, borrowed. On error nothing is consumed.
    pub(crate) fn bytes(&mut self, n: usize) -> Result<&'a [u8], Short> {
        let rest = &self.bytes[self.position..];
        let Some(taken) = rest.get(..n) else {
            return Err(Short { needed: n - rest.len() });
        };
        self.position += n;
        Ok(taken)
    }

    /// The next `N` bytes by value. On error nothing is consumed.
    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], Short> {
        self.bytes(N).map(|bytes| bytes.try_into().expect("bytes(N) is N long"))
    }

    /// A length byte and that many bytes, without the length. On error nothing is consumed.
    pub(crate) fn pstr(&mut self) -> Result<&'a [u8], Short> {
        let start = self.position;
        let len = self.u8()?;
        self.bytes(usize::from(len)).inspect_err(|_| self.position = start)
    }

    /// How many bytes have been consumed.
    pub(crate) const fn position(&self) -> usize {
        self.position
    }

    /// How many bytes are left.
    pub(crate) const fn remaining(&self) -> usize {
        self.bytes.len() - self.position
    }
}

/// Appends big-endian integers and strings to a buffer.
#[derive(Debug)]
pub(crate) struct Writer<'a> {
    out: &'a mut Vec<u8>,
}

impl<'a> Writer<'a> {
    /// A writer that appends to `out`.
    pub(crate) const fn new(out: &'a mut Vec<u8>) -> Self {
        Self { out }
    }

    /// Appends one byte.
    pub(crate) fn u8(&mut self, value: u8) -> &mut Self {
        self.bytes(&[value])
    }

    /// Appends a 16-bit integer.
    pub(crate) fn u16(&mut self, value: u16) -> &mut Self {
        self.bytes(&value.to_be_bytes())
    }

    /// Appends a 32-bit integer.
    pub(crate) fn u32(&mut self, value: u32) -> &mut Self {
        self.bytes(&value.to_be_bytes())
    }

    /// Appends a 64-bit integer.
    pub(crate) fn u64(&mut self, value: u64) -> &mut Self {
        self.bytes(&value.to_be_bytes())
    }

    /// Appends `bytes` as they are.
    pub(crate) fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.out.extend_from_slice(bytes);
        self
    }

    /// Appends a length byte and `bytes`.
    ///
    /// # Panics
    ///
    /// When `bytes` is longer than the 255 bytes that its length byte can say.
    pub(crate) fn pstr(&mut self, bytes: &[u8]) -> &mut Self {
        let len = u8::try_from(bytes.len()).expect("a pstr holds at most 255 bytes");
        self.u8(len).bytes(bytes)
    }
}

/// Too few bytes: `needed` more are required before progress is possible, perhaps not the last ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{needed} more bytes are needed")]
pub(crate) struct Short {
    /// At least this many bytes more; never 0.
    pub(crate) needed: usize,
}

/// What an incremental decoder made of the bytes it was shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step<T> {
    /// Show again from the same byte with at least this many bytes in total; always more than were shown.
    Need(usize),
    /// One complete element.
    Item {
        /// The element.
        item: T,
        /// How many bytes of the input it took.
        used: usize,
    },
}

impl<T> Step<T> {
    /// The same step with its item changed by `f`.
    pub fn map<U>(self, f: impl FnOnce(T) -> U) -> Step<U> {
        match self {
            Self::Need(total) => Step::Need(total),
            Self::Item { item, used } => Step::Item { item: f(item), used },
        }
    }
}

/// What is a number of bytes on the wire, whose end they tell.
pub trait Codec: Sized {
    /// The value at the start of `input`, or how many bytes are needed.
    ///
    /// # Errors
    /// The bytes break a rule of the format, or exceed a limit.
    fn decode(input: &[u8]) -> Result<Step<Self>, ProtocolError>;

    /// Appends the value.
    fn encode(&self, out: &mut Vec<u8>);
}

/// Why a decoder that reads straight down had to stop.
#[derive(Debug)]
pub(crate) enum Stop {
    /// Too few bytes so far.
    Short(Short),
    /// The bytes are refused.
    Refused(ProtocolError),
}

impl From<Short> for Stop {
    fn from(short: Short) -> Self {
        Self::Short(short)
    }
}

impl From<ProtocolError> for Stop {
    fn from(error: ProtocolError) -> Self {
        Self::Refused(error)
    }
}

impl From<DecodeError> for Stop {
    fn from(error: DecodeError) -> Self {
        Self::Refused(error.into())
    }
}

impl From<Violation> for Stop {
    fn from(error: Violation) -> Self {
        Self::Refused(error.into())
    }
}

impl From<Mismatch> for Stop {
    fn from(error: Mismatch) -> Self {
        Self::Refused(error.into())
    }
}

/// Runs `decode` at the start of `input` and turns a lack of bytes into [`Step::Need`].
pub(crate) fn step<'a, T>(
    input: &'a [u8],
    decode: impl FnOnce(&mut Reader<'a>) -> Result<T, Stop>,
) -> Result<Step<T>, ProtocolError> {
    let mut reader = Reader::new(input);
    match decode(&mut reader) {
        Ok(item) => Ok(Step::Item { item, used: reader.position() }),
        Err(Stop::Short(Short { needed })) => Ok(Step::Need(input.len() + needed)),
        Err(Stop::Refused(error)) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_are_big_endian() {
        let mut out = Vec::new();
        Writer::new(&mut out).u8(1).u16(0x0203).u32(0x0405_0607).u64(0x0809_0a0b_0c0d_0e0f).pstr(b"ram");
        assert_eq!(out, b"\x01\x02\x03\x04\x05\x06\x07\x08\x09\x0a\x0b\x0c\x0d\x0e\x0f\x03ram");
        let mut reader = Reader::new(&out);
        assert_eq!(reader.u8(), Ok(1));
        assert_eq!(reader.u16(), Ok(0x0203));
        assert_eq!(reader.u32(), Ok(0x0405_0607));
        assert_eq!(reader.u64(), Ok(0x0809_0a0b_0c0d_0e0f));
        assert_eq!(reader.pstr(), Ok(&b"ram"[..]));
        assert_eq!((reader.position(), reader.remaining()), (out.len(), 0));
    }

    #[test]
    fn missing_bytes_are_counted_and_nothing_is_consumed() {
        let mut reader = Reader::new(b"\x05ra");
        assert_eq!(reader.u64(), Err(Short { needed: 5 }));
        assert_eq!(reader.pstr(), Err(Short { needed: 3 }));
        assert_eq!(reader.position(), 0);
        assert_eq!(Reader::new(b"").pstr(), Err(Short { needed: 1 }));
    }

    #[test]
    #[should_panic(expected = "255 bytes")]
    fn a_string_that_its_length_byte_cannot_describe_is_not_written() {
        Writer::new(&mut Vec::new()).pstr(&[b'x'; 256]);
    }
}
