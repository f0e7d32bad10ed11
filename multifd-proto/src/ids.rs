//! Names and numbers of the protocol that are easily confused when they are bare strings and integers.

use std::borrow::Borrow;
use std::fmt;
use std::sync::Arc;

use crate::violation::DecodeError;

/// The name of a RAM block: 1 to 255 bytes of UTF-8 without NUL.
///
/// Cloning shares the text. `Debug` quotes and escapes it; `Display` escapes it, so that a peer cannot drive a terminal.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockName(Arc<str>);

impl BlockName {
    /// A name of at most this many bytes fits its length byte on main and the 256-byte field of a packet.
    pub(crate) const MAX_LEN: usize = 255;

    /// The name in `bytes`, as it stands on the wire without its length byte.
    pub(crate) fn from_wire(bytes: &[u8]) -> Result<Self, DecodeError> {
        name_text(bytes).map(|text| Self(text.into()))
    }

    /// The name `text`.
    pub fn new(text: &str) -> Result<Self, DecodeError> {
        Self::from_wire(text.as_bytes())
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for BlockName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

impl fmt::Display for BlockName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.as_str().escape_debug(), f)
    }
}

impl Borrow<str> for BlockName {
    fn borrow(&self) -> &str {
        self.as_str()
    }
}

impl AsRef<str> for BlockName {
    fn as_ref(&self) -> &str {
        self.as_str()
    }
}

impl PartialEq<str> for BlockName {
    fn eq(&self, other: &str) -> bool {
        self.as_str() == other
    }
}

impl PartialEq<&str> for BlockName {
    fn eq(&self, other: &&str) -> bool {
        self.as_str() == *other
    }
}

impl TryFrom<&str> for BlockName {
    type Error = DecodeError;

    fn try_from(text: &str) -> Result<Self, DecodeError> {
        Self::new(text)
    }
}

/// Checks a block name without copying it.
pub(crate) fn name_text(bytes: &[u8]) -> Result<&str, DecodeError> {
    let invalid = || DecodeError::BlockNameInvalid { name: escape(bytes) };
    let text = std::str::from_utf8(bytes).map_err(|_| invalid())?;
    if text.is_empty() || text.len() > BlockName::MAX_LEN || text.contains('\0') {
        return Err(invalid());
    }
    Ok(text)
}

/// Bytes of a peer in a form that is safe to show: ASCII as it is, the rest as `\xNN`, at most 255 bytes of it.
pub(crate) fn escape(bytes: &[u8]) -> String {
    bytes[..bytes.len().min(BlockName::MAX_LEN)].escape_ascii().to_string()
}

/// The number of a multifd channel as its first packet gives it: below the number of channels, each once.
///
/// Connections may be accepted in any order, so this is not the order of arrival.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ChannelId(pub u8);

impl ChannelId {
    /// The id as an index.
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for ChannelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl From<u8> for ChannelId {
    fn from(id: u8) -> Self {
        Self(id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_utf8_without_nul_and_fits_its_length_byte() {
        assert_eq!(BlockName::new("/rom@etc/acpi/tables").unwrap(), "/rom@etc/acpi/tables");
        for bad in [&b""[..], b"a\0b", b"\xff\xfe", &[b'x'; 256]] {
            assert!(matches!(BlockName::from_wire(bad), Err(DecodeError::BlockNameInvalid { .. })), "{bad:?}");
        }
        assert_eq!(BlockName::from_wire(&[b'x'; 255]).unwrap().as_str().len(), 255);
    }

    #[test]
    fn a_name_cannot_drive_a_terminal() {
        let name = BlockName::new("a\x1b[2Jb").unwrap();
        assert_eq!(format!("{name} {name:?}"), "a\\u{1b}[2Jb \"a\\u{1b}[2Jb\"");
        let error = BlockName::from_wire(b"\xff\x1b").unwrap_err();
        assert_eq!(error.to_string(), "block name \"\\xff\\x1b\" is not 1 to 255 bytes of UTF-8 without NUL");
    }
}
