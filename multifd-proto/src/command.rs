//! VM commands: what the source tells the destination between sections.
//!
//! | number | name                 | payload                                                  |
//! |-------:|----------------------|----------------------------------------------------------|
//! |      1 | OPEN_RETURN_PATH     | none                                                     |
//! |      2 | PING                 | 32-bit value, to be answered with PONG                   |
//! |      3 | POSTCOPY_ADVISE      | OR of all blocks' page sizes, page size; or none         |
//! |      4 | POSTCOPY_LISTEN      | none                                                     |
//! |      5 | POSTCOPY_RUN         | none                                                     |
//! |      6 | POSTCOPY_RAM_DISCARD | 0, block name, 0, n × (64-bit start, 64-bit length)      |
//! |      7 | PACKAGED             | 32-bit length of an element stream behind the command    |
//! |      8 | ENABLE_COLO          | none                                                     |
//! |      9 | POSTCOPY_RESUME      | none                                                     |
//! |     10 | RECV_BITMAP          | block name                                               |
//! |     11 | SWITCHOVER_START     | none; from QEMU 10.0 on                                  |
//! | 0x4d01 | GO                   | none; ours, the guest may start, see [`crate::commit`]   |
//! | 0x4d02 | DESCRIBE             | 32-bit length of the VM's description behind the command |
//! | 0x4d03 | SHARED_MEMORY        | 32-bit length of the list behind the command             |
//! | 0x4d04 | SECTION_LENGTH       | 64-bit length of the body of the section that follows    |
//! | 0x4d05 | SECTION_PACKETS      | the same, of a body that travels on the channels         |
//!
//! Each is a 16-bit number, a 16-bit payload length and the payload. An unknown number ends the migration, here as in QEMU.

use std::fmt;

use crate::extension::MAX_DESCRIPTION;
use crate::ids::BlockName;
use crate::postcopy::{DiscardRange, discard::MAX_DISCARD_RANGES};
use crate::shared_memory::MAX_SHARED_LIST;
use crate::violation::{DecodeError, ProtocolError, Violation};
use crate::wire::{Codec, Reader, Step, Stop, Writer, step};

/// One command. QEMU: `MIG_CMD_*`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// From here on the destination may write messages on main, see [`crate::return_path`].
    OpenReturnPath,
    /// To be answered with a PONG of the same value.
    Ping(u32),
    /// The source may start postcopy later. Present when the capability is on, even if precopy then completes.
    PostcopyAdvise(Option<PostcopyAdvice>),
    /// Postcopy starts.
    PostcopyListen,
    /// Postcopy: the guest starts at the destination.
    PostcopyRun,
    /// Postcopy: pages of a block that are no longer valid.
    PostcopyRamDiscard {
        /// The block.
        block: BlockName,
        /// The ranges, as they came: [`DiscardRange::check`] tells whether the block has them.
        ranges: Vec<DiscardRange>,
    },
    /// Postcopy: this many bytes of elements follow, to be read as a whole.
    Packaged {
        /// How many bytes.
        len: u32,
    },
    /// Continuous replication starts.
    EnableColo,
    /// Postcopy recovery.
    PostcopyResume,
    /// Postcopy recovery: which pages of this block were received?
    RecvBitmap {
        /// The block.
        block: BlockName,
    },
    /// The guest has stopped; the last pages and the devices follow.
    SwitchoverStart,
    /// The destination may start the guest: the answer to READY. Only between two ends of this implementation.
    Go,
    /// What the destination makes its VM by: so many bytes follow, whose meaning is the VMM's. Only between two ends of this
    /// implementation.
    Describe {
        /// How many bytes, at most [`MAX_DESCRIPTION`].
        len: u32,
    },
    /// Memory that the destination maps instead of receiving it: so many bytes follow, a list of
    /// [`shared_memory`](crate::shared_memory), with a descriptor for each block. Only between two ends of this implementation.
    SharedMemory {
        /// How many bytes, at most [`MAX_SHARED_LIST`].
        len: u32,
    },
    /// How long the body of the FULL section is that follows at once, and where it is: SECTION_LENGTH, or SECTION_PACKETS for
    /// [`BodyLength::Packets`]. Only between two ends of this implementation.
    SectionLength(BodyLength),
}

/// What a source that can do postcopy says about page sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PostcopyAdvice {
    /// Bitwise OR of the sizes of the pages that back the RAM blocks.
    pub page_size_summary: u64,
    /// The page size of the stream.
    pub page_size: u64,
}

/// What SECTION_LENGTH or SECTION_PACKETS says of the body of the section that follows.
///
/// In QEMU's format only the reader of a body knows its length. Where the extension
/// [`SectionLength`](crate::extension::Extension::SectionLength) was agreed on, the command says it; or, with all bits set, that
/// the body comes in chunks, because the source does not know its length yet:
///
/// | bytes | field                                        |
/// |------:|----------------------------------------------|
/// |     4 | length of this chunk; 0 ends the body        |
/// |     n | that many bytes of the state                 |
///
/// The footer of the section follows as it does without the extension.
///
/// SECTION_PACKETS, of the extension [`StatePackets`](crate::extension::Extension::StatePackets), says the length of the state, with all
/// bits set where it is not known yet. The body on main has the heads of chunks as above, without their bytes: each chunk is the
/// state of one [device-state packet](crate::device_state) on one of the channels, in the order of their numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BodyLength {
    /// The body has so many bytes.
    Bytes(u64),
    /// The body comes in chunks.
    Chunks,
    /// The body comes in chunks, the bytes of which are in packets of the channels. All of it has so many bytes, where the source
    /// knows that.
    Packets(Option<u64>),
}

impl BodyLength {
    pub(crate) const fn to_wire(self) -> u64 {
        match self {
            BodyLength::Bytes(len) | BodyLength::Packets(Some(len)) => len,
            BodyLength::Chunks | BodyLength::Packets(None) => u64::MAX,
        }
    }

    pub(crate) const fn from_wire(len: u64) -> BodyLength {
        match len {
            u64::MAX => BodyLength::Chunks,
            len => BodyLength::Bytes(len),
        }
    }

    pub(crate) const fn packets_from_wire(len: u64) -> BodyLength {
        match len {
            u64::MAX => BodyLength::Packets(None),
            len => BodyLength::Packets(Some(len)),
        }
    }
}

/// The command's name.
impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Codec for Command {
    /// The command at the start of `input`, behind its element type byte.
    fn decode(input: &[u8]) -> Result<Step<Self>, ProtocolError> {
        step(input, Self::read)
    }

    /// Appends the command, without the element type byte.
    ///
    /// # Panics
    /// For a RAM_DISCARD with more than [`MAX_DISCARD_RANGES`] ranges.
    fn encode(&self, out: &mut Vec<u8>) {
        let mut payload = Vec::new();
        let mut writer = Writer::new(&mut payload);
        match self {
            Self::Ping(value)
            | Self::Packaged { len: value }
            | Self::Describe { len: value }
            | Self::SharedMemory { len: value } => {
                writer.u32(*value);
            }
            Self::SectionLength(len) => {
                writer.u64(len.to_wire());
            }
            Self::PostcopyAdvise(Some(advice)) => {
                writer.u64(advice.page_size_summary).u64(advice.page_size);
            }
            Self::PostcopyRamDiscard { block, ranges } => {
                // A longer list takes several commands, see `postcopy::discard`.
                assert!(ranges.len() <= MAX_DISCARD_RANGES, "{} ranges do not fit a command", ranges.len());
                writer.u8(0).pstr(block.as_str().as_bytes()).u8(0);
                for range in ranges {
                    writer.u64(range.start).u64(range.len);
                }
            }
            Self::RecvBitmap { block } => {
                writer.pstr(block.as_str().as_bytes());
            }
            _ => (),
        }
        Writer::new(out).u16(self.number()).u16(payload.len() as u16).bytes(&payload);
    }
}

impl Command {
    /// The command's name.
    pub(crate) const fn name(&self) -> &'static str {
        name(self.number())
    }

    /// Why this command ends a migration wherever it stands on main, if it does.
    pub(crate) const fn refusal(&self) -> Option<Violation> {
        match self {
            Self::EnableColo => Some(Violation::ColoRefused),
            Self::PostcopyResume | Self::RecvBitmap { .. } => Some(Violation::RecoveryRefused { command: self.name() }),
            _ => None,
        }
    }

    pub(crate) fn read(reader: &mut Reader<'_>) -> Result<Self, Stop> {
        let number = reader.u16()?;
        if !(OPEN_RETURN_PATH..=SWITCHOVER_START).contains(&number) && !(GO..=SECTION_PACKETS).contains(&number) {
            return Err(DecodeError::UnknownCommand { number }.into());
        }
        let command = name(number);
        let len = reader.u16()?;
        // Checked before the payload is asked for: a wrong length must not make the receiver wait for more bytes.
        let possible = match number {
            PING | PACKAGED | DESCRIBE | SHARED_MEMORY => len == 4,
            SECTION_LENGTH | SECTION_PACKETS => len == 8,
            POSTCOPY_ADVISE => len == 0 || len == 16,
            POSTCOPY_RAM_DISCARD => len >= 3,
            RECV_BITMAP => (2..=256).contains(&len),
            _ => len == 0,
        };
        if !possible {
            return Err(DecodeError::BadCommandLength { command, len }.into());
        }
        let mut payload = Reader::new(reader.bytes(usize::from(len))?);
        let read = Self::read_payload(number, &mut payload).map_err(|stop| match stop {
            Stop::Short(_) => DecodeError::BadCommandPayload { command }.into(),
            refused => refused,
        })?;
        if payload.remaining() > 0 {
            return Err(DecodeError::BadCommandPayload { command }.into());
        }
        Ok(read)
    }

    fn read_payload(number: u16, payload: &mut Reader<'_>) -> Result<Self, Stop> {
        Ok(match number {
            OPEN_RETURN_PATH => Self::OpenReturnPath,
            PING => Self::Ping(payload.u32()?),
            POSTCOPY_ADVISE if payload.remaining() == 0 => Self::PostcopyAdvise(None),
            POSTCOPY_ADVISE => Self::PostcopyAdvise(Some(PostcopyAdvice {
                page_size_summary: payload.u64()?,
                page_size: payload.u64()?,
            })),
            POSTCOPY_LISTEN => Self::PostcopyListen,
            POSTCOPY_RUN => Self::PostcopyRun,
            POSTCOPY_RAM_DISCARD => {
                let version = payload.u8()?;
                let block = BlockName::from_wire(payload.pstr()?)?;
                let end = payload.u8()?;
                let mut ranges = Vec::with_capacity(payload.remaining() / 16);
                while payload.remaining() >= 16 {
                    ranges.push(DiscardRange { start: payload.u64()?, len: payload.u64()? });
                }
                if (version, end) != (0, 0) {
                    return Err(DecodeError::BadCommandPayload { command: name(number) }.into());
                }
                Self::PostcopyRamDiscard { block, ranges }
            }
            PACKAGED => Self::Packaged { len: payload.u32()? },
            ENABLE_COLO => Self::EnableColo,
            POSTCOPY_RESUME => Self::PostcopyResume,
            RECV_BITMAP => Self::RecvBitmap { block: BlockName::from_wire(payload.pstr()?)? },
            SWITCHOVER_START => Self::SwitchoverStart,
            GO => Self::Go,
            SECTION_LENGTH => Self::SectionLength(BodyLength::from_wire(payload.u64()?)),
            SECTION_PACKETS => Self::SectionLength(BodyLength::packets_from_wire(payload.u64()?)),
            DESCRIBE => match payload.u32()? {
                len if len > MAX_DESCRIPTION => return Err(too_long(len).into()),
                len => Self::Describe { len },
            },
            SHARED_MEMORY => match payload.u32()? {
                len if len > MAX_SHARED_LIST => {
                    let (what, limit) = ("list of shared memory", MAX_SHARED_LIST);
                    return Err(Violation::DescriptionTooLong { what, len, limit }.into());
                }
                len => Self::SharedMemory { len },
            },
            _ => return Err(DecodeError::UnknownCommand { number }.into()),
        })
    }

    const fn number(&self) -> u16 {
        match self {
            Self::OpenReturnPath => OPEN_RETURN_PATH,
            Self::Ping(_) => PING,
            Self::PostcopyAdvise(_) => POSTCOPY_ADVISE,
            Self::PostcopyListen => POSTCOPY_LISTEN,
            Self::PostcopyRun => POSTCOPY_RUN,
            Self::PostcopyRamDiscard { .. } => POSTCOPY_RAM_DISCARD,
            Self::Packaged { .. } => PACKAGED,
            Self::EnableColo => ENABLE_COLO,
            Self::PostcopyResume => POSTCOPY_RESUME,
            Self::RecvBitmap { .. } => RECV_BITMAP,
            Self::SwitchoverStart => SWITCHOVER_START,
            Self::Go => GO,
            Self::Describe { .. } => DESCRIBE,
            Self::SharedMemory { .. } => SHARED_MEMORY,
            Self::SectionLength(BodyLength::Packets(_)) => SECTION_PACKETS,
            Self::SectionLength(_) => SECTION_LENGTH,
        }
    }
}

const fn too_long(len: u32) -> Violation {
    Violation::DescriptionTooLong { what: "description of the VM", len, limit: MAX_DESCRIPTION }
}

const fn name(number: u16) -> &'static str {
    match number {
        OPEN_RETURN_PATH => "OPEN_RETURN_PATH",
        PING => "PING",
        POSTCOPY_ADVISE => "POSTCOPY_ADVISE",
        POSTCOPY_LISTEN => "POSTCOPY_LISTEN",
        POSTCOPY_RUN => "POSTCOPY_RUN",
        POSTCOPY_RAM_DISCARD => "POSTCOPY_RAM_DISCARD",
        PACKAGED => "PACKAGED",
        ENABLE_COLO => "ENABLE_COLO",
        POSTCOPY_RESUME => "POSTCOPY_RESUME",
        RECV_BITMAP => "RECV_BITMAP",
        GO => "GO",
        DESCRIBE => "DESCRIBE",
        SHARED_MEMORY => "SHARED_MEMORY",
        SECTION_LENGTH => "SECTION_LENGTH",
        SECTION_PACKETS => "SECTION_PACKETS",
        _ => "SWITCHOVER_START",
    }
}

const OPEN_RETURN_PATH: u16 = 1;
const PING: u16 = 2;
const POSTCOPY_ADVISE: u16 = 3;
const POSTCOPY_LISTEN: u16 = 4;
const POSTCOPY_RUN: u16 = 5;
const POSTCOPY_RAM_DISCARD: u16 = 6;
const PACKAGED: u16 = 7;
const ENABLE_COLO: u16 = 8;
const POSTCOPY_RESUME: u16 = 9;
const RECV_BITMAP: u16 = 10;
const SWITCHOVER_START: u16 = 11;
/// Far from the numbers that QEMU uses.
const GO: u16 = 0x4d01;
const DESCRIBE: u16 = 0x4d02;
const SHARED_MEMORY: u16 = 0x4d03;
const SECTION_LENGTH: u16 = 0x4d04;
const SECTION_PACKETS: u16 = 0x4d05;

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(command: &Command) -> Vec<u8> {
        let mut out = Vec::new();
        command.encode(&mut out);
        out
    }

    fn every_command() -> [Command; 19] {
        let block = BlockName::new("pc.ram").unwrap();
        [
            Command::OpenReturnPath,
            Command::Ping(0x42),
            Command::PostcopyAdvise(None),
            Command::PostcopyAdvise(Some(PostcopyAdvice { page_size_summary: 0x20_1000, page_size: 0x1000 })),
            Command::PostcopyListen,
            Command::PostcopyRun,
            Command::PostcopyRamDiscard {
                block: block.clone(),
                ranges: vec![DiscardRange { start: 0x1000, len: 0x3000 }, DiscardRange { start: 1 << 40, len: 0x1000 }],
            },
            Command::Packaged { len: 1 << 20 },
            Command::EnableColo,
            Command::PostcopyResume,
            Command::RecvBitmap { block },
            Command::SwitchoverStart,
            Command::Go,
            Command::Describe { len: MAX_DESCRIPTION },
            Command::SharedMemory { len: MAX_SHARED_LIST },
            Command::SectionLength(BodyLength::Bytes(1 << 40)),
            Command::SectionLength(BodyLength::Chunks),
            Command::SectionLength(BodyLength::Packets(Some(1 << 40))),
            Command::SectionLength(BodyLength::Packets(None)),
        ]
    }

    #[test]
    fn the_commands_seen_on_the_wire_are_ours() {
        assert_eq!(encoded(&Command::OpenReturnPath), b"\0\x01\0\0");
        assert_eq!(encoded(&Command::Ping(1)), b"\0\x02\0\x04\0\0\0\x01");
        let advice = PostcopyAdvice { page_size_summary: 0x1000, page_size: 0x1000 };
        assert_eq!(
            encoded(&Command::PostcopyAdvise(Some(advice))),
            b"\0\x03\0\x10\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\x10\0"
        );
        assert_eq!(encoded(&Command::SwitchoverStart), b"\0\x0b\0\0");
        let ranges =
            vec![DiscardRange { start: 0x1000, len: 0x3000 }, DiscardRange { start: 0x20_0000, len: 0x6e0_0000 }];
        assert_eq!(
            encoded(&Command::PostcopyRamDiscard { block: BlockName::new("pc.ram").unwrap(), ranges }),
            b"\0\x06\0\x29\0\x06pc.ram\0\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\x30\0\0\0\0\0\0\x20\0\0\0\0\0\0\x06\xe0\0\0"
        );
        assert_eq!(encoded(&Command::PostcopyRun), b"\0\x05\0\0");
        assert_eq!(encoded(&Command::Packaged { len: 0x348f }), b"\0\x07\0\x04\0\0\x34\x8f");
    }

    #[test]
    fn every_command_survives_the_wire_and_truncated_asks_for_more() {
        for command in every_command() {
            let bytes = encoded(&command);
            for len in 0..bytes.len() {
                let step = Command::decode(&bytes[..len]).unwrap();
                assert!(matches!(step, Step::Need(total) if len < total && total <= bytes.len()), "{command:?} {len}");
            }
            let used = bytes.len();
            assert_eq!(Command::decode(&bytes), Ok(Step::Item { item: command, used }));
        }
    }

    #[test]
    fn unknown_and_misshapen_commands_are_refused() {
        for number in [0u16, 12, 0x100] {
            let refused = DecodeError::UnknownCommand { number };
            assert_eq!(Command::decode(&number.to_be_bytes()), Err(refused.into()));
        }
        for (bytes, command, len) in [
            (&b"\0\x01\0\x01"[..], "OPEN_RETURN_PATH", 1),
            (b"\0\x02\xff\xff", "PING", 0xffff),
            (b"\0\x03\0\x08", "POSTCOPY_ADVISE", 8),
            (b"\0\x0a\0\x01", "RECV_BITMAP", 1),
            (b"\x4d\x02\0\x08", "DESCRIBE", 8),
            (b"\x4d\x03\0\x02", "SHARED_MEMORY", 2),
            (b"\x4d\x04\0\x04", "SECTION_LENGTH", 4),
            (b"\x4d\x05\0\x04", "SECTION_PACKETS", 4),
        ] {
            assert_eq!(Command::decode(bytes), Err(DecodeError::BadCommandLength { command, len }.into()));
        }
        for (bytes, command) in [
            (&b"\0\x0a\0\x03\x03pc"[..], "RECV_BITMAP"),
            (b"\0\x0a\0\x03\x01pc", "RECV_BITMAP"),
            (b"\0\x06\0\x04\x01\x01p\0", "POSTCOPY_RAM_DISCARD"),
            (b"\0\x06\0\x06\0\x01p\0\0\0", "POSTCOPY_RAM_DISCARD"),
        ] {
            assert_eq!(Command::decode(bytes), Err(DecodeError::BadCommandPayload { command }.into()), "{bytes:?}");
        }
    }

    #[test]
    fn a_description_that_is_too_long_is_refused_before_it_is_read() {
        for len in [MAX_DESCRIPTION + 1, u32::MAX] {
            let bytes = encoded(&Command::Describe { len });
            assert_eq!(Command::decode(&bytes), Err(too_long(len).into()));
        }
        let len = MAX_SHARED_LIST + 1;
        let too_long = Violation::DescriptionTooLong { what: "list of shared memory", len, limit: MAX_SHARED_LIST };
        assert_eq!(Command::decode(&encoded(&Command::SharedMemory { len })), Err(too_long.into()));
    }

    #[test]
    fn what_continues_or_replicates_a_migration_is_refused_by_name() {
        let refused: Vec<_> = every_command().iter().filter_map(Command::refusal).collect();
        assert_eq!(refused.len(), 3);
        assert!(refused.contains(&Violation::ColoRefused));
        assert!(refused.contains(&Violation::RecoveryRefused { command: "RECV_BITMAP" }));
    }

    #[test]
    fn every_length_survives_the_wire() {
        for len in [BodyLength::Bytes(0), BodyLength::Bytes(u64::MAX - 1), BodyLength::Chunks] {
            assert_eq!(BodyLength::from_wire(len.to_wire()), len);
        }
    }
}
