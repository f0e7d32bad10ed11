//! The main channel: what it is made of and which element may follow which.
//!
//! ```text
//! "QEVM" 3 · configuration · commands · early devices · START ram { total, blocks, first sync point }
//!          · early devices · PART ram { words } … · SWITCHOVER_START · END ram { words }
//!          · FULL device … · end of state · vmdescription
//! ```
//!
//! [`MainDecoder`] is a state machine that is shown slices and keeps no bytes. It knows the RAM section completely, and checks
//! every name, offset, length and footer. Bodies of devices have no length on the wire, unless SECTION_LENGTH says one ([`BodyLength`]): the caller reads them
//! and tells how long they were ([`MainDecoder::body_taken`]).
//!
//! A background snapshot has no END of `ram`: the devices follow the last PART. A FULL section before END is therefore state that
//! is needed early only if another PART or the END of `ram` follows it; where the end of state follows instead, it was part of
//! the devices' state ([`MainDecoder::may_be_snapshot`], [`MainDecoder::state_ended`]).
//!
//! A source that announced postcopy may switch to it after any PART, instead of ending `ram`:
//!
//! ```text
//! PART ram { words } … · RAM_DISCARD for every block · PING · PACKAGED { LISTEN · FULL device … · PING … · RUN } · PING
//!          · PART ram { every page that was discarded } … · END ram { } · end of state
//! ```
//!
//! The package is the payload of its command; [`Package`](crate::postcopy::Package) knows its parts.
//!
//! Where the connection breaks after the package, the source goes on over a new one, which has no header
//! ([`MainDecoder::resumed`]):
//!
//! ```text
//! RECV_BITMAP for every block · POSTCOPY_RESUME
//!          · PART ram { every page that was not received } … · END ram { } · end of state
//! ```
//!
//! Elements, by their first byte:
//!
//! | byte | element       | followed by                                                          |
//! |-----:|---------------|----------------------------------------------------------------------|
//! | `00` | EOF           | nothing                                                              |
//! | `01` | SECTION_START | 32-bit id, name, 32-bit instance, 32-bit version, body, footer       |
//! | `02` | SECTION_PART  | 32-bit id, body, footer                                              |
//! | `03` | SECTION_END   | 32-bit id, body, footer                                              |
//! | `04` | SECTION_FULL  | 32-bit id, name, 32-bit instance, 32-bit version, body, footer       |
//! | `05` | subsection    | (in bodies and in the configuration) name, 32-bit version, body      |
//! | `06` | VMDESCRIPTION | 32-bit length, JSON                                                  |
//! | `07` | configuration | 32-bit length, machine type; then subsections                        |
//! | `08` | COMMAND       | see [`crate::command`]                                               |
//! | `7e` | footer        | 32-bit id of the section that ends                                   |

mod elements;
mod item;

use std::collections::HashMap;

use self::elements::{capabilities, configuration, element_name, footer, go, header, tail, text, unexpected};
pub use self::item::{Item, Section, SectionKind};
use crate::command::{BodyLength, Command, PostcopyAdvice};
use crate::extension::{self, Extension, Offer};
use crate::ids::{BlockName, escape, name_text};
use crate::machine::Dialect;
use crate::ram::{BlockEntry, BlockLayout, MAX_BLOCKS, RamWord};
use crate::violation::{DecodeError, Mismatch, ProtocolError, Violation};
use crate::wire::{self, Reader, Step, Stop};
use crate::xbzrle;

/// Decodes main, one item at a time.
///
/// Show it bytes with [`step`](Self::step), drop what an item used, and take the item's
/// [payload](Item::payload_len) from the connection before the next step. It never asks for more than a few hundred bytes and
/// never allocates by a number of the peer beyond limits of its own: 4096 RAM blocks, 256 sections in parts at a time, a description of
/// 16 MiB, a package of 1 GiB.
#[derive(Clone, Debug)]
pub struct MainDecoder {
    page_size: usize,
    /// Length of the file, when the stream is one: mapped-ram headers must stay inside.
    file_len: u64,
    /// Bytes accepted so far, payloads and bodies included.
    position: u64,
    state: State,
    configuration: Configuration,
    return_path: bool,
    advised: bool,
    /// The source may switch to postcopy of `ram`.
    may_switch: bool,
    postcopy: Postcopy,
    /// Whether any command came.
    commands: bool,
    /// Whether the source has described its VM.
    described: bool,
    /// Whether the source has handed memory over.
    shared_memory: bool,
    /// SECTION_LENGTH was the item before.
    length_said: bool,
    ram: Ram,
    /// Sections other than `ram` that were started and have not ended.
    open: Vec<Section>,
    /// Indices of the blocks that a recovery has asked for.
    asked: Vec<usize>,
}

/// What the configuration said.
#[derive(Clone, Debug, Default)]
struct Configuration {
    machine: Option<String>,
    uuid: Option<[u8; 16]>,
    capabilities: Option<Vec<String>>,
    page_bits: Option<u32>,
    layout: BlockLayout,
    offer: Option<Offer>,
}

/// The account of the `ram` section.
#[derive(Clone, Debug, Default)]
struct Ram {
    phase: RamPhase,
    id: u32,
    blocks: Vec<BlockEntry>,
    /// Index into `blocks` by name.
    index: HashMap<BlockName, usize>,
    /// The block of the previous page word: what CONTINUE refers to, across sections.
    last: Option<usize>,
    /// Whether the START section had a FLUSH.
    flush_at_start: bool,
    /// Whether a PART section came.
    parts: bool,
    /// Whether the state of a device came since the last section of `ram`.
    full_since: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum RamPhase {
    #[default]
    Absent,
    Start,
    Started,
    End,
    Ended,
}

/// How far the switch to postcopy has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Postcopy {
    /// It has not begun, and most often never will.
    Before,
    /// Pages are discarded: nothing else may come before the package.
    Discarding,
    /// The source goes on over a new connection, and asks first what was received.
    Recovering,
    /// The package has come. Only discarded pages follow.
    Begun,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Header,
    Configuration,
    /// Behind the configuration: its subsections, or already the first element.
    Subsections,
    Elements,
    /// Inside the block list.
    Blocks {
        total: u64,
        /// `listed <= total`
        listed: u64,
    },
    /// Inside the body of the `ram` section.
    Words,
    /// Behind the body of a section.
    Footer {
        section: u32,
    },
    /// Behind EOF.
    Tail,
    /// Behind the vmdescription.
    Finished,
    /// Behind GO.
    Gone,
}

impl MainDecoder {
    /// A decoder at the first byte of a connection, for pages of `page_size` bytes.
    pub fn new(page_size: usize) -> Self {
        // No file is longer than an off_t can say, and no connection lives that long.
        Self::within_file(page_size, 0, i64::MAX as u64)
    }

    /// A decoder of a stream that begins at byte `begin` of a file of `file_len` bytes, at most `i64::MAX`. All positions and
    /// offsets are those in the file.
    pub fn within_file(page_size: usize, begin: u64, file_len: u64) -> Self {
        let file_len = file_len.min(i64::MAX as u64);
        debug_assert!(page_size.is_power_of_two() && page_size >= 1024, "flags of RAM words need 10 bits");
        Self {
            page_size,
            file_len,
            position: begin,
            state: State::Header,
            configuration: Configuration::default(),
            return_path: false,
            advised: false,
            may_switch: false,
            postcopy: Postcopy::Before,
            commands: false,
            described: false,
            shared_memory: false,
            length_said: false,
            ram: Ram::default(),
            open: Vec::new(),
            asked: Vec::new(),
        }
    }

    /// A decoder at the first byte of the connection over which the source of this stream goes on, after the connection broke
    /// behind the [package](Self::is_postcopy).
    ///
    /// # Panics
    /// Before the package there is nothing to go on with.
    #[must_use]
    pub fn resumed(&self) -> Self {
        assert!(self.is_postcopy(), "the package has come");
        let mut decoder = self.clone();
        (decoder.position, decoder.state) = (0, State::Elements);
        (decoder.ram.phase, decoder.ram.last) = (RamPhase::Started, None);
        (decoder.postcopy, decoder.asked) = (Postcopy::Recovering, Vec::new());
        decoder
    }

    /// A decoder at the first section of a package of postcopy: it holds the state of devices, and nothing else.
    pub fn for_package(page_size: usize) -> Self {
        let mut decoder = Self::new(page_size);
        (decoder.state, decoder.ram.phase) = (State::Elements, RamPhase::Ended);
        decoder
    }

    /// Takes the next item from the start of `input`, or says how many bytes it must be shown in total.
    ///
    /// After an item, the next call must be shown what follows its `used` bytes **and its payload**: the position already
    /// counts the payload as taken. After a [`Section`] item, the caller takes the body, tells its length to
    /// [`body_taken`](Self::body_taken), and goes on with the footer. An error is final.
    pub fn step(&mut self, input: &[u8]) -> Result<Step<Item>, StreamError> {
        let step = wire::step(input, |reader| self.read(reader));
        let step = step.map_err(|source| StreamError { offset: self.position, source })?;
        if let Step::Item { item, used } = &step {
            self.position += *used as u64 + item.payload_len();
            self.accept(item);
        }
        Ok(step)
    }

    /// Tells how long the body of the section was whose head the previous item was.
    pub const fn body_taken(&mut self, len: u64) {
        self.position += len;
    }

    /// Bytes of the stream before the next item.
    pub const fn position(&self) -> u64 {
        self.position
    }

    /// The page size that this stream is decoded with.
    pub const fn page_size(&self) -> usize {
        self.page_size
    }

    /// Whether header and configuration may still go on: the next item can be one of theirs.
    pub const fn in_configuration(&self) -> bool {
        matches!(self.state, State::Header | State::Configuration | State::Subsections)
    }

    /// The block list as far as it was read. Items refer to blocks by their index in it.
    pub fn blocks(&self) -> &[BlockEntry] {
        &self.ram.blocks
    }

    /// Which optional fields the block list has.
    pub const fn layout(&self) -> BlockLayout {
        self.configuration.layout
    }

    /// The section id of `ram`, once it was started.
    pub fn ram_section(&self) -> Option<u32> {
        (self.ram.phase != RamPhase::Absent).then_some(self.ram.id)
    }

    /// Whether all RAM was transferred: the END section of `ram` is complete, and every further FULL section is a device's.
    pub fn ram_ended(&self) -> bool {
        self.ram.phase == RamPhase::Ended
    }

    /// Whether the stream so far is one that a background snapshot can have: pages came, and nothing that such a source does not
    /// send. A FULL section may be the first of the devices' state then.
    ///
    /// That needs a stream without commands, channels and offers, which all belong to sources that end the migration in
    /// another way.
    pub fn may_be_snapshot(&self) -> bool {
        let plain = !self.commands && !self.ram.flush_at_start && self.configuration.offer.is_none();
        plain && self.ram.phase == RamPhase::Started && self.ram.parts && !self.configuration.layout.mapped_ram
    }

    /// Whether the source has begun to discard pages: it switches to postcopy, and what came on channels is over.
    pub fn switches_to_postcopy(&self) -> bool {
        self.postcopy != Postcopy::Before
    }

    /// Whether the package has come: the source has given its VM away.
    pub fn is_postcopy(&self) -> bool {
        matches!(self.postcopy, Postcopy::Begun | Postcopy::Recovering)
    }

    /// Whether the source goes on over a new connection and has not said POSTCOPY_RESUME yet.
    pub fn is_recovering(&self) -> bool {
        self.postcopy == Postcopy::Recovering
    }

    /// The dialect the stream turned out to have, once the START section of `ram` is complete. In a stream without channels it
    /// means nothing.
    pub fn dialect(&self) -> Option<Dialect> {
        match self.ram.phase {
            RamPhase::Absent | RamPhase::Start => None,
            _ if self.ram.flush_at_start => Some(Dialect::PerRound),
            _ => Some(Dialect::PerSection),
        }
    }

    /// Whether the source opened the return path.
    pub const fn return_path_open(&self) -> bool {
        self.return_path
    }

    /// Whether the end of state was read; at most the vmdescription follows.
    ///
    /// If [RAM has not ended](Self::ram_ended), it is a background snapshot: the source's guest runs on. Whether all pages came is for
    /// the caller to know then, because nothing in such a stream says that they have.
    pub fn state_ended(&self) -> bool {
        matches!(self.state, State::Tail | State::Finished | State::Gone)
    }

    /// Whether the vmdescription was read; nothing follows.
    pub fn finished(&self) -> bool {
        matches!(self.state, State::Finished | State::Gone)
    }

    /// Whether the peer offered the commit of which GO is a part.
    fn go_may_follow(&self) -> bool {
        self.is_offered(Extension::TwoStepCommit)
    }

    /// Whether the source has offered `extension`.
    pub fn is_offered(&self, extension: Extension) -> bool {
        self.configuration.offer.as_ref().is_some_and(|offer| offer.extensions.contains(extension))
    }

    /// Reads one item and checks that it may stand here. Changes nothing, since bytes may be missing at the end of it.
    fn read(&self, reader: &mut Reader<'_>) -> Result<Item, Stop> {
        match self.state {
            State::Header => header(reader),
            State::Configuration => configuration(reader),
            State::Subsections if reader.clone().u8()? == SUBSECTION => self.subsection(reader),
            State::Subsections | State::Elements => self.element(reader),
            State::Blocks { total, listed } if total == listed => Ok(Item::BlocksEnd),
            State::Blocks { total, listed } => self.block(reader, total, listed),
            State::Words => self.word(reader),
            State::Footer { section } => footer(reader, section),
            State::Tail | State::Finished if self.go_may_follow() && reader.clone().u8()? == COMMAND => go(reader),
            State::Tail => tail(reader),
            State::Finished | State::Gone => {
                let byte = reader.u8()?;
                Err(unexpected(element_name(byte)?, "after the end of the stream"))
            }
        }
    }

    /// Moves on past an item that was read.
    fn accept(&mut self, item: &Item) {
        self.state = match item {
            Item::Header => State::Configuration,
            Item::Configuration { machine } => {
                self.configuration.machine = Some(machine.clone());
                State::Subsections
            }
            Item::ConfigUuid(uuid) => {
                self.configuration.uuid = Some(*uuid);
                State::Subsections
            }
            Item::ConfigOffer(offer) => {
                self.configuration.offer = Some(offer.clone());
                State::Subsections
            }
            Item::ConfigPageBits(bits) => {
                self.configuration.page_bits = Some(*bits);
                State::Subsections
            }
            Item::ConfigCapabilities(names) => {
                self.configuration.layout.gpa = names.iter().any(|name| name == X_IGNORE_SHARED);
                self.configuration.layout.mapped_ram = names.iter().any(|name| name == MAPPED_RAM);
                self.configuration.capabilities = Some(names.clone());
                State::Subsections
            }
            Item::Command(Command::Go) => State::Gone,
            Item::Command(command) => {
                self.accept_command(command);
                State::Elements
            }
            Item::RamStart { section_id, total } => {
                self.ram.phase = RamPhase::Start;
                self.ram.id = *section_id;
                State::Blocks { total: *total, listed: 0 }
            }
            Item::Block(entry) => {
                let State::Blocks { total, listed } = self.state else {
                    unreachable!("blocks are read inside the block list only");
                };
                self.ram.index.insert(entry.name.clone(), self.ram.blocks.len());
                self.ram.blocks.push(entry.clone());
                State::Blocks { total, listed: listed + entry.used_len }
            }
            Item::RamPart { end } => {
                self.ram.phase = if *end { RamPhase::End } else { RamPhase::Started };
                (self.ram.parts, self.ram.full_since) = (true, false);
                State::Words
            }
            Item::ZeroPage { block, .. }
            | Item::Page { block, .. }
            | Item::Xbzrle { block, .. }
            | Item::CompressPage { block, .. } => {
                self.ram.last = Some(*block);
                State::Words
            }
            Item::BlocksEnd => State::Words,
            Item::Flush => {
                self.ram.flush_at_start |= self.ram.phase == RamPhase::Start;
                State::Words
            }
            Item::Eos => {
                self.ram.phase = match self.ram.phase {
                    RamPhase::End => RamPhase::Ended,
                    _ => RamPhase::Started,
                };
                State::Footer { section: self.ram.id }
            }
            Item::Section(section) => {
                self.length_said = false;
                match section.kind {
                    SectionKind::Start => self.open.push(section.clone()),
                    SectionKind::End => self.open.retain(|open| open.id != section.id),
                    SectionKind::Full => self.ram.full_since = true,
                    SectionKind::Part => (),
                }
                State::Footer { section: section.id }
            }
            Item::Footer { .. } => State::Elements,
            // No description follows in postcopy.
            Item::Eof if self.is_postcopy() => State::Finished,
            Item::Eof => State::Tail,
            Item::VmDescription { .. } => State::Finished,
        };
    }

    fn accept_command(&mut self, command: &Command) {
        self.commands = true;
        match command {
            Command::OpenReturnPath => self.return_path = true,
            Command::Describe { .. } => self.described = true,
            Command::SharedMemory { .. } => self.shared_memory = true,
            Command::SectionLength(_) => self.length_said = true,
            Command::PostcopyRamDiscard { .. } => self.postcopy = Postcopy::Discarding,
            Command::Packaged { .. } | Command::PostcopyResume => self.postcopy = Postcopy::Begun,
            Command::RecvBitmap { block } => self.asked.extend(self.ram.index.get(block)),
            Command::PostcopyAdvise(advice) => {
                (self.advised, self.may_switch) = (true, advice.is_some());
                self.configuration.layout.backing_page_size =
                    advice.is_some_and(|advice| advice.page_size_summary != self.page_size as u64);
            }
            _ => (),
        }
    }

    fn subsection(&self, reader: &mut Reader<'_>) -> Result<Item, Stop> {
        reader.u8()?;
        let name = reader.pstr()?;
        let version = reader.u32()?;
        let known = &self.configuration;
        let (item, again) = match name {
            b"configuration/target-page-bits" if version == 1 => {
                let bits = reader.u32()?;
                let (ours, theirs) = (self.page_size as u64, 1u64.checked_shl(bits).unwrap_or(0));
                if ours != theirs {
                    return Err(Mismatch::PageSize { ours, theirs }.into());
                }
                (Item::ConfigPageBits(bits), known.page_bits.is_some())
            }
            b"configuration/capabilities" if version == 1 => {
                (Item::ConfigCapabilities(capabilities(reader)?), known.capabilities.is_some())
            }
            b"configuration/uuid" if version == 1 => (Item::ConfigUuid(reader.array()?), known.uuid.is_some()),
            name if name == extension::SUBSECTION.as_bytes() && version == 1 => {
                (Item::ConfigOffer(Offer::read(reader)?), known.offer.is_some())
            }
            _ => return Err(DecodeError::UnknownSubsection { name: escape(name), version }.into()),
        };
        if again {
            return Err(unexpected("configuration subsection", "a second time"));
        }
        Ok(item)
    }

    fn element(&self, reader: &mut Reader<'_>) -> Result<Item, Stop> {
        let byte = reader.u8()?;
        match byte {
            byte if self.length_said && byte != FULL => {
                Err(unexpected(element_name(byte)?, "between SECTION_LENGTH and its section"))
            }
            byte if self.is_recovering() && byte != COMMAND => {
                Err(unexpected(element_name(byte)?, "before POSTCOPY_RESUME"))
            }
            EOF if self.ram.phase != RamPhase::Ended && !(self.may_be_snapshot() && self.ram.full_since) => {
                Err(unexpected("EOF", "before the END section of ram"))
            }
            // A section other than ram that has nothing to say after its START has no END.
            EOF => Ok(Item::Eof),
            START | FULL if self.switches_to_postcopy() => {
                Err(unexpected(element_name(byte)?, "after the switch to postcopy"))
            }
            PART | END if self.postcopy == Postcopy::Discarding => {
                Err(unexpected(element_name(byte)?, "between POSTCOPY_RAM_DISCARD and PACKAGED"))
            }
            START | FULL => {
                self.section_head(reader, if byte == START { SectionKind::Start } else { SectionKind::Full })
            }
            PART | END => self.section_rest(reader, if byte == PART { SectionKind::Part } else { SectionKind::End }),
            COMMAND => self.command(reader),
            _ => Err(unexpected(element_name(byte)?, "between sections")),
        }
    }

    /// START or FULL, behind the type byte.
    fn section_head(&self, reader: &mut Reader<'_>, kind: SectionKind) -> Result<Item, Stop> {
        let id = reader.u32()?;
        let name = text("section name", reader.pstr()?)?;
        let instance = reader.u32()?;
        let version = reader.u32()?;
        if kind == SectionKind::Full && name != RAM {
            return Ok(Item::Section(Section { kind, id, name: name.to_owned(), instance, version }));
        }
        if kind == SectionKind::Full {
            return Err(unexpected("FULL section", "for ram, which is transferred in parts"));
        }
        let ours = self.ram.phase != RamPhase::Absent;
        if ours && (name == RAM || id == self.ram.id) || self.open.iter().any(|open| open.id == id) {
            return Err(Violation::SectionTwice { id, name: escape(name.as_bytes()) }.into());
        }
        if name != RAM {
            if self.open.len() == MAX_SECTIONS {
                return Err(Violation::TooManySections { limit: MAX_SECTIONS }.into());
            }
            return Ok(Item::Section(Section { kind, id, name: name.to_owned(), instance, version }));
        }
        if version != RAM_VERSION {
            let name = name.to_owned();
            return Err(Mismatch::SectionVersion { name, found: version, supported: RAM_VERSION }.into());
        }
        if instance != 0 {
            return Err(unexpected("second instance", "of ram, which has one"));
        }
        match RamWord::decode(reader.u64()?, self.page_size)? {
            RamWord::MemSize { total } => Ok(Item::RamStart { section_id: id, total }),
            _ => Err(unexpected("RAM word", "instead of the block list")),
        }
    }

    /// PART or END, behind the type byte.
    fn section_rest(&self, reader: &mut Reader<'_>, kind: SectionKind) -> Result<Item, Stop> {
        let id = reader.u32()?;
        if self.ram.phase == RamPhase::Started && id == self.ram.id {
            return Ok(Item::RamPart { end: kind == SectionKind::End });
        }
        match self.open.iter().find(|open| open.id == id) {
            Some(open) => Ok(Item::Section(Section { kind, ..open.clone() })),
            None => Err(Violation::UnknownSection { id }.into()),
        }
    }

    fn command(&self, reader: &mut Reader<'_>) -> Result<Item, Stop> {
        let command = Command::read(reader)?;
        if self.is_recovering() {
            return self.recovery(command);
        }
        if let Some(refusal) = command.refusal() {
            return Err(refusal.into());
        }
        match &command {
            Command::Go => Err(unexpected("GO", "before the end of the stream")),
            Command::OpenReturnPath if self.return_path => Err(unexpected("OPEN_RETURN_PATH", "a second time")),
            Command::Ping(_) if !self.return_path => Err(unexpected("PING", "without an open return path")),
            Command::PostcopyAdvise(_) if self.advised => Err(unexpected("POSTCOPY_ADVISE", "a second time")),
            // It decides the layout of the block list, which would have been read already.
            Command::PostcopyAdvise(_) if self.ram.phase != RamPhase::Absent => {
                Err(unexpected("POSTCOPY_ADVISE", "after the START section of ram"))
            }
            Command::PostcopyAdvise(Some(advice)) => {
                self.check_advice(advice)?;
                Ok(Item::Command(command))
            }
            Command::Describe { .. } => {
                self.check_describe()?;
                Ok(Item::Command(command))
            }
            Command::SharedMemory { .. } => {
                self.check_shared_memory()?;
                Ok(Item::Command(command))
            }
            Command::SectionLength(len) => {
                self.check_section_length(*len)?;
                Ok(Item::Command(command))
            }
            Command::PostcopyListen | Command::PostcopyRun => Err(unexpected(command.name(), "outside of a package")),
            Command::PostcopyRamDiscard { .. } | Command::Packaged { .. } => {
                self.check_switch(&command)?;
                Ok(Item::Command(command))
            }
            _ => Ok(Item::Command(command)),
        }
    }

    /// A command of a source that goes on: each block is asked for at most once, which bounds what it is answered.
    fn recovery(&self, command: Command) -> Result<Item, Stop> {
        match &command {
            Command::PostcopyResume | Command::Ping(_) => Ok(Item::Command(command)),
            Command::RecvBitmap { block } => match self.ram.index.get(block) {
                Some(index) if self.asked.contains(index) => {
                    Err(unexpected("RECV_BITMAP", "a second time for a block"))
                }
                Some(_) => Ok(Item::Command(command)),
                None => Err(Violation::UnknownBlock { name: block.clone() }.into()),
            },
            _ => Err(unexpected(command.name(), "before POSTCOPY_RESUME")),
        }
    }

    /// Checks where DESCRIBE comes: once, before there is any memory, from a source that hears the answer.
    fn check_describe(&self) -> Result<(), Stop> {
        let place = match self {
            _ if !self.is_offered(Extension::Prepare) => "from a source that has not offered it",
            _ if !self.return_path => "without an open return path",
            _ if self.described => "a second time",
            _ if self.ram.phase != RamPhase::Absent => "after the START section of ram",
            _ => return Ok(()),
        };
        Err(unexpected("DESCRIBE", place))
    }

    /// Checks where SHARED_MEMORY comes: once, before the VM is described, from a source that waits for the commit.
    fn check_shared_memory(&self) -> Result<(), Stop> {
        let place = match self {
            _ if !self.is_offered(Extension::SharedMemory) => "from a source that has not offered it",
            _ if !self.return_path => "without an open return path",
            _ if self.shared_memory => "a second time",
            _ if self.described => "after DESCRIBE",
            _ if self.ram.phase != RamPhase::Absent => "after the START section of ram",
            _ => return Ok(()),
        };
        Err(unexpected("SHARED_MEMORY", place))
    }

    /// Checks where SECTION_LENGTH and SECTION_PACKETS come: before a section of a device, from a source that knows that it is
    /// understood. Channels carry no device state before the last round is over.
    fn check_section_length(&self, len: BodyLength) -> Result<(), Stop> {
        let (extension, early) = match len {
            BodyLength::Packets(_) => (Extension::StatePackets, self.ram.phase != RamPhase::Ended),
            BodyLength::Bytes(_) | BodyLength::Chunks => (Extension::SectionLength, false),
        };
        let place = match self {
            _ if !self.is_offered(extension) => "from a source that has not offered it",
            _ if self.switches_to_postcopy() => "after the switch to postcopy",
            _ if early => "before the END section of ram",
            _ => return Ok(()),
        };
        Err(unexpected(Command::SectionLength(len).name(), place))
    }

    /// Checks a command of the switch to postcopy.
    fn check_switch(&self, command: &Command) -> Result<(), Stop> {
        let name = command.name();
        if !self.may_switch || !self.return_path {
            return Err(unexpected(name, "from a source that has not announced postcopy"));
        }
        if self.ram.phase != RamPhase::Started {
            return Err(unexpected(name, "while there is no RAM to be sent"));
        }
        if self.is_postcopy() {
            return Err(unexpected(name, "after the package"));
        }
        match command {
            Command::PostcopyRamDiscard { block: name, ranges } => {
                let Some(&index) = self.ram.index.get(name) else {
                    return Err(Violation::UnknownBlock { name: name.clone() }.into());
                };
                let block = &self.ram.blocks[index];
                for range in ranges {
                    range.check(&block.name, block.used_len, self.page_size as u64)?;
                }
            }
            Command::Packaged { len } if *len > MAX_PACKAGE => {
                return Err(Violation::PackageTooLong { len: *len, limit: MAX_PACKAGE }.into());
            }
            _ => {}
        }
        Ok(())
    }

    fn check_advice(&self, advice: &PostcopyAdvice) -> Result<(), ProtocolError> {
        let (ours, theirs) = (self.page_size as u64, advice.page_size);
        if ours != theirs {
            return Err(Mismatch::PageSize { ours, theirs }.into());
        }
        let layout = self.configuration.layout;
        if advice.page_size_summary != ours && (layout.gpa || layout.mapped_ram) {
            // An optional page size could not be told from the address or header behind it.
            let what = "huge pages in a stream with x-ignore-shared or mapped-ram and postcopy";
            return Err(Violation::NotAllowed { what }.into());
        }
        Ok(())
    }

    fn block(&self, reader: &mut Reader<'_>, total: u64, listed: u64) -> Result<Item, Stop> {
        let entry = BlockEntry::read(reader, self.configuration.layout, self.page_size)?;
        if self.ram.blocks.len() == MAX_BLOCKS {
            return Err(Violation::TooManyBlocks { limit: MAX_BLOCKS }.into());
        }
        if self.ram.index.contains_key(&entry.name) {
            return Err(Violation::DuplicateBlock { name: entry.name }.into());
        }
        let listed = listed.saturating_add(entry.used_len);
        if listed > total {
            return Err(Violation::TotalMismatch { announced: total, listed }.into());
        }
        if let Some(header) = &entry.mapped_ram {
            let header_end = self.position + reader.position() as u64;
            let page_size = self.page_size as u64;
            // Where no address is listed, no memory is elsewhere.
            if self.configuration.layout.gpa && header.is_elsewhere() && header.page_size == page_size {
                return Ok(Item::Block(entry));
            }
            header.check(&entry.name, entry.used_len, page_size, header_end, self.file_len)?;
        }
        Ok(Item::Block(entry))
    }

    fn word(&self, reader: &mut Reader<'_>) -> Result<Item, Stop> {
        match RamWord::decode(reader.u64()?, self.page_size)? {
            RamWord::Eos => Ok(Item::Eos),
            RamWord::MemSize { .. } => Err(unexpected("block list", "after the first word of ram")),
            RamWord::Flush if self.configuration.layout.mapped_ram => {
                Err(Violation::NotAllowed { what: "FLUSH in a mapped-ram file" }.into())
            }
            RamWord::Flush | RamWord::Xbzrle { .. } | RamWord::CompressPage { .. } if self.is_postcopy() => {
                Err(Violation::NotAllowed { what: "a word other than a whole page in postcopy" }.into())
            }
            RamWord::Flush if self.ram.phase != RamPhase::Start && !self.ram.flush_at_start => {
                Err(unexpected("FLUSH", "in a stream without one in the START section of ram"))
            }
            RamWord::Flush => Ok(Item::Flush),
            _ if self.ram.phase == RamPhase::Start => Err(Violation::PageBeforeFirstSync.into()),
            _ if self.configuration.layout.mapped_ram => {
                Err(Violation::NotAllowed { what: "page in the stream of a mapped-ram file" }.into())
            }
            RamWord::Zero { offset, cont } => {
                let block = self.page(reader, offset, cont)?;
                match reader.u8()? {
                    0 => Ok(Item::ZeroPage { block, offset }),
                    byte => Err(DecodeError::ZeroFillByte { offset, byte }.into()),
                }
            }
            RamWord::Page { offset, cont } => {
                let block = self.page(reader, offset, cont)?;
                Ok(Item::Page { block, offset, len: self.page_size })
            }
            RamWord::Xbzrle { offset, cont } => {
                let block = self.page(reader, offset, cont)?;
                if reader.u8()? != xbzrle::HEADER {
                    return Err(DecodeError::XbzrleMalformed { what: "unknown header", at: 0 }.into());
                }
                let len = usize::from(reader.u16()?);
                if len > xbzrle::MAX_DIFF.min(self.page_size) {
                    return Err(DecodeError::XbzrleMalformed { what: "longer than a page", at: len }.into());
                }
                Ok(Item::Xbzrle { block, offset, len })
            }
            RamWord::CompressPage { offset, cont } => {
                let block = self.page(reader, offset, cont)?;
                let len = reader.u32()?;
                if len == 0 || len as usize > 2 * self.page_size {
                    return Err(Violation::CompressedPageLength { offset, len }.into());
                }
                Ok(Item::CompressPage { block, offset, len: len as usize })
            }
        }
    }

    /// The block of a page word, after checking that the page lies in it.
    fn page(&self, reader: &mut Reader<'_>, offset: u64, cont: bool) -> Result<usize, Stop> {
        let block = if cont {
            self.ram.last.ok_or(Violation::FirstPageWithoutBlock { offset })?
        } else {
            let name = name_text(reader.pstr()?)?;
            let Some(block) = self.ram.index.get(name) else {
                return Err(Violation::UnknownBlock { name: BlockName::new(name)? }.into());
            };
            *block
        };
        self.ram.blocks[block].check_page(offset, self.page_size)?;
        Ok(block)
    }
}

/// An error with the position of the item it was found in.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("at byte {offset} of main: {source}")]
pub struct StreamError {
    /// Where the item begins, counted from the first byte of main.
    pub offset: u64,
    /// What is wrong with it.
    pub source: ProtocolError,
}

/// `QEVM`, the first four bytes of main.
pub const MAGIC: u32 = 0x5145_564d;
/// The version of the stream; version 2 is obsolete.
pub(crate) const VERSION: u32 = 3;
/// The name of the section that transfers RAM.
pub(crate) const RAM: &str = "ram";
/// The version of that section.
pub(crate) const RAM_VERSION: u32 = 4;
/// Capability by which the block list has guest physical addresses.
pub const X_IGNORE_SHARED: &str = "x-ignore-shared";
/// Capability by which the block list has mapped-ram headers.
pub const MAPPED_RAM: &str = "mapped-ram";

/// The longest machine type accepted. Real ones have some 15 bytes.
pub(crate) const MAX_MACHINE: u32 = 255;
/// The most capabilities accepted in the configuration, which lists at most two.
pub(crate) const MAX_CAPABILITIES: u32 = 16;
/// The most sections other than `ram` that may be transferred in parts at the same time.
pub(crate) const MAX_SECTIONS: usize = 256;
/// The longest vmdescription accepted. A small VM's has 100 KB.
pub(crate) const MAX_VMDESC: u32 = 16 << 20;

/// The longest package of a postcopy migration accepted: the state of all devices. A small VM's has 14 KB.
pub(crate) const MAX_PACKAGE: u32 = 1 << 30;

/// The end of the VM's state.
pub const EOF: u8 = 0x00;
pub(crate) const START: u8 = 0x01;
pub(crate) const PART: u8 = 0x02;
pub(crate) const END: u8 = 0x03;
pub(crate) const FULL: u8 = 0x04;
pub(crate) const SUBSECTION: u8 = 0x05;
pub(crate) const VMDESCRIPTION: u8 = 0x06;
pub(crate) const CONFIGURATION: u8 = 0x07;
pub(crate) const COMMAND: u8 = 0x08;
/// The end of a section, before its id.
pub const FOOTER: u8 = 0x7e;
