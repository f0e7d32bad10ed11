//! The connections of one attempt: how they are opened, and how they end.

use std::time::Duration;

use super::{
    Attempt, Job, Whereabouts, connection::PageConnection, inbox::Inbox, return_path, whereabouts::after_failure,
};
use crate::{
    error::{Connection, Error, Place},
    progress::{Event, Observer, Phase},
    stop::PanicGuard,
    sync::{Arc, Deadline, atomic::Ordering::Relaxed},
    threads::{Task, ThreadRole},
    transport::{Connect, Stream, end_if_untaken},
};

/// One attempt, as the thread that runs it sees it.
pub(super) struct Link<'a> {
    to: &'a dyn Connect,
    attempt: Arc<Attempt>,
    observer: &'a mut dyn Observer,
    main: Option<PageConnection>,
    /// Until its thread has it.
    preempt: Option<PageConnection>,
    return_path: Option<Task<()>>,
    urgent: Option<Task<Result<PageConnection, Error>>>,
    part_is_open: bool,
    /// It goes on with a VM that was handed over before.
    goes_on: bool,
    pub(super) ram_section: u32,
    /// Where the VM is, as far as this attempt has come.
    pub(super) vm: Whereabouts,
    /// Whether the claims say what the destination has.
    pub(super) left_is_known: bool,
    /// Everything that the destination lacked was written, up to the end of the stream: only its confirmation is missing. Of an
    /// attempt before, until the destination says what it lacks.
    all_sent: bool,
}

impl<'a> Link<'a> {
    pub(super) fn new(
        to: &'a dyn Connect,
        attempt: Arc<Attempt>,
        observer: &'a mut dyn Observer,
        ram_section: u32,
        (vm, all_sent): (Whereabouts, bool),
    ) -> Link<'a> {
        Link {
            to,
            attempt,
            observer,
            main: None,
            preempt: None,
            return_path: None,
            urgent: None,
            part_is_open: false,
            goes_on: vm != Whereabouts::Here,
            ram_section,
            vm,
            left_is_known: vm == Whereabouts::Here,
            all_sent: all_sent && vm != Whereabouts::Here,
        }
    }

    pub(super) fn job(&self) -> &Arc<Job> {
        &self.attempt.job
    }

    pub(super) fn inbox(&self) -> &Inbox {
        &self.attempt.inbox
    }

    pub(super) fn main(&mut self) -> &mut PageConnection {
        self.main.as_mut().expect("phases begin with connect_main()")
    }

    pub(super) fn set_phase(&mut self, phase: Phase) {
        self.job().progress.set_phase(phase);
        self.observer.event(&Event::Phase(phase));
    }

    /// Opens main, and begins to listen to it.
    pub(super) fn connect_main(&mut self) -> Result<(), Error> {
        self.set_phase(Phase::Connect);
        self.attempt.stop.register(Box::new(self.attempt.inbox.clone()));
        let at = Place { connection: Connection::Main, offset: 0 };
        let (mut stream, reader) = self.open(Connection::Main)?.split().map_err(Error::io(at))?;
        if !self.job().options.preempt
            && let Err(error) = stream.limit_unsent(UNSENT)
        {
            tracing::debug!(%error, "requests may wait behind what the kernel has not sent");
        }
        self.main = Some(PageConnection::new(stream, Connection::Main, &self.attempt));
        self.return_path = Some(return_path::listen(reader, &self.attempt, self.goes_on)?);
        Ok(())
    }

    /// Opens the connection for pages that are asked for, where there is one. It says nothing until there are any.
    pub(super) fn connect_preempt(&mut self) -> Result<(), Error> {
        if self.job().options.preempt {
            let stream = self.open(Connection::Preempt)?;
            self.preempt = Some(PageConnection::new(stream, Connection::Preempt, &self.attempt));
        }
        Ok(())
    }

    /// Starts the thread that answers requests, where they have a connection of their own.
    pub(super) fn answer_on_preempt(&mut self) -> Result<(), Error> {
        let Some(mut preempt) = self.preempt.take() else { return Ok(()) };
        let attempt = self.attempt.clone();
        let body = move || {
            let guard = PanicGuard::new(&attempt.stop, Connection::Preempt);
            let outcome = answer_all(&mut preempt, &attempt.inbox);
            guard.disarm();
            match outcome {
                Ok(()) => Ok(preempt),
                Err(error) => {
                    attempt.stop.stop(error);
                    Err(Error::Stopped)
                }
            }
        };
        let threads = self.job().options.threads.clone();
        self.urgent = Some(Task::spawn(&*threads, ThreadRole::Urgent, &self.attempt.stop, body)?);
        Ok(())
    }

    /// Opens a section for pages on main, unless one is open.
    pub(super) fn open_part(&mut self) {
        if !std::mem::replace(&mut self.part_is_open, true) {
            let ram_section = self.ram_section;
            self.main().encoder().ram_part(ram_section, false);
        }
    }

    /// Ends the stream and waits for the confirmation. A page that is asked for from now on was not in the file.
    pub(super) fn finish(&mut self) -> Result<(), Error> {
        self.attempt.inbox.close();
        let preempt = match self.urgent.take() {
            // All requests are answered on it, and its end is on the way, before main says that all is sent.
            Some(thread) => Some(thread.join()??),
            None => None,
        };
        while let Some(urgent) = self.inbox().take() {
            self.open_part();
            self.main().answer(&urgent)?;
        }
        self.job().pages.check_unchanged()?;
        self.set_phase(Phase::Confirm);
        self.inbox().update(|mail| mail.end_sent = true);
        let (ram_section, part_is_open) = (self.ram_section, self.part_is_open);
        let encoder = self.main().encoder();
        if part_is_open {
            encoder.eos().footer(ram_section);
        }
        encoder.ram_part(ram_section, true).eos().footer(ram_section).eof();
        self.main().send()?;
        self.all_sent = true;
        self.inbox().wait(Deadline::after(None), |mail| mail.is_complete)?;
        self.main().finish();
        if let Some(mut preempt) = preempt {
            preempt.finish();
        }
        Ok(())
    }

    /// The destination has said what it has: it has the VM, and does not have everything, or would not have listened.
    pub(super) fn is_told_what_is_left(&mut self) {
        (self.vm, self.left_is_known, self.all_sent) = (Whereabouts::There, true, false);
    }

    /// Ends all connections and threads. Returns where the VM is, whether only the confirmation is missing there, and how the attempt
    /// went.
    pub(super) fn end(mut self, outcome: Result<(), Error>) -> (Whereabouts, bool, Result<(), Error>) {
        let attempt = self.attempt.clone();
        let failed = outcome.is_err();
        if let Err(error) = outcome {
            if attempt.refused.load(Relaxed) && self.return_path.is_some() {
                // A destination that is gone may have said why, and how far it came: that is still on its way.
                let _ = attempt.inbox.wait(Deadline::after(Some(LAST_WORDS)), |_| false);
            }
            // Unless another thread had a reason before.
            attempt.stop.stop(error);
        }
        if let Some(thread) = self.return_path.take() {
            log(thread.join());
        }
        if let Some(thread) = self.urgent.take() {
            log(thread.join().map(drop));
        }
        let first = attempt.stop.take_first();
        // Forgets what was registered.
        let _ = attempt.stop.decide();
        if !failed {
            return (Whereabouts::Complete, true, Ok(()));
        }
        let error = first.unwrap_or(Error::Stopped);
        let loaded = attempt.inbox.update(|mail| mail.is_loaded);
        let job = self.job();
        let left = self.left_is_known.then(|| job.claims.count_free(job.pages.present()));
        let (vm, error) = after_failure(self.vm, self.goes_on, loaded, left, error);
        let error = match error {
            // It may have taken the end, and its last word was lost with the connection; or the end was.
            Error::Incomplete { reason, .. } if self.all_sent => Error::Unacknowledged { reason },
            error => error,
        };
        (vm, self.all_sent, Err(error))
    }

    fn open(&self, connection: Connection) -> Result<Box<dyn Stream>, Error> {
        let at = Place { connection, offset: 0 };
        let pending = self.to.dial().map_err(Error::io(at))?;
        self.attempt.stop.register(pending.stopper().map_err(Error::io(at))?);
        let mut stream = pending.establish(None).map_err(Error::io(at))?;
        self.attempt.stop.register(stream.stopper().map_err(Error::io(at))?);
        end_if_untaken(&mut *stream, self.job().options.stall_limit);
        Ok(stream)
    }
}

/// Answers all requests until there are no more, and ends the connection: QEMU 7.2 waits for its last word.
fn answer_all(preempt: &mut PageConnection, inbox: &Inbox) -> Result<(), Error> {
    while let Some(urgent) = inbox.next()? {
        preempt.answer(&urgent)?;
    }
    preempt.encoder().eos();
    preempt.send()
}

fn log(ended: Result<(), Error>) {
    if let Err(error) = ended {
        tracing::debug!(%error, "a thread of an attempt that ended");
    }
}

/// How long a destination that takes no more bytes is listened to.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Bytes of the background that the kernel keeps and has not sent: a request waits for them where it has no connection of its own.
const UNSENT: usize = 128 << 10;
