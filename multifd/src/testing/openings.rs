//! How channels are opened: all at the same time, and again where a connection was reset before it counted.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

use test_support::time_limit;

use super::{
    far::{Far, Look},
    faulty::{Fault, Faults},
    memory,
    vm::{TestDestination, TestSource},
};
use crate::{
    clock::Clock,
    destination::{self, Destination},
    error::{Connection, Error, Place},
    ram::Ram,
    source::{self, Source},
    transport::{Connect, Listen, Pending, Stopper, socket::SocketListener, tcp::TcpConnector, uri::Uri, wrapped},
};

const PAGES: u64 = 300;

fn filled() -> Ram {
    let ram = Ram::for_test(&[("ram", PAGES as usize)]);
    (0..PAGES).for_each(|page| ram.page(page).unwrap().write(&(page + 1).to_ne_bytes().repeat(512)));
    ram
}

/// Migrates a guest over `channels`. On success of both, the destination has its memory.
fn migrate(
    listener: Box<dyn Listen>,
    connector: &dyn Connect,
    channels: u8,
) -> (Result<source::Report, Error>, Result<destination::Report, Error>, TestSource) {
    migrate_with(listener, connector, channels, source::Options::default())
}

fn migrate_with(
    listener: Box<dyn Listen>,
    connector: &dyn Connect,
    channels: u8,
    mut options: source::Options,
) -> (Result<source::Report, Error>, Result<destination::Report, Error>, TestSource) {
    options.plan.channels = channels;
    let mut vm = TestSource::new(filled());
    time_limit(Duration::from_secs(120), || {
        std::thread::scope(|scope| {
            let destination = scope.spawn(|| {
                let mut to = TestDestination::new(Ram::for_test(&[("ram", PAGES as usize)]));
                let received = Destination::new(destination::Options::default()).run(&mut to, listener, &mut ());
                (received, to.ram)
            });
            let sent = Source::new(options).run(&mut vm, connector, &mut ());
            let (received, ram) = destination.join().unwrap();
            if sent.is_ok() && received.is_ok() {
                let ours = vm.writer_ram();
                assert!((0..PAGES).all(|page| ram.page_bytes(page) == ours.page_bytes(page)));
            }
            (sent, received, vm)
        })
    })
}

/// The connection has not reached the destination's process, and is reset.
fn reset_unheard() -> Look {
    let looks = AtomicU64::new(0);
    Box::new(move || match looks.fetch_add(1, SeqCst) {
        0..2 => Ok(64),
        _ => Err(io::ErrorKind::ConnectionReset.into()),
    })
}

#[test]
fn a_channel_that_is_reset_before_its_hello_is_there_is_dialed_again() {
    let (listener, connector) = memory::listener(100_000);
    let heard = || -> Look { Box::new(|| Ok(0)) };
    // Main, two channels, of which each is reset at first, and once more one of them.
    let connector =
        Far::new(connector, |dialed| Some(if (1..4).contains(&dialed) { reset_unheard() } else { heard() }));
    let (sent, received, _) = migrate(Box::new(listener), &connector, 2);
    sent.unwrap();
    assert_eq!((received.unwrap().channels, connector.dialed()), (2, 6));
}

#[test]
fn a_channel_that_is_never_heard_fails_the_migration_in_the_end() {
    let (listener, connector) = memory::listener(100_000);
    let connector = Far::new(connector, |dialed| (dialed > 0).then(reset_unheard));
    let (sent, received, vm) = migrate(Box::new(listener), &connector, 1);
    let error = sent.unwrap_err();
    assert!(
        matches!(&error, Error::Io { at: Place { connection: Connection::Channel(_), .. }, source }
        if source.kind() == io::ErrorKind::ConnectionReset),
        "{error}"
    );
    assert!(received.is_err() && vm.writer.is_running());
    assert_eq!(connector.dialed(), 1 + 16);
}

/// A channel whose hello is there at look number `heard_at`, with four seconds for that and looks that are a second apart. Returns what
/// became of the migration, and how many connections and looks there were.
fn heard_late(heard_at: u64) -> (Result<source::Report, Error>, u64, u64) {
    let (listener, connector) = memory::listener(100_000);
    let looks = Arc::new(AtomicU64::new(0));
    let clock = {
        let looks = looks.clone();
        Clock::from_fn(move || Duration::from_secs(100 + looks.load(SeqCst)))
    };
    let look = looks.clone();
    let connector = Far::new(connector, move |dialed| {
        let (look, begun) = (look.clone(), look.load(SeqCst));
        (dialed > 0).then(|| -> Look {
            Box::new(move || Ok(if look.fetch_add(1, SeqCst) + 1 - begun >= heard_at { 0 } else { 64 }))
        })
    });
    let options = source::Options { clock, ..source::Options::default() };
    let (sent, received, vm) = migrate_with(Box::new(listener), &connector, 1, options);
    assert_eq!((sent.is_ok(), vm.writer.is_running()), (received.is_ok(), received.is_err()));
    (sent, connector.dialed(), looks.load(SeqCst))
}

#[test]
fn a_hello_has_four_seconds_to_be_there_and_no_more() {
    let (sent, dialed, _) = heard_late(5);
    sent.unwrap();
    assert_eq!(dialed, 2);
    let (sent, dialed, looks) = heard_late(6);
    let error = sent.unwrap_err().to_string();
    assert!(error.ends_with("the destination's host answers, and does not take the first bytes"), "{error}");
    assert_eq!((dialed, looks), (1 + 16, 5 * 16));
}

/// Cuts the first channel at one of its writes.
struct CutAt {
    inner: memory::MemoryConnector,
    write: u64,
    dialed: AtomicU64,
}

impl Connect for CutAt {
    fn dial(&self) -> io::Result<Box<dyn Pending>> {
        let pending = self.inner.dial()?;
        if self.dialed.fetch_add(1, SeqCst) != 1 {
            return Ok(pending);
        }
        let faults = Faults::new().at(self.write, Fault::Cut);
        Ok(wrapped(pending, move |stream| Ok(Box::new(faults.stream(stream)))))
    }
}

/// From its first SYNC on a channel may be the only one to have a page.
#[test]
fn only_a_channel_that_does_not_count_yet_is_dialed_again() {
    for (write, dialed) in [(0, 3), (1, 2)] {
        let (listener, inner) = memory::listener(100_000);
        let connector = CutAt { inner, write, dialed: AtomicU64::new(0) };
        let (sent, received, vm) = migrate(Box::new(listener), &connector, 1);
        let moves = dialed == 3;
        assert_eq!((sent.is_ok(), received.is_ok(), vm.writer.is_running()), (moves, moves, !moves), "{sent:?}");
        assert_eq!(connector.dialed.load(SeqCst), dialed);
        if let Err(error) = sent {
            // Behind the hello.
            assert!(matches!(&error, Error::Io { at: Place { offset: 64, .. }, .. }), "{error}");
        }
    }
}

/// A listener with room for one connection at a time.
struct Narrow(SocketListener);

impl Narrow {
    fn new() -> (Narrow, TcpConnector) {
        let socket = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let (address, queue) = (socket.local_addr().unwrap(), socket.try_clone().unwrap());
        let listener = SocketListener::new(socket.into(), Uri::from(address)).unwrap();
        rustix::net::listen(&queue, 1).unwrap();
        (Narrow(listener), TcpConnector::new("127.0.0.1", address.port()))
    }
}

impl Listen for Narrow {
    fn accept(&mut self, timeout: Option<Duration>) -> io::Result<Box<dyn Pending>> {
        // The others come meanwhile.
        std::thread::sleep(Duration::from_millis(20));
        self.0.accept(timeout)
    }

    fn try_accept(&mut self) -> io::Result<Option<Box<dyn Pending>>> {
        self.0.try_accept()
    }

    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        self.0.stopper()
    }
}

/// Channels that were connected at the same time looked established, and were reset when they spoke. `MULTIFD_NARROW` sets how many
/// migrations over 16 channels are tried.
#[test]
fn no_channel_is_lost_in_a_short_accept_queue() {
    let wanted = std::env::var("MULTIFD_NARROW").ok().map(|text| text.parse::<u32>().expect("a number"));
    // Most of the time is the kernel's, before it sends a SYN again.
    let channels = if wanted.is_some() { 16 } else { 4 };
    for _ in 0..wanted.unwrap_or(1) {
        let (listener, connector) = Narrow::new();
        let (sent, received, _) = migrate(Box::new(listener), &connector, channels);
        sent.unwrap();
        assert_eq!(received.unwrap().channels, usize::from(channels));
    }
}

/// What a source waits for before its first SYNC, and before it pauses its guest.
#[test]
fn tcp_tells_what_the_other_host_does_not_have_and_that_a_connection_was_reset() {
    time_limit(Duration::from_secs(60), || {
        let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let mut ours = TcpConnector::new("127.0.0.1", listener.local_addr().unwrap().port()).connect().unwrap();
        let (theirs, _) = listener.accept().unwrap();
        let meter = ours.meter().unwrap().expect("TCP can tell");
        let until = |holds: fn(u64) -> bool| {
            while !holds(meter.transit().unwrap().unacknowledged) {
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        ours.write(&[1; 64], &[]).unwrap();
        until(|unacknowledged| unacknowledged == 0);
        // More than the other host takes while nothing reads there.
        let filling = std::thread::spawn(move || {
            ours.write(&[2; 64 << 20], &[]).unwrap_err();
            ours
        });
        until(|unacknowledged| unacknowledged > 1000);
        // With bytes that were not read the connection is reset.
        drop(theirs);
        let _ours = filling.join().unwrap();
        assert_eq!(meter.transit().unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    });
}

#[test]
fn a_unix_socket_does_not_tell() {
    let (ours, _theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let ours = crate::transport::socket::SocketStream::new(ours.into()).unwrap();
    assert!(crate::transport::Stream::meter(&ours).unwrap().is_none());
}
