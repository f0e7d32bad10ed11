//! Sockets that this process inherited, or that the VMM opened itself.
//!
//! A listening socket takes any number of connections. A connected one is a single connection: enough for main, not for
//! channels.

use std::{
    io,
    os::fd::{OwnedFd, RawFd},
    time::Duration,
};

use rustix::net::sockopt;

use super::{
    Connect, Listen, Stopper, Stream,
    socket::{SocketListener, SocketStream, context, invalid},
    uri::Uri,
};
use crate::{
    sync::{Mutex, lock},
    sys::inherited,
};

/// Gives out one connection, once.
pub struct FdConnector {
    stream: Mutex<Option<SocketStream>>,
}

impl FdConnector {
    /// The connection over `socket`.
    ///
    /// # Errors
    /// As [`SocketStream::new`].
    pub fn new(socket: OwnedFd) -> io::Result<FdConnector> {
        Ok(FdConnector { stream: Mutex::new(Some(SocketStream::new(socket)?)) })
    }

    /// The connection over descriptor `number`, which this process inherited and which now belongs to the connection.
    ///
    /// # Errors
    /// As [`SocketStream::new`]; also where the descriptor was not inherited.
    pub fn inherited(number: RawFd) -> io::Result<FdConnector> {
        let open = || Ok(SocketStream::new(inherited::take(number)?)?.with_peer(Uri::Fd(number).to_string()));
        let stream = open().map_err(context(Uri::Fd(number)))?;
        Ok(FdConnector { stream: Mutex::new(Some(stream)) })
    }
}

impl Connect for FdConnector {
    fn connect(&self) -> io::Result<Box<dyn Stream>> {
        match lock(&self.stream).take() {
            Some(stream) => Ok(Box::new(stream)),
            None => Err(invalid("a connected socket carries main only; channels need an address to connect to")),
        }
    }
}

/// Where the connections of an inherited socket arrive.
pub enum FdListener {
    /// It listens.
    Listening(SocketListener),
    /// It is the only connection; `None` once accepted.
    Connected(Option<SocketStream>),
}

impl FdListener {
    /// The connections that arrive at `socket`, or the one that it is. `uri` is what messages call it.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] for anything but a stream socket; the kernel's.
    pub fn new(socket: OwnedFd, uri: Uri) -> io::Result<FdListener> {
        // An error here is one of a descriptor that is no socket, which the constructors below tell better.
        if sockopt::socket_acceptconn(&socket).unwrap_or(false) {
            return Ok(FdListener::Listening(SocketListener::new(socket, uri)?));
        }
        Ok(FdListener::Connected(Some(SocketStream::new(socket)?.with_peer(uri.to_string()))))
    }

    /// As [`new`](Self::new) for descriptor `number`, which this process inherited and which now belongs to the listener.
    ///
    /// # Errors
    /// As [`new`](Self::new); also where the descriptor was not inherited.
    pub fn inherited(number: RawFd) -> io::Result<FdListener> {
        let uri = Uri::Fd(number);
        inherited::take(number).and_then(|socket| FdListener::new(socket, uri.clone())).map_err(context(uri))
    }
}

impl Listen for FdListener {
    fn accept(&mut self, timeout: Option<Duration>) -> io::Result<Box<dyn Stream>> {
        match self {
            FdListener::Listening(listener) => listener.accept(timeout),
            FdListener::Connected(stream) => match stream.take() {
                Some(stream) => Ok(Box::new(stream)),
                None => Err(invalid("a connected socket carries main only; channels need a listening one")),
            },
        }
    }

    fn try_accept(&mut self) -> io::Result<Option<Box<dyn Stream>>> {
        match self {
            FdListener::Listening(listener) => listener.try_accept(),
            FdListener::Connected(stream) => Ok(stream.take().map(|stream| Box::new(stream) as Box<dyn Stream>)),
        }
    }

    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        match self {
            FdListener::Listening(listener) => listener.stopper(),
            // Accepting from a connection never blocks.
            FdListener::Connected(_) => Ok(Box::new(Nothing)),
        }
    }
}

struct Nothing;

impl Stopper for Nothing {
    fn stop(&self) {}
}
