//! The switch to postcopy in a recorded migration.

use std::io::{self, Read};

use multifd_proto::{
    BlockName, DecodeError, Step, Violation,
    postcopy::{DiscardRange, Package, PreemptDecoder, PreemptItem},
    ram::BlockEntry,
    vmdesc::WholeScanner,
};

use super::{PAGE_SIZE, RecordedReader, account::Pages};
use crate::{
    checkpoint::Tail,
    error::{Connection, Error, Mismatch, Place},
    round::discarded::Discarded,
    transport::one_way::read_some,
};

/// What was counted of a switch to postcopy.
#[derive(Clone, Debug, Default)]
pub struct PostcopyAccount {
    /// Pages that were discarded at the switch, to be sent again.
    pub discarded: u64,
    /// Bytes of the package.
    pub package: u64,
    /// The values of the PINGs in it.
    pub package_pings: Vec<u32>,
    /// Pages that main pushed after the switch.
    pub main_pages: u64,
    /// Pages on the preempt connection.
    pub preempt_pages: u64,
    /// Whether the preempt connection came to its last word; nothing where none was recorded.
    pub preempt_ended: Option<bool>,
}

impl RecordedReader {
    /// The source has discarded `ranges` of `block`.
    pub(super) fn discard(&mut self, block: &BlockName, ranges: &[DiscardRange]) -> Result<(), Error> {
        let place = self.main.place();
        let account = self.account.postcopy.get_or_insert_default();
        let pages = self.pages.as_mut().expect("the decoder lets no switch pass before the block list");
        for range in ranges {
            account.discarded += pages.discard(block, range, place)?;
        }
        Ok(())
    }

    /// Takes the package of `len` bytes.
    pub(super) fn package(&mut self, len: u32) -> Result<(), Error> {
        let place = self.main.place();
        let bytes = self.main.payload(len as usize)?;
        let Package { devices, pings } = Package::of(&bytes).map_err(Error::protocol(place))?;
        let sections = bytes[devices].to_vec();
        if sections.is_empty() || !WholeScanner::default().scan(&sections) {
            let what = "its devices are not whole sections";
            return Err(Error::protocol(place)(DecodeError::BadPackage { len: len as usize, what }));
        }
        self.account.tail = Tail { sections, vmdescription: Vec::new() };
        let account = self.account.postcopy.get_or_insert_default();
        (account.package, account.package_pings) = (len.into(), pings);
        Ok(())
    }

    /// Main brings the page at `offset` of `block` after the switch.
    pub(super) fn pushed(&mut self, block: usize, offset: u64) -> Result<(), Error> {
        let place = self.main.place();
        self.pages().claim(block, offset).map_err(Error::protocol(place))?;
        self.account.postcopy.get_or_insert_default().main_pages += 1;
        Ok(())
    }

    /// Main has ended: reads the preempt connection, if there is one.
    ///
    /// # Errors
    /// The first rule that it breaks; pages that are missing then.
    pub(super) fn finish_postcopy(&mut self) -> Result<(), Error> {
        let Some(mut account) = self.account.postcopy.take() else { return Ok(()) };
        let blocks = self.main.decoder().blocks().to_vec();
        let pages = self.pages.as_mut().expect("the decoder lets no switch pass before the block list");
        let read = self.preempt.take().map_or(Ok(()), |bytes| read_preempt(bytes, &blocks, pages, &mut account));
        self.account.postcopy = Some(account);
        read?;
        Ok(pages.verify_none_is_missing()?)
    }
}

/// Reads a whole preempt connection.
fn read_preempt(
    mut bytes: Box<dyn Read + Send>,
    blocks: &[BlockEntry],
    pages: &mut Pages,
    account: &mut PostcopyAccount,
) -> Result<(), Error> {
    let mut decoder = PreemptDecoder::default();
    let (mut buf, mut used_up) = (Vec::new(), 0u64);
    account.preempt_ended = Some(false);
    loop {
        let at = Place { connection: Connection::Preempt, offset: used_up };
        let step = decoder.step(&buf, blocks, PAGE_SIZE).map_err(Error::protocol(at))?;
        let (item, used) = match step {
            Step::Item { item, used } => (item, used),
            Step::Need(total) => match fill(&mut bytes, &mut buf, total).map_err(Error::io(at))? {
                true => continue,
                false if buf.is_empty() => return Ok(()),
                false => return Err(Error::Io { at, source: io::ErrorKind::UnexpectedEof.into() }),
            },
        };
        buf.drain(..used);
        used_up += used as u64;
        match item {
            PreemptItem::Page { block, offset } => {
                pages.claim(block, offset).map_err(Error::protocol(at))?;
                if !fill(&mut bytes, &mut buf, PAGE_SIZE).map_err(Error::io(at))? {
                    return Err(Error::Io { at, source: io::ErrorKind::UnexpectedEof.into() });
                }
                pages.store(block, &[offset], &buf[..PAGE_SIZE], None).map_err(Error::io(at))?;
                buf.drain(..PAGE_SIZE);
                used_up += PAGE_SIZE as u64;
                account.preempt_pages += 1;
            }
            PreemptItem::Zero { block, offset } => {
                pages.claim(block, offset).map_err(Error::protocol(at))?;
                pages.zero(block, &[offset], None).map_err(Error::io(at))?;
                account.preempt_pages += 1;
            }
            PreemptItem::End => account.preempt_ended = Some(true),
        }
    }
}

/// Makes sure that `buf` has `total` bytes; `false` if the recording ends before.
fn fill(bytes: &mut dyn Read, buf: &mut Vec<u8>, total: usize) -> io::Result<bool> {
    let mut more = [0; 4096];
    while buf.len() < total {
        match read_some(bytes, &mut more)? {
            0 => return Ok(false),
            n => buf.extend_from_slice(&more[..n]),
        }
    }
    Ok(true)
}

impl Pages {
    /// The source discards `range` of `block`; how many pages that are.
    fn discard(&mut self, block: &BlockName, range: &DiscardRange, at: Place) -> Result<u64, Error> {
        let index = self.layout.index_of(block.as_str()).expect("the decoder knows the block");
        let known = &self.layout.blocks()[index];
        let range = range.check(block, known.bytes(), PAGE_SIZE as u64).map_err(Error::protocol(at))?;
        if self.discarded.is_none() {
            self.discarded = Some(Discarded::new(&self.layout).map_err(Error::io(at))?);
        }
        let discarded = self.discarded.as_mut().expect("made above");
        let pages = discarded.discard(known, &range).map_err(Error::protocol(at))?;
        self.forget(index, range, pages.clone()).map_err(Error::io(at))?;
        Ok(pages.end - pages.start)
    }

    fn claim(&mut self, block: usize, offset: u64) -> Result<(), Violation> {
        let block = &self.layout.blocks()[block];
        match &mut self.discarded {
            Some(discarded) => discarded.claim(block, offset),
            None => Err(Violation::PageNotMissing { block: block.name().clone(), offset }),
        }
    }

    fn verify_none_is_missing(&self) -> Result<(), Mismatch> {
        match &self.discarded {
            Some(discarded) if discarded.missing() > 0 => {
                Err(Mismatch::PagesMissing { missing: discarded.missing(), discarded: discarded.pages() })
            }
            _ => Ok(()),
        }
    }
}
