//! Talks QMP to a QEMU over its unix socket, with a time limit on every answer.
//!
//! A QEMU whose main loop is frozen by a broken migration stream still accepts bytes and never answers; without the
//! limit the test would wait for ever. Events that arrive between answers are kept and can be looked at.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use crate::Error;

/// `dirty-sync-count` behind which [`Qmp::migrate_live`] lets a migration end. The first one is that of the setup.
const LIVE_ROUNDS: u64 = 4;
/// The most that QEMU takes as `downtime-limit`.
const LONGEST_DOWNTIME_MS: u32 = 2_000_000;

/// A QMP session after the capabilities negotiation.
#[derive(Debug)]
pub struct Qmp {
    stream: UnixStream,
    /// Bytes received after the last complete line.
    pending: Vec<u8>,
    events: VecDeque<Value>,
    limit: Duration,
}

/// The migration states of `query-migrate` that tests wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// No migration was started, or a 7.2 destination has not seen a byte: QMP gives no status then.
    None,
    /// Connections are being made.
    Setup,
    /// Pages move.
    Active,
    /// The source waits before switchover (capability `pause-before-switchover`).
    PreSwitchover,
    /// The source writes its device state.
    Device,
    /// The VM belongs to the destination.
    Completed,
    /// The migration failed.
    Failed,
    /// The migration was cancelled.
    Cancelled,
    /// Cancelling is under way.
    Cancelling,
    /// A state that no test here reaches on purpose, such as those of postcopy.
    Other,
}

impl Status {
    /// The state named by QMP's `status`.
    pub fn parse(name: &str) -> Self {
        match name {
            "none" => Self::None,
            "setup" => Self::Setup,
            "active" => Self::Active,
            "pre-switchover" => Self::PreSwitchover,
            "device" => Self::Device,
            "completed" => Self::Completed,
            "failed" => Self::Failed,
            "cancelled" => Self::Cancelled,
            "cancelling" => Self::Cancelling,
            _ => Self::Other,
        }
    }

    /// No further change comes by itself.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Cancelled)
    }
}

impl Qmp {
    /// How long an answer may take unless [`Qmp::set_limit`] says otherwise. The main loop of a busy QEMU on a busy
    /// machine can need seconds.
    pub const DEFAULT_LIMIT: Duration = Duration::from_secs(20);

    /// Connects to the socket at `path` and negotiates capabilities.
    pub fn connect(path: &Path) -> Result<Self, Error> {
        Self::negotiate(UnixStream::connect(path)?)
    }

    /// Reads the greeting on `stream` and enters command mode.
    pub fn negotiate(stream: UnixStream) -> Result<Self, Error> {
        let mut qmp = Self { stream, pending: Vec::new(), events: VecDeque::new(), limit: Self::DEFAULT_LIMIT };
        let greeting = qmp.read_message("greeting", Instant::now() + qmp.limit)?;
        if greeting.get("QMP").is_none() {
            return Err(unexpected("greeting", &greeting));
        }
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Changes how long an answer may take.
    pub fn set_limit(&mut self, limit: Duration) {
        self.limit = limit;
    }

    /// Runs `command` and returns what QMP puts into `return`.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] if QEMU refuses it, [`Error::NoAnswer`] if the answer does not come in time,
    /// [`Error::Closed`] if QEMU ended.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, Error> {
        let deadline = Instant::now() + self.limit;
        let mut line = json!({ "execute": command, "arguments": arguments }).to_string();
        line.push('\n');
        self.stream.set_write_timeout(Some(self.limit))?;
        self.stream.write_all(line.as_bytes()).map_err(|error| self.io_error(command, error))?;
        loop {
            let mut message = self.read_message(command, deadline)?;
            if message.get("event").is_some() {
                self.events.push_back(message);
            } else if let Some(answer) = message.get_mut("return") {
                return Ok(answer.take());
            } else if let Some(error) = message.get("error") {
                return Err(Error::Refused {
                    command: command.to_owned(),
                    class: text(error, "class"),
                    description: text(error, "desc"),
                });
            } else {
                return Err(unexpected(command, &message));
            }
        }
    }

    /// Switches migration capabilities on (`true`) or off.
    pub fn set_capabilities(&mut self, capabilities: &[(&str, bool)]) -> Result<(), Error> {
        let list: Vec<Value> =
            capabilities.iter().map(|(name, on)| json!({ "capability": name, "state": on })).collect();
        self.execute("migrate-set-capabilities", json!({ "capabilities": list })).map(drop)
    }

    /// Sets migration parameters.
    pub fn set_parameters(&mut self, parameters: &[(&str, Value)]) -> Result<(), Error> {
        let map: Map<String, Value> =
            parameters.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
        self.execute("migrate-set-parameters", Value::Object(map)).map(drop)
    }

    /// Switches multifd on with `channels` channels and `compression` (`none`, `zlib`, `zstd`).
    pub fn set_multifd(&mut self, channels: u8, compression: &str) -> Result<(), Error> {
        self.set_capabilities(&[("multifd", true)])?;
        self.set_parameters(&[("multifd-channels", json!(channels)), ("multifd-compression", json!(compression))])
    }

    /// Starts migrating to `uri` and returns at once.
    pub fn migrate(&mut self, uri: &str) -> Result<(), Error> {
        self.execute("migrate", json!({ "uri": uri })).map(drop)
    }

    /// Migrates to `uri` in several rounds while the guest writes, waits for the end and returns the last
    /// `query-migrate` answer.
    ///
    /// At first the guest may be paused for next to nothing, so that rounds follow each other; after a few of them for
    /// as long as QEMU allows, so that the migration ends however fast the guest writes and however slow the machine
    /// is. It replaces the parameter `downtime-limit`.
    ///
    /// # Errors
    ///
    /// [`Error::TooLate`] when `limit` is over or the migration failed; it carries the last answer.
    pub fn migrate_live(&mut self, uri: &str, limit: Duration) -> Result<Value, Error> {
        let deadline = Instant::now() + limit;
        self.set_parameters(&[("downtime-limit", json!(1))])?;
        self.migrate(uri)?;
        loop {
            let answer = self.query_migrate()?;
            let enough = answer["ram"]["dirty-sync-count"].as_u64() >= Some(LIVE_ROUNDS);
            if enough || status_of(&answer).is_final() || Instant::now() >= deadline {
                break;
            }
            thread::sleep(POLL_INTERVAL);
        }
        self.set_parameters(&[("downtime-limit", json!(LONGEST_DOWNTIME_MS))])?;
        self.wait_migration(&[Status::Completed], deadline.saturating_duration_since(Instant::now()))
    }

    /// Makes a QEMU started with `-incoming defer` listen on `uri`, after its capabilities were set.
    pub fn migrate_incoming(&mut self, uri: &str) -> Result<(), Error> {
        self.execute("migrate-incoming", json!({ "uri": uri })).map(drop)
    }

    /// Cancels the running migration.
    pub fn migrate_cancel(&mut self) -> Result<(), Error> {
        self.execute("migrate_cancel", json!({})).map(drop)
    }

    /// The answer to `query-migrate`, all of it.
    pub fn query_migrate(&mut self) -> Result<Value, Error> {
        self.execute("query-migrate", json!({}))
    }

    /// The state of the migration.
    pub fn migration_status(&mut self) -> Result<Status, Error> {
        Ok(status_of(&self.query_migrate()?))
    }

    /// Waits until the migration is in one of the `awaited` states and returns the whole `query-migrate` answer.
    ///
    /// # Errors
    ///
    /// [`Error::TooLate`] when `limit` is over, or as soon as a final state came that is not awaited; it carries the
    /// last answer, with QEMU's `error-desc`.
    pub fn wait_migration(&mut self, awaited: &[Status], limit: Duration) -> Result<Value, Error> {
        let deadline = Instant::now() + limit;
        loop {
            let answer = self.query_migrate()?;
            let status = status_of(&answer);
            if awaited.contains(&status) {
                return Ok(answer);
            }
            if status.is_final() || Instant::now() >= deadline {
                return Err(Error::TooLate { awaited: format!("{awaited:?}"), limit, seen: answer.to_string() });
            }
            // QMP has no blocking wait that works for all versions and both sides; polling is what its users do.
            thread::sleep(POLL_INTERVAL);
        }
    }

    /// The run state (`running`, `paused`, `inmigrate`, `postmigrate`, …).
    pub fn run_state(&mut self) -> Result<String, Error> {
        Ok(text(&self.execute("query-status", json!({}))?, "status"))
    }

    /// Waits until the run state is `awaited`.
    pub fn wait_run_state(&mut self, awaited: &str, limit: Duration) -> Result<(), Error> {
        let deadline = Instant::now() + limit;
        loop {
            let seen = self.run_state()?;
            if seen == awaited {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(Error::TooLate { awaited: awaited.to_owned(), limit, seen });
            }
            thread::sleep(POLL_INTERVAL);
        }
    }

    /// Stops the vCPUs.
    pub fn stop(&mut self) -> Result<(), Error> {
        self.execute("stop", json!({})).map(drop)
    }

    /// Lets the vCPUs run.
    pub fn cont(&mut self) -> Result<(), Error> {
        self.execute("cont", json!({})).map(drop)
    }

    /// Asks QEMU to end. It may close the connection before it answers, so that is no error.
    pub fn quit(&mut self) -> Result<(), Error> {
        match self.execute("quit", json!({})) {
            Ok(_) | Err(Error::Closed { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Takes the events that arrived so far, oldest first.
    pub fn take_events(&mut self) -> Vec<Value> {
        self.events.drain(..).collect()
    }

    fn read_message(&mut self, command: &str, deadline: Instant) -> Result<Value, Error> {
        loop {
            if let Some(end) = self.pending.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.pending.drain(..=end).collect();
                return serde_json::from_slice(&line).map_err(|_| Error::Unexpected {
                    command: command.to_owned(),
                    message: String::from_utf8_lossy(&line).into_owned(),
                });
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(self.no_answer(command));
            }
            self.stream.set_read_timeout(Some(left))?;
            let mut chunk = [0; 4096];
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(Error::Closed { command: command.to_owned() }),
                Ok(count) => self.pending.extend_from_slice(&chunk[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.io_error(command, error)),
            }
        }
    }

    fn io_error(&self, command: &str, error: io::Error) -> Error {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => self.no_answer(command),
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => Error::Closed { command: command.to_owned() },
            _ => Error::Io(error),
        }
    }

    fn no_answer(&self, command: &str) -> Error {
        Error::NoAnswer { command: command.to_owned(), limit: self.limit }
    }
}

fn status_of(answer: &Value) -> Status {
    answer.get("status").and_then(Value::as_str).map_or(Status::None, Status::parse)
}

fn text(value: &Value, key: &str) -> String {
    value.get(key).and_then(Value::as_str).unwrap_or_default().to_owned()
}

fn unexpected(command: &str, message: &Value) -> Error {
    Error::Unexpected { command: command.to_owned(), message: message.to_string() }
}

const POLL_INTERVAL: Duration = Duration::from_millis(10);

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::thread::JoinHandle;

    use super::*;

    const GREETING: &str = r#"{"QMP": {"version": {}, "capabilities": []}}"#;

    /// A peer that sends `first`, then one of `answers` (any number of lines) for each line it receives, and keeps
    /// the connection open until the other side closes it. Returns the lines it received.
    fn peer(first: &str, answers: &[&str]) -> (UnixStream, JoinHandle<Vec<String>>) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let first = first.to_owned();
        let mut answers: VecDeque<String> = answers.iter().map(|&answer| answer.to_owned()).collect();
        let thread = thread::spawn(move || {
            theirs.write_all(first.as_bytes()).unwrap();
            theirs.write_all(b"\r\n").unwrap();
            let mut received = Vec::new();
            for line in BufReader::new(theirs.try_clone().unwrap()).lines() {
                received.push(line.unwrap());
                if let Some(answer) = answers.pop_front() {
                    theirs.write_all(answer.as_bytes()).unwrap();
                    theirs.write_all(b"\r\n").unwrap();
                }
            }
            received
        });
        (ours, thread)
    }

    #[test]
    fn events_before_an_answer_are_kept() {
        let answer = "{\"event\": \"STOP\"}\r\n{\"return\": {\"status\": \"paused\"}}";
        let (stream, peer) = peer(GREETING, &["{\"return\": {}}", answer]);
        let mut qmp = Qmp::negotiate(stream).unwrap();
        assert_eq!(qmp.run_state().unwrap(), "paused");
        assert_eq!(qmp.take_events(), [json!({ "event": "STOP" })]);
        drop(qmp);
        let received = peer.join().unwrap();
        let second: Value = serde_json::from_str(&received[1]).unwrap();
        assert_eq!(second, json!({ "execute": "query-status", "arguments": {} }));
    }

    #[test]
    fn a_refusal_names_command_and_reason() {
        let refusal = r#"{"error": {"class": "GenericError", "desc": "no"}}"#;
        let (stream, _peer) = peer(GREETING, &["{\"return\": {}}", refusal]);
        let error = Qmp::negotiate(stream).unwrap().migrate("tcp:x:1").unwrap_err();
        assert_eq!(error.to_string(), "migrate: GenericError: no");
    }

    #[test]
    fn a_frozen_peer_is_given_up_in_time() {
        let (stream, _peer) = peer(GREETING, &["{\"return\": {}}"]);
        let mut qmp = Qmp::negotiate(stream).unwrap();
        qmp.set_limit(Duration::from_millis(50));
        assert!(matches!(qmp.stop(), Err(Error::NoAnswer { .. })));
    }

    #[test]
    fn a_peer_that_trickles_bytes_is_given_up_in_time() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut qmp =
            Qmp { stream: ours, pending: Vec::new(), events: VecDeque::new(), limit: Duration::from_millis(100) };
        let trickle = thread::spawn(move || {
            while theirs.write_all(b" ").is_ok() {
                thread::sleep(Duration::from_millis(5));
            }
        });
        assert!(matches!(qmp.stop(), Err(Error::NoAnswer { .. })));
        drop(qmp);
        trickle.join().unwrap();
    }

    #[test]
    fn an_unawaited_final_state_ends_the_wait() {
        let failed = r#"{"return": {"status": "failed", "error-desc": "why"}}"#;
        let (stream, _peer) = peer(GREETING, &["{\"return\": {}}", failed]);
        let error = Qmp::negotiate(stream)
            .unwrap()
            .wait_migration(&[Status::Completed], Duration::from_secs(3600))
            .unwrap_err();
        assert!(error.to_string().contains("why"), "{error}");
    }

    #[test]
    fn a_closed_connection_is_an_error_except_for_quit() {
        let (stream, theirs) = UnixStream::pair().unwrap();
        let mut qmp = Qmp { stream, pending: Vec::new(), events: VecDeque::new(), limit: Duration::from_secs(5) };
        drop(theirs);
        assert!(matches!(qmp.stop(), Err(Error::Closed { .. })));
        qmp.quit().unwrap();
    }
}
