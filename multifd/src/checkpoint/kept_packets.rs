//! Device-state packets of a QEMU, which a checkpoint keeps as they came: nothing here understands them.
//!
//! They are a section of their own, directly behind the START section of `ram`. No QEMU knows its name, so one that is given such a file
//! by `file:` fails at once, instead of waiting for packets that do not come. A checkpoint without packets does not have it.
//!
//! | bytes | field                                                                     |
//! |------:|---------------------------------------------------------------------------|
//! |     … | head of a FULL section: `multifd/device-state`, instance 0, version 1     |
//! |     8 | bytes of all records                                                      |
//! |       | for each packet, in the order in which it came on its channel:            |
//! |     4 | the channel                                                               |
//! |   276 | the header, as it came                                                    |
//! |     n | the payload                                                               |
//! |     5 | footer                                                                    |
//!
//! Its place is known before the first packet, so payloads go to the file as they come, and none waits in memory. What is kept in memory
//! is 24 bytes for each packet, of which there are at most [`MAX_PACKETS`].

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use multifd_proto::{
    ChannelId, ProtocolError, Violation,
    device_state::OpaquePacket,
    encoder::MainEncoder,
    packet::DEVICE_STATE_LEN,
    stream::{Section, SectionKind},
};

use super::CheckpointError;
use crate::{
    destination::OpaqueSink,
    error::Error,
    sync::{Arc, Mutex, lock},
};

/// All packets of one section.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PacketedDevice {
    /// The name of its section.
    pub name: String,
    /// The instance.
    pub instance: u32,
    /// Packets.
    pub packets: u64,
    /// Bytes of their payloads.
    pub bytes: u64,
}

/// The packets in a checkpoint, to be sent as they came.
#[derive(Clone)]
pub struct KeptPackets {
    file: Arc<File>,
    path: PathBuf,
    /// In the order of the file, which is that of each channel.
    records: Arc<[Record]>,
    devices: Arc<[PacketedDevice]>,
}

/// Where a packet lies in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Record {
    /// Where its header begins.
    at: u64,
    /// Bytes of header and payload.
    len: u32,
    channel: u8,
}

impl KeptPackets {
    /// Reads the heads of all records, `len` bytes at `begin` of `file`.
    ///
    /// # Errors
    /// A record that breaks a rule, and where; the kernel's.
    pub(super) fn read(file: &File, path: &Path, begin: u64, len: u64) -> Result<KeptPackets, CheckpointError> {
        let io = |source| CheckpointError::Io { path: path.to_owned(), doing: "reading device-state packets", source };
        let broken = |offset, source: ProtocolError| CheckpointError::Stream { path: path.to_owned(), offset, source };
        let end = begin + len;
        let mut records = Vec::new();
        let mut devices: BTreeMap<(String, u32), (u64, u64)> = BTreeMap::new();
        let mut at = begin;
        while at < end {
            if end - at < RECORD_HEAD as u64 {
                return Err(broken(at, Violation::KeptPacketCut.into()));
            }
            if records.len() as u64 == MAX_PACKETS {
                return Err(broken(at, Violation::TooManyStatePackets { limit: MAX_PACKETS }.into()));
            }
            let mut head = [0; RECORD_HEAD];
            file.read_exact_at(&mut head, at).map_err(io)?;
            let (channel, header) = head.split_at(CHANNEL_LEN);
            let channel = u32::from_be_bytes(*channel.first_chunk().expect("it has four bytes"));
            let channel = u8::try_from(channel).map_err(|_| broken(at, Violation::KeptPacketCut.into()))?;
            let packet = OpaquePacket::decode(header).map_err(|source| broken(at, source))?;
            let behind = at + RECORD_HEAD as u64 + u64::from(packet.len);
            if behind > end {
                return Err(broken(at, Violation::KeptPacketCut.into()));
            }
            let key = (packet.name.to_owned(), packet.instance);
            if devices.len() == MAX_DEVICES && !devices.contains_key(&key) {
                return Err(broken(at, Violation::TooManyStatePackets { limit: MAX_DEVICES as u64 }.into()));
            }
            let (packets, bytes) = devices.entry(key).or_default();
            (*packets, *bytes) = (*packets + 1, *bytes + u64::from(packet.len));
            let len = DEVICE_STATE_LEN as u32 + packet.len;
            records.push(Record { at: at + CHANNEL_LEN as u64, len, channel });
            at = behind;
        }
        let device = |((name, instance), (packets, bytes))| PacketedDevice { name, instance, packets, bytes };
        let devices = devices.into_iter().map(device).collect();
        let file = Arc::new(file.try_clone().map_err(io)?);
        Ok(KeptPackets { file, path: path.to_owned(), records: records.into(), devices })
    }

    /// Whose they are.
    pub fn devices(&self) -> &[PacketedDevice] {
        &self.devices
    }

    /// Passes the packets that go on channel number `id` of `channels` to `send`, piece by piece: those of one channel stay on one, in
    /// their order.
    ///
    /// # Errors
    /// Those of `send`; the file's.
    pub(crate) fn send(
        &self,
        id: ChannelId,
        channels: u8,
        mut send: impl FnMut(&[u8]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let io =
            |source| CheckpointError::Io { path: self.path.clone(), doing: "reading device-state packets", source };
        let mut buffer = Vec::new();
        for record in self.records.iter().filter(|record| record.channel % channels.max(1) == id.0) {
            let (mut at, end) = (record.at, record.at + u64::from(record.len));
            while at < end {
                buffer.resize((end - at).min(PIECE as u64) as usize, 0);
                self.file.read_exact_at(&mut buffer, at).map_err(io)?;
                send(&buffer)?;
                at += buffer.len() as u64;
            }
        }
        Ok(())
    }
}

impl std::fmt::Debug for KeptPackets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KeptPackets").field("path", &self.path).field("devices", &self.devices).finish_non_exhaustive()
    }
}

impl PartialEq for KeptPackets {
    fn eq(&self, other: &KeptPackets) -> bool {
        (&self.path, &self.records, &self.devices) == (&other.path, &other.records, &other.devices)
    }
}

impl Eq for KeptPackets {}

/// The section in a file that is written.
pub(super) struct PacketsFile {
    file: Arc<File>,
    path: PathBuf,
    section: Section,
    /// Where the section begins.
    begin: u64,
    account: Mutex<Account>,
}

struct Account {
    /// Where the next record goes.
    end: u64,
    packets: u64,
    devices: BTreeSet<(String, u32)>,
    /// Where the section ends of which the file was completed, and where the file did: later packets go behind that.
    sealed: Option<(u64, u64)>,
}

impl PacketsFile {
    /// A section at byte `begin` of `file`, which is called `path`. It does not have the id `ram_section`.
    pub(super) fn new(file: Arc<File>, path: &Path, begin: u64, ram_section: u32) -> PacketsFile {
        let (kind, name) = (SectionKind::Full, SECTION.to_owned());
        let id = if ram_section == u32::MAX { ram_section - 1 } else { u32::MAX };
        let section = Section { kind, id, name, instance: 0, version: 1 };
        let head = MainEncoder::default().section(&section).bytes.len() as u64;
        let end = begin + head + LENGTH_LEN;
        let account = Mutex::new(Account { end, packets: 0, devices: BTreeSet::new(), sealed: None });
        PacketsFile { file, path: path.to_owned(), section, begin, account }
    }

    /// Where the section begins.
    pub(super) fn begin(&self) -> u64 {
        self.begin
    }

    /// Writes what stands before and behind the packets. Returns where the section ends; nothing where there is no packet, and no
    /// section.
    ///
    /// # Errors
    /// The file system's.
    pub(super) fn finish(&self) -> io::Result<Option<u64>> {
        let account = lock(&self.account);
        if account.packets == 0 {
            return Ok(None);
        }
        let mut head = MainEncoder::default().section(&self.section).bytes.clone();
        let records = account.end - self.begin - head.len() as u64 - LENGTH_LEN;
        head.extend_from_slice(&records.to_be_bytes());
        self.file.write_all_at(&head, self.begin)?;
        let footer = MainEncoder::default().footer(self.section.id).bytes.clone();
        self.file.write_all_at(&footer, account.end)?;
        Ok(Some(account.end + footer.len() as u64))
    }

    /// The file is complete and `len` bytes long: what still comes goes behind its end, and leaves it as it is.
    pub(super) fn seal(&self, len: u64) {
        let mut account = lock(&self.account);
        account.sealed = Some((account.end, len));
        account.end = len;
    }

    /// Puts what came behind the end of the file to the other packets, over what stood there. The rest of the file has to be written once
    /// more.
    ///
    /// # Errors
    /// The file system's.
    pub(super) fn unite(&self) -> io::Result<()> {
        let mut account = lock(&self.account);
        let Some((mut to, mut from)) = account.sealed.take() else { return Ok(()) };
        let mut buffer = Vec::new();
        while from < account.end {
            buffer.resize((account.end - from).min(PIECE as u64) as usize, 0);
            self.file.read_exact_at(&mut buffer, from)?;
            self.file.write_all_at(&buffer, to)?;
            (from, to) = (from + buffer.len() as u64, to + buffer.len() as u64);
        }
        account.end = to;
        Ok(())
    }

    /// Leaves out what came behind the end of the file.
    ///
    /// # Errors
    /// The file system's.
    pub(super) fn forget_late(&self) -> io::Result<()> {
        match lock(&self.account).sealed {
            Some((_, len)) => self.file.set_len(len),
            None => Ok(()),
        }
    }

    fn error(&self, source: io::Error) -> Error {
        CheckpointError::Io { path: self.path.clone(), doing: "writing a device-state packet to it", source }.into()
    }
}

impl OpaqueSink for PacketsFile {
    fn reserve(
        &self,
        channel: ChannelId,
        header: &[u8],
        packet: &OpaquePacket<'_>,
    ) -> Result<Result<u64, Violation>, Error> {
        let at = {
            let mut account = lock(&self.account);
            let key = (packet.name.to_owned(), packet.instance);
            if account.packets == MAX_PACKETS {
                return Ok(Err(Violation::TooManyStatePackets { limit: MAX_PACKETS }));
            }
            if account.devices.len() == MAX_DEVICES && !account.devices.contains(&key) {
                return Ok(Err(Violation::TooManyStatePackets { limit: MAX_DEVICES as u64 }));
            }
            let end = account.end + RECORD_HEAD as u64 + u64::from(packet.len);
            if end - self.begin > MAX_BYTES {
                return Ok(Err(Violation::TooMuchPacketedState { limit: MAX_BYTES }));
            }
            account.devices.insert(key);
            account.packets += 1;
            std::mem::replace(&mut account.end, end)
        };
        let mut head = [0; RECORD_HEAD];
        head[..CHANNEL_LEN].copy_from_slice(&u32::from(channel.0).to_be_bytes());
        head[CHANNEL_LEN..].copy_from_slice(header);
        self.file.write_all_at(&head, at).map_err(|source| self.error(source))?;
        Ok(Ok(at + RECORD_HEAD as u64))
    }

    fn write(&self, bytes: &[u8], at: u64) -> Result<(), Error> {
        self.file.write_all_at(bytes, at).map_err(|source| self.error(source))
    }
}

/// The name of the section. A stream that has it on main is no QEMU's.
pub(super) const SECTION: &str = "multifd/device-state";
/// The most packets of a checkpoint.
pub(super) const MAX_PACKETS: u64 = 1 << 20;
/// The most sections that they belong to.
const MAX_DEVICES: usize = 1024;
/// The most bytes of all packets: more than the memory of any assigned devices.
const MAX_BYTES: u64 = 1 << 40;
/// The length of all records.
pub(super) const LENGTH_LEN: u64 = 8;
const CHANNEL_LEN: usize = 4;
const RECORD_HEAD: usize = CHANNEL_LEN + DEVICE_STATE_LEN;
/// Bytes read at once.
const PIECE: usize = 1 << 20;
