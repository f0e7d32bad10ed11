//! Device-state packets: parts of the state of one device, on the channels.
//!
//! The header is QEMU's (`MultiFDPacketDeviceState_t`), where only devices of the VFIO class send such packets, with a payload of
//! their own. A VM cannot take what it does not understand: there they are [refused by name](device_state_refusal). A checkpoint keeps
//! each as it is ([`OpaquePacket`]). Between two ends that agreed on the extension
//! [`StatePackets`](crate::extension::Extension::StatePackets) the payload has a number in front of the state:
//!
//! | offset | size | field                                                                       |
//! |-------:|-----:|-----------------------------------------------------------------------------|
//! |      0 |   12 | magic, version, flags (`40` alone)                                          |
//! |     12 |  256 | section name, NUL-terminated                                                |
//! |    268 |    4 | instance id                                                                 |
//! |    272 |    4 | payload length: the number and the state, 9 to 1,048,584                    |
//! |    276 |    8 | number: counts over all channels and all sections from 0 on, without a gap  |
//! |    284 |    n | state                                                                       |
//!
//! On each channel the numbers ascend, so the packet that is waited for is never held up by one that is not. In which section a packet
//! belongs, and how long it is, main says as well ([`BodyLength::Packets`](crate::command::BodyLength::Packets)).

use crate::ids::{escape, name_text};
use crate::packet::{DEVICE_STATE, DEVICE_STATE_LEN, MAGIC, Prefix, VERSION};
use crate::violation::{DecodeError, ProtocolError, Violation};

/// What stands before the state in a packet between two ends of this implementation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StatePacket<'a> {
    /// The name of the section.
    pub name: &'a str,
    /// The instance of the section.
    pub instance: u32,
    /// The number of the packet.
    pub number: u64,
    /// Bytes of state that follow: 1 to [`MAX_STATE`].
    pub len: u32,
}

impl<'a> StatePacket<'a> {
    /// Checks what stands before the state; `head` is [`HEAD_LEN`] bytes long.
    ///
    /// # Errors
    /// It is too short, no device-state packet, has no name, or an impossible length.
    pub fn decode(head: &'a [u8]) -> Result<StatePacket<'a>, ProtocolError> {
        let Some((head, number)) = head.get(..HEAD_LEN).and_then(|head| head.split_last_chunk()) else {
            return Err(DecodeError::Truncated { needed: HEAD_LEN - head.len() }.into());
        };
        let Header { name, instance, payload_len } = Header::decode(head)?;
        match payload_len.checked_sub(NUMBER_LEN) {
            Some(len @ 1..=MAX_STATE) => {
                Ok(StatePacket { name: name_text(name)?, instance, number: u64::from_be_bytes(*number), len })
            }
            _ => Err(Violation::StatePacketSize { size: payload_len, limit: NUMBER_LEN + MAX_STATE }.into()),
        }
    }

    /// Writes what stands before the state over `head`.
    ///
    /// # Panics
    /// `head` is not [`HEAD_LEN`] bytes long, or the name longer than 255.
    pub fn encode_into(&self, head: &mut [u8]) {
        assert_eq!(head.len(), HEAD_LEN, "the head has a size of its own");
        head.fill(0);
        encode_header(head, self.name, self.instance, NUMBER_LEN + self.len);
        head[DEVICE_STATE_LEN..].copy_from_slice(&self.number.to_be_bytes());
    }
}

/// The header of a packet whose payload only the device understands that has sent it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpaquePacket<'a> {
    /// The name of the section.
    pub name: &'a str,
    /// The instance of the section.
    pub instance: u32,
    /// Bytes of payload that follow: 1 to [`MAX_OPAQUE`].
    pub len: u32,
}

impl<'a> OpaquePacket<'a> {
    /// Checks the header of a packet; `header` is [`DEVICE_STATE_LEN`] bytes long.
    ///
    /// # Errors
    /// It is too short, no device-state packet, has no name or one that does not end, or an impossible length.
    pub fn decode(header: &'a [u8]) -> Result<OpaquePacket<'a>, ProtocolError> {
        let Header { name, instance, payload_len: len } = Header::decode(header)?;
        if header[INSTANCE_AT - 1] != 0 && !header[NAME_AT..INSTANCE_AT].contains(&0) {
            return Err(DecodeError::BlockNameInvalid { name: escape(&header[NAME_AT..INSTANCE_AT]) }.into());
        }
        let name = name_text(name)?;
        match len {
            1..=MAX_OPAQUE => Ok(OpaquePacket { name, instance, len }),
            size => Err(Violation::OpaquePacketSize { size, limit: MAX_OPAQUE }.into()),
        }
    }

    /// The header as QEMU sends it.
    ///
    /// # Panics
    /// The name is longer than 255 bytes.
    pub fn encode(&self) -> [u8; DEVICE_STATE_LEN] {
        let mut header = [0; DEVICE_STATE_LEN];
        encode_header(&mut header, self.name, self.instance, self.len);
        header
    }
}

/// The refusal of a packet with a part of an assigned device's state; `header` is [`DEVICE_STATE_LEN`] bytes long.
pub fn device_state_refusal(header: &[u8]) -> ProtocolError {
    match Header::decode(header) {
        Ok(Header { name, instance, .. }) => {
            Violation::DeviceStatePacketRefused { name: escape(name), instance }.into()
        }
        Err(error) => error.into(),
    }
}

/// Writes the header as QEMU has it over the zeros in `head`.
fn encode_header(head: &mut [u8], name: &str, instance: u32, payload_len: u32) {
    head[..4].copy_from_slice(&MAGIC.to_be_bytes());
    head[4..8].copy_from_slice(&VERSION.to_be_bytes());
    head[8..12].copy_from_slice(&DEVICE_STATE.to_be_bytes());
    // The last byte of the field is a NUL.
    head[NAME_AT..INSTANCE_AT - 1][..name.len()].copy_from_slice(name.as_bytes());
    head[INSTANCE_AT..][..4].copy_from_slice(&instance.to_be_bytes());
    head[INSTANCE_AT + 4..][..4].copy_from_slice(&payload_len.to_be_bytes());
}

/// The header as QEMU has it.
struct Header<'a> {
    /// Up to the NUL.
    name: &'a [u8],
    instance: u32,
    payload_len: u32,
}

impl Header<'_> {
    fn decode(header: &[u8]) -> Result<Header<'_>, DecodeError> {
        let Some(header) = header.get(..DEVICE_STATE_LEN) else {
            return Err(DecodeError::Truncated { needed: DEVICE_STATE_LEN - header.len() });
        };
        let prefix = Prefix::decode(header.first_chunk().expect("a header is longer than its prefix"))?;
        if !prefix.device_state() {
            return Err(DecodeError::BadPacketFlags { flags: prefix.flags() });
        }
        let name = &header[NAME_AT..INSTANCE_AT - 1];
        let name = &name[..name.iter().position(|byte| *byte == 0).unwrap_or(name.len())];
        let field = |at: usize| u32::from_be_bytes(*header[at..].first_chunk().expect("the field lies in the header"));
        Ok(Header { name, instance: field(INSTANCE_AT), payload_len: field(INSTANCE_AT + 4) })
    }
}

/// Bytes before the state.
pub const HEAD_LEN: usize = DEVICE_STATE_LEN + NUMBER_LEN as usize;

/// The most state in one packet.
pub const MAX_STATE: u32 = 1 << 20;

/// The most payload of an [`OpaquePacket`]. No known device has more than a few MiB in one.
pub const MAX_OPAQUE: u32 = 256 << 20;

const NUMBER_LEN: u32 = 8;
const NAME_AT: usize = 12;
const INSTANCE_AT: usize = 268;

#[cfg(test)]
mod tests {
    use super::*;

    const PACKET: StatePacket<'static> = StatePacket { name: "gpu", instance: 3, number: 1 << 40, len: MAX_STATE };

    fn encoded(packet: &StatePacket<'_>) -> Vec<u8> {
        let mut head = vec![0xaa; HEAD_LEN];
        packet.encode_into(&mut head);
        head
    }

    #[test]
    fn a_packet_survives_the_wire_and_a_cut_one_asks_for_more() {
        let longest = "n".repeat(255);
        for packet in [PACKET, StatePacket { len: 1, number: 0, ..PACKET }, StatePacket { name: &longest, ..PACKET }] {
            let head = encoded(&packet);
            assert_eq!(StatePacket::decode(&head), Ok(packet));
            for len in 0..HEAD_LEN {
                let error = StatePacket::decode(&head[..len]).unwrap_err();
                assert_eq!(error, DecodeError::Truncated { needed: HEAD_LEN - len }.into());
            }
            let prefix = Prefix::decode(head.first_chunk().unwrap()).unwrap();
            assert_eq!((prefix.device_state(), prefix.header_len(4096)), (true, 276));
        }
        let head = encoded(&PACKET);
        assert_eq!(head[..16], *b"\x11\x22\x33\x44\0\0\0\x01\0\0\0\x40gpu\0");
        assert_eq!(head[268..], *b"\0\0\0\x03\0\x10\0\x08\0\0\x01\0\0\0\0\0");
    }

    #[test]
    fn a_packet_without_state_or_with_more_than_fits_is_refused() {
        for size in [0, 7, 8, (1 << 20) + 9, u32::MAX] {
            let mut head = encoded(&PACKET);
            head[272..276].copy_from_slice(&u32::to_be_bytes(size));
            let refused = Violation::StatePacketSize { size, limit: (1 << 20) + 8 };
            assert_eq!(StatePacket::decode(&head), Err(refused.into()));
        }
    }

    #[test]
    fn a_packet_needs_a_name_of_the_kind_that_sections_have() {
        for name in [&b"\0"[..], b"\xff\0"] {
            let mut head = encoded(&PACKET);
            head[12..12 + name.len()].copy_from_slice(name);
            let error = StatePacket::decode(&head).unwrap_err();
            assert!(matches!(error, ProtocolError::Decode(DecodeError::BlockNameInvalid { .. })), "{error}");
        }
    }

    #[test]
    fn a_header_with_an_opaque_payload_survives_the_wire_and_is_checked() {
        let longest = "n".repeat(255);
        for (name, len) in [("0000:00:02.0/vfio", 1), (&longest, MAX_OPAQUE)] {
            let packet = OpaquePacket { name, instance: 7, len };
            let header = packet.encode();
            assert_eq!(OpaquePacket::decode(&header), Ok(packet));
            let error = OpaquePacket::decode(&header[..275]).unwrap_err();
            assert_eq!(error, DecodeError::Truncated { needed: 1 }.into());
        }
        let header = |change: &dyn Fn(&mut [u8])| {
            let mut header = OpaquePacket { name: "gpu", instance: 0, len: 8 }.encode();
            change(&mut header);
            OpaquePacket::decode(&header).map(|packet| packet.len)
        };
        for size in [0, MAX_OPAQUE + 1, u32::MAX] {
            let refused = Violation::OpaquePacketSize { size, limit: MAX_OPAQUE };
            assert_eq!(header(&|bytes| bytes[272..276].copy_from_slice(&size.to_be_bytes())), Err(refused.into()));
        }
        for name in [&b"\0"[..], b"\xff\0", &[b'n'; 256]] {
            let error = header(&|bytes| bytes[12..12 + name.len()].copy_from_slice(name)).unwrap_err();
            assert!(matches!(error, ProtocolError::Decode(DecodeError::BlockNameInvalid { .. })), "{error}");
        }
        // What stands behind the NUL is of no meaning.
        assert_eq!(header(&|bytes| bytes[16..268].fill(7)), Ok(8));
    }

    #[test]
    fn a_packet_of_another_source_is_refused_by_name() {
        let mut head = encoded(&StatePacket { name: "vfio", instance: 2, ..PACKET });
        let refused = Violation::DeviceStatePacketRefused { name: "vfio".into(), instance: 2 };
        assert_eq!(device_state_refusal(&head), refused.into());
        assert_eq!(device_state_refusal(&head[..275]), DecodeError::Truncated { needed: 1 }.into());
        head[8..12].copy_from_slice(&1u32.to_be_bytes());
        assert_eq!(device_state_refusal(&head), DecodeError::BadPacketFlags { flags: 1 }.into());
        assert_eq!(StatePacket::decode(&head), Err(DecodeError::BadPacketFlags { flags: 1 }.into()));
    }
}
