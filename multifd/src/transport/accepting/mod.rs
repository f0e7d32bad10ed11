//! Takes the connections that wait at a listening socket, and never waits for one: the socket may have been polled, but another process
//! that accepts from the same may have been faster.

// `std`, because model checkers open no sockets.
use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    fs::{OFlags, fcntl_getfl},
    io::{Errno, ioctl_fionbio},
    net::{SocketFlags, accept_with},
};

use super::listen_mode::ListenMode;
use crate::sys::accept_once::AcceptOnce;

/// A socket that listens.
pub(super) struct Accepting {
    socket: OwnedFd,
    way: Way,
}

/// How a call for a connection that is not there any more returns.
enum Way {
    /// The socket is in non-blocking mode.
    NonBlocking(ListenMode),
    /// The socket has any mode.
    Ring(Box<AcceptOnce>),
}

impl Accepting {
    /// A socket that was opened here. It is in non-blocking mode from now on.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn opened(socket: OwnedFd) -> io::Result<Accepting> {
        let way = Way::NonBlocking(ListenMode::take(&socket)?);
        Ok(Accepting { socket, way })
    }

    /// A socket that others may use, too: its mode stays, where the system permits.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn taken_over(socket: OwnedFd) -> io::Result<Accepting> {
        // As its owner wants it, or as another migration of this process has it, which did not get a ring.
        if fcntl_getfl(&socket)?.contains(OFlags::NONBLOCK) {
            return Accepting::opened(socket);
        }
        match AcceptOnce::new() {
            Ok(ring) => Ok(Accepting { socket, way: Way::Ring(Box::new(ring)) }),
            Err(error) => {
                tracing::debug!(%error, "no io_uring here: the listener is non-blocking until the migration is over");
                Accepting::opened(socket)
            }
        }
    }

    /// A connection that is already waiting, if there is one.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn try_accept(&mut self) -> io::Result<Option<OwnedFd>> {
        loop {
            match self.accept()? {
                Ok(socket) => return Ok(Some(socket)),
                Err(Errno::AGAIN) => return Ok(None),
                // A connection that was gone before it was accepted; the next one may be fine.
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn accept(&mut self) -> io::Result<Result<OwnedFd, Errno>> {
        if let Way::Ring(ring) = &mut self.way {
            match ring.accept(self.socket.as_fd()) {
                Ok(accepted) => return Ok(accepted),
                Err(error) => {
                    tracing::debug!(%error, "io_uring fails: the listener is non-blocking until the migration is over");
                    self.way = Way::NonBlocking(ListenMode::take(&self.socket)?);
                }
            }
        }
        // Another process may have put the mode of its duplicate back.
        ioctl_fionbio(&self.socket, true)?;
        Ok(accept_with(&self.socket, SocketFlags::CLOEXEC))
    }
}

impl AsFd for Accepting {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Accepting {
    fn drop(&mut self) {
        let Way::NonBlocking(mode) = &self.way else { return };
        if let Err(error) = mode.give_back(&self.socket) {
            tracing::warn!(%error, "the listener does not have its mode back");
        }
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests;
