//! What is counted in a recorded migration.

use std::{io, ops::Range};

use multifd_proto::{
    BlockName, ChannelId, command::Command, machine::Dialect, packet::Compression, ram::BlockEntry,
    stream::X_IGNORE_SHARED,
};

use super::{
    Bearer, Contents, PAGE_SIZE, PostcopyAccount,
    contents::{self, Scratch},
};
use crate::{
    beside_ram::BesideRam,
    checkpoint::Tail,
    dirty_bitmap::DirtyBitmap,
    error::{Connection, Error, Mismatch, Place},
    layout::Layout,
    round::discarded::Discarded,
};

/// The account of a whole migration.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Account {
    /// Main.
    pub main: MainAccount,
    /// The channels, by id.
    pub channels: Vec<ChannelAccount>,
    /// Where rounds end; nothing without channels.
    pub dialect: Option<Dialect>,
    /// What lies between two sync points; of the first 65,536 rounds.
    pub rounds: Vec<RoundAccount>,
    /// How many more rounds there are.
    pub rounds_left_out: u64,
    /// RAM blocks: name, bytes, and how many of their pages were last sent with content.
    pub blocks: Vec<(BlockName, u64, u64)>,
    /// Those of them whose memory is elsewhere: the source left them out (`x-ignore-shared`). Known at the end of main.
    pub memory_elsewhere: Vec<BlockName>,
    /// Pages sent again although nothing lay between that could have made it necessary: in the same round.
    pub repeated_in_round: u64,
    /// Pages sent again in a later round.
    pub sent_again: u64,
    /// Sections before the devices' state.
    pub beside_ram: BesideRam,
    /// Device state, and what describes it.
    pub(crate) tail: Tail,
    /// Main came to its end.
    pub complete: bool,
    /// It is a background snapshot: all is of the instant at which it began, and the guest ran on at the source.
    pub snapshot: bool,
    /// What was counted of the switch to postcopy, if there was one.
    pub postcopy: Option<PostcopyAccount>,
}

impl Account {
    pub(super) fn add_round(&mut self, round: RoundAccount) {
        if self.rounds.len() < MAX_ROUNDS { self.rounds.push(round) } else { self.rounds_left_out += 1 }
    }

    /// Device state as it stands on the wire, up to the end of state.
    pub fn sections(&self) -> &[u8] {
        &self.tail.sections
    }

    /// The description of the device state, as JSON; empty where there is none.
    pub fn vmdescription(&self) -> &[u8] {
        &self.tail.vmdescription
    }
}

/// The account of main.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct MainAccount {
    /// Bytes read.
    pub bytes: u64,
    /// The machine type.
    pub machine: String,
    /// Capabilities that change the layout of the stream.
    pub capabilities: Vec<String>,
    /// The VM's UUID, where it is validated.
    pub uuid: Option<[u8; 16]>,
    /// Commands, in their order; the first 4096. Those that discard are without their ranges.
    pub commands: Vec<Command>,
    /// How many more commands there are.
    pub commands_left_out: u64,
    /// PART sections of `ram`.
    pub parts: u64,
    /// Pages of zeros.
    pub zero: u64,
    /// Pages with content.
    pub page: u64,
    /// Pages as differences.
    pub xbzrle: u64,
    /// Pages compressed one by one.
    pub compressed: u64,
    /// FLUSH words.
    pub flush: u64,
    /// Ends of `ram` sections.
    pub end_of_section: u64,
    /// Ends of rounds.
    pub sync_points: u64,
}

/// The account of one channel.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ChannelAccount {
    /// Its id.
    pub id: ChannelId,
    /// The VM's UUID; zeros if it has none.
    pub uuid: [u8; 16],
    /// Bytes read.
    pub bytes: u64,
    /// Packets of any kind.
    pub packets: u64,
    /// Packets that end a round.
    pub sync: u64,
    /// Those of them that also carry pages.
    pub sync_with_pages: u64,
    /// Packets with neither pages nor SYNC.
    pub empty: u64,
    /// Packets of device state.
    pub state: u64,
    /// Packets without payload whose size field says otherwise.
    pub stale_size: u64,
    /// Pages with content.
    pub normal: u64,
    /// Pages of zeros.
    pub zero: u64,
    /// Bytes of payload.
    pub payload: u64,
    /// How payloads were compressed, if there were any.
    pub compression: Option<Compression>,
}

/// What lies between two sync points.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct RoundAccount {
    /// Counted from 0; the first has no pages.
    pub round: u64,
    /// Pages with content, on all connections.
    pub normal: u64,
    /// Pages of zeros.
    pub zero: u64,
    /// Pages that came more than once in this round.
    pub repeated: u64,
    /// Pages on each channel, by id.
    pub channel_pages: Vec<u64>,
}

/// What is known about every page.
pub(super) struct Pages {
    pub(super) layout: Layout,
    /// Whether the migration has rounds that can be told: without channels it has none.
    rounds: bool,
    /// Named in this round, named ever, and last named with content.
    in_round: DirtyBitmap,
    /// The pages in `in_round`, as long as they are few: a round without pages must not cost a look at a large bitmap.
    few: Vec<u64>,
    ever: DirtyBitmap,
    content: DirtyBitmap,
    round: RoundAccount,
    sent_again: u64,
    repeated: u64,
    /// What was discarded at the switch to postcopy.
    pub(super) discarded: Option<Discarded>,
    contents: Option<Contents>,
}

impl Pages {
    /// For pages of `blocks`. Without `rounds` a page that comes again is never one too many.
    pub(super) fn new(blocks: &[BlockEntry], rounds: bool, scratch: Option<Scratch>) -> Result<Pages, Error> {
        let layout = Layout::new(PAGE_SIZE, blocks.iter().map(|block| (block.name.clone(), block.used_len)))?;
        contents::check_size(&layout)?;
        let failed = |source| Error::Io { at: Place { connection: Connection::Main, offset: 0 }, source };
        let bitmap = || DirtyBitmap::try_new(&layout).map_err(failed);
        let (in_round, ever, content) = (bitmap()?, bitmap()?, bitmap()?);
        let contents = scratch.map(|scratch| Contents::new(scratch, layout.clone())).transpose()?;
        let round = RoundAccount::default();
        Ok(Pages {
            layout,
            rounds,
            in_round,
            few: Vec::new(),
            ever,
            content,
            round,
            sent_again: 0,
            repeated: 0,
            discarded: None,
            contents,
        })
    }

    pub(super) fn blocks(&self) -> Vec<(BlockName, u64, u64)> {
        self.layout.blocks().iter().map(|block| (block.name().clone(), block.bytes(), 0)).collect()
    }

    /// Pages with content came.
    pub(super) fn store(&mut self, block: usize, offsets: &[u64], bytes: &[u8], from: Bearer) -> io::Result<()> {
        self.name(block, offsets, from, true);
        self.contents.as_ref().map_or(Ok(()), |contents| contents.store(block, offsets, bytes))
    }

    /// Pages of zeros came.
    pub(super) fn zero(&mut self, block: usize, offsets: &[u64], from: Bearer) -> io::Result<()> {
        self.name(block, offsets, from, false);
        self.contents.as_ref().map_or(Ok(()), |contents| contents.zero(block, offsets))
    }

    /// Copies the page at `offset` out, if contents are kept.
    pub(super) fn load(&mut self, block: usize, offset: u64, into: &mut [u8]) -> io::Result<bool> {
        match &self.contents {
            Some(contents) => contents.load(block, offset, into).map(|()| true),
            None => Ok(false),
        }
    }

    /// The pages with the numbers `pages`, `range` of `block`, are discarded: they count as never named from here on.
    pub(super) fn forget(&mut self, block: usize, range: Range<u64>, pages: Range<u64>) -> io::Result<()> {
        for known in [&mut self.in_round, &mut self.ever, &mut self.content] {
            known.clear_range(pages.clone());
        }
        self.contents.as_ref().map_or(Ok(()), |contents| contents.discard(block, range))
    }

    fn name(&mut self, block: usize, offsets: &[u64], from: Bearer, content: bool) {
        let block = &self.layout.blocks()[block];
        for &offset in offsets {
            let page = block.page_at(offset);
            if self.rounds && self.in_round.contains(page) {
                self.round.repeated += 1;
            } else if self.ever.contains(page) {
                self.sent_again += 1;
            }
            self.in_round.set(page);
            if self.few.len() <= FEW {
                self.few.push(page);
            }
            self.ever.set(page);
            if content {
                self.content.set(page);
            } else {
                self.content.clear_range(page..page + 1);
            }
        }
        let count = offsets.len() as u64;
        *if content { &mut self.round.normal } else { &mut self.round.zero } += count;
        if let Some(id) = from {
            let pages = &mut self.round.channel_pages;
            pages.resize(pages.len().max(id.index() + 1), 0);
            pages[id.index()] += count;
        }
    }

    /// Every connection has come to the end of the round.
    pub(super) fn end_round(&mut self, round: u64) -> RoundAccount {
        if self.few.len() <= FEW {
            self.few.iter().for_each(|&page| self.in_round.clear_range(page..page + 1));
        } else {
            self.in_round.clear();
        }
        self.few.clear();
        let stats = RoundAccount { round, ..std::mem::take(&mut self.round) };
        self.repeated += stats.repeated;
        stats
    }

    /// Verifies that every page came exactly once, as in a background snapshot.
    pub(super) fn verify_each_once(&self) -> Result<(), Mismatch> {
        let (pages, named) = (self.layout.pages(), self.ever.count());
        let again = self.sent_again + self.repeated + self.round.repeated;
        if (named, again) == (pages, 0) {
            return Ok(());
        }
        Err(Mismatch::SnapshotIncomplete { missing: pages - named, pages, again })
    }

    /// Puts the totals into `account`.
    pub(super) fn finish(mut self, account: &mut Account) -> Option<Contents> {
        // What came after the last sync point: all of it in a stream without channels.
        let rest = self.end_round(account.rounds.len() as u64 + account.rounds_left_out);
        if rest.normal + rest.zero > 0 {
            account.add_round(rest);
        }
        account.repeated_in_round = self.repeated;
        account.sent_again = self.sent_again;
        let leaves_out = account.complete && account.main.capabilities.iter().any(|name| name == X_IGNORE_SHARED);
        for (block, (name, _, content)) in self.layout.blocks().iter().zip(&mut account.blocks) {
            let pages = block.page_range();
            if leaves_out && self.ever.next(pages.start).is_none_or(|page| !pages.contains(&page)) {
                account.memory_elsewhere.push(name.clone());
            }
            let mut next = self.content.next(pages.start);
            while let Some(page) = next.filter(|page| pages.contains(page)) {
                *content += 1;
                next = self.content.next(page + 1);
            }
        }
        self.contents
    }
}

impl MainAccount {
    pub(super) fn add_command(&mut self, command: Command) {
        let command = match command {
            // There may be thousands of them in each.
            Command::PostcopyRamDiscard { block, .. } => Command::PostcopyRamDiscard { block, ranges: Vec::new() },
            command => command,
        };
        if self.commands.len() < MAX_COMMANDS { self.commands.push(command) } else { self.commands_left_out += 1 }
    }
}

/// Rounds that are told one by one: a recording can have one for each eight of its bytes.
const MAX_ROUNDS: usize = 1 << 16;
/// Commands that are told one by one.
const MAX_COMMANDS: usize = 4096;
/// Pages of a round that are taken out of a bitmap one by one.
const FEW: usize = 1 << 16;
