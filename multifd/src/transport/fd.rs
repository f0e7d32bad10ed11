//! Descriptors that this process inherited, or that the VMM opened itself.
//!
//! A listening socket takes any number of connections. A connected one is a single connection: enough for main, not for
//! channels. A destination can take from it what a QEMU without the capability multifd sends to `fd:N`; a source of ours
//! has channels, so it needs an address, or a connected socket for each connection: [`FdConnector::of`], and
//! [`FdListener::of`] where the others of the pairs are. A pipe or a file is a single connection
//! [without a way back](super::one_way).

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, OwnedFd, RawFd},
    time::Duration,
};

use rustix::{
    fs::{FileType, fstat},
    net::sockopt,
};

use super::{
    Connect, Established, Listen, Pending, Stopper,
    one_way::OneWayListener,
    socket::{SocketListener, SocketStream, context, invalid},
    stop_event::StopEvent,
    uri::Uri,
};
use crate::{
    sync::{Mutex, lock},
    sys::inherited,
};

/// Lets [`Uri::Fd`], [`FdConnector::inherited`] and [`FdListener::inherited`] take the descriptors that this process was
/// started with, each of them once. The first lines of `main` are the place for it; later calls change nothing.
///
/// A VMM that gets its sockets in another way makes [`FdConnector::new`] and [`FdListener::new`] of them instead.
///
/// # Safety
/// No part of this process owns a descriptor that is open now without close-on-exec, other than 0, 1 and 2, and none will
/// use or close one by its number.
#[allow(unsafe_code)]
pub unsafe fn claim_inherited() {
    // SAFETY: as the caller promises.
    unsafe { inherited::claim() }
}

/// Gives out connections that exist, each of them once.
pub struct FdConnector {
    streams: Mutex<VecDeque<SocketStream>>,
}

impl FdConnector {
    /// The connection over `socket`.
    ///
    /// # Errors
    /// As [`SocketStream::new`].
    pub fn new(socket: OwnedFd) -> io::Result<FdConnector> {
        FdConnector::of([socket])
    }

    /// The connections over `sockets`: main, and one for each of the plan's channels. Which of them becomes main is of no importance.
    ///
    /// # Errors
    /// As [`SocketStream::new`].
    pub fn of(sockets: impl IntoIterator<Item = OwnedFd>) -> io::Result<FdConnector> {
        let streams = sockets.into_iter().map(SocketStream::new).collect::<io::Result<_>>()?;
        Ok(FdConnector { streams: Mutex::new(streams) })
    }

    /// The connection over descriptor `number`, which this process inherited and which now belongs to the connection.
    ///
    /// # Errors
    /// As [`SocketStream::new`]; also where the descriptor was not [claimed](claim_inherited), or was taken before.
    pub fn inherited(number: RawFd) -> io::Result<FdConnector> {
        let open = || Ok(SocketStream::new(inherited::take(number)?)?.with_peer(Uri::Fd(number).to_string()));
        let stream = open().map_err(context(Uri::Fd(number)))?;
        Ok(FdConnector { streams: Mutex::new([stream].into()) })
    }
}

impl Connect for FdConnector {
    fn dial(&self) -> io::Result<Box<dyn Pending>> {
        match lock(&self.streams).pop_front() {
            Some(stream) => Ok(Box::new(Established::new(stream))),
            None => Err(invalid(
                "a connected socket is one connection, and a source has channels beside main: it needs an address, \
                 tcp:HOST:PORT, unix:PATH or vsock:CID:PORT, or a socket for each, or fewer channels (0: main alone)",
            )),
        }
    }
}

/// Where the connections of an inherited descriptor arrive.
pub struct FdListener {
    kind: Kind,
}

enum Kind {
    /// It listens.
    Listening(SocketListener),
    /// They are all the connections.
    Connected {
        /// Those that were not accepted yet.
        streams: VecDeque<SocketStream>,
        is_single: bool,
        stopped: StopEvent,
    },
    /// It is a pipe or a file.
    OneWay(OneWayListener),
}

impl FdListener {
    /// The connections that arrive at `socket`, or the one that it is. `uri` is what messages call it.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] for a socket that is no stream socket, for a directory, and for a descriptor that can
    /// only be written to; the kernel's.
    pub fn new(socket: OwnedFd, uri: Uri) -> io::Result<FdListener> {
        if FileType::from_raw_mode(fstat(&socket)?.st_mode) != FileType::Socket {
            return Ok(FdListener { kind: Kind::OneWay(OneWayListener::new(socket, uri.to_string())?) });
        }
        // An error here is one of a socket of another kind, which the constructors below tell better.
        let kind = if sockopt::socket_acceptconn(&socket).unwrap_or(false) {
            Kind::Listening(SocketListener::new(socket, uri)?)
        } else {
            return FdListener::of([socket], uri);
        };
        Ok(FdListener { kind })
    }

    /// The connections that `sockets` are: main, and as many channels as the source has. `uri` is what messages call them.
    ///
    /// # Errors
    /// As [`SocketStream::new`].
    pub fn of(sockets: impl IntoIterator<Item = OwnedFd>, uri: Uri) -> io::Result<FdListener> {
        let stream = |socket| Ok(SocketStream::new(socket)?.with_peer(uri.to_string()));
        let streams = sockets.into_iter().map(stream).collect::<io::Result<VecDeque<_>>>()?;
        let is_single = streams.len() == 1;
        Ok(FdListener { kind: Kind::Connected { streams, is_single, stopped: StopEvent::new()? } })
    }

    /// As [`new`](Self::new) for the standard input, of which a second descriptor is made.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn standard_input() -> io::Result<FdListener> {
        let listen = || FdListener::new(io::stdin().as_fd().try_clone_to_owned()?, Uri::Fd(0));
        listen().map_err(context("standard input"))
    }

    /// As [`new`](Self::new) for descriptor `number`, which this process inherited and which now belongs to the listener.
    ///
    /// # Errors
    /// As [`new`](Self::new); also where the descriptor was not [claimed](claim_inherited), or was taken before.
    pub fn inherited(number: RawFd) -> io::Result<FdListener> {
        let uri = Uri::Fd(number);
        inherited::take(number).and_then(|socket| FdListener::new(socket, uri.clone())).map_err(context(uri))
    }
}

impl Listen for FdListener {
    /// After the last connection, this waits as it does for any listener to which no more come.
    fn accept(&mut self, timeout: Option<Duration>) -> io::Result<Box<dyn Pending>> {
        match &mut self.kind {
            Kind::Listening(listener) => listener.accept(timeout),
            Kind::Connected { streams, stopped, .. } => match streams.pop_front() {
                Some(stream) if !stopped.is_set()? => Ok(Box::new(Established::new(stream))),
                _ => Err(stopped.wait(timeout)?.into()),
            },
            Kind::OneWay(listener) => listener.accept(timeout),
        }
    }

    fn try_accept(&mut self) -> io::Result<Option<Box<dyn Pending>>> {
        match &mut self.kind {
            Kind::Listening(listener) => listener.try_accept(),
            Kind::Connected { streams, .. } => {
                Ok(streams.pop_front().map(|stream| Box::new(Established::new(stream)) as Box<dyn Pending>))
            }
            Kind::OneWay(listener) => listener.try_accept(),
        }
    }

    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        match &self.kind {
            Kind::Listening(listener) => listener.stopper(),
            Kind::Connected { stopped, .. } => Ok(Box::new(stopped.clone())),
            Kind::OneWay(listener) => listener.stopper(),
        }
    }

    fn is_single(&self) -> bool {
        match &self.kind {
            Kind::Listening(_) => false,
            Kind::Connected { is_single, .. } => *is_single,
            Kind::OneWay(_) => true,
        }
    }
}
