//! What main has beside `ram` before the devices' state, as it stands on the wire.

use multifd_proto::stream::{Section, SectionKind};

/// Whole sections, heads and footers included, that a later stream carries again.
///
/// Those of devices that are needed before the pages keep their place: QEMU 11.1 has them before the RAM blocks, QEMU 10.0
/// behind them. (Both load them in either place.) Sections in parts, such as `dirty-bitmap`, follow one another
/// behind the RAM blocks; nothing in them refers to RAM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BesideRam {
    /// Sections of devices: first those before the START section of `ram`.
    early: Vec<u8>,
    /// `before_ram <= early.len()`
    before_ram: usize,
    in_parts: Vec<u8>,
}

impl BesideRam {
    /// Adds `section`, whole in `bytes`. `ram_started` says whether the RAM blocks came before it.
    pub(crate) fn push(&mut self, section: &Section, bytes: &[u8], ram_started: bool) {
        if section.kind != SectionKind::Full {
            return self.in_parts.extend_from_slice(bytes);
        }
        self.early.extend_from_slice(bytes);
        if !ram_started {
            self.before_ram = self.early.len();
        }
    }

    /// Sections of devices, in the order of the stream.
    pub fn early(&self) -> &[u8] {
        &self.early
    }

    /// Those of them that stand before the START section of `ram`.
    pub fn before_ram(&self) -> &[u8] {
        &self.early[..self.before_ram]
    }

    /// Those of them that stand behind it.
    pub fn behind_ram_start(&self) -> &[u8] {
        &self.early[self.before_ram..]
    }

    /// Sections that come in parts, in the order of the stream.
    pub fn in_parts(&self) -> &[u8] {
        &self.in_parts
    }

    /// How many bytes there are.
    pub(crate) fn bytes(&self) -> usize {
        self.early.len() + self.in_parts.len()
    }
}
