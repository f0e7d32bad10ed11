//! Collects device state, as sections that an inspector can cut apart again, and sends it piece by piece.

use std::io::{self, Read, Write};

use multifd_proto::{
    BlockName,
    command::{BodyLength, Command},
    device_state::{HEAD_LEN, MAX_STATE},
    encoder::MainEncoder,
    stream::{Section, SectionKind},
    vmdesc::{OpaqueSection, VmDescription},
};

use crate::{destination::STATE_WINDOW, section_body::chunk_head, vm::VmError};

/// Takes the device state of a VM, one section after the other, in the order in which it is to be loaded. Passed to
/// [`SourceVm::save`](crate::vm::SourceVm::save).
///
/// What is added is sent in pieces of some 64 KiB, and not kept, unless the VM
/// [writes memory](crate::vm::SourceVm::save_writes_memory) while it is asked: then all of it waits for the last pages. Between two ends
/// of this version a section of more than 1 MiB that `save` adds travels over the channels, and where the destination is far away (a round
/// trip of 1 ms and more) one of more than 512 bytes.
pub struct Sections<'a> {
    /// Not sent yet.
    encoder: MainEncoder,
    /// Sends what it is given; `None` where all is kept.
    send: Option<Piecewise<'a>>,
    /// Takes large sections to the channels; `None` where everything stays on main.
    channels: Option<Channels<'a>>,
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

/// Sends state in packets on the channels.
pub(crate) trait StatePackets {
    /// A buffer with [`HEAD_LEN`] bytes in it, behind which the state goes.
    fn buffer(&mut self) -> io::Result<Vec<u8>>;

    /// Sends the state in `packet`, a part of the section `name` and `instance`, after all that were sent before.
    fn send(&mut self, name: &str, instance: u32, packet: Vec<u8>);

    /// Main is about to speak of all that were sent.
    fn told(&mut self) {}

    /// `buffer` is not needed.
    fn give_back(&mut self, buffer: Vec<u8>);
}

/// Which state goes over the channels, and in what packets.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Packing {
    /// The most state of a section that stays on main.
    pub(crate) on_main: usize,
    /// The most state in a packet.
    pub(crate) packet: usize,
}

impl Packing {
    /// Near, main is as fast as a channel.
    pub(crate) const NEAR: Packing = Packing { on_main: PACKET_STATE, packet: PACKET_STATE };
    /// Far away main, which has carried next to nothing before the pause, takes a round trip for each few packets, and the channels have found
    /// the speed of the path. Each has a part of it only, so packets are short enough for all of them to have some.
    pub(crate) const FAR: Packing = match cfg!(any(loom, shuttle)) {
        true => Packing { on_main: 3, packet: 5 },
        false => Packing { on_main: 512, packet: 64 << 10 },
    };
}

/// Sends one piece after the other.
type Piecewise<'a> = &'a mut dyn FnMut(&[u8]) -> io::Result<()>;

impl<'a> Sections<'a> {
    /// Keeps everything.
    pub(crate) fn kept(terms: Terms) -> Sections<'a> {
        let (encoder, next_id, devices) = (MainEncoder::default(), RAM_SECTION + 1, Vec::new());
        Sections {
            encoder,
            send: None,
            channels: None,
            next_id,
            devices,
            replayed: None,
            open: false,
            terms,
            room: u64::MAX,
        }
    }

    /// Passes on what it gets to `send`, in pieces.
    pub(crate) fn sent(terms: Terms, send: Piecewise<'a>) -> Sections<'a> {
        Sections { send: Some(send), ..Sections::kept(terms) }
    }

    /// Takes at most `room` bytes of state.
    pub(crate) fn with_room(self, room: u64) -> Sections<'a> {
        Sections { room, ..self }
    }

    /// Sends sections that `packing` does not leave on main by `packets`.
    pub(crate) fn with_packets(self, packets: &'a mut dyn StatePackets, packing: Packing) -> Sections<'a> {
        Sections { channels: Some(Channels { packets, packing, untold: 0, untold_bytes: 0 }), ..self }
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
    /// A name that is empty or longer than 255 bytes; a section before that was not written to its end; the connection's.
    pub fn section(&mut self, name: &str, instance: u32, version: u32, body: &[u8]) -> io::Result<()> {
        self.may_begin()?;
        if self.is_for_channels(body.len()) {
            let mut out = self.packeted(name, instance, version, Some(body.len() as u64))?;
            out.write_all(body)?;
            return out.finish();
        }
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
        self.may_begin()?;
        if self.is_for_channels(body.len() + 8) {
            let mut out = self.packeted(name, instance, version, Some(body.len() as u64 + 8))?;
            out.write_all(&(body.len() as u64).to_be_bytes())?;
            out.write_all(body)?;
            return out.finish();
        }
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
        self.may_begin()?;
        if self.channels.is_some() {
            let mut out = self.packeted(name, instance, version, None)?;
            write(&mut out)?;
            return Ok(out.finish()?);
        }
        self.begin(name, instance, version, BodyLength::Chunks)?;
        let mut body = Body { chunk: Vec::new(), len: 0, sections: self };
        write(&mut body)?;
        let len = body.finish()?;
        Ok(self.end(name, instance, version, len)?)
    }

    /// Sends device sections exactly as they were received, with the vmdescription that belongs to them, by a source that adds
    /// none with [`section`](Self::section): both together end the migration with an error. A second call replaces what the first one
    /// gave. An empty description is left out.
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
        self.may_begin()?;
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

    /// Whether the section before was written to its end: else what follows would be read as more of it, also where the VM went on after
    /// that failed.
    fn may_begin(&self) -> io::Result<()> {
        match self.open {
            true => Err(io::Error::other("the state of a device was not written to its end")),
            false => Ok(()),
        }
    }

    /// Whether `len` bytes of state go over the channels.
    fn is_for_channels(&self, len: usize) -> bool {
        self.channels.as_ref().is_some_and(|channels| len > channels.packing.on_main)
    }

    /// Begins a section whose state is sent in packets, if it is [for the channels](Self::is_for_channels).
    fn packeted<'s, 'n>(
        &'s mut self,
        name: &'n str,
        instance: u32,
        version: u32,
        len: Option<u64>,
    ) -> io::Result<Packeted<'s, 'a, 'n>> {
        check_name(name)?;
        self.open = true;
        Ok(Packeted { sections: self, name, instance, version, len, packet: Vec::new(), sent: 0 })
    }

    fn begin(&mut self, name: &str, instance: u32, version: u32, len: BodyLength) -> io::Result<()> {
        check_name(name)?;
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
        self.take_room(bytes.len())?;
        self.body(bytes)
    }

    fn take_room(&mut self, len: usize) -> io::Result<()> {
        let Some(room) = self.room.checked_sub(len as u64) else {
            let text = "more state than there is room for in one round";
            return Err(io::Error::new(io::ErrorKind::QuotaExceeded, text));
        };
        self.room = room;
        Ok(())
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
            if let Some(channels) = &mut self.channels {
                channels.packets.told();
                (channels.untold, channels.untold_bytes) = (0, 0);
            }
            send(&self.encoder.bytes)?;
            self.encoder.bytes.clear();
        }
        Ok(())
    }
}

/// The way to the channels.
struct Channels<'a> {
    packets: &'a mut dyn StatePackets,
    packing: Packing,
    /// Packets on their way of which main has not spoken, and bytes in them.
    untold: u64,
    untold_bytes: usize,
}

/// The body of a section that goes over the channels, unless it is so short that it stays on main: then its length is known.
struct Packeted<'s, 'a, 'n> {
    sections: &'s mut Sections<'a>,
    name: &'n str,
    instance: u32,
    version: u32,
    /// Bytes of state, where they are known.
    len: Option<u64>,
    /// The packet that is being filled; empty where there is none.
    packet: Vec<u8>,
    /// Packets so far. With the first, the section begins on main.
    sent: u64,
}

impl<'a> Packeted<'_, 'a, '_> {
    fn channels(&mut self) -> &mut Channels<'a> {
        self.sections.channels.as_mut().expect("only then it is made")
    }

    /// Sends the packet, and says on main that it comes.
    fn send_packet(&mut self) -> io::Result<()> {
        if self.sent == 0 {
            self.sections.begin(self.name, self.instance, self.version, BodyLength::Packets(self.len))?;
        }
        let packet = std::mem::take(&mut self.packet);
        let len = packet.len() - HEAD_LEN;
        let head = chunk_head(u32::try_from(len).expect("a packet has at most PACKET_STATE bytes"));
        let (name, instance) = (self.name, self.instance);
        let channels = self.channels();
        channels.packets.send(name, instance, packet);
        (channels.untold, channels.untold_bytes) = (channels.untold + 1, channels.untold_bytes + len);
        let is_due = channels.untold == MOST_UNTOLD || channels.untold_bytes >= PACKET_STATE;
        self.sent += 1;
        self.sections.body(&head)?;
        self.sections.send_from(if is_due { 1 } else { PIECE })
    }

    /// Ends the body.
    fn finish(mut self) -> io::Result<()> {
        let Packeted { name, instance, version, .. } = self;
        let state = self.packet.len().saturating_sub(HEAD_LEN);
        if self.sent > 0 || self.sections.is_for_channels(state) {
            if self.sent == 0 {
                self.len = Some(state as u64);
            }
            if !self.packet.is_empty() {
                self.send_packet()?;
            }
            self.sections.body(&chunk_head(0))?;
            let on_main = (self.sent + 1) * chunk_head(0).len() as u64;
            return self.sections.end(name, instance, version, on_main);
        }
        let packet = std::mem::take(&mut self.packet);
        let state = packet.get(HEAD_LEN..).unwrap_or_default();
        self.sections.begin(name, instance, version, BodyLength::Bytes(state.len() as u64))?;
        self.sections.body(state)?;
        self.sections.end(name, instance, version, state.len() as u64)?;
        if !packet.is_empty() {
            self.channels().packets.give_back(packet);
        }
        Ok(())
    }
}

impl Write for Packeted<'_, '_, '_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.is_empty() {
            return Ok(0);
        }
        let most = HEAD_LEN + self.channels().packing.packet;
        if self.packet.len() == most {
            self.send_packet()?;
        }
        if self.packet.is_empty() {
            self.packet = self.channels().packets.buffer()?;
        }
        let n = bytes.len().min(most - self.packet.len());
        self.sections.take_room(n)?;
        self.packet.extend_from_slice(&bytes[..n]);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The body of a section that is being written to main.
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

/// Section names follow the rules of block names.
fn check_name(name: &str) -> io::Result<()> {
    // As a block's.
    BlockName::new(name).map(drop).map_err(|_| {
        let text = format!("a section cannot be called {name:?}: a name has 1 to 255 bytes, and none of them is 0");
        io::Error::new(io::ErrorKind::InvalidInput, text)
    })
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
/// The most state in one packet on a channel. Under model checkers, which have no patience for a megabyte, a few bytes.
pub(crate) const PACKET_STATE: usize = if cfg!(any(loom, shuttle)) { 8 } else { MAX_STATE as usize };
/// So many packets may be on their way before main speaks of them. The destination has room for twice as many.
const MOST_UNTOLD: u64 = STATE_WINDOW / 2;
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

    /// The state that followed was read as more of the state that was not complete, and without lengths on the wire neither side noticed.
    #[test]
    fn nothing_follows_a_section_that_was_not_written_to_its_end() {
        for says_lengths in [false, true] {
            let mut out = Sections::kept(Terms { says_lengths, ..Terms::default() });
            let mut write = |out: &mut dyn Write| -> Result<(), VmError> {
                out.write_all(b"half")?;
                Err("the device does not answer".into())
            };
            assert!(out.section_from("first", 0, 1, &mut write).is_err());
            let expected = "the state of a device was not written to its end";
            assert_eq!(out.section("second", 0, 1, b"state").unwrap_err().to_string(), expected);
            assert_eq!(out.framed("second", 0, 1, b"state").unwrap_err().to_string(), expected);
            let again = out.section_from("second", 0, 1, &mut |_| Ok(()));
            assert_eq!(again.unwrap_err().to_string(), expected);
            assert_eq!(out.into_parts(4096).unwrap_err().to_string(), expected);
        }
    }

    /// It was said to be the name of a block.
    #[test]
    fn a_name_that_no_section_can_have_is_said_to_be_one() {
        for name in ["", "a\0b", &"n".repeat(256)] {
            let error = Sections::kept(Terms::default()).section(name, 0, 1, b"state").unwrap_err();
            assert!(error.to_string().starts_with("a section cannot be called"), "{error}");
        }
    }

    /// Keeps packets.
    #[derive(Default)]
    struct Kept(Vec<(String, u32, Vec<u8>)>);

    impl StatePackets for Kept {
        fn buffer(&mut self) -> io::Result<Vec<u8>> {
            Ok(vec![0; HEAD_LEN])
        }

        fn send(&mut self, name: &str, instance: u32, packet: Vec<u8>) {
            self.0.push((name.to_owned(), instance, packet[HEAD_LEN..].to_vec()));
        }

        fn give_back(&mut self, _buffer: Vec<u8>) {}
    }

    /// Everything after a SECTION_LENGTH or SECTION_PACKETS of `len`, up to the footer of the section `id`.
    fn section_of(len: BodyLength, id: u32, name: &str, body: &[u8]) -> Vec<u8> {
        let mut encoder = MainEncoder::default();
        let head = Section { kind: SectionKind::Full, id, name: name.to_owned(), instance: 4, version: 2 };
        encoder.command(&Command::SectionLength(len)).section(&head).raw(body).footer(id);
        encoder.bytes
    }

    #[test]
    fn only_sections_that_are_longer_than_a_packet_travel_in_packets_whole_and_in_order() {
        let long: Vec<u8> = (0..2 * PACKET_STATE + 7).map(|at| (at / 5) as u8).collect();
        let short = &long[..PACKET_STATE];
        let (mut main, mut kept) = (Vec::new(), Kept::default());
        let mut send = |piece: &[u8]| {
            main.extend_from_slice(piece);
            Ok(())
        };
        let terms = Terms { says_lengths: true, ..Terms::default() };
        let mut out = Sections::sent(terms, &mut send).with_packets(&mut kept, Packing::NEAR);
        out.section("known", 4, 2, &long).unwrap();
        out.section("short", 4, 2, short).unwrap();
        out.section_from("written", 4, 2, &mut |out| Ok(long.chunks(999).try_for_each(|part| out.write_all(part))?))
            .unwrap();
        out.section_from("fits", 4, 2, &mut |out| Ok(out.write_all(short)?)).unwrap();
        out.section_from("none", 4, 2, &mut |_| Ok(())).unwrap();
        out.framed("framed", 4, 2, short).unwrap();
        let (rest, _) = out.into_parts(4096).unwrap();
        main.extend_from_slice(&rest);

        let heads = |lens: &[usize]| lens.iter().flat_map(|&len| chunk_head(len as u32)).collect::<Vec<u8>>();
        let three = heads(&[PACKET_STATE, PACKET_STATE, 7, 0]);
        let (len, whole) = (Some(long.len() as u64), BodyLength::Bytes(PACKET_STATE as u64));
        let expected = [
            section_of(BodyLength::Packets(len), 2, "known", &three),
            section_of(whole, 3, "short", short),
            section_of(BodyLength::Packets(None), 4, "written", &three),
            section_of(whole, 5, "fits", short),
            section_of(BodyLength::Bytes(0), 6, "none", b""),
            section_of(BodyLength::Packets(Some(PACKET_STATE as u64 + 8)), 7, "framed", &heads(&[PACKET_STATE, 8, 0])),
        ];
        assert!(main == expected.concat());
        let of = |name: &str| {
            let parts = kept.0.iter().filter(|(section, instance, _)| section == name && *instance == 4);
            parts.flat_map(|(_, _, state)| state.clone()).collect::<Vec<u8>>()
        };
        assert!(kept.0.len() == 8 && of("known") == long && of("written") == long);
        assert!(of("framed") == [&(short.len() as u64).to_be_bytes()[..], short].concat());
    }

    /// Main speaks of them before there are more than the destination has room for, and not of each by itself.
    #[test]
    fn far_away_short_sections_travel_in_short_packets_of_which_main_speaks_now_and_then() {
        let Packing { on_main, packet } = Packing::FAR;
        let long: Vec<u8> = (0..40 * packet + 7).map(|at| (at / 5) as u8).collect();
        let (mut told, mut kept) = (Vec::new(), Kept::default());
        let mut send = |piece: &[u8]| {
            told.push(piece.to_vec());
            Ok(())
        };
        let terms = Terms { says_lengths: true, ..Terms::default() };
        let mut out = Sections::sent(terms, &mut send).with_packets(&mut kept, Packing::FAR);
        out.section("stays", 4, 2, &long[..on_main]).unwrap();
        out.section("travels", 4, 2, &long[..on_main + 1]).unwrap();
        out.section_from("written", 4, 2, &mut |out| Ok(out.write_all(&long[..on_main + 1])?)).unwrap();
        out.section("long", 4, 2, &long).unwrap();
        let (rest, _) = out.into_parts(4096).unwrap();

        let heads = |lens: &[usize]| lens.iter().flat_map(|&len| chunk_head(len as u32)).collect::<Vec<u8>>();
        let one = heads(&[on_main + 1, 0]);
        let mut all = vec![packet; 40];
        all.extend([7, 0]);
        let packets = |len: usize| BodyLength::Packets(Some(len as u64));
        let expected = [
            section_of(BodyLength::Bytes(on_main as u64), 2, "stays", &long[..on_main]),
            section_of(packets(on_main + 1), 3, "travels", &one),
            // All of it is there before it is sent.
            section_of(packets(on_main + 1), 4, "written", &one),
            section_of(packets(long.len()), 5, "long", &heads(&all)),
        ];
        assert!([told.concat(), rest].concat() == expected.concat());
        assert_eq!(kept.0.iter().map(|(.., state)| state.len()).max(), Some(packet));
        assert!(kept.0.iter().flat_map(|(.., state)| state.clone()).skip(2 * (on_main + 1)).eq(long));
        assert_eq!((kept.0.len(), told.len()), (43, 43 / MOST_UNTOLD as usize));
    }

    #[test]
    fn a_section_in_packets_that_was_not_written_to_its_end_makes_no_stream() {
        let mut kept = Kept::default();
        let mut send = |_: &[u8]| Ok(());
        let terms = Terms { says_lengths: true, ..Terms::default() };
        let mut out = Sections::sent(terms, &mut send).with_packets(&mut kept, Packing::NEAR);
        let fails = |out: &mut dyn Write| -> Result<(), VmError> {
            out.write_all(b"half")?;
            Err("the device is busy".into())
        };
        assert!(out.section_from("cpu", 0, 1, &mut { fails }).is_err());
        assert!(out.into_parts(4096).is_err());
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
