//! The sending half of a connection with TLS.
//!
//! The content of a record is gathered where the record will be, sealed there, and written together with the records before it: one
//! system call for each record costs more than the cipher. Nothing stays behind when a write returns.

use std::{io, time::Duration};

use rustls::ContentType;

use super::records::{EXPANSION, HEADER_LEN, KEY_UPDATE_LEN, MAX_PLAIN, Sealer};
use crate::{ram::GuestRange, transport::SendHalf};

/// The sending half.
///
/// `bytes[..sealed]` are records, and nothing but these is written. What was gathered for the next lies where its content belongs, and
/// there is always room to seal it.
pub(super) struct TlsSends {
    inner: Box<dyn SendHalf>,
    sealer: Sealer,
    bytes: Box<[u8]>,
    sealed: usize,
    /// Bytes of content of the next record, at most [`MAX_PLAIN`].
    gathered: usize,
    /// Whether this direction was ended.
    finished: bool,
}

impl TlsSends {
    /// Sends by `inner`.
    pub(super) fn new(inner: Box<dyn SendHalf>, sealer: Sealer) -> TlsSends {
        // The kernel gives memory when it is written to: a connection that sends little holds little.
        TlsSends { inner, sealer, bytes: vec![0; BUFFER].into(), sealed: 0, gathered: 0, finished: false }
    }

    fn gather(&mut self, mut header: &[u8], pages: &[GuestRange<'_>]) -> io::Result<()> {
        while !header.is_empty() {
            let room = self.room(header.len(), 1)?;
            let (part, rest) = header.split_at(room.len());
            room.copy_from_slice(part);
            header = rest;
        }
        for page in pages {
            let mut from = 0;
            while from < page.len() {
                // Guest memory is taken by eight bytes.
                let room = self.room(page.len() - from, 8)?;
                page.slice(from, room.len()).expect("multiples of eight, within the page").read(room);
                from += room.len();
            }
        }
        Ok(())
    }

    /// Where the next content goes: at most `len` bytes, a multiple of `unit`, which is at most 8 and divides `len`.
    fn room(&mut self, len: usize, unit: usize) -> io::Result<&mut [u8]> {
        if MAX_PLAIN - self.gathered < unit {
            self.seal()?;
        }
        if self.gathered == 0 {
            self.begin()?;
        }
        let len = len.min((MAX_PLAIN - self.gathered) / unit * unit);
        let from = self.sealed + HEADER_LEN + self.gathered;
        self.gathered += len;
        Ok(&mut self.bytes[from..from + len])
    }

    /// Makes room for one more record, and changes the key where it is used up.
    fn begin(&mut self) -> io::Result<()> {
        if self.bytes.len() - self.sealed < KEY_UPDATE_LEN + SLOT {
            self.send()?;
        }
        self.sealed += self.sealer.renew(&mut self.bytes[self.sealed..])?;
        Ok(())
    }

    /// Makes a record of what was gathered.
    fn seal(&mut self) -> io::Result<()> {
        let len = std::mem::take(&mut self.gathered);
        if len > 0 {
            self.sealed += self.sealer.seal(ContentType::ApplicationData, &mut self.bytes[self.sealed..], len)?;
        }
        Ok(())
    }

    /// Writes all records.
    fn send(&mut self) -> io::Result<()> {
        let len = std::mem::take(&mut self.sealed);
        if len > 0 { self.inner.write(&self.bytes[..len], &[]) } else { Ok(()) }
    }
}

impl SendHalf for TlsSends {
    fn write(&mut self, header: &[u8], pages: &[GuestRange<'_>]) -> io::Result<()> {
        if self.finished {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        // Of a write that failed.
        (self.sealed, self.gathered) = (0, 0);
        self.gather(header, pages)?;
        self.seal()?;
        self.send()
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }

    fn send_without_copy(
        &mut self,
        _counters: &crate::sync::Arc<crate::transport::ZeroCopyCounters>,
    ) -> io::Result<()> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "TLS copies pages while it encrypts them"))
    }

    fn limit_unsent(&mut self, bytes: usize) -> io::Result<()> {
        self.inner.limit_unsent(bytes)
    }

    fn limit_untaken(&mut self, limit: Option<Duration>) -> io::Result<()> {
        self.inner.limit_untaken(limit)
    }

    fn discard(&mut self) -> io::Result<()> {
        self.inner.discard()
    }

    fn finish(&mut self) -> io::Result<()> {
        if std::mem::replace(&mut self.finished, true) {
            return Ok(());
        }
        // The peer may be gone, and a half-close may still be possible.
        self.bytes[HEADER_LEN..][..CLOSE_NOTIFY.len()].copy_from_slice(&CLOSE_NOTIFY);
        let len = self.sealer.seal(ContentType::Alert, &mut self.bytes, CLOSE_NOTIFY.len())?;
        let told = self.inner.write(&self.bytes[..len], &[]);
        self.inner.finish().and(told)
    }
}

/// The longest record that is made here.
const SLOT: usize = HEADER_LEN + MAX_PLAIN + EXPANSION;

/// Eight records of the greatest length, and one that changes the key.
const BUFFER: usize = 8 * SLOT + KEY_UPDATE_LEN;

/// Level warning, close_notify.
const CLOSE_NOTIFY: [u8; 2] = [1, 0];
