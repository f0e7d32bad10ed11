//! The control socket: commands to a running guest, one JSON value a line, one answer a line.
//!
//! ```text
//! "status"                                   what it is doing
//! {"migrate": "tcp:host:4444"}               begin to migrate it there; "status" tells how it went
//! "cancel"                                   cancel that
//! "resume"                                   resume a guest that is paused in doubt, and is known not to run elsewhere
//! {"finish": {"passes": 2, "within": 30}}    end after so many passes over its memory, or so many seconds
//! "quit"                                     end
//! ```
//!
//! An answer is `{"return": …}` or `{"error": "…"}`.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    sync::mpsc,
    thread,
    time::Duration,
};

use multifd::{
    threads,
    transport::unix::{OwnPath, listen_privately},
};
use rustix::{net::sockopt::socket_peercred, process::geteuid};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// What can be asked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Command {
    /// What the guest is doing.
    Status,
    /// Begin to migrate it to this URI.
    Migrate(String),
    /// Cancel the migration.
    Cancel,
    /// Resume a guest that is paused because the outcome of its migration is in doubt.
    Resume,
    /// End after `passes` more passes over its memory, or after `within` seconds.
    Finish {
        /// Complete passes, counted from now.
        passes: u64,
        /// Seconds.
        within: f64,
    },
    /// End now.
    Quit,
}

/// A command that waits for its answer.
pub struct Request {
    /// What is asked.
    pub command: Command,
    /// Takes the answer.
    pub answer: mpsc::Sender<Result<Value, String>>,
}

/// A socket where commands arrive. Dropping it removes the path, if it is still ours.
pub struct Control {
    _path: OwnPath,
}

impl Control {
    /// Listens at `path`, to which only this user gets access, and passes each command to `requests`. A socket that a
    /// killed guest left behind is replaced.
    ///
    /// # Errors
    /// [`io::ErrorKind::AddrInUse`] where the path is something else or a process listens there; the kernel's.
    pub fn listen(path: &Path, requests: impl Fn(Request) + Clone + Send + 'static) -> io::Result<Control> {
        let (listener, own) = listen_privately(path)?;
        // Both kinds of threads end with the process.
        threads::spawn("control", move || {
            for stream in listener.incoming() {
                let requests = requests.clone();
                let served = stream.and_then(|stream| {
                    check_user(&stream)?;
                    threads::spawn("control connection", move || {
                        if let Err(error) = serve(&stream, &requests) {
                            tracing::debug!(%error, "control connection");
                        }
                    })
                });
                if let Err(error) = served {
                    tracing::warn!(%error, "a control connection is not served");
                    // Out of descriptors or threads: it would fail again at once.
                    thread::sleep(AFTER_FAILURE);
                }
            }
        })?;
        Ok(Control { _path: own })
    }
}

/// The file's rights keep others out; this is for one who was given the socket by another way, such as a bind mount.
fn check_user(stream: &UnixStream) -> io::Result<()> {
    let user = socket_peercred(stream)?.uid;
    if user == geteuid() || user.is_root() {
        return Ok(());
    }
    let message = format!("user {} may not give commands to a guest of user {}", user.as_raw(), geteuid().as_raw());
    Err(io::Error::new(io::ErrorKind::PermissionDenied, message))
}

/// Sends `command` to the control socket at `path` and returns the answer.
///
/// # Errors
/// The connection's; [`io::ErrorKind::Other`] with the other side's error.
pub fn ask(path: &Path, command: &Command) -> io::Result<Value> {
    let mut stream = UnixStream::connect(path)?;
    let line = serde_json::to_string(command).map_err(io::Error::other)?;
    writeln!(stream, "{line}")?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer)?;
    let mut answer: Value = serde_json::from_str(&answer).map_err(io::Error::other)?;
    match answer.get("error").and_then(Value::as_str) {
        Some(error) => Err(io::Error::other(error.to_owned())),
        None => Ok(answer["return"].take()),
    }
}

fn serve(stream: &UnixStream, requests: &impl Fn(Request)) -> io::Result<()> {
    let mut lines = BufReader::new(stream);
    loop {
        let mut line = String::new();
        // No command is as long as that.
        if lines.by_ref().take(LONGEST_COMMAND).read_line(&mut line)? == 0 {
            return Ok(());
        }
        let answer = match serde_json::from_str(&line) {
            Ok(command) => {
                let (answer, answered) = mpsc::channel();
                requests(Request { command, answer });
                answered.recv().unwrap_or_else(|_| Err("the guest has ended".to_owned()))
            }
            Err(error) => Err(format!("not a command: {error}")),
        };
        let answer = answer.map_or_else(|error| json!({ "error": error }), |value| json!({ "return": value }));
        writeln!(&mut &*stream, "{answer}")?;
    }
}

const LONGEST_COMMAND: u64 = 64 << 10;
const AFTER_FAILURE: Duration = Duration::from_millis(10);

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use test_support::TempDir;

    use super::*;

    #[test]
    fn commands_are_answered_and_the_path_goes_away() {
        let dir = TempDir::new().unwrap();
        let path = dir.join("control");
        let control = Control::listen(&path, |request| {
            let answer = match request.command {
                Command::Migrate(uri) => Ok(json!({ "to": uri })),
                other => Err(format!("no {other:?}")),
            };
            request.answer.send(answer).unwrap();
        })
        .unwrap();
        assert_eq!(ask(&path, &Command::Migrate("unix:x".to_owned())).unwrap(), json!({ "to": "unix:x" }));
        let finish = Command::Finish { passes: 2, within: 1.5 };
        assert_eq!(ask(&path, &finish).unwrap_err().to_string(), "no Finish { passes: 2, within: 1.5 }");
        let mut stream = UnixStream::connect(&path).unwrap();
        stream.write_all(b"{}\n\"status\"\n").unwrap();
        let mut lines = BufReader::new(stream).lines();
        assert!(lines.next().unwrap().unwrap().starts_with("{\"error\":\"not a command"));
        assert_eq!(lines.next().unwrap().unwrap(), "{\"error\":\"no Status\"}");
        drop(control);
        assert!(!path.exists());
    }

    #[test]
    fn a_socket_that_was_left_behind_is_replaced_and_one_in_use_is_not() {
        let dir = TempDir::new().unwrap();
        let path = dir.join("control");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "left behind");
        let listen = || Control::listen(&path, |request| request.answer.send(Ok(json!({}))).unwrap());
        let control = listen().unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(listen().err().unwrap().kind(), io::ErrorKind::AddrInUse);
        ask(&path, &Command::Status).unwrap();
        // Another guest's now: it stays.
        std::fs::remove_file(&path).unwrap();
        let other = listen().unwrap();
        drop(control);
        ask(&path, &Command::Status).unwrap();
        drop(other);
        assert!(!path.exists());
    }
}
