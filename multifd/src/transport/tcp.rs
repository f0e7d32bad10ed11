//! Connections over TCP, IPv4 and IPv6.

use std::{
    io,
    net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs},
    time::Duration,
};

use super::{
    Connect, Stream,
    socket::{SocketListener, SocketStream, context},
    uri::Uri,
};

/// Opens connections to one host and port.
#[derive(Clone, Debug)]
pub struct TcpConnector {
    host: String,
    port: u16,
}

impl TcpConnector {
    /// Connects to `port` of `host`: a name, which is looked up at each connect and whose addresses are tried in turn,
    /// or an address, IPv6 without brackets. An empty host is this one.
    pub fn new(host: impl Into<String>, port: u16) -> TcpConnector {
        TcpConnector { host: host.into(), port }
    }

    fn open(&self) -> io::Result<TcpStream> {
        let host = if self.host.is_empty() { "localhost" } else { &self.host };
        let mut failure = None;
        for address in resolve(host, self.port)? {
            match TcpStream::connect_timeout(&address, CONNECT_TIMEOUT) {
                Ok(stream) => return Ok(stream),
                Err(error) => failure = Some(context(address)(error)),
            }
        }
        Err(failure.unwrap_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the host has no address")))
    }
}

impl Connect for TcpConnector {
    fn connect(&self) -> io::Result<Box<dyn Stream>> {
        let uri = Uri::Tcp { host: self.host.clone(), port: self.port };
        let stream = self.open().map_err(context(&uri))?;
        Ok(Box::new(SocketStream::new(stream.into())?))
    }
}

/// Listens on `port` of `host`, as for [`TcpConnector::new`]. An empty host is every address of this machine, port 0 any
/// free one.
///
/// # Errors
/// The kernel's, for the last address tried.
pub fn listen(host: &str, port: u16) -> io::Result<SocketListener> {
    let uri = || Uri::Tcp { host: host.to_owned(), port };
    let bind = || {
        if host.is_empty() {
            // Takes IPv4 as well, unless the system was configured otherwise; without IPv6, IPv4 alone.
            return TcpListener::bind(("::", port)).or_else(|_| TcpListener::bind(("0.0.0.0", port)));
        }
        TcpListener::bind(&*resolve(host, port)?)
    };
    let listener = bind().map_err(|error| context(uri())(error))?;
    let address = listener.local_addr()?;
    SocketListener::new(listener.into(), Uri::from(address))
}

fn resolve(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    Ok((host, port).to_socket_addrs()?.collect())
}

/// For each address. The kernel alone would take over two minutes to give up one that does not answer, and nothing can
/// cancel a connect.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
