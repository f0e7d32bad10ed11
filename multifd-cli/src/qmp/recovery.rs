//! `migrate-pause`, `migrate-recover` and `migrate` with `resume`: how a client has a postcopy go on whose network is lost.
//!
//! Each is possible in some states of the migration only. What is said in the others is what a QEMU says.

use multifd_qmp::server::{Arguments, CommandError};
use serde_json::{Value, json};

use super::{Command, Qmp, address};
use crate::{progress::lock, role::Role};

impl Qmp {
    /// Gives the connections of a postcopy up.
    pub(super) fn pause(&self, arguments: Arguments) -> Result<Value, CommandError> {
        arguments.end()?;
        if !self.is_in(None, &["postcopy-active", "postcopy-recover"]) {
            return Err(CommandError::generic(NOT_TO_PAUSE));
        }
        self.run(Command::Pause)
    }

    /// Has a destination listen for its source.
    pub(super) fn recover(&self, mut arguments: Arguments) -> Result<Value, CommandError> {
        let uri = arguments.text("uri")?.ok_or_else(|| Arguments::missing("uri"))?;
        arguments.end()?;
        if !self.is_in(Some(Role::Destination), &["postcopy-paused"]) {
            return Err(CommandError::generic(NOT_PAUSED_HERE));
        }
        let listens_at = self.run(Command::Recover(address::to_listen_at(&uri)?))?;
        if let Some(Ok(uri)) = listens_at.as_str().map(str::parse) {
            lock(&self.shared.state).migration.set_address(uri);
        }
        Ok(json!({}))
    }

    /// Begins a migration, or goes on with one.
    pub(super) fn migrate(&self, mut arguments: Arguments) -> Result<Value, CommandError> {
        let resumes = arguments.flag("resume")? == Some(true);
        let to = address::destination(arguments)?;
        if !resumes {
            return self.run(Command::Migrate(to));
        }
        if !self.is_in(Some(Role::Source), &["postcopy-paused"]) {
            return Err(CommandError::generic(NOTHING_TO_RESUME));
        }
        self.run(Command::Resume(to))
    }

    /// Whether a migration is under way, in the `role` if that is said, in one of the states `states`.
    fn is_in(&self, role: Option<Role>, states: &[&str]) -> bool {
        lock(&self.shared.state).migration.is_in(role, states)
    }
}

/// The words of QEMU 10.0 and 11.1.
const NOT_TO_PAUSE: &str = "migrate-pause is currently only supported during postcopy-active or postcopy-recover state";
const NOT_PAUSED_HERE: &str = "Migrate recover can only be run when postcopy is paused.";
const NOTHING_TO_RESUME: &str = "Cannot resume if there is no paused migration";
