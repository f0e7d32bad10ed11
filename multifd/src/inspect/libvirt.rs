//! The header of a libvirt save image, as `virsh save` writes it before the migration stream.
//!
//! | offset | bytes | |
//! |---:|---:|---|
//! | 0 | 16 | `LibvirtQemudSave`; `LibvirtQemudPart` until the image is complete |
//! | 16 | 4 | version, 1 or 2 |
//! | 20 | 4 | length of the data that follows: description, cookie, padding |
//! | 24 | 4 | whether the VM ran, and is to run when it is restored |
//! | 28 | 4 | format of the stream |
//! | 32 | 4 | offset of the cookie in the data, 0 for none (version 2) |
//! | 36 | 56 | zero |
//! | 92 | | the data: the domain's description as XML with a NUL, the cookie as XML with a NUL, zeros |
//!
//! The stream begins where the data ends. Integers have the byte order of the host that wrote them. Of the *sparse* format,
//! a mapped-ram stream, the offsets count from the beginning of the image, not of the stream.
//!
//! Seen in images of libvirt 9.0 and 11.3.

/// What the header says.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct SaveHeader {
    /// 1 or 2.
    pub version: u32,
    /// Length of the data between header and stream, at most [`MAX_DATA`].
    pub data_len: u32,
    /// Whether the VM ran when it was saved.
    pub was_running: bool,
    /// How the stream is kept.
    pub format: SaveFormat,
    /// Where the cookie begins in the data: within it; 0 for none.
    pub cookie_offset: u32,
}

/// How the stream of an image is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum SaveFormat {
    /// A plain stream.
    Raw,
    /// A plain stream, compressed.
    Gzip,
    /// A plain stream, compressed.
    Bzip2,
    /// A plain stream, compressed.
    Xz,
    /// A plain stream, compressed.
    Lzop,
    /// A plain stream, compressed.
    Zstd,
    /// A mapped-ram stream, in which each page has its place.
    Sparse,
    /// A number that is not known here.
    Other(u32),
}

impl SaveHeader {
    /// Its length in bytes.
    pub const LEN: usize = 92;

    /// The header of a complete image of the present version, whose data is `data_len` long and has no cookie.
    pub fn new(data_len: u32, was_running: bool, format: SaveFormat) -> SaveHeader {
        SaveHeader { version: 2, data_len, was_running, format, cookie_offset: 0 }
    }

    /// Reads a header.
    ///
    /// # Errors
    /// It is none, or not of a complete image, or of an unknown version, or says what cannot be.
    pub fn decode(bytes: &[u8; Self::LEN]) -> Result<SaveHeader, SaveHeaderError> {
        let (magic, rest) = bytes.split_at(16);
        match magic {
            MAGIC => {}
            PARTIAL_MAGIC => return Err(SaveHeaderError::Incomplete),
            _ => return Err(SaveHeaderError::Magic),
        }
        let field = |index: usize| *rest[index * 4..].first_chunk::<4>().expect("19 words follow the magic");
        let known = |version: u32| (1..=2).contains(&version);
        let read = match known(u32::from_le_bytes(field(0))) {
            true => u32::from_le_bytes,
            // Of a host with the other byte order.
            false => u32::from_be_bytes,
        };
        let version = read(field(0));
        if !known(version) {
            return Err(SaveHeaderError::Version { version: u32::from_le_bytes(field(0)) });
        }
        let data_len = read(field(1));
        if data_len > MAX_DATA {
            return Err(SaveHeaderError::DataLength { len: data_len });
        }
        let cookie_offset = if version == 1 { 0 } else { read(field(4)) };
        if cookie_offset > data_len {
            return Err(SaveHeaderError::Cookie { offset: cookie_offset, len: data_len });
        }
        let (was_running, format) = (read(field(2)) != 0, SaveFormat::of(read(field(3))));
        Ok(SaveHeader { version, data_len, was_running, format, cookie_offset })
    }

    /// The bytes of the header, in the order of x86.
    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..16].copy_from_slice(MAGIC);
        let words =
            [self.version, self.data_len, u32::from(self.was_running), self.format.number(), self.cookie_offset];
        for (word, into) in words.iter().zip(bytes[16..].chunks_exact_mut(4)) {
            into.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// Where the stream begins in the image.
    pub const fn stream_offset(&self) -> u64 {
        Self::LEN as u64 + self.data_len as u64
    }

    /// The domain's description and the cookie in `data`, without their NULs. The cookie is empty where there is none.
    ///
    /// # Errors
    /// The description has no end.
    pub fn split<'a>(&self, data: &'a [u8]) -> Result<(&'a [u8], &'a [u8]), SaveHeaderError> {
        let until_nul = |bytes: &'a [u8]| bytes.split(|byte| *byte == 0).next().unwrap_or_default();
        let xml = until_nul(data);
        if xml.is_empty() || xml.len() == data.len() {
            return Err(SaveHeaderError::NoDescription);
        }
        let cookie = match self.cookie_offset {
            0 => &[],
            offset => until_nul(data.get(offset as usize..).unwrap_or_default()),
        };
        Ok((xml, cookie))
    }
}

impl SaveFormat {
    fn of(number: u32) -> SaveFormat {
        FORMATS.get(number as usize).copied().unwrap_or(SaveFormat::Other(number))
    }

    fn number(self) -> u32 {
        match self {
            SaveFormat::Other(number) => number,
            known => FORMATS.iter().position(|format| *format == known).expect("all known ones are listed") as u32,
        }
    }

    /// What libvirt's `save_image_format` calls it.
    pub const fn name(self) -> &'static str {
        match self {
            SaveFormat::Raw => "raw",
            SaveFormat::Gzip => "gzip",
            SaveFormat::Bzip2 => "bzip2",
            SaveFormat::Xz => "xz",
            SaveFormat::Lzop => "lzop",
            SaveFormat::Zstd => "zstd",
            SaveFormat::Sparse => "sparse",
            SaveFormat::Other(_) => "unknown",
        }
    }
}

/// Whether a file that begins with `beginning` is a save image, complete or not.
pub fn is_save_image(beginning: &[u8]) -> bool {
    beginning.starts_with(MAGIC) || beginning.starts_with(PARTIAL_MAGIC)
}

/// Why a header cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SaveHeaderError {
    /// Something else.
    #[error("no libvirt save image")]
    Magic,
    /// `virsh save` was interrupted.
    #[error("an incomplete libvirt save image: the `virsh save` that wrote it did not come to its end")]
    Incomplete,
    /// A version that is not known here.
    #[error("a libvirt save image of version {version}; versions 1 and 2 are known")]
    Version {
        /// As it is on x86.
        version: u32,
    },
    /// A description that no domain has.
    #[error("a libvirt save image with a description of {len} bytes, more than the {MAX_DATA} that are read")]
    DataLength {
        /// What the header says.
        len: u32,
    },
    /// A cookie outside the data.
    #[error("a libvirt save image whose cookie begins at byte {offset} of {len}")]
    Cookie {
        /// What the header says.
        offset: u32,
        /// Length of the data.
        len: u32,
    },
    /// The description is missing, or has no end.
    #[error("a libvirt save image without a description of its domain")]
    NoDescription,
}

/// A complete image.
const MAGIC: &[u8] = b"LibvirtQemudSave";
/// An image that is being written.
const PARTIAL_MAGIC: &[u8] = b"LibvirtQemudPart";
/// By their numbers.
const FORMATS: [SaveFormat; 7] = [
    SaveFormat::Raw,
    SaveFormat::Gzip,
    SaveFormat::Bzip2,
    SaveFormat::Xz,
    SaveFormat::Lzop,
    SaveFormat::Zstd,
    SaveFormat::Sparse,
];
/// The longest data between header and stream that is read. Real ones have some kilobytes and 64 KiB of padding.
pub const MAX_DATA: u32 = 16 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    /// The first bytes of an image of libvirt 9.0, saved raw.
    fn recorded() -> [u8; SaveHeader::LEN] {
        let mut bytes = [0; SaveHeader::LEN];
        bytes[..36].copy_from_slice(b"LibvirtQemudSave\x02\0\0\0\x83\x05\x01\0\x01\0\0\0\0\0\0\0\x97\x04\0\0");
        bytes
    }

    #[test]
    fn a_recorded_header_is_read_and_written_back() {
        let header = SaveHeader::decode(&recorded()).unwrap();
        assert_eq!((header.version, header.data_len, header.was_running), (2, 66947, true));
        assert_eq!((header.format, header.cookie_offset, header.stream_offset()), (SaveFormat::Raw, 1175, 67039));
        assert_eq!(header.encode(), recorded());
        assert!(is_save_image(&recorded()) && !is_save_image(b"LibvirtQemu"));
    }

    #[test]
    fn each_format_has_its_number_and_the_other_byte_order_is_understood() {
        for number in 0..9 {
            let header = SaveHeader::new(100, false, SaveFormat::of(number));
            let mut bytes = header.encode();
            assert_eq!(u32::from_le_bytes(bytes[28..32].try_into().unwrap()), number);
            assert_eq!(SaveHeader::decode(&bytes).as_ref(), Ok(&header));
            bytes[16..].chunks_exact_mut(4).for_each(<[u8]>::reverse);
            assert_eq!(SaveHeader::decode(&bytes), Ok(header));
        }
        assert_eq!(SaveFormat::of(7), SaveFormat::Other(7));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let with = |at: usize, bytes: &[u8]| {
            let mut header = recorded();
            header[at..at + bytes.len()].copy_from_slice(bytes);
            SaveHeader::decode(&header).unwrap_err()
        };
        assert_eq!(with(0, b"libvirt"), SaveHeaderError::Magic);
        assert_eq!(with(12, b"Part"), SaveHeaderError::Incomplete);
        assert_eq!(with(16, &[3]), SaveHeaderError::Version { version: 3 });
        assert_eq!(with(16, &[0]), SaveHeaderError::Version { version: 0 });
        assert_eq!(with(20, &[1, 0, 0, 1]), SaveHeaderError::DataLength { len: MAX_DATA + 1 });
        assert_eq!(with(32, &[0x84, 5, 1, 0]), SaveHeaderError::Cookie { offset: 66948, len: 66947 });
    }

    #[test]
    fn description_and_cookie_are_cut_at_their_nuls() {
        let mut header = SaveHeader::new(16, false, SaveFormat::Raw);
        header.cookie_offset = 5;
        assert_eq!(header.split(b"<a/>\0<b/>\0\0\0\0\0\0\0"), Ok((&b"<a/>"[..], &b"<b/>"[..])));
        header.cookie_offset = 16;
        assert_eq!(header.split(b"<a/>\0<b/>\0\0\0\0\0\0\0"), Ok((&b"<a/>"[..], &b""[..])));
        for none in [&b""[..], b"\0", b"<a/>", b"\0<a/>\0"] {
            assert_eq!(header.split(none), Err(SaveHeaderError::NoDescription));
        }
    }
}
