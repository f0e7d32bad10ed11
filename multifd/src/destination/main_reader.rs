//! The main channel of a destination: a small buffer in front of the decoder.

use std::{
    io::{self, Read},
    os::fd::OwnedFd,
    time::Duration,
};

use multifd_proto::{
    Codec, Step, Violation,
    command::Command,
    encoder::MainEncoder,
    return_path::Message,
    shared_memory::MAX_SHARED_BLOCKS,
    stream::{self, Item, MainDecoder, StreamError},
};

use super::{greeting::is_timeout, shared::MainConnection, state_window::StateWindow};
use crate::{
    error::{Connection, Error, Mismatch, Place},
    progress::Progress,
    pulse::Pulse,
    transport::{FarEnd, RecvHalf, SendHalf},
};

/// The reading half of main, and its return path.
pub(crate) struct MainReader {
    receives: Box<dyn RecvHalf>,
    /// `None` where nothing that is written is heard.
    sends: Option<Box<dyn SendHalf>>,
    /// The other end, for messages.
    peer: String,
    decoder: MainDecoder,
    progress: Progress,
    pulse: Pulse,
    buf: Vec<u8>,
    /// `start <= end <= buf.len()`; between them is what was received and not yet used.
    start: usize,
    end: usize,
    /// Payload of the previous item that is still to be taken before the next.
    payload: usize,
    /// Offset of the first byte of `buf[start..]` in the stream.
    position: u64,
    /// Whether the source hears what is written.
    far_end: FarEnd,
    /// What came beside the bytes, while that is expected.
    descriptors: Option<Vec<OwnedFd>>,
    /// What comes behind the end of the stream, where both ends agreed on it.
    end_token: Option<[u8; 16]>,
    /// State of its sections that comes on channels.
    state: StateWindow,
}

impl MainReader {
    /// Reads from `main`, of which at most [`BUFFER`] bytes have been read: they told that it is main.
    pub(super) fn new(main: MainConnection, page_size: usize, progress: Progress, pulse: Pulse) -> MainReader {
        let MainConnection { sends, receives, far_end, peer, heard } = main;
        let reader = MainReader::with(receives, &heard, page_size, progress, pulse);
        MainReader { sends: (far_end == FarEnd::Peer).then_some(sends), far_end, peer, ..reader }
    }

    /// Reads from `main`, over which a source goes on, what `decoder` expects.
    pub(super) fn resumed(main: MainConnection, decoder: MainDecoder, progress: Progress, pulse: Pulse) -> MainReader {
        let page_size = decoder.page_size();
        MainReader { decoder, ..MainReader::new(main, page_size, progress, pulse) }
    }

    /// The same for a recording, of which the magic has been read. Its source went on when it had its answer, and the
    /// recording ends where main did.
    pub(crate) fn of_recording(receives: Box<dyn RecvHalf>, page_size: usize) -> MainReader {
        MainReader::with(receives, &stream::MAGIC.to_be_bytes(), page_size, Progress::new(), Pulse::default())
    }

    fn with(
        receives: Box<dyn RecvHalf>,
        heard: &[u8],
        page_size: usize,
        progress: Progress,
        pulse: Pulse,
    ) -> MainReader {
        let mut buf = vec![0; BUFFER];
        buf[..heard.len()].copy_from_slice(heard);
        progress.add_main_bytes(heard.len() as u64);
        MainReader {
            receives,
            sends: None,
            peer: "a recording".to_owned(),
            decoder: MainDecoder::new(page_size),
            progress,
            pulse,
            buf,
            start: 0,
            end: heard.len(),
            payload: 0,
            position: 0,
            far_end: FarEnd::File,
            descriptors: None,
            end_token: None,
            state: StateWindow::default(),
        }
    }

    /// What the stream has said so far.
    pub(crate) fn decoder(&self) -> &MainDecoder {
        &self.decoder
    }

    /// Where the next byte comes from.
    pub(crate) fn place(&self) -> Place {
        Place { connection: Connection::Main, offset: self.position }
    }

    /// Where the next byte to be received comes from.
    pub(super) fn end_place(&self) -> Place {
        Place { connection: Connection::Main, offset: self.position + self.unread().len() as u64 }
    }

    /// The next item. Its payload, if it has one, is to be taken with [`payload`](Self::payload).
    pub(crate) fn next_item(&mut self) -> Result<Item, Error> {
        loop {
            match self.step()? {
                Step::Item { item, .. } => return Ok(item),
                Step::Need(total) => self.fill(total)?,
            }
        }
    }

    /// As [`next_item`](Self::next_item), if all of it has been received.
    pub(super) fn buffered_item(&mut self) -> Result<Option<Item>, Error> {
        match self.step()? {
            Step::Item { item, .. } => Ok(Some(item)),
            Step::Need(_) => Ok(None),
        }
    }

    /// Decodes the next item, of what has been received.
    fn step(&mut self) -> Result<Step<Item>, Error> {
        debug_assert_eq!(self.payload, 0, "the payload of the item before was taken");
        let step = self.decoder.step(&self.buf[self.start..self.end]);
        let step = step.map_err(|StreamError { offset, source }| {
            Error::protocol(Place { connection: Connection::Main, offset })(source)
        })?;
        if let Step::Item { item, used } = &step {
            self.consume(*used);
            self.payload = usize::try_from(item.payload_len()).expect("payloads on a connection are bounded");
        }
        Ok(step)
    }

    /// The `len` bytes of payload that belong to the item before.
    pub(crate) fn payload(&mut self, len: usize) -> Result<&[u8], Error> {
        self.fill(len)?;
        let start = self.start;
        self.consume(len);
        self.payload -= len;
        Ok(&self.buf[start..start + len])
    }

    /// Passes over `len` bytes of payload.
    pub(super) fn skip(&mut self, len: usize) -> Result<(), Error> {
        for part in (0..len).step_by(BUFFER / 2) {
            self.payload((len - part).min(BUFFER / 2))?;
        }
        Ok(())
    }

    /// The body of the section that was the item before; its length is counted as it is read.
    pub(super) fn body(&mut self) -> SectionBody<'_> {
        SectionBody { main: self, failure: None }
    }

    /// Whether anything follows the end of state: that can only be the vmdescription. Without one, the stream ends here.
    ///
    /// # Errors
    /// Main ends here although the source waits for our answer.
    pub(crate) fn vmdescription_follows(&mut self) -> Result<bool, Error> {
        if !self.unread().is_empty() {
            return Ok(true);
        }
        let at = self.place();
        match self.receive_end()? {
            Some(0) if self.source_listens() => Err(Error::Io { at, source: io::ErrorKind::UnexpectedEof.into() }),
            Some(0) | None => Ok(false),
            Some(_) => Ok(true),
        }
    }

    /// From now on `token` is expected behind the end of the stream.
    pub(super) fn expect_end_token(&mut self, token: Option<[u8; 16]>) {
        self.end_token = token;
    }

    /// The bodies of sections may be in `state`.
    pub(super) fn expect_state(&mut self, state: &StateWindow) {
        self.state = state.clone();
    }

    /// Where the bodies of sections come that are not on main.
    pub(super) fn state_window(&self) -> StateWindow {
        self.state.clone()
    }

    /// What comes behind the end of the stream, where both ends agreed on it: no other bytes of main are the same.
    pub(crate) fn end_token(&self) -> Option<[u8; 16]> {
        self.end_token
    }

    /// Takes the token, if it comes next. Says whether it did, or whether none is expected.
    ///
    /// # Errors
    /// Main ends before.
    pub(super) fn take_end_token(&mut self) -> Result<bool, Error> {
        let Some(token) = self.end_token else { return Ok(true) };
        self.fill(token.len())?;
        if !self.unread().starts_with(&token) {
            return Ok(false);
        }
        self.consume(token.len());
        self.body_taken(token.len() as u64);
        Ok(true)
    }

    /// Something else came behind the end of the stream.
    pub(super) fn no_end_token(&self) -> Error {
        let (element, place) = ("something other than the token of the migration", "behind the end of the stream");
        Error::protocol(self.place())(Violation::UnexpectedElement { element, place })
    }

    /// Whether the source keeps main open at the end of the stream and waits for our answer, even where it cannot hear it. A
    /// source without return path closes main instead.
    fn source_waits(&self) -> bool {
        self.decoder.return_path_open() && !self.is_recorded()
    }

    /// Whether the source waits for our answer and hears it. One that closes main at the end of the stream has died or given
    /// up, and in the latter case the VM runs there again.
    pub(crate) fn source_listens(&self) -> bool {
        self.source_waits() && self.is_heard()
    }

    /// Whether the source hears what is written.
    pub(super) fn is_heard(&self) -> bool {
        self.far_end == FarEnd::Peer
    }

    /// Whether this is a recording.
    pub(crate) fn is_recorded(&self) -> bool {
        self.far_end == FarEnd::File
    }

    /// The other end, for messages.
    pub(super) fn peer(&self) -> String {
        self.peer.clone()
    }

    /// As [`receive`](Self::receive), where the stream may be over: from a source that waits for our answer, nothing for
    /// [`DESCRIPTION_WAIT`] is `None`.
    fn receive_end(&mut self) -> Result<Option<usize>, Error> {
        if self.source_waits() { self.receive_within(DESCRIPTION_WAIT) } else { self.receive().map(Some) }
    }

    /// As [`receive`](Self::receive); nothing for `patience` is `None`.
    pub(crate) fn receive_within(&mut self, patience: Duration) -> Result<Option<usize>, Error> {
        let at = self.place();
        self.receives.set_read_timeout(Some(patience)).map_err(Error::io(at))?;
        let received = match self.receive() {
            Err(Error::Io { source, .. }) if is_timeout(&source) => Ok(None),
            received => received.map(Some),
        };
        self.receives.set_read_timeout(None).map_err(Error::io(at))?;
        received
    }

    /// Checks that nothing was received behind the end of the stream. What arrives later is not looked at.
    pub(super) fn nothing_follows(&self) -> Result<(), Error> {
        if self.unread().is_empty() { Ok(()) } else { Err(more_bytes(self.place())) }
    }

    /// Receives at least one more byte, and says how many; 0 at the end of the connection. For those who look at
    /// [`unread`](Self::unread) themselves.
    pub(crate) fn receive(&mut self) -> Result<usize, Error> {
        if self.start > 0 {
            self.buf.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        if self.end == self.buf.len() {
            self.buf.resize(self.buf.len() * 2, 0);
        }
        let at = self.end_place();
        let into = &mut self.buf[self.end..];
        let received = match &mut self.descriptors {
            Some(descriptors) => self.receives.read_with_descriptors(into, descriptors),
            None => self.receives.read(into),
        };
        // A packed stream may be damaged.
        let n = received.map_err(Error::payload(at))?;
        if let Some(blocks) = self.descriptors.as_ref().map(Vec::len).filter(|came| *came > MAX_SHARED_BLOCKS) {
            return Err(Mismatch::TooManyShared { blocks, limit: MAX_SHARED_BLOCKS }.into());
        }
        self.end += n;
        self.pulse.add(n);
        self.progress.add_main_bytes(n as u64);
        Ok(n)
    }

    /// What was received and not yet used.
    pub(crate) fn unread(&self) -> &[u8] {
        &self.buf[self.start..self.end]
    }

    /// Whether descriptors can come beside the bytes.
    pub(super) fn receives_descriptors(&self) -> bool {
        self.receives.receives_descriptors()
    }

    /// From now on descriptors that come are kept, a bounded number.
    pub(super) fn expect_descriptors(&mut self) {
        self.descriptors = Some(Vec::new());
    }

    /// Those that have come, in their order. From now on others are closed.
    pub(super) fn take_descriptors(&mut self) -> Vec<OwnedFd> {
        self.descriptors.take().unwrap_or_default()
    }

    /// Uses the first `len` bytes of [`unread`](Self::unread).
    pub(crate) fn consume(&mut self, len: usize) {
        debug_assert!(len <= self.end - self.start);
        self.start += len;
        self.position += len as u64;
    }

    /// Tells the decoder that `len` bytes of a section's body were used without it.
    pub(crate) fn body_taken(&mut self, len: u64) {
        self.decoder.body_taken(len);
    }

    /// Sends `message` to the source, if there is a way back.
    pub(super) fn reply(&mut self, message: &Message) -> Result<(), Error> {
        self.reply_with(message, &[])
    }

    /// Sends `message` with `more` behind it, outside of it.
    pub(super) fn reply_with(&mut self, message: &Message, more: &[u8]) -> Result<(), Error> {
        let Some(sends) = &mut self.sends else {
            tracing::debug!(?message, "there is no way back");
            return Ok(());
        };
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        bytes.extend_from_slice(more);
        let at = Place { connection: Connection::ReturnPath, offset: 0 };
        sends.write(&bytes, &[]).map_err(Error::io(at))
    }

    /// Ends the return path: all has been said.
    pub(super) fn finish(&mut self) {
        if let Some(Err(error)) = self.sends.as_mut().map(|sends| sends.finish()) {
            tracing::debug!(%error, "the return path");
        }
    }

    /// Waits until the source says that the VM may start.
    ///
    /// # Errors
    /// It says something else, or nothing any more: it does not know that the VM could run here.
    pub(super) fn await_go(&mut self) -> Result<(), Error> {
        let mut go = MainEncoder::default();
        go.command(&Command::Go);
        let place = self.place();
        self.fill(go.bytes.len())?;
        if self.unread() != go.bytes {
            let (element, at) = ("something other than GO", "after READY");
            return Err(Error::protocol(place)(Violation::UnexpectedElement { element, place: at }));
        }
        self.consume(go.bytes.len());
        Ok(())
    }

    /// Reads until the source closes main, or for `timeout` without a byte. What comes until then is put behind `rest`, up to
    /// `limit` bytes.
    pub(super) fn await_close(&mut self, timeout: Duration, rest: &mut Vec<u8>, limit: usize) -> io::Result<()> {
        rest.extend_from_slice(&self.buf[self.start..self.end]);
        self.receives.set_read_timeout(Some(timeout))?;
        while rest.len() < limit {
            match self.receives.read(&mut self.buf)? {
                0 => break,
                n => rest.extend_from_slice(&self.buf[..n]),
            }
        }
        Ok(())
    }

    /// Makes sure that `total` bytes are there.
    fn fill(&mut self, total: usize) -> Result<(), Error> {
        while self.end - self.start < total {
            if self.receive()? == 0 {
                return Err(Error::Io { at: self.end_place(), source: io::ErrorKind::UnexpectedEof.into() });
            }
        }
        Ok(())
    }
}

/// The body of one section, of a length that only its reader knows.
pub(super) struct SectionBody<'a> {
    main: &'a mut MainReader,
    /// Why there was no more of it.
    failure: Option<Error>,
}

impl SectionBody<'_> {
    /// Where the next byte comes from.
    pub(super) fn place(&self) -> Place {
        self.main.place()
    }

    /// What its reader ran into, if it was the connection: a better reason than what the reader made of it.
    pub(super) fn into_failure(self) -> Option<Error> {
        self.failure
    }
}

impl Read for SectionBody<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.main.unread().is_empty() && !into.is_empty() {
            let at = self.main.place();
            match self.main.receive() {
                Ok(0) => self.failure = Some(Error::Io { at, source: io::ErrorKind::UnexpectedEof.into() }),
                Ok(_) => {}
                Err(error) => {
                    let source = io::Error::other(error.to_string());
                    self.failure = Some(error);
                    return Err(source);
                }
            }
        }
        let n = self.main.unread().len().min(into.len());
        into[..n].copy_from_slice(&self.main.unread()[..n]);
        self.main.consume(n);
        self.main.body_taken(n as u64);
        Ok(n)
    }
}

/// `place` is behind the end of the stream, and more bytes were received.
pub(crate) fn more_bytes(place: Place) -> Error {
    let (element, after) = ("more bytes", "after the end of the stream");
    Error::protocol(place)(Violation::UnexpectedElement { element, place: after })
}

/// How long a source that waits for our answer may say nothing behind the end of state before that means that there is no
/// vmdescription. A QEMU that has been told to suppress it announces this nowhere, and the guest is paused meanwhile.
/// Sources write both at once, so all that can come between is the network: this is enough for a lost segment to be sent
/// again twice. A description that comes later is not missed by anybody; all that is needed was there.
const DESCRIPTION_WAIT: Duration = Duration::from_secs(1);
/// Bytes received at a time; more than any item and payload but a vmdescription.
pub(super) const BUFFER: usize = 1 << 20;
