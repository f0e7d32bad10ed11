//! Connections on which things go wrong as planned, for tests of VMMs and of the engine.
//!
//! A [`Faults`] counts the operations of all its connections: each connect, write, read, read of pages and flush is one,
//! from 0. What happens at the k-th is decided before the test starts, so a test can go through every k and a failure
//! can be repeated. Where several threads use the connections, which of them does the k-th operation is up to them.

use std::{
    io,
    os::fd::{BorrowedFd, OwnedFd},
    time::Duration,
};

use crate::{
    ram::GuestRange,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, Ordering::SeqCst},
        lock, wait,
    },
    transport::{Connect, Listen, Meter, Pending, RecvHalf, SendHalf, Stopper, Stream, ZeroCopyCounters, wrapped},
};

/// What happens to one operation.
#[derive(Clone, Debug)]
pub enum Fault {
    /// It fails with this error and has done nothing. The connection stays.
    Fail(io::ErrorKind),
    /// It fails, and the connection has ended for both sides.
    Cut,
    /// A read returns at most so many bytes (and at least one), as any read may. A write, and a read of pages, moves only
    /// so many bytes (of pages: a multiple of 8), then the connection is cut.
    Shorten(usize),
    /// It happens so much later. For model checkers, who have no clock: when the others have had a turn.
    Delay(Duration),
    /// It waits for [`Faults::release`], or for the connection to be stopped.
    Hold,
}

/// A plan of faults, and the count of operations that it refers to. Clones share both.
#[derive(Clone, Default)]
pub struct Faults {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// Signalled when held operations may go on.
    changed: Condvar,
}

#[derive(Default)]
struct State {
    plan: Vec<(When, Fault)>,
    operations: u64,
    released: bool,
    /// Ends look like resets.
    resets: bool,
}

#[derive(Clone, Copy)]
enum When {
    At(u64),
    From(u64),
}

impl Faults {
    /// A plan in which nothing goes wrong.
    pub fn new() -> Faults {
        Faults::default()
    }

    /// Adds `fault` at operation number `operation`. Of several faults at one operation the first one counts.
    #[must_use]
    pub fn at(self, operation: u64, fault: Fault) -> Faults {
        lock(&self.shared.state).plan.push((When::At(operation), fault));
        self
    }

    /// Adds `fault` at operation number `operation` and all after it.
    #[must_use]
    pub fn from(self, operation: u64, fault: Fault) -> Faults {
        lock(&self.shared.state).plan.push((When::From(operation), fault));
        self
    }

    /// Has a connection that its peer ends look reset: a read at its end fails, as where the peer's host has gone.
    #[must_use]
    pub fn with_resets(self) -> Faults {
        lock(&self.shared.state).resets = true;
        self
    }

    /// `stream`, with the faults of this plan.
    pub fn stream(&self, stream: Box<dyn Stream>) -> FaultyStream {
        let ended = Ended { stopper: stream.stopper().ok(), ..Ended::default() };
        FaultyStream { stream, faults: self.clone(), ended: Arc::new(ended) }
    }

    /// `connector`, whose connections have the faults of this plan.
    pub fn connector(&self, connector: Box<dyn Connect + Send>) -> FaultyConnector {
        FaultyConnector { connector, faults: self.clone() }
    }

    /// `listener`, whose connections have the faults of this plan.
    pub fn listener(&self, listener: Box<dyn Listen>) -> FaultyListener {
        FaultyListener { listener, faults: self.clone() }
    }

    /// Lets all operations go on that are held, now and from now on.
    pub fn release(&self) {
        lock(&self.shared.state).released = true;
        self.shared.changed.notify_all();
    }

    /// How many operations there were.
    pub fn operations(&self) -> u64 {
        lock(&self.shared.state).operations
    }

    /// Counts an operation, and returns what happens to it after any delay.
    fn next(&self, ended: &Ended, direction: Direction) -> Option<Fault> {
        let mut state = lock(&self.shared.state);
        let number = state.operations;
        state.operations += 1;
        let applies = |when: &When| match *when {
            When::At(at) => at == number,
            When::From(from) => from <= number,
        };
        let fault = state.plan.iter().find(|(when, _)| applies(when)).map(|(_, fault)| fault.clone());
        match fault {
            Some(Fault::Delay(delay)) => {
                drop(state);
                pause(delay);
                None
            }
            Some(Fault::Hold) => {
                let is_over = || {
                    let interrupted = direction == Direction::Receives && ended.interrupted.load(SeqCst);
                    interrupted || ended.stopped.load(SeqCst)
                };
                while !state.released && !is_over() {
                    state = wait(&self.shared.changed, state);
                }
                None
            }
            other => other,
        }
    }
}

/// A connection with the faults of a plan, or one of its halves.
pub struct FaultyStream<S: ?Sized = dyn Stream> {
    faults: Faults,
    ended: Arc<Ended>,
    stream: Box<S>,
}

/// Shared by all handles on one connection.
#[derive(Default)]
struct Ended {
    /// A fault cut it: nothing works any more.
    cut: AtomicBool,
    /// It was stopped. Set before the lock of the plan is taken and released, so who waits there sees it.
    stopped: AtomicBool,
    /// The same for its reads only.
    interrupted: AtomicBool,
    /// What cuts it.
    stopper: Option<Box<dyn Stopper>>,
}

/// Which way an operation moves bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Sends,
    Receives,
}

impl<S: ?Sized> FaultyStream<S> {
    /// What is left of the next operation: nothing special, or a limit on its bytes.
    fn next(&mut self, direction: Direction) -> io::Result<Option<usize>> {
        if self.ended.cut.load(SeqCst) {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        match self.faults.next(&self.ended, direction) {
            Some(Fault::Fail(kind)) => Err(io::Error::new(kind, "a planned fault")),
            Some(Fault::Cut) => Err(self.cut()),
            Some(Fault::Shorten(limit)) => Ok(Some(limit)),
            Some(Fault::Delay(_) | Fault::Hold) | None => Ok(None),
        }
    }

    fn cut(&mut self) -> io::Error {
        self.ended.cut.store(true, SeqCst);
        if let Some(stopper) = &self.ended.stopper {
            stopper.stop();
        }
        io::Error::new(io::ErrorKind::ConnectionReset, "a planned cut")
    }
}

impl<S: SendHalf + ?Sized> SendHalf for FaultyStream<S> {
    fn write(&mut self, header: &[u8], pages: &[GuestRange<'_>]) -> io::Result<()> {
        match self.next(Direction::Sends)? {
            None => self.stream.write(header, pages),
            Some(limit) => {
                let header = &header[..limit.min(header.len())];
                self.stream.write(header, &first_bytes(pages, limit - header.len()))?;
                Err(self.cut())
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.next(Direction::Sends)?;
        self.stream.flush()
    }

    fn send_without_copy(&mut self, counters: &Arc<ZeroCopyCounters>) -> io::Result<()> {
        self.stream.send_without_copy(counters)
    }

    fn limit_unsent(&mut self, bytes: usize) -> io::Result<()> {
        self.stream.limit_unsent(bytes)
    }

    fn limit_untaken(&mut self, limit: Option<Duration>) -> io::Result<()> {
        self.stream.limit_untaken(limit)
    }

    fn discard(&mut self) -> io::Result<()> {
        self.stream.discard()
    }

    fn sends_descriptors(&self) -> bool {
        self.stream.sends_descriptors()
    }

    fn write_with_descriptors(&mut self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        match self.next(Direction::Sends)? {
            None => self.stream.write_with_descriptors(bytes, descriptors),
            Some(limit) => {
                self.stream.write_with_descriptors(&bytes[..limit.clamp(1, bytes.len())], descriptors)?;
                Err(self.cut())
            }
        }
    }

    fn finish(&mut self) -> io::Result<()> {
        self.stream.finish()
    }
}

impl<S: RecvHalf + ?Sized> RecvHalf for FaultyStream<S> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let limit = self.next(Direction::Receives)?.unwrap_or(usize::MAX).max(1);
        let len = buf.len().min(limit);
        match self.stream.read(&mut buf[..len])? {
            0 if len > 0 && lock(&self.faults.shared.state).resets => Err(io::ErrorKind::ConnectionReset.into()),
            read => Ok(read),
        }
    }

    fn receives_descriptors(&self) -> bool {
        self.stream.receives_descriptors()
    }

    fn read_with_descriptors(&mut self, buf: &mut [u8], descriptors: &mut Vec<OwnedFd>) -> io::Result<usize> {
        let limit = self.next(Direction::Receives)?.unwrap_or(usize::MAX).max(1);
        let len = buf.len().min(limit);
        self.stream.read_with_descriptors(&mut buf[..len], descriptors)
    }

    fn read_pages(&mut self, pages: &[GuestRange<'_>]) -> io::Result<()> {
        match self.next(Direction::Receives)? {
            None => self.stream.read_pages(pages),
            Some(limit) => {
                self.stream.read_pages(&first_bytes(pages, limit))?;
                Err(self.cut())
            }
        }
    }

    fn set_read_timeout(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.stream.set_read_timeout(timeout)
    }

    fn interrupter(&mut self) -> io::Result<Box<dyn Stopper>> {
        let (stopper, faults, ended) = (self.stream.interrupter()?, self.faults.clone(), self.ended.clone());
        Ok(Box::new(FaultyStopper { stopper, faults, ended, reads_only: true }))
    }
}

impl Stream for FaultyStream {
    fn split(self: Box<Self>) -> io::Result<(Box<dyn SendHalf>, Box<dyn RecvHalf>)> {
        let FaultyStream { faults, ended, stream } = *self;
        let (sends, receives) = stream.split()?;
        let sends = FaultyStream { faults: faults.clone(), ended: ended.clone(), stream: sends };
        Ok((Box::new(sends), Box::new(FaultyStream { faults, ended, stream: receives })))
    }

    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        let (stopper, faults, ended) = (self.stream.stopper()?, self.faults.clone(), self.ended.clone());
        Ok(Box::new(FaultyStopper { stopper, faults, ended, reads_only: false }))
    }

    fn meter(&self) -> io::Result<Option<Box<dyn Meter>>> {
        self.stream.meter()
    }

    fn peer(&self) -> String {
        self.stream.peer()
    }
}

struct FaultyStopper {
    stopper: Box<dyn Stopper>,
    faults: Faults,
    ended: Arc<Ended>,
    reads_only: bool,
}

impl Stopper for FaultyStopper {
    fn stop(&self) {
        self.stopper.stop();
        let ended = if self.reads_only { &self.ended.interrupted } else { &self.ended.stopped };
        ended.store(true, SeqCst);
        drop(lock(&self.faults.shared.state));
        self.faults.shared.changed.notify_all();
    }
}

/// Opens connections with the faults of a plan. A fault at the connect itself refuses it.
pub struct FaultyConnector {
    connector: Box<dyn Connect + Send>,
    faults: Faults,
}

impl Connect for FaultyConnector {
    fn dial(&self) -> io::Result<Box<dyn Pending>> {
        let ended = Arc::new(Ended::default());
        Ok(Box::new(FaultyDial { pending: self.connector.dial()?, faults: self.faults.clone(), ended }))
    }
}

/// A connect that may be refused.
struct FaultyDial {
    pending: Box<dyn Pending>,
    faults: Faults,
    ended: Arc<Ended>,
}

impl Pending for FaultyDial {
    fn establish(self: Box<Self>, limit: Option<Duration>) -> io::Result<Box<dyn Stream>> {
        let FaultyDial { pending, faults, ended } = *self;
        match faults.next(&ended, Direction::Sends) {
            Some(Fault::Fail(kind)) => Err(io::Error::new(kind, "a planned fault")),
            Some(Fault::Cut | Fault::Shorten(_)) => Err(io::ErrorKind::ConnectionRefused.into()),
            Some(Fault::Delay(_) | Fault::Hold) | None => Ok(Box::new(faults.stream(pending.establish(limit)?))),
        }
    }

    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        let (stopper, faults, ended) = (self.pending.stopper()?, self.faults.clone(), self.ended.clone());
        Ok(Box::new(FaultyStopper { stopper, faults, ended, reads_only: false }))
    }

    fn peer(&self) -> String {
        self.pending.peer()
    }
}

/// Accepts connections with the faults of a plan.
pub struct FaultyListener {
    listener: Box<dyn Listen>,
    faults: Faults,
}

impl FaultyListener {
    fn pending(&self, pending: Box<dyn Pending>) -> Box<dyn Pending> {
        let faults = self.faults.clone();
        wrapped(pending, move |stream| Ok(Box::new(faults.stream(stream))))
    }
}

impl Listen for FaultyListener {
    fn accept(&mut self, timeout: Option<Duration>) -> io::Result<Box<dyn Pending>> {
        let pending = self.listener.accept(timeout)?;
        Ok(self.pending(pending))
    }

    fn try_accept(&mut self) -> io::Result<Option<Box<dyn Pending>>> {
        let pending = self.listener.try_accept()?;
        Ok(pending.map(|pending| self.pending(pending)))
    }

    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        self.listener.stopper()
    }
}

/// The first `limit` bytes of `pages`, less what a range cannot end at.
fn first_bytes<'a>(pages: &[GuestRange<'a>], limit: usize) -> Vec<GuestRange<'a>> {
    let mut left = limit;
    let mut first = Vec::new();
    for page in pages {
        let len = page.len().min(left & !7);
        first.extend(page.slice(0, len).filter(|part| !part.is_empty()));
        left -= len;
        if len < page.len() {
            break;
        }
    }
    first
}

/// The sleep is the fault that was asked for: a slow link.
#[cfg(not(any(loom, shuttle)))]
fn pause(delay: Duration) {
    crate::sync::thread::sleep(delay);
}

#[cfg(any(loom, shuttle))]
fn pause(_delay: Duration) {
    for _ in 0..3 {
        crate::sync::thread::yield_now();
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use std::time::Instant;

    use test_support::time_limit;

    use super::*;
    use crate::{ram::Ram, sync::thread, testing::memory};

    fn pair(faults: &Faults) -> (FaultyStream, memory::MemoryStream) {
        let (ours, theirs) = memory::pair(100_000);
        (faults.stream(Box::new(ours)), theirs)
    }

    #[test]
    fn the_planned_operation_fails_and_no_other() {
        for planned in 0..4 {
            let faults = Faults::new().at(planned, Fault::Fail(io::ErrorKind::OutOfMemory));
            let (mut ours, _theirs) = pair(&faults);
            let results = [(); 4].map(|()| ours.write(b"x", &[]).map_err(|error| error.kind()));
            for (operation, result) in (0..).zip(results) {
                let expected = if operation == planned { Err(io::ErrorKind::OutOfMemory) } else { Ok(()) };
                assert_eq!(result, expected);
            }
            assert_eq!(faults.operations(), 4);
        }
    }

    #[test]
    fn a_cut_ends_the_connection_for_both_sides_and_all_handles() {
        let (ours, mut theirs) = pair(&Faults::new().at(0, Fault::Cut));
        let (mut sends, mut receives) = Box::new(ours).split().unwrap();
        assert_eq!(sends.write(b"x", &[]).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        assert_eq!(receives.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        assert_eq!(theirs.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn a_shortened_write_sends_its_first_bytes() {
        let ram = Ram::for_test(&[("a", 2)]);
        let pages = [ram.page(0).unwrap(), ram.page(1).unwrap()];
        for page in &pages {
            page.write(&[7; 4096]);
        }
        for (limit, arrives) in [(0, 0), (3, 3), (4, 4), (13, 12), (4 + 4096 + 8, 4108), (100_000, 4 + 8192)] {
            let (mut ours, mut theirs) = pair(&Faults::new().at(0, Fault::Shorten(limit)));
            assert!(ours.write(b"head", &pages).is_err());
            let mut received = vec![0; arrives];
            theirs.read_exact(&mut received).unwrap();
            assert_eq!(theirs.read(&mut [0]).unwrap(), 0, "{limit}");
        }
    }

    #[test]
    fn a_shortened_read_is_only_short_but_one_of_pages_is_the_end() {
        let faults = Faults::new().at(0, Fault::Shorten(2)).at(1, Fault::Shorten(0)).at(2, Fault::Shorten(16));
        let (mut ours, mut theirs) = pair(&faults);
        theirs.write(&[1; 100], &[]).unwrap();
        assert_eq!(ours.read(&mut [0; 10]).unwrap(), 2);
        assert_eq!(ours.read(&mut [0; 10]).unwrap(), 1);
        let ram = Ram::for_test(&[("a", 1)]);
        assert!(ours.read_pages(&[ram.page(0).unwrap()]).is_err());
        assert_eq!(ram.page_bytes(0)[..17], [&[1; 16][..], &[0]].concat());
        assert!(ours.read(&mut [0]).is_err());
    }

    #[test]
    fn a_held_operation_waits_for_its_release_or_a_stop() {
        for stop in [false, true] {
            let faults = Faults::new().from(1, Fault::Hold);
            let (mut ours, _theirs) = pair(&faults);
            let stopper = ours.stopper().unwrap();
            ours.write(b"x", &[]).unwrap();
            let held = thread::spawn(move || ours.write(b"x", &[]));
            thread::sleep(Duration::from_millis(20));
            assert!(!held.is_finished());
            if stop {
                stopper.stop()
            } else {
                faults.release()
            }
            let result = time_limit(Duration::from_secs(10), || held.join().unwrap());
            assert_eq!(result.is_err(), stop);
        }
    }

    #[test]
    fn a_delayed_operation_happens_later() {
        let (mut ours, mut theirs) = pair(&Faults::new().at(0, Fault::Delay(Duration::from_millis(20))));
        let begin = Instant::now();
        ours.write(b"x", &[]).unwrap();
        assert!(begin.elapsed() >= Duration::from_millis(20));
        theirs.read_exact(&mut [0]).unwrap();
    }

    #[test]
    fn connects_count_and_can_be_refused() {
        let (listener, connector) = memory::listener(100);
        let faults = Faults::new().at(1, Fault::Cut);
        let (connector, mut listener) = (faults.connector(Box::new(connector)), faults.listener(Box::new(listener)));
        let mut ours = connector.connect().unwrap();
        assert_eq!(connector.connect().err().unwrap().kind(), io::ErrorKind::ConnectionRefused);
        ours.write(b"x", &[]).unwrap();
        let mut theirs = listener.accept(None).unwrap().establish(None).unwrap();
        theirs.read_exact(&mut [0]).unwrap();
        assert_eq!(faults.operations(), 4);
        assert!(listener.try_accept().unwrap().is_none());
    }
}
