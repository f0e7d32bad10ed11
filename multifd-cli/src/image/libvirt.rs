//! What libvirt writes before the stream of a save image, and what it has to read there.

use std::{
    io::{self, Read},
    path::Path,
};

use multifd::checkpoint::CheckpointError;
use multifd::inspect::libvirt::{MAX_DATA, SaveFormat, SaveHeader, SaveHeaderError, is_save_image};

use super::Packing;
use crate::beside::Beside;

/// The part of a save image before its stream.
pub struct LibvirtImage {
    /// The fixed part.
    pub header: SaveHeader,
    /// The description of the domain.
    pub xml: Vec<u8>,
    /// What libvirt remembers of the domain beside that; often empty.
    pub cookie: Vec<u8>,
}

impl LibvirtImage {
    /// Reads it from the front of `file`; nothing where the file is something else.
    ///
    /// # Errors
    /// It is a save image that cannot be used.
    pub fn read(file: &mut dyn Read) -> Result<Option<LibvirtImage>, Unusable> {
        LibvirtImage::read_front(file).map(|(image, _)| image)
    }

    /// The same, and what was read where it is something else.
    pub fn read_front(file: &mut dyn Read) -> Result<(Option<LibvirtImage>, Vec<u8>), Unusable> {
        let mut begin = Vec::new();
        file.take(SaveHeader::LEN as u64).read_to_end(&mut begin)?;
        if !is_save_image(&begin) {
            return Ok((None, begin));
        }
        let header = begin.first_chunk().ok_or(Unusable::CutShort)?;
        let header = SaveHeader::decode(header)?;
        // At most `MAX_DATA`, and no more than there is.
        let mut data = Vec::new();
        if file.take(header.data_len.into()).read_to_end(&mut data)? < header.data_len as usize {
            return Err(Unusable::CutShort);
        }
        let (xml, cookie) = header.split(&data)?;
        let (xml, cookie) = (xml.to_vec(), cookie.to_vec());
        Ok((Some(LibvirtImage { header, xml, cookie }), Vec::new()))
    }

    /// How the stream is packed.
    ///
    /// # Errors
    /// In a way that is not unpacked here: the error says how to do it.
    pub fn packing(&self, path: &Path) -> Result<Packing, CheckpointError> {
        let by_hand = |program: &str| {
            let (format, begin) = (self.header.format.name(), self.header.stream_offset() + 1);
            let kind = format!(
                "a libvirt save image in format {format}, which is not unpacked here: `tail -c +{begin} IMAGE | {program} | \
                 multifd receive - --output CHECKPOINT` takes the VM in it"
            );
            Err(CheckpointError::OtherKind { path: path.to_owned(), kind })
        };
        match self.header.format {
            SaveFormat::Raw | SaveFormat::Sparse => Ok(Packing::None),
            SaveFormat::Gzip => Ok(Packing::Gzip),
            SaveFormat::Xz => Ok(Packing::Xz),
            SaveFormat::Zstd => Ok(Packing::Zstd),
            SaveFormat::Bzip2 => by_hand("bunzip2 -c"),
            SaveFormat::Lzop => by_hand("lzop -dc"),
            SaveFormat::Other(number) => {
                let kind = format!("a libvirt save image in format {number}, which is not known here");
                Err(CheckpointError::OtherKind { path: path.to_owned(), kind })
            }
            _ => by_hand("UNPACK"),
        }
    }

    /// What the domain is called, if its description says so.
    pub fn domain(&self) -> Option<String> {
        element(&self.xml, "name")
    }
}

/// Why a save image cannot be used.
pub enum Unusable {
    /// What it says cannot be.
    Header(SaveHeaderError),
    /// It ends in its description.
    CutShort,
    /// It cannot be read.
    Io(io::Error),
}

impl Unusable {
    /// The same as an error about the file `path`.
    pub fn about(self, path: &Path) -> CheckpointError {
        let path = path.to_owned();
        match self {
            Unusable::Header(error) => CheckpointError::OtherKind { path, kind: error.to_string() },
            Unusable::CutShort => {
                let kind = "a libvirt save image that ends in the description of its domain".to_owned();
                CheckpointError::OtherKind { path, kind }
            }
            Unusable::Io(source) => CheckpointError::Io { path, doing: "reading it", source },
        }
    }
}

impl From<SaveHeaderError> for Unusable {
    fn from(error: SaveHeaderError) -> Unusable {
        Unusable::Header(error)
    }
}

impl From<io::Error> for Unusable {
    fn from(error: io::Error) -> Unusable {
        Unusable::Io(error)
    }
}

/// The description of a domain, for a new image.
pub struct DomainXml(Vec<u8>);

impl DomainXml {
    /// Reads the file `path`, as `virsh dumpxml --migratable` or `virsh save-image-dumpxml` print it.
    ///
    /// # Errors
    /// It is not there, or is no such description.
    pub fn read(path: &Path) -> Result<DomainXml, String> {
        let failed = |what: &str| format!("{}: {what}", path.display());
        let file = Beside::open(path).map_err(|error| failed(&error.to_string()))?;
        let mut xml = Vec::new();
        let longest = u64::from(MAX_DATA - PADDING);
        file.take(longest).read_to_end(&mut xml).map_err(|error| failed(&error.to_string()))?;
        if xml.len() as u64 == longest {
            return Err(failed("longer than any description of a domain"));
        }
        let expected = "expected the description of a domain, as `virsh dumpxml --migratable DOMAIN` prints it";
        let text = std::str::from_utf8(&xml).map_err(|_| failed(expected))?;
        if !text.contains("<domain") || !text.contains("</domain>") || text.contains('\0') {
            return Err(failed(expected));
        }
        Ok(DomainXml(xml))
    }

    /// The machine type in it.
    pub fn machine(&self) -> Option<String> {
        let text = String::from_utf8_lossy(&self.0);
        let (_, rest) = text.split_once("<type ")?;
        let (attributes, _) = rest.split_once('>')?;
        let (_, value) = attributes.split_once("machine=")?;
        let quote = value.chars().next().filter(|quote| ['\'', '"'].contains(quote))?;
        Some(value[1..].split_once(quote)?.0.to_owned())
    }

    /// What stands before the stream of an image of a VM that `was_running`.
    pub fn preamble(&self, was_running: bool, format: SaveFormat) -> Vec<u8> {
        let data_len = self.0.len() as u32 + 1 + PADDING;
        let mut bytes = SaveHeader::new(data_len, was_running, format).encode().to_vec();
        bytes.extend_from_slice(&self.0);
        bytes.resize(SaveHeader::LEN + data_len as usize, 0);
        bytes
    }
}

/// The text of the first element `name` in `xml`.
fn element(xml: &[u8], name: &str) -> Option<String> {
    let text = String::from_utf8_lossy(xml);
    let (_, rest) = text.split_once(&format!("<{name}>"))?;
    let (value, _) = rest.split_once(&format!("</{name}>"))?;
    Some(value.to_owned())
}

/// Room for a longer description, for `virsh save-image-edit`. libvirt leaves as much.
const PADDING: u32 = 64 << 10;

#[cfg(test)]
mod tests {
    use std::fs;

    use test_support::TempDir;

    use super::*;

    const XML: &[u8] = b"<domain type='qemu'>\n<name>vm 1</name><os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type></os></domain>\n";

    fn xml(bytes: &[u8]) -> Result<DomainXml, String> {
        let dir = TempDir::new().unwrap();
        fs::write(dir.join("x"), bytes).unwrap();
        DomainXml::read(&dir.join("x"))
    }

    #[test]
    fn a_description_is_checked_and_comes_back_from_an_image() {
        let domain = xml(XML).unwrap();
        assert_eq!(domain.machine().as_deref(), Some("pc-q35-7.2"));
        let bytes = domain.preamble(true, SaveFormat::Raw);
        let (image, rest) = LibvirtImage::read_front(&mut &bytes[..]).ok().unwrap();
        let image = image.unwrap();
        assert!(rest.is_empty() && image.xml == XML && image.cookie.is_empty() && image.header.was_running);
        assert_eq!(image.header.stream_offset(), bytes.len() as u64);
        assert_eq!(image.domain().as_deref(), Some("vm 1"));
        for wrong in [&b""[..], b"<domainsnapshot/>", b"<domain>\xff</domain>", b"<domain>\0</domain>"] {
            assert!(xml(wrong).err().unwrap().contains("virsh dumpxml"), "{wrong:?}");
        }
    }

    #[test]
    fn an_image_that_is_cut_is_named_and_something_else_is_given_back() {
        let bytes = xml(XML).unwrap().preamble(false, SaveFormat::Zstd);
        for cut in [16, 91, 92, 100, bytes.len() - 1] {
            let error = LibvirtImage::read(&mut &bytes[..cut]).err().unwrap().about(Path::new("x"));
            assert!(error.to_string().contains("ends in the description"), "{cut}: {error}");
        }
        let (none, front) = LibvirtImage::read_front(&mut &b"QEVM"[..]).ok().unwrap();
        assert!(none.is_none() && front == b"QEVM");
    }

    #[test]
    fn formats_that_are_not_unpacked_here_come_with_the_way_to_do_it() {
        let domain = xml(XML).unwrap();
        for (format, what) in [
            (SaveFormat::Bzip2, "bunzip2 -c | multifd receive -"),
            (SaveFormat::Lzop, "lzop -dc"),
            (SaveFormat::Other(9), "in format 9, which is not known here"),
        ] {
            let bytes = domain.preamble(false, format);
            let image = LibvirtImage::read(&mut &bytes[..]).ok().unwrap().unwrap();
            let error = image.packing(Path::new("x")).unwrap_err().to_string();
            assert!(error.contains(what), "{error}");
        }
    }
}
