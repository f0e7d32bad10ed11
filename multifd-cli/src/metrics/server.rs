//! Metrics over HTTP: a server that answers one question.
//!
//! All that a client can take is bounded: connections at one time, bytes of a request, and the time for both. What is beyond
//! is closed without an answer.

use std::{
    io::{self, Read, Write},
    net::TcpStream,
    os::unix::net::{UnixListener, UnixStream},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use multifd::transport::{
    tcp,
    unix::{OwnPath, listen_privately},
    uri::Uri,
};

use super::text;
use crate::threads;

/// Answers until the process ends.
pub struct Server {
    /// Removes the path of a unix socket.
    _path: Option<OwnPath>,
}

impl Server {
    /// Listens at `uri`, and returns where exactly: port 0 picks one. A unix socket takes connections of this user only.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn start(uri: &Uri) -> io::Result<(Server, Uri)> {
        match uri {
            Uri::Tcp { host, port } => {
                let listener = tcp::bind(host, *port)?;
                let bound = Uri::from(listener.local_addr()?);
                serve(move || listener.accept().map(|(stream, _)| stream))?;
                Ok((Server { _path: None }, bound))
            }
            Uri::Unix(path) => {
                let (listener, own): (UnixListener, OwnPath) = listen_privately(path)?;
                serve(move || listener.accept().map(|(stream, _)| stream))?;
                Ok((Server { _path: Some(own) }, uri.clone()))
            }
            Uri::Vsock { .. } | Uri::Fd(_) | Uri::File(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}

/// A connection of either kind.
trait Connection: Read + Write + Send + 'static {
    fn set_limits(&self, limit: Duration) -> io::Result<()>;
}

impl Connection for TcpStream {
    fn set_limits(&self, limit: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(limit))?;
        self.set_write_timeout(Some(limit))
    }
}

impl Connection for UnixStream {
    fn set_limits(&self, limit: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(limit))?;
        self.set_write_timeout(Some(limit))
    }
}

fn serve<C: Connection>(accept: impl Fn() -> io::Result<C> + Send + 'static) -> io::Result<()> {
    let serving = Arc::new(AtomicUsize::new(0));
    threads::spawn("metrics", move || {
        loop {
            let Ok(connection) = accept() else {
                // Out of descriptors, or the like: it may pass.
                std::thread::sleep(PAUSE);
                continue;
            };
            let slot = Slot(serving.clone());
            if slot.0.fetch_add(1, Relaxed) >= MOST_CONNECTIONS {
                continue;
            }
            // Without a thread for it, the connection ends.
            let _ = threads::spawn("metrics client", move || {
                let _slot = slot;
                if let Err(error) = answer(connection) {
                    tracing::debug!(%error, "a client of the metrics");
                }
            });
        }
    })
    .map(drop)
}

/// One of the connections that are served.
struct Slot(Arc<AtomicUsize>);

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

/// Answers one request and ends the connection.
///
/// # Errors
/// The client did not ask in time, or asked for too much; the kernel's.
fn answer(mut connection: impl Connection) -> io::Result<()> {
    let request = request(&mut connection)?;
    let words: Vec<&str> = request.split(' ').collect();
    // A query changes nothing: a scraper may be set up to send one.
    let path = words.get(1).map(|target| target.split_once('?').map_or(*target, |(path, _)| path));
    let (status, body) = match (&words[..], path) {
        (["GET", _, _], Some("/metrics" | "/")) => ("200 OK", super::now()),
        (["GET", ..], _) => ("404 Not Found", "the metrics are at /metrics\n".to_owned()),
        _ => ("405 Method Not Allowed", "expected GET\n".to_owned()),
    };
    connection.set_limits(LONGEST_ANSWER)?;
    let (kind, length) = (text::CONTENT_TYPE, body.len());
    let head =
        format!("HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
    connection.write_all(format!("{head}{body}").as_bytes())
}

/// The first line of a request, which is read to its end.
fn request(connection: &mut impl Connection) -> io::Result<String> {
    let deadline = Instant::now() + LONGEST_REQUEST;
    let mut request = Vec::new();
    let mut buf = [0; 1024];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        connection.set_limits(left)?;
        match connection.read(&mut buf)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => request.extend_from_slice(&buf[..n]),
        }
        if request.windows(4).any(|end| end == b"\r\n\r\n") {
            let line = request.split(|&byte| byte == b'\r').next().unwrap_or_default();
            return Ok(String::from_utf8_lossy(line).into_owned());
        }
        if request.len() > LARGEST_REQUEST {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the request is too long"));
        }
    }
}

/// At one time.
const MOST_CONNECTIONS: usize = 8;
/// In bytes.
const LARGEST_REQUEST: usize = 8 << 10;
const LONGEST_REQUEST: Duration = Duration::from_secs(5);
const LONGEST_ANSWER: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use super::*;

    /// An empty host was looked up, and not found.
    #[test]
    fn every_address_of_a_migration_is_one_of_metrics() {
        for address in ["tcp:127.0.0.1:0", "tcp::0"] {
            let (_server, bound) = Server::start(&address.parse().unwrap()).unwrap();
            let Uri::Tcp { port, .. } = bound else { panic!("{bound}") };
            let mut client = TcpStream::connect(("127.0.0.1", port)).unwrap();
            client.set_limits(Duration::from_secs(60)).unwrap();
            client.write_all(b"GET /metrics?job=vm HTTP/1.1\r\n\r\n").unwrap();
            let mut answer = String::new();
            client.read_to_string(&mut answer).unwrap();
            assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{address}: {answer}");
        }
    }
}
