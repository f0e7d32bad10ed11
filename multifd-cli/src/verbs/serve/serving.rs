//! One client: its VM is handed over, and gets its memory.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use multifd::{
    error::{Connection, Error, Place},
    postcopy::{Source, Whereabouts},
    transport::{Connect, Pending, uri::Uri},
    vm::VmError,
};
use serde_json::{Map, Value};

use super::{Server, clients, single::Single};
use crate::{
    exit::Exit,
    report::Outcome,
    shell,
    verbs::postcopy::{LOOK_THERE, NOT_SET_UP, PostcopyReport, record::Record, report_of, what_to_type},
};

/// A client that has a place.
pub struct Serving<'a> {
    pub server: &'a Server,
    pub number: u32,
    pub peer: String,
    pub place: &'a clients::Place,
}

impl Serving<'_> {
    /// Serves the client that `pending` is, to its end.
    pub fn run(&self, pending: Box<dyn Pending>) -> Outcome {
        let mut outcome = match self.server.original.source() {
            Ok(source) => self.hand_over(source, pending),
            Err(error) => Outcome::failed(Exit::from(&error), format!("{}: {error}", self.name())),
        };
        name(&mut outcome, self.number, &self.peer);
        outcome
    }

    fn hand_over(&self, mut source: Source, pending: Box<dyn Pending>) -> Outcome {
        self.place.begin(&source.stop_handle(), source.progress());
        let begun = Instant::now();
        let mut path = self.server.notes.clone().into_os_string();
        path.push(format!("-{}", self.number));
        let record = Record::begin_clone(&PathBuf::from(path), || Ok(self.server.identity.clone()), &self.name());
        let mut record = match record {
            Ok(record) => record,
            Err(error) => return Outcome::failed(Exit::Failed, format!("{}: {error}", self.name())),
        };
        let sent = self
            .connector(pending)
            .and_then(|connector| source.hand_over(&*connector, &mut || self.may_run(&mut record)));
        self.conclude(&source, record, begun, sent.err())
    }

    /// # Errors
    /// There is no name that the certificate of this client has to be for.
    fn connector(&self, pending: Box<dyn Pending>) -> Result<Box<dyn Connect + Send + Sync>, Error> {
        let limit = self.server.stall_limit.unwrap_or(ESTABLISHED).min(ESTABLISHED);
        let single = Box::new(Single::new(pending, limit));
        match &self.server.tls {
            Some(tls) => tls.over(single, &self.peer).map_err(|source| Error::Io { at: MAIN, source }),
            None => Ok(single),
        }
    }

    /// # Errors
    /// The server ends; the note could not be written.
    fn may_run(&self, record: &mut Record) -> Result<(), VmError> {
        if !self.place.may_run() {
            return Err(ENDING.into());
        }
        record.hand_over()?;
        tracing::info!("{}: is told to run the VM", self.name());
        Ok(())
    }

    fn conclude(&self, source: &Source, record: Record, begun: Instant, error: Option<Error>) -> Outcome {
        let mut report: Map<String, Value> = report_of(source, &self.server.checkpoint, begun.elapsed());
        let note = record.path().to_owned();
        if let Whereabouts::InDoubt | Whereabouts::There = source.vm() {
            report.insert("state".to_owned(), note.display().to_string().into());
        }
        record.leave(source.vm(), error.as_ref());
        let Some(error) = error else {
            let figures = PostcopyReport::from(&source.report()).text();
            return Outcome::done(report, format!("{} has everything\n{figures}", self.name()));
        };
        let message = format!("{}: {error}{}", self.name(), self.advice(&error, &note));
        Outcome { error: Some(message), ..Outcome::migration_failed(&error, report) }
    }

    fn advice(&self, error: &Error, note: &Path) -> String {
        let (file, state) = (shell::word(self.server.checkpoint.path()), shell::word(note));
        let recover = || {
            let again = Uri::Unix("PATH".into());
            let tls = self.server.tls.as_ref().map_or_else(String::new, |tls| tls.options());
            format!("{}, then: multifd send {file} unix:PATH --recover --state {state}{tls}", what_to_type(&again))
        };
        match error {
            Error::Incomplete { .. } => format!(
                ". Its guest waits for the next page that it does not have, and nothing is lost while that QEMU and the file \
                 are there. To go on, at that QEMU (status postcopy-paused): {}",
                recover()
            ),
            Error::InDoubt { .. } => format!(
                ". It was told to run the VM and has not said that it did. If that QEMU is there (status postcopy-paused): \
                 {}. If it has ended, remove {state}",
                recover()
            ),
            Error::Unacknowledged { .. } => {
                format!(". {LOOK_THERE}, and {state} can be removed; if it says postcopy-paused: {}", recover())
            }
            Error::Unconfirmed | Error::Refused { .. } | Error::Io { .. } => format!(". {NOT_SET_UP}"),
            _ => String::new(),
        }
    }

    fn name(&self) -> String {
        format!("client {} ({})", self.number, self.peer)
    }
}

/// Says in the report which client it is of.
pub fn name(outcome: &mut Outcome, number: u32, peer: &str) {
    outcome.report.insert("client".to_owned(), number.into());
    outcome.report.insert("peer".to_owned(), peer.into());
}

/// Why a client gets no VM any more.
pub const ENDING: &str = "the server ends, and its VM was not handed over";
const MAIN: Place = Place { connection: Connection::Main, offset: 0 };
/// The longest that a connection may take to be ready.
const ESTABLISHED: Duration = Duration::from_secs(30);
