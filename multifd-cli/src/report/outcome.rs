//! The end of a verb: its exit status, what went wrong, and the report, for a person or as one JSON object.

use std::io::{self, Write};

use multifd::error::Error;
use serde_json::{Map, Value};

use crate::{args::OutputArgs, exit::Exit, files, printable, stdout, terminal};

/// The end of a verb.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The exit status.
    pub exit: Exit,
    /// Why it is not [`Exit::Done`].
    pub error: Option<String>,
    /// The JSON report, but for `status` and `error`.
    pub report: Map<String, Value>,
    /// The same for a person; may be empty.
    pub text: String,
}

impl Outcome {
    /// A good end, described by `report`.
    pub fn done(report: Map<String, Value>, text: String) -> Outcome {
        Outcome { exit: Exit::Done, error: None, report, text }
    }

    /// An end without a report.
    pub fn failed(exit: Exit, error: impl ToString) -> Outcome {
        Outcome { exit, error: Some(error.to_string()), report: Map::new(), text: String::new() }
    }

    /// The end of a migration that did not come to its end.
    pub fn migration_failed(error: &Error, report: Map<String, Value>) -> Outcome {
        Outcome { exit: Exit::from(error), error: Some(files::message(error)), report, text: String::new() }
    }

    /// Adds `message`. The exit status becomes `exit` where all was well so far, and where it says more than the one before.
    pub fn worsen(&mut self, exit: Exit, message: &str) {
        if self.exit == Exit::Done || exit == Exit::InDoubt {
            self.exit = exit;
        }
        self.error = Some(match self.error.take() {
            Some(error) => format!("{error}; {message}"),
            None => message.to_owned(),
        });
    }

    /// Takes note of what failed beside the migration. Who reads it must not take the migration for one that failed, and begin again.
    pub fn worsen_beside(&mut self, message: &str) {
        let done = if self.exit == Exit::Done { "all is done, but " } else { "" };
        self.worsen(Exit::Failed, &format!("{done}{message}"));
    }

    /// The JSON object.
    pub fn json(&self) -> Value {
        let mut object = Map::new();
        object.insert("status".to_owned(), self.exit.status().into());
        if let Some(error) = &self.error {
            object.insert("error".to_owned(), error.clone().into());
        }
        if self.exit == Exit::InDoubt {
            object.insert("in-doubt".to_owned(), true.into());
        }
        if self.exit == Exit::Incomplete {
            object.insert("incomplete".to_owned(), true.into());
        }
        object.extend(self.report.clone());
        Value::Object(object)
    }

    /// Prints it: the result to stdout, what went wrong to stderr. `for_parent`: another process reports the error.
    ///
    /// Returns the exit status. It is not [`Exit::Done`] where the result could not be written.
    pub fn print(&self, output: &OutputArgs, for_parent: bool) -> Exit {
        let printed = if output.json { self.print_json() } else { print(&printable::lines(&self.text)) };
        if let Some(error) = self.error.as_ref().filter(|_| !for_parent) {
            terminal::say(&format!("multifd: {error}"));
        }
        match printed {
            // What reads has ended because it has enough, as head does.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                if self.exit == Exit::Done {
                    Exit::Failed
                } else {
                    self.exit
                }
            }
            Err(error) => {
                let done = if self.exit == Exit::Done { "all is done, but " } else { "" };
                terminal::say(&format!("multifd: {done}the result could not be written to stdout: {error}"));
                if self.exit == Exit::Done { Exit::Failed } else { self.exit }
            }
            Ok(()) => self.exit,
        }
    }

    /// Prints the JSON object to stdout.
    ///
    /// # Errors
    /// The kernel's.
    pub fn print_json(&self) -> io::Result<()> {
        print(&format!("{}\n", printable::json(&self.json().to_string())))
    }
}

/// Writes `text` to stdout.
///
/// # Errors
/// The kernel's; [`io::ErrorKind::NotConnected`] where the process was started without a stdout.
fn print(text: &str) -> io::Result<()> {
    if text.is_empty() {
        return Ok(());
    }
    if stdout::was_closed() {
        return Err(io::Error::new(io::ErrorKind::NotConnected, "it is closed"));
    }
    let mut lock = io::stdout().lock();
    lock.write_all(text.as_bytes())?;
    lock.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A restore whose QEMU did not take its settings back said only that, with the status of one that had failed.
    #[test]
    fn what_fails_beside_a_migration_does_not_hide_that_it_is_done() {
        let mut done = Outcome::done(Map::new(), String::new());
        done.worsen_beside("the settings were not put back");
        let error = done.error.as_deref();
        assert_eq!((done.exit, error), (Exit::Failed, Some("all is done, but the settings were not put back")));
        let mut doubt = Outcome::failed(Exit::InDoubt, "it is not known");
        doubt.worsen_beside("x");
        assert_eq!((doubt.exit, doubt.error.as_deref()), (Exit::InDoubt, Some("it is not known; x")));
    }

    #[test]
    fn a_failure_has_its_status_and_reason_in_front() {
        let mut outcome = Outcome::failed(Exit::Peer, "bad magic");
        outcome.report.insert("channels".to_owned(), 3.into());
        assert_eq!(outcome.json().to_string(), r#"{"status":"failed","error":"bad magic","channels":3}"#);
        assert_eq!(Outcome::failed(Exit::Cancelled, "x").json()["status"], "cancelled");
        let in_doubt = Outcome::failed(Exit::InDoubt, "x").json();
        assert_eq!((&in_doubt["status"], &in_doubt["in-doubt"]), (&"failed".into(), &true.into()));
    }
}
