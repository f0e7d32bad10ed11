//! Addresses as QEMU writes them: `tcp:HOST:PORT`, `unix:PATH`, `vsock:CID:PORT`, `fd:N`, `file:PATH`.

use std::{
    fmt, io,
    net::SocketAddr,
    os::fd::RawFd,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use super::{
    Connect, Listen, Pending, Stopper,
    fd::{FdConnector, FdListener},
    one_way::OneWayListener,
    tcp::{self, TcpConnector},
    unix::{self, UnixConnector},
    vsock::{self, VsockConnector},
};

/// Where a migration goes to or comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Uri {
    /// A TCP port.
    Tcp {
        /// A name or an address, IPv6 without brackets. Empty: every address when listening, this host when connecting.
        host: String,
        /// 0 when listening: any free port.
        port: u16,
    },
    /// The path of a unix socket.
    Unix(PathBuf),
    /// A port of a VM or of its host.
    Vsock {
        /// Which machine: 2 is the host of this VM, 1 this machine. When listening, [`vsock::ANY_CID`] is each address of it.
        cid: u32,
        /// When listening, [`vsock::ANY_PORT`] is any free port.
        port: u32,
    },
    /// The number of an inherited descriptor, a socket or, for a destination, a pipe or file, which the program has [claimed](super::fd::claim_inherited).
    Fd(RawFd),
    /// The path of a file, FIFO or device, which a destination reads. A source does not write there.
    File(PathBuf),
}

impl Uri {
    /// What opens connections to this address.
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`] for a file; [`io::ErrorKind::InvalidInput`] for the TCP port 0, which nothing listens at; for a
    /// descriptor, what is wrong with it.
    pub fn connector(&self) -> io::Result<Box<dyn Connect + Send + Sync>> {
        Ok(match self {
            Uri::Tcp { port: 0, .. } => {
                let message =
                    format!("{self}: port 0 picks one to listen at; expected the one that the destination says it has");
                return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
            }
            Uri::Tcp { host, port } => Box::new(TcpConnector::new(host, *port)),
            Uri::Unix(path) => Box::new(UnixConnector::new(path)),
            Uri::Vsock { cid, port } => Box::new(VsockConnector::new(*cid, *port)),
            Uri::Fd(number) => Box::new(FdConnector::inherited(*number)?),
            Uri::File(path) => return Err(not_a_connection(path)),
        })
    }

    /// Listens at this address. A file, a FIFO or a pipe is one connection, without a way back.
    ///
    /// # Errors
    /// The kernel's: an address or a socket that another process listens at ([`io::ErrorKind::AddrInUse`]), a kernel without vsock
    /// ([`io::ErrorKind::Unsupported`]). A number of a descriptor that this process does not have, or that something else in it has taken
    /// ([`fd`](super::fd)); a `file:` that is a directory.
    pub fn listener(&self) -> io::Result<UriListener> {
        Ok(match self {
            Uri::Tcp { host, port } => {
                let listener = tcp::listen(host, *port)?;
                UriListener { uri: listener.uri().clone(), listener: Box::new(listener) }
            }
            Uri::Unix(path) => UriListener { listener: Box::new(unix::listen(path)?), uri: self.clone() },
            Uri::Vsock { cid, port } => {
                let listener = vsock::listen(*cid, *port)?;
                UriListener { uri: listener.uri().clone(), listener: Box::new(listener) }
            }
            Uri::Fd(number) => UriListener { listener: Box::new(FdListener::inherited(*number)?), uri: self.clone() },
            Uri::File(path) => UriListener { listener: Box::new(OneWayListener::open(path, 0)?), uri: self.clone() },
        })
    }
}

impl FromStr for Uri {
    type Err = UriError;

    fn from_str(text: &str) -> Result<Uri, UriError> {
        let wrong = |right| UriError { text: text.to_owned(), right };
        let (scheme, rest) = text.split_once(':').ok_or_else(|| wrong(FORMS))?;
        match scheme {
            "tcp" => {
                let (host, port) = split_port(rest).ok_or_else(|| wrong(TCP_FORM))?;
                let port = parse_number(port).and_then(|port| u16::try_from(port).ok()).ok_or_else(|| wrong(PORTS))?;
                Ok(Uri::Tcp { host: host.to_owned(), port })
            }
            "unix" | "file" if rest.is_empty() => Err(wrong("a path after the colon")),
            "unix" if rest.len() > UNIX_PATH_MAX => Err(wrong("a path of at most 107 bytes, for a unix socket")),
            "unix" => Ok(Uri::Unix(rest.into())),
            "file" => Ok(Uri::File(rest.into())),
            "vsock" => {
                let (cid, port) = rest.split_once(':').ok_or_else(|| wrong(VSOCK_FORM))?;
                let number = |text| parse_number(text).ok_or_else(|| wrong(VSOCK_FORM));
                Ok(Uri::Vsock { cid: number(cid)?, port: number(port)? })
            }
            "fd" => match parse_number(rest).and_then(|number| RawFd::try_from(number).ok()) {
                Some(number) => Ok(Uri::Fd(number)),
                None => Err(wrong("the number of an inherited descriptor, as in fd:3")),
            },
            _ => Err(wrong(FORMS)),
        }
    }
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Uri::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Uri::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
            Uri::Unix(path) => write!(f, "unix:{}", path.display()),
            Uri::Vsock { cid, port } => write!(f, "vsock:{cid}:{port}"),
            Uri::Fd(number) => write!(f, "fd:{number}"),
            Uri::File(path) => write!(f, "file:{}", path.display()),
        }
    }
}

impl From<SocketAddr> for Uri {
    fn from(address: SocketAddr) -> Uri {
        let host = match address {
            // The scope of a link-local address is part of it.
            SocketAddr::V6(v6) if v6.scope_id() != 0 => format!("{}%{}", v6.ip(), v6.scope_id()),
            _ => address.ip().to_canonical().to_string(),
        };
        Uri::Tcp { host, port: address.port() }
    }
}

/// A listener that knows where it can be reached.
pub struct UriListener {
    listener: Box<dyn Listen>,
    uri: Uri,
}

impl UriListener {
    /// Where it can be reached, with the port that the kernel chose.
    pub fn uri(&self) -> &Uri {
        &self.uri
    }
}

impl Listen for UriListener {
    fn accept(&mut self, timeout: Option<Duration>) -> io::Result<Box<dyn Pending>> {
        self.listener.accept(timeout)
    }

    fn try_accept(&mut self) -> io::Result<Option<Box<dyn Pending>>> {
        self.listener.try_accept()
    }

    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        self.listener.stopper()
    }

    fn is_single(&self) -> bool {
        self.listener.is_single()
    }
}

/// A text that is no [`Uri`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?}: expected {right}")]
pub struct UriError {
    text: String,
    right: &'static str,
}

/// Host and port of `HOST:PORT`, where the host may be an IPv6 address in brackets and in no other way.
fn split_port(text: &str) -> Option<(&str, &str)> {
    if let Some(bracketed) = text.strip_prefix('[') {
        return bracketed.split_once("]:").filter(|(host, _)| host.contains(':'));
    }
    text.rsplit_once(':').filter(|(host, _)| !host.contains([':', '[', ']']))
}

/// Digits only: `parse` alone takes a plus sign as well.
fn parse_number(text: &str) -> Option<u32> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

fn not_a_connection(path: &Path) -> io::Error {
    let message =
        format!("file:{} is not a connection; tcp:HOST:PORT, unix:PATH, vsock:CID:PORT and fd:N are", path.display());
    io::Error::new(io::ErrorKind::Unsupported, message)
}

const FORMS: &str = "tcp:HOST:PORT, unix:PATH, vsock:CID:PORT, fd:N or file:PATH";
const TCP_FORM: &str = "tcp:HOST:PORT, with an IPv6 address in brackets, as in tcp:[::1]:4444";
const VSOCK_FORM: &str = "vsock:CID:PORT, two numbers from 0 to 4294967295, as in vsock:2:4444";
const PORTS: &str = "a port from 0 to 65535 after the last colon";

/// What fits into the kernel's `sockaddr_un`, with the terminating zero.
const UNIX_PATH_MAX: usize = 107;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_form_is_read_and_written_back() {
        let tcp = |host: &str, port| Uri::Tcp { host: host.to_owned(), port };
        for (text, uri) in [
            ("tcp:127.0.0.1:4444", tcp("127.0.0.1", 4444)),
            ("tcp:[::1]:0", tcp("::1", 0)),
            ("tcp:[fe80::1%eth0]:65535", tcp("fe80::1%eth0", 65535)),
            ("tcp:host.example:1", tcp("host.example", 1)),
            ("tcp::4444", tcp("", 4444)),
            ("unix:/tmp/a:b", Uri::Unix("/tmp/a:b".into())),
            ("unix:relative", Uri::Unix("relative".into())),
            ("vsock:2:4444", Uri::Vsock { cid: 2, port: 4444 }),
            ("vsock:4294967295:0", Uri::Vsock { cid: vsock::ANY_CID, port: 0 }),
            ("fd:3", Uri::Fd(3)),
            ("file:/tmp/x.img", Uri::File("/tmp/x.img".into())),
        ] {
            assert_eq!(text.parse::<Uri>().as_ref(), Ok(&uri), "{text}");
            assert_eq!(uri.to_string(), text);
        }
    }

    #[test]
    fn a_wrong_value_is_named_with_what_would_be_right() {
        let long = format!("unix:/{}", "x".repeat(UNIX_PATH_MAX));
        for (text, right) in [
            ("", FORMS),
            ("127.0.0.1:4444", FORMS),
            ("udp:host:1", FORMS),
            ("tcp:host", TCP_FORM),
            ("tcp:::1:4444", TCP_FORM),
            ("tcp:[::1]4444", TCP_FORM),
            ("tcp:[host]:1", TCP_FORM),
            ("tcp:host:", PORTS),
            ("tcp:host:+1", PORTS),
            ("tcp:host:65536", PORTS),
            ("tcp:host:http", PORTS),
            ("unix:", "a path after the colon"),
            ("file:", "a path after the colon"),
            (&long, "107 bytes"),
            ("vsock:3", VSOCK_FORM),
            ("vsock::4444", VSOCK_FORM),
            ("vsock:3:", VSOCK_FORM),
            ("vsock:-1:4444", VSOCK_FORM),
            ("vsock:0x3:4444", VSOCK_FORM),
            ("vsock:3:4444:5", VSOCK_FORM),
            ("vsock:3:4294967296", VSOCK_FORM),
            ("fd:", "as in fd:3"),
            ("fd:-1", "as in fd:3"),
            ("fd:4294967295", "as in fd:3"),
        ] {
            let message = text.parse::<Uri>().unwrap_err().to_string();
            assert!(message.starts_with(&format!("{text:?}: expected ")) && message.contains(right), "{message}");
        }
    }

    #[test]
    fn a_listener_tells_the_port_it_was_given() {
        let listener = "tcp:127.0.0.1:0".parse::<Uri>().unwrap().listener().unwrap();
        let Uri::Tcp { host, port } = listener.uri() else { panic!("{}", listener.uri()) };
        assert_eq!(host, "127.0.0.1");
        assert_ne!(*port, 0);
        listener.uri().connector().unwrap().connect().unwrap();
    }

    #[test]
    fn an_empty_host_listens_everywhere_and_connects_to_this_host() {
        let mut listener = "tcp::0".parse::<Uri>().unwrap().listener().unwrap();
        let Uri::Tcp { port, .. } = *listener.uri() else { panic!("{}", listener.uri()) };
        Uri::Tcp { host: String::new(), port }.connector().unwrap().connect().unwrap();
        Uri::Tcp { host: "127.0.0.1".to_owned(), port }.connector().unwrap().connect().unwrap();
        for _ in 0..2 {
            listener.accept(Some(Duration::from_secs(10))).unwrap();
        }
    }

    #[test]
    fn a_source_cannot_connect_to_a_file() {
        let uri: Uri = "file:/tmp/x".parse().unwrap();
        let error = uri.connector().err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::Unsupported);
        assert!(error.to_string().contains("file:/tmp/x"), "{error}");
    }

    /// It was tried for 30 s as one that does not listen yet.
    #[test]
    fn nothing_connects_to_port_0() {
        let error = "tcp:127.0.0.1:0".parse::<Uri>().unwrap().connector().err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        assert!(error.to_string().starts_with("tcp:127.0.0.1:0: port 0"), "{error}");
    }

    #[test]
    fn a_refused_connection_names_the_address() {
        let free = {
            let listener = "tcp:127.0.0.1:0".parse::<Uri>().unwrap().listener().unwrap();
            listener.uri().clone()
        };
        let error = free.connector().unwrap().connect().err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        assert!(error.to_string().contains(&free.to_string()), "{error}");
    }
}
