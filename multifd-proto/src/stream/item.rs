//! What main is made of.

use crate::command::Command;
use crate::extension::Offer;
use crate::ram::BlockEntry;

/// One item of main.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Item {
    /// Magic and version.
    Header,
    /// The configuration, which names the machine type. It has no footer.
    Configuration {
        /// The machine type with its version, never an alias.
        machine: String,
    },
    /// Subsection of the configuration: the page size as a power of two, where the architecture has several.
    ConfigPageBits(u32),
    /// Subsection of the configuration: capabilities that change the layout of the stream.
    ConfigCapabilities(Vec<String>),
    /// Subsection of the configuration: the VM's uuid, with capability `validate-uuid`.
    ConfigUuid([u8; 16]),
    /// Subsection of the configuration: what an end of this implementation offers.
    ConfigOffer(Offer),
    /// A command. That of a package has the package as its payload, DESCRIBE the description, SHARED_MEMORY the list.
    Command(Command),
    /// The START section of `ram` begins; the block list follows.
    RamStart {
        /// The section's id, which PART, END and footers refer to.
        section_id: u32,
        /// The sum of the lengths of all blocks.
        total: u64,
    },
    /// One RAM block. In a mapped-ram file its bitmap and pages are the payload.
    Block(BlockEntry),
    /// The block list is complete.
    BlocksEnd,
    /// A PART or END section of `ram` begins.
    RamPart {
        /// Whether it is the END section.
        end: bool,
    },
    /// A page of zeros.
    ZeroPage {
        /// Index of the block in [`MainDecoder::blocks`](super::MainDecoder::blocks).
        block: usize,
        /// Offset inside the block: aligned and in bounds.
        offset: u64,
    },
    /// A page, which is the payload.
    Page {
        /// Index of the block in [`MainDecoder::blocks`](super::MainDecoder::blocks).
        block: usize,
        /// Offset inside the block: aligned and in bounds.
        offset: u64,
        /// Length of the payload: one page.
        len: usize,
    },
    /// A difference to the page's content so far, which is the payload; see [`xbzrle::apply`](crate::xbzrle::apply).
    Xbzrle {
        /// Index of the block in [`MainDecoder::blocks`](super::MainDecoder::blocks).
        block: usize,
        /// Offset inside the block: aligned and in bounds.
        offset: u64,
        /// Length of the payload: at most a page.
        len: usize,
    },
    /// A page as a complete zlib stream, which is the payload.
    CompressPage {
        /// Index of the block in [`MainDecoder::blocks`](super::MainDecoder::blocks).
        block: usize,
        /// Offset inside the block: aligned and in bounds.
        offset: u64,
        /// Length of the payload: at most two pages.
        len: usize,
    },
    /// Sync point of the per-round dialect.
    Flush,
    /// End of the body of a `ram` section; sync point of the per-section dialect.
    Eos,
    /// The footer of the section that was read before; its id is the right one.
    Footer {
        /// The section's id.
        section_id: u32,
    },
    /// The head of a section other than `ram`. The body follows, of a length that only its device knows.
    Section(Section),
    /// The end of the VM's state.
    Eof,
    /// The description of the devices as JSON, which is the payload; see [`crate::vmdesc`].
    VmDescription {
        /// Length of the payload, at most [`MAX_VMDESC`](super::MAX_VMDESC).
        len: usize,
    },
}

impl Item {
    /// How many bytes directly behind the item belong to it. The decoder does not want to see them.
    pub const fn payload_len(&self) -> u64 {
        match self {
            Self::Page { len, .. }
            | Self::Xbzrle { len, .. }
            | Self::CompressPage { len, .. }
            | Self::VmDescription { len } => *len as u64,
            Self::Command(Command::Packaged { len } | Command::Describe { len } | Command::SharedMemory { len }) => {
                *len as u64
            }
            Self::Block(BlockEntry { mapped_ram: Some(header), used_len, .. }) => header.bytes_behind(*used_len),
            _ => 0,
        }
    }
}

/// The head of a section.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    /// Which part of the section this is.
    pub kind: SectionKind,
    /// A number that the source chose.
    pub id: u32,
    /// The name under which the device's state is known.
    pub name: String,
    /// Which one of several devices with this name.
    pub instance: u32,
    /// Version of the body's layout.
    pub version: u32,
}

/// Which part of a section it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SectionKind {
    /// The first of several.
    Start,
    /// One in the middle.
    Part,
    /// The last.
    End,
    /// The whole section at once, as all ordinary devices have it.
    Full,
}
