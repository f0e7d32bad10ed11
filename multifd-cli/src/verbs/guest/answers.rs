//! What a guest answers to clients of its monitor.

use std::time::Duration;

use multifd::{transport::uri::Uri, vm::SourceVm};
use serde_json::{Map, Value, json};

use super::{Event, MACHINE, Session, State};
use crate::{
    args::{Incoming, Origin},
    exit::Exit,
    qmp::{self, Command},
};

impl Session<'_> {
    /// The answer to a command, and whether it was the last.
    pub(super) fn answer(&mut self, command: &Command) -> (Result<Value, String>, bool) {
        let answer = match command {
            Command::GuestStatus => Ok(self.status()),
            Command::Migrate(uri) => self.answer_migrate(uri),
            Command::Incoming(incoming) => self.answer_incoming(incoming),
            // In no state that a migration of it has.
            Command::Pause | Command::Recover(_) | Command::Resume(_) => Err("this guest takes no postcopy".to_owned()),
            Command::Cancel => Ok(self.cancel()),
            Command::Stop => self.answer_stop(),
            Command::Cont => self.answer_cont(),
            Command::GuestResume => self.answer_resume(),
            Command::GuestFinish { passes, within } => self.answer_finish(*passes, *within),
            Command::Quit => match (&self.stop, self.state) {
                // It ends with the migration.
                (Some(_), State::Incoming) => Ok(self.cancel()),
                (Some(_), _) => Err("a migration is under way; cancel it first".to_owned()),
                (None, _) => return (Ok(json!({})), true),
            },
        };
        (answer, false)
    }

    /// Without effect where no migration is under way, as in QEMU.
    fn cancel(&self) -> Value {
        if let Some(stop) = &self.stop {
            self.qmp.cancelling();
            stop.cancel();
        }
        json!({})
    }

    fn answer_migrate(&mut self, uri: &Uri) -> Result<Value, String> {
        match self.state {
            State::Running => {}
            State::Outgoing => return Err("There's a migration process in progress".to_owned()),
            State::Stopped => return Err("the guest is paused; expected cont before it is migrated".to_owned()),
            State::Incoming | State::Paused | State::Migrated => return Err("the guest does not run here".to_owned()),
        }
        self.deadline = None;
        let mut options = self.args.transfer.source_options(MACHINE);
        self.qmp.settings().apply_to(&mut options);
        self.send(uri.clone(), options);
        Ok(json!({}))
    }

    fn answer_incoming(&mut self, incoming: &qmp::Incoming) -> Result<Value, String> {
        match (self.state, &self.args.incoming, &self.stop) {
            (State::Incoming, Some(Incoming::Defer), None) if self.failure.is_none() => {}
            (_, None, _) => return Err(qmp::NOT_INCOMING.to_owned()),
            _ => return Err(qmp::INCOMING_HAS_BEGUN.to_owned()),
        }
        let Origin::Uri(uri) = &incoming.from else {
            return Err(format!("{}: a guest comes over several connections; expected tcp, unix or fd", incoming.from));
        };
        self.args.listen.allow.check(Some(uri))?;
        self.receive(uri).map_err(|error| error.to_string())?;
        self.stays_after_failure = incoming.stays;
        Ok(json!({}))
    }

    fn answer_stop(&mut self) -> Result<Value, String> {
        match (self.state, &mut self.guest) {
            (State::Running, Some(guest)) => {
                guest.stop().map_err(|error| error.to_string())?;
                self.set_state(State::Stopped);
                Ok(json!({}))
            }
            (State::Stopped | State::Paused | State::Migrated, _) => Ok(json!({})),
            _ => Err("a migration has the guest; cancel it first".to_owned()),
        }
    }

    fn answer_cont(&mut self) -> Result<Value, String> {
        match (self.state, &mut self.guest) {
            (State::Stopped, Some(guest)) => {
                guest.run();
                self.set_state(State::Running);
                Ok(json!({}))
            }
            (State::Running | State::Outgoing, _) => Ok(json!({})),
            // Clients say cont after a migration that failed, without a look at the destination.
            (State::Paused, _) => {
                Err("the guest is paused in doubt: it may run at the destination. x-guest-resume resumes \
                                       it once it is known that it does not"
                    .to_owned())
            }
            (State::Migrated, _) => Err("the guest has left".to_owned()),
            _ => Err("Guest is waiting for an incoming migration".to_owned()),
        }
    }

    fn answer_finish(&mut self, passes: u64, within: f64) -> Result<Value, String> {
        let within = Duration::try_from_secs_f64(within).map_err(|error| error.to_string())?;
        match self.state {
            State::Running => {
                self.after_passes(passes, within, Event::Finish).map_err(|error| error.to_string())?;
            }
            // The source may know that we have the guest before this loop does.
            State::Incoming => self.finish_when_here = Some((passes, within)),
            State::Stopped | State::Outgoing | State::Paused | State::Migrated => {
                return Err("the guest does not stay here".to_owned());
            }
        }
        Ok(json!({}))
    }

    /// Resumes a guest that is paused in doubt.
    pub(super) fn answer_resume(&mut self) -> Result<Value, String> {
        match (self.state, &mut self.guest) {
            (State::Paused, Some(guest)) => {
                guest.resume().map_err(|error| error.to_string())?;
                self.set_state(State::Running);
                self.failure = None;
                Ok(json!({}))
            }
            _ => Err("the guest is not paused in doubt here".to_owned()),
        }
    }

    fn status(&mut self) -> Value {
        let status = self.monitor.status();
        let mut object = Map::new();
        object.insert("state".to_owned(), serde_json::to_value(self.state).unwrap_or_default());
        object.insert("passes".to_owned(), status.passes.into());
        object.insert("pages-written".to_owned(), status.pages_written.into());
        object.insert("guest-errors".to_owned(), status.guest_errors().into());
        if let Some((exit, error)) = &self.failure {
            object.insert("status".to_owned(), exit.status().into());
            object.insert("error".to_owned(), error.clone().into());
            if *exit == Exit::InDoubt {
                object.insert("in-doubt".to_owned(), true.into());
            }
        }
        Value::Object(object)
    }
}
