//! Connections over stream sockets, whatever their family: what TCP, unix and inherited sockets share.
//!
//! All handles on one connection own its descriptor together; a [`Stopper`] does not. So dropping the last handle
//! closes the connection, and a late stop can never hit a descriptor that was given out again.

// `std`, because model checkers open no sockets, and because loom has no `Weak`.
use std::{
    io,
    net::{IpAddr, SocketAddr, TcpStream},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use rustix::{
    io::{Errno, ioctl_fionbio},
    net::{
        AddressFamily, Shutdown, SocketType, listen, shutdown,
        sockopt::{self, Timeout},
    },
};

use super::{
    Listen, Meter, Pending, RecvHalf, SendHalf, Stopper, Stream, Transit, accepting::Accepting, descriptors,
    stop_event::StopEvent, unix::OwnPath, uri::Uri, vsock,
};
use crate::{
    host,
    ram::GuestRange,
    sys::{
        unsent, vectored,
        zerocopy::{ZeroCopy, ZeroCopyCounters},
    },
};

/// One connected stream socket.
pub struct SocketStream {
    socket: Arc<OwnedFd>,
    /// Belongs to one handle of the connection, because the kernel counts for the whole socket.
    zero_copy: Option<ZeroCopy>,
    /// Set once a thread may want to end the wait for bytes alone.
    wait: Option<InterruptibleWait>,
    read_timeout: Option<Duration>,
    peer: String,
}

impl SocketStream {
    /// A connection over `socket`, which is switched to blocking mode, and to sending at once where it is TCP.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] for anything but a connected stream socket; the kernel's.
    pub fn new(socket: OwnedFd) -> io::Result<SocketStream> {
        check_stream_socket(&socket)?;
        if sockopt::socket_acceptconn(&socket)? {
            return Err(invalid("it listens; a connected socket is needed"));
        }
        ioctl_fionbio(&socket, false)?;
        let peer = match sockopt::socket_domain(&socket)? {
            AddressFamily::INET | AddressFamily::INET6 => {
                prepare_tcp(&socket)?;
                let peer = tcp_peer(&socket);
                peer.map_or_else(|| "tcp".to_owned(), |peer| Uri::from(peer).to_string())
            }
            AddressFamily::UNIX => "unix".to_owned(),
            AddressFamily::VSOCK => vsock::peer(&socket).map_or_else(|| "vsock".to_owned(), |peer| peer.to_string()),
            _ => "socket".to_owned(),
        };
        Ok(SocketStream { socket: Arc::new(socket), zero_copy: None, wait: None, read_timeout: None, peer })
    }

    /// The same connection, called `peer` in messages.
    #[must_use]
    pub fn with_peer(self, peer: String) -> SocketStream {
        SocketStream { peer, ..self }
    }

    fn is_unix(&self) -> bool {
        matches!(sockopt::socket_domain(&self.socket), Ok(AddressFamily::UNIX))
    }
}

impl SendHalf for SocketStream {
    fn write(&mut self, header: &[u8], pages: &[GuestRange<'_>]) -> io::Result<()> {
        match &mut self.zero_copy {
            Some(zero_copy) => zero_copy.send(self.socket.as_fd(), header, pages),
            None => vectored::send(self.socket.as_fd(), header, pages),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match &mut self.zero_copy {
            Some(zero_copy) => zero_copy.flush(self.socket.as_fd()),
            None => Ok(()),
        }
    }

    fn send_without_copy(&mut self, counters: &crate::sync::Arc<ZeroCopyCounters>) -> io::Result<()> {
        // The kernel reports completions in another way there, and what crosses into a VM is copied anyway.
        if sockopt::socket_domain(&self.socket)? == AddressFamily::VSOCK {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "vsock copies what is sent"));
        }
        if self.zero_copy.is_none() {
            self.zero_copy = Some(ZeroCopy::enable(self.socket.as_fd(), counters.clone())?);
        }
        Ok(())
    }

    fn limit_unsent(&mut self, bytes: usize) -> io::Result<()> {
        match sockopt::socket_domain(&self.socket)? {
            AddressFamily::INET | AddressFamily::INET6 => unsent::limit(self.socket.as_fd(), bytes),
            // Its buffers are the peer's, which lets in 256 KiB that it has not read.
            AddressFamily::VSOCK => Ok(()),
            // What is in the buffer of a unix socket waits for the peer to read it.
            _ => Ok(sockopt::set_socket_send_buffer_size(&self.socket, bytes)?),
        }
    }

    fn limit_untaken(&mut self, limit: Option<Duration>) -> io::Result<()> {
        match sockopt::socket_domain(&self.socket)? {
            AddressFamily::INET | AddressFamily::INET6 => {
                // The kernel takes 0 as its own limit, and counts in milliseconds in an int.
                let millis = limit.map_or(0, |limit| limit.as_millis().clamp(1, i32::MAX as u128) as u32);
                Ok(sockopt::set_tcp_user_timeout(&self.socket, millis)?)
            }
            _ => Ok(()),
        }
    }

    fn discard(&mut self) -> io::Result<()> {
        Ok(sockopt::set_socket_linger(&self.socket, Some(Duration::ZERO))?)
    }

    fn sends_descriptors(&self) -> bool {
        self.is_unix()
    }

    fn write_with_descriptors(&mut self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let sent = descriptors::send(self.socket.as_fd(), bytes, descriptors)?;
        self.write(&bytes[sent..], &[])
    }

    fn finish(&mut self) -> io::Result<()> {
        match shutdown(&self.socket, Shutdown::Write) {
            // The peer has ended the connection.
            Err(Errno::NOTCONN) => Ok(()),
            other => Ok(other?),
        }
    }
}

impl RecvHalf for SocketStream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if let Some(wait) = &self.wait {
            wait.for_bytes(self.socket.as_fd(), self.read_timeout)?;
        }
        loop {
            match rustix::io::read(&self.socket, &mut *buf) {
                Err(Errno::INTR) => {}
                other => return Ok(other?),
            }
        }
    }

    fn receives_descriptors(&self) -> bool {
        self.is_unix()
    }

    fn read_with_descriptors(&mut self, buf: &mut [u8], descriptors: &mut Vec<OwnedFd>) -> io::Result<usize> {
        if let Some(wait) = &self.wait {
            wait.for_bytes(self.socket.as_fd(), self.read_timeout)?;
        }
        descriptors::receive(self.socket.as_fd(), buf, descriptors)
    }

    fn read_pages(&mut self, pages: &[GuestRange<'_>]) -> io::Result<()> {
        vectored::receive(self.socket.as_fd(), pages)
    }

    fn set_read_timeout(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        // The kernel takes 0 as no limit, and counts in microseconds.
        let timeout = timeout.map(|timeout| timeout.max(Duration::from_micros(1)));
        sockopt::set_socket_timeout(&self.socket, Timeout::Recv, timeout)?;
        self.read_timeout = timeout;
        Ok(())
    }

    fn interrupter(&mut self) -> io::Result<Box<dyn Stopper>> {
        let wait = match &self.wait {
            Some(wait) => wait,
            None => self.wait.insert(InterruptibleWait { interrupted: StopEvent::new()? }),
        };
        Ok(Box::new(wait.interrupted.clone()))
    }
}

impl Stream for SocketStream {
    fn split(self: Box<Self>) -> io::Result<(Box<dyn SendHalf>, Box<dyn RecvHalf>)> {
        let SocketStream { socket, zero_copy, wait, read_timeout, peer } = *self;
        let sends =
            SocketStream { socket: socket.clone(), zero_copy, wait: None, read_timeout: None, peer: peer.clone() };
        let receives = SocketStream { socket, zero_copy: None, wait, read_timeout, peer };
        Ok((Box::new(sends), Box::new(receives)))
    }

    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        Ok(Box::new(StreamStopper(Arc::downgrade(&self.socket))))
    }

    /// Of TCP only: the queue of a unix socket is the peer's, and is counted in memory rather than in bytes.
    fn meter(&self) -> io::Result<Option<Box<dyn Meter>>> {
        Ok(match sockopt::socket_domain(&self.socket)? {
            AddressFamily::INET | AddressFamily::INET6 => Some(Box::new(SocketMeter(Arc::downgrade(&self.socket)))),
            _ => None,
        })
    }

    fn peer(&self) -> String {
        self.peer.clone()
    }
}

struct SocketMeter(Weak<OwnedFd>);

impl Meter for SocketMeter {
    fn transit(&self) -> io::Result<Transit> {
        let socket = self.0.upgrade().ok_or(io::ErrorKind::NotConnected)?;
        unsent::in_transit(socket.as_fd())
    }
}

/// Waits for bytes in a way that another thread can end without touching the connection: `shutdown` would tell the peer of a
/// unix socket.
struct InterruptibleWait {
    interrupted: StopEvent,
}

impl InterruptibleWait {
    fn for_bytes(&self, socket: BorrowedFd<'_>, limit: Option<Duration>) -> io::Result<()> {
        self.interrupted.wait_readable(socket, limit).map_err(|error| match error.kind() {
            io::ErrorKind::Interrupted => io::ErrorKind::ConnectionAborted.into(),
            _ => error,
        })
    }
}

/// For options that are nobody else's business.
impl AsFd for SocketStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Where connections to one address arrive.
pub struct SocketListener {
    /// Removes the path of a unix socket, while it is open.
    _path: Option<OwnPath>,
    listener: Accepting,
    stopped: StopEvent,
    uri: Uri,
}

impl SocketListener {
    /// Accepts connections from `socket`, which is bound and is told to listen. `uri` is where it can be reached.
    ///
    /// Its mode stays as it is, blocking or not, and so does that of its duplicates, also in other processes. For one that is in blocking
    /// mode, a ring of io_uring is made, which may accept and cancel that, and nothing else. Where the system has or permits none, the
    /// socket is in non-blocking mode as long as any listener of this process on one of its duplicates lives, and all duplicates with
    /// it; after that it has the mode that it had before the first. Its queue may be longer than it was.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] for anything but a stream socket; the kernel's.
    pub fn new(socket: OwnedFd, uri: Uri) -> io::Result<SocketListener> {
        SocketListener::over(socket, uri, None, Accepting::taken_over)
    }

    /// The same for a socket that was opened here, so that its mode is nobody else's business. `path` is its file.
    pub(super) fn opened(socket: OwnedFd, uri: Uri, path: Option<OwnPath>) -> io::Result<SocketListener> {
        SocketListener::over(socket, uri, path, Accepting::opened)
    }

    fn over(
        socket: OwnedFd,
        uri: Uri,
        path: Option<OwnPath>,
        accepting: impl FnOnce(OwnedFd) -> io::Result<Accepting>,
    ) -> io::Result<SocketListener> {
        check_stream_socket(&socket)?;
        // Linux also changes the backlog of a socket that listens already.
        listen(&socket, BACKLOG)?;
        let stopped = StopEvent::new()?;
        Ok(SocketListener { listener: accepting(socket)?, stopped, uri, _path: path })
    }

    /// Where it can be reached, with the port that the kernel chose.
    pub fn uri(&self) -> &Uri {
        &self.uri
    }
}

impl Listen for SocketListener {
    fn accept(&mut self, timeout: Option<Duration>) -> io::Result<Box<dyn Pending>> {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            self.stopped.wait_readable(self.listener.as_fd(), left)?;
            if let Some(stream) = self.try_accept()? {
                return Ok(stream);
            }
        }
    }

    fn try_accept(&mut self) -> io::Result<Option<Box<dyn Pending>>> {
        while let Some(socket) = self.listener.try_accept()? {
            // It may be gone already, which is no error of the listener.
            let stream = match SocketStream::new(socket) {
                Ok(stream) => stream,
                Err(error) => {
                    tracing::debug!(%error, "a connection ended before it was accepted");
                    continue;
                }
            };
            let stream = match self.uri {
                Uri::Unix(_) => stream.with_peer(self.uri.to_string()),
                _ => stream,
            };
            return Ok(Some(Box::new(Accepted(stream))));
        }
        Ok(None)
    }

    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        Ok(Box::new(self.stopped.clone()))
    }
}

/// A connection that has arrived.
struct Accepted(SocketStream);

impl Pending for Accepted {
    fn establish(self: Box<Self>, _limit: Option<Duration>) -> io::Result<Box<dyn Stream>> {
        Ok(Box::new(self.0))
    }

    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        Stream::stopper(&self.0)
    }

    fn peer(&self) -> String {
        Stream::peer(&self.0)
    }

    fn ip(&self) -> Option<IpAddr> {
        match sockopt::socket_domain(&self.0.socket).ok()? {
            AddressFamily::INET | AddressFamily::INET6 => Some(tcp_peer(&self.0.socket)?.ip().to_canonical()),
            _ => None,
        }
    }
}

struct StreamStopper(Weak<OwnedFd>);

impl Stopper for StreamStopper {
    fn stop(&self) {
        if let Some(socket) = self.0.upgrade() {
            // The peer may have ended the connection before, which is as good.
            let _ = shutdown(&socket, Shutdown::Both);
        }
    }
}

/// Adds `what` in front of the message.
pub(super) fn context(what: impl std::fmt::Display) -> impl FnOnce(io::Error) -> io::Error {
    move |error| io::Error::new(error.kind(), format!("{what}: {error}"))
}

pub(super) fn invalid(message: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, message)
}

fn check_stream_socket(socket: &OwnedFd) -> io::Result<()> {
    match sockopt::socket_type(socket) {
        Ok(SocketType::STREAM) => Ok(()),
        Ok(_) => Err(invalid("it is a socket, but not a stream socket")),
        Err(Errno::NOTSOCK) => Err(invalid("it is not a socket")),
        Err(error) => Err(error.into()),
    }
}

fn prepare_tcp(socket: &OwnedFd) -> io::Result<()> {
    // A SYNC packet must not wait for the acknowledgement of the pages before it.
    sockopt::set_tcp_nodelay(socket, true)?;
    // A destination that only reads would otherwise never notice that the source's host is gone. With these it is told
    // within 90 s, while an idle but living source is not disturbed. A TCP_USER_TIMEOUT, which replaces the number of probes,
    // comes with the stall limit ([`SendHalf::limit_untaken`]): it also ends connections whose peer is alive and does not read.
    sockopt::set_socket_keepalive(socket, true)?;
    sockopt::set_tcp_keepidle(socket, Duration::from_secs(30))?;
    sockopt::set_tcp_keepintvl(socket, Duration::from_secs(10))?;
    sockopt::set_tcp_keepcnt(socket, 6)?;
    // Within one host there is no distance to fill, and bytes that are still in the cache when they are received cost
    // less: 4 channels take 0.26 CPU s/GB (both ends, medians of 6) instead of the 0.36 of buffers that grow by
    // themselves, 8 take 0.29 instead of 0.43. Between hosts a fixed buffer would limit the speed to buffer / round trip.
    if tcp_peer(socket).is_some_and(|peer| peer.ip().to_canonical().is_loopback()) {
        sockopt::set_socket_send_buffer_size(socket, LOOPBACK_BUFFER)?;
        return Ok(sockopt::set_socket_recv_buffer_size(socket, LOOPBACK_BUFFER)?);
    }
    // These buffers grow to megabytes, and what waits in them when the guest is paused is a part of the pause.
    unsent::limit(socket.as_fd(), UNSENT)
}

/// `None` for a connection that was reset before it was accepted: whoever reads from it is told.
fn tcp_peer(socket: &OwnedFd) -> Option<SocketAddr> {
    TcpStream::from(socket.try_clone().ok()?).peer_addr().ok()
}

/// In each direction; the kernel doubles it for its own use. 512 KiB needs less than 256 KiB with 1 channel (0.29 and 0.35
/// CPU s/GB), and more with 2, 4 and 8 (0.31, 0.30, 0.36 and 0.25, 0.26, 0.29).
const LOOPBACK_BUFFER: usize = host::LOCAL_SOCKET_BUFFER;

/// What a connection to another host keeps unsent, beside what is on its way there.
const UNSENT: usize = 128 << 10;

/// Room for main and 255 channels that connect before the first is accepted, and for strays. The kernel drops what does
/// not fit while the peer believes to be connected, so this errs on the large side; `net.core.somaxconn` caps it.
pub(super) const BACKLOG: i32 = 1024;
