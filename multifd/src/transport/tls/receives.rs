//! The receiving half of a connection with TLS.

use std::{
    io,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::Duration,
};

use rustls::{AlertDescription, ContentType};

use super::{
    reasons,
    records::{HEADER_LEN, MAX_RECORD, Opener, invalid},
};
use crate::{
    ram::GuestRange,
    sync::Deadline,
    transport::{RecvHalf, Stopper},
};

/// The receiving half.
///
/// `plain.end <= sealed.start` or `plain` is empty: what was opened lies before what is still to be opened.
pub(super) struct TlsReceives {
    inner: Box<dyn RecvHalf>,
    opener: Opener,
    buf: Box<[u8]>,
    /// What was opened and not yet read.
    plain: Range<usize>,
    /// What was received and not yet opened.
    sealed: Range<usize>,
    /// No more follows.
    ended: bool,
    /// Records in a row without content.
    empty: u32,
    /// Handshake messages that have begun.
    messages: Vec<u8>,
    timeout: Option<Duration>,
    /// Whether a shorter timeout than `timeout` is set below.
    shortened: bool,
    interrupted: Arc<AtomicBool>,
}

impl TlsReceives {
    /// Takes what comes by `inner`.
    pub(super) fn new(inner: Box<dyn RecvHalf>, opener: Opener) -> TlsReceives {
        TlsReceives {
            inner,
            opener,
            buf: vec![0; BUFFER].into(),
            plain: 0..0,
            sealed: 0..0,
            ended: false,
            empty: 0,
            messages: Vec::new(),
            timeout: None,
            shortened: false,
            interrupted: Arc::default(),
        }
    }

    /// Returns with content in `plain`, or without it at the end.
    fn fill(&mut self) -> io::Result<()> {
        if self.interrupted.load(SeqCst) {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        let deadline = Deadline::after(self.timeout);
        let mut waited = false;
        while self.plain.is_empty() && !self.ended {
            match self.next_record()? {
                Some(record) => self.open(record)?,
                None => self.receive(deadline, std::mem::replace(&mut waited, true))?,
            }
        }
        Ok(())
    }

    /// Where the next record is, once all of it has been received.
    fn next_record(&mut self) -> io::Result<Option<Range<usize>>> {
        let received = &self.buf[self.sealed.clone()];
        let Some(header) = received.first_chunk::<HEADER_LEN>() else { return Ok(None) };
        let len = self.opener.record_len(header)?;
        if received.len() < len {
            return Ok(None);
        }
        let begin = self.sealed.start;
        self.sealed.start += len;
        Ok(Some(begin..begin + len))
    }

    /// Opens the record at `at`.
    fn open(&mut self, at: Range<usize>) -> io::Result<()> {
        let begin = at.start;
        let (kind, content) = self.opener.open(&mut self.buf[at])?;
        let content = begin + content.start..begin + content.end;
        if kind == ContentType::ApplicationData && !content.is_empty() {
            self.plain = content;
            self.empty = 0;
            return Ok(());
        }
        self.empty += 1;
        if self.empty > MAX_EMPTY {
            return Err(invalid("the peer sends TLS records without content".to_owned()));
        }
        match kind {
            ContentType::ApplicationData => Ok(()),
            ContentType::Alert => self.alert(content),
            ContentType::Handshake => self.handshake(content),
            kind => Err(invalid(format!("a TLS record of type {kind:?} after the handshake"))),
        }
    }

    fn alert(&mut self, content: Range<usize>) -> io::Result<()> {
        let [_level, description] = self.buf[content] else {
            return Err(invalid("a TLS alert of a wrong length".to_owned()));
        };
        match AlertDescription::from(description) {
            AlertDescription::CloseNotify => {
                self.ended = true;
                Ok(())
            }
            alert => Err(io::Error::other(format!("the peer ends the connection: {}", reasons::alert(alert)))),
        }
    }

    /// Takes handshake messages that come after the handshake: tickets, which are of no use here, and changes of the key.
    fn handshake(&mut self, content: Range<usize>) -> io::Result<()> {
        if !self.opener.is_tls13() {
            return Err(invalid("the peer begins another TLS handshake, which is not possible here".to_owned()));
        }
        self.messages.extend_from_slice(&self.buf[content]);
        while let Some(&[kind, a, b, c]) = self.messages.first_chunk() {
            let len = u32::from_be_bytes([0, a, b, c]) as usize;
            if len > MAX_MESSAGE {
                return Err(invalid(format!("a TLS handshake message of {len} bytes after the handshake")));
            }
            let Some(body) = self.messages.get(4..4 + len) else { break };
            match (kind, body) {
                (NEW_SESSION_TICKET, _) => {}
                (KEY_UPDATE, &[both @ (0 | 1)]) if self.messages.len() == 4 + len => self.opener.renew(both == 1)?,
                _ => return Err(invalid(format!("a TLS handshake message of type {kind} after the handshake"))),
            }
            self.messages.drain(..4 + len);
        }
        Ok(())
    }

    /// Receives at least one more byte, or the end.
    fn receive(&mut self, deadline: Deadline, waited: bool) -> io::Result<()> {
        // `plain` is empty, so all before `sealed` is free.
        if self.sealed.is_empty() {
            self.sealed = 0..0;
        } else if self.buf.len() - self.sealed.start < MAX_RECORD {
            self.buf.copy_within(self.sealed.clone(), 0);
            self.sealed = 0..self.sealed.len();
        }
        if waited && self.timeout.is_some() {
            // A peer that sends a byte of a record now and then must not have us wait longer than we were told to.
            if deadline.is_over() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.inner.set_read_timeout(deadline.left())?;
            self.shortened = true;
        } else if std::mem::replace(&mut self.shortened, false) {
            self.inner.set_read_timeout(self.timeout)?;
        }
        match self.inner.read(&mut self.buf[self.sealed.end..])? {
            0 if self.sealed.is_empty() => self.ended = true,
            0 => {
                let message = "the connection ends within a TLS record";
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, message));
            }
            n => self.sealed.end += n,
        }
        Ok(())
    }

    /// The next content, at most `len` bytes of it; empty at the end.
    fn take(&mut self, len: usize) -> io::Result<&[u8]> {
        self.fill()?;
        let begin = self.plain.start;
        self.plain.start += len.min(self.plain.len());
        Ok(&self.buf[begin..self.plain.start])
    }

    fn read_page(&mut self, page: &GuestRange<'_>) -> io::Result<()> {
        let part = |from, len| page.slice(from, len).expect("multiples of eight, within the page");
        let mut filled = 0;
        while filled < page.len() {
            self.fill()?;
            // Guest memory is written by eight bytes, and records end where they like.
            let len = (page.len() - filled).min(self.plain.len() & !7);
            if len > 0 {
                part(filled, len).write(self.take(len)?);
                filled += len;
            } else {
                let mut word = [0; 8];
                self.read_exact(&mut word)?;
                part(filled, word.len()).write(&word);
                filled += word.len();
            }
        }
        Ok(())
    }
}

impl RecvHalf for TlsReceives {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        let content = self.take(buf.len())?;
        buf[..content.len()].copy_from_slice(content);
        Ok(content.len())
    }

    fn read_pages(&mut self, pages: &[GuestRange<'_>]) -> io::Result<()> {
        pages.iter().try_for_each(GuestRange::require_writable)?;
        pages.iter().try_for_each(|page| self.read_page(page))
    }

    fn set_read_timeout(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.inner.set_read_timeout(timeout)?;
        self.timeout = timeout;
        self.shortened = false;
        Ok(())
    }

    fn interrupter(&mut self) -> io::Result<Box<dyn Stopper>> {
        Ok(Box::new(Interrupter { interrupted: self.interrupted.clone(), inner: self.inner.interrupter()? }))
    }
}

/// Ends the waits of a half, also where it has content that was not read yet.
struct Interrupter {
    interrupted: Arc<AtomicBool>,
    inner: Box<dyn Stopper>,
}

impl Stopper for Interrupter {
    fn stop(&self) {
        self.interrupted.store(true, SeqCst);
        self.inner.stop();
    }
}

/// Four records of the greatest length, and what the kernel had of the next.
const BUFFER: usize = 4 * MAX_RECORD;

/// As rustls limits them in a handshake.
const MAX_EMPTY: u32 = 32;

/// More than any ticket has.
const MAX_MESSAGE: usize = 1 << 16;

const NEW_SESSION_TICKET: u8 = 4;
const KEY_UPDATE: u8 = 24;
