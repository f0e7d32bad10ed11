//! Drops connections by the address that they come from, before anything of them is read.

use std::{
    io,
    time::{Duration, Instant},
};

use ipnet::IpNet;
use multifd::transport::{Listen, Pending, Stopper};

/// Accepts what comes from some addresses. One that has no address, as over a unix socket, comes from none of them.
pub struct AllowListener {
    inner: Box<dyn Listen>,
    allowed: Vec<IpNet>,
    dropped: u32,
}

impl AllowListener {
    /// Accepts from `inner` what comes from `allowed`.
    pub fn new(inner: Box<dyn Listen>, allowed: Vec<IpNet>) -> AllowListener {
        AllowListener { inner, allowed, dropped: 0 }
    }

    /// Hands `pending` on, or drops it.
    fn judge(&mut self, pending: Box<dyn Pending>) -> Option<Box<dyn Pending>> {
        let ip = pending.ip();
        if ip.is_some_and(|ip| self.allowed.iter().any(|network| network.contains(&ip))) {
            return Some(pending);
        }
        let peer = pending.peer();
        self.dropped = self.dropped.saturating_add(1);
        match (ip, self.dropped) {
            (None, ..=MOST_WARNINGS) => {
                tracing::warn!(peer, "drops a connection that has no address, which --allow asks for")
            }
            (_, ..=MOST_WARNINGS) => {
                tracing::warn!(peer, "drops a connection from an address that --allow does not name")
            }
            _ => tracing::debug!(peer, "drops a connection from an address that --allow does not name"),
        }
        None
    }
}

impl Listen for AllowListener {
    fn accept(&mut self, timeout: Option<Duration>) -> io::Result<Box<dyn Pending>> {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let pending = self.inner.accept(left)?;
            if let Some(pending) = self.judge(pending) {
                return Ok(pending);
            }
        }
    }

    fn try_accept(&mut self) -> io::Result<Option<Box<dyn Pending>>> {
        // Strangers that never stop coming must not keep the caller here.
        for _ in 0..MOST_AT_ONCE {
            let Some(pending) = self.inner.try_accept()? else { return Ok(None) };
            if let Some(pending) = self.judge(pending) {
                return Ok(Some(pending));
            }
        }
        Ok(None)
    }

    fn is_single(&self) -> bool {
        self.inner.is_single()
    }

    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        self.inner.stopper()
    }
}

/// From then on they are logged at a lower level.
const MOST_WARNINGS: u32 = 100;
/// What the queue of a listener holds.
const MOST_AT_ONCE: u32 = 1024;

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, SocketAddr, TcpStream};

    use multifd::transport::uri::Uri;
    use test_support::time_limit;

    use super::*;

    const SOON: Duration = Duration::from_secs(20);

    fn listener(uri: &str, allowed: &[&str]) -> (AllowListener, u16) {
        let inner = uri.parse::<Uri>().unwrap().listener().unwrap();
        let Uri::Tcp { port, .. } = *inner.uri() else { panic!("{}", inner.uri()) };
        let allowed = allowed.iter().map(|text| text.parse().unwrap()).collect();
        (AllowListener::new(Box::new(inner), allowed), port)
    }

    /// A connection to this host from one of its addresses.
    fn connect(from: &str, port: u16) -> TcpStream {
        use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, connect, socket_with};
        let from: IpAddr = from.parse().unwrap();
        let (family, to) = match from {
            IpAddr::V4(_) => (AddressFamily::INET, "127.0.0.1"),
            IpAddr::V6(_) => (AddressFamily::INET6, "::1"),
        };
        let socket = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
        bind(&socket, &SocketAddr::new(from, 0)).unwrap();
        connect(&socket, &SocketAddr::new(to.parse().unwrap(), port)).unwrap();
        socket.into()
    }

    #[test]
    fn connections_of_other_addresses_are_dropped_and_later_ones_are_taken() {
        time_limit(3 * SOON, || {
            let (mut listener, port) = listener("tcp:127.0.0.1:0", &["127.0.0.2/31", "192.0.2.0/24"]);
            let strangers = [connect("127.0.0.1", port), connect("127.0.0.4", port)];
            let _friends = [connect("127.0.0.2", port), connect("127.0.0.3", port)];
            let peers = [(); 2].map(|()| listener.accept(Some(SOON)).unwrap().peer());
            assert!(peers[0].starts_with("tcp:127.0.0.2:") && peers[1].starts_with("tcp:127.0.0.3:"), "{peers:?}");
            for mut stranger in strangers {
                stranger.set_read_timeout(Some(SOON)).unwrap();
                // An end or a reset.
                assert_eq!(io::Read::read(&mut stranger, &mut [0]).unwrap_or(0), 0);
            }
            let _stranger = connect("127.0.0.1", port);
            assert!(listener.try_accept().unwrap().is_none());
            assert_eq!(listener.accept(Some(Duration::from_millis(20))).err().unwrap().kind(), io::ErrorKind::TimedOut);
        });
    }

    /// A listener for both kinds of addresses sees IPv4 ones as IPv6.
    #[test]
    fn an_ipv4_address_is_one_at_a_listener_for_ipv6() {
        time_limit(3 * SOON, || {
            let (mut listener, port) = listener("tcp::0", &["127.0.0.0/8"]);
            let _friend = connect("127.0.0.1", port);
            assert_eq!(listener.accept(Some(SOON)).unwrap().ip(), Some([127, 0, 0, 1].into()));
            if std::net::TcpListener::bind("[::1]:0").is_ok() {
                let _stranger = connect("::1", port);
                assert!(listener.accept(Some(Duration::from_millis(50))).is_err());
            }
        });
    }

    #[test]
    fn a_connection_without_an_address_is_of_no_network() {
        time_limit(3 * SOON, || {
            let dir = test_support::TempDir::new().unwrap();
            let uri = Uri::Unix(dir.join("s"));
            let inner = uri.listener().unwrap();
            let mut listener = AllowListener::new(Box::new(inner), vec!["0.0.0.0/0".parse().unwrap()]);
            let _stranger = uri.connector().unwrap().connect().unwrap();
            assert!(listener.accept(Some(Duration::from_millis(20))).is_err());
            let stopper = listener.stopper().unwrap();
            stopper.stop();
            assert_eq!(listener.accept(None).err().unwrap().kind(), io::ErrorKind::Interrupted);
        });
    }
}
