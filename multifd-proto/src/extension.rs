//! What two ends of this implementation agree on at the start, beyond what a QEMU knows.
//!
//! The source offers: subsection `configuration/multifd`, version 1, behind the other subsections of the configuration.
//!
//! | bytes | field                                                        |
//! |------:|--------------------------------------------------------------|
//! |     1 | number of channels; 0: main carries the pages                |
//! |    16 | token of the migration; all zero if it has none              |
//! |     2 | number of extensions, at most 64                             |
//! | 2 × n | their numbers                                                |
//!
//! The destination answers on the return path with [`Message::Accepted`](crate::return_path::Message::Accepted), the numbers
//! that it takes. What it does not take is not used: a destination may know fewer extensions than the source. A source does
//! not offer anything to a QEMU, which refuses subsections that it does not know.

use crate::violation::Violation;
use crate::wire::{Reader, Stop, Writer};

/// One extension.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Extension {
    /// READY from the destination and GO from the source come before the guest starts there, see [`crate::commit`].
    TwoStepCommit,
    /// DESCRIBE from the source and PREPARED from the destination come before the RAM blocks: the destination makes its VM by
    /// what the source says of its own.
    Prepare,
    /// SHARED_MEMORY from the source comes before DESCRIBE: memory that the destination maps instead of receiving it, see
    /// [`crate::shared_memory`]. Offered only by a source that hands memory over, and taken only together with
    /// [`TwoStepCommit`](Extension::TwoStepCommit).
    SharedMemory,
    /// SECTION_LENGTH from the source comes before each section of a device, which tells the destination where its body ends
    /// ([`BodyLength`](crate::command::BodyLength)), and sections of devices may come between two rounds: state that is sent while the guest runs.
    SectionLength,
    /// The source repeats the token of the migration behind the end of the stream: 16 bytes that no device's state holds, since no
    /// guest knows them. A destination that does not understand device state, which has no length on the wire, knows by them where it
    /// ends, and any other that no description is still to come. Taken only where the offer has a token, and together with [`TwoStepCommit`](Extension::TwoStepCommit).
    EndToken,
    /// SECTION_PACKETS from the source says that the body of a section is not on main: it comes in
    /// [device-state packets](crate::device_state) over all channels, once the last round is over. Taken only together with
    /// [`SectionLength`](Extension::SectionLength), and where there are channels.
    StatePackets,
}

impl Extension {
    /// Every extension that this version knows.
    pub(crate) const ALL: [Extension; 6] = [
        Extension::TwoStepCommit,
        Extension::Prepare,
        Extension::SharedMemory,
        Extension::SectionLength,
        Extension::EndToken,
        Extension::StatePackets,
    ];

    /// Its number on the wire.
    pub(crate) const fn number(self) -> u16 {
        match self {
            Extension::TwoStepCommit => 1,
            Extension::Prepare => 2,
            Extension::SharedMemory => 3,
            Extension::SectionLength => 4,
            Extension::EndToken => 5,
            Extension::StatePackets => 6,
        }
    }
}

/// A set of extensions, by number: also of those that only the peer knows.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Extensions {
    numbers: Vec<u16>,
}

impl Extensions {
    /// All extensions that this version knows.
    pub fn known() -> Extensions {
        Extensions { numbers: Extension::ALL.map(Extension::number).to_vec() }
    }

    /// Those that are in both sets.
    #[must_use]
    pub fn and(&self, other: &Extensions) -> Extensions {
        Extensions { numbers: self.numbers.iter().copied().filter(|number| other.numbers.contains(number)).collect() }
    }

    /// The set without `extension`.
    #[must_use]
    pub fn without(&self, extension: Extension) -> Extensions {
        let numbers = self.numbers.iter().copied().filter(|number| *number != extension.number());
        Extensions { numbers: numbers.collect() }
    }

    /// Whether `extension` is in the set.
    pub fn contains(&self, extension: Extension) -> bool {
        self.numbers.contains(&extension.number())
    }

    /// Whether all of the set are in `other`.
    pub fn is_subset(&self, other: &Extensions) -> bool {
        self.numbers.iter().all(|number| other.numbers.contains(number))
    }

    pub(crate) fn read(reader: &mut Reader<'_>) -> Result<Extensions, Stop> {
        let count = reader.u16()?;
        if count > MAX_EXTENSIONS {
            let (what, len, limit) = ("number of extensions", count.into(), MAX_EXTENSIONS.into());
            return Err(Violation::ConfigurationTooLong { what, len, limit }.into());
        }
        let numbers = (0..count).map(|_| reader.u16()).collect::<Result<_, _>>()?;
        Ok(Extensions { numbers })
    }

    pub(crate) fn write(&self, writer: &mut Writer<'_>) {
        writer.u16(u16::try_from(self.numbers.len()).expect("at most MAX_EXTENSIONS are read, and fewer are known"));
        for number in &self.numbers {
            writer.u16(*number);
        }
    }
}

/// What a source offers in its configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    /// How many channels the migration has; 0 where main carries the pages.
    pub channels: u8,
    /// The secret that belongs to this migration, if it has one.
    pub token: Option<[u8; 16]>,
    /// What the source can do.
    pub extensions: Extensions,
}

impl Offer {
    pub(crate) fn read(reader: &mut Reader<'_>) -> Result<Offer, Stop> {
        let channels = reader.u8()?;
        let token: [u8; 16] = reader.array()?;
        let token = Some(token).filter(|token| *token != [0; 16]);
        Ok(Offer { channels, token, extensions: Extensions::read(reader)? })
    }

    pub(crate) fn write(&self, writer: &mut Writer<'_>) {
        writer.u8(self.channels).bytes(&self.token.unwrap_or_default());
        self.extensions.write(writer);
    }
}

/// The longest description of a VM, and the longest answer to one, in bytes.
pub const MAX_DESCRIPTION: u32 = 1 << 20;

/// The most extensions that a peer may name.
pub(crate) const MAX_EXTENSIONS: u16 = 64;

/// The name of the subsection.
pub(crate) const SUBSECTION: &str = "configuration/multifd";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::violation::ProtocolError;
    use crate::wire::{Step, step};

    fn decoded(bytes: &[u8]) -> Result<Step<Offer>, ProtocolError> {
        step(bytes, Offer::read)
    }

    #[test]
    fn an_offer_survives_the_wire_and_truncated_asks_for_more() {
        for (channels, token) in [(4, None), (4, Some([7; 16])), (0, None)] {
            let offer = Offer { channels, token, extensions: Extensions { numbers: vec![1, 0x7777] } };
            let mut bytes = Vec::new();
            offer.write(&mut Writer::new(&mut bytes));
            assert_eq!(bytes.len(), 1 + 16 + 2 + 4);
            for len in 0..bytes.len() {
                assert!(matches!(decoded(&bytes[..len]), Ok(Step::Need(total)) if len < total));
            }
            assert_eq!(decoded(&bytes), Ok(Step::Item { item: offer, used: bytes.len() }));
        }
    }

    #[test]
    fn an_offer_with_too_many_extensions_is_refused() {
        let mut bytes = vec![1; 17];
        bytes.extend(65u16.to_be_bytes());
        let (what, len, limit) = ("number of extensions", 65, 64);
        assert_eq!(decoded(&bytes), Err(Violation::ConfigurationTooLong { what, len, limit }.into()));
    }

    #[test]
    fn what_the_peer_does_not_know_is_not_agreed_on() {
        let theirs = Extensions { numbers: vec![0x7777] };
        assert!(!Extensions::known().and(&theirs).contains(Extension::TwoStepCommit));
        assert!(Extensions::known().and(&Extensions::known()).contains(Extension::TwoStepCommit));
        assert!(!theirs.is_subset(&Extensions::known()));
        let fewer = Extensions::known().without(Extension::Prepare);
        assert!(fewer.contains(Extension::TwoStepCommit) && !fewer.contains(Extension::Prepare));
        assert!(fewer.is_subset(&Extensions::known()) && !Extensions::known().is_subset(&fewer));
    }
}
