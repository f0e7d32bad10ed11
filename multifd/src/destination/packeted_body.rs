//! The body of a section that travels in device-state packets.

use std::io::{self, Read};

use multifd_proto::{Violation, stream::Section};

use super::{
    main_reader::SectionBody,
    state_window::{Part, StateWindow},
};
use crate::{error::Error, section_body::CHUNK_HEAD};

/// Gives the state in the packets that main names, in their order, and not one byte more.
pub(super) struct PacketedBody<'a, 'm> {
    /// Main, with the heads of chunks.
    heads: &'a mut SectionBody<'m>,
    window: &'a StateWindow,
    section: &'a Section,
    /// How much state there is, where the source has said so.
    said: Option<u64>,
    /// How much has come.
    found: u64,
    /// The packet that is being read, and how much of it was.
    part: Option<(Part, usize)>,
    is_over: bool,
    /// Why there was no more of it.
    failure: Option<Error>,
}

impl<'a, 'm> PacketedBody<'a, 'm> {
    pub(super) fn new(
        heads: &'a mut SectionBody<'m>,
        window: &'a StateWindow,
        section: &'a Section,
        said: Option<u64>,
    ) -> PacketedBody<'a, 'm> {
        PacketedBody { heads, window, section, said, found: 0, part: None, is_over: false, failure: None }
    }

    /// Checks that the body was read to its end.
    ///
    /// # Errors
    /// There is more of it; what the connections ran into.
    pub(super) fn finish(&mut self) -> io::Result<()> {
        match self.ready()? {
            [] => Ok(()),
            _ => Err(io::Error::new(io::ErrorKind::InvalidData, "the state has more bytes than were read")),
        }
    }

    /// What its reader ran into, if it was a channel or the peer: a better reason than what the reader made of it.
    pub(super) fn into_failure(self) -> Option<Error> {
        self.failure
    }

    /// What can be read at once; nothing at the end of the body.
    fn ready(&mut self) -> io::Result<&[u8]> {
        while !self.is_over && self.part.as_ref().is_none_or(|(part, used)| *used == part.state().len()) {
            if let Some((part, _)) = self.part.take() {
                self.window.give_back(part);
            }
            let mut head = [0; CHUNK_HEAD];
            self.heads.read_exact(&mut head)?;
            if let Err(error) = self.next(u32::from_be_bytes(head)) {
                let source = io::Error::other(error.to_string());
                self.failure = Some(error);
                return Err(source);
            }
        }
        Ok(self.part.as_ref().map_or(&[], |(part, used)| &part.state()[*used..]))
    }

    /// Main says that a packet with `len` bytes of state follows; with 0, that there is none.
    fn next(&mut self, len: u32) -> Result<(), Error> {
        let (found, place) = (self.found + u64::from(len), self.heads.place());
        if let Some(said) = self.said.filter(|said| found > *said || (len == 0 && found < *said)) {
            return Err(Error::protocol(place)(Violation::StateLength { said, found }));
        }
        self.found = found;
        if len == 0 {
            self.is_over = true;
            return Ok(());
        }
        let part = self.window.take(place)?;
        let Section { name, instance, .. } = self.section;
        let came = u32::try_from(part.state().len()).unwrap_or(u32::MAX);
        if (&part.name, part.instance, came) != (name, *instance, len) {
            return Err(Error::protocol(part.place)(Violation::StatePacketMismatch {
                number: part.number,
                len: came,
                name: part.name,
                instance: part.instance,
                said: format!("{len} bytes of {name:?} instance {instance}"),
            }));
        }
        self.part = Some((part, 0));
        Ok(())
    }
}

impl Read for PacketedBody<'_, '_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if into.is_empty() {
            return Ok(0);
        }
        let ready = self.ready()?;
        let n = ready.len().min(into.len());
        into[..n].copy_from_slice(&ready[..n]);
        if let Some((_, used)) = &mut self.part {
            *used += n;
        }
        Ok(n)
    }
}
