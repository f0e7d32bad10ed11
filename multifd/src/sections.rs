//! Collects device state, as sections that an inspector can cut apart again, and sends it piece by piece.

use std::io::{self, Read, Write};

use multifd_proto::{
    BlockName,
    command::{BodyLength, Command},
    encoder::MainEncoder,
    stream::{Section, SectionKind},
    vmdesc::{OpaqueSection, VmDescription},
};

use crate::{section_body::chunk_head, vm::VmError};

/// Takes the device state of a VM, one section after the other, in the order in which it is to be loaded. Passed to
/// [`SourceVm::save`](crate::vm::SourceVm::save).
///
/// What is added is sent in pieces of some 64 KiB, and not kept, unless the VM
/// [writes memory](crate::vm::SourceVm::save_writes_memory) while it is asked: then all of it waits for the last pages.
pub struct Sections<'a> {
    /// Not sent yet.
    encoder: MainEncoder,
    /// Sends what it is given; `None` where all is kept.
    send: Option<Piecewise<'a>>,
    /// Id of the next section.
    next_id: u32,
    /// Name, instance, version and body length of each section.
    devices: Vec<(String, u32, u32, u64)>,
    /// Sections and vmdescription of another source, instead of all of the above.
    replayed: Option<(Vec<u8>, Vec<u8>)>,
    /// A section was begun and has not ended: nothing that follows could be read.
    open: bool,
    /// What the destination is told, and what it has.
    terms: Terms,
    /// Bytes of bodies that may still be added.
    room: u64,
}

/// What is agreed on about sections, and how often the VM was asked.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Terms {
    /// The destination is told where bodies end.
    pub(crate) says_lengths: bool,
    /// Calls of [`SourceVm::save_live`](crate::vm::SourceVm::save_live) before this one.
    pub(crate) live_rounds: u64,
}

/// Sends one piece after the other.
type Piecewise<'a> = &'a mut dyn FnMut(&[u8]) -> io::Result<()>;

impl<'a> Sections<'a> {
    /// Keeps everything.
    pub(crate) fn kept(terms: Terms) -> Sections<'a> {
        let (encoder, next_id, devices) = (MainEncoder::default(), RAM_SECTION + 1, Vec::new());
        Sections { encoder, send: None, next_id, devices, replayed: None, open: false, terms, room: u64::MAX }
    }

    /// Passes on what it gets to `send`, in pieces.
    pub(crate) fn sent(terms: Terms, send: Piecewise<'a>) -> Sections<'a> {
        Sections { send: Some(send), ..Sections::kept(terms) }
    }

    /// Takes at most `room` bytes of state.
    pub(crate) fn with_room(self, room: u64) -> Sections<'a> {
        Sections { room, ..self }
    }

    /// How often [`SourceVm::save_live`](crate::vm::SourceVm::save_live) has been called in this migration before this call. 0:
    /// the destination has no state yet, so what an earlier attempt has sent is to be sent again.
    pub fn live_rounds(&self) -> u64 {
        self.terms.live_rounds
    }

    /// How many bytes of state can still be added in this call: [`LIVE_ROOM`] to begin with in `save_live`, any number in `save`.
    pub fn room(&self) -> u64 {
        self.room
    }

    /// Adds the state of one device: `body` reaches
    /// [`DestinationVm::load`](crate::vm::DestinationVm::load) under the same name, instance and version.
    ///
    /// # Errors
    /// A name that is empty or longer than 255 bytes; the connection's.
    pub fn section(&mut self, name: &str, instance: u32, version: u32, body: &[u8]) -> io::Result<()> {
        self.begin(name, instance, version, BodyLength::Bytes(body.len() as u64))?;
        self.state(body)?;
        self.end(name, instance, version, body.len() as u64)
    }

    /// Adds the state of one device with its length before it, 64 bits, highest byte first: for a format that does not end by
    /// itself. [`read_framed`] reads it.
    ///
    /// # Errors
    /// As [`section`](Self::section).
    pub fn framed(&mut self, name: &str, instance: u32, version: u32, body: &[u8]) -> io::Result<()> {
        self.begin(name, instance, version, BodyLength::Bytes(body.len() as u64 + 8))?;
        self.state(&(body.len() as u64).to_be_bytes())?;
        self.state(body)?;
        self.end(name, instance, version, body.len() as u64 + 8)
    }

    /// Adds the state of one device as `write` writes it: it is sent in pieces, and never in memory as a whole.
    ///
    /// # Errors
    /// Those of [`section`](Self::section), and those of `write`. The migration cannot go on after either.
    pub fn section_from(
        &mut self,
        name: &str,
        instance: u32,
        version: u32,
        write: &mut dyn FnMut(&mut dyn Write) -> Result<(), VmError>,
    ) -> Result<(), VmError> {
        self.begin(name, instance, version, BodyLength::Chunks)?;
        let mut body = Body { chunk: Vec::new(), len: 0, sections: self };
        write(&mut body)?;
        let len = body.finish()?;
        Ok(self.end(name, instance, version, len)?)
    }

    /// Sends device sections exactly as they were received, with the vmdescription that belongs to them, by a source that adds
    /// none with [`section`](Self::section). An empty description is left out.
    pub fn replay(&mut self, sections: Vec<u8>, vmdescription: Vec<u8>) {
        self.replayed = Some((sections, vmdescription));
    }

    /// Whether sections of another source were added.
    pub(crate) fn is_replay(&self) -> bool {
        self.replayed.is_some()
    }

    /// What was not sent yet, as it stands on the wire, and the vmdescription.
    ///
    /// # Errors
    /// What was added makes no stream.
    pub(crate) fn into_parts(self, page_size: usize) -> io::Result<(Vec<u8>, Vec<u8>)> {
        if self.open {
            return Err(io::Error::other("the state of a device was not written to its end"));
        }
        if let Some(replayed) = self.replayed {
            return match self.devices.is_empty() {
                true => Ok(replayed),
                false => Err(io::Error::other("sections were replayed, and others added")),
            };
        }
        let described = self.devices.iter().map(|(name, instance, version, len)| OpaqueSection {
            name,
            instance: *instance,
            version: *version,
            len: *len,
        });
        let description = VmDescription::opaque(page_size as u64, described).to_json();
        Ok((self.encoder.bytes, description))
    }

    fn begin(&mut self, name: &str, instance: u32, version: u32, len: BodyLength) -> io::Result<()> {
        // Section names follow the rules of block names.
        BlockName::new(name).map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        self.open = true;
        if self.terms.says_lengths {
            self.encoder.command(&Command::SectionLength(len));
        }
        let head = Section { kind: SectionKind::Full, id: self.next_id, name: name.to_owned(), instance, version };
        self.encoder.section(&head);
        Ok(())
    }

    /// Adds `bytes` of state to the open section, as far as there is room for them.
    fn state(&mut self, bytes: &[u8]) -> io::Result<()> {
        let Some(room) = self.room.checked_sub(bytes.len() as u64) else {
            let text = "more state than there is room for in one round";
            return Err(io::Error::new(io::ErrorKind::QuotaExceeded, text));
        };
        self.room = room;
        self.body(bytes)
    }

    /// Adds `bytes` to the body of the open section. Long ones are not copied where they can be sent.
    fn body(&mut self, bytes: &[u8]) -> io::Result<()> {
        if bytes.len() < PIECE || self.send.is_none() {
            self.encoder.raw(bytes);
            return self.send_from(PIECE);
        }
        self.send_from(1)?;
        self.send.as_mut().map_or(Ok(()), |send| bytes.chunks(LONGEST).try_for_each(send))
    }

    fn end(&mut self, name: &str, instance: u32, version: u32, len: u64) -> io::Result<()> {
        self.encoder.footer(self.next_id);
        self.open = false;
        self.next_id += 1;
        self.devices.push((name.to_owned(), instance, version, len));
        self.send_from(PIECE)
    }

    /// Sends what was added, if it is at least `least` bytes.
    fn send_from(&mut self, least: usize) -> io::Result<()> {
        if let Some(send) = &mut self.send
            && self.encoder.bytes.len() >= least
        {
            send(&self.encoder.bytes)?;
            self.encoder.bytes.clear();
        }
        Ok(())
    }
}

/// The body of a section that is being written.
struct Body<'s, 'a> {
    sections: &'s mut Sections<'a>,
    /// What was written and is too short for a chunk of its own. Empty where there are no chunks.
    chunk: Vec<u8>,
    /// Bytes on the wire.
    len: u64,
}

impl Body<'_, '_> {
    /// Adds `bytes` as a chunk.
    fn add_chunk(&mut self, bytes: &[u8]) -> io::Result<()> {
        for part in bytes.chunks(LONGEST) {
            let head = chunk_head(u32::try_from(part.len()).expect("a part is short"));
            self.sections.body(&head)?;
            self.sections.state(part)?;
            self.len += (head.len() + part.len()) as u64;
        }
        Ok(())
    }

    /// Adds what is not in a chunk yet.
    fn add_rest(&mut self) -> io::Result<()> {
        let mut rest = std::mem::take(&mut self.chunk);
        self.add_chunk(&rest)?;
        rest.clear();
        self.chunk = rest;
        Ok(())
    }

    /// Ends the body. Returns its length on the wire.
    fn finish(mut self) -> io::Result<u64> {
        if self.sections.terms.says_lengths {
            self.add_rest()?;
            let end = chunk_head(0);
            self.sections.body(&end)?;
            self.len += end.len() as u64;
        }
        Ok(self.len)
    }
}

impl Write for Body<'_, '_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if !self.sections.terms.says_lengths {
            self.sections.state(bytes)?;
            self.len += bytes.len() as u64;
        } else if bytes.len() >= PIECE {
            self.add_rest()?;
            self.add_chunk(bytes)?;
        } else {
            self.chunk.extend_from_slice(bytes);
            if self.chunk.len() >= PIECE {
                self.add_rest()?;
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reads what [`Sections::framed`] wrote, of at most `limit` bytes.
///
/// # Errors
/// It is longer, which the peer says; what `input` runs into.
pub fn read_framed(input: &mut dyn Read, limit: u64) -> io::Result<Vec<u8>> {
    let mut len = [0; 8];
    input.read_exact(&mut len)?;
    let len = u64::from_be_bytes(len);
    if len > limit {
        let text = format!("the state of the device has {len} bytes, at most {limit} are taken");
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    let mut body = Vec::new();
    // It grows with what arrives, and not with what was said.
    match input.take(len).read_to_end(&mut body)? as u64 == len {
        true => Ok(body),
        false => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// The most bytes of state that one call of [`SourceVm::save_live`](crate::vm::SourceVm::save_live) may add: 256 MiB. A device with more
/// sends it over several rounds. The limit keeps a device that has no end of state from keeping a round open forever.
pub const LIVE_ROOM: u64 = 256 << 20;
/// The id of the `ram` section in streams that we write.
pub(crate) const RAM_SECTION: u32 = 1;
/// Bytes that are collected before they are sent.
const PIECE: usize = 64 << 10;
/// The most bytes that are sent at once: progress and the limit of silence see each.
const LONGEST: usize = 4 << 20;

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    /// Adds some sections of all sizes, in all ways.
    fn add(out: &mut Sections<'_>) {
        out.section("small", 0, 1, b"state").unwrap();
        out.section("large", 1, 2, &vec![7; 3 * PIECE]).unwrap();
        out.framed("framed", 0, 1, &[8; 100]).unwrap();
        let mut write = |out: &mut dyn Write| -> Result<(), VmError> {
            for part in 0..1000u32 {
                out.write_all(&part.to_be_bytes().repeat(100))?;
            }
            Ok(())
        };
        out.section_from("written", 0, 1, &mut write).unwrap();
    }

    #[test]
    fn sections_are_the_same_whether_they_are_kept_or_sent_in_pieces() {
        for says_lengths in [false, true] {
            let terms = Terms { says_lengths, ..Terms::default() };
            let mut kept = Sections::kept(terms);
            add(&mut kept);
            let kept = kept.into_parts(4096).unwrap();
            let (mut bytes, mut longest) = (Vec::new(), 0);
            let mut send = |piece: &[u8]| {
                longest = longest.max(piece.len());
                bytes.extend_from_slice(piece);
                Ok(())
            };
            let mut sent = Sections::sent(terms, &mut send);
            add(&mut sent);
            let (rest, description) = sent.into_parts(4096).unwrap();
            assert!(rest.len() < PIECE && longest < 4 * PIECE, "{longest}");
            bytes.extend_from_slice(&rest);
            assert!((bytes, description) == kept);
        }
    }

    #[test]
    fn no_more_state_is_taken_than_there_is_room_for() {
        for says_lengths in [false, true] {
            let terms = Terms { says_lengths, ..Terms::default() };
            let mut sent = 0;
            let mut send = |piece: &[u8]| {
                sent += piece.len();
                Ok(())
            };
            let mut out = Sections::sent(terms, &mut send).with_room(200_000);
            out.section("some", 0, 1, &[1; 50_000]).unwrap();
            assert_eq!(out.room(), 150_000);
            let mut endless = |out: &mut dyn Write| -> Result<(), VmError> {
                loop {
                    out.write_all(&[0; 1000])?;
                }
            };
            let error = out.section_from("endless", 0, 1, &mut endless).unwrap_err();
            assert!(error.to_string().starts_with("more state than"), "{error}");
            assert!(out.into_parts(4096).is_err(), "the section has no end");
            assert!(sent <= 201_000, "{sent}");
        }
    }

    #[test]
    fn a_section_that_was_not_written_to_its_end_makes_no_stream() {
        let mut out = Sections::kept(Terms::default());
        let fails = |out: &mut dyn Write| -> Result<(), VmError> {
            out.write_all(b"half")?;
            Err("the device is busy".into())
        };
        assert!(out.section_from("cpu", 0, 1, &mut { fails }).is_err());
        assert!(out.into_parts(4096).is_err());
        let mut out = Sections::kept(Terms::default());
        out.section("cpu", 0, 1, b"state").unwrap();
        out.replay(vec![1], vec![2]);
        assert!(out.into_parts(4096).is_err());
    }

    #[test]
    fn a_frame_ends_where_it_says_and_is_bounded() {
        let frame = [&5u64.to_be_bytes()[..], b"state", b"next"].concat();
        let mut input = &frame[..];
        assert_eq!(read_framed(&mut input, 5).unwrap(), b"state");
        assert_eq!(input, b"next");
        assert_eq!(read_framed(&mut &frame[..], 4).unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert_eq!(read_framed(&mut &frame[..12], 5).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        let endless = u64::MAX.to_be_bytes();
        assert_eq!(read_framed(&mut &endless[..], u64::MAX).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
