//! Listens to what the destination says on main, while the main thread writes to it.
//!
//! Each kind of message has its place in the [`Mail`], where the main thread waits for it: the extensions that the
//! destination takes, its answer to the description, the last PONG, READY, and the verdict. The rest is only logged. If the destination says something else, or
//! closes main before the commit, the migration is stopped at once: the main thread may be waiting for something else.

use multifd_proto::{Violation, commit::SourceEvent, extension::Extensions, return_path::Message};

use super::incoming::Incoming;

use crate::{
    error::{Connection, Error, Place},
    pulse::Pulse,
    stop::StopHandle,
    sync::{Arc, Condvar, Mutex, lock, wait},
    threads::{Task, ThreadRole, Threads},
    transport::{RecvHalf, Stopper},
};

/// The reading half of main on the source. Dropping it ends its thread.
pub(super) struct ReturnPath {
    mail: Mailbox,
    stopper: Option<Box<dyn Stopper>>,
    thread: Option<Task<()>>,
}

/// Where the thread puts what it read, and the main thread waits for it.
#[derive(Clone, Default)]
struct Mailbox {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    mail: Mutex<Mail>,
    changed: Condvar,
}

#[derive(Default)]
struct Mail {
    /// What this side offered, if it did: only then the destination may accept.
    offered: Option<Extensions>,
    accepted: Option<Extensions>,
    /// DESCRIBE is on its way, and PREPARED has not come.
    described: bool,
    /// What PREPARED brought.
    prepared: Option<Vec<u8>>,
    /// What the last PONG said.
    pong: Option<u32>,
    /// The end of the stream is on its way: only then the destination may be ready, or have the VM.
    answer_is_due: bool,
    ready: bool,
    verdict: Option<Result<(), Error>>,
    /// The thread has ended, or the migration has, before an answer was due.
    ended: bool,
}

impl ReturnPath {
    /// Begins to read from `stream`, whose connection `stopper` ends. The destination may accept what is `offered`.
    ///
    /// # Errors
    /// [`Error::Thread`].
    pub(super) fn listen(
        mut stream: Box<dyn RecvHalf>,
        stopper: Option<Box<dyn Stopper>>,
        offered: Option<Extensions>,
        pulse: Pulse,
        stop: &StopHandle,
        threads: &dyn Threads,
    ) -> Result<ReturnPath, Error> {
        let mail = Mailbox::default();
        lock(&mail.shared.mail).offered = offered;
        // The thread may never begin.
        stop.register(Box::new(mail.clone()));
        let (mail_there, stop_there) = (mail.clone(), stop.clone());
        let thread = Task::spawn(threads, ThreadRole::ReturnPath, stop, move || {
            let mut end = End::new(mail_there, stop_there);
            let outcome = end.mail.read_until_shut(&mut *stream, &pulse);
            end.outcome = outcome;
        })?;
        Ok(ReturnPath { mail, stopper, thread: Some(thread) })
    }

    /// Waits for the extensions that the destination takes: none, if it does not know what was offered.
    ///
    /// # Errors
    /// [`Error::Stopped`]: the migration has ended.
    pub(super) fn wait_for_agreement(&self) -> Result<Extensions, Error> {
        self.mail.wait_for(|mail| mail.accepted.take())
    }

    /// The VM is about to be described: PREPARED may come from now on.
    pub(super) fn expect_prepared(&self) {
        lock(&self.mail.shared.mail).described = true;
    }

    /// Waits until the destination has made its VM. Returns its answer.
    ///
    /// # Errors
    /// [`Error::Stopped`]: the migration has ended.
    pub(super) fn wait_for_prepared(&self) -> Result<Vec<u8>, Error> {
        self.mail.wait_for(|mail| mail.prepared.take())
    }

    /// Waits until the destination has answered the PING of `value`: it has taken all that came before that on main. Each has a value of its own.
    ///
    /// # Errors
    /// [`Error::Stopped`]: the migration has ended.
    pub(super) fn wait_for_pong(&self, value: u32) -> Result<(), Error> {
        self.mail.wait_for(|mail| (mail.pong == Some(value)).then_some(()))
    }

    /// The end of the stream is about to be sent: READY and the verdict may come from now on.
    pub(super) fn expect_answer(&self) {
        lock(&self.mail.shared.mail).answer_is_due = true;
    }

    /// Waits for what the destination says next, and what it means for the commit; with the error, if it is one.
    pub(super) fn next_answer(&self) -> (SourceEvent, Error) {
        let answer = self.mail.wait_for(|mail| match mail.verdict.take() {
            // In the order in which they came.
            verdict if std::mem::take(&mut mail.ready) => {
                mail.verdict = verdict;
                Some((SourceEvent::Ready, Error::Stopped))
            }
            Some(Ok(())) => Some((SourceEvent::Running, Error::Unconfirmed)),
            Some(Err(error @ Error::Refused { .. })) => Some((SourceEvent::Refused, error)),
            Some(Err(error)) => Some((SourceEvent::Stopped, error)),
            None => None,
        });
        answer.unwrap_or_else(|error| (SourceEvent::Stopped, error))
    }

    /// Ends the connection. What the destination said before can still be read.
    pub(super) fn hang_up(&self) {
        if let Some(stopper) = &self.stopper {
            stopper.stop();
        }
    }

    /// Ends the thread, once it has read what the destination said before it left. Returns why the destination refused
    /// the VM, if it did: a better reason than the broken connections that follow.
    pub(super) fn end(mut self) -> Option<Error> {
        self.join();
        match lock(&self.mail.shared.mail).verdict.take() {
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

/// Before an answer is due nothing is worth waiting for once the migration has stopped. Afterwards the thread reads what the
/// destination said before its connection ended.
impl Stopper for Mailbox {
    fn stop(&self) {
        let mut mail = lock(&self.shared.mail);
        mail.ended |= !mail.answer_is_due;
        drop(mail);
        self.shared.changed.notify_all();
    }
}

impl Mailbox {
    /// Waits until `take` finds what it looks for, or the thread has ended.
    fn wait_for<T>(&self, mut take: impl FnMut(&mut Mail) -> Option<T>) -> Result<T, Error> {
        let mut mail = lock(&self.shared.mail);
        loop {
            if let Some(found) = take(&mut mail) {
                return Ok(found);
            }
            if mail.ended {
                return Err(Error::Stopped);
            }
            mail = wait(&self.shared.changed, mail);
        }
    }

    fn read_until_shut(&self, stream: &mut dyn RecvHalf, pulse: &Pulse) -> Result<(), Error> {
        let mut incoming = Incoming::new(stream, pulse);
        let mut reason = None;
        loop {
            let (message, place) = incoming.next()?;
            match message {
                // Without GO that is a broken rule, and yet the VM may run there: the commit decides.
                Message::Shut(0) if lock(&self.shared.mail).answer_is_due => return Ok(()),
                Message::Shut(0) => {
                    return Err(unexpected(place, "SHUT with status 0", "before the end of the stream"));
                }
                Message::Shut(status) => return Err(Error::Refused { status, reason }),
                Message::Reason(text) => reason = Some(text),
                Message::Accepted(extensions) => self.accepted(extensions, place)?,
                Message::Prepared { len } => {
                    self.may_be_prepared(place)?;
                    self.prepared(incoming.take(len)?);
                }
                Message::Ready => self.ready(place)?,
                Message::Pong(value) => self.answers(value),
                other => tracing::debug!(message = %other, "return path"),
            }
        }
    }

    fn accepted(&self, extensions: Extensions, place: Place) -> Result<(), Error> {
        let mut mail = lock(&self.shared.mail);
        match mail.offered.take() {
            Some(offered) if extensions.is_subset(&offered) => {
                mail.accepted = Some(extensions);
                self.shared.changed.notify_all();
                Ok(())
            }
            _ => Err(unexpected(place, "ACCEPTED", "of what was not offered, or a second time")),
        }
    }

    /// The destination has answered a PING. The first followed the offer: one that knows the offer has answered that before.
    fn answers(&self, value: u32) {
        let mut mail = lock(&self.shared.mail);
        mail.pong = Some(value);
        if mail.offered.take().is_some() {
            mail.accepted = Some(Extensions::default());
        }
        self.shared.changed.notify_all();
    }

    /// Whether PREPARED is due: the VM was described, and it comes once.
    fn may_be_prepared(&self, place: Place) -> Result<(), Error> {
        match std::mem::take(&mut lock(&self.shared.mail).described) {
            true => Ok(()),
            false => Err(unexpected(place, "PREPARED", "without DESCRIBE, or a second time")),
        }
    }

    fn prepared(&self, answer: Vec<u8>) {
        lock(&self.shared.mail).prepared = Some(answer);
        self.shared.changed.notify_all();
    }

    fn ready(&self, place: Place) -> Result<(), Error> {
        let mut mail = lock(&self.shared.mail);
        if !mail.answer_is_due {
            return Err(unexpected(place, "READY", "before the end of the stream"));
        }
        mail.ready = true;
        self.shared.changed.notify_all();
        Ok(())
    }
}

/// Gives the verdict when the thread ends, also by a panic: the main thread may be waiting for it.
struct End {
    mail: Mailbox,
    stop: StopHandle,
    outcome: Result<(), Error>,
}

impl End {
    fn new(mail: Mailbox, stop: StopHandle) -> End {
        let message = format!("the thread of {}", Connection::ReturnPath);
        End { mail, stop, outcome: Err(Error::Panicked { message }) }
    }
}

impl Drop for End {
    fn drop(&mut self) {
        // Not under the lock: to stop the migration is to wake those who wait for mail.
        let verdict = match std::mem::replace(&mut self.outcome, Ok(())) {
            Ok(()) => Some(Ok(())),
            // Before the commit this stops the migration and is its first error; afterwards the main thread is waiting for
            // it.
            Err(error) => self.stop.stop(error).map(Err).or(Some(Err(Error::Stopped))),
        };
        let mut mail = lock(&self.mail.shared.mail);
        mail.verdict = verdict;
        mail.ended = true;
        drop(mail);
        self.mail.shared.changed.notify_all();
    }
}

fn unexpected(place: Place, element: &'static str, at: &'static str) -> Error {
    Error::protocol(place)(Violation::UnexpectedElement { element, place: at })
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use std::io;

    use super::*;
    use crate::{ram::GuestRange, threads::StdThreads};

    /// A connection with a defect.
    struct Defective;

    impl RecvHalf for Defective {
        fn read(&mut self, _buf: &mut [u8]) -> io::Result<usize> {
            panic!("a defect of the transport");
        }

        fn read_pages(&mut self, _pages: &[GuestRange<'_>]) -> io::Result<()> {
            Ok(())
        }

        fn interrupter(&mut self) -> io::Result<Box<dyn Stopper>> {
            Err(io::ErrorKind::Unsupported.into())
        }
    }

    /// The main thread would have waited forever, with the guest paused.
    #[test]
    fn a_panic_of_the_thread_is_a_verdict() {
        test_support::time_limit(std::time::Duration::from_secs(60), || {
            let stop = StopHandle::new();
            stop.commit().unwrap();
            let path =
                ReturnPath::listen(Box::new(Defective), None, None, Pulse::default(), &stop, &StdThreads).unwrap();
            let (event, error) = path.next_answer();
            assert_eq!(event, SourceEvent::Stopped);
            assert_eq!(error.to_string(), "a thread panicked: the thread of return path");
        });
    }

    #[test]
    fn a_panic_of_the_thread_before_the_commit_stops_the_migration() {
        test_support::time_limit(std::time::Duration::from_secs(60), || {
            let stop = StopHandle::new();
            let path =
                ReturnPath::listen(Box::new(Defective), None, None, Pulse::default(), &stop, &StdThreads).unwrap();
            assert!(matches!(path.next_answer(), (SourceEvent::Stopped, Error::Stopped)));
            assert!(matches!(stop.take_first(), Some(Error::Panicked { .. })));
        });
    }
}
