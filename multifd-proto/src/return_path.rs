//! Messages from the destination back to the source, on the main connection.
//!
//! | type | name           | payload                                    |
//! |-----:|----------------|--------------------------------------------|
//! |    1 | SHUT           | 32-bit status, 0 = everything was loaded   |
//! |    2 | PONG           | the 32-bit value of the PING               |
//! |    3 | REQ_PAGES_ID   | 64-bit start, 32-bit length, block name    |
//! |    4 | REQ_PAGES      | 64-bit start, 32-bit length                |
//! |    5 | RECV_BITMAP    | block name                                 |
//! |    6 | RESUME_ACK     | 32-bit 1                                   |
//! |    7 | SWITCHOVER_ACK | none                                       |
//! | 4d01 | ACCEPTED       | 16-bit count, as many 16-bit extensions    |
//! | 4d02 | READY          | none                                       |
//! | 4d03 | REASON         | text, at most 512 bytes of UTF-8           |
//! | 4d04 | PREPARED       | 32-bit length of the answer that follows   |
//!
//! Each message is a 16-bit type, a 16-bit payload length and the payload. Nothing may be sent before the source opened the
//! return path with a command. SHUT(0) says that the guest belongs to the destination, and is the last message. A source that sees another status
//! runs the guest again. The last four messages (types in hexadecimal) are ours: a destination sends them only to a source
//! that has made an [offer](crate::extension), which a QEMU never does.

use std::fmt;

use crate::extension::{Extensions, MAX_DESCRIPTION};
use crate::ids::BlockName;
use crate::violation::{DecodeError, ProtocolError, Violation};
use crate::wire::{Codec, Reader, Step, Stop, Writer, step};

/// One message. QEMU: `MIG_RP_MSG_*`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// The destination is done: 0 when it has the guest, anything else when it does not.
    Shut(u32),
    /// Answer to a PING, with its value.
    Pong(u32),
    /// Postcopy asks for pages of a block.
    ReqPagesId {
        /// Offset of the first page inside the block.
        start: u64,
        /// How many bytes.
        len: u32,
        /// The block.
        block: BlockName,
    },
    /// Postcopy asks for pages of the block of the request before.
    ReqPages {
        /// Offset of the first page inside the block.
        start: u64,
        /// How many bytes.
        len: u32,
    },
    /// Postcopy recovery: a bitmap of this block follows outside the message.
    RecvBitmap {
        /// The block.
        block: BlockName,
    },
    /// Postcopy recovery goes on.
    ResumeAck(u32),
    /// The destination's devices are ready for the switchover. A source before QEMU 8.1, or with a machine type of 11.1 or
    /// newer that does not wait for it, fails when it gets this; see [`crate::machine::MachineDefaults`].
    SwitchoverAck,
    /// The extensions of the source's offer that the destination takes.
    Accepted(Extensions),
    /// Everything is loaded and durable; the guest starts when GO arrives, see [`crate::commit`].
    Ready,
    /// Why SHUT with a status other than 0 follows, for people.
    Reason(String),
    /// The VM that DESCRIBE is about was made. So many bytes of the VMM's answer follow outside of the message.
    Prepared {
        /// How many bytes, at most [`MAX_DESCRIPTION`].
        len: u32,
    },
}

/// The message's name on the wire.
impl fmt::Display for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(name(self.kind()))
    }
}

impl Codec for Message {
    /// The message at the start of `input`, or how many bytes are needed.
    fn decode(input: &[u8]) -> Result<Step<Self>, ProtocolError> {
        step(input, Self::read)
    }

    /// Appends the message.
    fn encode(&self, out: &mut Vec<u8>) {
        let mut payload = Vec::new();
        let mut writer = Writer::new(&mut payload);
        match self {
            Self::Shut(value) | Self::Pong(value) | Self::ResumeAck(value) | Self::Prepared { len: value } => {
                writer.u32(*value)
            }
            Self::ReqPagesId { start, len, block } => writer.u64(*start).u32(*len).pstr(block.as_str().as_bytes()),
            Self::ReqPages { start, len } => writer.u64(*start).u32(*len),
            Self::RecvBitmap { block } => writer.pstr(block.as_str().as_bytes()),
            Self::SwitchoverAck | Self::Ready => &mut writer,
            Self::Accepted(extensions) => {
                extensions.write(&mut writer);
                &mut writer
            }
            Self::Reason(text) => writer.bytes(beginning(text).as_bytes()),
        };
        Writer::new(out).u16(self.kind()).u16(payload.len() as u16).bytes(&payload);
    }
}

impl Message {
    fn read(reader: &mut Reader<'_>) -> Result<Self, Stop> {
        let kind = reader.u16()?;
        if kind == TLS_ALERT {
            return Err(DecodeError::SpeaksTls.into());
        }
        if !(SHUT..=SWITCHOVER_ACK).contains(&kind) && !(ACCEPTED..=PREPARED).contains(&kind) {
            return Err(DecodeError::UnknownMessage { kind }.into());
        }
        let len = reader.u16()?;
        let bad_length = || DecodeError::BadMessageLength { name: name(kind), len };
        if len > MAX_PAYLOAD {
            return Err(bad_length().into());
        }
        let mut payload = Reader::new(reader.bytes(usize::from(len))?);
        // From here on a lack of bytes cannot be cured by waiting.
        let message = Self::read_payload(kind, &mut payload).map_err(|stop| match stop {
            Stop::Short(_) => bad_length().into(),
            Stop::Refused(error) => error,
        })?;
        if payload.remaining() > 0 {
            return Err(bad_length().into());
        }
        Ok(message)
    }

    fn read_payload(kind: u16, payload: &mut Reader<'_>) -> Result<Self, Stop> {
        Ok(match kind {
            SHUT => Self::Shut(payload.u32()?),
            PONG => Self::Pong(payload.u32()?),
            REQ_PAGES_ID => Self::ReqPagesId {
                start: payload.u64()?,
                len: payload.u32()?,
                block: BlockName::from_wire(payload.pstr()?)?,
            },
            REQ_PAGES => Self::ReqPages { start: payload.u64()?, len: payload.u32()? },
            RECV_BITMAP => Self::RecvBitmap { block: BlockName::from_wire(payload.pstr()?)? },
            RESUME_ACK => Self::ResumeAck(payload.u32()?),
            SWITCHOVER_ACK => Self::SwitchoverAck,
            ACCEPTED => Self::Accepted(Extensions::read(payload)?),
            READY => Self::Ready,
            REASON => {
                let text = payload.bytes(payload.remaining())?;
                let text = String::from_utf8_lossy(text);
                Self::Reason(text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect())
            }
            PREPARED => match payload.u32()? {
                len if len > MAX_DESCRIPTION => return Err(too_long(len).into()),
                len => Self::Prepared { len },
            },
            _ => return Err(DecodeError::UnknownMessage { kind }.into()),
        })
    }

    const fn kind(&self) -> u16 {
        match self {
            Self::Shut(_) => SHUT,
            Self::Pong(_) => PONG,
            Self::ReqPagesId { .. } => REQ_PAGES_ID,
            Self::ReqPages { .. } => REQ_PAGES,
            Self::RecvBitmap { .. } => RECV_BITMAP,
            Self::ResumeAck(_) => RESUME_ACK,
            Self::SwitchoverAck => SWITCHOVER_ACK,
            Self::Accepted(_) => ACCEPTED,
            Self::Ready => READY,
            Self::Reason(_) => REASON,
            Self::Prepared { .. } => PREPARED,
        }
    }
}

const fn too_long(len: u32) -> Violation {
    Violation::DescriptionTooLong { what: "answer to the description of the VM", len, limit: MAX_DESCRIPTION }
}

/// As much of `text` as one message takes, cut between two characters.
fn beginning(text: &str) -> &str {
    let limit = text.len().min(MAX_PAYLOAD.into());
    // The start of the text is a boundary, so there is one.
    let end = (0..=limit).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
    &text[..end]
}

const fn name(kind: u16) -> &'static str {
    match kind {
        SHUT => "SHUT",
        PONG => "PONG",
        REQ_PAGES_ID => "REQ_PAGES_ID",
        REQ_PAGES => "REQ_PAGES",
        RECV_BITMAP => "RECV_BITMAP",
        RESUME_ACK => "RESUME_ACK",
        ACCEPTED => "ACCEPTED",
        READY => "READY",
        REASON => "REASON",
        PREPARED => "PREPARED",
        _ => "SWITCHOVER_ACK",
    }
}

/// The longest payload of a message.
pub const MAX_PAYLOAD: u16 = 512;

const SHUT: u16 = 1;
const PONG: u16 = 2;
const REQ_PAGES_ID: u16 = 3;
const REQ_PAGES: u16 = 4;
const RECV_BITMAP: u16 = 5;
const RESUME_ACK: u16 = 6;
const SWITCHOVER_ACK: u16 = 7;
/// What a TLS alert begins with: its type, and the major version.
const TLS_ALERT: u16 = 0x1503;

/// Far from the types that QEMU uses.
const ACCEPTED: u16 = 0x4d01;
const READY: u16 = 0x4d02;
const REASON: u16 = 0x4d03;
const PREPARED: u16 = 0x4d04;

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(message: &Message) -> Vec<u8> {
        let mut out = Vec::new();
        message.encode(&mut out);
        out
    }

    #[test]
    fn the_messages_seen_on_the_wire_are_ours() {
        assert_eq!(encoded(&Message::Shut(0)), b"\0\x01\0\x04\0\0\0\0");
        assert_eq!(encoded(&Message::Pong(1)), b"\0\x02\0\x04\0\0\0\x01");
        assert_eq!(encoded(&Message::SwitchoverAck), b"\0\x07\0\0");
    }

    #[test]
    fn every_message_survives_the_wire_and_truncated_asks_for_more() {
        let block = BlockName::new("pc.ram").unwrap();
        for message in [
            Message::Shut(1),
            Message::Pong(0x42),
            Message::ReqPagesId { start: 0x1000, len: 4096, block: block.clone() },
            Message::ReqPages { start: 1 << 40, len: 4096 },
            Message::RecvBitmap { block },
            Message::ResumeAck(1),
            Message::SwitchoverAck,
            Message::Accepted(Extensions::known()),
            Message::Ready,
            Message::Reason("no space left on device".to_owned()),
            Message::Prepared { len: MAX_DESCRIPTION },
        ] {
            let bytes = encoded(&message);
            for len in 0..bytes.len() {
                let step = Message::decode(&bytes[..len]).unwrap();
                assert!(matches!(step, Step::Need(total) if len < total && total <= bytes.len()));
            }
            let used = bytes.len();
            assert_eq!(Message::decode(&bytes), Ok(Step::Item { item: message, used }));
        }
    }

    #[test]
    fn a_reason_that_is_too_long_is_cut_between_characters() {
        for (reason, kept) in [("é".repeat(400), 512), (format!("x{}", "é".repeat(400)), 511), ("x".repeat(512), 512)]
        {
            let bytes = encoded(&Message::Reason(reason.clone()));
            let used = bytes.len();
            let item = Message::Reason(reason[..kept].to_owned());
            assert_eq!(Message::decode(&bytes), Ok(Step::Item { item, used }));
        }
    }

    #[test]
    fn an_answer_that_is_too_long_is_refused_before_it_is_read() {
        for len in [MAX_DESCRIPTION + 1, u32::MAX] {
            assert_eq!(Message::decode(&encoded(&Message::Prepared { len })), Err(too_long(len).into()));
        }
    }

    #[test]
    fn unknown_and_misshapen_messages_are_refused() {
        assert_eq!(Message::decode(&[0x15, 3, 3, 0, 2, 2, 10]), Err(DecodeError::SpeaksTls.into()));
        for kind in [0u16, 8, 0xffff] {
            let bytes = [&kind.to_be_bytes()[..], &[0, 0]].concat();
            assert_eq!(Message::decode(&bytes), Err(DecodeError::UnknownMessage { kind }.into()));
        }
        for (bytes, name, len) in [
            (&b"\0\x01\0\x03\0\0\0"[..], "SHUT", 3),
            (b"\0\x02\0\x05\0\0\0\0\0", "PONG", 5),
            (b"\0\x07\0\x01\0", "SWITCHOVER_ACK", 1),
            (b"\0\x05\0\x02\x05p", "RECV_BITMAP", 2),
            (b"\0\x03\x02\x01", "REQ_PAGES_ID", 513),
            (b"\x4d\x04\0\x03\0\0\0", "PREPARED", 3),
        ] {
            assert_eq!(Message::decode(bytes), Err(DecodeError::BadMessageLength { name, len }.into()));
        }
    }
}
