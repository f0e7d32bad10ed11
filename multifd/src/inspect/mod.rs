//! Looks into a recorded migration: the bytes of main and of all channels, as they were sent.
//!
//! One thread reads them in the only order that matters: up to a sync point on main, then each channel up to its SYNC
//! packet. Every rule that a destination checks is checked, and the first one that is broken ends the account, with the
//! connection and the byte. On the way, packets, pages and rounds are counted, and pages can be put into place.

mod account;
mod channel;
mod contents;
pub mod libvirt;
mod main_stream;
mod postcopy;

use std::{io::Read, path::Path};

use self::{account::Pages, channel::Channel, main_stream::MainStream};
pub use multifd_proto::command::{BodyLength, Command};

pub use self::{
    account::{Account, ChannelAccount, MainAccount, RoundAccount},
    contents::{BlockContents, Contents},
    postcopy::PostcopyAccount,
};
use crate::{
    checkpoint::CheckpointError,
    error::{Error, Place},
    sync::Arc,
};
use multifd_proto::{
    ChannelId, Mismatch, Violation,
    extension::Extension,
    machine::Dialect,
    packet::Hello,
    stream::{Item, Section, SectionKind},
    xbzrle,
};

/// A recorded migration.
pub struct Recorded {
    /// What was sent on main.
    pub main: Box<dyn Read + Send>,
    /// What was sent on each channel, in any order; none in a plain migration.
    pub channels: Vec<Box<dyn Read + Send>>,
    /// What was sent on the preempt connection of postcopy, if there was one.
    pub preempt: Option<Box<dyn Read + Send>>,
}

/// What was found in a recorded migration.
#[non_exhaustive]
pub struct Inspection {
    /// What was counted, up to the end or to the first broken rule.
    pub account: Account,
    /// The first rule that was broken, and where.
    pub broken: Option<Error>,
    /// Guest memory at that point, if it was wanted.
    pub contents: Option<Contents>,
}

impl Inspection {
    /// Reads `recorded` to its end. Pages are put into a file without a name in `contents`, if that is given.
    ///
    /// # Errors
    /// The file for the contents cannot be made. What is wrong with the migration is a part of the result.
    pub fn of(recorded: Recorded, contents: Option<&Path>) -> Result<Inspection, CheckpointError> {
        let scratch = contents.map(contents::scratch).transpose()?;
        let mut reader = RecordedReader {
            main: MainStream::new(recorded.main),
            channels: Vec::new(),
            preempt: recorded.preempt,
            account: Account::default(),
            pages: None,
            section_length: None,
            scratch,
        };
        let broken = reader.greet(recorded.channels).and_then(|()| reader.read()).err();
        let RecordedReader { main, channels, mut account, pages, .. } = reader;
        account.main.bytes = main.position();
        account.channels = channels.into_iter().map(|channel| channel.account).collect();
        let contents = pages.and_then(|pages| pages.finish(&mut account));
        Ok(Inspection { account, broken, contents })
    }
}

struct RecordedReader {
    main: MainStream,
    /// By id.
    channels: Vec<Channel>,
    /// Until main has ended.
    preempt: Option<Box<dyn Read + Send>>,
    account: Account,
    /// What pages are known of, once the block list was read.
    pages: Option<Pages>,
    /// What the source says of the section that follows.
    section_length: Option<BodyLength>,
    scratch: Option<contents::Scratch>,
}

impl RecordedReader {
    /// Reads what each channel says it is.
    fn greet(&mut self, streams: Vec<Box<dyn Read + Send>>) -> Result<(), Error> {
        let count = streams.len();
        let mut first: Option<Hello> = None;
        let windows = Arc::default();
        for (index, stream) in streams.into_iter().enumerate() {
            let channel = Channel::open(stream, index, &windows)?;
            let at = Place { connection: crate::error::Connection::Channel(channel.id()), offset: 0 };
            let id = channel.id();
            if id.index() >= count {
                return Err(Error::protocol(at)(Violation::ChannelIdOutOfRange { id, channels: count }));
            }
            if self.channels.iter().any(|known| known.id() == id) {
                return Err(Error::protocol(at)(Violation::ChannelIdTwice { id }));
            }
            let hello = Hello { uuid: channel.account.uuid, channel: id, channels: None };
            let expected = first.get_or_insert(hello).uuid;
            if expected != hello.uuid {
                let found = hello.uuid;
                return Err(Error::protocol(at)(Mismatch::Uuid { expected, found }));
            }
            self.channels.push(channel);
        }
        self.channels.sort_by_key(|channel| channel.id().index());
        Ok(())
    }

    fn read(&mut self) -> Result<(), Error> {
        self.main.begin()?;
        while let Some(item) = self.main.next_item()? {
            if !self.item(item)? {
                break;
            }
        }
        self.main.nothing_follows()?;
        self.account.complete = true;
        self.finish_postcopy()?;
        let Some(pages) = &mut self.pages else { return Ok(()) };
        let decoder = self.main.decoder();
        if self.account.snapshot || decoder.state_ended() && !decoder.ram_ended() {
            self.account.snapshot = true;
            pages.verify_each_once()?;
        }
        let may_have_state = decoder.is_offered(Extension::StatePackets);
        for channel in &mut self.channels {
            channel.read_rest(pages, may_have_state)?;
        }
        Ok(())
    }

    /// Takes `item`, with what belongs to it. Returns whether another one follows.
    fn item(&mut self, item: Item) -> Result<bool, Error> {
        let main = &mut self.account.main;
        match item {
            Item::Configuration { machine } => main.machine = machine,
            Item::ConfigCapabilities(names) => main.capabilities = names,
            Item::ConfigUuid(uuid) => main.uuid = Some(uuid),
            Item::Command(command) => {
                main.add_command(command.clone());
                match command {
                    Command::PostcopyRamDiscard { block, ranges } => self.discard(&block, &ranges)?,
                    Command::Packaged { len } => self.package(len)?,
                    Command::Describe { len } | Command::SharedMemory { len } => drop(self.main.payload(len as usize)?),
                    Command::SectionLength(len) => self.section_length = Some(len),
                    _ => {}
                }
            }
            Item::BlocksEnd => {
                let blocks = self.main.decoder().blocks().to_vec();
                let pages = Pages::new(&blocks, !self.channels.is_empty(), self.scratch.take())?;
                self.account.blocks = pages.blocks();
                self.pages = Some(pages);
            }
            Item::RamPart { end } => main.parts += u64::from(!end),
            Item::Flush => {
                main.flush += 1;
                self.sync_point()?;
            }
            Item::Eos => self.end_of_section()?,
            Item::Section(section) => return self.section(&section),
            Item::VmDescription { len } => self.account.tail.vmdescription = self.main.payload(len)?,
            item => self.page(item)?,
        }
        Ok(true)
    }

    /// Takes `item`, if it is a page.
    fn page(&mut self, item: Item) -> Result<(), Error> {
        let main = &mut self.account.main;
        match item {
            Item::ZeroPage { block, offset } => {
                main.zero += 1;
                if self.main.decoder().is_postcopy() {
                    self.pushed(block, offset)?;
                }
                self.zero(block, offset)
            }
            Item::Page { block, offset, len } => {
                main.page += 1;
                if self.main.decoder().is_postcopy() {
                    self.pushed(block, offset)?;
                }
                let page = self.main.payload(len)?;
                self.store(block, offset, &page)
            }
            Item::Xbzrle { block, offset, len } => {
                main.xbzrle += 1;
                let place = self.main.place();
                let diff = self.main.payload(len)?;
                let mut page = vec![0; PAGE_SIZE];
                let known = self.pages().load(block, offset, &mut page).map_err(Error::io(place))?;
                let applied = xbzrle::apply(&diff, &mut page);
                if known {
                    applied.map_err(Error::protocol(place))?;
                }
                self.store(block, offset, &page)
            }
            Item::CompressPage { block, offset, len } => {
                main.compressed += 1;
                let place = self.main.place();
                let payload = self.main.payload(len)?;
                let mut page = vec![0; PAGE_SIZE];
                crate::compress::inflate_page(&payload, &mut page).map_err(Error::io(place))?;
                self.store(block, offset, &page)
            }
            _ => Ok(()),
        }
    }

    fn end_of_section(&mut self) -> Result<(), Error> {
        self.account.main.end_of_section += 1;
        let dialect = self.main.decoder().dialect();
        if self.channels.is_empty() {
            return Ok(());
        }
        self.account.dialect = dialect;
        match dialect {
            Some(Dialect::PerSection) if !self.main.decoder().is_postcopy() => self.sync_point(),
            _ => Ok(()),
        }
    }

    /// Takes a section beside RAM, or all that is left of the stream. Returns whether another item follows.
    fn section(&mut self, section: &Section) -> Result<bool, Error> {
        if let Some(len) = self.section_length.take() {
            return self.bounded_section(section, len).map(|()| true);
        }
        if section.kind == SectionKind::Full && self.main.decoder().ram_ended() {
            self.account.tail = self.main.tail(section, self.account.beside_ram.early())?;
            return Ok(false);
        }
        if section.kind == SectionKind::Full && self.snapshot_tail(section)? {
            return Ok(false);
        }
        let ram_started = self.main.decoder().ram_section().is_some();
        let bytes = self.main.section_beside_ram(section, self.account.beside_ram.bytes())?;
        self.account.beside_ram.push(section, &bytes, ram_started);
        Ok(true)
    }

    /// Takes a section of which the source says how long it is. It is kept where it is a part of the devices' state; one that was sent
    /// while the guest ran is passed over.
    fn bounded_section(&mut self, section: &Section, len: BodyLength) -> Result<(), Error> {
        let kept = self.main.decoder().ram_ended().then_some(&mut self.account.tail.sections);
        self.main.bounded_section(section, len, kept)
    }

    /// Takes all of main from `first` on, if that is the state of all devices of a background snapshot.
    fn snapshot_tail(&mut self, first: &Section) -> Result<bool, Error> {
        if !self.main.decoder().may_be_snapshot() {
            return Ok(false);
        }
        let Some(tail) = self.main.ahead(first, self.account.beside_ram.early())? else { return Ok(false) };
        (self.account.tail, self.account.snapshot) = (tail, true);
        Ok(true)
    }

    /// The end of a round on main: every channel has to come to it.
    fn sync_point(&mut self) -> Result<(), Error> {
        self.account.main.sync_points += 1;
        let round = self.account.rounds.len() as u64 + self.account.rounds_left_out;
        let pages = self.pages.as_mut().expect("sync points come behind the block list");
        let place = self.main.place();
        for channel in &mut self.channels {
            if !channel.read_to_sync(pages, round > 0)? {
                let missing = Violation::SyncMissing { channel: channel.id(), round };
                return Err(Error::protocol(place)(missing));
            }
        }
        let stats = pages.end_round(round);
        self.account.add_round(stats);
        Ok(())
    }

    fn zero(&mut self, block: usize, offset: u64) -> Result<(), Error> {
        let place = self.main.place();
        self.pages().zero(block, &[offset], None).map_err(Error::io(place))
    }

    fn store(&mut self, block: usize, offset: u64, page: &[u8]) -> Result<(), Error> {
        let place = self.main.place();
        self.pages().store(block, &[offset], page, None).map_err(Error::io(place))
    }

    fn pages(&mut self) -> &mut Pages {
        self.pages.as_mut().expect("the decoder lets no page pass before the block list")
    }
}

/// Whose page it is: main, or a channel.
type Bearer = Option<ChannelId>;

/// The page size of what is inspected; all of x86 has it.
const PAGE_SIZE: usize = 4096;
