//! What the clients of a QEMU do with a migration.

use std::{
    thread,
    time::{Duration, Instant},
};

use serde_json::{Map, Value, json};

use crate::{
    client::{Client, nothing, text},
    error::Error,
};

/// The migration states of `query-migrate`.
///
/// The states are not an enumeration of [`qapi_qmp`], as each QEMU may have more of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
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
    /// The guest runs at the destination, and pages follow.
    PostcopyActive,
    /// The same, and a connection broke.
    PostcopyPaused,
    /// The same, and the connection is being replaced.
    PostcopyRecover,
    /// The VM belongs to the destination.
    Completed,
    /// The migration failed.
    Failed,
    /// The migration was cancelled.
    Cancelled,
    /// Cancelling is under way.
    Cancelling,
    /// A state with another name.
    Other,
}

impl Status {
    /// The state named by QMP's `status`.
    pub fn parse(name: &str) -> Status {
        match name {
            "none" => Status::None,
            "setup" => Status::Setup,
            "active" => Status::Active,
            "pre-switchover" => Status::PreSwitchover,
            "device" => Status::Device,
            "postcopy-active" => Status::PostcopyActive,
            "postcopy-paused" => Status::PostcopyPaused,
            "postcopy-recover" | "postcopy-recover-setup" => Status::PostcopyRecover,
            "completed" => Status::Completed,
            "failed" => Status::Failed,
            "cancelled" => Status::Cancelled,
            "cancelling" => Status::Cancelling,
            _ => Status::Other,
        }
    }

    /// The state in an answer to `query-migrate`.
    pub fn of(answer: &Value) -> Status {
        answer.get("status").and_then(Value::as_str).map_or(Status::None, Status::parse)
    }

    /// No further change comes by itself.
    pub fn is_final(self) -> bool {
        matches!(self, Status::Completed | Status::Failed | Status::Cancelled)
    }
}

impl Client {
    /// Switches migration capabilities on (`true`) or off.
    ///
    /// # Errors
    /// Those of [`Client::execute`].
    pub fn set_capabilities(&mut self, capabilities: &[(&str, bool)]) -> Result<(), Error> {
        let list: Vec<Value> =
            capabilities.iter().map(|(name, on)| json!({ "capability": name, "state": on })).collect();
        self.execute("migrate-set-capabilities", json!({ "capabilities": list })).map(drop)
    }

    /// Sets migration parameters.
    ///
    /// # Errors
    /// Those of [`Client::execute`].
    pub fn set_parameters(&mut self, parameters: &[(&str, Value)]) -> Result<(), Error> {
        let map: Map<String, Value> =
            parameters.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
        self.execute("migrate-set-parameters", Value::Object(map)).map(drop)
    }

    /// Switches multifd on with `channels` channels and `compression` (`none`, `zlib`, `zstd`).
    ///
    /// # Errors
    /// Those of [`Client::execute`].
    pub fn set_multifd(&mut self, channels: u8, compression: &str) -> Result<(), Error> {
        self.set_capabilities(&[("multifd", true)])?;
        self.set_parameters(&[("multifd-channels", json!(channels)), ("multifd-compression", json!(compression))])
    }

    /// Starts migrating to `uri` and returns at once.
    ///
    /// # Errors
    /// Those of [`Client::execute`].
    pub fn migrate(&mut self, uri: &str) -> Result<(), Error> {
        self.execute("migrate", json!({ "uri": uri })).map(drop)
    }

    /// Migrates to `uri` in several rounds while the guest writes, waits for the end and returns the last
    /// `query-migrate` answer.
    ///
    /// At first the guest may be paused for next to nothing, so that rounds follow each other; after a few of them, or a
    /// quarter of `limit`, for as long as QEMU allows, so that the migration ends however fast the guest writes and
    /// however slow the machine is. It replaces the parameter `downtime-limit`.
    ///
    /// # Errors
    /// [`Error::TooLate`] when `limit` is over or the migration failed; it carries the last answer.
    pub fn migrate_live(&mut self, uri: &str, limit: Duration) -> Result<Value, Error> {
        let deadline = Instant::now() + limit;
        // No other round may ever come: to a QEMU with dirty bitmaps on a slow machine they alone are more than it may
        // send in the pause, and it stays in its first round without a page to send.
        let rounds_until = Instant::now() + limit / 4;
        self.set_parameters(&[("downtime-limit", json!(1))])?;
        self.migrate(uri)?;
        loop {
            let answer = self.query_migrate()?;
            let enough = answer["ram"]["dirty-sync-count"].as_u64() >= Some(LIVE_ROUNDS);
            if enough || Status::of(&answer).is_final() || Instant::now() >= rounds_until {
                break;
            }
            thread::sleep(POLL_INTERVAL);
        }
        self.set_parameters(&[("downtime-limit", json!(LONGEST_DOWNTIME_MS))])?;
        self.wait_migration(&[Status::Completed], deadline.saturating_duration_since(Instant::now()))
    }

    /// Makes a QEMU started with `-incoming defer` listen on `uri`, after its capabilities were set.
    ///
    /// # Errors
    /// Those of [`Client::execute`].
    pub fn migrate_incoming(&mut self, uri: &str) -> Result<(), Error> {
        self.execute("migrate-incoming", json!({ "uri": uri })).map(drop)
    }

    /// Cancels the running migration.
    ///
    /// # Errors
    /// Those of [`Client::execute`].
    pub fn migrate_cancel(&mut self) -> Result<(), Error> {
        self.execute("migrate_cancel", nothing()).map(drop)
    }

    /// The answer to `query-migrate`, all of it.
    ///
    /// # Errors
    /// Those of [`Client::execute`].
    pub fn query_migrate(&mut self) -> Result<Value, Error> {
        self.execute("query-migrate", nothing())
    }

    /// The state of the migration.
    ///
    /// # Errors
    /// Those of [`Client::execute`].
    pub fn migration_status(&mut self) -> Result<Status, Error> {
        Ok(Status::of(&self.query_migrate()?))
    }

    /// Waits until the migration is in one of the `awaited` states and returns the whole `query-migrate` answer.
    ///
    /// # Errors
    /// [`Error::TooLate`] when `limit` is over, or as soon as a final state came that is not awaited; it carries the
    /// last answer, with QEMU's `error-desc`.
    pub fn wait_migration(&mut self, awaited: &[Status], limit: Duration) -> Result<Value, Error> {
        let deadline = Instant::now() + limit;
        loop {
            let answer = self.query_migrate()?;
            let status = Status::of(&answer);
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
    ///
    /// # Errors
    /// Those of [`Client::execute`].
    pub fn run_state(&mut self) -> Result<String, Error> {
        Ok(text(&self.execute("query-status", nothing())?, "status"))
    }

    /// Waits until the run state is `awaited`.
    ///
    /// # Errors
    /// [`Error::TooLate`] when `limit` is over.
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
    ///
    /// # Errors
    /// Those of [`Client::execute`].
    pub fn stop(&mut self) -> Result<(), Error> {
        self.execute("stop", nothing()).map(drop)
    }

    /// Lets the vCPUs run.
    ///
    /// # Errors
    /// Those of [`Client::execute`].
    pub fn cont(&mut self) -> Result<(), Error> {
        self.execute("cont", nothing()).map(drop)
    }

    /// Asks the server to end. It may close the connection before it answers, so that is no error.
    ///
    /// # Errors
    /// Those of [`Client::execute`].
    pub fn quit(&mut self) -> Result<(), Error> {
        match self.execute("quit", nothing()) {
            Ok(_) | Err(Error::Closed { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

const POLL_INTERVAL: Duration = Duration::from_millis(10);
/// `dirty-sync-count` at which [`Client::migrate_live`] lets a migration end. The first one is that of the setup.
const LIVE_ROUNDS: u64 = 4;
/// The most that QEMU takes as `downtime-limit`.
const LONGEST_DOWNTIME_MS: u32 = 2_000_000;

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead, BufReader, Write},
        os::unix::net::UnixStream,
    };

    use super::*;
    use crate::client::tests::{DONE, GREETING, peer};

    #[test]
    fn a_refusal_names_command_and_reason() {
        let refusal = r#"{"error": {"class": "GenericError", "desc": "no"}}"#;
        let (stream, _peer) = peer(GREETING, &[DONE, refusal]);
        let error = Client::negotiate(stream).unwrap().migrate("tcp:x:1").unwrap_err();
        assert_eq!(error.to_string(), "migrate: GenericError: no");
    }

    #[test]
    fn an_unawaited_final_state_ends_the_wait() {
        let failed = r#"{"return": {"status": "failed", "error-desc": "why"}}"#;
        let (stream, _peer) = peer(GREETING, &[DONE, failed]);
        let error = Client::negotiate(stream)
            .unwrap()
            .wait_migration(&[Status::Completed], Duration::from_secs(3600))
            .unwrap_err();
        assert!(error.to_string().contains("why"), "{error}");
    }

    /// As a QEMU with dirty bitmaps on a slow machine, which took the whole limit and was then given no time to end.
    #[test]
    fn a_source_without_another_round_is_let_end() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let peer = thread::spawn(move || {
            theirs.write_all(format!("{GREETING}\r\n").as_bytes()).unwrap();
            let mut status = "active";
            for line in BufReader::new(theirs.try_clone().unwrap()).lines() {
                let line = line.unwrap();
                if line.contains(&LONGEST_DOWNTIME_MS.to_string()) {
                    status = "completed";
                }
                let answer = if line.contains("query-migrate") {
                    json!({ "return": { "status": status, "ram": { "dirty-sync-count": 1 } } }).to_string()
                } else {
                    DONE.to_owned()
                };
                theirs.write_all(format!("{answer}\r\n").as_bytes()).unwrap();
            }
        });
        let mut client = Client::negotiate(ours).unwrap();
        let answer = client.migrate_live("tcp:x:1", Duration::from_secs(4)).unwrap();
        assert_eq!(Status::of(&answer), Status::Completed);
        drop(client);
        peer.join().unwrap();
    }

    /// The typed names of a QEMU are all known, or are [`Status::Other`] on purpose.
    #[test]
    fn the_states_are_those_of_qmp() {
        use qapi_spec::Enum;
        let other = ["colo", "pre-switchover", "wait-unplug"];
        for name in qapi_qmp::MigrationStatus::NAMES {
            assert!(Status::parse(name) != Status::Other || other.contains(name), "{name}");
        }
    }
}
