//! Each way in which a peer's bytes can be refused.
//!
//! [`DecodeError`]: the bytes do not parse. [`Violation`]: they parse, and the peer broke a rule of the protocol or asked
//! for a part of it that is refused here. [`Mismatch`]: both sides are fine and do not fit each other. One variant per cause,
//! so that a test or a caller can name it; where it happened (channel, byte offset) is added by the caller, who knows it.

use crate::ids::{BlockName, ChannelId};
use crate::packet::{Compression, Method};
use crate::wire::Short;

/// The bytes do not parse.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// A chunk of a dirty bitmap of an unknown kind, so that its length is not known.
    #[error("dirty bitmap chunk with flags {flags:#04x} is not understood")]
    UnknownChunk {
        /// The byte that it begins with.
        flags: u8,
    },
    /// A buffer that must hold a whole structure is too small.
    #[error("{needed} more bytes are needed")]
    Truncated {
        /// At least this many more.
        needed: usize,
    },
    /// A list of memory that is handed over makes no sense.
    #[error("list of shared memory: {what}")]
    BadSharedMemory {
        /// What is wrong with it.
        what: &'static str,
    },
    /// A connection, packet or file does not begin with its magic number.
    #[error("magic {found:#010x} instead of {expected:#010x}")]
    BadMagic {
        /// The number that belongs here.
        expected: u32,
        /// The number that stands here.
        found: u32,
    },
    /// A version this implementation does not speak.
    #[error("{what} version {found} instead of {expected}")]
    BadVersion {
        /// Whose version.
        what: &'static str,
        /// The version that is understood.
        expected: u32,
        /// The version of the peer.
        found: u32,
    },
    /// A packet with flag bits that are unknown or do not go together.
    #[error("packet flags {flags:#x}")]
    BadPacketFlags {
        /// All flags of the packet.
        flags: u32,
    },
    /// An element type byte that does not exist.
    #[error("element type {byte:#04x} is unknown")]
    UnknownElement {
        /// The type byte.
        byte: u8,
    },
    /// A VM command with an unknown number.
    #[error("command {number} is unknown")]
    UnknownCommand {
        /// The command number.
        number: u16,
    },
    /// A VM command whose payload has the wrong size.
    #[error("command {command} with {len} bytes of payload")]
    BadCommandLength {
        /// The name of the command.
        command: &'static str,
        /// Its payload length.
        len: u16,
    },
    /// A VM command whose payload does not parse.
    #[error("payload of command {command} is malformed")]
    BadCommandPayload {
        /// The name of the command.
        command: &'static str,
    },
    /// A RAM word with flags that are unknown or do not go together.
    #[error("RAM word {word:#x} has flags {flags:#x}")]
    BadRamFlags {
        /// The whole word.
        word: u64,
        /// The part below the page size.
        flags: u64,
    },
    /// A block name that is not UTF-8, is empty or too long, or contains NUL.
    #[error("block name \"{name}\" is not 1 to 255 bytes of UTF-8 without NUL")]
    BlockNameInvalid {
        /// The name, escaped.
        name: String,
    },
    /// A name other than a block's (machine type, section, capability) that is not UTF-8, empty or too long.
    #[error("{what} \"{name}\" is not a valid name")]
    NameInvalid {
        /// What is named.
        what: &'static str,
        /// The name, escaped.
        name: String,
    },
    /// A subsection of the configuration that is unknown, or whose fields do not parse.
    #[error("configuration subsection \"{name}\" version {version} is not understood")]
    UnknownSubsection {
        /// The name, escaped.
        name: String,
        /// Its version.
        version: u32,
    },
    /// The fill byte of a zero page is not 0.
    #[error("zero page at {offset:#x} has fill byte {byte:#04x}")]
    ZeroFillByte {
        /// The page's offset inside its block.
        offset: u64,
        /// The fill byte.
        byte: u8,
    },
    /// A compressed payload is damaged, or decompresses to another length than its pages have.
    #[error("{what}")]
    PayloadDamaged {
        /// What the decompressor found.
        what: String,
    },
    /// An XBZRLE header or diff that runs past its end, past the page, or is not made as described in [`crate::xbzrle`].
    #[error("XBZRLE: {what} at byte {at} of the diff")]
    XbzrleMalformed {
        /// What is wrong.
        what: &'static str,
        /// Where in the diff.
        at: usize,
    },
    /// A return-path message of an unknown type.
    #[error("return-path message type {kind} is unknown")]
    UnknownMessage {
        /// The type.
        kind: u16,
    },
    /// An alert of TLS stands where a return-path message should: the destination expects every connection to be encrypted.
    #[error("the destination speaks TLS, and this source does not: both ends need it, or neither")]
    SpeaksTls,
    /// The bytes that a recovery connection has for a block's bitmap of received pages are not shaped like one.
    #[error("bitmap of received pages: {what} {found:#x} instead of {expected:#x}")]
    BadReceivedBitmap {
        /// What is wrong.
        what: &'static str,
        /// What belongs here.
        expected: u64,
        /// What stands here.
        found: u64,
    },
    /// A package that does not begin with LISTEN, or does not end with RUN.
    #[error("package of {len} bytes: {what}")]
    BadPackage {
        /// The length.
        len: usize,
        /// What is wrong with it.
        what: &'static str,
    },
    /// A return-path message whose length does not fit its type, or exceeds the 512 bytes allowed.
    #[error("return-path message {name} with {len} bytes of payload")]
    BadMessageLength {
        /// The name of the message.
        name: &'static str,
        /// Its payload length.
        len: u16,
    },
}

/// The peer broke a rule, or uses a part of the protocol that is refused here by name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Violation {
    /// A page that does not lie inside its block.
    #[error("page at {offset:#x} lies outside {block:?} ({len:#x} bytes)")]
    PageOutsideBlock {
        /// The block.
        block: BlockName,
        /// The page's offset inside it.
        offset: u64,
        /// The length of the block.
        len: u64,
    },
    /// A page whose offset is no multiple of the page size.
    #[error("page at {offset:#x} of {block:?} is not aligned to {page_size:#x} bytes")]
    UnalignedPage {
        /// The block.
        block: BlockName,
        /// The page's offset inside it.
        offset: u64,
        /// The page size.
        page_size: u64,
    },
    /// A block that was not in the block list.
    #[error("block {name:?} is unknown")]
    UnknownBlock {
        /// The name.
        name: BlockName,
    },
    /// A page of a packet without a block name.
    #[error("packet with pages but without a block name")]
    PacketWithoutBlock,
    /// A packet that counts more pages than fit in a packet, or than it has room for.
    #[error("{normal} normal and {zero} zero pages with room for {allocated} of at most {capacity}")]
    PagesAboveCapacity {
        /// Pages with content.
        normal: u32,
        /// Zero pages.
        zero: u32,
        /// What the packet claims to have room for.
        allocated: u32,
        /// What a packet can have room for.
        capacity: u32,
    },
    /// A payload size that does not fit the pages of the packet.
    #[error("{compression} payload of {size} bytes for {normal} pages of {page_size:#x} bytes")]
    PayloadSize {
        /// The payload size in the header.
        size: u32,
        /// Pages with content.
        normal: u32,
        /// The page size.
        page_size: u64,
        /// How the payload is compressed.
        compression: Compression,
    },
    /// A channel id that is not below the number of channels.
    #[error("channel id {id} with {channels} channels")]
    ChannelIdOutOfRange {
        /// The id.
        id: ChannelId,
        /// The number of channels.
        channels: usize,
    },
    /// Two connections with one channel id.
    #[error("channel id {id} came twice")]
    ChannelIdTwice {
        /// The id.
        id: ChannelId,
    },
    /// A page word that continues the previous page's block when there was none.
    #[error("page at {offset:#x} continues a block, and no block was named before")]
    FirstPageWithoutBlock {
        /// The page's offset.
        offset: u64,
    },
    /// Main announced the end of a round, and a channel ended without its SYNC packet.
    #[error("channel {channel} ended without the SYNC packet of round {round}")]
    SyncMissing {
        /// The channel.
        channel: ChannelId,
        /// The round.
        round: u64,
    },
    /// A page before the first sync point, which comes before any page.
    #[error("page before the first sync point")]
    PageBeforeFirstSync,
    /// A channel reached the end of a round that main does not have.
    #[error("channel {channel} has one SYNC packet more than main has sync points")]
    SyncAfterLast {
        /// The channel.
        channel: ChannelId,
    },
    /// A page after the last sync point: nothing would say that the channel has sent all of them.
    #[error("channel {channel} has pages after the last sync point")]
    PageAfterLastSync {
        /// The channel.
        channel: ChannelId,
    },
    /// The numbers of the SYNC packets do not add up: they proved how many channels there are and no longer do, or the
    /// source has said how many there are.
    #[error(
        "the packet numbers do not add up at the end of round {round}: {channels} channels have brought {packets} packets with \
         pages, and the highest number of a SYNC packet is {highest}, expected {expected}"
    )]
    PacketNumbers {
        /// The number of channels, which are all here.
        channels: usize,
        /// The round, counted from 0.
        round: u64,
        /// Packets with pages so far, on all channels.
        packets: u64,
        /// The highest number in a SYNC packet of the round.
        highest: u64,
        /// What it has to be: all packets with pages, and one SYNC packet on each channel in each round, have a number.
        expected: u64,
    },
    /// A block that is listed twice.
    #[error("block {name:?} is listed twice")]
    DuplicateBlock {
        /// The name.
        name: BlockName,
    },
    /// A block list whose lengths do not add up to the total announced before it.
    #[error("block list announces {announced:#x} bytes and lists {listed:#x}")]
    TotalMismatch {
        /// The announced total.
        announced: u64,
        /// The sum of the lengths up to the block that exceeds it.
        listed: u64,
    },
    /// A block whose length is zero or no multiple of the page size.
    #[error("block {name:?} has length {len:#x}")]
    BadBlockLength {
        /// The name.
        name: BlockName,
        /// The length.
        len: u64,
    },
    /// More blocks than [`crate::ram::MAX_BLOCKS`].
    #[error("more than {limit} RAM blocks")]
    TooManyBlocks {
        /// The limit.
        limit: usize,
    },
    /// A packet with device state instead of pages, which only some assigned devices use.
    #[error(
        "device-state packet for \"{name}\" instance {instance}: nothing here can take a part of its state from a channel; a checkpoint \
         of a QEMU's whole VM can (multifd receive, multifd checkpoint), or unplug this device before the migration"
    )]
    DeviceStatePacketRefused {
        /// The section it belongs to, escaped.
        name: String,
        /// The instance of the section.
        instance: u32,
    },
    /// A device-state packet without state, or with more than one may have.
    #[error("device-state packet with {size} bytes, expected 9 to {limit}")]
    StatePacketSize {
        /// The length that the packet says.
        size: u32,
        /// The most that is taken.
        limit: u32,
    },
    /// A device-state packet without payload, or with more than one may have.
    #[error("device-state packet with {size} bytes, expected 1 to {limit}")]
    OpaquePacketSize {
        /// The length that the packet says.
        size: u32,
        /// The most that is taken.
        limit: u32,
    },
    /// More device-state packets than are kept, or of more sections.
    #[error("device state comes in more packets, or for more sections, than are kept: {limit}")]
    TooManyStatePackets {
        /// The limit.
        limit: u64,
    },
    /// More device state in packets than is kept.
    #[error("more than {limit} bytes of device state on channels")]
    TooMuchPacketedState {
        /// The limit.
        limit: u64,
    },
    /// A record of a device-state packet in a file that ends in its middle, or is of no channel.
    #[error("the record of a device-state packet is cut, or names no channel")]
    KeptPacketCut,
    /// A number that another device-state packet has had.
    #[error("device-state packet {number} came before")]
    StatePacketTwice {
        /// The number.
        number: u64,
    },
    /// A device-state packet in the place of another.
    #[error("device-state packet {number} has {len} bytes of {name:?} instance {instance}, and main says {said}")]
    StatePacketMismatch {
        /// The number.
        number: u64,
        /// How much state it has.
        len: u32,
        /// The section it belongs to, as it says.
        name: String,
        /// The instance of that section.
        instance: u32,
        /// What belongs in its place.
        said: String,
    },
    /// A device-state packet that no channel can bring any more.
    #[error("device-state packet {number} does not come, all channels are further on")]
    StatePacketMissing {
        /// The number.
        number: u64,
    },
    /// A device-state packet that belongs to no section.
    #[error("device-state packet {number} is not a part of any section")]
    StatePacketLeft {
        /// The number.
        number: u64,
    },
    /// The state of a device is shorter or longer than was said before it.
    #[error("the state has {found} bytes, and {said} were announced")]
    StateLength {
        /// As it was announced.
        said: u64,
        /// As far as it came.
        found: u64,
    },
    /// The peer continues a postcopy migration that was interrupted.
    #[error("{command}: an interrupted postcopy migration cannot be continued here, take it from its beginning")]
    RecoveryRefused {
        /// The command.
        command: &'static str,
    },
    /// A package of postcopy is longer than any device state.
    #[error("package of {len} bytes exceeds {limit}")]
    PackageTooLong {
        /// Its length.
        len: u32,
        /// The limit.
        limit: u32,
    },
    /// What one VMM says to the other about the VM is longer than this implementation accepts.
    #[error("{what} of {len} bytes exceeds {limit}")]
    DescriptionTooLong {
        /// The description, or the answer to it.
        what: &'static str,
        /// Its length.
        len: u32,
        /// The limit.
        limit: u32,
    },
    /// Pages were discarded that had been discarded before.
    #[error("range to discard at {start:#x} of {block:?} has pages that were discarded before")]
    DiscardedTwice {
        /// The block.
        block: BlockName,
        /// The offset of the range inside it.
        start: u64,
    },
    /// A page came in postcopy that was not discarded before, or that had come since.
    #[error("page at {offset:#x} of {block:?} comes in postcopy and is not one that was discarded and is missing")]
    PageNotMissing {
        /// The block.
        block: BlockName,
        /// The page's offset inside it.
        offset: u64,
    },
    /// A range to be discarded that is empty, not aligned or not inside its block.
    #[error("range to discard at {start:#x}, {len:#x} bytes, does not fit {block:?} ({block_len:#x} bytes)")]
    BadDiscard {
        /// The block.
        block: BlockName,
        /// The offset of the range inside it.
        start: u64,
        /// The length of the range.
        len: u64,
        /// The length of the block.
        block_len: u64,
    },
    /// A request for pages of the block of the request before, and there was none.
    #[error("request for a page at {start:#x} of the block before, and no block was named")]
    FirstRequestWithoutBlock {
        /// The offset.
        start: u64,
    },
    /// A request for pages that is empty, not aligned or not inside its block.
    #[error("request for {len:#x} bytes at {start:#x} does not fit {block:?} ({block_len:#x} bytes)")]
    BadRequest {
        /// The block.
        block: BlockName,
        /// The offset inside it.
        start: u64,
        /// How many bytes.
        len: u32,
        /// The length of the block.
        block_len: u64,
    },
    /// More requests are open than a guest has faults.
    #[error("more than {limit} requests for pages are open")]
    TooManyRequests {
        /// The limit.
        limit: usize,
    },
    /// The peer asks for continuous replication.
    #[error("ENABLE_COLO: continuous replication is refused")]
    ColoRefused,
    /// The peer uses RDMA on a connection that is none.
    #[error("RAM word {word:#x} belongs to RDMA, which is refused")]
    RdmaRefused {
        /// The word.
        word: u64,
    },
    /// A page in a form that the stream's configuration does not allow.
    #[error("{what} is not allowed in this stream")]
    NotAllowed {
        /// What came.
        what: &'static str,
    },
    /// A compressed page on main with a length that no compressor gives.
    #[error("compressed page of {len} bytes at {offset:#x}")]
    CompressedPageLength {
        /// The page's offset.
        offset: u64,
        /// The length.
        len: u32,
    },
    /// A footer with the id of another section.
    #[error("footer of section {expected} has id {found}")]
    BadFooter {
        /// The section that ends here.
        expected: u32,
        /// The id in the footer.
        found: u32,
    },
    /// A section that ends without a footer.
    #[error("section {section} ends with {found:#04x} instead of a footer")]
    FooterMissing {
        /// The section that ends here.
        section: u32,
        /// The byte in place of the footer.
        found: u8,
    },
    /// A PART or END of a section that was not started, or has ended.
    #[error("section id {id} is unknown")]
    UnknownSection {
        /// The id.
        id: u32,
    },
    /// A section id that is already bound to another section, or a second `ram`.
    #[error("section {name:?} with id {id} was started before")]
    SectionTwice {
        /// The id.
        id: u32,
        /// The name.
        name: String,
    },
    /// More sections at once than [`crate::stream::MAX_SECTIONS`].
    #[error("more than {limit} sections")]
    TooManySections {
        /// The limit.
        limit: usize,
    },
    /// An element where it may not stand.
    #[error("{element} {place}")]
    UnexpectedElement {
        /// The element.
        element: &'static str,
        /// Where it came.
        place: &'static str,
    },
    /// A name or list in the configuration that is longer than this implementation accepts.
    #[error("{what} of {len} exceeds {limit}")]
    ConfigurationTooLong {
        /// What is too long.
        what: &'static str,
        /// Its length.
        len: u64,
        /// The limit.
        limit: u64,
    },
    /// A description of the device state that is longer than [`crate::stream::MAX_VMDESC`].
    #[error("vmdescription of {len} bytes exceeds {limit}")]
    VmDescriptionTooLong {
        /// The length.
        len: u64,
        /// The limit.
        limit: u64,
    },
    /// A mapped-ram header that points outside the file, overlaps, or is not aligned.
    #[error("mapped-ram header of {block:?}: {what} ({value:#x})")]
    MappedRam {
        /// The block.
        block: BlockName,
        /// What is wrong.
        what: &'static str,
        /// The value that is wrong.
        value: u64,
    },
}

/// Both sides are fine and do not fit each other.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Mismatch {
    /// A section other than `ram` that comes in parts whose length nothing tells.
    #[error("section \"{name}\" comes in parts of unknown length; {remedy}")]
    SectionInParts {
        /// The name, escaped.
        name: String,
        /// What to do on the source.
        remedy: &'static str,
    },
    /// The channels are compressed otherwise than this side was told.
    #[error("channels are configured for compression {expected}, the packet has {found}")]
    CompressionMismatch {
        /// What this side was told.
        expected: Compression,
        /// What the packet has.
        found: Compression,
    },
    /// The channels use a compression that needs hardware this implementation does not drive.
    #[error("compression {method} is not supported; none, zlib and zstd are")]
    CompressionUnsupported {
        /// The method.
        method: Method,
    },
    /// Machine types before 2.4 send no configuration, and no footers.
    #[error("the stream has no configuration: machine types before 2.4 (such as pc-i440fx-2.3) are not supported")]
    NoConfiguration,
    /// The peer's page size is not ours.
    #[error("page size {theirs:#x} of the peer is not ours ({ours:#x})")]
    PageSize {
        /// Ours.
        ours: u64,
        /// The peer's.
        theirs: u64,
    },
    /// A section of a version that is not understood.
    #[error("section \"{name}\" has version {found}; version {supported} is supported")]
    SectionVersion {
        /// The name, escaped.
        name: String,
        /// The version of the peer.
        found: u32,
        /// The version understood here.
        supported: u32,
    },
    /// The peer's capabilities change the layout of the stream in a way that is not understood.
    #[error("capability \"{name}\" of the peer is not supported")]
    Capability {
        /// The name, escaped.
        name: String,
    },
    /// The source leaves memory out that both sides are to map from files of their own.
    #[error(
        "the source has x-ignore-shared on: memory in files that both sides map is not in its stream, which has the devices' state \
         only; switch the capability off, or keep those files and take the VM with a QEMU that maps them"
    )]
    MemoryElsewhere,
    /// The source says another number of channels than is known.
    #[error("the source has {told} channels, expected {known}")]
    ChannelCount {
        /// What it says.
        told: usize,
        /// What is known.
        known: usize,
    },
    /// Nothing in the stream proves how many channels there are.
    #[error(
        "{joined} channels came, and the packet numbers of this source do not prove that these are all: \
         give the number of channels"
    )]
    ChannelsUnproven {
        /// How many have joined.
        joined: usize,
    },
    /// The channel belongs to another VM.
    #[error("channel belongs to VM {found}, this is {expected}", expected = uuid_text(expected), found = uuid_text(found))]
    Uuid {
        /// Our VM.
        expected: [u8; 16],
        /// The peer's VM.
        found: [u8; 16],
    },
}

/// Any reason to refuse a peer's bytes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// The bytes do not parse.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// The peer broke a rule.
    #[error(transparent)]
    Violation(#[from] Violation),
    /// Both sides are fine and do not fit each other.
    #[error(transparent)]
    Mismatch(#[from] Mismatch),
}

impl From<Short> for DecodeError {
    fn from(short: Short) -> Self {
        Self::Truncated { needed: short.needed }
    }
}

impl From<Short> for ProtocolError {
    fn from(short: Short) -> Self {
        Self::Decode(short.into())
    }
}

/// The usual text form of a uuid.
fn uuid_text(uuid: &[u8; 16]) -> String {
    let mut text = String::with_capacity(36);
    for (i, byte) in uuid.iter().enumerate() {
        if matches!(i, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_name_the_value_and_the_rule() {
        let block = BlockName::new("pc.ram").unwrap();
        let outside = Violation::PageOutsideBlock { block, offset: 0x7fff_f000, len: 0x4000_0000 };
        assert_eq!(outside.to_string(), "page at 0x7ffff000 lies outside \"pc.ram\" (0x40000000 bytes)");
        let magic = DecodeError::BadMagic { expected: 0x1122_3344, found: 0x4745_5420 };
        assert_eq!(magic.to_string(), "magic 0x47455420 instead of 0x11223344");
        let uuid = Mismatch::Uuid {
            expected: [0; 16],
            found: *b"\x12\x34\x56\x78\x12\x34\x56\x78\x9a\xbc\xde\xf0\x12\x34\x56\x78",
        };
        assert_eq!(
            uuid.to_string(),
            "channel belongs to VM 12345678-1234-5678-9abc-def012345678, this is 00000000-0000-0000-0000-000000000000"
        );
    }
}
