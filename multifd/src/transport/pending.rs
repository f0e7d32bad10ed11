//! Connections that are not established yet.
//!
//! Between the arrival of a connection, or the wish for one, and the first byte of the migration lies what only a wait can do: a
//! connect, the handshake of TLS. It is done by the thread that the connection will have anyway, so a slow peer holds up
//! only itself, and the channels of a source are established at the same time.

use std::{io, net::IpAddr, time::Duration};

use super::{Stopper, Stream};

/// A connection that is not established yet: one that a listener has accepted, or one that is to be opened.
///
/// Dropping it ends it.
pub trait Pending: Send {
    /// Waits until both ends can speak, for at most `limit` (`None`: as long as the transport itself waits; transports without
    /// a clock ignore it).
    ///
    /// # Errors
    /// [`io::ErrorKind::TimedOut`]; [`io::ErrorKind::ConnectionAborted`] after [`Stopper::stop`]; the connection's, and what
    /// makes the peer another one than it should be. The connection has ended then.
    fn establish(self: Box<Self>, limit: Option<Duration>) -> io::Result<Box<dyn Stream>>;

    /// What ends the wait of [`establish`](Self::establish) from another thread, now and from now on. The established
    /// connection has a stopper of its own; whether this one ends it, too, is up to the transport.
    ///
    /// # Errors
    /// The kernel's, when it is out of descriptors.
    fn stopper(&self) -> io::Result<Box<dyn Stopper>>;

    /// The other end, for messages.
    fn peer(&self) -> String;

    /// The address of the other end, of one that a listener has accepted and that has an address: for those who decide by it
    /// before anything is read. An IPv4 address is one, also where it arrives by IPv6.
    fn ip(&self) -> Option<IpAddr> {
        None
    }
}

/// A connection for which nothing is left to be done.
pub struct Established(Box<dyn Stream>);

impl Established {
    /// `stream`, which is established.
    pub fn new(stream: impl Stream + 'static) -> Established {
        Established(Box::new(stream))
    }
}

impl Pending for Established {
    fn establish(self: Box<Self>, _limit: Option<Duration>) -> io::Result<Box<dyn Stream>> {
        Ok(self.0)
    }

    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        self.0.stopper()
    }

    fn peer(&self) -> String {
        self.0.peer()
    }
}

/// `pending`, whose established connection is put into another one by `wrap`: for transports on top of others that need no
/// handshake, such as those that count, record or delay.
pub fn wrapped(
    pending: Box<dyn Pending>,
    wrap: impl FnOnce(Box<dyn Stream>) -> io::Result<Box<dyn Stream>> + Send + 'static,
) -> Box<dyn Pending> {
    Box::new(Wrapped { pending, wrap })
}

struct Wrapped<F> {
    pending: Box<dyn Pending>,
    wrap: F,
}

impl<F: FnOnce(Box<dyn Stream>) -> io::Result<Box<dyn Stream>> + Send> Pending for Wrapped<F> {
    fn establish(self: Box<Self>, limit: Option<Duration>) -> io::Result<Box<dyn Stream>> {
        let Wrapped { pending, wrap } = *self;
        wrap(pending.establish(limit)?)
    }

    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        self.pending.stopper()
    }

    fn peer(&self) -> String {
        self.pending.peer()
    }

    fn ip(&self) -> Option<IpAddr> {
        self.pending.ip()
    }
}
