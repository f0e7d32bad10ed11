//! Accepts connections, and knows when there are no more to come.
//!
//! A connection says what it is with its first bytes, and those of channels may arrive before those of main: a thread of
//! its own waits for them. How many channels there are is not in the stream. The source opens all of them before its first sync point,
//! so when main gets there, every channel has been accepted or is waiting to be.

use std::{io, time::Duration};

use multifd_proto::packet::{self, HELLO_LEN, Hello};
use multifd_proto::{Violation, stream, violation};

use super::{Shared, channel::ReceiveChannel};
use crate::{
    error::{Connection, Error, Mismatch, Place},
    stop::PanicGuard,
    sync::{Arc, lock},
    threads::{Task, ThreadRole},
    transport::{Listen, Stopper, Stream},
};

/// The thread that accepts, and what came of it.
pub(super) struct Acceptor {
    shared: Arc<Shared>,
    interrupt: Box<dyn Stopper>,
    thread: Option<Task<Accepted>>,
    listener: Option<Box<dyn Listen>>,
    connections: Vec<Task<()>>,
}

struct Accepted {
    listener: Box<dyn Listen>,
    connections: Vec<Task<()>>,
}

impl Acceptor {
    /// Begins to accept from `listener`.
    pub(super) fn spawn(mut listener: Box<dyn Listen>, shared: &Arc<Shared>) -> Result<Acceptor, Error> {
        let at = Place { connection: Connection::Unknown(0), offset: 0 };
        let interrupt = listener.stopper().map_err(Error::io(at))?;
        shared.stop.register(listener.stopper().map_err(Error::io(at))?);
        let thread = {
            let (threads, stop) = (shared.options.threads.clone(), shared.stop.clone());
            let shared = shared.clone();
            Task::spawn(&*threads, ThreadRole::Accept, &stop, move || {
                // Main may still be waiting for the connection that is main.
                let guard = PanicGuard::new(&shared.stop, "the listener");
                let mut connections = Vec::new();
                if let Err(error) = accept_all(&mut *listener, &shared, &mut connections) {
                    shared.stop.stop(error);
                }
                guard.disarm();
                Accepted { listener, connections }
            })?
        };
        Ok(Acceptor {
            shared: shared.clone(),
            interrupt,
            thread: Some(thread),
            listener: None,
            connections: Vec::new(),
        })
    }

    /// How many channels there are. Called once, when main has reached its first sync point.
    ///
    /// # Errors
    /// Not as many as the options require; [`Error::Stopped`].
    pub(super) fn channels(&mut self) -> Result<usize, Error> {
        if self.shared.options.channels.is_none() {
            self.interrupt.stop();
        }
        self.join();
        if self.shared.stop.is_stopped() {
            return Err(Error::Stopped);
        }
        Ok(self.connections.len() - 1)
    }

    /// Looks for connections that nobody expects.
    ///
    /// # Errors
    /// There is one: whatever it is, the number of channels was wrong, or it is not part of the migration.
    pub(super) fn nobody_else(&mut self) -> Result<(), Error> {
        let Some(listener) = &mut self.listener else { return Ok(()) };
        let at = Place { connection: Connection::Unknown(self.connections.len()), offset: 0 };
        match listener.try_accept().map_err(Error::io(at))? {
            None => Ok(()),
            Some(stream) => {
                let (peer, channels) = (stream.peer(), self.connections.len() - 1);
                Err(Mismatch::UnexpectedConnection { peer, channels }.into())
            }
        }
    }

    /// Ends and joins all threads. The migration is over.
    pub(super) fn finish(&mut self) -> Option<Error> {
        self.interrupt.stop();
        self.join();
        // Nobody may wait for a peer that does not close: the migration is over.
        self.shared.end_streams();
        let mut panicked = None;
        for connection in self.connections.drain(..) {
            if let Err(error) = connection.join() {
                panicked.get_or_insert(error);
            }
        }
        panicked
    }

    fn join(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        match thread.join() {
            Ok(accepted) => {
                self.listener = Some(accepted.listener);
                self.connections = accepted.connections;
            }
            Err(error) => {
                self.shared.stop.stop(error);
            }
        }
    }
}

/// Accepts until all have come, or until it is interrupted and nobody waits any more.
fn accept_all(listener: &mut dyn Listen, shared: &Arc<Shared>, connections: &mut Vec<Task<()>>) -> Result<(), Error> {
    let expected = shared.options.channels.map(|channels| usize::from(channels) + 1);
    while expected.is_none_or(|expected| connections.len() < expected) && connections.len() < MAX_CONNECTIONS {
        // The first may take for ever to come; from then on the source is there.
        let timeout =
            if connections.is_empty() { None } else { shared.options.setup_timeout.filter(|_| expected.is_some()) };
        match listener.accept(timeout) {
            Ok(stream) => greet(stream, shared, connections)?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                while let Some(stream) = accept_waiting(listener, connections.len())? {
                    greet(stream, shared, connections)?;
                }
                return Ok(());
            }
            Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                let (have, want) = (connections.len(), expected.unwrap_or_default());
                let seconds = timeout.unwrap_or_default().as_secs();
                return Err(Error::SetupTimeout { what: format!("{have} of {want} connections came"), seconds });
            }
            Err(source) => {
                let at = Place { connection: Connection::Unknown(connections.len()), offset: 0 };
                return Err(Error::Io { at, source });
            }
        }
    }
    Ok(())
}

fn accept_waiting(listener: &mut dyn Listen, index: usize) -> Result<Option<Box<dyn Stream>>, Error> {
    listener.try_accept().map_err(Error::io(Place { connection: Connection::Unknown(index), offset: 0 }))
}

/// Gives `stream` a thread that finds out what it is.
fn greet(stream: Box<dyn Stream>, shared: &Arc<Shared>, connections: &mut Vec<Task<()>>) -> Result<(), Error> {
    let connection = Connection::Unknown(connections.len());
    let at = Place { connection, offset: 0 };
    if connections.len() == MAX_CONNECTIONS {
        return Err(Mismatch::UnexpectedConnection { peer: stream.peer(), channels: MAX_CONNECTIONS - 1 }.into());
    }
    shared.register_stream(stream.stopper().map_err(Error::io(at))?);
    let (threads, stop) = (shared.options.threads.clone(), shared.stop.clone());
    let shared = shared.clone();
    connections.push(Task::spawn(&*threads, ThreadRole::Connection(connections.len()), &stop, move || {
        let guard = PanicGuard::new(&shared.stop, connection);
        if let Err(error) = serve(stream, connection, &shared) {
            shared.stop.stop(error);
        }
        guard.disarm();
    })?);
    Ok(())
}

/// Finds out what `stream` is and treats it so.
fn serve(mut stream: Box<dyn Stream>, connection: Connection, shared: &Arc<Shared>) -> Result<(), Error> {
    let at = Place { connection, offset: 0 };
    let timeout = shared.options.setup_timeout;
    stream.set_read_timeout(timeout).map_err(Error::io(at))?;
    let mut first = [0; 4];
    say(&mut *stream, &mut first, at, timeout)?;
    match u32::from_be_bytes(first) {
        stream::MAGIC => {
            stream.set_read_timeout(None).map_err(Error::io(at))?;
            let mut slot = lock(&shared.main);
            if slot.taken {
                return Err(Error::protocol(at)(Violation::UnexpectedElement {
                    element: "main connection",
                    place: "a second time",
                }));
            }
            slot.taken = true;
            slot.stream = Some(stream);
            drop(slot);
            shared.main_changed.notify_all();
            Ok(())
        }
        packet::MAGIC => {
            let mut hello = [0; HELLO_LEN];
            hello[..4].copy_from_slice(&first);
            say(&mut *stream, &mut hello[4..], at, timeout)?;
            stream.set_read_timeout(None).map_err(Error::io(at))?;
            let hello = Hello::decode(&hello).map_err(Error::protocol(at))?;
            enrol(&hello, at, shared)?;
            ReceiveChannel::new(hello.channel, stream, shared.clone()).run()
        }
        found => Err(Error::protocol(at)(violation::DecodeError::BadMagic { expected: stream::MAGIC, found })),
    }
}

/// Reads the first bytes of a connection, which may not keep us waiting.
fn say(stream: &mut dyn Stream, into: &mut [u8], at: Place, timeout: Option<Duration>) -> Result<(), Error> {
    stream.read_exact(into).map_err(|source| match source.kind() {
        io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => Error::SetupTimeout {
            what: format!("{} from {} did not say what it is", at.connection, stream.peer()),
            seconds: timeout.unwrap_or_default().as_secs(),
        },
        _ => Error::Io { at, source },
    })
}

/// Checks that the channel is one of this migration and has not come before.
fn enrol(hello: &Hello, at: Place, shared: &Shared) -> Result<(), Error> {
    let id = hello.channel;
    let mut seen = lock(&shared.seen);
    if let Some(channels) = seen.channels.or(shared.options.channels.map(usize::from))
        && id.index() >= channels
    {
        return Err(Error::protocol(at)(Violation::ChannelIdOutOfRange { id, channels }));
    }
    if std::mem::replace(&mut seen.ids[id.index()], true) {
        return Err(Error::protocol(at)(Violation::ChannelIdTwice { id }));
    }
    let expected = *seen.uuid.get_or_insert(shared.options.uuid.unwrap_or(hello.uuid));
    if expected != hello.uuid {
        return Err(Error::protocol(at)(violation::Mismatch::Uuid { expected, found: hello.uuid }));
    }
    Ok(())
}

/// Releases the main thread while it waits for main.
pub(super) struct MainSlotStopper(pub(super) Arc<Shared>);

impl Stopper for MainSlotStopper {
    fn stop(&self) {
        lock(&self.0.main).stopped = true;
        self.0.main_changed.notify_all();
    }
}

/// Main and 255 channels, the most that QEMU knows.
const MAX_CONNECTIONS: usize = 256;

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use crate::{destination::Destination, ram::Ram, test_vm::TestDestination};

    /// A listener with a defect.
    struct Defective;

    impl Listen for Defective {
        fn accept(&mut self, _timeout: Option<Duration>) -> io::Result<Box<dyn Stream>> {
            panic!("a defect of the transport");
        }

        fn try_accept(&mut self) -> io::Result<Option<Box<dyn Stream>>> {
            Ok(None)
        }

        fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
            Ok(Box::new(Nothing))
        }
    }

    struct Nothing;

    impl Stopper for Nothing {
        fn stop(&self) {}
    }

    /// The main thread would have waited for main for ever.
    #[test]
    fn a_panic_of_the_accepting_thread_ends_the_migration() {
        test_support::time_limit(Duration::from_secs(60), || {
            let mut vm = TestDestination::new(Ram::for_test(&[("ram", 2)]));
            let received = Destination::new(Default::default()).run(&mut vm, Box::new(Defective), &mut ());
            let error = received.err().map(|error| error.to_string());
            assert_eq!(error.as_deref(), Some("a thread panicked: the thread of the listener"));
        });
    }
}
