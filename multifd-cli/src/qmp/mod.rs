//! The QMP server of this process: what it does, in the words of a QEMU.
//!
//! Answers come from a state that the verb keeps up to date. What is done by a command is up to the verb ([`Commands`]).

mod address;
mod migration;
mod postcopy;
mod recovery;
mod settings;
mod watch;

use std::{
    io,
    sync::{Arc, Mutex, OnceLock},
    time::Duration,
};

use multifd::{
    error::Error,
    progress::Progress,
    source,
    stop::StopHandle,
    transport::{
        unix::{OwnPath, listen_privately},
        uri::Uri,
    },
};
use multifd_qmp::{
    Version,
    server::{Arguments, CommandError, Handler, Server},
};
use serde_json::{Value, json};

use self::migration::Migration;
pub use self::{
    migration::End,
    postcopy::WatchedPostcopy,
    settings::{Preempt, Settings},
    watch::Watched,
};
pub use crate::role::Role;
use crate::{args::Origin, progress::lock, report::MigrationReport, threads};

/// What a client wants done.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    /// Begin to migrate the guest to this address.
    Migrate(Uri),
    /// Begin to wait for a guest there.
    Incoming(Incoming),
    /// Give the connections of a postcopy up.
    Pause,
    /// Listen there for the source of a postcopy that was given up. Returns the address.
    Recover(Origin),
    /// Go on there with a postcopy that was given up.
    Resume(Uri),
    /// Cancel the migration.
    Cancel,
    /// Pause the guest.
    Stop,
    /// Let it run.
    Cont,
    /// End.
    Quit,
    /// What the built-in guest found out about itself.
    GuestStatus,
    /// Resume a guest that is paused because the outcome of its migration is in doubt.
    GuestResume,
    /// End after `passes` more passes over its memory, or after `within` seconds.
    GuestFinish {
        /// Complete passes, counted from now.
        passes: u64,
        /// Seconds.
        within: f64,
    },
}

/// Where a guest comes from, as `migrate-incoming` says it.
#[derive(Clone, Debug, PartialEq)]
pub struct Incoming {
    /// Where it connects to, or what is read.
    pub from: Origin,
    /// After a failure the process stays until its clients have gone, so that they can ask how it went.
    pub stays: bool,
}

/// Does what clients want. Called by their threads.
pub trait Commands: Send + Sync + 'static {
    /// Does it and returns what `return` has.
    ///
    /// # Errors
    /// Why not, in a sentence.
    fn run(&self, command: Command) -> Result<Value, String>;
}

/// A verb whose only step is one migration: clients can look at it, steer it and cancel it.
pub struct Steered {
    /// What it does, in a word.
    pub verb: &'static str,
    /// Cancels the migration.
    pub stop: StopHandle,
}

impl Commands for Steered {
    fn run(&self, command: Command) -> Result<Value, String> {
        match command {
            Command::Cancel | Command::Quit => {
                self.stop.cancel();
                Ok(json!({}))
            }
            Command::Migrate(_) => Err("There's a migration process in progress".to_owned()),
            Command::Incoming(_) => Err(NOT_INCOMING.to_owned()),
            _ => Err(format!("this process {} a checkpoint, and has no guest that runs", self.verb)),
        }
    }
}

/// The state of this process as clients see it, and the clients, if there may be any. Clones are the same.
#[derive(Clone)]
pub struct Qmp {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    commands: Box<dyn Commands>,
    /// Empty where no `--qmp` was given.
    server: OnceLock<Server>,
    /// It has a guest, and the commands of ours for it.
    has_guest: bool,
}

struct State {
    run_state: RunState,
    migration: Migration,
    settings: Settings,
}

/// What the guest does, as far as this process has one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunState {
    /// It runs here.
    Running,
    /// A client paused it.
    Paused,
    /// It is on its way to us.
    InMigrate,
    /// It is paused for the last step of its migration, or because the outcome is in doubt.
    FinishMigrate,
    /// It is gone.
    PostMigrate,
}

impl RunState {
    fn name(self) -> &'static str {
        match self {
            RunState::Running => "running",
            RunState::Paused => "paused",
            RunState::InMigrate => "inmigrate",
            RunState::FinishMigrate => "finish-migrate",
            RunState::PostMigrate => "postmigrate",
        }
    }
}

/// Keeps the socket's path; dropping it removes the path, if it is still ours.
pub struct Listening {
    _path: Option<OwnPath>,
}

impl Qmp {
    /// Serves clients at `uri`, if there is one. Only this user gets access; a socket that a killed process left behind is
    /// replaced.
    ///
    /// # Errors
    /// [`io::ErrorKind::AddrInUse`] where the path is something else or a process listens there; the kernel's.
    pub fn listen(
        uri: Option<&Uri>,
        run_state: RunState,
        settings: Settings,
        has_guest: bool,
        commands: impl Commands,
    ) -> io::Result<(Qmp, Listening)> {
        let state = Mutex::new(State { run_state, migration: Migration::default(), settings });
        let shared = Shared { state, commands: Box::new(commands), server: OnceLock::new(), has_guest };
        let qmp = Qmp { shared: Arc::new(shared) };
        let Some(Uri::Unix(path)) = uri else { return Ok((qmp, Listening { _path: None })) };
        let context = |error: io::Error| io::Error::new(error.kind(), format!("unix:{}: {error}", path.display()));
        let (listener, own) = listen_privately(path).map_err(context)?;
        let handler = Arc::new(Monitor(qmp.clone()));
        let server = Server::start(listener, VERSION, PACKAGE, handler).map_err(context)?;
        // It is set here and nowhere else.
        let _ = qmp.shared.server.set(server);
        Ok((qmp, Listening { _path: Some(own) }))
    }

    /// Whether a client is connected.
    pub fn has_clients(&self) -> bool {
        self.shared.server.get().is_some_and(Server::has_clients)
    }

    /// The migration is being cancelled.
    pub fn cancelling(&self) {
        self.set_status("cancelling");
    }

    /// Waits until no client is connected, at most for `limit`. Returns whether that is so.
    pub fn wait_clients(&self, limit: Duration) -> bool {
        self.shared.server.get().is_none_or(|server| server.wait_clients(limit))
    }

    /// The settings that clients made.
    pub fn settings(&self) -> Settings {
        lock(&self.shared.state).settings.clone()
    }

    /// The guest is in another state from now on.
    pub fn set_run_state(&self, run_state: RunState) {
        let before = std::mem::replace(&mut lock(&self.shared.state).run_state, run_state);
        self.emit_run_state(before, run_state);
    }

    fn emit_run_state(&self, before: RunState, now: RunState) {
        match (before == RunState::Running, now == RunState::Running) {
            (true, false) => self.emit("STOP", None),
            (false, true) => self.emit("RESUME", None),
            _ => {}
        }
    }

    /// A migration begins that `progress` counts. `handle` steers it, where this is the source; its parameters are those in
    /// force.
    pub fn begin(&self, role: Role, progress: Progress, handle: Option<source::Handle>, address: Option<Uri>) {
        {
            let mut state = lock(&self.shared.state);
            if let Some(handle) = &handle {
                state.settings.take_from(&handle.parameters());
            }
            state.migration = Migration::new(role, progress, handle, address);
        }
        self.emit_status("setup");
    }

    /// The migration is in another state, of those that QEMU has.
    fn set_status(&self, status: &'static str) {
        let changed = lock(&self.shared.state).migration.set_status(status);
        if changed {
            self.emit_status(status);
        }
    }

    /// A pass over the dirty pages is over.
    fn pass(&self) {
        let (pass, events) = {
            let mut state = lock(&self.shared.state);
            (state.migration.pass(), state.settings.events)
        };
        if events {
            self.emit("MIGRATION_PASS", Some(json!({ "pass": pass })));
        }
    }

    /// The migration is over, and the guest is in this state. A client that is told of the one sees the other.
    pub fn end(&self, end: End, run_state: RunState) {
        let status = end.status();
        let before = {
            let mut state = lock(&self.shared.state);
            state.migration.end(end);
            std::mem::replace(&mut state.run_state, run_state)
        };
        self.emit_status(status);
        self.emit_run_state(before, run_state);
    }

    /// The migration is over, as `report` or `error` say, and so is the process. Waits for clients that are connected, for a
    /// while, so that they see it.
    pub fn finish(&self, report: &MigrationReport, error: Option<&Error>) {
        let end = match error {
            None => End::Completed(Box::new(report.clone())),
            Some(Error::Cancelled) => End::Cancelled,
            Some(error) => End::Failed(error.to_string()),
        };
        self.finish_as(end, RunState::Paused);
    }

    /// The same where more is known of the end.
    pub fn finish_as(&self, end: End, run_state: RunState) {
        self.end(end, run_state);
        self.wait_clients(LAST_LOOK);
    }

    fn emit_status(&self, status: &str) {
        if lock(&self.shared.state).settings.events {
            self.emit("MIGRATION", Some(json!({ "status": status })));
        }
    }

    fn emit(&self, event: &str, data: Option<Value>) {
        if let Some(server) = self.shared.server.get() {
            server.emit(event, data);
        }
    }

    fn run(&self, command: Command) -> Result<Value, CommandError> {
        self.shared.commands.run(command).map_err(CommandError::generic)
    }

    fn set_parameters(&self, arguments: Arguments) -> Result<Value, CommandError> {
        let mut state = lock(&self.shared.state);
        let mut settings = state.settings.clone();
        settings.set_parameters(arguments)?;
        if let Some(handle) = state.migration.handle() {
            handle.set_parameters(|parameters| settings.give_to(parameters));
        }
        if let Some(handle) = state.migration.postcopy() {
            handle.set_max_bandwidth(settings.background());
        }
        state.settings = settings;
        Ok(json!({}))
    }

    fn set_capabilities(&self, mut arguments: Arguments) -> Result<Value, CommandError> {
        let list = arguments.list("capabilities")?.ok_or_else(|| Arguments::missing("capabilities"))?;
        arguments.end()?;
        let mut state = lock(&self.shared.state);
        if state.migration.is_under_way() {
            return Err(CommandError::generic("There's a migration process in progress"));
        }
        let mut settings = state.settings.clone();
        list.into_iter().try_for_each(|capability| settings.set_capability(capability))?;
        state.settings = settings;
        Ok(json!({}))
    }
}

/// Gives clients access to a [`Qmp`].
struct Monitor(Qmp);

impl Handler for Monitor {
    fn spawn(&self, name: &'static str, body: Box<dyn FnOnce() + Send>) -> io::Result<()> {
        threads::spawn(name, body).map(drop)
    }

    fn commands(&self) -> &'static [&'static str] {
        if self.0.shared.has_guest { COMMANDS } else { &COMMANDS[..COMMANDS.len() - OF_THE_GUEST] }
    }

    fn out_of_band(&self) -> &'static [&'static str] {
        &["migrate-pause", "migrate-recover"]
    }

    fn execute(&self, command: &str, mut arguments: Arguments) -> Result<Value, CommandError> {
        let qmp = &self.0;
        let state = || lock(&qmp.shared.state);
        match command {
            "query-status" => arguments.end().map(|()| {
                let run_state = state().run_state;
                json!({ "status": run_state.name(), "running": run_state == RunState::Running })
            }),
            "query-migrate" => arguments.end().map(|()| state().migration.json()),
            "query-migrate-capabilities" => arguments.end().map(|()| state().settings.capabilities()),
            "query-migrate-parameters" => arguments.end().map(|()| state().settings.parameters()),
            "migrate-set-capabilities" => qmp.set_capabilities(arguments),
            "migrate-set-parameters" => qmp.set_parameters(arguments),
            "migrate" => qmp.migrate(arguments),
            "migrate-pause" => qmp.pause(arguments),
            "migrate-recover" => qmp.recover(arguments),
            "migrate-incoming" => qmp.run(Command::Incoming(address::incoming(arguments)?)),
            "x-guest-finish" => {
                let passes = arguments.number("passes")?.ok_or_else(|| Arguments::missing("passes"))?;
                let mut rest = arguments.rest();
                let within = rest.remove("within").and_then(|within| within.as_f64());
                let within = within.ok_or_else(|| CommandError::generic("Parameter 'within' expects a number"))?;
                Arguments::from(rest).end()?;
                qmp.run(Command::GuestFinish { passes, within })
            }
            other => {
                arguments.end()?;
                qmp.run(match other {
                    "migrate_cancel" => Command::Cancel,
                    "stop" => Command::Stop,
                    "cont" => Command::Cont,
                    "quit" => Command::Quit,
                    "x-guest-status" => Command::GuestStatus,
                    "x-guest-resume" => Command::GuestResume,
                    other => return Err(CommandError::unknown(other)),
                })
            }
        }
    }
}

/// The commands of all verbs; the last [`OF_THE_GUEST`] are ours, and have no place in QMP.
const COMMANDS: &[&str] = &[
    "cont",
    "migrate",
    "migrate-incoming",
    "migrate-pause",
    "migrate-recover",
    "migrate-set-capabilities",
    "migrate-set-parameters",
    "migrate_cancel",
    "query-migrate",
    "query-migrate-capabilities",
    "query-migrate-parameters",
    "query-status",
    "quit",
    "stop",
    "x-guest-status",
    "x-guest-resume",
    "x-guest-finish",
];
const OF_THE_GUEST: usize = 3;
/// What a QEMU says to `migrate-incoming` that was not started for it.
pub const NOT_INCOMING: &str = "'-incoming' was not specified on the command line";
/// What a QEMU says to the second one.
pub const INCOMING_HAS_BEGUN: &str = "The incoming migration has already been started";
/// How long a process that is done stays for clients.
const LAST_LOOK: Duration = Duration::from_secs(2);
/// The QEMU whose commands and words these are.
const VERSION: Version = Version::new(10, 0, 0);
/// Which it is in fact.
const PACKAGE: &str = concat!("multifd ", env!("CARGO_PKG_VERSION"));
