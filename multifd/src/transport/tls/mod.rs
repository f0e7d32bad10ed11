//! TLS on each connection, over any other transport: [`TlsConnector`] on the source, [`TlsListener`] on the destination.
//!
//! The source is the client and the destination the server, from the first byte of each connection. The handshake is a part of
//! [`Pending::establish`], so it runs in the connection's own thread and ends by a deadline. The handshake and the protection of
//! records are those of rustls. This module moves their bytes: page bytes are decrypted where the socket has put them and copied
//! once, into guest memory, and the two halves of a connection share no lock.
//!
//! What ends a direction is close_notify. A QEMU does not send it on main, and one before 10.0 on no connection, so an end between two
//! records is an end like that of a plain connection: the engine knows whether its stream may end there. An end within a record
//! is an error. TLS 1.3 is preferred, 1.2 is accepted. No session tickets are sent: a QEMU source never reads from a channel, and its
//! kernel would drop pages when it closes a connection with unread bytes.

mod ciphers;
mod credentials;
mod handshake;
mod reasons;
mod receives;
mod records;
mod sends;
mod stream;

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests;

use std::{
    io,
    // Not from `crate::sync`: model checkers open no connections.
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use rustls::pki_types::ServerName;

pub use self::credentials::{ClientCertificates, ClientCredentials, ServerCredentials};
use super::{Connect, Listen, Pending, Stopper, Stream, socket::context};
use crate::sync::Deadline;

/// Opens connections with TLS, as the client.
pub struct TlsConnector {
    inner: Box<dyn Connect + Send + Sync>,
    credentials: ClientCredentials,
    name: ServerName<'static>,
}

impl TlsConnector {
    /// Connects with `inner`. The destination's certificate has to be for `host`, a name or an address, of IPv6 also in brackets.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] where `host` is neither.
    pub fn new(
        inner: Box<dyn Connect + Send + Sync>,
        credentials: ClientCredentials,
        host: &str,
    ) -> io::Result<TlsConnector> {
        // The scope of a link-local address means something on this host only.
        let plain = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        let plain = plain.split_once('%').map_or(plain, |(address, _)| address);
        let name = ServerName::try_from(plain.to_owned()).map_err(|_| {
            let message = format!("{host:?} is no host name or address, so no certificate can be for it");
            io::Error::new(io::ErrorKind::InvalidInput, message)
        })?;
        Ok(TlsConnector { inner, credentials, name })
    }
}

impl Connect for TlsConnector {
    fn dial(&self) -> io::Result<Box<dyn Pending>> {
        let side = Side::Client(self.credentials.clone(), self.name.clone());
        TlsPending::over(self.inner.dial()?, side)
    }
}

/// Accepts connections with TLS, as the server.
pub struct TlsListener {
    inner: Box<dyn Listen>,
    credentials: ServerCredentials,
}

impl TlsListener {
    /// Accepts what `inner` accepts.
    pub fn new(inner: Box<dyn Listen>, credentials: ServerCredentials) -> TlsListener {
        TlsListener { inner, credentials }
    }

    fn pending(&self, inner: Box<dyn Pending>) -> io::Result<Box<dyn Pending>> {
        TlsPending::over(inner, Side::Server(self.credentials.clone()))
    }
}

impl Listen for TlsListener {
    fn accept(&mut self, timeout: Option<Duration>) -> io::Result<Box<dyn Pending>> {
        let inner = self.inner.accept(timeout)?;
        self.pending(inner)
    }

    fn try_accept(&mut self) -> io::Result<Option<Box<dyn Pending>>> {
        let inner = self.inner.try_accept()?;
        inner.map(|inner| self.pending(inner)).transpose()
    }

    fn is_single(&self) -> bool {
        self.inner.is_single()
    }

    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        self.inner.stopper()
    }
}

/// Which end of a connection this is, and what it proves itself with.
enum Side {
    Client(ClientCredentials, ServerName<'static>),
    Server(ServerCredentials),
}

/// A connection whose handshake is still to come.
struct TlsPending {
    inner: Box<dyn Pending>,
    side: Side,
    stop: Arc<Mutex<PendingStop>>,
}

/// What ends a connection before it is established.
struct PendingStop {
    stopped: bool,
    /// Of what is waited for: the connection below, then the stream that it became.
    current: Box<dyn Stopper>,
}

impl TlsPending {
    fn over(inner: Box<dyn Pending>, side: Side) -> io::Result<Box<dyn Pending>> {
        let stop = PendingStop { stopped: false, current: inner.stopper()? };
        Ok(Box::new(TlsPending { inner, side, stop: Arc::new(Mutex::new(stop)) }))
    }
}

impl Pending for TlsPending {
    fn establish(self: Box<Self>, limit: Option<Duration>) -> io::Result<Box<dyn Stream>> {
        let TlsPending { inner, side, stop } = *self;
        let peer = inner.peer();
        let deadline = Deadline::after(limit);
        let mut stream = inner.establish(limit)?;
        PendingStopper(stop.clone()).hand_over(stream.stopper()?);
        // From here on there is a limit in any case: a peer that accepts and says nothing must not be waited for forever.
        let left = deadline.left().map_or(HANDSHAKE_LIMIT, |left| left.min(HANDSHAKE_LIMIT));
        let deadline = Deadline::after(Some(left));
        let session = match &side {
            Side::Client(credentials, name) => handshake::client(&mut *stream, credentials, name, deadline),
            Side::Server(credentials) => handshake::server(&mut *stream, credentials, deadline),
        };
        let session = session.map_err(|error| match &side {
            Side::Client(..) => context(format_args!("{peer}: TLS"))(error),
            // The destination names it beside.
            Side::Server(_) => context("TLS")(error),
        })?;
        stream.set_read_timeout(None)?;
        Ok(Box::new(stream::TlsStream::new(stream, session)?))
    }

    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        Ok(Box::new(PendingStopper(self.stop.clone())))
    }

    fn peer(&self) -> String {
        self.inner.peer()
    }

    fn ip(&self) -> Option<std::net::IpAddr> {
        self.inner.ip()
    }
}

struct PendingStopper(Arc<Mutex<PendingStop>>);

impl PendingStopper {
    /// What is below is established; from now on `stopper` ends it.
    fn hand_over(&self, stopper: Box<dyn Stopper>) {
        let mut stop = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if stop.stopped {
            stopper.stop();
        }
        stop.current = stopper;
    }
}

impl Stopper for PendingStopper {
    fn stop(&self) {
        let mut stop = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        stop.stopped = true;
        stop.current.stop();
    }
}

/// The longest handshake, from the moment at which the connection below is established.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(30);
