//! A QEMU as an operator sees it, through its monitor: what it is, and the settings that a migration needs.
//!
//! `multifd checkpoint` and `multifd restore` ask the QEMU instead of relying on how it was set up: a QEMU with another number
//! of channels, another compression or another machine waits forever without a word.

mod ending;
mod interrupts;
mod look;
mod settings;
mod tls;

use std::{
    fs::Permissions,
    io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use multifd::transport::uri::Uri;
use multifd_qmp::{Client, Error, Status};
use serde_json::{Value, json};

pub use self::{
    ending::REST_PARAMETERS,
    interrupts::Interrupts,
    look::{Backend, Look},
    settings::{Changed, Wanted},
    tls::{QemuIs, QemuTls},
};
use crate::exit::Exit;

/// The monitor of a QEMU. A connection that breaks is made again once.
pub struct Monitor {
    path: PathBuf,
    client: Client,
    interrupts: Interrupts,
    limit: Duration,
    /// An interrupt ends the waits. Later, when things are put in order, only a second one does.
    in_order: bool,
}

/// Why a QEMU does not do what it was told.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// The exit status.
    pub exit: Exit,
    /// In words.
    pub message: String,
    /// The monitor is gone, or does not answer.
    pub lost: bool,
    /// QEMU itself has said no. Otherwise, of a command that was sent, it is not known whether QEMU has run it.
    pub refused: bool,
    /// No process listens there any more: the QEMU has ended.
    pub gone: bool,
}

impl Refusal {
    /// QEMU is not what it has to be.
    pub fn new(exit: Exit, message: impl Into<String>) -> Refusal {
        Refusal { exit, message: message.into(), lost: false, refused: false, gone: false }
    }
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Refusal {
        Refusal::new(Exit::Failed, error.to_string())
    }
}

impl Monitor {
    /// Connects to the monitor at `path`. An answer may take `limit`.
    ///
    /// # Errors
    /// No QEMU speaks QMP there, or it serves another client.
    pub fn connect(path: &Path, limit: Duration, interrupts: &Interrupts) -> Result<Monitor, Refusal> {
        let client = open(path, limit, interrupts, 1).map_err(|error| explain(path, &error))?;
        Ok(Monitor { path: path.to_owned(), client, interrupts: interrupts.clone(), limit, in_order: false })
    }

    /// What the QEMU is, and how it is set.
    ///
    /// # Errors
    /// Those of [`Monitor::execute`].
    pub fn look(&mut self) -> Result<Look, Refusal> {
        Look::at(self)
    }

    /// Runs `command`. A connection that was lost meanwhile is made again, and the command repeated, so it has to be one
    /// that may be run twice.
    ///
    /// # Errors
    /// QEMU refuses it, is gone, or does not answer in time.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, Refusal> {
        let closed = match self.client.execute(command, arguments.clone()) {
            Err(error @ Error::Closed { .. }) => error,
            result => return result.map_err(|error| explain(&self.path, &error)),
        };
        match self.reconnect() {
            Ok(()) => self.client.execute(command, arguments).map_err(|error| explain(&self.path, &error)),
            Err(error) => {
                let gone = matches!(&error, Error::Connect { source, .. }
                    if matches!(source.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound));
                Err(Refusal { gone, ..explain(&self.path, &closed) })
            }
        }
    }

    /// Runs `command`, which may not be run twice.
    ///
    /// # Errors
    /// QEMU refuses it; or is gone, does not answer in time, or the wait was interrupted: then it may have run it or not.
    pub fn execute_once(&mut self, command: &str, arguments: Value) -> Result<Value, Refusal> {
        self.client.execute(command, arguments).map_err(|error| explain(&self.path, &error))
    }

    /// Runs `command`, which may not be run twice, although QEMU's main loop may be waiting for a page of the guest: out of band,
    /// where QEMU has that.
    ///
    /// # Errors
    /// Those of [`Monitor::execute_once`].
    pub fn execute_beside(&mut self, command: &str, arguments: Value) -> Result<Value, Refusal> {
        let answer = match self.client.is_out_of_band() {
            true => self.client.execute_out_of_band(command, arguments),
            false => self.client.execute(command, arguments),
        };
        answer.map_err(|error| explain(&self.path, &error))
    }

    /// Runs `command` if the QEMU has it.
    ///
    /// # Errors
    /// As [`Monitor::execute`], but for a refusal.
    pub fn execute_if_known(&mut self, command: &str, arguments: Value) -> Result<Option<Value>, Refusal> {
        match self.execute(command, arguments) {
            Ok(answer) => Ok(Some(answer)),
            Err(refusal) if refusal.lost || refusal.exit != Exit::Failed => Err(refusal),
            Err(_) => Ok(None),
        }
    }

    /// The state of the migration, and all of the answer.
    ///
    /// # Errors
    /// Those of [`Monitor::execute`].
    pub fn migration(&mut self) -> Result<(Status, Value), Refusal> {
        let answer = self.execute("query-migrate", json!({}))?;
        Ok((Status::of(&answer), answer))
    }

    /// The run state.
    ///
    /// # Errors
    /// Those of [`Monitor::execute`].
    pub fn run_state(&mut self) -> Result<String, Refusal> {
        let answer = self.execute("query-status", json!({}))?;
        Ok(answer["status"].as_str().unwrap_or("unknown").to_owned())
    }

    /// Waits until `is_awaited` is true of the run state, at most for `limit`. Returns the last one either way.
    ///
    /// # Errors
    /// Those of [`Monitor::execute`].
    pub fn wait_run_state(&mut self, limit: Duration, is_awaited: impl Fn(&str) -> bool) -> Result<String, Refusal> {
        let deadline = Instant::now() + limit;
        loop {
            let state = self.run_state()?;
            if is_awaited(&state) || Instant::now() >= deadline {
                return Ok(state);
            }
            thread::sleep(POLL_INTERVAL);
        }
    }

    /// From here on things are put in order: the first interrupt has been heard, only another one ends a wait.
    pub fn put_in_order(&mut self) {
        self.in_order = true;
        let interrupts = self.interrupts.clone();
        let heard = interrupts.count().max(1);
        self.client.set_interrupted(Some(Box::new(move || interrupts.count() > heard)));
    }

    fn reconnect(&mut self) -> Result<(), Error> {
        let allowed = if self.in_order { self.interrupts.count().max(1) + 1 } else { 1 };
        let limit = self.limit.min(RECONNECT_LIMIT);
        let deadline = Instant::now() + limit;
        loop {
            match open(&self.path, limit, &self.interrupts, allowed) {
                Ok(client) => {
                    self.client = client;
                    return Ok(());
                }
                // A process that is ending still listens for a moment.
                Err(Error::Closed { .. }) if Instant::now() < deadline => thread::sleep(POLL_INTERVAL),
                Err(error) => return Err(error),
            }
        }
    }
}

/// Connects; the interrupt number `interrupt` ends the wait.
fn open(path: &Path, limit: Duration, interrupts: &Interrupts, interrupt: u32) -> Result<Client, Error> {
    let interrupts = interrupts.clone();
    let is_over = move || interrupts.count() >= interrupt;
    let mut client = Client::builder().limit(limit).interrupted(is_over).out_of_band().connect(path)?;
    client.set_limit(limit);
    Ok(client)
}

/// `error` as an operator needs it.
fn explain(path: &Path, error: &Error) -> Refusal {
    let at = format!("unix:{}", path.display());
    let (exit, message) = match error {
        Error::Interrupted { .. } => (Exit::Cancelled, multifd::error::Error::Cancelled.to_string()),
        Error::Connect { source, .. } => {
            let advice = match source.kind() {
                io::ErrorKind::NotFound => "; expected the PATH of a QEMU's -qmp unix:PATH,server=on,wait=off",
                io::ErrorKind::ConnectionRefused => "; the process that listened there has ended",
                io::ErrorKind::WouldBlock => {
                    "; it takes no more clients: a QEMU serves one at a time on each -qmp socket"
                }
                _ => "",
            };
            (Exit::Failed, format!("{at}: {source}{advice}"))
        }
        Error::NoAnswer { command, limit } if command == "greeting" => {
            let advice = "a QEMU serves one client at a time on each -qmp socket, so another one may have it; a second -qmp \
                          option gives it a second socket";
            (Exit::Failed, format!("{at}: no QMP greeting within {limit:?}: {advice}"))
        }
        Error::NoAnswer { .. } => {
            (Exit::Failed, format!("{at}: {error}; its main loop may be blocked (--qmp-timeout)"))
        }
        Error::Unexpected { .. } | Error::Codec { .. } => {
            (Exit::Peer, format!("{at}: {error}; expected the socket of a QEMU's -qmp option"))
        }
        _ => (Exit::Failed, format!("{at}: {error}")),
    };
    Refusal { exit, message, lost: error.is_lost(), refused: matches!(error, Error::Refused { .. }), gone: false }
}

/// Where the two ends of the migration meet.
pub struct Meeting {
    /// What QEMU is given.
    pub uri: Uri,
    /// Keeps others out, and is removed with its sockets.
    directory: Option<tempfile::TempDir>,
    /// How many sockets it has had.
    places: u32,
}

impl Meeting {
    /// At `uri`, or in a directory of this user alone.
    ///
    /// # Errors
    /// The directory cannot be made.
    pub fn at(uri: Option<&Uri>) -> io::Result<Meeting> {
        if let Some(uri) = uri {
            return Ok(Meeting { uri: uri.clone(), directory: None, places: 1 });
        }
        let directory = private_directory()?;
        let uri = Uri::Unix(directory.path().join("migration"));
        Ok(Meeting { uri, directory: Some(directory), places: 1 })
    }

    /// Moves on, for one more connection: in the private directory to a socket that was not there before.
    pub fn move_on(&mut self) {
        if let Some(directory) = &self.directory {
            self.places += 1;
            self.uri = Uri::Unix(directory.path().join(self.places.to_string()));
        }
    }

    /// Whether only processes of this user can get there.
    pub fn is_private(&self) -> bool {
        self.directory.is_some()
    }
}

/// A new directory that only this user can enter, removed with its contents. It has a path that is short enough for sockets in it.
///
/// # Errors
/// The kernel's; [`io::ErrorKind::InvalidInput`] where the path of `TMPDIR` is too long.
pub fn private_directory() -> io::Result<tempfile::TempDir> {
    let place = std::env::temp_dir();
    // By itself it leaves the rights to the umask.
    let directory =
        tempfile::Builder::new().prefix("multifd-").permissions(Permissions::from_mode(0o700)).tempdir_in(&place);
    let directory = directory.map_err(|error| {
        let kind = error.kind();
        // The name of what was to be made, which `error` has in it, says nothing to people.
        let error = io::Error::from(kind);
        io::Error::new(kind, format!("{place:?}: no directory can be made in it: {error}; TMPDIR names another place"))
    })?;
    let socket = format!("unix:{}", directory.path().join(LONGEST_NAME).display());
    if directory.path().to_str().is_none() || socket.parse::<Uri>().is_err() {
        let message =
            format!("{place:?}: its name is too long, or not UTF-8, for sockets in it; TMPDIR names another place");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    Ok(directory)
}

/// Of the sockets in a private directory.
const LONGEST_NAME: &str = "migration";

/// What QEMU says went wrong, with what to do about a socket that it cannot reach.
pub fn reason(answer: &Value, meeting: &Meeting) -> String {
    let Some(reason) = answer["error-desc"].as_str() else { return "QEMU does not say why".to_owned() };
    with_advice(reason, meeting)
}

/// Adds to QEMU's `reason` what to do about a private socket that it cannot reach.
pub fn with_advice(reason: &str, meeting: &Meeting) -> String {
    let unreachable = ["Permission denied", "No such file"].iter().any(|text| reason.contains(text));
    if meeting.is_private() && unreachable {
        return format!(
            "{reason}. QEMU runs as another user or sees other files; --listen URI names a place that both can reach"
        );
    }
    reason.to_owned()
}

/// Between two looks at something that changes by itself.
pub const POLL_INTERVAL: Duration = Duration::from_millis(10);
/// How long a connection that broke may take to be made again.
const RECONNECT_LIMIT: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_private_socket_that_qemu_cannot_reach_is_explained() {
        let private = Meeting::at(None).unwrap();
        let advice = with_advice("Failed to connect to '/tmp/x': Permission denied", &private);
        assert!(advice.contains("Permission denied") && advice.contains("--listen"), "{advice}");
        assert_eq!(with_advice("No space left", &private), "No space left");
        let named = Meeting::at(Some(&"tcp:127.0.0.1:1".parse().unwrap())).unwrap();
        assert_eq!(with_advice("Permission denied", &named), "Permission denied");
    }

    #[test]
    fn the_private_directory_is_this_users_alone_and_goes_away() {
        let meeting = Meeting::at(None).unwrap();
        let Uri::Unix(path) = &meeting.uri else { panic!("{}", meeting.uri) };
        let directory = path.parent().unwrap().to_owned();
        assert_eq!(std::fs::metadata(&directory).unwrap().permissions().mode() & 0o777, 0o700);
        drop(meeting);
        assert!(!directory.exists());
    }
}
