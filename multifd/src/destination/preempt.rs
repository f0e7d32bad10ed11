//! The connection that a source of postcopy has for pages that were asked for: bare words, without any greeting.
//!
//! No page is asked for here, so a QEMU sends nothing on it but its end. One that brings pages is taken all the same: they are accounted
//! with those of main, so that none is taken twice.

use std::io;

use multifd_proto::{
    Step,
    postcopy::{MeaningAfterSwitch as Meaning, PreemptDecoder, PreemptItem, ReachedAfterSwitch as Reached},
    ram::BlockEntry,
};

use super::{connections::Stage, greeting::Refused, shared::Shared};
use crate::{
    error::{Connection, Error, Place},
    sync::{Arc, lock},
    transport::Stream,
};

/// One preempt connection.
pub(super) struct PreemptReader<'a> {
    stream: &'a mut dyn Stream,
    number: usize,
    shared: &'a Arc<Shared>,
    /// What was received and not used.
    buf: Vec<u8>,
    /// Bytes used.
    used: u64,
    /// Whether a word of it was accepted: from then on it is a part of the migration.
    accepted: bool,
    /// What has been said.
    decoder: PreemptDecoder,
}

impl<'a> PreemptReader<'a> {
    /// Reads from `stream`, of which `heard` has been read, as connection `number`.
    pub(super) fn new(
        stream: &'a mut dyn Stream,
        heard: &[u8],
        number: usize,
        shared: &'a Arc<Shared>,
    ) -> PreemptReader<'a> {
        PreemptReader {
            stream,
            number,
            shared,
            buf: heard.to_vec(),
            used: 0,
            accepted: false,
            decoder: PreemptDecoder::default(),
        }
    }

    /// Takes pages until the connection ends.
    ///
    /// # Errors
    /// It begins with something that is no word of this migration: a stranger's. Else the first rule that it breaks; the
    /// connection's; [`Error::Stopped`].
    pub(super) fn run(mut self) -> Result<(), Refused> {
        // What it says refers to pages that main has discarded.
        let Some(blocks) = self.shared.switch.preempt_begins(self.number)? else {
            return Err(Refused::Stranger("belongs to connections that are lost".to_owned()));
        };
        let outcome = self.words(&blocks).or_else(|error| self.ends(error));
        // Behind what that means: else main might give up what is missing, and not know why.
        self.shared.switch.preempt_ends(self.number, self.accepted);
        outcome
    }

    /// Does what it means that the connection ended by `error`.
    ///
    /// # Errors
    /// It is a stranger's; [`Error::Stopped`]: the migration has ended, with this error if it came first.
    fn ends(&self, error: Error) -> Result<(), Refused> {
        if !self.accepted && self.shared.meaning(Reached::Nothing, &error) == Meaning::Replace {
            return Err(Refused::Stranger(match error {
                Error::Protocol { source, .. } => format!("begins with no page of this migration: {source}"),
                error => format!("ends in the middle of its first word: {error}"),
            }));
        }
        if self.decoder.ended() && self.shared.meaning(Reached::Whole, &error) == Meaning::Finished {
            return Ok(());
        }
        self.shared.break_off(error).map_err(|error| {
            self.shared.stop.stop(error);
            Error::Stopped.into()
        })
    }

    fn words(&mut self, blocks: &[BlockEntry]) -> Result<(), Error> {
        loop {
            let place = self.place();
            let step = self.decoder.step(&self.buf, blocks, self.shared.page_size).map_err(Error::protocol(place))?;
            let (item, used) = match step {
                Step::Item { item, used } => (item, used),
                Step::Need(total) => match self.fill(total)? {
                    true => continue,
                    false => return Ok(()),
                },
            };
            if !std::mem::replace(&mut self.accepted, true) {
                self.shared.connections.advance(self.number, Stage::Member);
                self.shared.switch.preempt_is_accepted();
            }
            self.use_up(used);
            match item {
                PreemptItem::Page { block, offset } => self.page(block, offset, place)?,
                PreemptItem::Zero { block, offset } => self.zero(block, offset, place)?,
                // What follows it is refused by the decoder.
                PreemptItem::End => {}
            }
        }
    }

    fn page(&mut self, block: usize, offset: u64, place: Place) -> Result<(), Error> {
        let len = self.shared.page_size;
        if !self.fill(len)? {
            return Err(Error::Io { at: self.place(), source: io::ErrorKind::UnexpectedEof.into() });
        }
        let Some(pages) = lock(&self.shared.pages).clone() else { return Err(Error::Stopped) };
        self.shared.place(&pages, block, offset, place, || pages.sink.store(block, &[offset], &self.buf[..len]))?;
        self.use_up(len);
        self.shared.progress.add_pages(1, 0);
        Ok(())
    }

    fn zero(&mut self, block: usize, offset: u64, place: Place) -> Result<(), Error> {
        let Some(pages) = lock(&self.shared.pages).clone() else { return Err(Error::Stopped) };
        self.shared.place(&pages, block, offset, place, || pages.sink.zero(block, &[offset]))?;
        self.shared.progress.add_pages(0, 1);
        Ok(())
    }

    /// Makes sure that `total` bytes are there; `false` if the connection ends before the next word.
    fn fill(&mut self, total: usize) -> Result<bool, Error> {
        let mut more = [0; 4096];
        while self.buf.len() < total {
            let at = Place { offset: self.used + self.buf.len() as u64, ..self.place() };
            match self.stream.read(&mut more).map_err(Error::io(at))? {
                0 if self.buf.is_empty() => return Ok(false),
                0 => return Err(Error::Io { at, source: io::ErrorKind::UnexpectedEof.into() }),
                n => {
                    self.buf.extend_from_slice(&more[..n]);
                    self.shared.pulse.add(n);
                    self.shared.progress.add_main_bytes(n as u64);
                }
            }
        }
        Ok(true)
    }

    fn use_up(&mut self, len: usize) {
        self.buf.drain(..len);
        self.used += len as u64;
    }

    fn place(&self) -> Place {
        Place { connection: Connection::Preempt, offset: self.used }
    }
}
