//! Connections within one process, for tests and model checkers.
//!
//! Each direction is a bounded queue of bytes behind one lock, so a peer that does not read stalls the writer as a
//! socket does. Built from `crate::sync` alone: schedulers see every hand-over.

use std::{collections::VecDeque, io, time::Duration};

use crate::{
    ram::GuestRange,
    sync::{Arc, Condvar, Mutex, MutexGuard, lock, wait},
    transport::{Connect, Established, Listen, Pending, RecvHalf, SendHalf, Stopper, Stream},
};

/// A listener and the connector that reaches it. `capacity` bytes fit in each direction of each connection.
pub fn listener(capacity: usize) -> (MemoryListener, MemoryConnector) {
    let shared = Arc::new(Backlog { state: Mutex::new(BacklogState::default()), changed: Condvar::new() });
    (MemoryListener { shared: shared.clone() }, MemoryConnector { shared, capacity })
}

/// Two ends of one connection. `capacity` bytes fit in each direction.
pub fn pair(capacity: usize) -> (MemoryStream, MemoryStream) {
    let (left, right) = (Pipe::new(capacity), Pipe::new(capacity));
    let end = |incoming: Arc<Pipe>, outgoing: Arc<Pipe>| MemoryStream {
        ends: Arc::new(Ends { incoming: ReadEnd(incoming), outgoing: WriteEnd(outgoing) }),
        read_timeout: None,
    };
    (end(left.clone(), right.clone()), end(right, left))
}

/// One end of a connection, or one of its halves. Dropping the last of them closes it.
pub struct MemoryStream {
    ends: Arc<Ends>,
    /// How long a read waits.
    read_timeout: Option<Duration>,
}

struct Ends {
    incoming: ReadEnd,
    outgoing: WriteEnd,
}

impl SendHalf for MemoryStream {
    fn write(&mut self, header: &[u8], pages: &[GuestRange<'_>]) -> io::Result<()> {
        let outgoing = &self.ends.outgoing.0;
        outgoing.write(header)?;
        let mut copy = Vec::new();
        for page in pages {
            copy.resize(page.len(), 0);
            page.read(&mut copy);
            outgoing.write(&copy)?;
        }
        Ok(())
    }

    fn finish(&mut self) -> io::Result<()> {
        self.ends.outgoing.0.end();
        Ok(())
    }
}

impl RecvHalf for MemoryStream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.ends.incoming.0.read(buf, self.read_timeout)
    }

    fn read_pages(&mut self, pages: &[GuestRange<'_>]) -> io::Result<()> {
        pages.iter().try_for_each(GuestRange::require_writable)?;
        let mut copy = Vec::new();
        for page in pages {
            copy.resize(page.len(), 0);
            self.read_exact(&mut copy)?;
            page.write(&copy);
        }
        Ok(())
    }

    /// Model checkers have no clock: a read under one of them waits until something comes.
    fn set_read_timeout(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.read_timeout = timeout;
        Ok(())
    }

    fn interrupter(&mut self) -> io::Result<Box<dyn Stopper>> {
        Ok(Box::new(Interrupter(self.ends.incoming.0.clone())))
    }
}

impl Stream for MemoryStream {
    fn split(self: Box<Self>) -> io::Result<(Box<dyn SendHalf>, Box<dyn RecvHalf>)> {
        let sends = MemoryStream { ends: self.ends.clone(), read_timeout: None };
        Ok((Box::new(sends), self))
    }

    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        Ok(Box::new(StreamStopper { pipes: [self.ends.incoming.0.clone(), self.ends.outgoing.0.clone()] }))
    }

    fn peer(&self) -> String {
        "memory".to_owned()
    }
}

/// Opens connections to one [`MemoryListener`].
#[derive(Clone)]
pub struct MemoryConnector {
    shared: Arc<Backlog>,
    capacity: usize,
}

impl Connect for MemoryConnector {
    fn dial(&self) -> io::Result<Box<dyn Pending>> {
        Ok(Box::new(PendingMemory { to: self.clone(), stopped: Arc::new(Mutex::new(false)) }))
    }
}

/// A connection that is to be opened.
struct PendingMemory {
    to: MemoryConnector,
    stopped: Arc<Mutex<bool>>,
}

impl Pending for PendingMemory {
    fn establish(self: Box<Self>, _limit: Option<Duration>) -> io::Result<Box<dyn Stream>> {
        if *lock(&self.stopped) {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        let (ours, theirs) = pair(self.to.capacity);
        let shared = &self.to.shared;
        let mut state = lock(&shared.state);
        if state.closed {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        state.waiting.push_back(theirs);
        drop(state);
        shared.changed.notify_all();
        Ok(Box::new(ours))
    }

    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        Ok(Box::new(DialStopper(self.stopped.clone())))
    }

    fn peer(&self) -> String {
        "memory".to_owned()
    }
}

struct DialStopper(Arc<Mutex<bool>>);

impl Stopper for DialStopper {
    fn stop(&self) {
        *lock(&self.0) = true;
    }
}

/// Where the connections of one [`MemoryConnector`] arrive.
pub struct MemoryListener {
    shared: Arc<Backlog>,
}

impl Listen for MemoryListener {
    fn accept(&mut self, _timeout: Option<Duration>) -> io::Result<Box<dyn Pending>> {
        let mut state = lock(&self.shared.state);
        loop {
            if state.stopped {
                return Err(io::ErrorKind::Interrupted.into());
            }
            if let Some(stream) = state.waiting.pop_front() {
                return Ok(Box::new(Established::new(stream)));
            }
            state = wait(&self.shared.changed, state);
        }
    }

    fn try_accept(&mut self) -> io::Result<Option<Box<dyn Pending>>> {
        let stream = lock(&self.shared.state).waiting.pop_front();
        Ok(stream.map(|stream| Box::new(Established::new(stream)) as Box<dyn Pending>))
    }

    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        Ok(Box::new(ListenStopper { shared: self.shared.clone() }))
    }
}

impl Drop for MemoryListener {
    fn drop(&mut self) {
        let mut state = lock(&self.shared.state);
        state.closed = true;
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        drop(waiting);
    }
}

struct Backlog {
    state: Mutex<BacklogState>,
    changed: Condvar,
}

#[derive(Default)]
struct BacklogState {
    waiting: VecDeque<MemoryStream>,
    stopped: bool,
    closed: bool,
}

struct ListenStopper {
    shared: Arc<Backlog>,
}

impl Stopper for ListenStopper {
    fn stop(&self) {
        lock(&self.shared.state).stopped = true;
        self.shared.changed.notify_all();
    }
}

struct StreamStopper {
    pipes: [Arc<Pipe>; 2],
}

impl Stopper for StreamStopper {
    fn stop(&self) {
        for pipe in &self.pipes {
            pipe.close();
        }
    }
}

struct Interrupter(Arc<Pipe>);

impl Stopper for Interrupter {
    fn stop(&self) {
        lock(&self.0.state).interrupted = true;
        self.0.changed.notify_all();
    }
}

/// Closes the pipe when the reader is gone, so that the writer does not wait forever.
struct ReadEnd(Arc<Pipe>);

impl Drop for ReadEnd {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// Ends the pipe when the writer is gone.
struct WriteEnd(Arc<Pipe>);

impl Drop for WriteEnd {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// One direction.
struct Pipe {
    state: Mutex<PipeState>,
    changed: Condvar,
    capacity: usize,
}

#[derive(Default)]
struct PipeState {
    /// At most `capacity` long.
    bytes: VecDeque<u8>,
    /// The writer will send no more; what is queued can still be read.
    ended: bool,
    /// Nobody reads any more, or the connection was stopped.
    closed: bool,
    /// The reader no longer waits.
    interrupted: bool,
}

impl Pipe {
    fn new(capacity: usize) -> Arc<Pipe> {
        Arc::new(Pipe { state: Mutex::new(PipeState::default()), changed: Condvar::new(), capacity })
    }

    fn write(&self, mut bytes: &[u8]) -> io::Result<()> {
        let mut state = lock(&self.state);
        while !bytes.is_empty() {
            if state.closed || state.ended {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            let room = self.capacity - state.bytes.len();
            if room == 0 {
                state = wait(&self.changed, state);
                continue;
            }
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            state.bytes.extend(now);
            bytes = later;
            self.changed.notify_all();
        }
        Ok(())
    }

    fn read(&self, buf: &mut [u8], timeout: Option<Duration>) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        let deadline = Deadline::after(timeout);
        let mut state = lock(&self.state);
        loop {
            if state.interrupted {
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            let n = state.bytes.len().min(buf.len());
            if n > 0 {
                for (to, from) in buf.iter_mut().zip(state.bytes.drain(..n)) {
                    *to = from;
                }
                drop(state);
                self.changed.notify_all();
                return Ok(n);
            }
            if state.ended || state.closed {
                return Ok(0);
            }
            state = deadline.wait(&self.changed, state).ok_or(io::ErrorKind::TimedOut)?;
        }
    }

    fn end(&self) {
        lock(&self.state).ended = true;
        self.changed.notify_all();
    }

    fn close(&self) {
        lock(&self.state).closed = true;
        self.changed.notify_all();
    }
}

/// When a read has waited long enough.
struct Deadline {
    #[cfg(not(any(loom, shuttle)))]
    at: Option<std::time::Instant>,
}

#[cfg(not(any(loom, shuttle)))]
impl Deadline {
    fn after(timeout: Option<Duration>) -> Deadline {
        Deadline { at: timeout.and_then(|timeout| std::time::Instant::now().checked_add(timeout)) }
    }

    /// Waits until woken; nothing once it is over.
    fn wait<'a>(&self, condvar: &Condvar, guard: MutexGuard<'a, PipeState>) -> Option<MutexGuard<'a, PipeState>> {
        let Some(at) = self.at else { return Some(wait(condvar, guard)) };
        let left = at.checked_duration_since(std::time::Instant::now()).filter(|left| !left.is_zero())?;
        Some(condvar.wait_timeout(guard, left).unwrap_or_else(|poisoned| poisoned.into_inner()).0)
    }
}

#[cfg(any(loom, shuttle))]
impl Deadline {
    fn after(_timeout: Option<Duration>) -> Deadline {
        Deadline {}
    }

    fn wait<'a>(&self, condvar: &Condvar, guard: MutexGuard<'a, PipeState>) -> Option<MutexGuard<'a, PipeState>> {
        Some(wait(condvar, guard))
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use crate::ram::Ram;

    #[test]
    fn a_read_waits_no_longer_than_its_timeout() {
        let (mut a, mut b) = pair(10);
        b.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
        assert_eq!(b.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::TimedOut);
        a.write(b"x", &[]).unwrap();
        assert_eq!(b.read(&mut [0; 2]).unwrap(), 1);
    }

    #[test]
    fn bytes_and_pages_arrive_in_order() {
        let (mut a, mut b) = pair(1000);
        let (from, to) = (Ram::for_test(&[("a", 2)]), Ram::for_test(&[("a", 2)]));
        for page in 0..2 {
            from.page(page).unwrap().write(&[page as u8 + 1; 4096]);
        }
        let writer = std::thread::spawn(move || {
            a.write(b"head", &[from.page(1).unwrap(), from.page(0).unwrap()]).unwrap();
        });
        let mut head = [0; 4];
        b.read_exact(&mut head).unwrap();
        assert_eq!(&head, b"head");
        b.read_pages(&[to.page(1).unwrap(), to.page(0).unwrap()]).unwrap();
        writer.join().unwrap();
        assert_eq!(to.page_bytes(0), [1; 4096]);
        assert_eq!(to.page_bytes(1), [2; 4096]);
        assert_eq!(b.read(&mut head).unwrap(), 0, "the writer is gone");
    }

    #[test]
    fn stop_releases_a_blocked_writer_and_a_blocked_reader() {
        let (mut a, b) = pair(10);
        let stopper = a.stopper().unwrap();
        let writer = std::thread::spawn(move || a.write(&[0; 11], &[]).unwrap_err().kind());
        stopper.stop();
        assert_eq!(writer.join().unwrap(), io::ErrorKind::BrokenPipe);
        drop(b);
        let (mut a, _b) = pair(10);
        let stopper = a.stopper().unwrap();
        let reader = std::thread::spawn(move || a.read(&mut [0]).unwrap());
        stopper.stop();
        assert_eq!(reader.join().unwrap(), 0);
    }

    #[test]
    fn a_dropped_listener_refuses_and_ends_those_in_its_backlog() {
        let (listener, connector) = listener(10);
        let mut waiting = connector.connect().unwrap();
        drop(listener);
        assert_eq!(waiting.read(&mut [0]).unwrap(), 0);
        assert!(connector.connect().is_err());
    }
}
