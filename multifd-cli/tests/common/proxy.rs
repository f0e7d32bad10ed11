//! A TCP proxy that connects onward late and in another order than it was connected to.
//!
//! It accepts at once, or from a queue of one connection and slowly. It reads what each connection says it is, waits as long
//! as this connection is to be held, and only then connects onward. What the source has written meanwhile waits in the proxy.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with};

/// How long each connection is held; `None` is forever.
#[derive(Clone, Debug)]
pub struct Holds {
    pub main: Option<Duration>,
    /// By channel id.
    pub channels: Vec<Option<Duration>>,
}

impl Holds {
    /// Nothing is held.
    pub fn none(channels: usize) -> Holds {
        Holds { main: Some(Duration::ZERO), channels: vec![Some(Duration::ZERO); channels] }
    }
}

/// Accepts from when it is made until it is dropped; connections that are held then are closed.
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    accepting: Option<thread::JoinHandle<()>>,
}

struct Shared {
    onward: SocketAddr,
    holds: Holds,
    stopped: AtomicBool,
    connected: AtomicUsize,
}

impl Proxy {
    /// Listens, and connects onward to `onward` after `holds`. Before each connection `pauses` says how long to wait until
    /// it is accepted; without, the queue is long and connections are accepted at once.
    pub fn start(onward: SocketAddr, holds: Holds, pauses: Option<Vec<Duration>>) -> Proxy {
        let listener = match pauses {
            Some(_) => short_queue(),
            None => TcpListener::bind(("127.0.0.1", 0)).unwrap(),
        };
        let address = listener.local_addr().unwrap();
        let (stopped, connected) = (AtomicBool::new(false), AtomicUsize::new(0));
        let shared = Arc::new(Shared { onward, holds, stopped, connected });
        let accepting = {
            let shared = shared.clone();
            let mut pauses = pauses.unwrap_or_default().into_iter();
            thread::spawn(move || {
                loop {
                    thread::sleep(pauses.next().unwrap_or_default());
                    let (stream, _) = listener.accept().unwrap();
                    if shared.stopped.load(Ordering::Relaxed) {
                        return;
                    }
                    let shared = shared.clone();
                    // An error is one of the connection, which has then ended on both sides.
                    thread::spawn(move || shared.forward(stream));
                }
            })
        };
        Proxy { address, shared, accepting: Some(accepting) }
    }

    /// Where it listens.
    pub fn uri(&self) -> String {
        format!("tcp:{}", self.address)
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// How many connections it has made onward.
    pub fn connected(&self) -> usize {
        self.shared.connected.load(Ordering::Relaxed)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::Relaxed);
        // Wakes the thread that accepts, unless its queue holds another connection already.
        let wakes = TcpStream::connect_timeout(&self.address, Duration::from_secs(10));
        if let (Ok(_), Some(accepting)) = (wakes, self.accepting.take()) {
            let _ = accepting.join();
        }
    }
}

impl Shared {
    fn forward(&self, mut source: TcpStream) -> io::Result<()> {
        let arrived = Instant::now();
        // Main's first four bytes, or a channel's hello up to its id.
        let mut first = vec![0; 4];
        source.read_exact(&mut first)?;
        let held = if first == *b"QEVM" {
            self.holds.main
        } else {
            first.resize(CHANNEL_ID_AT + 1, 0);
            source.read_exact(&mut first[4..])?;
            self.holds.channels[usize::from(first[CHANNEL_ID_AT])]
        };
        while held.is_none_or(|held| arrived.elapsed() < held) {
            if self.stopped.load(Ordering::Relaxed) {
                return Ok(());
            }
            let left = held.map_or(STEP, |held| held.saturating_sub(arrived.elapsed()));
            thread::sleep(left.min(STEP));
        }
        let mut destination = TcpStream::connect(self.onward)?;
        self.connected.fetch_add(1, Ordering::Relaxed);
        destination.write_all(&first)?;
        let (mut answers, mut back) = (destination.try_clone()?, source.try_clone()?);
        let answering = thread::spawn(move || pump(&mut answers, &mut back));
        pump(&mut source, &mut destination);
        let _ = answering.join();
        Ok(())
    }
}

/// Copies to the end and passes the end on; after an error, both directions end.
fn pump(from: &mut TcpStream, to: &mut TcpStream) {
    let copied = io::copy(from, to);
    let _ = to.shutdown(if copied.is_ok() { Shutdown::Write } else { Shutdown::Both });
    if copied.is_err() {
        let _ = from.shutdown(Shutdown::Both);
    }
}

/// A listener on this host whose accept queue has the least length there is.
pub fn short_queue() -> TcpListener {
    let socket = socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
    bind(&socket, &SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    listen(&socket, 1).unwrap();
    TcpListener::from(socket)
}

/// Where a hello has the channel's id.
const CHANNEL_ID_AT: usize = 24;
/// How soon a held connection notices the end of the proxy.
const STEP: Duration = Duration::from_millis(50);
