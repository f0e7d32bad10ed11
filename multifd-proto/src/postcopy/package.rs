//! The contents of a PACKAGED command: what the destination loads at once when it takes the guest over.
//!
//! LISTEN, the FULL sections of all devices, PING 3 (from QEMU 11.1 on also PING 0x42), RUN. There is neither an end of state
//! nor a description of the devices in it.

use std::ops::Range;

use crate::command::Command;
use crate::stream;
use crate::violation::DecodeError;
use crate::wire::Codec;
use crate::wire::Step;

/// Where the parts of a package are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Package {
    /// The sections of the devices.
    pub devices: Range<usize>,
    /// The values of the PINGs between the devices and RUN, in their order.
    pub pings: Vec<u32>,
}

impl Package {
    /// The value of the PING that every package has: its PONG says that the devices are loaded.
    pub const PING: u32 = 3;

    /// The parts of the package `bytes`.
    ///
    /// The sections are not looked at: a section of a device ends with its footer, so that the commands at the end
    /// cannot be mistaken for a part of it.
    ///
    /// # Errors
    /// [`DecodeError::BadPackage`] without LISTEN at the beginning or RUN at the end, and with more PINGs than any source
    /// sends.
    pub fn of(bytes: &[u8]) -> Result<Self, DecodeError> {
        let bad = |what| DecodeError::BadPackage { len: bytes.len(), what };
        let listen = command(&Command::PostcopyListen);
        let run = command(&Command::PostcopyRun);
        let rest = bytes.strip_prefix(&listen[..]).ok_or_else(|| bad("it does not begin with LISTEN"))?;
        let mut rest = rest.strip_suffix(&run[..]).ok_or_else(|| bad("it does not end with RUN"))?;
        let mut pings = Vec::new();
        while let Some((before, value)) = ping_at_the_end(rest) {
            if pings.len() == MAX_PINGS {
                return Err(bad("it has too many PINGs"));
            }
            pings.push(value);
            rest = before;
        }
        pings.reverse();
        Ok(Self { devices: listen.len()..listen.len() + rest.len(), pings })
    }

    /// Appends PACKAGED with a package of `devices`, the sections of all devices, and PING 3.
    ///
    /// Returns how many of the appended bytes belong before RUN: as long as no more than these were sent, the guest cannot run.
    ///
    /// # Panics
    /// If the package is longer than the 32-bit length can say.
    pub fn encode(devices: &[u8], out: &mut Vec<u8>) -> usize {
        let (listen, ping, run) =
            (command(&Command::PostcopyListen), command(&Command::Ping(Self::PING)), command(&Command::PostcopyRun));
        let len = listen.len() + devices.len() + ping.len() + run.len();
        let len = u32::try_from(len).expect("device state is limited to a part of 4 GiB");
        let begin = out.len();
        out.extend_from_slice(&command(&Command::Packaged { len }));
        for part in [&listen, devices, &ping] {
            out.extend_from_slice(part);
        }
        let before_run = out.len() - begin;
        out.extend_from_slice(&run);
        before_run
    }
}

/// Without its last 9 bytes, and the value of the PING that they are.
fn ping_at_the_end(bytes: &[u8]) -> Option<(&[u8], u32)> {
    let (before, last) = bytes.split_last_chunk::<PING_LEN>()?;
    let (&stream::COMMAND, command) = last.split_first()? else { return None };
    match Command::decode(command) {
        Ok(Step::Item { item: Command::Ping(value), used }) if used == command.len() => Some((before, value)),
        _ => None,
    }
}

/// A command with its element type byte.
fn command(command: &Command) -> Vec<u8> {
    let mut bytes = vec![stream::COMMAND];
    command.encode(&mut bytes);
    bytes
}

/// QEMU sends one or two.
const MAX_PINGS: usize = 16;

const PING_LEN: usize = 9;

#[cfg(test)]
mod tests {
    use super::*;

    /// A section with a footer, which is all that matters of it.
    const DEVICE: &[u8] = b"\x04\0\0\0\x07\x03cpu\0\0\0\0\0\0\0\x01state\x7e\0\0\0\x07";

    #[test]
    fn a_package_has_the_bytes_seen_on_the_wire_and_is_cut_again() {
        let mut out = b"before".to_vec();
        let before_run = Package::encode(DEVICE, &mut out);
        let expected = [
            &b"before\x08\0\x07\0\x04\0\0\0\x2e\x08\0\x04\0\0"[..],
            DEVICE,
            b"\x08\0\x02\0\x04\0\0\0\x03\x08\0\x05\0\0",
        ]
        .concat();
        assert_eq!(out, expected);
        assert_eq!(&out[6 + before_run..], b"\x08\0\x05\0\0");
        let package = &out[6 + 9..];
        assert_eq!(package.len(), 0x2e);
        assert_eq!(Package::of(package), Ok(Package { devices: 5..5 + DEVICE.len(), pings: vec![3] }));
    }

    #[test]
    fn both_pings_of_a_newer_source_are_told_from_the_devices() {
        let ping = |value| command(&Command::Ping(value));
        for devices in [&b""[..], DEVICE] {
            let package = [&b"\x08\0\x04\0\0"[..], devices, &ping(3), &ping(0x42), b"\x08\0\x05\0\0"].concat();
            let expected = Package { devices: 5..5 + devices.len(), pings: vec![3, 0x42] };
            assert_eq!(Package::of(&package), Ok(expected));
        }
    }

    #[test]
    fn a_package_without_its_ends_is_refused() {
        let mut whole = Vec::new();
        Package::encode(DEVICE, &mut whole);
        let whole = &whole[9..];
        for len in 0..whole.len() {
            let what = if len < 5 { "it does not begin with LISTEN" } else { "it does not end with RUN" };
            assert_eq!(Package::of(&whole[..len]), Err(DecodeError::BadPackage { len, what }));
        }
        let what = "it has too many PINGs";
        let pings = [&b"\x08\0\x04\0\0"[..], &b"\x08\0\x02\0\x04\0\0\0\x03".repeat(17), b"\x08\0\x05\0\0"].concat();
        assert_eq!(Package::of(&pings), Err(DecodeError::BadPackage { len: pings.len(), what }));
    }
}
