//! One channel of a recorded migration.

use std::io::{self, BufReader, Read};

use multifd_proto::{
    BlockName, ChannelId, Mismatch, Violation,
    device_state::{self, OpaquePacket, StatePacket},
    packet::{self, Compression, HELLO_LEN, Hello, PREFIX_LEN, Prefix, RamPacket},
};

use super::{ChannelAccount, PAGE_SIZE, account::Pages};
use crate::{
    compress::{Decompressor, Windows},
    error::{Connection, Error, Place},
    sync::Arc,
    transport::one_way::read_some,
};

/// A channel and what was counted on it.
pub(super) struct Channel {
    bytes: BufReader<Box<dyn Read + Send>>,
    pub(super) account: ChannelAccount,
    header: Vec<u8>,
    payload: Vec<u8>,
    pages: Vec<u8>,
    decompressor: Option<Decompressor>,
    windows: Arc<Windows>,
    /// The rounds are over, and both ends know packets of device state.
    may_have_state: bool,
}

/// What a packet was.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Packet {
    Pages,
    /// Neither pages nor SYNC.
    Empty,
    /// It ends the round.
    Sync,
    /// The channel has ended.
    End,
}

impl Channel {
    /// Reads the first bytes of the channel in file number `index`. All channels have `windows` together.
    pub(super) fn open(stream: Box<dyn Read + Send>, index: usize, windows: &Arc<Windows>) -> Result<Channel, Error> {
        let at = Place { connection: Connection::Unknown(index), offset: 0 };
        let mut bytes = BufReader::with_capacity(READ_SIZE, stream);
        let mut hello = [0; HELLO_LEN];
        bytes.read_exact(&mut hello).map_err(Error::io(at))?;
        let Hello { uuid, channel: id, .. } = Hello::decode(&hello).map_err(Error::protocol(at))?;
        Ok(Channel {
            bytes,
            account: ChannelAccount {
                id,
                uuid,
                bytes: HELLO_LEN as u64,
                packets: 0,
                sync: 0,
                sync_with_pages: 0,
                empty: 0,
                state: 0,
                stale_size: 0,
                normal: 0,
                zero: 0,
                payload: 0,
                compression: None,
            },
            header: vec![0; packet::header_len(PAGE_SIZE).max(device_state::HEAD_LEN)],
            payload: Vec::new(),
            pages: Vec::new(),
            decompressor: None,
            windows: windows.clone(),
            may_have_state: false,
        })
    }

    pub(super) fn id(&self) -> ChannelId {
        self.account.id
    }

    /// Takes packets to the next SYNC; `false` if the channel ends before. Pages are allowed only behind the first sync
    /// point.
    pub(super) fn read_to_sync(&mut self, pages: &mut Pages, pages_allowed: bool) -> Result<bool, Error> {
        loop {
            let at = self.place();
            let before = (self.account.normal, self.account.zero);
            let packet = self.packet(pages)?;
            if !pages_allowed && before != (self.account.normal, self.account.zero) {
                return Err(Error::protocol(at)(Violation::PageBeforeFirstSync));
            }
            match packet {
                Packet::Sync => return Ok(true),
                Packet::End => return Ok(false),
                Packet::Pages | Packet::Empty => {}
            }
        }
    }

    /// Main has ended: nothing but device state may follow, if it `may_have_state`, and packets of no effect.
    pub(super) fn read_rest(&mut self, pages: &mut Pages, may_have_state: bool) -> Result<(), Error> {
        self.may_have_state = may_have_state;
        loop {
            let at = self.place();
            let element = match self.packet(pages)? {
                Packet::End => return Ok(()),
                Packet::Empty => continue,
                Packet::Pages => "packet with pages",
                Packet::Sync => "SYNC packet",
            };
            return Err(Error::protocol(at)(Violation::UnexpectedElement {
                element,
                place: "after the last sync point on main",
            }));
        }
    }

    fn packet(&mut self, pages: &mut Pages) -> Result<Packet, Error> {
        let at = self.place();
        if !self.fill_prefix().map_err(Error::io(at))? {
            return Ok(Packet::End);
        }
        let prefix = Prefix::decode(self.header.first_chunk().expect("longer than a prefix"));
        let prefix = prefix.map_err(Error::protocol(at))?;
        let header_len = prefix.header_len(PAGE_SIZE);
        self.bytes.read_exact(&mut self.header[PREFIX_LEN..header_len]).map_err(Error::io(at))?;
        if prefix.device_state() {
            return self.device_state(at);
        }
        let header = std::mem::take(&mut self.header);
        let packet = RamPacket::decode(&header[..header_len], PAGE_SIZE).map_err(Error::protocol(at));
        let kind = packet.and_then(|packet| self.ram_packet(&packet, at, header_len, pages));
        self.header = header;
        kind
    }

    /// Passes over a packet of device state, of which the header was read.
    fn device_state(&mut self, at: Place) -> Result<Packet, Error> {
        if !self.may_have_state {
            return self.opaque_state(at);
        }
        let rest = &mut self.header[packet::DEVICE_STATE_LEN..device_state::HEAD_LEN];
        self.bytes.read_exact(rest).map_err(Error::io(at))?;
        let packet = StatePacket::decode(&self.header[..device_state::HEAD_LEN]).map_err(Error::protocol(at))?;
        self.payload.resize(packet.len as usize, 0);
        self.bytes.read_exact(&mut self.payload).map_err(Error::io(at))?;
        self.account.packets += 1;
        self.account.state += 1;
        self.account.bytes += (device_state::HEAD_LEN + self.payload.len()) as u64;
        Ok(Packet::Empty)
    }

    /// Passes over a packet that only its device understands.
    fn opaque_state(&mut self, at: Place) -> Result<Packet, Error> {
        let header = &self.header[..packet::DEVICE_STATE_LEN];
        let len = u64::from(OpaquePacket::decode(header).map_err(Error::protocol(at))?.len);
        let taken = io::copy(&mut self.bytes.by_ref().take(len), &mut io::sink()).map_err(Error::io(at))?;
        if taken < len {
            return Err(Error::Io { at, source: io::ErrorKind::UnexpectedEof.into() });
        }
        self.account.packets += 1;
        self.account.state += 1;
        self.account.bytes += packet::DEVICE_STATE_LEN as u64 + len;
        Ok(Packet::Empty)
    }

    fn ram_packet(
        &mut self,
        packet: &RamPacket<'_>,
        at: Place,
        header_len: usize,
        pages: &mut Pages,
    ) -> Result<Packet, Error> {
        let has_pages = packet.normal.len() + packet.zero.len() > 0;
        if has_pages {
            self.pages_of(packet, at, header_len, pages)?;
        }
        let account = &mut self.account;
        account.packets += 1;
        account.bytes += (header_len + packet.payload_len) as u64;
        account.payload += packet.payload_len as u64;
        account.sync += u64::from(packet.sync);
        account.sync_with_pages += u64::from(packet.sync && has_pages);
        account.empty += u64::from(!packet.sync && !has_pages);
        account.stale_size += u64::from(packet.normal.len() == 0 && packet.payload_field != 0);
        account.normal += packet.normal.len() as u64;
        account.zero += packet.zero.len() as u64;
        Ok(match (packet.sync, has_pages) {
            (true, _) => Packet::Sync,
            (false, true) => Packet::Pages,
            (false, false) => Packet::Empty,
        })
    }

    fn pages_of(
        &mut self,
        packet: &RamPacket<'_>,
        at: Place,
        header_len: usize,
        pages: &mut Pages,
    ) -> Result<(), Error> {
        let name = packet.block_name().map_err(Error::protocol(at))?;
        let Some(block) = pages.layout.index_of(name) else {
            let name = BlockName::new(name).map_err(Error::protocol(at))?;
            return Err(Error::protocol(at)(Violation::UnknownBlock { name }));
        };
        let known = &pages.layout.blocks()[block];
        packet.check_pages(known.name(), known.bytes(), PAGE_SIZE).map_err(Error::protocol(at))?;
        let behind = Place { offset: at.offset + header_len as u64, ..at };
        let offsets: Vec<u64> = packet.normal.clone().collect();
        if !offsets.is_empty() {
            self.payload.resize(packet.payload_len, 0);
            self.bytes.read_exact(&mut self.payload).map_err(Error::io(behind))?;
            let id = self.account.id;
            let content = self.content(packet, at, behind)?;
            pages.store(block, &offsets, content, Some(id)).map_err(Error::io(behind))?;
        }
        let zeros: Vec<u64> = packet.zero.clone().collect();
        pages.zero(block, &zeros, Some(self.account.id)).map_err(Error::io(behind))
    }

    /// The payload that was just read, decompressed.
    fn content(&mut self, packet: &RamPacket<'_>, at: Place, behind: Place) -> Result<&[u8], Error> {
        let found = packet.compression;
        let expected = *self.account.compression.get_or_insert(found);
        if expected != found {
            let mismatch = Mismatch::CompressionMismatch { expected, found };
            return Err(Error::protocol(at)(mismatch));
        }
        if found == Compression::None {
            return Ok(&self.payload);
        }
        let decompressor = match &mut self.decompressor {
            Some(decompressor) => decompressor,
            none => none.insert(Decompressor::new(found, &self.windows).map_err(Error::io(behind))?),
        };
        self.pages.resize(packet.normal.len() * PAGE_SIZE, 0);
        decompressor.decompress(&self.payload, &mut self.pages).map_err(Error::io(behind))?;
        Ok(&self.pages)
    }

    /// Reads the first bytes of a packet; `false` at the end of the channel.
    fn fill_prefix(&mut self) -> io::Result<bool> {
        let mut filled = 0;
        while filled < PREFIX_LEN {
            match read_some(&mut self.bytes, &mut self.header[filled..PREFIX_LEN])? {
                0 if filled == 0 => return Ok(false),
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => filled += n,
            }
        }
        Ok(true)
    }

    fn place(&self) -> Place {
        Place { connection: Connection::Channel(self.account.id), offset: self.account.bytes }
    }
}

const READ_SIZE: usize = 1 << 20;
