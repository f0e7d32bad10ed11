//! The suite for transports over each that this crate has, and what only sockets have.

use std::{
    io::{self, Read as _, Write as _},
    net::{Shutdown, TcpStream},
    os::{fd::AsFd, unix::net::UnixStream},
    sync::{OnceLock, mpsc},
    thread,
    time::Duration,
};

use fastrand::Rng;
use rustix::net::sockopt;
use test_support::{TempDir, time_limit};

use super::{faulty::Faults, memory};
use crate::{
    ram::{GuestRange, Ram},
    sync::Arc,
    sys::signals::interrupt,
    transport::{
        Connect, Listen, Pending, RecvHalf, SendHalf, Stream, ZeroCopyCounters,
        conformance::{self, Transport, with_checks},
        fd::{FdConnector, FdListener},
        record::Recording,
        socket::{SocketListener, SocketStream},
        tcp::{self, TcpConnector},
        unix::{self, UnixConnector},
        uri::Uri,
        vsock::{self, VsockConnector},
        wrapped,
    },
};

fn over_memory() -> Transport {
    let (listener, connector) = memory::listener(100_000);
    Transport::new(listener, connector).without_clock()
}

fn over_tcp(host: &str) -> Transport {
    let listener = tcp::listen(host, 0).unwrap();
    let connector = tcp_connector(&listener);
    Transport::new(listener, connector)
}

fn over_tcp_zero_copy() -> Transport {
    let listener = tcp::listen("127.0.0.1", 0).unwrap();
    let connector = WithoutCopy(tcp_connector(&listener));
    Transport::new(listener, connector)
}

fn over_unix() -> Transport {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("s");
    let listener = unix::listen(&path).unwrap();
    Transport::new(listener, UnixConnector::new(path)).owned_by(dir)
}

/// Within this machine.
///
/// # Errors
/// Why there is none here. It is found out once: the kernel takes two seconds for it.
fn over_vsock() -> Result<Transport, String> {
    static WORKS: OnceLock<Result<(), String>> = OnceLock::new();

    fn open() -> io::Result<(SocketListener, VsockConnector)> {
        let listener = vsock::listen(vsock::ANY_CID, vsock::ANY_PORT)?;
        let Uri::Vsock { port, .. } = *listener.uri() else { panic!("{}", listener.uri()) };
        Ok((listener, VsockConnector::new(1, port)))
    }

    let works = WORKS.get_or_init(|| {
        let connected = open().and_then(|(_listener, connector)| connector.connect());
        connected.map(drop).map_err(|error| error.to_string())
    });
    works.clone()?;
    let (listener, connector) = open().map_err(|error| error.to_string())?;
    Ok(Transport::new(listener, connector))
}

/// A listening socket that another part of the process opened.
fn over_inherited_listener() -> Transport {
    let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    let listener = FdListener::new(socket.into(), Uri::from(address)).unwrap();
    Transport::new(listener, TcpConnector::new(address.ip().to_string(), address.port()))
}

/// One connection, as far as this transport goes.
fn over_socket_pair() -> Transport {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let listener = FdListener::new(ours.into(), Uri::Fd(3)).unwrap();
    Transport::new(listener, FdConnector::new(theirs.into()).unwrap()).single()
}

fn over_recorded() -> Transport {
    let dir = TempDir::new().unwrap();
    let listener = tcp::listen("127.0.0.1", 0).unwrap();
    let connector = tcp_connector(&listener);
    Transport::new(Recording::new(dir.path()).unwrap().listener(Box::new(listener)), connector).owned_by(dir)
}

/// Under a plan without faults.
fn over_faulty() -> Transport {
    let listener = tcp::listen("127.0.0.1", 0).unwrap();
    let connector = tcp_connector(&listener);
    let faults = Faults::new();
    Transport::new(faults.listener(Box::new(listener)), faults.connector(Box::new(connector)))
}

/// The same with TLS on top.
#[cfg(feature = "tls")]
fn with_tls(listener: impl Listen + 'static, connector: impl Connect + Send + Sync + 'static) -> Transport {
    use crate::transport::tls::{ClientCertificates, ClientCredentials, ServerCredentials, TlsConnector, TlsListener};
    let dir = super::certificates::directory("localhost");
    let server = ServerCredentials::from_dir(dir.path(), ClientCertificates::Required).unwrap();
    let client = ClientCredentials::from_dir(dir.path()).unwrap();
    let connector = TlsConnector::new(Box::new(connector), client, "localhost").unwrap();
    Transport::new(TlsListener::new(Box::new(listener), server), connector)
}

#[cfg(feature = "tls")]
fn over_tls_over_tcp() -> Transport {
    let listener = tcp::listen("127.0.0.1", 0).unwrap();
    let connector = tcp_connector(&listener);
    with_tls(listener, connector)
}

#[cfg(feature = "tls")]
fn over_tls_over_unix() -> Transport {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("s");
    let listener = unix::listen(&path).unwrap();
    with_tls(listener, UnixConnector::new(path)).owned_by(dir)
}

/// Connections that send without copies.
struct WithoutCopy(TcpConnector);

impl Connect for WithoutCopy {
    fn dial(&self) -> io::Result<Box<dyn Pending>> {
        Ok(wrapped(self.0.dial()?, |mut stream| {
            stream.send_without_copy(&Arc::default())?;
            Ok(stream)
        }))
    }
}

fn tcp_connector(listener: &SocketListener) -> TcpConnector {
    let Uri::Tcp { host, port } = listener.uri() else { panic!("{}", listener.uri()) };
    TcpConnector::new(host, *port)
}

/// Runs each check on each transport; the transports that are one connection leave out those that need more.
macro_rules! conformance {
    ($($check:ident)*; $($listening:ident)*) => {
        conformance! { @ over_memory, over_memory(); $($check)* $($listening)* }
        conformance! { @ over_tcp_v4, over_tcp("127.0.0.1"); $($check)* $($listening)* }
        conformance! { @ over_tcp_zero_copy, over_tcp_zero_copy(); $($check)* $($listening)* }
        conformance! { @ over_unix, over_unix(); $($check)* $($listening)* }
        conformance! { @ over_recorded, over_recorded(); $($check)* $($listening)* }
        conformance! { @ over_faulty, over_faulty(); $($check)* $($listening)* }
        #[cfg(feature = "tls")]
        conformance! { @ over_tls_over_tcp, over_tls_over_tcp(); $($check)* $($listening)* }
        #[cfg(feature = "tls")]
        conformance! { @ over_tls_over_unix, over_tls_over_unix(); $($check)* $($listening)* }
        conformance! { @ over_inherited_listener, over_inherited_listener(); $($check)* $($listening)* }
        conformance! { @ over_socket_pair, over_socket_pair(); $($check)* }
        conformance! { @ over_tcp_v6, {
            if std::net::TcpListener::bind("[::1]:0").is_err() {
                return test_support::skip("no IPv6 on this machine");
            }
            over_tcp("::1")
        }; $($check)* $($listening)* }
        conformance! { @ over_vsock_within_this_machine, {
            match over_vsock() {
                Ok(transport) => transport,
                Err(error) => return test_support::skip(&error),
            }
        }; $($check)* $($listening)* }
    };
    (@ $transport:ident, $new:expr; $($check:ident)*) => {
        mod $transport {
            use super::*;
            $(#[test]
            fn $check() {
                let transport = $new;
                time_limit(LIMIT, || conformance::$check(transport));
            })*
        }
    };
}

with_checks!(conformance);

// What only sockets have.

#[test]
fn sends_and_receives_that_signals_interrupt_are_resumed() {
    let tcp = || {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        [ours, listener.accept().unwrap().0].map(|socket| SocketStream::new(socket.into()).unwrap())
    };
    let [ours, theirs] = tcp();
    time_limit(LIMIT, || transfer_interrupted(ours, theirs));
    let [mut ours, theirs] = tcp();
    let counters = Arc::new(ZeroCopyCounters::default());
    ours.send_without_copy(&counters).unwrap();
    time_limit(LIMIT, || transfer_interrupted(ours, theirs));
    let sends = counters.zero_copied() + counters.copied();
    assert!(sends > INTERRUPTED_WRITES, "{sends} sends: none moved only a part");
    let pair: [UnixStream; 2] = UnixStream::pair().unwrap().into();
    let [ours, theirs] = pair.map(|socket| SocketStream::new(socket.into()).unwrap());
    time_limit(LIMIT, || transfer_interrupted(ours, theirs));
}

/// Sends 512 KiB of single pages several times; every read is preceded by a signal to the writer, every write by one to
/// the reader.
fn transfer_interrupted(mut ours: SocketStream, mut theirs: SocketStream) {
    sockopt::set_socket_send_buffer_size(ours.as_fd(), 20_000).unwrap();
    let (from, to) = (Ram::for_test(&[("a", 256)]), Ram::for_test(&[("a", 256)]));
    fill(&from, 256);
    fn every_other(ram: &Ram) -> Vec<GuestRange<'_>> {
        (0..256).step_by(2).map(|page| ram.page(page).unwrap()).collect()
    }
    let (turn, next) = mpsc::sync_channel(0);
    let writer = thread::spawn({
        let from = from.clone();
        move || {
            for _ in 0..INTERRUPTED_WRITES {
                ours.write(b"header", &every_other(&from)).unwrap();
            }
            ours.flush().unwrap();
        }
    });
    let reader = thread::spawn({
        let to = to.clone();
        move || {
            for () in next {
                theirs.read_exact(&mut [0; 6]).unwrap();
                theirs.read_pages(&every_other(&to)).unwrap();
                for (sent, arrived) in every_other(&from).iter().zip(every_other(&to)) {
                    assert!(bytes(sent) == bytes(&arrived), "{sent:?} differs from {arrived:?}");
                    arrived.clear();
                }
            }
        }
    });
    for _ in 0..INTERRUPTED_WRITES {
        // Long enough for the writer to fill what is in between and block.
        for _ in 0..3 {
            thread::sleep(Duration::from_millis(2));
            interrupt(&writer);
        }
        turn.send(()).unwrap();
        interrupt(&reader);
    }
    drop(turn);
    writer.join().unwrap();
    reader.join().unwrap();
}

const INTERRUPTED_WRITES: u64 = 20;

/// The header's buffer is the caller's again as soon as `write` returns, also while the kernel still reads the pages.
#[test]
fn with_zero_copy_the_header_may_be_reused_at_once() {
    let mut transport = over_tcp_zero_copy();
    let (mut ours, mut theirs) = transport.connect();
    let ram = Ram::for_test(&[("a", 1)]);
    let writer = thread::spawn(move || {
        let page = [ram.page(0).unwrap()];
        let mut header = [0; 1344];
        for packet in 0..=255 {
            header.fill(packet);
            ours.write(&header, &page).unwrap();
            header.fill(!packet);
        }
        ours.flush().unwrap();
    });
    let to = Ram::for_test(&[("a", 1)]);
    for packet in 0..=255 {
        let mut header = [0; 1344];
        theirs.read_exact(&mut header).unwrap();
        assert_eq!(header, [packet; 1344]);
        theirs.read_pages(&[to.page(0).unwrap()]).unwrap();
    }
    writer.join().unwrap();
}

#[test]
fn flush_waits_until_the_kernel_has_let_go_of_every_page() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let mut theirs = listener.accept().unwrap().0;
    let mut ours = SocketStream::new(ours.into()).unwrap();
    let counters = Arc::new(ZeroCopyCounters::default());
    ours.send_without_copy(&counters).unwrap();
    let (written, is_written) = mpsc::channel();
    let writer = thread::spawn(move || {
        let ram = Ram::for_test(&[("a", 1)]);
        ram.page(0).unwrap().write(&[7; 4096]);
        for _ in 0..500 {
            ours.write(b"h", &[ram.page(0).unwrap()]).unwrap();
        }
        ours.flush().unwrap();
        // Were the kernel still to read the page, some of these would arrive.
        ram.page(0).unwrap().write(&[9; 4096]);
        written.send(()).unwrap();
        ours
    });
    let mut received = vec![0; 500 * 4097];
    theirs.read_exact(&mut received).unwrap();
    assert!(received.chunks(4097).all(|packet| packet[0] == b'h' && packet[1..] == [7; 4096]));
    is_written.recv_timeout(SOON).unwrap();
    assert_eq!(counters.zero_copied() + counters.copied(), 500);
    drop(writer.join().unwrap());
}

/// 64 pages on their way to a peer that does not read yet, with room for a part of them only: the rest is still guest
/// memory. Then `flush` if asked for, which cannot end before the peer reads, and other content for the same pages.
/// Returns what arrives.
fn written_again_after_a_send(flush: bool) -> Vec<u8> {
    const PAGES: usize = 64;
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    sockopt::set_socket_recv_buffer_size(&listener, 32 << 10).unwrap();
    let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let mut theirs = listener.accept().unwrap().0;
    let mut ours = SocketStream::new(ours.into()).unwrap();
    sockopt::set_socket_send_buffer_size(ours.as_fd(), 4 << 20).unwrap();
    let counters = Arc::new(ZeroCopyCounters::default());
    ours.send_without_copy(&counters).unwrap();
    let ram = Ram::for_test(&[("a", PAGES)]);
    let writer = {
        let ram = ram.clone();
        thread::spawn(move || {
            for page in 0..PAGES as u64 {
                let page = ram.page(page).unwrap();
                page.write(&[7; 4096]);
                ours.write(&[], &[page]).unwrap();
            }
            if flush {
                ours.flush().unwrap();
            }
            (0..PAGES as u64).for_each(|page| ram.page(page).unwrap().write(&[9; 4096]));
            ours
        })
    };
    thread::sleep(Duration::from_millis(200));
    assert_eq!(writer.is_finished(), !flush, "nobody has read");
    let mut received = vec![0; PAGES * 4096];
    theirs.read_exact(&mut received).unwrap();
    let mut ours = time_limit(LIMIT, || writer.join().unwrap());
    ours.flush().unwrap();
    assert_eq!((counters.copied(), counters.flushes_with_copies()), (PAGES as u64, 1), "as always on loopback");
    received
}

#[test]
fn flush_waits_for_a_peer_that_has_not_read() {
    assert!(written_again_after_a_send(true).iter().all(|&byte| byte == 7));
}

/// The negative control of the test before: so this is what flush protects from.
#[test]
fn without_flush_the_kernel_sends_what_is_written_after_the_send() {
    let received = written_again_after_a_send(false);
    assert!(
        received.starts_with(&[7]) && received.ends_with(&[9]),
        "{:?}",
        received.iter().position(|&byte| byte == 9)
    );
}

#[test]
fn stop_releases_a_flush_that_waits_for_the_peer() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let theirs = listener.accept().unwrap().0;
    sockopt::set_socket_recv_buffer_size(&theirs, 1).unwrap();
    let mut ours = SocketStream::new(ours.into()).unwrap();
    ours.send_without_copy(&Arc::default()).unwrap();
    let stopper = ours.stopper().unwrap();
    let ram = Ram::for_test(&[("a", 64)]);
    let flusher = thread::spawn(move || {
        let pages: Vec<_> = (0..64).map(|page| ram.page(page).unwrap()).collect();
        ours.write(b"h", &pages).and_then(|()| ours.flush()).unwrap_err().kind()
    });
    thread::sleep(Duration::from_millis(100));
    assert!(!flusher.is_finished(), "nobody reads, so the pages are still the kernel's");
    stopper.stop();
    let kind = time_limit(LIMIT, || flusher.join().unwrap());
    assert_eq!(kind, io::ErrorKind::BrokenPipe);
}

#[test]
fn zero_copy_is_refused_where_the_socket_does_not_have_it() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let mut ours = SocketStream::new(ours.into()).unwrap();
    let error = ours.send_without_copy(&Arc::default()).unwrap_err();
    assert_eq!(error.to_string(), "the kernel has it for TCP, not for this kind of socket");
    ours.write(b"copied", &[]).unwrap();
    ours.flush().unwrap();
}

#[test]
fn a_peer_that_ended_its_direction_still_takes_bytes() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut raw = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let mut ours = SocketStream::new(listener.accept().unwrap().0.into()).unwrap();
    raw.write_all(b"last").unwrap();
    raw.shutdown(Shutdown::Write).unwrap();
    ours.read_exact(&mut [0; 4]).unwrap();
    assert_eq!(ours.read(&mut [0]).unwrap(), 0);
    ours.write(b"answer", &[]).unwrap();
    drop(ours);
    let mut answer = String::new();
    raw.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "answer");
}

#[test]
fn an_inherited_non_blocking_socket_blocks_again() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let connector = FdConnector::new(ours.into()).unwrap();
    let mut ours = connector.connect().unwrap();
    let reader = thread::spawn(move || ours.read(&mut [0; 1]).unwrap());
    thread::sleep(Duration::from_millis(20));
    (&theirs).write_all(b"x").unwrap();
    assert_eq!(reader.join().unwrap(), 1);
    let error = connector.connect().err().unwrap();
    assert!(error.to_string().contains("needs an address"), "{error}");
}

/// A destination looks for channels after it has accepted main: the answer was an error, which ended every migration.
#[test]
fn a_connected_socket_is_one_connection_and_then_a_listener_to_which_no_more_come() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut listener = FdListener::new(ours.into(), Uri::Fd(3)).unwrap();
    let mut stream = listener.accept(None).unwrap().establish(None).unwrap();
    (&theirs).write_all(b"x").unwrap();
    stream.read_exact(&mut [0]).unwrap();
    let error = listener.accept(Some(Duration::from_millis(5))).err().unwrap();
    assert_eq!(error.kind(), std::io::ErrorKind::TimedOut);
    let stopper = listener.stopper().unwrap();
    let waiting = thread::spawn(move || (listener.accept(None).err().unwrap().kind(), listener));
    thread::sleep(Duration::from_millis(20));
    stopper.stop();
    let (kind, mut listener) = waiting.join().unwrap();
    assert_eq!(kind, std::io::ErrorKind::Interrupted);
    assert!(listener.try_accept().unwrap().is_none());
}

#[test]
fn what_is_no_stream_socket_is_refused_by_name() {
    let file = std::fs::File::open("/dev/null").unwrap();
    let error = FdConnector::new(file.into()).err().unwrap();
    assert_eq!(error.to_string(), "it is not a socket");
    let datagram = std::os::unix::net::UnixDatagram::unbound().unwrap();
    let error = FdConnector::new(datagram.into()).err().unwrap();
    assert_eq!(error.to_string(), "it is a socket, but not a stream socket");
    let listening = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    assert!(FdConnector::new(listening.into()).is_err());
}

#[test]
fn tcp_sends_at_once_and_notices_dead_hosts() {
    let mut transport = over_tcp("127.0.0.1");
    let ours = TcpStream::connect({
        let Transport { connector, .. } = &transport;
        let peer = connector.connect().unwrap().peer();
        peer.strip_prefix("tcp:").unwrap().to_owned()
    })
    .unwrap();
    let stream = SocketStream::new(ours.into()).unwrap();
    assert!(sockopt::tcp_nodelay(stream.as_fd()).unwrap());
    assert!(sockopt::socket_keepalive(stream.as_fd()).unwrap());
    transport.listener.try_accept().unwrap();
}

/// The kernel tried for a quarter of an hour to send to a host that was gone; and a limit for each packet was no use where the
/// peer's host answers and its process does not read.
#[test]
fn a_peer_that_takes_nothing_ends_the_connection_at_its_limit() {
    time_limit(LIMIT, || {
        let (mut ours, theirs) = over_tcp("127.0.0.1").connect();
        ours.limit_untaken(Some(Duration::from_millis(500))).unwrap();
        let ram = Ram::for_test(&[("a", 1024)]);
        fill(&ram, 1024);
        let pages: Vec<GuestRange<'_>> = (0..1024).map(|page| ram.page(page).unwrap()).collect();
        let error = (0..100).find_map(|_| ours.write(&[], &pages).err()).expect("it takes 400 MB that nothing reads");
        assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
        drop(theirs);
    });
}

#[test]
fn every_transport_takes_a_limit_for_what_is_not_taken_and_none() {
    for mut transport in [over_memory(), over_unix(), over_tcp("127.0.0.1"), over_recorded(), over_faulty()] {
        let (mut ours, theirs) = transport.connect();
        for limit in [Some(Duration::from_nanos(1)), None, Some(Duration::MAX)] {
            ours.limit_untaken(limit).unwrap();
        }
        let (mut sends, _receives) = theirs.split().unwrap();
        sends.limit_untaken(Some(Duration::from_secs(1))).unwrap();
    }
}

fn fill(ram: &Ram, pages: u64) {
    let mut random = Rng::with_seed(42);
    for page in 0..pages {
        let content: Vec<u8> = (0..512).flat_map(|_| random.u64(..).to_le_bytes()).collect();
        ram.page(page).unwrap().write(&content);
    }
}

fn bytes(range: &GuestRange<'_>) -> Vec<u8> {
    let mut bytes = vec![0; range.len()];
    range.read(&mut bytes);
    bytes
}

/// For what happens at once, with room for a busy machine.
const SOON: Duration = Duration::from_secs(10);

/// For a whole check.
const LIMIT: Duration = Duration::from_secs(60);
