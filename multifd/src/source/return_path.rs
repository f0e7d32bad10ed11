//! Listens to what the destination says on main, while the main thread writes to it.
//!
//! The destination answers PING, and ends with SHUT: status 0 when it has the VM. If it says anything else, or closes
//! main before that, the migration is stopped at once: the main thread may be waiting for something else.

use multifd_proto::{Violation, return_path::Message, wire::Step};

use crate::{
    error::{Connection, Error, Place},
    stop::StopHandle,
    sync::{Arc, Condvar, Mutex, lock, wait},
    threads::{Task, ThreadRole, Threads},
    transport::{Stopper, Stream},
};

/// The reading half of main on the source. Dropping it ends its thread.
pub(super) struct ReturnPath {
    verdict: Arc<Verdict>,
    stopper: Option<Box<dyn Stopper>>,
    thread: Option<Task<()>>,
}

#[derive(Default)]
struct Verdict {
    state: Mutex<Option<Result<(), Error>>>,
    changed: Condvar,
}

impl ReturnPath {
    /// Begins to read from `stream`.
    ///
    /// # Errors
    /// [`Error::Thread`].
    pub(super) fn listen(
        mut stream: Box<dyn Stream>,
        stop: &StopHandle,
        threads: &dyn Threads,
    ) -> Result<ReturnPath, Error> {
        let verdict = Arc::new(Verdict { state: Mutex::new(None), changed: Condvar::new() });
        let stopper = stream.stopper().ok();
        let thread = {
            let (verdict, stop_it) = (verdict.clone(), stop.clone());
            Task::spawn(threads, ThreadRole::ReturnPath, stop, move || {
                let mut end = End::new(verdict, stop_it);
                end.outcome = read_until_shut(&mut *stream, &end.stop);
            })?
        };
        Ok(ReturnPath { verdict, stopper, thread: Some(thread) })
    }

    /// Waits until the destination has confirmed that it has the VM.
    ///
    /// # Errors
    /// [`Error::Refused`] where it says that it has not; [`Error::Unconfirmed`] where it says nothing any more.
    pub(super) fn wait_for_shut(&self) -> Result<(), Error> {
        let mut state = lock(&self.verdict.state);
        loop {
            match state.take() {
                Some(verdict) => return verdict,
                None => state = wait(&self.verdict.changed, state),
            }
        }
    }
}

impl ReturnPath {
    /// Ends the thread, once it has read what the destination said before it left. Returns why the destination refused
    /// the VM, if it did: a better reason than the broken connections that follow.
    pub(super) fn end(mut self) -> Option<Error> {
        self.join();
        match lock(&self.verdict.state).take() {
            Some(Err(error @ Error::Refused { .. })) => Some(error),
            _ => None,
        }
    }

    fn join(&mut self) {
        if let Some(stopper) = self.stopper.take() {
            stopper.stop();
        }
        if let Some(thread) = self.thread.take()
            && let Err(error) = thread.join()
        {
            tracing::error!(%error, "the thread of the return path");
        }
    }
}

impl Drop for ReturnPath {
    fn drop(&mut self) {
        self.join();
    }
}

/// Gives the verdict when the thread ends, also by a panic: the main thread may be waiting for it.
struct End {
    verdict: Arc<Verdict>,
    stop: StopHandle,
    outcome: Result<(), Error>,
}

impl End {
    fn new(verdict: Arc<Verdict>, stop: StopHandle) -> End {
        let message = format!("the thread of {}", Connection::ReturnPath);
        End { verdict, stop, outcome: Err(Error::Panicked { message }) }
    }
}

impl Drop for End {
    fn drop(&mut self) {
        let mut state = lock(&self.verdict.state);
        *state = match std::mem::replace(&mut self.outcome, Ok(())) {
            Ok(()) => Some(Ok(())),
            // Before the commit this stops the migration and is its first error; afterwards the main thread is waiting for
            // it.
            Err(error) => self.stop.stop(error).map(Err).or(Some(Err(Error::Stopped))),
        };
        drop(state);
        self.verdict.changed.notify_all();
    }
}

fn read_until_shut(stream: &mut dyn Stream, stop: &StopHandle) -> Result<(), Error> {
    let mut buf = [0; 4 + multifd_proto::return_path::MAX_PAYLOAD as usize];
    let mut filled = 0;
    let mut position = 0;
    loop {
        let place = Place { connection: Connection::ReturnPath, offset: position };
        match Message::decode(&buf[..filled]).map_err(Error::protocol(place))? {
            Step::Item { item, used } => {
                buf.copy_within(used..filled, 0);
                filled -= used;
                position += used as u64;
                match item {
                    Message::Shut(0) if stop.is_committed() => return Ok(()),
                    Message::Shut(0) => {
                        return Err(Error::protocol(place)(Violation::UnexpectedElement {
                            element: "SHUT with status 0",
                            place: "before the end of the stream",
                        }));
                    }
                    Message::Shut(status) => return Err(Error::Refused { status }),
                    other => tracing::debug!(message = other.name(), "return path"),
                }
            }
            Step::Need(_) => match stream.read(&mut buf[filled..]) {
                Ok(0) => return Err(Error::Unconfirmed),
                Ok(n) => filled += n,
                Err(source) => return Err(Error::Io { at: place, source }),
            },
        }
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use std::io;

    use super::*;
    use crate::{ram::GuestRange, threads::StdThreads};

    /// A connection with a defect.
    struct Defective;

    impl Stream for Defective {
        fn write(&mut self, _header: &[u8], _pages: &[GuestRange<'_>]) -> io::Result<()> {
            Ok(())
        }

        fn read(&mut self, _buf: &mut [u8]) -> io::Result<usize> {
            panic!("a defect of the transport");
        }

        fn read_pages(&mut self, _pages: &[GuestRange<'_>]) -> io::Result<()> {
            Ok(())
        }

        fn try_clone(&self) -> io::Result<Box<dyn Stream>> {
            Ok(Box::new(Defective))
        }

        fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
            Err(io::ErrorKind::Unsupported.into())
        }

        fn peer(&self) -> String {
            "nobody".to_owned()
        }
    }

    /// The main thread would have waited for ever, with the guest paused.
    #[test]
    fn a_panic_of_the_thread_is_a_verdict() {
        test_support::time_limit(std::time::Duration::from_secs(60), || {
            let stop = StopHandle::new();
            stop.commit().unwrap();
            let path = ReturnPath::listen(Box::new(Defective), &stop, &StdThreads).unwrap();
            let error = path.wait_for_shut().unwrap_err();
            assert_eq!(error.to_string(), "a thread panicked: the thread of return path");
            assert!(matches!(super::super::undecided(error), Error::Undecided { .. }), "it may have read SHUT");
        });
    }

    #[test]
    fn a_panic_of_the_thread_before_the_commit_stops_the_migration() {
        test_support::time_limit(std::time::Duration::from_secs(60), || {
            let stop = StopHandle::new();
            let path = ReturnPath::listen(Box::new(Defective), &stop, &StdThreads).unwrap();
            assert!(matches!(path.wait_for_shut(), Err(Error::Stopped)));
            assert!(matches!(stop.take_first(), Some(Error::Panicked { .. })));
        });
    }
}
