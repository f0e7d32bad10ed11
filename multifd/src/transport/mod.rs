//! Connections: what the engine needs of one, and the transports it comes with.
//!
//! A transport moves page bytes between the kernel and guest memory without a buffer in between. A new transport is a
//! new file here, or a type of the VMM's own.

use std::{
    io,
    os::fd::{BorrowedFd, OwnedFd},
};

pub use self::pending::{Established, Pending, wrapped};
pub use crate::sys::zerocopy::ZeroCopyCounters;
use crate::{ram::GuestRange, sync::Arc};

mod accepting;
#[cfg(any(feature = "conformance", all(test, not(any(loom, shuttle)))))]
pub mod conformance;
mod descriptors;
pub mod fd;
mod listen_mode;
mod look_up;
pub mod one_way;
mod pending;
pub mod record;
pub mod socket;
mod stop_event;
pub mod tcp;
#[cfg(feature = "tls")]
pub mod tls;
pub mod unix;
pub mod uri;
pub mod vsock;

/// The sending direction of a connection. It blocks.
pub trait SendHalf: Send {
    /// Sends `header`, then the bytes of all `pages`. When this returns an error, any part of them may have been sent.
    ///
    /// The guest may write to the pages meanwhile; each byte sent is one that stood there at some moment of the call.
    ///
    /// # Errors
    /// The connection's. [`io::ErrorKind::WriteZero`] where the peer no longer takes bytes.
    fn write(&mut self, header: &[u8], pages: &[GuestRange<'_>]) -> io::Result<()>;

    /// Returns when the kernel no longer reads pages passed to [`write`](Self::write): it waits for zero-copy
    /// completions, where there are any. Not a promise that the peer has them.
    ///
    /// # Errors
    /// The connection's.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// From now on the kernel reads pages that are written through this handle straight from guest memory, where it can,
    /// until the next [`flush`](Self::flush). How it goes is counted in `counters`.
    ///
    /// # Errors
    /// Why it is not possible; the connection copies as before then.
    fn send_without_copy(&mut self, counters: &Arc<ZeroCopyCounters>) -> io::Result<()> {
        let _ = counters;
        Err(io::Error::new(io::ErrorKind::Unsupported, "this kind of connection does not have it"))
    }

    /// Has [`write`](Self::write) wait as long as the kernel keeps more than about `bytes` that it has not sent: what is
    /// written next goes out soon after. Transports that keep little ignore it.
    ///
    /// # Errors
    /// Why it is not possible; the connection works as before then.
    fn limit_unsent(&mut self, bytes: usize) -> io::Result<()> {
        let _ = bytes;
        Ok(())
    }

    /// Has the connection end, in both directions, when nothing of what was written is taken for `limit`: the peer's host does
    /// not acknowledge it, or its process does not read. `None`: as long as the kernel itself tries, which is a quarter of an hour
    /// for a host that is gone. Transports without a network in between ignore it.
    ///
    /// # Errors
    /// Why it is not possible; the connection works as before then.
    fn limit_untaken(&mut self, limit: Option<std::time::Duration>) -> io::Result<()> {
        let _ = limit;
        Ok(())
    }

    /// Has the connection reset when it is dropped: the peer does not get what was written and is not there yet. Transports that have
    /// nothing on its way ignore it.
    ///
    /// # Errors
    /// Why it is not possible; the connection works as before then.
    fn discard(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// Whether [`write_with_descriptors`](Self::write_with_descriptors) works. It does not by default.
    fn sends_descriptors(&self) -> bool {
        false
    }

    /// Sends `bytes`, which are at least one, and `descriptors` beside the first of them, at most 253.
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`]; as [`write`](Self::write). Nothing tells whether the peer took the descriptors.
    fn write_with_descriptors(&mut self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let _ = (bytes, descriptors);
        Err(no_descriptors())
    }

    /// Ends this direction: the peer reads all that was written, and then 0. The other direction goes on. Every
    /// [`write`](Self::write) fails from now on, whether this succeeds or not; to call it again does nothing.
    ///
    /// A connection that is dropped without it has ended as if its process had died. The peer may not be able to tell the two
    /// apart: not even with TLS, as a QEMU ends main without a word.
    ///
    /// # Errors
    /// The connection's. The peer may not learn of the end before the connection is dropped then.
    fn finish(&mut self) -> io::Result<()>;
}

/// The receiving direction of a connection. It blocks.
pub trait RecvHalf: Send {
    /// Reads what is there, at least one byte, into `buf`; 0 where the peer ended its direction.
    ///
    /// # Errors
    /// The connection's; those of [`interrupter`](Self::interrupter) and [`set_read_timeout`](Self::set_read_timeout).
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize>;

    /// Fills `pages`, in order.
    ///
    /// # Errors
    /// The connection's; [`io::ErrorKind::UnexpectedEof`] where it ends before. Any part of the pages may have been
    /// written.
    fn read_pages(&mut self, pages: &[GuestRange<'_>]) -> io::Result<()>;

    /// Fills `buf`.
    ///
    /// # Errors
    /// As [`read_pages`](Self::read_pages).
    fn read_exact(&mut self, mut buf: &mut [u8]) -> io::Result<()> {
        while !buf.is_empty() {
            match self.read(buf)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => buf = &mut buf[n..],
            }
        }
        Ok(())
    }

    /// Whether [`read_with_descriptors`](Self::read_with_descriptors) works. It does not by default.
    fn receives_descriptors(&self) -> bool {
        false
    }

    /// As [`read`](Self::read), and puts descriptors that came beside these bytes behind those in `descriptors`: at most 253 at
    /// once. What comes while `read` is called is closed.
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`]; as [`read`](Self::read); some were lost, because this process may not have more
    /// descriptors.
    fn read_with_descriptors(&mut self, buf: &mut [u8], descriptors: &mut Vec<OwnedFd>) -> io::Result<usize> {
        let _ = (buf, descriptors);
        Err(no_descriptors())
    }

    /// Limits how long a single [`read`](Self::read) waits for a byte; `None` for no limit. A read that waited longer gives
    /// [`io::ErrorKind::TimedOut`] or [`io::ErrorKind::WouldBlock`], and has taken nothing. Transports without a clock ignore
    /// it.
    ///
    /// # Errors
    /// The kernel's.
    fn set_read_timeout(&mut self, timeout: Option<std::time::Duration>) -> io::Result<()> {
        let _ = timeout;
        Ok(())
    }

    /// What ends only the waiting of this half, from another thread: once stopped, each [`read`](Self::read) returns
    /// [`io::ErrorKind::ConnectionAborted`] without waiting. The peer does not notice, and the sending half goes on: a
    /// destination that is cancelled says so before it ends its connections.
    ///
    /// # Errors
    /// The kernel's, when it is out of descriptors.
    fn interrupter(&mut self) -> io::Result<Box<dyn Stopper>>;
}

fn no_descriptors() -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, "this kind of connection does not carry descriptors")
}

/// One established connection.
///
/// Dropping it, or both of its halves, closes it. Any one of these may be done by another thread than the others.
pub trait Stream: SendHalf + RecvHalf {
    /// Takes the connection apart, so that one thread can read while another writes. What was set on it stays: a read
    /// timeout, zero-copy, an interrupter.
    ///
    /// # Errors
    /// The kernel's, when it is out of descriptors; the connection is closed then.
    fn split(self: Box<Self>) -> io::Result<(Box<dyn SendHalf>, Box<dyn RecvHalf>)>;

    /// What ends this connection in both directions from another thread, also when it has been split since: reads give 0
    /// or an error from then on, writes an error, and the peer finds it closed. It does not keep the connection open.
    ///
    /// # Errors
    /// The kernel's, when it is out of descriptors.
    fn stopper(&self) -> io::Result<Box<dyn Stopper>>;

    /// What tells from another thread how much of what was written is still on its way, also when the connection has been split since.
    /// It does not keep the connection open. `None` where the transport cannot tell, as by default.
    ///
    /// # Errors
    /// The kernel's.
    fn meter(&self) -> io::Result<Option<Box<dyn Meter>>> {
        Ok(None)
    }

    /// Who is at the other end, and whether it hears what is written.
    fn far_end(&self) -> FarEnd {
        FarEnd::Peer
    }

    /// The other end, for messages.
    fn peer(&self) -> String;
}

/// Tells how much of what was written to one connection is still on its way.
pub trait Meter: Send + Sync {
    /// What is on its way now. Does not block.
    ///
    /// # Errors
    /// The connection has ended.
    fn transit(&self) -> io::Result<Transit>;
}

/// What is on its way on one connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Transit {
    /// Bytes that were written and that the peer's host is not known to have. A host has what waits there to be read; one that has
    /// any of it has accepted the connection.
    pub unacknowledged: u64,
    /// The shortest time after which a byte was acknowledged; zero where it is not known.
    pub round_trip: std::time::Duration,
    /// Bytes per second at which the peer's host was seen to take what was written, while there was something to take; `None` where it
    /// is not known. It may have been so for moments only.
    pub carries: Option<u64>,
}

impl Transit {
    /// So many bytes are on their way, with such round trips.
    pub fn new(unacknowledged: u64, round_trip: std::time::Duration) -> Transit {
        Transit { unacknowledged, round_trip, carries: None }
    }

    /// The same, on a path that was seen to carry so many bytes per second.
    #[must_use]
    pub fn carrying(self, bytes_per_second: u64) -> Transit {
        Transit { carries: Some(bytes_per_second), ..self }
    }
}

/// Has the connection of `sends` end by itself when its peer takes nothing for a while longer than `stall_limit`: the account of
/// all connections, which says that the peer is silent, comes first where it is kept.
pub(crate) fn end_if_untaken(sends: &mut (impl SendHalf + ?Sized), stall_limit: Option<std::time::Duration>) {
    let limit = stall_limit.map(|limit| limit.saturating_add(AFTER_THE_STALL_LIMIT));
    if let Err(error) = sends.limit_untaken(limit) {
        tracing::debug!(%error, "the kernel decides how long a host that is gone is waited for");
    }
}

/// A channel may wait at a barrier with what the kernel holds for it while others still move pages of the round before: some
/// megabytes in all, which a slow network moves in this time.
const AFTER_THE_STALL_LIMIT: std::time::Duration = std::time::Duration::from_secs(30);

/// Who is at the other end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FarEnd {
    /// A peer that reads what is written.
    Peer,
    /// The writer of a pipe. It hears nothing, and may stall or die.
    Writer,
    /// A file: all there is has been written.
    File,
}

/// Ends whatever blocks, from another thread.
pub trait Stopper: Send + Sync {
    /// Makes the blocking calls of other threads return soon, now and from now on. Does not block.
    fn stop(&self);
}

/// Opens connections to one destination: main first, then the channels.
pub trait Connect {
    /// Begins one more connection. Does not wait: that is the part of [`Pending::establish`], which the engine calls for all
    /// channels at the same time, each in the thread of its own. One that is reset before the destination's host is known to have
    /// its first bytes ([`Stream::meter`]) is dialed again.
    ///
    /// # Errors
    /// The connection cannot be begun.
    fn dial(&self) -> io::Result<Box<dyn Pending>>;

    /// Opens one more connection, and waits until it is established.
    ///
    /// # Errors
    /// As [`dial`](Self::dial) and [`Pending::establish`].
    fn connect(&self) -> io::Result<Box<dyn Stream>> {
        self.dial()?.establish(None)
    }
}

/// Where connections of one source arrive.
pub trait Listen: Send {
    /// The next connection, which is still to be [established](Pending::establish): a peer that is slow at that must not
    /// keep the next one from being accepted. Waits for at most `timeout` (`None`: no limit; transports without a clock ignore
    /// it).
    ///
    /// # Errors
    /// [`io::ErrorKind::TimedOut`]; [`io::ErrorKind::Interrupted`] after [`Stopper::stop`]; the kernel's.
    fn accept(&mut self, timeout: Option<std::time::Duration>) -> io::Result<Box<dyn Pending>>;

    /// A connection that is already waiting, if there is one. Works also after [`Stopper::stop`].
    ///
    /// # Errors
    /// The kernel's.
    fn try_accept(&mut self) -> io::Result<Option<Box<dyn Pending>>>;

    /// Whether there is one connection only: main, without channels.
    fn is_single(&self) -> bool {
        false
    }

    /// What makes [`accept`](Self::accept) return from another thread.
    ///
    /// # Errors
    /// The kernel's, when it is out of descriptors.
    fn stopper(&self) -> io::Result<Box<dyn Stopper>>;
}
