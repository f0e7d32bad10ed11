//! Where the body of a device's section ends, when the source says so: see [`BodyLength`].

use multifd_proto::{Violation, command::BodyLength};

/// Follows one body to its end. It keeps no bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BodyCursor {
    /// Bytes that are left of the body, or of the chunk.
    left: u64,
    /// No chunk follows what is left.
    last: bool,
    /// The bytes of chunks are on channels: only their heads come here.
    elsewhere: bool,
}

/// What comes next of a body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BodyPart {
    /// So many bytes of the state, at least one.
    State(u64),
    /// The head of a chunk, of [`CHUNK_HEAD`] bytes: to be given to [`BodyCursor::chunk`].
    ChunkHead,
    /// Nothing: the body is over.
    End,
}

impl BodyCursor {
    /// At the first byte of a body of this length.
    pub(crate) const fn new(len: BodyLength) -> BodyCursor {
        match len {
            BodyLength::Bytes(left) => BodyCursor { left, last: true, elsewhere: false },
            BodyLength::Chunks => BodyCursor { left: 0, last: false, elsewhere: false },
            BodyLength::Packets(_) => BodyCursor { left: 0, last: false, elsewhere: true },
        }
    }

    /// What comes next.
    pub(crate) const fn next(&self) -> BodyPart {
        match self {
            BodyCursor { left: 0, last: true, .. } => BodyPart::End,
            BodyCursor { left: 0, last: false, .. } => BodyPart::ChunkHead,
            BodyCursor { left, .. } => BodyPart::State(*left),
        }
    }

    /// The head of a chunk was read.
    ///
    /// # Errors
    /// No chunk may begin here.
    pub(crate) fn chunk(&mut self, head: [u8; CHUNK_HEAD]) -> Result<(), Violation> {
        if self.next() != BodyPart::ChunkHead {
            return Err(Violation::UnexpectedElement {
                element: "chunk",
                place: "inside of another or after the last",
            });
        }
        let len = u64::from(u32::from_be_bytes(head));
        self.left = if self.elsewhere { 0 } else { len };
        self.last = len == 0;
        Ok(())
    }

    /// `len` bytes of the state were taken.
    ///
    /// # Panics
    /// They are more than come next.
    pub(crate) const fn taken(&mut self, len: u64) {
        assert!(len <= self.left, "a body is not read beyond its end");
        self.left -= len;
    }
}

/// The head of a chunk of `len` bytes; 0 ends a body.
pub(crate) const fn chunk_head(len: u32) -> [u8; CHUNK_HEAD] {
    len.to_be_bytes()
}

/// Bytes in the head of a chunk.
pub(crate) const CHUNK_HEAD: usize = 4;

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    #[test]
    fn a_body_of_known_length_ends_there() {
        let mut cursor = BodyCursor::new(BodyLength::Bytes(5));
        assert_eq!(cursor.next(), BodyPart::State(5));
        cursor.taken(2);
        assert!(cursor.chunk(chunk_head(1)).is_err(), "no chunk begins inside of a body");
        cursor.taken(3);
        assert_eq!(cursor.next(), BodyPart::End);
        assert!(cursor.chunk(chunk_head(1)).is_err());
        assert_eq!(BodyCursor::new(BodyLength::Bytes(0)).next(), BodyPart::End);
    }

    #[test]
    fn chunks_follow_each_other_until_one_is_empty() {
        let mut cursor = BodyCursor::new(BodyLength::Chunks);
        for len in [1, u32::MAX] {
            assert_eq!(cursor.next(), BodyPart::ChunkHead);
            cursor.chunk(chunk_head(len)).unwrap();
            assert_eq!(cursor.next(), BodyPart::State(len.into()));
            assert!(cursor.chunk(chunk_head(1)).is_err(), "a chunk ends before the next begins");
            cursor.taken(len.into());
        }
        cursor.chunk(chunk_head(0)).unwrap();
        assert_eq!(cursor.next(), BodyPart::End);
        assert!(cursor.chunk(chunk_head(1)).is_err(), "nothing follows the end");
    }

    #[test]
    fn of_chunks_that_are_on_channels_only_the_heads_come() {
        let mut cursor = BodyCursor::new(BodyLength::Packets(Some(5)));
        for len in [3, 2] {
            cursor.chunk(chunk_head(len)).unwrap();
            assert_eq!(cursor.next(), BodyPart::ChunkHead);
        }
        cursor.chunk(chunk_head(0)).unwrap();
        assert_eq!(cursor.next(), BodyPart::End);
    }
}
