//! One receiving channel: takes packets, puts their pages into place, and meets the others behind each SYNC.
//!
//! It arrives there with the SYNC, and waits for the others only when more has come: the header of the next packet is read,
//! and checked, before. Who arrives early sleeps once, not twice.

use std::io;

use multifd_proto::{
    BlockName, ChannelId, Mismatch, ProtocolError, Violation,
    channel_end::{End, Meaning, Reached, meaning},
    device_state::{self, OpaquePacket, StatePacket},
    packet::{self, Compression, Hello, PREFIX_LEN, Prefix, RamPacket},
    rounds::{Party, Sync},
};

use super::{
    OpaqueSink, PageSink, Scratch,
    connections::Stage,
    greeting::{Refused, is_timeout, unlimited},
    shared::{Pages, Shared},
};
use crate::{
    channel_end::end_by,
    compress::Decompressor,
    error::{Connection, Error, Place},
    layout::Layout,
    round::trace::Step,
    sync::{Arc, Deadline, atomic::Ordering, lock},
    threads,
    transport::Stream,
};

/// What a channel's thread works with. The connection outlives it: that closes only when the thread's error is known as the
/// reason, because the source may act on the closed connection sooner than this thread.
pub(super) struct ReceiveChannel<'a> {
    id: ChannelId,
    hello: Hello,
    /// Which connection it is.
    number: usize,
    stream: &'a mut dyn Stream,
    shared: Arc<Shared>,
    /// The header of the current packet.
    header: Box<[u8]>,
    /// Bytes that were read into `header`: more than its length only where the packet has device state.
    filled: usize,
    /// Bytes at the beginning of `header` that belong to the next packet.
    ahead: usize,
    scratch: Scratch,
    payload: Vec<u8>,
    /// Whether a packet with content has come.
    payload_seen: bool,
    decompressors: Vec<(Compression, Decompressor)>,
    /// Offsets of the packet's pages.
    normal: Vec<u64>,
    zero: Vec<u64>,
    /// Bytes received; the hello is counted.
    received: u64,
    /// SYNCs taken: this channel's own count of rounds.
    rounds: u64,
    /// Packets with pages since the last SYNC.
    packets: u64,
    /// A part of a packet was read, and not all of it.
    within: bool,
    /// The round at whose end the channel has arrived, and which it has not seen to be over.
    arrived: Option<u64>,
    /// Set behind the first sync point.
    pages: Option<Pages>,
    /// The block of the packet before, and its position: most packets name the same one.
    block: Option<(String, usize)>,
}

impl<'a> ReceiveChannel<'a> {
    /// A channel that has said hello.
    pub(super) fn new(
        hello: Hello,
        number: usize,
        stream: &'a mut dyn Stream,
        shared: Arc<Shared>,
    ) -> ReceiveChannel<'a> {
        shared.pulse.add(packet::HELLO_LEN);
        threads::is_channel(number, hello.channel);
        ReceiveChannel {
            id: hello.channel,
            hello,
            number,
            stream,
            header: vec![0; packet::header_len(shared.page_size).max(device_state::HEAD_LEN)].into(),
            filled: 0,
            ahead: 0,
            shared,
            scratch: Scratch::default(),
            payload: Vec::new(),
            payload_seen: false,
            decompressors: Vec::new(),
            normal: Vec::new(),
            zero: Vec::new(),
            received: packet::HELLO_LEN as u64,
            rounds: 0,
            packets: 0,
            within: false,
            arrived: None,
            pages: None,
            block: None,
        }
    }

    /// Takes packets until the source ends the channel.
    ///
    /// # Errors
    /// The channel is a stranger's. The first packet that breaks a rule, with its place; the connection's;
    /// [`Error::Stopped`].
    pub(super) fn run(mut self) -> Result<(), Refused> {
        while !self.join()? {}
        let ended = loop {
            match self.packet() {
                Ok(true) => {}
                Ok(false) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        Ok(self.ends(ended)?)
    }

    /// Does what it means that the channel ended so.
    ///
    /// # Errors
    /// The migration ends with it.
    fn ends(&mut self, ended: Result<(), Error>) -> Result<(), Error> {
        let end = ended.as_ref().map_or_else(|error| end_by(error, self.within), |()| End::Clean);
        if matches!(end, End::Clean | End::Reset | End::Unreachable) && self.packets == 0 {
            // All that it has to bring of this round is there. Whether that was the last is known when the round is over.
            self.pass()?;
        }
        let reached = match () {
            () if self.shared.stop.is_decided() => Reached::Decided,
            () if self.shared.barrier.rounds_are_over() => Reached::LastSync,
            () => Reached::Rounds,
        };
        match (meaning(reached, end), ended) {
            (Meaning::Fatal | Meaning::Replace, Err(error)) | (_, Err(error @ Error::Stopped)) => Err(error),
            (_, ended) => {
                self.shared.opaque.channel_ended(ended.is_err().then(|| self.place()));
                if let Err(error) = ended {
                    tracing::debug!(channel = %self.id, %error, "a channel ends that has brought all");
                }
                self.shared.state.channel_ended(self.place());
                self.shared.barrier.leave(self.id, self.place())
            }
        }
    }

    /// Takes one packet before the channel has joined: it joins with its first SYNC, which comes before any page. Returns
    /// whether it has.
    fn join(&mut self) -> Result<bool, Refused> {
        let place = self.place();
        let header = match self.header() {
            // Nothing of it counts so far: another connection may come in its place.
            Ok(None) => return Err(self.stranger("ends before its first packet")),
            Err(Error::Io { source, .. }) if is_timeout(&source) && !self.within && self.shared.has_main() => {
                // Main has its own limits, and what a channel says first it says with main.
                unlimited(self.stream)?;
                return Ok(false);
            }
            Err(Error::Io { source, .. }) if is_timeout(&source) && !self.within => {
                return Err(self.stranger("says nothing more, and its main does not come"));
            }
            Err(Error::Io { source, .. }) => return Err(self.stranger(format!("breaks: {source}"))),
            other => other.map(Option::unwrap_or_default),
        };
        unlimited(self.stream)?;
        // Whose migration it is is known when main has said so.
        if !self.shared.await_identified(Deadline::after(self.shared.options.setup_timeout))? {
            return Err(self.stranger("is at its first packet, and its main does not come"));
        }
        let peer = self.stream.peer();
        self.shared.judge(&self.hello, &peer)?;
        let header_len = header?;
        let page_size = self.shared.page_size;
        if self.is_device_state() {
            let (element, at) = ("device-state packet", "before its first SYNC");
            return Err(Error::protocol(place)(Violation::UnexpectedElement { element, place: at }).into());
        }
        let packet = RamPacket::decode(&self.header[..header_len], page_size).map_err(Error::protocol(place))?;
        if !packet.is_empty() {
            return Err(Error::protocol(place)(Violation::PageBeforeFirstSync).into());
        }
        let (sync, number) = (packet.sync, packet.packet_num);
        self.received += header_len as u64;
        self.within = false;
        if !sync {
            return Ok(false);
        }
        let sync = Sync { number, packets: 0 };
        // First, because this may be the last channel: all connections that are not members are ended then.
        self.shared.connections.advance(self.number, Stage::Member);
        match self.shared.join(&self.hello, sync, self.place())? {
            Ok(round) => self.arrived = round,
            Err(why) => return Err(self.shared.refusal(why, &self.hello, &peer)),
        }
        self.shared.options.trace.step(|| Step::Arrive(Party::Channel(self.id)));
        self.shared.welcome(&self.hello);
        self.shared.state.channel_joined();
        self.shared.opaque.channel_joined();
        self.shared.progress.add_channel_bytes(self.id, self.received);
        self.rounds = 1;
        Ok(true)
    }

    fn stranger(&self, what: impl std::fmt::Display) -> Refused {
        Refused::Stranger(format!("says hello as channel {} and {what}", self.id))
    }

    /// Reads the header of the next packet; `None` at the end of the channel. Returns its length.
    fn header(&mut self) -> Result<Option<usize>, Error> {
        let place = self.place();
        let len = packet::header_len(self.shared.page_size);
        let mut filled = std::mem::take(&mut self.ahead);
        self.within |= filled > 0;
        while filled < PREFIX_LEN {
            match self.stream.read(&mut self.header[filled..len]).map_err(Error::io(place))? {
                0 if filled == 0 => return Ok(None),
                0 => return Err(Error::Io { at: self.place_at(filled), source: io::ErrorKind::UnexpectedEof.into() }),
                n => filled += n,
            }
            self.within = true;
        }
        let prefix = Prefix::decode(self.header.first_chunk().expect("longer than a prefix"));
        let prefix = prefix.map_err(Error::protocol(place))?;
        let header_len = prefix.header_len(self.shared.page_size);
        if filled < header_len {
            let at = self.place_at(filled);
            self.stream.read_exact(&mut self.header[filled..header_len]).map_err(Error::io(at))?;
        }
        self.filled = filled.max(header_len);
        Ok(Some(header_len))
    }

    /// Whether the header is one of device state.
    fn is_device_state(&self) -> bool {
        let prefix = Prefix::decode(self.header.first_chunk().expect("longer than a prefix"));
        prefix.is_ok_and(|prefix| prefix.device_state())
    }

    /// Takes one packet; `false` at the end of the channel.
    fn packet(&mut self) -> Result<bool, Error> {
        let place = self.place();
        let Some(header_len) = self.header()? else { return Ok(false) };
        self.pass()?;
        if self.is_device_state() {
            return self.state(place).map(|()| true);
        }
        let (sync, payload_len) = self.pages(place)?;
        let total = (header_len + payload_len) as u64;
        self.received += total;
        self.within = false;
        self.shared.pulse.add(header_len + payload_len);
        self.shared.progress.add_channel_bytes(self.id, total);
        if let Some(number) = sync {
            // Sources before QEMU 9.0 put pages into the packet with SYNC: they belong to the round that it ends, so they
            // were applied above.
            let sync = Sync { number, packets: std::mem::take(&mut self.packets) };
            self.shared.options.trace.step(|| Step::Arrive(Party::Channel(self.id)));
            self.shared.progress.channel_ends_round();
            self.arrived = self.shared.sync(self.id, sync, self.place())?;
            self.rounds += 1;
        }
        Ok(true)
    }

    /// Takes the device-state packet whose header is at `place`: its state is kept until main comes to its section. All pages are in
    /// place by then.
    fn state(&mut self, place: Place) -> Result<(), Error> {
        let window = self.shared.state.clone();
        if !window.is_agreed() {
            return match self.pages.as_ref().and_then(|pages| pages.opaque.clone()) {
                Some(sink) => self.opaque_state(&*sink, place),
                None => Err(Error::protocol(place)(device_state::device_state_refusal(&self.header))),
            };
        }
        if !self.shared.rounds_are_over() {
            let (element, at) = ("device-state packet", "before the last round is over");
            return Err(Error::protocol(place)(Violation::UnexpectedElement { element, place: at }));
        }
        if self.filled < device_state::HEAD_LEN {
            let at = self.place_at(self.filled);
            self.stream.read_exact(&mut self.header[self.filled..device_state::HEAD_LEN]).map_err(Error::io(at))?;
            self.filled = device_state::HEAD_LEN;
        }
        let StatePacket { name, instance, number, len } =
            StatePacket::decode(&self.header[..device_state::HEAD_LEN]).map_err(Error::protocol(place))?;
        let (name, len) = (name.to_owned(), len as usize);
        let mut room = window.room(number, place)?;
        let bytes = room.bytes(len);
        let behind = &self.header[device_state::HEAD_LEN..self.filled];
        let here = behind.len().min(len);
        bytes[..here].copy_from_slice(&behind[..here]);
        self.ahead = behind.len() - here;
        self.header.copy_within(device_state::HEAD_LEN + here..self.filled, 0);
        let at = self.place_at(device_state::HEAD_LEN + here);
        self.stream.read_exact(&mut bytes[here..]).map_err(Error::io(at))?;
        self.shared.options.trace.step(|| Step::State(Party::Channel(self.id)));
        window.put(room, len, name, instance, place);
        let total = device_state::HEAD_LEN + len;
        self.received += total as u64;
        self.within = false;
        self.shared.pulse.add(total);
        self.shared.progress.add_channel_bytes(self.id, total as u64);
        Ok(())
    }

    /// Keeps the device-state packet whose header is at `place`: nothing here understands it. It is no page and may come in any round;
    /// what is on the channel before it was taken.
    fn opaque_state(&mut self, sink: &dyn OpaqueSink, place: Place) -> Result<(), Error> {
        let shared = self.shared.clone();
        if !shared.opaque.may_come(shared.rounds_are_over()) {
            let (element, at) = ("device-state packet", "after the last round");
            return Err(Error::protocol(place)(Violation::UnexpectedElement { element, place: at }));
        }
        shared.opaque.begin();
        let header = &self.header[..packet::DEVICE_STATE_LEN];
        let packet = OpaquePacket::decode(header).map_err(Error::protocol(place))?;
        let len = packet.len as usize;
        let mut to = sink.reserve(self.id, header, &packet)?.map_err(Error::protocol(place))?;
        // What was read with the header.
        let behind = packet::DEVICE_STATE_LEN..self.filled;
        let here = behind.len().min(len);
        sink.write(&self.header[behind.start..behind.start + here], to)?;
        self.ahead = behind.len() - here;
        self.header.copy_within(behind.start + here..self.filled, 0);
        to += here as u64;
        self.received += (packet::DEVICE_STATE_LEN + here) as u64;
        let mut left = len - here;
        while left > 0 {
            self.payload.resize(left.min(PIECE), 0);
            self.stream.read_exact(&mut self.payload).map_err(Error::io(self.place()))?;
            sink.write(&self.payload, to)?;
            let taken = self.payload.len();
            (to, left) = (to + taken as u64, left - taken);
            self.received += taken as u64;
            shared.pulse.add(taken);
        }
        self.within = false;
        shared.pulse.add(packet::DEVICE_STATE_LEN + here);
        shared.progress.add_channel_bytes(self.id, (packet::DEVICE_STATE_LEN + len) as u64);
        shared.opaque.end();
        Ok(())
    }

    /// Waits until the round of the last SYNC is over: only then anything of the next one may be applied.
    fn pass(&mut self) -> Result<(), Error> {
        self.shared.pass(self.arrived.take())?;
        if self.rounds > 0 && self.pages.is_none() {
            self.pages = lock(&self.shared.pages).clone();
        }
        Ok(())
    }

    /// Checks the header at `place` and puts the packet's pages into place. Returns the packet's number if it ends the round,
    /// and the length of its payload.
    fn pages(&mut self, place: Place) -> Result<(Option<u64>, usize), Error> {
        let page_size = self.shared.page_size;
        let packet = RamPacket::decode(&self.header[..packet::header_len(page_size)], page_size);
        let packet = packet.map_err(Error::protocol(place))?;
        if packet.sync && packet.allocated == 0 {
            self.shared.newer_packets.store(true, Ordering::Relaxed);
        }
        let (sync, payload_len) = (packet.sync.then_some(packet.packet_num), packet.payload_len);
        if packet.is_empty() {
            return Ok((sync, payload_len));
        }
        if self.packets == 0 {
            self.shared.begin(self.id, place)?;
        }
        self.packets += 1;
        let Some(Pages { layout, sink, audit, .. }) = self.pages.clone() else {
            return Err(Error::protocol(place)(Violation::PageBeforeFirstSync));
        };
        let name = packet.block_name().map_err(Error::protocol(place))?;
        let block = match &self.block {
            Some((last, block)) if last == name => *block,
            _ => {
                let block = find(&layout, name).map_err(Error::protocol(place))?;
                self.block = Some((name.to_owned(), block));
                block
            }
        };
        let known = &layout.blocks()[block];
        packet.check_pages(known.name(), known.bytes(), page_size).map_err(Error::protocol(place))?;
        self.normal.clear();
        self.normal.extend(packet.normal.clone());
        self.zero.clear();
        self.zero.extend(packet.zero.clone());
        let method = packet.compression;
        let at = self.place_at(packet::header_len(page_size));
        if let Some(expected) = self.shared.options.compression
            && expected != method
            && !self.normal.is_empty()
        {
            let mismatch = Mismatch::CompressionMismatch { expected, found: method };
            return Err(Error::protocol(place)(mismatch));
        }
        #[cfg(any(test, feature = "__broken-variants"))]
        if sync.is_some() && self.shared.options.broken == Some(crate::testing::broken::Broken::SyncPagesDropped) {
            let mut payload = vec![0; payload_len];
            self.stream.read_exact(&mut payload).map_err(Error::io(at))?;
            return Ok((sync, payload_len));
        }
        if !self.normal.is_empty() && !std::mem::replace(&mut self.payload_seen, true) {
            lock(&self.shared.seen).compression.get_or_insert(method);
        }
        self.shared.options.trace.step(|| {
            let offsets = self.normal.iter().chain(&self.zero);
            Step::Apply(Party::Channel(self.id), offsets.map(|&offset| known.page_at(offset)).collect())
        });
        if let Some(audit) = &audit {
            for offsets in [&self.normal, &self.zero] {
                audit.writes(block, offsets, Party::Channel(self.id), self.rounds);
            }
        }
        if !self.normal.is_empty() {
            match method {
                Compression::None => {
                    sink.receive(self.stream, block, &self.normal, &mut self.scratch).map_err(Error::io(at))?
                }
                method => self.compressed(&*sink, method, block, payload_len, at)?,
            }
        }
        if !self.zero.is_empty() {
            sink.zero(block, &self.zero).map_err(Error::io(at))?;
        }
        if let Some(audit) = audit {
            for offsets in [&self.normal, &self.zero] {
                audit.wrote(block, offsets, Party::Channel(self.id), self.rounds);
            }
        }
        self.shared.channel_pages.fetch_add((self.normal.len() + self.zero.len()) as u64, Ordering::Relaxed);
        self.shared.progress.add_pages_after(self.rounds, self.normal.len() as u64, self.zero.len() as u64);
        Ok((sync, payload_len))
    }

    /// Takes a compressed payload.
    fn compressed(
        &mut self,
        sink: &dyn PageSink,
        method: Compression,
        block: usize,
        len: usize,
        at: Place,
    ) -> Result<(), Error> {
        self.payload.resize(len, 0);
        self.stream.read_exact(&mut self.payload).map_err(Error::io(at))?;
        let index = match self.decompressors.iter().position(|(known, _)| *known == method) {
            Some(index) => index,
            None => {
                self.decompressors
                    .push((method, Decompressor::new(method, &self.shared.windows).map_err(Error::io(at))?));
                self.decompressors.len() - 1
            }
        };
        let bytes = self.scratch.room(self.normal.len() * self.shared.page_size);
        let decompressor = &mut self.decompressors[index].1;
        decompressor.decompress(&self.payload, bytes).map_err(Error::payload(at))?;
        sink.store(block, &self.normal, bytes).map_err(Error::io(at))
    }

    fn place(&self) -> Place {
        self.place_at(0)
    }

    fn place_at(&self, further: usize) -> Place {
        Place { connection: Connection::Channel(self.id), offset: self.received + further as u64 }
    }
}

/// Bytes of an opaque payload that are in memory at a time.
const PIECE: usize = 1 << 20;

/// The position of the block called `name`.
fn find(layout: &Layout, name: &str) -> Result<usize, ProtocolError> {
    match layout.index_of(name) {
        Some(index) => Ok(index),
        None => Err(Violation::UnknownBlock { name: BlockName::new(name)? }.into()),
    }
}
