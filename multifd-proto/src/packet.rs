//! Packets of the multifd channels.
//!
//! A channel carries one [`Hello`] and then packets: a header of fixed size and, for pages with content, a payload.
//! Nothing travels back. The channel ends by being closed between two packets.
//!
//! A receiver reads [`PREFIX_LEN`] bytes, asks [`Prefix::header_len`] for the size of the whole header, reads the rest and
//! decodes it with [`RamPacket::decode`]; one with [device state](Prefix::device_state) is for [`crate::device_state`]. A sender fills a
//! [`PacketHeader`] and encodes it into a buffer that it reuses. Nothing here allocates.
//!
//! RAM packet header, big-endian, 320 bytes plus 8 for each page that fits in a packet (1344 bytes with 4 KiB pages):
//!
//! | offset | size | field                | rule                                                                    |
//! |-------:|-----:|----------------------|-------------------------------------------------------------------------|
//! |      0 |    4 | magic                | `11 22 33 44`                                                           |
//! |      4 |    4 | version              | 1                                                                       |
//! |      8 |    4 | flags                | `01` SYNC, `3e` compression method, `40` device state                   |
//! |     12 |    4 | pages_alloc          | room in the offset array; 0 in a SYNC packet of QEMU ≥ 9, else 128      |
//! |     16 |    4 | normal_pages         | pages with content                                                      |
//! |     20 |    4 | next_packet_size     | payload bytes; stale, not 0, when QEMU 7.2 sends no pages               |
//! |     24 |    8 | packet_num           | counts over all channels; repeats and jumps in QEMU 7.2                 |
//! |     32 |    4 | zero_pages           | pages of zeros, listed behind the normal pages; not before QEMU 9       |
//! |     36 |   28 | reserved             | 0                                                                       |
//! |     64 |  256 | block name           | NUL-terminated; stale in a SYNC packet of QEMU 7.2                      |
//! |    320 | 8×n  | offsets in the block | normal pages in payload order, then zero pages, then unused (stale) slots |

use std::{fmt, num::NonZeroU8};

use crate::ids::{BlockName, ChannelId, name_text};
use crate::ram::check_page;
use crate::violation::{DecodeError, Mismatch, ProtocolError, Violation};

/// Begins each connection of a multifd channel and each of its packets.
pub const MAGIC: u32 = 0x1122_3344;

/// The only version of hello and packets there is.
pub(crate) const VERSION: u32 = 1;

/// The most guest memory one packet describes.
pub const PACKET_BYTES: usize = 512 * 1024;

/// The largest payload accepted when pages are compressed. The bounds of zlib and zstd for [`PACKET_BYTES`] are far below;
/// QEMU receives into a buffer of this size.
pub(crate) const MAX_COMPRESSED: u32 = 2 * PACKET_BYTES as u32;

/// Length of a [`Hello`].
pub const HELLO_LEN: usize = 64;

/// Bytes after which the length of a header is known.
pub const PREFIX_LEN: usize = 12;

/// Length of a device-state header.
pub const DEVICE_STATE_LEN: usize = 276;

/// The most pages of `page_size` bytes in one packet: 128 with 4 KiB pages.
pub const fn capacity(page_size: usize) -> usize {
    PACKET_BYTES / page_size
}

/// Length of a RAM packet header, whatever it carries: 1344 bytes with 4 KiB pages.
pub const fn header_len(page_size: usize) -> usize {
    OFFSETS_AT + 8 * capacity(page_size)
}

/// A RAM packet header whose numbers have been checked against each other.
///
/// Which blocks exist is not known here: look up [`block_name`](Self::block_name), then [`check_pages`](Self::check_pages).
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct RamPacket<'a> {
    /// Whether this packet ends its channel's part of the round. Its own pages, if any, belong to the round it ends.
    pub sync: bool,
    /// How the payload is compressed; meaningful when there are pages with content.
    pub compression: Compression,
    /// The sender's number of the packet. QEMU 7.2 repeats and skips numbers; what they prove all the same is in
    /// [`membership`](crate::membership).
    pub packet_num: u64,
    /// For how many offsets the sender made room. 0 in a SYNC packet without pages of QEMU 10.0 and newer, which QEMU 7.2 does
    /// not send.
    pub allocated: u32,
    /// The pages with content, in the order of the payload, which is any.
    pub normal: Offsets<'a>,
    /// The pages that are all zeros.
    pub zero: Offsets<'a>,
    /// How many bytes of payload follow this header: 0 without pages with content, whatever the field says.
    pub payload_len: usize,
    /// The payload size exactly as the field has it, stale or not. For inspectors.
    pub payload_field: u32,
    /// The block name without padding; anything when there are no pages.
    name: &'a [u8],
}

/// Offsets of pages inside their block.
#[derive(Debug, Clone)]
pub struct Offsets<'a>(std::slice::Iter<'a, [u8; 8]>);

impl Iterator for Offsets<'_> {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        self.0.next().map(|slot| u64::from_be_bytes(*slot))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.0.size_hint()
    }
}

impl ExactSizeIterator for Offsets<'_> {}

impl<'a> RamPacket<'a> {
    /// Checks the header in `bytes`, which is [`header_len`] bytes long.
    ///
    /// Fields that QEMU 7.2 leaves stale are ignored: the payload size and the block name of a packet without pages, and the
    /// unused offset slots.
    pub fn decode(bytes: &'a [u8], page_size: usize) -> Result<Self, ProtocolError> {
        let len = header_len(page_size);
        let Some(bytes) = bytes.get(..len) else {
            return Err(DecodeError::Truncated { needed: len - bytes.len() }.into());
        };
        let prefix = Prefix::decode(bytes.first_chunk().expect("a header is longer than its prefix"))?;
        if prefix.device_state() {
            return Err(DecodeError::BadPacketFlags { flags: prefix.flags }.into());
        }
        let (allocated, normal, zero) = (field(bytes, 12), field(bytes, 16), field(bytes, 32));
        let room = capacity(page_size) as u32;
        if allocated > room || normal > allocated || zero > allocated - normal {
            return Err(Violation::PagesAboveCapacity { normal, zero, allocated, capacity: room }.into());
        }
        let (compression, payload_field) = (Compression::try_from(prefix.method())?, field(bytes, 20));
        let payload_len = match normal {
            0 => 0,
            _ => payload_len(payload_field, normal, page_size as u64, compression)?,
        };
        // The last byte of the field ends the name, whatever it holds.
        let name = &bytes[NAME_AT..OFFSETS_AT - 1];
        let name = &name[..name.iter().position(|byte| *byte == 0).unwrap_or(name.len())];
        if name.is_empty() && normal + zero > 0 {
            return Err(Violation::PacketWithoutBlock.into());
        }
        let (slots, _) = bytes[OFFSETS_AT..].as_chunks::<8>();
        let (normal, others) = slots.split_at(normal as usize);
        Ok(Self {
            sync: prefix.sync(),
            compression,
            packet_num: u64::from_be_bytes(*bytes[24..].first_chunk().expect("a header is longer")),
            allocated,
            normal: Offsets(normal.iter()),
            zero: Offsets(others[..zero as usize].iter()),
            payload_len: payload_len as usize,
            payload_field,
            name,
        })
    }

    /// Refuses the packet when one of its pages is not aligned, or not inside a block of `len` bytes called `block`.
    pub fn check_pages(&self, block: &BlockName, len: u64, page_size: usize) -> Result<(), Violation> {
        let mut offsets = self.normal.clone().chain(self.zero.clone());
        offsets.try_for_each(|offset| check_page(block, len, offset, page_size as u64))
    }

    /// The block that all pages of the packet belong to.
    ///
    /// Without pages the field means nothing; it may be empty (an error here) or name the block of an earlier packet.
    pub fn block_name(&self) -> Result<&'a str, DecodeError> {
        name_text(self.name)
    }

    /// Whether the packet has neither pages with content nor pages of zeros.
    pub fn is_empty(&self) -> bool {
        self.normal.len() + self.zero.len() == 0
    }
}

/// The payload size of `normal` pages, if the header's `size` is possible.
fn payload_len(size: u32, normal: u32, page_size: u64, compression: Compression) -> Result<u32, Violation> {
    let fits = match compression {
        Compression::None => u64::from(size) == u64::from(normal) * page_size,
        Compression::Zlib | Compression::Zstd => 0 < size && size <= MAX_COMPRESSED,
    };
    if fits { Ok(size) } else { Err(Violation::PayloadSize { size, normal, page_size, compression }) }
}

/// What a sender puts into a RAM packet header.
#[derive(Debug, Clone, Copy)]
pub struct PacketHeader<'a> {
    /// Whether the packet ends the round on its channel. QEMU from 9.0 on sends such a packet without pages, and so should you:
    /// [`PacketHeader::sync_packet`].
    pub sync: bool,
    /// How the payload is compressed. Without normal pages, QEMU sets it all the same, except in a SYNC packet.
    pub compression: Compression,
    /// Counts the packets of all channels from 0.
    pub packet_num: u64,
    /// The block of all pages; empty when there are none.
    pub block: &'a str,
    /// Offsets of the pages with content, in payload order.
    pub normal: &'a [u64],
    /// Offsets of the pages of zeros.
    pub zero: &'a [u64],
    /// Bytes that follow the header.
    pub payload_len: u32,
}

impl PacketHeader<'_> {
    /// The packet that ends a round on a channel, in the form QEMU sends since 9.0: nothing but the flag and the number.
    pub const fn sync_packet(packet_num: u64) -> Self {
        Self {
            sync: true,
            compression: Compression::None,
            packet_num,
            block: "",
            normal: &[],
            zero: &[],
            payload_len: 0,
        }
    }

    /// Writes the header into the first [`header_len`] bytes of `buf` and clears what it does not use.
    ///
    /// # Panics
    ///
    /// When `buf` is too short, the pages exceed [`capacity`], or the block name exceeds 255 bytes: none of these
    /// comes from a peer.
    pub fn encode_into(&self, buf: &mut [u8], page_size: usize) {
        let pages = self.normal.len() + self.zero.len();
        assert!(pages <= capacity(page_size), "{pages} pages in one packet");
        assert!(self.block.len() <= BlockName::MAX_LEN, "block name of {} bytes", self.block.len());
        let buf = &mut buf[..header_len(page_size)];
        let allocated = if pages == 0 { 0 } else { capacity(page_size) as u32 };
        let flags = self.compression.bits() | if self.sync { SYNC } else { 0 };
        put(buf, 0, MAGIC);
        put(buf, 4, VERSION);
        put(buf, 8, flags);
        put(buf, 12, allocated);
        put(buf, 16, self.normal.len() as u32);
        put(buf, 20, self.payload_len);
        buf[24..32].copy_from_slice(&self.packet_num.to_be_bytes());
        put(buf, 32, self.zero.len() as u32);
        buf[36..NAME_AT].fill(0);
        let (name, padding) = buf[NAME_AT..OFFSETS_AT].split_at_mut(self.block.len());
        name.copy_from_slice(self.block.as_bytes());
        padding.fill(0);
        let (slots, unused) = buf[OFFSETS_AT..].split_at_mut(8 * pages);
        let offsets = self.normal.iter().chain(self.zero);
        for (slot, offset) in slots.as_chunks_mut::<8>().0.iter_mut().zip(offsets) {
            *slot = offset.to_be_bytes();
        }
        unused.fill(0);
    }
}

/// The first packet of a channel: which VM it belongs to and which channel it is. QEMU: `MultiFDInit_t`.
///
/// | offset | size | field                                   |
/// |-------:|-----:|-----------------------------------------|
/// |      0 |    4 | magic                                   |
/// |      4 |    4 | version, 1                              |
/// |      8 |   16 | uuid of the VM; zeros when it has none  |
/// |     24 |    1 | channel id                              |
/// |     25 |    1 | number of channels; zero when not told  |
/// |     26 |   38 | zero                                    |
///
/// QEMU writes zeros behind the id and does not read them. Our own source tells there how many channels it has, so that a
/// receiver knows which are still to come. Where both ends share a token of the migration, it stands in place of the uuid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hello {
    /// The VM's uuid, or zeros. A receiver with another one refuses the channel.
    pub uuid: [u8; 16],
    /// Which channel this is.
    pub channel: ChannelId,
    /// How many channels the source has, if it tells.
    pub channels: Option<NonZeroU8>,
}

impl Hello {
    /// The hello in `bytes`.
    pub fn decode(bytes: &[u8; HELLO_LEN]) -> Result<Self, DecodeError> {
        magic_and_version(bytes, "hello")?;
        let uuid = *bytes[8..].first_chunk().expect("a hello is longer");
        Ok(Self { uuid, channel: ChannelId(bytes[24]), channels: NonZeroU8::new(bytes[25]) })
    }

    /// The hello as it stands on the wire.
    pub fn encode(&self) -> [u8; HELLO_LEN] {
        let mut bytes = [0; HELLO_LEN];
        put(&mut bytes, 0, MAGIC);
        put(&mut bytes, 4, VERSION);
        bytes[8..24].copy_from_slice(&self.uuid);
        bytes[24] = self.channel.0;
        bytes[25] = self.channels.map_or(0, NonZeroU8::get);
        bytes
    }
}

/// The first twelve bytes of a packet: enough to know how long its header is.
///
/// Only known flags are set, at most one method of compression, and device state alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prefix {
    flags: u32,
}

impl Prefix {
    /// Checks magic, version and that the flags go together.
    pub fn decode(bytes: &[u8; PREFIX_LEN]) -> Result<Self, DecodeError> {
        magic_and_version(bytes, "packet")?;
        let flags = field(bytes, 8);
        let methods = (flags & METHOD_MASK).count_ones();
        let known = flags & !(SYNC | METHOD_MASK | DEVICE_STATE) == 0;
        let alone = flags & DEVICE_STATE == 0 || flags == DEVICE_STATE;
        if known && methods <= 1 && alone { Ok(Self { flags }) } else { Err(DecodeError::BadPacketFlags { flags }) }
    }

    /// Length of the whole header, these bytes included.
    pub const fn header_len(&self, page_size: usize) -> usize {
        if self.device_state() { DEVICE_STATE_LEN } else { header_len(page_size) }
    }

    /// Whether the packet carries device state instead of pages, see [`crate::device_state`].
    pub const fn device_state(&self) -> bool {
        self.flags & DEVICE_STATE != 0
    }

    /// The flags as they are.
    pub(crate) const fn flags(&self) -> u32 {
        self.flags
    }

    /// Whether the packet ends the round on its channel.
    pub const fn sync(&self) -> bool {
        self.flags & SYNC != 0
    }

    /// How the payload is compressed.
    const fn method(&self) -> Method {
        match self.flags & METHOD_MASK {
            0 => Method::None,
            ZLIB => Method::Zlib,
            ZSTD => Method::Zstd,
            QPL => Method::Qpl,
            UADK => Method::Uadk,
            _ => Method::QatZip,
        }
    }
}

/// A compression method that the format knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// Pages as they are.
    None,
    /// One zlib stream per channel.
    Zlib,
    /// One zstd stream per channel.
    Zstd,
    /// Intel's In-Memory Analytics Accelerator.
    Qpl,
    /// The accelerator framework of Kunpeng processors.
    Uadk,
    /// Intel's QuickAssist.
    QatZip,
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Zlib => "zlib",
            Self::Zstd => "zstd",
            Self::Qpl => "QPL",
            Self::Uadk => "UADK",
            Self::QatZip => "QATzip",
        })
    }
}

/// A compression method that is spoken here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Compression {
    /// Pages as they are.
    #[default]
    None,
    /// One zlib stream per channel for the whole migration; every packet ends at a sync flush.
    Zlib,
    /// One zstd stream per channel for the whole migration; every packet ends at a block boundary. A sender may also make
    /// each packet a frame of its own.
    Zstd,
}

impl Compression {
    /// The flag bits of the method.
    pub(crate) const fn bits(self) -> u32 {
        match self {
            Self::None => 0,
            Self::Zlib => ZLIB,
            Self::Zstd => ZSTD,
        }
    }
}

impl TryFrom<Method> for Compression {
    type Error = Mismatch;

    fn try_from(method: Method) -> Result<Self, Mismatch> {
        match method {
            Method::None => Ok(Self::None),
            Method::Zlib => Ok(Self::Zlib),
            Method::Zstd => Ok(Self::Zstd),
            Method::Qpl | Method::Uadk | Method::QatZip => Err(Mismatch::CompressionUnsupported { method }),
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Zlib => "zlib",
            Self::Zstd => "zstd",
        })
    }
}

/// Checks the two words that hello and packets begin with.
fn magic_and_version(bytes: &[u8], what: &'static str) -> Result<(), DecodeError> {
    let (magic, version) = (field(bytes, 0), field(bytes, 4));
    if magic != MAGIC {
        return Err(DecodeError::BadMagic { expected: MAGIC, found: magic });
    }
    if version != VERSION {
        return Err(DecodeError::BadVersion { what, expected: VERSION, found: version });
    }
    Ok(())
}

/// The 32-bit field at `at`, inside a header whose length has been checked.
fn field(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(*bytes[at..].first_chunk().expect("the field lies inside its header"))
}

/// Writes the 32-bit field at `at`.
fn put(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
}

/// QEMU: `MULTIFD_FLAG_SYNC`.
pub(crate) const SYNC: u32 = 0x01;
/// The bits that hold the compression method.
pub(crate) const METHOD_MASK: u32 = 0x3e;
/// zlib.
pub(crate) const ZLIB: u32 = 0x02;
/// zstd.
pub(crate) const ZSTD: u32 = 0x04;
/// Intel IAA through QPL.
pub(crate) const QPL: u32 = 0x08;
/// Kunpeng through UADK.
pub(crate) const UADK: u32 = 0x10;
/// Intel QuickAssist through QATzip.
#[cfg(test)]
pub(crate) const QATZIP: u32 = 0x20;
/// A packet with device state.
pub(crate) const DEVICE_STATE: u32 = 0x40;

const NAME_AT: usize = 64;
const OFFSETS_AT: usize = NAME_AT + 256;

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: usize = 4096;

    #[test]
    fn sizes_are_those_of_the_wire() {
        assert_eq!((capacity(PAGE), header_len(PAGE)), (128, 1344));
        assert_eq!((capacity(65536), header_len(65536)), (8, 384));
        let device_state = Prefix { flags: DEVICE_STATE };
        assert_eq!(device_state.header_len(PAGE), 276);
    }

    #[test]
    fn hello_survives_the_wire() {
        let hello = Hello { uuid: *b"0123456789abcdef", channel: ChannelId(3), channels: NonZeroU8::new(5) };
        let bytes = hello.encode();
        assert_eq!(Hello::decode(&bytes), Ok(hello));
        assert_eq!(bytes[24], 3);
        assert_eq!(bytes[25], 5);
        assert!(bytes[26..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn hello_of_another_protocol_is_refused() {
        let mut bytes = Hello { uuid: [0; 16], channel: ChannelId(0), channels: None }.encode();
        bytes[7] = 2;
        assert_eq!(Hello::decode(&bytes), Err(DecodeError::BadVersion { what: "hello", expected: 1, found: 2 }));
        bytes[..4].copy_from_slice(b"GET ");
        assert_eq!(Hello::decode(&bytes), Err(DecodeError::BadMagic { expected: MAGIC, found: 0x4745_5420 }));
    }

    /// A packet with three normal and two zero pages, then changed by `change`.
    fn packet(change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
        let header = PacketHeader {
            sync: false,
            compression: Compression::None,
            packet_num: 7,
            block: "pc.ram",
            normal: &[0, 0x7000, 0x6000],
            zero: &[0x4000, 0x1000],
            payload_len: 3 * PAGE as u32,
        };
        let mut bytes = vec![0xaa; header_len(PAGE)];
        header.encode_into(&mut bytes, PAGE);
        change(&mut bytes);
        bytes
    }

    /// Why the changed packet is refused.
    fn refusal(change: impl FnOnce(&mut Vec<u8>)) -> ProtocolError {
        RamPacket::decode(&packet(change), PAGE).unwrap_err()
    }

    #[test]
    fn packet_survives_the_wire() {
        let bytes = packet(|_| ());
        let packet = RamPacket::decode(&bytes, PAGE).unwrap();
        assert!(!packet.sync && !packet.is_empty());
        assert_eq!(packet.packet_num, 7);
        assert_eq!(packet.block_name(), Ok("pc.ram"));
        assert_eq!(packet.normal.clone().collect::<Vec<_>>(), [0, 0x7000, 0x6000]);
        assert_eq!(packet.zero.clone().collect::<Vec<_>>(), [0x4000, 0x1000]);
        assert_eq!(packet.payload_len, 12288);
        assert_eq!(field(&bytes, 12), 128);
        assert!(bytes[320 + 5 * 8..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn sync_packet_is_empty_except_for_flag_and_number() {
        let mut bytes = vec![0xaa; header_len(PAGE)];
        PacketHeader::sync_packet(9).encode_into(&mut bytes, PAGE);
        assert_eq!(bytes[..32], *b"\x11\x22\x33\x44\0\0\0\x01\0\0\0\x01\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x09");
        assert!(bytes[32..].iter().all(|byte| *byte == 0));
        let packet = RamPacket::decode(&bytes, PAGE).unwrap();
        assert!(packet.sync && packet.is_empty());
        assert!(packet.block_name().is_err());
    }

    #[test]
    fn stale_fields_of_a_packet_without_pages_are_ignored() {
        let bytes = packet(|bytes| {
            put(bytes, 16, 0);
            put(bytes, 32, 0);
            put(bytes, 20, 0xffff_ffff);
            bytes[64..320].fill(0xff);
            bytes[320..].fill(0xff);
        });
        let packet = RamPacket::decode(&bytes, PAGE).unwrap();
        assert_eq!((packet.payload_len, packet.payload_field, packet.is_empty()), (0, 0xffff_ffff, true));
        assert_eq!(packet.normal.len() + packet.zero.len(), 0);
    }

    #[test]
    fn counts_above_the_capacity_are_refused() {
        for (allocated, normal, zero) in [
            (129, 1, 0),
            (128, 129, 0),
            (2, 3, 0),
            (128, 100, 29),
            (128, 1, u32::MAX),
            (u32::MAX, u32::MAX, 0),
            (0, 0, 1),
        ] {
            let error = refusal(|bytes| {
                put(bytes, 12, allocated);
                put(bytes, 16, normal);
                put(bytes, 32, zero);
            });
            let expected = Violation::PagesAboveCapacity { normal, zero, allocated, capacity: 128 };
            assert_eq!(error, expected.into());
        }
    }

    #[test]
    fn payload_must_fit_the_pages() {
        for (method, size) in [(0, 0), (0, 3 * 4096 - 1), (0, u32::MAX), (ZLIB, 0), (ZSTD, MAX_COMPRESSED + 1)] {
            let error = refusal(|bytes| {
                put(bytes, 8, method);
                put(bytes, 20, size);
            });
            let compression = Compression::try_from(Prefix { flags: method }.method()).unwrap();
            assert_eq!(error, Violation::PayloadSize { size, normal: 3, page_size: 4096, compression }.into());
        }
        let largest = packet(|bytes| {
            put(bytes, 8, ZSTD);
            put(bytes, 20, MAX_COMPRESSED);
        });
        assert_eq!(RamPacket::decode(&largest, PAGE).unwrap().payload_len, 1 << 20);
    }

    #[test]
    fn flags_that_do_not_go_together_are_refused() {
        for flags in [0x80, 0x8000_0000, ZLIB | ZSTD, METHOD_MASK, DEVICE_STATE | SYNC, DEVICE_STATE | ZLIB] {
            assert_eq!(refusal(|bytes| put(bytes, 8, flags)), DecodeError::BadPacketFlags { flags }.into());
        }
        assert_eq!(
            refusal(|bytes| put(bytes, 8, DEVICE_STATE)),
            DecodeError::BadPacketFlags { flags: DEVICE_STATE }.into()
        );
    }

    #[test]
    fn hardware_compression_is_refused_by_name() {
        for (flags, method, text) in [
            (QPL, Method::Qpl, "compression QPL is not supported; none, zlib and zstd are"),
            (UADK, Method::Uadk, "compression UADK is not supported; none, zlib and zstd are"),
            (QATZIP, Method::QatZip, "compression QATzip is not supported; none, zlib and zstd are"),
        ] {
            let error = refusal(|bytes| put(bytes, 8, flags));
            assert_eq!(error, Mismatch::CompressionUnsupported { method }.into());
            assert_eq!(error.to_string(), text);
        }
    }

    #[test]
    fn packet_must_name_a_block_when_it_has_pages() {
        assert_eq!(refusal(|bytes| bytes[64] = 0), Violation::PacketWithoutBlock.into());
        let bytes = packet(|bytes| bytes[64] = 0xff);
        let packet = RamPacket::decode(&bytes, PAGE).unwrap();
        assert!(matches!(packet.block_name(), Err(DecodeError::BlockNameInvalid { .. })));
    }

    #[test]
    fn the_last_byte_of_the_name_field_ends_the_name() {
        let bytes = packet(|bytes| bytes[64..320].fill(b'n'));
        assert_eq!(RamPacket::decode(&bytes, PAGE).unwrap().block_name().unwrap().len(), 255);
    }

    #[test]
    fn wrong_magic_and_version_are_refused() {
        assert_eq!(refusal(|b| put(b, 0, 1)), DecodeError::BadMagic { expected: MAGIC, found: 1 }.into());
        assert_eq!(refusal(|b| put(b, 4, 2)), DecodeError::BadVersion { what: "packet", expected: 1, found: 2 }.into());
    }

    #[test]
    fn truncated_header_asks_for_more() {
        let bytes = packet(|_| ());
        for len in 0..bytes.len() {
            let error = RamPacket::decode(&bytes[..len], PAGE).unwrap_err();
            assert_eq!(error, DecodeError::Truncated { needed: 1344 - len }.into());
        }
    }

    #[test]
    fn pages_must_be_aligned_and_inside_their_block() {
        let block = BlockName::new("pc.ram").unwrap();
        let bytes = packet(|_| ());
        let decoded = RamPacket::decode(&bytes, PAGE).unwrap();
        assert_eq!(decoded.check_pages(&block, 0x8000, PAGE), Ok(()));
        assert_eq!(
            decoded.check_pages(&block, 0x7000, PAGE),
            Err(Violation::PageOutsideBlock { block: block.clone(), offset: 0x7000, len: 0x7000 })
        );
        let bytes = packet(|bytes| bytes[320 + 4 * 8 + 7] = 8);
        let decoded = RamPacket::decode(&bytes, PAGE).unwrap();
        assert_eq!(
            decoded.check_pages(&block, 0x8000, PAGE),
            Err(Violation::UnalignedPage { block, offset: 0x1008, page_size: 4096 })
        );
    }
}
