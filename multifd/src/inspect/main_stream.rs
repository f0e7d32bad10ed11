//! Main of a recorded migration.

use std::{
    io::{self, Read},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

use multifd_proto::{
    DecodeError,
    command::{BodyLength, Command},
    encoder::MainEncoder,
    extension::Extension,
    stream::{self, Item, MainDecoder, Section},
};

use crate::{
    checkpoint::{Tail, section_beside_ram},
    destination::{MainReader, more_bytes, take_bounded},
    error::{Connection, Error, Place},
    ram::GuestRange,
    transport::{RecvHalf, Stopper, one_way::read_some},
};

use super::PAGE_SIZE;

/// Reads main, item by item.
pub(super) struct MainStream {
    /// Before [`begin`](Self::begin).
    bytes: Option<Box<dyn Read + Send>>,
    reader: Option<MainReader>,
    finished: bool,
    /// The source offered the commit in which GO follows the end of the stream.
    go_follows: Arc<AtomicBool>,
    /// What it offered to put there before.
    end_token: Arc<OnceLock<[u8; 16]>>,
}

impl MainStream {
    pub(super) fn new(bytes: Box<dyn Read + Send>) -> MainStream {
        MainStream {
            bytes: Some(bytes),
            reader: None,
            finished: false,
            go_follows: Arc::default(),
            end_token: Arc::default(),
        }
    }

    /// Checks that this is main.
    pub(super) fn begin(&mut self) -> Result<(), Error> {
        let at = Place { connection: Connection::Main, offset: 0 };
        let mut bytes = self.bytes.take().expect("begun once");
        let mut magic = [0; 4];
        bytes.read_exact(&mut magic).map_err(Error::io(at))?;
        let (expected, found) = (stream::MAGIC, u32::from_be_bytes(magic));
        if expected != found {
            return Err(Error::protocol(at)(DecodeError::BadMagic { expected, found }));
        }
        let (go_follows, end_token) = (self.go_follows.clone(), self.end_token.clone());
        let recording = Recording { bytes, held: Vec::new(), ended: false, go_follows, end_token };
        self.reader = Some(MainReader::of_recording(Box::new(recording), PAGE_SIZE));
        Ok(())
    }

    /// The next item; nothing at the end of main. A payload is to be taken before the next.
    pub(super) fn next_item(&mut self) -> Result<Option<Item>, Error> {
        if self.finished {
            return Ok(None);
        }
        if self.decoder().state_ended() && !self.reader().vmdescription_follows()? {
            self.finished = true;
            return Ok(None);
        }
        let item = self.reader().next_item()?;
        self.finished = matches!(item, Item::VmDescription { .. });
        if let Item::ConfigOffer(offer) = &item {
            self.go_follows.store(offer.extensions.contains(Extension::TwoStepCommit), Relaxed);
            if let Some(token) = offer.token.filter(|_| offer.extensions.contains(Extension::EndToken)) {
                let _ = self.end_token.set(token);
            }
        }
        Ok(Some(item))
    }

    /// The `len` bytes of payload of the item before.
    pub(super) fn payload(&mut self, len: usize) -> Result<Vec<u8>, Error> {
        Ok(self.reader().payload(len)?.to_vec())
    }

    /// Everything to the end of main, of which the head of the first device's section was read, and before the pages the
    /// sections `early`.
    pub(super) fn tail(&mut self, first: &Section, early: &[u8]) -> Result<Tail, Error> {
        self.finished = true;
        Tail::receive(first, early, self.reader())
    }

    /// The same, if that is the state of all devices of a background snapshot; nothing where pages follow.
    pub(super) fn ahead(&mut self, first: &Section, early: &[u8]) -> Result<Option<Tail>, Error> {
        let tail = Tail::ahead(first, early, self.reader())?;
        self.finished |= tail.is_some();
        Ok(tail)
    }

    /// A section beside `ram`, before the devices' state. All such sections before it have `before` bytes.
    pub(super) fn section_beside_ram(&mut self, section: &Section, before: usize) -> Result<Vec<u8>, Error> {
        section_beside_ram(section, self.reader(), before)
    }

    /// Takes a section of which the source says how long it is, into `kept` as it stands on the wire, if that is wanted.
    pub(super) fn bounded_section(
        &mut self,
        section: &Section,
        len: BodyLength,
        kept: Option<&mut Vec<u8>>,
    ) -> Result<(), Error> {
        take_bounded(self.reader(), section, len, kept)
    }

    /// Checks that main has ended.
    pub(super) fn nothing_follows(&mut self) -> Result<(), Error> {
        let place = self.place();
        if self.reader().unread().is_empty() && self.reader().receive()? == 0 {
            return Ok(());
        }
        Err(more_bytes(place))
    }

    pub(super) fn decoder(&self) -> &MainDecoder {
        self.reader.as_ref().expect("begun").decoder()
    }

    pub(super) fn place(&self) -> Place {
        match &self.reader {
            Some(reader) => reader.place(),
            None => Place { connection: Connection::Main, offset: 0 },
        }
    }

    /// Bytes read.
    pub(super) fn position(&self) -> u64 {
        self.place().offset
    }

    fn reader(&mut self) -> &mut MainReader {
        self.reader.as_mut().expect("begun")
    }
}

/// A recording as the receiving half of a connection. It ends with the end of the stream: the token of the migration and a GO
/// behind that are left out.
struct Recording {
    bytes: Box<dyn Read + Send>,
    /// The last bytes read: they may be the token, and GO.
    held: Vec<u8>,
    /// There are no more.
    ended: bool,
    go_follows: Arc<AtomicBool>,
    end_token: Arc<OnceLock<[u8; 16]>>,
}

impl Recording {
    /// Takes `go` and the token off the end, where the source may have sent them.
    fn leave_out(&mut self, go: &[u8]) {
        if self.go_follows.load(Relaxed) && self.held.ends_with(go) {
            self.held.truncate(self.held.len() - go.len());
        }
        if let Some(token) = self.end_token.get()
            && self.held.ends_with(token)
        {
            self.held.truncate(self.held.len() - token.len());
        }
    }
}

impl RecvHalf for Recording {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let mut go = MainEncoder::default();
        go.command(&Command::Go);
        let go = &go.bytes;
        let keep = go.len() + TOKEN;
        let mut more = [0; 4096];
        while !self.ended && self.held.len() <= keep {
            match read_some(&mut *self.bytes, &mut more)? {
                0 => {
                    self.ended = true;
                    self.leave_out(go);
                }
                n => self.held.extend_from_slice(&more[..n]),
            }
        }
        let keep = if self.ended { 0 } else { keep };
        let n = (self.held.len() - keep).min(buf.len());
        buf[..n].copy_from_slice(&self.held[..n]);
        self.held.drain(..n);
        Ok(n)
    }

    fn read_pages(&mut self, _pages: &[GuestRange<'_>]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn interrupter(&mut self) -> io::Result<Box<dyn Stopper>> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// The length of a token.
const TOKEN: usize = 16;
