//! The suite that every [transport](super) passes: bytes and pages arrive in order, every wait ends, ends are told apart.
//!
//! Authors of VMMs run it against transports of their own (feature `conformance`): wrap a listener and what reaches it into a
//! [`Transport`], and call [`conformance`] with what makes a new one.

use std::{
    io,
    sync::mpsc::{self, RecvTimeoutError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use multifd_proto::BlockName;

use super::{Connect, Listen, Pending, Stream};
use crate::ram::{GuestRange, Ram, RamBlock};

/// A listener, and what reaches it.
pub struct Transport {
    pub(crate) listener: Box<dyn Listen>,
    pub(crate) connector: Box<dyn Connect + Send>,
    has_clock: bool,
    is_single: bool,
    /// Dropped after them.
    _owner: Box<dyn Send>,
}

impl Transport {
    /// `connector`, whose connections arrive at `listener`.
    pub fn new(listener: impl Listen + 'static, connector: impl Connect + Send + 'static) -> Transport {
        Transport {
            listener: Box::new(listener),
            connector: Box::new(connector),
            has_clock: true,
            is_single: false,
            _owner: Box::new(()),
        }
    }

    /// The same, whose waits ignore their time limits.
    #[must_use]
    pub fn without_clock(self) -> Transport {
        Transport { has_clock: false, ..self }
    }

    /// The same, which has one connection only.
    #[must_use]
    pub fn single(self) -> Transport {
        Transport { is_single: true, ..self }
    }

    /// The same, which keeps `owner`, such as a directory of sockets.
    #[must_use]
    pub fn owned_by(self, owner: impl Send + 'static) -> Transport {
        Transport { _owner: Box::new(owner), ..self }
    }

    /// One connection: the side that opened it, and the one that accepted it.
    pub(crate) fn connect(&mut self) -> (Box<dyn Stream>, Box<dyn Stream>) {
        let ours = begin(&*self.connector);
        let theirs = self.listener.accept(Some(SOON)).unwrap().establish(Some(LIMIT)).unwrap();
        (ours.join().unwrap().unwrap(), theirs)
    }
}

/// Begins a connection in a thread: it may need the other end to be established.
fn begin(connector: &dyn Connect) -> JoinHandle<io::Result<Box<dyn Stream>>> {
    let pending = connector.dial().unwrap();
    thread::spawn(move || pending.establish(Some(LIMIT)))
}

/// A connection that was begun, once it is there.
fn arrived(listener: &mut dyn Listen) -> Box<dyn Pending> {
    loop {
        if let Some(pending) = listener.try_accept().unwrap() {
            return pending;
        }
        thread::sleep(Duration::from_millis(1));
    }
}

/// Runs every check of the suite, each on a transport of its own that `open` makes.
///
/// # Panics
/// If the transport does not pass, with the name of the check, which says what should hold; also if a check takes more than
/// 60 s: something waits without end.
///
/// # Examples
/// ```
/// # #[cfg(feature = "conformance")]
/// # {
/// use multifd::transport::{conformance::{Transport, conformance}, tcp::{self, TcpConnector}, uri::Uri};
///
/// # fn run() {
/// conformance(|| {
///     let listener = tcp::listen("127.0.0.1", 0).unwrap();
///     let Uri::Tcp { host, port } = listener.uri().clone() else { unreachable!() };
///     Transport::new(listener, TcpConnector::new(host, port))
/// });
/// # }
/// # }
/// ```
pub fn conformance(mut open: impl FnMut() -> Transport) {
    for (name, check) in ON_ONE_CONNECTION {
        run(name, *check, open());
    }
    for (name, check) in ON_MANY_CONNECTIONS {
        let transport = open();
        if !transport.is_single {
            run(name, *check, transport);
        }
    }
}

type Check = fn(Transport);

fn run(name: &'static str, check: Check, transport: Transport) {
    // Dropped at the end of the thread, also by a panic.
    let (running, ended) = mpsc::channel::<()>();
    let thread = thread::spawn(move || {
        let _running = running;
        check(transport);
    });
    assert_ne!(ended.recv_timeout(LIMIT), Err(RecvTimeoutError::Timeout), "{name}: not finished after {LIMIT:?}");
    assert!(thread.join().is_ok(), "the transport does not pass: {name}");
}

/// Passes the names of all checks to a macro: those for one connection, then those for a listener.
macro_rules! with_checks {
    ($macro:ident) => {
        $macro! {
            bytes_and_pages_of_any_size_arrive_in_order
            more_ranges_than_one_call_takes_arrive
            stop_releases_a_blocked_writer
            stop_releases_a_blocked_reader
            a_dropped_peer_ends_the_stream_after_its_bytes
            an_end_within_pages_is_an_error
            what_was_stopped_before_is_not_established
            an_accepted_connection_can_be_stopped_before_it_is_established
            a_stopper_outlives_its_connection_and_does_not_keep_it_open
            two_halves_read_and_write_at_the_same_time
            finish_ends_one_direction_and_the_other_goes_on
            an_interrupter_ends_the_wait_of_reads_and_nothing_else
            an_interrupted_read_waits_no_longer_than_its_timeout
            a_stopper_ends_the_halves_of_its_connection
            one_half_keeps_the_connection_open
            a_read_that_waits_too_long_times_out
            a_peer_that_is_gone_makes_writes_fail
            nothing_to_send_is_fine;
            stop_releases_a_blocked_accept
            every_connection_in_the_backlog_is_found
            accept_gives_up_after_its_timeout
        }
    };
}
#[cfg(all(test, not(any(loom, shuttle))))]
pub(crate) use with_checks;

macro_rules! tables {
    ($($check:ident)*; $($listening:ident)*) => {
        const ON_ONE_CONNECTION: &[(&str, Check)] = &[$((stringify!($check), $check)),*];
        const ON_MANY_CONNECTIONS: &[(&str, Check)] = &[$((stringify!($listening), $listening)),*];
    };
}

with_checks!(tables);

pub(crate) fn bytes_and_pages_of_any_size_arrive_in_order(mut transport: Transport) {
    let (mut ours, mut theirs) = transport.connect();
    let from = ram(4096, 300);
    let to = ram(4096, 300);
    let mut random = Random(1);
    fill(&from, 300, &mut random);
    let packets = packets(40, 300, &mut random);
    thread::scope(|scope| {
        scope.spawn(|| {
            for packet in &packets {
                ours.write(&packet.header, &packet.ranges(&from)).unwrap();
            }
            ours.flush().unwrap();
        });
        for packet in &packets {
            let mut header = vec![0; packet.header.len()];
            theirs.read_exact(&mut header).unwrap();
            assert_eq!(header, packet.header);
            let ranges = packet.ranges(&to);
            theirs.read_pages(&ranges).unwrap();
            for (sent, arrived) in packet.ranges(&from).iter().zip(&ranges) {
                assert!(bytes(sent) == bytes(arrived), "{sent:?} differs from {arrived:?}");
                arrived.clear();
            }
        }
    });
}

pub(crate) fn more_ranges_than_one_call_takes_arrive(mut transport: Transport) {
    let (mut ours, mut theirs) = transport.connect();
    let pages = 2 * 1100;
    let from = ram(1024, pages);
    let to = ram(1024, pages);
    for page in 0..pages as u64 {
        from.page(page).unwrap().write(&[page as u8 | 1; 1024]);
    }
    // Every other page, backwards: nothing to join.
    let every_other = || (0..pages as u64).rev().step_by(2);
    thread::scope(|scope| {
        scope.spawn(|| {
            let ranges: Vec<_> = every_other().map(|page| from.page(page).unwrap()).collect();
            ours.write(b"h", &ranges).unwrap();
            ours.flush().unwrap();
        });
        theirs.read_exact(&mut [0]).unwrap();
        let ranges: Vec<_> = every_other().map(|page| to.page(page).unwrap()).collect();
        theirs.read_pages(&ranges).unwrap();
    });
    for page in 0..pages as u64 {
        let sent = if page % 2 == 1 { bytes(&from.page(page).unwrap()) } else { vec![0; 1024] };
        assert_eq!(bytes(&to.page(page).unwrap()), sent, "page {page}");
    }
}

pub(crate) fn stop_releases_a_blocked_writer(mut transport: Transport) {
    let (mut ours, _theirs) = transport.connect();
    let memory = ram(4096, 2048);
    let stopper = ours.stopper().unwrap();
    let (blocked, is_blocked) = mpsc::channel();
    thread::scope(|scope| {
        let writer = scope.spawn(move || {
            let pages: Vec<_> = (0..2048).map(|page| memory.page(page).unwrap()).collect();
            // Nobody reads, so this blocks once the buffers in between are full.
            loop {
                blocked.send(()).unwrap();
                if let Err(error) = ours.write(&[], &pages) {
                    // Also what waits for completions is released.
                    let _ = ours.flush();
                    return error.kind();
                }
            }
        });
        while is_blocked.recv_timeout(Duration::from_millis(200)).is_ok() {}
        stopper.stop();
        let kind = writer.join().unwrap();
        assert!(matches!(kind, io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset), "{kind:?}");
    });
}

pub(crate) fn stop_releases_a_blocked_reader(mut transport: Transport) {
    let (mut ours, _theirs) = transport.connect();
    let stopper = ours.stopper().unwrap();
    thread::scope(|scope| {
        let reader = scope.spawn(|| ours.read(&mut [0; 10]));
        thread::sleep(Duration::from_millis(50));
        stopper.stop();
        assert_eq!(reader.join().unwrap().unwrap(), 0);
    });
    assert_eq!(ours.read_exact(&mut [0]).unwrap_err().kind(), io::ErrorKind::UnexpectedEof, "and from now on");
    assert!(ours.write(b"x", &[]).is_err());
}

pub(crate) fn a_dropped_peer_ends_the_stream_after_its_bytes(mut transport: Transport) {
    let (mut ours, mut theirs) = transport.connect();
    ours.write(b"the end", &[]).unwrap();
    drop(ours);
    let mut received = [0; 7];
    theirs.read_exact(&mut received).unwrap();
    assert_eq!(&received, b"the end");
    assert_eq!(theirs.read(&mut received).unwrap(), 0);
    assert_eq!(theirs.read_exact(&mut received).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
}

pub(crate) fn what_was_stopped_before_is_not_established(transport: Transport) {
    let pending = transport.connector.dial().unwrap();
    assert!(!pending.peer().is_empty());
    pending.stopper().unwrap().stop();
    // A connected socket is there already, and has ended.
    if let Ok(mut stream) = pending.establish(Some(SOON)) {
        assert!(stream.write(b"x", &[]).is_err());
    }
}

pub(crate) fn an_accepted_connection_can_be_stopped_before_it_is_established(mut transport: Transport) {
    let ours = begin(&*transport.connector);
    let pending = transport.listener.accept(Some(SOON)).unwrap();
    assert!(!pending.peer().is_empty());
    pending.stopper().unwrap().stop();
    if let Ok(mut stream) = pending.establish(Some(SOON)) {
        assert!(!matches!(stream.read(&mut [0]), Ok(1..)));
    }
    // Established or not, it waits no longer.
    drop(ours.join().unwrap());
}

pub(crate) fn an_end_within_pages_is_an_error(mut transport: Transport) {
    let (mut ours, mut theirs) = transport.connect();
    let memory = ram(4096, 2);
    ours.write(&[7; 4096 + 100], &[]).unwrap();
    drop(ours);
    let pages = [memory.page(0).unwrap(), memory.page(1).unwrap()];
    assert_eq!(theirs.read_pages(&pages).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
}

pub(crate) fn a_stopper_outlives_its_connection_and_does_not_keep_it_open(mut transport: Transport) {
    let (ours, mut theirs) = transport.connect();
    let stopper = ours.stopper().unwrap();
    drop(ours);
    assert_eq!(theirs.read(&mut [0]).unwrap(), 0);
    stopper.stop();
}

pub(crate) fn two_halves_read_and_write_at_the_same_time(mut transport: Transport) {
    let (ours, theirs) = transport.connect();
    let count = 2000u32;
    let both_ways = |stream: Box<dyn Stream>| {
        let (mut sends, mut receives) = stream.split().unwrap();
        let read = thread::spawn(move || {
            for expected in 0..count {
                let mut bytes = [0; 4];
                receives.read_exact(&mut bytes).unwrap();
                assert_eq!(u32::from_be_bytes(bytes), expected);
            }
            receives
        });
        let write = thread::spawn(move || {
            for number in 0..count {
                sends.write(&number.to_be_bytes(), &[]).unwrap();
            }
            sends
        });
        (read, write)
    };
    for (read, write) in [both_ways(ours), both_ways(theirs)] {
        // Dropped when both are done: that would close the connection.
        let _halves = (read.join().unwrap(), write.join().unwrap());
    }
}

/// A half-close: what a side that has said all needs, which still waits for an answer.
pub(crate) fn finish_ends_one_direction_and_the_other_goes_on(mut transport: Transport) {
    let (ours, mut theirs) = transport.connect();
    let (mut sends, mut receives) = ours.split().unwrap();
    sends.write(b"all", &[]).unwrap();
    sends.finish().unwrap();
    sends.finish().unwrap();
    assert!(sends.write(b"more", &[]).is_err());
    let mut bytes = [0; 3];
    theirs.read_exact(&mut bytes).unwrap();
    assert_eq!((&bytes, theirs.read(&mut [0]).unwrap()), (b"all", 0));
    theirs.write(b"yes", &[]).unwrap();
    receives.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"yes");
    theirs.finish().unwrap();
    assert_eq!(receives.read(&mut [0]).unwrap(), 0);
}

/// A destination that is cancelled says so on the connection on which it waits.
pub(crate) fn an_interrupter_ends_the_wait_of_reads_and_nothing_else(mut transport: Transport) {
    let (ours, mut theirs) = transport.connect();
    let (mut sends, mut receives) = ours.split().unwrap();
    let interrupter = receives.interrupter().unwrap();
    theirs.write(b"x", &[]).unwrap();
    assert_eq!(receives.read(&mut [0; 10]).unwrap(), 1, "it reads as before");
    let reader = thread::spawn(move || {
        let kind = receives.read(&mut [0; 10]).unwrap_err().kind();
        (kind, receives)
    });
    thread::sleep(Duration::from_millis(50));
    interrupter.stop();
    let (kind, mut receives) = reader.join().unwrap();
    assert_eq!(kind, io::ErrorKind::ConnectionAborted);
    // The peer does not notice.
    theirs.write(b"go on", &[]).unwrap();
    assert_eq!(receives.read(&mut [0; 10]).unwrap_err().kind(), io::ErrorKind::ConnectionAborted, "and from now on");
    sends.write(b"bye", &[]).unwrap();
    drop((sends, receives));
    let mut bytes = [0; 3];
    theirs.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"bye");
}

pub(crate) fn an_interrupted_read_waits_no_longer_than_its_timeout(mut transport: Transport) {
    let (mut ours, _theirs) = transport.connect();
    let _interrupter = ours.interrupter().unwrap();
    ours.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    if transport.has_clock {
        let kind = ours.read(&mut [0]).unwrap_err().kind();
        assert!(matches!(kind, io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock), "{kind:?}");
    }
}

pub(crate) fn a_stopper_ends_the_halves_of_its_connection(mut transport: Transport) {
    let (ours, mut theirs) = transport.connect();
    let stopper = ours.stopper().unwrap();
    let (mut sends, mut receives) = ours.split().unwrap();
    stopper.stop();
    assert!(!matches!(receives.read(&mut [0]), Ok(1..)));
    assert!(sends.write(b"x", &[]).is_err());
    assert_eq!(theirs.read(&mut [0]).unwrap(), 0);
}

pub(crate) fn one_half_keeps_the_connection_open(mut transport: Transport) {
    let (ours, mut theirs) = transport.connect();
    let (sends, mut receives) = ours.split().unwrap();
    drop(sends);
    theirs.write(b"x", &[]).unwrap();
    assert_eq!(receives.read(&mut [0; 2]).unwrap(), 1);
    drop(receives);
    assert_eq!(theirs.read(&mut [0]).unwrap(), 0);
}

pub(crate) fn a_read_that_waits_too_long_times_out(mut transport: Transport) {
    let (mut ours, mut theirs) = transport.connect();
    theirs.set_read_timeout(Some(Duration::from_millis(30))).unwrap();
    if !transport.has_clock {
        return;
    }
    let begin = Instant::now();
    let kind = theirs.read(&mut [0]).unwrap_err().kind();
    assert!(matches!(kind, io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock), "{kind:?}");
    assert!(begin.elapsed() >= Duration::from_millis(20));
    theirs.set_read_timeout(Some(Duration::ZERO)).unwrap();
    assert!(theirs.read(&mut [0]).is_err(), "no time is not forever");
    theirs.set_read_timeout(None).unwrap();
    ours.write(b"x", &[]).unwrap();
    assert_eq!(theirs.read(&mut [0]).unwrap(), 1, "the connection is as good as before");
}

pub(crate) fn a_peer_that_is_gone_makes_writes_fail(mut transport: Transport) {
    let (mut ours, mut theirs) = transport.connect();
    // Unread bytes at the close make TCP reset the connection.
    ours.write(&[0; 1000], &[]).unwrap();
    theirs.read_exact(&mut [0; 10]).unwrap();
    drop(theirs);
    let memory = ram(4096, 16);
    let pages: Vec<_> = (0..16).map(|page| memory.page(page).unwrap()).collect();
    let error = loop {
        // The first ones may still fit into the buffers; a signal would end this process.
        if let Err(error) = ours.write(b"header", &pages) {
            break error;
        }
    };
    assert!(matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset), "{error:?}");
}

pub(crate) fn nothing_to_send_is_fine(mut transport: Transport) {
    let (mut ours, mut theirs) = transport.connect();
    ours.write(&[], &[]).unwrap();
    ours.flush().unwrap();
    theirs.read_pages(&[]).unwrap();
    theirs.read_exact(&mut []).unwrap();
    ours.write(b"x", &[]).unwrap();
    assert_eq!(theirs.read(&mut [0; 2]).unwrap(), 1);
}

pub(crate) fn stop_releases_a_blocked_accept(transport: Transport) {
    let stopper = transport.listener.stopper().unwrap();
    let mut listener = transport.listener;
    thread::scope(|scope| {
        let accept = scope.spawn(move || (listener.accept(None).err().map(|error| error.kind()), listener));
        thread::sleep(Duration::from_millis(50));
        stopper.stop();
        let (kind, mut listener) = accept.join().unwrap();
        assert_eq!(kind, Some(io::ErrorKind::Interrupted));
        assert!(listener.accept(Some(SOON)).is_err(), "and from now on");
        let ours = begin(&*transport.connector);
        // Also when stopped.
        drop(arrived(&mut *listener));
        drop(ours.join().unwrap());
    });
}

pub(crate) fn every_connection_in_the_backlog_is_found(mut transport: Transport) {
    assert!(transport.listener.try_accept().unwrap().is_none());
    let ours: Vec<_> = (0..256).map(|_| begin(&*transport.connector)).collect();
    // All are in the backlog where a connection needs no other end, and those that do are accepted before they are established.
    let theirs: Vec<_> = (0..256).map(|_| arrived(&mut *transport.listener)).collect();
    assert!(transport.listener.try_accept().unwrap().is_none());
    let mut theirs: Vec<_> = theirs.into_iter().map(|pending| pending.establish(Some(LIMIT)).unwrap()).collect();
    let mut ours: Vec<_> = ours.into_iter().map(|thread| thread.join().unwrap().unwrap()).collect();
    for (index, stream) in ours.iter_mut().enumerate() {
        stream.write(&[index as u8], &[]).unwrap();
    }
    let mut seen: Vec<u8> = Vec::new();
    for stream in &mut theirs {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        seen.push(byte[0]);
    }
    seen.sort_unstable();
    assert_eq!(seen, (0..=255).collect::<Vec<u8>>());
}

pub(crate) fn accept_gives_up_after_its_timeout(mut transport: Transport) {
    if !transport.has_clock {
        return;
    }
    let begun = Instant::now();
    let kind = transport.listener.accept(Some(Duration::from_millis(30))).err().map(|error| error.kind());
    assert_eq!(kind, Some(io::ErrorKind::TimedOut));
    assert!(begun.elapsed() >= Duration::from_millis(20));
    let ours = begin(&*transport.connector);
    while transport.listener.accept(Some(Duration::ZERO)).is_err() {}
    drop(ours.join().unwrap());
}

/// A packet of random size: a header, and ranges of `pages` pages.
struct Packet {
    header: Vec<u8>,
    /// Page, offset within it, length.
    parts: Vec<(u64, usize, usize)>,
}

impl Packet {
    fn ranges<'a>(&self, ram: &'a Ram) -> Vec<GuestRange<'a>> {
        let part = |&(page, offset, len): &(u64, usize, usize)| ram.page(page).unwrap().slice(offset, len).unwrap();
        self.parts.iter().map(part).collect()
    }
}

/// `count` packets of random sizes; no page twice in one.
fn packets(count: usize, pages: u64, random: &mut Random) -> Vec<Packet> {
    let packet = |_| {
        let header = (0..random.below(2000)).map(|byte| byte as u8).collect();
        let (first, stride) = (random.below(20), 1 + random.below(2));
        let count = random.below(130).min((pages - first) / stride);
        let part = |index| match random.below(3) {
            0 => (first + index * stride, 0, 4096),
            1 => (first + index * stride, 8 * random.below(256) as usize, 8 * random.below(257) as usize),
            _ => (first + index * stride, 4088, 8),
        };
        Packet { header, parts: (0..count).map(part).collect() }
    };
    (0..count).map(packet).collect()
}

fn fill(ram: &Ram, pages: u64, random: &mut Random) {
    for page in 0..pages {
        let content: Vec<u8> = (0..512).flat_map(|_| random.next().to_le_bytes()).collect();
        ram.page(page).unwrap().write(&content);
    }
}

fn bytes(range: &GuestRange<'_>) -> Vec<u8> {
    let mut bytes = vec![0; range.len()];
    range.read(&mut bytes);
    bytes
}

/// Fresh memory of `pages` pages.
fn ram(page_size: usize, pages: usize) -> Ram {
    let block = RamBlock::anonymous(BlockName::new("a").expect("a valid name"), page_size * pages).unwrap();
    Ram::new(page_size, vec![block]).unwrap()
}

/// Numbers that look random, the same in every run (splitmix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// For what happens at once, with room for a busy machine.
const SOON: Duration = Duration::from_secs(10);

/// For a whole check.
const LIMIT: Duration = Duration::from_secs(60);

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use crate::testing::memory;

    #[test]
    fn a_transport_that_passes_runs_every_check() {
        test_support::time_limit(2 * LIMIT, || {
            let mut opened = 0;
            conformance(|| {
                opened += 1;
                let (listener, connector) = memory::listener(100_000);
                Transport::new(listener, connector).without_clock()
            });
            assert_eq!(opened, ON_ONE_CONNECTION.len() + ON_MANY_CONNECTIONS.len());
        });
    }

    #[test]
    fn a_transport_that_does_not_pass_is_named_with_what_should_hold() {
        test_support::time_limit(2 * LIMIT, || {
            let panic = std::panic::catch_unwind(|| {
                run("a check", |_| panic!("it does not hold"), {
                    let (listener, connector) = memory::listener(100_000);
                    Transport::new(listener, connector)
                });
            });
            let message = panic.unwrap_err().downcast::<String>().unwrap();
            assert_eq!(*message, "the transport does not pass: a check");
        });
    }
}
