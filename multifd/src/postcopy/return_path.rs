//! Reads what the destination says on main, and puts it into the inbox.

use std::time::Instant;

use multifd_proto::{
    BlockName, Codec, ProtocolError, Step, Violation,
    postcopy::{Request, Requests, received},
    return_path::Message,
};

use super::{
    Attempt,
    hand_over::{PING_DISCARDED, PING_LOADED},
    inbox::Urgent,
};
use crate::{
    error::{Connection, Error, Place},
    stop::PanicGuard,
    sync::Arc,
    threads::{Task, ThreadRole},
    transport::{RecvHalf, Stopper},
};

/// Begins to read from `stream`, until the destination has everything or the attempt ends. The destination may have asked for pages on
/// another connection before, if it `goes_on`.
///
/// # Errors
/// [`Error::Thread`].
pub(super) fn listen(stream: Box<dyn RecvHalf>, attempt: &Arc<Attempt>, goes_on: bool) -> Result<Task<()>, Error> {
    let reader = attempt.clone();
    Task::spawn(&*attempt.job.options.threads, ThreadRole::ReturnPath, &attempt.stop, move || {
        let guard = PanicGuard::new(&reader.stop, Connection::ReturnPath);
        let mut path = ReturnPath {
            attempt: &reader,
            stream,
            buf: Vec::new(),
            position: 0,
            requests: Requests::default(),
            goes_on,
            bitmap_comes: false,
            reason: None,
        };
        let outcome = path.read_until_shut();
        guard.disarm();
        if let Err(error) = outcome {
            reader.stop.stop(error);
        }
        // Nothing more will come.
        reader.inbox.stop();
    })
}

/// The state of the thread.
struct ReturnPath<'a> {
    attempt: &'a Attempt,
    stream: Box<dyn RecvHalf>,
    /// Bytes not used yet.
    buf: Vec<u8>,
    /// Bytes before `buf`.
    position: u64,
    requests: Requests,
    /// The first request may be one for the block of a request on another connection.
    goes_on: bool,
    /// The bitmap of a block is on its way.
    bitmap_comes: bool,
    /// Why SHUT with another status follows.
    reason: Option<String>,
}

impl ReturnPath<'_> {
    fn read_until_shut(&mut self) -> Result<(), Error> {
        loop {
            let place = self.place();
            let message = self.next(Message::decode)?;
            if self.message(message, place)? {
                return Ok(());
            }
        }
    }

    /// Acts on `message`. `true` after the last one.
    fn message(&mut self, message: Message, at: Place) -> Result<bool, Error> {
        let inbox = &self.attempt.inbox;
        match message {
            Message::Shut(0) => {
                if !inbox.update(|mail| {
                    mail.is_complete = mail.end_sent;
                    mail.is_complete
                }) {
                    return Err(unexpected(at, "SHUT with status 0", "before the end of the stream"));
                }
                return Ok(true);
            }
            Message::Shut(status) => return Err(Error::Refused { status, reason: self.reason.take() }),
            Message::Reason(text) => self.reason = Some(text),
            Message::Pong(PING_DISCARDED) => inbox.update(|mail| mail.is_set_up = true),
            Message::Pong(PING_LOADED) => inbox.update(|mail| mail.is_loaded |= mail.run_sent),
            Message::ReqPages { .. } | Message::ReqPagesId { .. } => self.request(&message, at)?,
            Message::RecvBitmap { block } => self.bitmap(&block, at)?,
            Message::ResumeAck(1) => inbox.update(|mail| mail.is_resumed = true),
            Message::ResumeAck(_) => return Err(unexpected(at, "RESUME_ACK", "with another value than 1")),
            Message::Prepared { .. } => return Err(unexpected(at, "PREPARED", "without DESCRIBE")),
            other => tracing::debug!(message = %other, "return path"),
        }
        Ok(false)
    }

    /// Has the pages of a request sent, unless they are on their way.
    fn request(&mut self, message: &Message, at: Place) -> Result<(), Error> {
        let job = &self.attempt.job;
        let layout = job.pages.layout();
        let page_size = layout.page_size() as u64;
        let requests = match self.requests.accept(message, &job.blocks, page_size) {
            Err(unnamed @ Violation::FirstRequestWithoutBlock { .. }) if self.goes_on => {
                let any = Requests::of_any_block(message, &job.blocks, page_size);
                if any.is_empty() { Err(unnamed) } else { Ok(any) }
            }
            request => request.map(|request| request.into_iter().collect()),
        };
        let requests = requests.map_err(Error::protocol(at))?;
        if !self.attempt.inbox.update(|mail| mail.run_sent) {
            return Err(unexpected(at, "a request for pages", "before RUN"));
        }
        job.figures.add_request();
        job.progress.add_request();
        requests.into_iter().try_for_each(|request| self.ask(request, at))
    }

    fn ask(&mut self, Request { block, start, len }: Request, at: Place) -> Result<(), Error> {
        let job = &self.attempt.job;
        let layout = job.pages.layout();
        let first = layout.blocks()[block].page_at(start);
        let pages = first..first + u64::from(len) / layout.page_size() as u64;
        if job.options.record_faults {
            job.figures.add_fault(first);
        }
        // A request crosses its page on the way; and the guest may ask for one that it was sent before the connection broke.
        if pages.clone().all(|page| job.claims.contains(page)) {
            self.attempt.inbox.update(|mail| mail.is_loaded = true);
            return Ok(());
        }
        let urgent = Urgent { pages, asked: Instant::now() };
        self.attempt.inbox.ask(urgent).map_err(Error::protocol(at))
    }

    /// Reads the bitmap that follows the answer for `block` outside of it.
    fn bitmap(&mut self, block: &BlockName, at: Place) -> Result<(), Error> {
        let blocks = self.attempt.job.pages.layout().blocks();
        let index = self.attempt.inbox.update(|mail| (mail.bitmaps_due > 0).then_some(mail.received.len()));
        let expected = index.and_then(|index| blocks.get(index)).filter(|expected| expected.name() == block);
        let Some(expected) = expected else {
            return Err(unexpected(at, "RECV_BITMAP", "that was not asked for, or in another order"));
        };
        let pages = expected.pages();
        self.bitmap_comes = true;
        let bitmap = self.next(|buf| received::decode(buf, pages).map(|step| step.map(<[u8]>::to_vec)))?;
        self.bitmap_comes = false;
        self.attempt.inbox.update(|mail| {
            mail.received.push(bitmap);
            mail.bitmaps_due -= 1;
        });
        Ok(())
    }

    /// The next element, by `decode`.
    fn next<T>(&mut self, decode: impl Fn(&[u8]) -> Result<Step<T>, ProtocolError>) -> Result<T, Error> {
        // As many bytes as this are needed before it is worth looking again.
        let mut needed = 0;
        loop {
            if self.buf.len() >= needed {
                match decode(&self.buf).map_err(Error::protocol(self.place()))? {
                    Step::Item { item, used } => {
                        self.buf.drain(..used);
                        self.position += used as u64;
                        return Ok(item);
                    }
                    Step::Need(total) => needed = total,
                }
            }
            self.read()?;
        }
    }

    fn read(&mut self) -> Result<(), Error> {
        let at = Place { connection: Connection::ReturnPath, offset: self.position + self.buf.len() as u64 };
        let have = self.buf.len();
        self.buf.resize(have + READ_SIZE, 0);
        let read = self.stream.read(&mut self.buf[have..]);
        self.buf.truncate(have + read.as_ref().copied().unwrap_or(0));
        match read {
            Ok(0) => Err(Error::Unconfirmed),
            Ok(n) => {
                // Only bitmaps are owed, and have an end. A destination that says and says other things, and takes nothing, is as
                // silent as any.
                if self.bitmap_comes {
                    self.attempt.pulse.add(n);
                }
                Ok(())
            }
            Err(source) => Err(Error::Io { at, source }),
        }
    }

    fn place(&self) -> Place {
        Place { connection: Connection::ReturnPath, offset: self.position }
    }
}

fn unexpected(place: Place, element: &'static str, at: &'static str) -> Error {
    Error::protocol(place)(Violation::UnexpectedElement { element, place: at })
}

/// Bytes read at once.
const READ_SIZE: usize = 16 << 10;
