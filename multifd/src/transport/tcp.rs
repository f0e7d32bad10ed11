//! Connections over TCP, IPv4 and IPv6.

use std::{
    io,
    net::{SocketAddr, TcpListener},
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};

use rustix::{
    io::Errno,
    net::{self, AddressFamily, SocketFlags, SocketType, sockopt},
};

use super::{
    Connect, Pending, Stopper, Stream,
    look_up::{self, Resolver},
    socket::{SocketListener, SocketStream, context},
    stop_event::StopEvent,
    uri::Uri,
};
use crate::sync::{Arc, Deadline, Mutex, lock};

/// Opens connections to one host and port.
#[derive(Clone, Debug)]
pub struct TcpConnector {
    host: String,
    port: u16,
    /// Held by one handshake at a time. Others do without for a while: where they are answered, that saves a round trip for each.
    ///
    /// A listener whose accept queue is full ignores a SYN, and the kernel waits longer and longer before it sends it again. Many that
    /// come at the same time may miss each place that becomes free. Those who take turns do not.
    turn: Arc<Mutex<()>>,
    /// The address that has taken a connection. Behind the others of a name there may be another host, or nothing that listens.
    taken: Arc<Mutex<Option<SocketAddr>>>,
    resolver: Resolver,
}

impl TcpConnector {
    /// Connects to `port` of `host`: a name, which is looked up at each connect and whose addresses are tried in turn, first the one that
    /// has taken a connection before, or an address, IPv6 without brackets. An empty host is this one. Where no address takes a connection
    /// and one of them refuses it, the error is [`io::ErrorKind::ConnectionRefused`]: its host is there, and does not listen yet.
    ///
    /// A name is looked up in a thread of its own, which is made by the standard library and which a stop or a limit leaves behind until
    /// the resolver answers. An address takes no thread.
    pub fn new(host: impl Into<String>, port: u16) -> TcpConnector {
        TcpConnector {
            host: host.into(),
            port,
            turn: Arc::default(),
            taken: Arc::default(),
            resolver: look_up::by_system,
        }
    }

    fn uri(&self) -> Uri {
        Uri::Tcp { host: self.host.clone(), port: self.port }
    }
}

impl Connect for TcpConnector {
    fn dial(&self) -> io::Result<Box<dyn Pending>> {
        Ok(Box::new(PendingTcp { to: self.clone(), stopped: StopEvent::new()? }))
    }
}

/// A connection that is to be opened.
struct PendingTcp {
    to: TcpConnector,
    stopped: StopEvent,
}

impl PendingTcp {
    fn open(&self, deadline: Deadline) -> io::Result<OwnedFd> {
        let host = if self.to.host.is_empty() { "localhost" } else { &self.to.host };
        let addresses = look_up::addresses(host, self.to.port, self.to.resolver, &self.stopped, deadline);
        let mut addresses = addresses.map_err(aborted)?;
        let taken = *lock(&self.to.taken);
        // The others stay in the order of the resolver.
        addresses.sort_by_key(|address| Some(*address) != taken);
        addresses.dedup();
        let mut failures = Vec::new();
        for address in addresses {
            match self.connect(address, deadline) {
                Ok(socket) => {
                    *lock(&self.to.taken) = Some(address);
                    return Ok(socket);
                }
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => return Err(error),
                Err(error) => failures.push(context(address)(error)),
            }
        }
        Err(all_of(failures))
    }

    fn connect(&self, address: SocketAddr, deadline: Deadline) -> io::Result<OwnedFd> {
        let limit = |limit: Duration| deadline.left().map_or(limit, |left| left.min(limit));
        if let Ok(_turn) = self.to.turn.try_lock() {
            return self.handshake(address, limit(CONNECT_TIMEOUT));
        }
        match self.handshake(address, limit(TOGETHER)) {
            Err(error) if error.kind() == io::ErrorKind::TimedOut && !deadline.is_over() => {}
            other => return other,
        }
        // Ends with the waits of those before: each has a limit, and a stop ends all.
        let _turn = lock(&self.to.turn);
        self.handshake(address, limit(CONNECT_TIMEOUT))
    }

    fn handshake(&self, address: SocketAddr, limit: Duration) -> io::Result<OwnedFd> {
        let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = net::socket_with(family, SocketType::STREAM, flags, None)?;
        match net::connect(&socket, &address) {
            Ok(()) => return Ok(socket),
            Err(Errno::INPROGRESS | Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        self.stopped.wait_writable(socket.as_fd(), Some(limit)).map_err(|error| match error.kind() {
            io::ErrorKind::TimedOut => io::Error::new(io::ErrorKind::TimedOut, "connection timed out"),
            _ => aborted(error),
        })?;
        sockopt::socket_error(&socket)??;
        Ok(socket)
    }
}

impl Pending for PendingTcp {
    fn establish(self: Box<Self>, limit: Option<Duration>) -> io::Result<Box<dyn Stream>> {
        let socket = self.open(Deadline::after(limit)).map_err(context(self.to.uri()))?;
        Ok(Box::new(SocketStream::new(socket)?))
    }

    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        Ok(Box::new(self.stopped.clone()))
    }

    fn peer(&self) -> String {
        self.to.uri().to_string()
    }
}

/// Listens on `port` of `host`, as for [`TcpConnector::new`]. An empty host is every address of this machine, port 0 any
/// free one. A name is looked up as there.
///
/// # Errors
/// The kernel's, for the last address tried; [`io::ErrorKind::TimedOut`] where a name was not found within 30 s.
pub fn listen(host: &str, port: u16) -> io::Result<SocketListener> {
    let listener = bind(host, port).map_err(|error| context(Uri::Tcp { host: host.to_owned(), port })(error))?;
    let address = listener.local_addr()?;
    SocketListener::opened(listener.into(), Uri::from(address), None)
}

/// The same for a server of something else than migrations.
///
/// # Errors
/// As [`listen`], without the address.
pub fn bind(host: &str, port: u16) -> io::Result<TcpListener> {
    if host.is_empty() {
        // Takes IPv4 as well, unless the system was configured otherwise; without IPv6, IPv4 alone.
        return TcpListener::bind(("::", port)).or_else(|_| TcpListener::bind(("0.0.0.0", port)));
    }
    let addresses = look_up::addresses(host, port, look_up::by_system, &StopEvent::new()?, Deadline::after(None))?;
    TcpListener::bind(&*addresses)
}

/// The failures of all addresses of a host, at least one, as one. Its kind is that of the address from which most can be hoped for.
fn all_of(mut failures: Vec<io::Error>) -> io::Error {
    if failures.len() <= 1 {
        return failures.pop().unwrap_or_else(|| io::ErrorKind::NotFound.into());
    }
    let kinds = || failures.iter().map(io::Error::kind);
    let hopeful = [io::ErrorKind::ConnectionRefused, io::ErrorKind::TimedOut];
    let kind = hopeful.into_iter().find(|hopeful| kinds().any(|kind| kind == *hopeful)).or(kinds().next());
    let texts: Vec<String> = failures.iter().map(io::Error::to_string).collect();
    io::Error::new(kind.unwrap_or(io::ErrorKind::Other), texts.join(", "))
}

/// The error of [`Pending::establish`] for a wait that was stopped.
fn aborted(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::Interrupted => io::ErrorKind::ConnectionAborted.into(),
        _ => error,
    }
}

/// For each address. The kernel alone would take over two minutes to give up one that does not answer.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a handshake goes on beside others: the kernel has sent its SYN a second time then.
const TOGETHER: Duration = Duration::from_secs(3);

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use std::thread;

    use super::{super::look_up::tests::LateResolver, *};

    /// A name with an address that this host cannot reach, IPv6 as a rule, which the resolver puts last: its error was that of the name, and
    /// a destination that did not listen yet was not waited for.
    #[test]
    fn of_several_addresses_the_one_that_refuses_says_what_is_to_be_hoped_for() {
        test_support::time_limit(Duration::from_secs(60), || {
            let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
            // The kernel takes no address of a link without the link.
            let resolver: Resolver = |_, port| {
                Ok(vec![SocketAddr::from(([127, 0, 0, 1], port)), format!("[fe80::1]:{port}").parse().unwrap()])
            };
            let error = TcpConnector { resolver, ..TcpConnector::new("host", free) }.connect().err().unwrap();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "{error}");
            let text = error.to_string();
            assert!(text.contains(&format!("127.0.0.1:{free}")) && text.contains("[fe80::1]"), "{text}");
        });
    }

    /// Names that resolve in another order each time are one way to have several hosts: main went to one of them, and channels to others.
    #[test]
    fn all_connections_go_to_the_address_that_took_the_first() {
        static ASKED: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);

        test_support::time_limit(Duration::from_secs(60), || {
            let first = TcpListener::bind("127.0.0.1:0").unwrap();
            let port = first.local_addr().unwrap().port();
            let _second = TcpListener::bind(("127.0.0.2", port)).unwrap();
            let resolver: Resolver = |_, port| {
                let mut addresses =
                    vec![SocketAddr::from(([127, 0, 0, 1], port)), SocketAddr::from(([127, 0, 0, 2], port))];
                addresses.rotate_left(ASKED.fetch_add(1, std::sync::atomic::Ordering::Relaxed) % 2);
                Ok(addresses)
            };
            let connector = TcpConnector { resolver, ..TcpConnector::new("host", port) };
            for _ in 0..4 {
                connector.connect().unwrap();
            }
            first.set_nonblocking(true).unwrap();
            assert_eq!(std::iter::from_fn(|| first.accept().ok()).count(), 4);
        });
    }

    /// Only the resolver could end it, after as long as it liked.
    #[test]
    fn a_stop_ends_a_connect_whose_name_is_being_looked_up() {
        static LATE: LateResolver = LateResolver::new();

        test_support::time_limit(Duration::from_secs(60), || {
            let connector = TcpConnector { resolver: |_, _| LATE.resolve(), ..TcpConnector::new("host", 1) };
            let pending = connector.dial().unwrap();
            let stopper = pending.stopper().unwrap();
            let waiting = thread::spawn(move || pending.establish(None).err());
            LATE.wait_until_asked();
            stopper.stop();
            let error = waiting.join().unwrap().unwrap();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted, "{error}");
            assert!(error.to_string().contains("tcp:host:1"), "{error}");
            LATE.finish();
        });
    }
}
