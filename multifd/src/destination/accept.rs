//! Accepts connections until all channels are here, and is not disturbed by those of strangers.
//!
//! A connection says what it is with its first bytes, and those of channels may arrive before those of main: a thread of
//! its own waits for them, see [`greeting`]. The listener closes when it is known that all channels have come.

use std::{io, time::Duration};

use rustix::io::Errno;

use super::{
    greeting,
    shared::{MainSlotStopper, Shared},
};
use crate::{
    error::{Connection, Error, Place},
    stop::{PanicGuard, stop_one},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    threads::{Task, ThreadRole},
    transport::{Listen, Pending, Stopper},
};

/// The thread that accepts, and what came of it.
pub(super) struct Acceptor {
    shared: Arc<Shared>,
    interrupt: Asked,
    thread: Option<Task<(Serving, Box<dyn Listen>)>>,
    connections: Serving,
}

/// The thread of each connection, by its number.
type Serving = Vec<(usize, Task<()>)>;

impl Acceptor {
    /// Begins to accept from `listener`.
    pub(super) fn spawn(mut listener: Box<dyn Listen>, shared: &Arc<Shared>) -> Result<Acceptor, Error> {
        let at = Place { connection: Connection::Unknown(0), offset: 0 };
        let asked = Arc::new(AtomicBool::new(false));
        let interrupt = Asked { asked: asked.clone(), inner: listener.stopper().map_err(Error::io(at))? };
        let inner = listener.stopper().map_err(Error::io(at))?;
        shared.stop.register(Box::new(Asked { asked: asked.clone(), inner }));
        let thread = {
            let (threads, stop) = (shared.options.threads.clone(), shared.stop.clone());
            let shared = shared.clone();
            Task::spawn(&*threads, ThreadRole::Accept, &stop, move || {
                // Main may still be waiting for the connection that is main.
                let guard = PanicGuard::new(&shared.stop, "the listener");
                let mut connections = Serving::new();
                if let Err(error) = accept_all(&mut *listener, &asked, &shared, &mut connections) {
                    shared.stop.stop(error);
                }
                guard.disarm();
                // It closes when main has said why the migration ends: until then the connections that were not accepted stay.
                (connections, listener)
            })?
        };
        Ok(Acceptor { shared: shared.clone(), interrupt, thread: Some(thread), connections: Serving::new() })
    }

    /// All channels are here: closes the listener and ends the connections of strangers.
    pub(super) fn close(&mut self) {
        self.interrupt.stop();
        self.shared.connections.complete();
        self.join();
    }

    /// Ends and joins all threads. The migration is over.
    pub(super) fn finish(&mut self) -> Option<Error> {
        self.interrupt.stop();
        // No thread may wait for a peer, or for another thread that has ended: the migration is over.
        MainSlotStopper(self.shared.clone()).stop();
        self.shared.barrier.stop();
        #[cfg(any(test, feature = "__broken-variants"))]
        self.shared.loose.stop();
        self.shared.connections.stop();
        self.join();
        let mut panicked = None;
        for (_, connection) in self.connections.drain(..) {
            if let Err(error) = connection.join() {
                panicked.get_or_insert(error);
            }
        }
        panicked
    }

    fn join(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        match thread.join() {
            Ok((connections, listener)) => {
                drop(listener);
                self.connections = connections;
            }
            Err(error) => {
                self.shared.stop.stop(error);
            }
        }
    }
}

/// Ends the waiting of a listener, and says that it was asked to: a signal may end it, too.
struct Asked {
    asked: Arc<AtomicBool>,
    inner: Box<dyn Stopper>,
}

impl Stopper for Asked {
    fn stop(&self) {
        self.asked.store(true, SeqCst);
        stop_one(&*self.inner);
    }
}

/// Accepts until it is interrupted, as it was `asked` to be.
fn accept_all(
    listener: &mut dyn Listen,
    asked: &AtomicBool,
    shared: &Arc<Shared>,
    connections: &mut Serving,
) -> Result<(), Error> {
    let mut failures = 0;
    loop {
        match listener.accept(None) {
            Ok(pending) => {
                failures = 0;
                reap(shared, connections);
                greet(pending, shared, connections)?;
            }
            Err(_) if asked.load(SeqCst) => return Ok(()),
            Err(error) if passes(&error) && !lasts(&error, failures, shared) => {
                if failures == 0 {
                    let helps = what_helps(&error).unwrap_or("time");
                    tracing::warn!(%error, helps, "a connection cannot be accepted now, tries again");
                }
                failures += 1;
                if shared.pause(ACCEPT_PAUSE) {
                    return Ok(());
                }
            }
            Err(source) => {
                let at = Place { connection: Connection::Unknown(connections.len()), offset: 0 };
                return Err(Error::Io { at, source: with_help(source) });
            }
        }
    }
}

/// Whether the listener may work again later: the process or the system is short of something, a signal has ended its waiting, or the
/// error is one of a connection that was gone before it was accepted.
fn passes(error: &io::Error) -> bool {
    use Errno as E;
    let of_this_moment = [
        E::MFILE,
        E::NFILE,
        E::NOBUFS,
        E::NOMEM,
        E::CONNABORTED,
        E::PROTO,
        E::NETDOWN,
        E::NETUNREACH,
        E::HOSTDOWN,
        E::HOSTUNREACH,
        E::NONET,
        E::PERM,
    ];
    error.kind() == io::ErrorKind::Interrupted
        || Errno::from_io_error(error).is_some_and(|error| of_this_moment.contains(&error))
}

/// Whether the process has no descriptor left and the connections of the migration itself hold them, so that waiting brings none: its
/// source would be told the same after the whole setup limit. Where strangers may hold them, or another source is waited for that goes
/// on after a break, one may come back. So it may where the host is short of something.
fn lasts(error: &io::Error, failures: u32, shared: &Shared) -> bool {
    let of_this_process = Errno::from_io_error(error) == Some(Errno::MFILE);
    failures >= SHORTAGE && of_this_process && shared.connections.are_all_known() && !shared.may_go_on()
}

/// What helps where the process or the system is short of something.
fn what_helps(error: &io::Error) -> Option<&'static str> {
    match Errno::from_io_error(error)? {
        Errno::MFILE => Some("a higher limit on open files (ulimit -n; of a service: LimitNOFILE), or fewer channels"),
        Errno::NFILE => Some("a higher limit on open files of the host (fs.file-max), or fewer channels"),
        Errno::NOBUFS | Errno::NOMEM => Some("more memory for the kernel, or fewer channels"),
        _ => None,
    }
}

/// `error` with what helps.
fn with_help(error: io::Error) -> io::Error {
    match what_helps(&error) {
        Some(helps) => {
            io::Error::new(error.kind(), format!("a connection cannot be accepted: {error}; what helps: {helps}"))
        }
        None => error,
    }
}

/// Joins the threads of connections that have ended: there may be any number of strangers, one after the other.
fn reap(shared: &Shared, connections: &mut Serving) {
    for number in shared.connections.ended() {
        if let Some(index) = connections.iter().position(|(other, _)| *other == number) {
            // A panic has stopped the migration, by the guard of its thread.
            let _ = connections.swap_remove(index).1.join();
        }
    }
}

/// Gives `pending` a thread that establishes it and finds out what it is.
///
/// # Errors
/// [`Error::Thread`]: it may be a connection of ours, which would be waited for.
fn greet(pending: Box<dyn Pending>, shared: &Arc<Shared>, connections: &mut Serving) -> Result<(), Error> {
    let stopper = match pending.stopper() {
        Ok(stopper) => stopper,
        Err(error) => {
            shared.drop_stranger(&pending.peer(), &format!("cannot be ended: {error}"));
            return Ok(());
        }
    };
    let number = shared.connections.add(stopper);
    let (threads, stop) = (shared.options.threads.clone(), shared.stop.clone());
    let shared = shared.clone();
    let thread = Task::spawn(&*threads, ThreadRole::Connection(number), &stop, move || {
        // Outlives the guard: an error or a panic is known as the reason before the source sees the connection close.
        let mut connection = None;
        let guard = PanicGuard::new(&shared.stop, Connection::Unknown(number));
        let goes_on = greeting::serve(pending, &mut connection, number, &shared);
        match connection.take() {
            Some(stream) if !goes_on => shared.connections.park(number, stream),
            stream => {
                drop(stream);
                shared.connections.remove(number);
            }
        }
        shared.switch.look_again();
        guard.disarm();
    })?;
    connections.push((number, thread));
    Ok(())
}

/// How long to wait before accepting again where it failed for now.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// After so many attempts in a row, which take a second, what is short is taken to stay so.
const SHORTAGE: u32 = 10;

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

    use multifd_proto::{command::Command, encoder::MainEncoder};

    use super::*;
    use crate::{destination::Destination, ram::Ram, testing::vm::TestDestination, transport::Stream};

    /// A listener with a defect.
    struct Defective;

    impl Listen for Defective {
        fn accept(&mut self, _timeout: Option<Duration>) -> io::Result<Box<dyn Pending>> {
            panic!("a defect of the transport");
        }

        fn try_accept(&mut self) -> io::Result<Option<Box<dyn Pending>>> {
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

    /// The main thread would have waited for main forever.
    #[test]
    fn a_panic_of_the_accepting_thread_ends_the_migration() {
        test_support::time_limit(Duration::from_secs(60), || {
            let mut vm = TestDestination::new(Ram::for_test(&[("ram", 2)]));
            let received = Destination::new(Default::default()).run(&mut vm, Box::new(Defective), &mut ());
            let error = received.err().map(|error| error.to_string());
            assert_eq!(error.as_deref(), Some("a thread panicked: the thread of the listener"));
        });
    }

    /// A listener in a process without free descriptors, until the test says otherwise.
    struct OutOfDescriptors {
        failures: usize,
        then: crate::testing::memory::MemoryListener,
    }

    impl Listen for OutOfDescriptors {
        fn accept(&mut self, timeout: Option<Duration>) -> io::Result<Box<dyn Pending>> {
            match self.failures.checked_sub(1) {
                Some(left) => {
                    self.failures = left;
                    Err(Errno::MFILE.into())
                }
                None => self.then.accept(timeout),
            }
        }

        fn try_accept(&mut self) -> io::Result<Option<Box<dyn Pending>>> {
            self.then.try_accept()
        }

        fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
            self.then.stopper()
        }
    }

    /// The source and its guest waited for the whole setup limit, and were told then that channels did not come.
    #[test]
    fn a_shortage_that_the_migration_causes_itself_ends_it_at_once_with_what_helps() {
        test_support::time_limit(Duration::from_secs(60), || {
            let (then, connector) = crate::testing::memory::listener(1 << 16);
            let options = crate::destination::Options {
                setup_timeout: None,
                stall_limit: None,
                channels: Some(2),
                ..Default::default()
            };
            let mut main = crate::transport::Connect::connect(&connector).unwrap();
            let mut begins = MainEncoder::default();
            begins.header().configuration("multifd").command(&Command::OpenReturnPath);
            main.write(&begins.bytes, &[]).unwrap();
            main.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
            let told = Arc::new(AtomicBool::new(false));
            let listener = OneThenNone { inner: then, taken: false, main, told: told.clone() };
            let mut vm = TestDestination::new(Ram::for_test(&[("ram", 2)]));
            let error = Destination::new(options).run(&mut vm, Box::new(listener), &mut ()).unwrap_err().to_string();
            assert!(error.contains("ulimit -n") && error.contains("cannot be accepted"), "{error}");
            // The kernel ends connections that were not accepted with the listener, and a source would take that for the reason.
            assert!(told.load(Relaxed), "the source is told before the listener closes");
        });
    }

    /// A listener whose process has descriptors for one connection.
    struct OneThenNone {
        inner: crate::testing::memory::MemoryListener,
        taken: bool,
        /// The source's end of the connection.
        main: Box<dyn Stream>,
        /// Whether it was told something when the listener closed.
        told: Arc<AtomicBool>,
    }

    impl Drop for OneThenNone {
        fn drop(&mut self) {
            self.told.store(self.main.read(&mut [0; 64]).is_ok_and(|bytes| bytes > 0), Relaxed);
        }
    }

    impl Listen for OneThenNone {
        fn accept(&mut self, timeout: Option<Duration>) -> io::Result<Box<dyn Pending>> {
            match std::mem::replace(&mut self.taken, true) {
                false => self.inner.accept(timeout),
                true => Err(Errno::MFILE.into()),
            }
        }

        fn try_accept(&mut self) -> io::Result<Option<Box<dyn Pending>>> {
            self.inner.try_accept()
        }

        fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
            self.inner.stopper()
        }
    }

    /// The migration ended with the first connection that found no free descriptor.
    #[test]
    fn a_listener_without_free_descriptors_tries_again_and_can_be_stopped() {
        test_support::time_limit(Duration::from_secs(60), || {
            for failures in [2, usize::MAX] {
                let (then, connector) = crate::testing::memory::listener(1 << 16);
                let destination = Destination::new(Default::default());
                let stop = destination.stop_handle();
                let mut main = crate::transport::Connect::connect(&connector).unwrap();
                main.write(b"QEVM\0\0\0\x02", &[]).unwrap();
                let mut vm = TestDestination::new(Ram::for_test(&[("ram", 2)]));
                if failures > 2 {
                    stop.cancel();
                }
                let error =
                    destination.run(&mut vm, Box::new(OutOfDescriptors { failures, then }), &mut ()).unwrap_err();
                let expected =
                    if failures > 2 { "cancelled" } else { "main, at byte 0: stream version 2 instead of 3" };
                assert_eq!(error.to_string(), expected);
            }
        });
    }
}
