//! The body of a section of which the source says where it ends.

use std::io::{self, Read};

use multifd_proto::{command::BodyLength, encoder::MainEncoder, stream::Section};

use super::MainReader;
use crate::{
    checkpoint::{CheckpointError, MAX_DEVICE_STATE},
    error::Error,
    section_body::{BodyCursor, BodyPart, CHUNK_HEAD},
};

/// Gives the bytes of `inner` up to the end of the body, and not one more.
pub(super) struct BoundedBody<'a> {
    inner: &'a mut dyn Read,
    cursor: BodyCursor,
}

impl BoundedBody<'_> {
    pub(super) fn new(inner: &mut dyn Read, len: BodyLength) -> BoundedBody<'_> {
        BoundedBody { inner, cursor: BodyCursor::new(len) }
    }

    /// How many bytes of the state can be read at once; 0 at the end of the body.
    fn ready(&mut self) -> io::Result<u64> {
        loop {
            match self.cursor.next() {
                BodyPart::State(len) => return Ok(len),
                BodyPart::End => return Ok(0),
                BodyPart::ChunkHead => {
                    let mut head = [0; CHUNK_HEAD];
                    self.inner.read_exact(&mut head)?;
                    self.cursor.chunk(head).map_err(io::Error::other)?;
                }
            }
        }
    }

    /// Checks that the body was read to its end.
    ///
    /// # Errors
    /// There is more of it; what the connection ran into.
    pub(super) fn finish(mut self) -> io::Result<()> {
        match self.ready()? {
            0 => Ok(()),
            _ => Err(io::Error::new(io::ErrorKind::InvalidData, "the state has more bytes than were read")),
        }
    }
}

impl Read for BoundedBody<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if into.is_empty() {
            return Ok(0);
        }
        let most = usize::try_from(self.ready()?).unwrap_or(usize::MAX).min(into.len());
        if most == 0 {
            return Ok(0);
        }
        match self.inner.read(&mut into[..most])? {
            // A reader to the end would take this for one.
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            n => {
                self.cursor.taken(n as u64);
                Ok(n)
            }
        }
    }
}

/// Takes the body of `section` from `main` without a VM. Where it is to be kept, all of the section is put behind `kept`, its head and
/// footer too, up to the limit of device state.
pub(crate) fn take_bounded(
    main: &mut MainReader,
    section: &Section,
    len: BodyLength,
    mut kept: Option<&mut Vec<u8>>,
) -> Result<(), Error> {
    if let Some(kept) = &mut kept {
        kept.extend_from_slice(&MainEncoder::default().section(section).bytes);
    }
    let mut raw = main.body();
    let mut copied = Copied { inner: &mut raw, kept: kept.as_deref_mut(), is_full: false };
    let mut body = BoundedBody::new(&mut copied, len);
    let passed = io::copy(&mut body, &mut io::sink());
    if copied.is_full {
        return Err(CheckpointError::TooMuchDeviceState { limit: MAX_DEVICE_STATE }.into());
    }
    if let Err(source) = passed {
        let at = raw.place();
        return Err(raw.into_failure().unwrap_or(Error::Io { at, source }));
    }
    if let Some(kept) = kept {
        kept.extend_from_slice(&MainEncoder::default().footer(section.id).bytes);
    }
    Ok(())
}

/// Keeps what is read of `inner`.
struct Copied<'a> {
    inner: &'a mut dyn Read,
    kept: Option<&'a mut Vec<u8>>,
    /// There is more than may be kept.
    is_full: bool,
}

impl Read for Copied<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(into)?;
        if let Some(kept) = &mut self.kept {
            if kept.len() + n > MAX_DEVICE_STATE {
                self.is_full = true;
                return Err(io::ErrorKind::QuotaExceeded.into());
            }
            kept.extend_from_slice(&into[..n]);
        }
        Ok(n)
    }
}

/// The length, where the source knows it.
pub(super) const fn known(len: BodyLength) -> Option<u64> {
    match len {
        BodyLength::Bytes(len) | BodyLength::Packets(Some(len)) => Some(len),
        BodyLength::Chunks | BodyLength::Packets(None) => None,
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    /// Three bodies of the same state, with something behind each.
    fn bodies() -> [(BodyLength, &'static [u8]); 3] {
        [
            (BodyLength::Bytes(5), b"stateMORE"),
            (BodyLength::Chunks, b"\0\0\0\x02st\0\0\0\x03ate\0\0\0\0MORE"),
            (BodyLength::Chunks, b"\0\0\0\x05state\0\0\0\0MORE"),
        ]
    }

    #[test]
    fn a_body_is_read_to_its_end_and_no_further() {
        for (len, mut bytes) in bodies() {
            let mut body = BoundedBody::new(&mut bytes, len);
            let mut state = Vec::new();
            body.read_to_end(&mut state).unwrap();
            assert_eq!(state, b"state");
            assert_eq!(body.read(&mut [0; 8]).unwrap(), 0, "the end stays the end");
            body.finish().unwrap();
            assert_eq!(bytes, b"MORE");
        }
    }

    #[test]
    fn a_reader_that_knows_the_length_need_not_look_for_the_end() {
        for (len, mut bytes) in bodies() {
            let mut body = BoundedBody::new(&mut bytes, len);
            body.read_exact(&mut [0; 5]).unwrap();
            body.finish().unwrap();
            assert_eq!(bytes, b"MORE");
        }
    }

    #[test]
    fn what_is_left_unread_is_an_error() {
        for (len, mut bytes) in bodies() {
            let mut body = BoundedBody::new(&mut bytes, len);
            body.read_exact(&mut [0; 4]).unwrap();
            assert_eq!(body.finish().unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
    }

    #[test]
    fn a_body_that_is_cut_anywhere_is_not_taken_for_a_whole_one() {
        for (len, bytes) in bodies() {
            for cut in 0..bytes.len() - 4 {
                let mut bytes = &bytes[..cut];
                let mut body = BoundedBody::new(&mut bytes, len);
                let read = body.read_to_end(&mut Vec::new()).and_then(|_| body.finish());
                assert_eq!(read.unwrap_err().kind(), io::ErrorKind::UnexpectedEof, "{len:?} {cut}");
            }
        }
    }
}
