//! The body of a device section: a length, a format number, and tagged fields.
//!
//! ```text
//! length u32 | format u16 | { tag u16 | length u32 | bytes } …        big-endian; `length` counts what follows it
//! ```
//!
//! The length in front is what lets the reader stop exactly at the end. Fields may come in any order, each once; a
//! reader takes the ones it knows, and refuses the body for one that it does not know, since state that nobody restores
//! is state lost.

use std::{
    collections::BTreeMap,
    io::{self, Read},
};

/// A body that is being written.
#[derive(Debug)]
pub struct BodyWriter {
    bytes: Vec<u8>,
}

impl BodyWriter {
    /// An empty body in format `format`.
    pub fn new(format: u16) -> BodyWriter {
        let mut bytes = vec![0; 4];
        bytes.extend(format.to_be_bytes());
        BodyWriter { bytes }
    }

    /// Adds a field. The tag has not been used in this body, and the field is shorter than 4 GiB.
    #[must_use]
    pub fn field(mut self, tag: u16, bytes: &[u8]) -> BodyWriter {
        let len = u32::try_from(bytes.len()).expect("fields are small");
        self.bytes.extend(tag.to_be_bytes());
        self.bytes.extend(len.to_be_bytes());
        self.bytes.extend(bytes);
        self
    }

    /// Adds a number as a field.
    #[must_use]
    pub fn number(self, tag: u16, number: u64) -> BodyWriter {
        self.field(tag, &number.to_be_bytes())
    }

    /// The whole body.
    pub fn finish(mut self) -> Vec<u8> {
        let len = u32::try_from(self.bytes.len() - 4).expect("bodies are small");
        self.bytes[..4].copy_from_slice(&len.to_be_bytes());
        self.bytes
    }
}

/// A body that was read.
#[derive(Debug, PartialEq, Eq)]
pub struct Body {
    fields: BTreeMap<u16, Vec<u8>>,
}

impl Body {
    /// Reads a body to its end and no further.
    ///
    /// # Errors
    /// A body longer than `limit`, of another format, or whose fields do not fit into it; the reader's error.
    pub fn read(input: &mut dyn Read, format: u16, limit: usize) -> Result<Body, BodyError> {
        let mut word = [0; 4];
        input.read_exact(&mut word)?;
        let len = u32::from_be_bytes(word) as usize;
        if len > limit {
            return Err(BodyError::TooLong { len, limit });
        }
        // Grows as bytes arrive: a length alone allocates nothing.
        let mut bytes = Vec::new();
        input.take(len as u64).read_to_end(&mut bytes)?;
        if bytes.len() < len {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        Body::parse(&bytes, format)
    }

    fn parse(bytes: &[u8], expected: u16) -> Result<Body, BodyError> {
        let (&found, mut rest) = bytes.split_first_chunk::<2>().ok_or(BodyError::CutShort)?;
        let found = u16::from_be_bytes(found);
        if found != expected {
            return Err(BodyError::Format { found, expected });
        }
        let mut fields = BTreeMap::new();
        while !rest.is_empty() {
            let (&tag, after_tag) = rest.split_first_chunk::<2>().ok_or(BodyError::CutShort)?;
            let (&len, after_len) = after_tag.split_first_chunk::<4>().ok_or(BodyError::CutShort)?;
            let (tag, len) = (u16::from_be_bytes(tag), u32::from_be_bytes(len) as usize);
            let (field, after) = after_len.split_at_checked(len).ok_or(BodyError::CutShort)?;
            if fields.insert(tag, field.to_vec()).is_some() {
                return Err(BodyError::Twice { tag });
            }
            rest = after;
        }
        Ok(Body { fields })
    }

    /// Takes a field out.
    ///
    /// # Errors
    /// There is none with this tag.
    pub fn take(&mut self, tag: u16) -> Result<Vec<u8>, BodyError> {
        self.fields.remove(&tag).ok_or(BodyError::Missing { tag })
    }

    /// Takes a number out.
    ///
    /// # Errors
    /// There is none with this tag, or it does not have 8 bytes.
    pub fn take_number(&mut self, tag: u16) -> Result<u64, BodyError> {
        let bytes = self.take(tag)?;
        let bytes = <[u8; 8]>::try_from(bytes).map_err(|bytes| BodyError::Length { tag, found: bytes.len() })?;
        Ok(u64::from_be_bytes(bytes))
    }

    /// Ends the reading.
    ///
    /// # Errors
    /// There is a field that was not taken.
    pub fn finish(self) -> Result<(), BodyError> {
        self.fields.first_key_value().map_or(Ok(()), |(&tag, _)| Err(BodyError::Unknown { tag }))
    }
}

/// Why a body is refused.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// It is longer than its kind can be.
    #[error("a body of {len} bytes, where at most {limit} are possible")]
    TooLong {
        /// What it says.
        len: usize,
        /// What is possible.
        limit: usize,
    },
    /// It ends within a field.
    #[error("the body ends within a field")]
    CutShort,
    /// It is in another format.
    #[error("the body is in format {found}; this program reads {expected}")]
    Format {
        /// The body's.
        found: u16,
        /// Ours.
        expected: u16,
    },
    /// A field comes twice.
    #[error("field {tag} comes twice")]
    Twice {
        /// The field.
        tag: u16,
    },
    /// A field is not there.
    #[error("field {tag} is missing")]
    Missing {
        /// The field.
        tag: u16,
    },
    /// A field has a length that it cannot have.
    #[error("field {tag} has {found} bytes, which it cannot have")]
    Length {
        /// The field.
        tag: u16,
        /// What it has.
        found: usize,
    },
    /// There is a field that this program does not know.
    #[error("field {tag} is unknown to this program")]
    Unknown {
        /// The field.
        tag: u16,
    },
    /// The bytes could not be read.
    #[error(transparent)]
    Io(#[from] io::Error),
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_body_is_read_to_its_end_and_no_further() {
        let mut bytes = BodyWriter::new(3).field(1, b"one").number(2, 77).finish();
        bytes.extend(b"next section");
        let mut input = &bytes[..];
        let mut body = Body::read(&mut input, 3, 100).unwrap();
        assert_eq!(input, b"next section");
        assert_eq!(body.take(1).unwrap(), b"one");
        assert_eq!(body.take_number(2).unwrap(), 77);
        body.finish().unwrap();
    }

    #[test]
    fn each_way_to_be_wrong_has_its_error() {
        let read = |bytes: &[u8], limit| Body::read(&mut &*bytes, 3, limit);
        let good = BodyWriter::new(3).field(1, b"one").finish();
        assert!(matches!(read(&good, 5), Err(BodyError::TooLong { len: 11, limit: 5 })));
        assert!(matches!(read(&good[..8], 100), Err(BodyError::Io(_))));
        assert!(matches!(Body::read(&mut &good[..], 4, 100), Err(BodyError::Format { found: 3, expected: 4 })));
        let mut longer = good.clone();
        longer[9] = 4;
        assert!(matches!(read(&longer, 100), Err(BodyError::CutShort)));
        let twice = BodyWriter::new(3).field(1, b"").field(1, b"").finish();
        assert!(matches!(read(&twice, 100), Err(BodyError::Twice { tag: 1 })));
        let mut body = read(&good, 100).unwrap();
        assert!(matches!(body.take(2), Err(BodyError::Missing { tag: 2 })));
        assert!(matches!(body.take_number(1), Err(BodyError::Length { tag: 1, found: 3 })));
        assert!(matches!(read(&good, 100).unwrap().finish(), Err(BodyError::Unknown { tag: 1 })));
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_body_or_an_error(bytes: Vec<u8>, limit in 0usize..200) {
            let _ = Body::read(&mut &bytes[..], 1, limit);
            let _ = Body::parse(&bytes, 1);
        }
    }
}
