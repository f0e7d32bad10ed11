//! The side that takes commands, as a QEMU's `-qmp unix:PATH,server=on` does.
//!
//! Each client has a thread that reads its commands and calls the [`Handler`]. Events and answers are written without waiting:
//! a client that does not read what it asked for loses its connection, and delays neither the VM nor other clients.

mod arguments;
mod client;

use std::{
    io,
    os::unix::net::UnixListener,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

pub use qapi_spec::ErrorClass;
use rustix::{net::sockopt::socket_peercred, process::geteuid};
use serde_json::{Value, json};

pub use self::arguments::Arguments;
use self::client::Connection;
use crate::client::Version;

/// Runs the commands of all clients.
pub trait Handler: Send + Sync + 'static {
    /// The names of the commands, without those that the server has itself: `qmp_capabilities`, `query-commands`,
    /// `query-version`.
    fn commands(&self) -> &'static [&'static str];

    /// Those of [`commands`](Handler::commands) that a client may send out of band (`exec-oob`): they are answered at once, and wait
    /// for nothing that another command may wait for.
    fn out_of_band(&self) -> &'static [&'static str] {
        &[]
    }

    /// Runs `command`, which is one of [`commands`](Handler::commands), and returns its answer. Called by the thread of the
    /// client, also by several at the same time.
    ///
    /// # Errors
    /// What the client is told.
    fn execute(&self, command: &str, arguments: Arguments) -> Result<Value, CommandError>;

    /// Starts a thread called `name`, which ends with the process or with its client.
    ///
    /// # Errors
    /// The kernel's.
    fn spawn(&self, name: &'static str, body: Box<dyn FnOnce() + Send>) -> io::Result<()> {
        thread::Builder::new().name(name.to_owned()).spawn(body).map(drop)
    }
}

/// Why a command was not run.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct CommandError {
    /// QMP's error class.
    pub class: ErrorClass,
    /// What a person reads.
    pub description: String,
}

impl CommandError {
    /// An error of the class that most errors are of.
    pub fn generic(description: impl Into<String>) -> CommandError {
        CommandError { class: ErrorClass::GenericError, description: description.into() }
    }

    /// There is no such command.
    pub fn unknown(command: &str) -> CommandError {
        let description = format!("The command {command} has not been found");
        CommandError { class: ErrorClass::CommandNotFound, description }
    }
}

/// A server that runs until the process ends. Clones are the same one.
#[derive(Clone)]
pub struct Server {
    shared: Arc<Shared>,
}

struct Shared {
    handler: Arc<dyn Handler>,
    version: Version,
    package: String,
    clients: Mutex<Vec<Weak<Connection>>>,
    /// A client has gone.
    gone: Condvar,
}

impl Server {
    /// Serves the clients of `listener`, those of this process's user and of root. They are told that they talk to `version`
    /// of a QEMU, and that `package` it is.
    ///
    /// # Errors
    /// The kernel's, where there is no thread for it.
    pub fn start(
        listener: UnixListener,
        version: Version,
        package: &str,
        handler: Arc<dyn Handler>,
    ) -> io::Result<Server> {
        let (clients, gone) = (Mutex::default(), Condvar::new());
        let server =
            Server { shared: Arc::new(Shared { handler, version, package: package.to_owned(), clients, gone }) };
        let accepting = server.clone();
        server.shared.handler.spawn("qmp", Box::new(move || accepting.accept(&listener)))?;
        Ok(server)
    }

    /// Tells all clients of an event.
    pub fn emit(&self, event: &str, data: Option<Value>) {
        let clients: Vec<_> = lock(&self.shared.clients).iter().filter_map(Weak::upgrade).collect();
        if clients.is_empty() {
            return;
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let timestamp = json!({ "seconds": now.as_secs(), "microseconds": now.subsec_micros() });
        let mut message = json!({ "timestamp": timestamp, "event": event });
        if let (Some(data), Some(object)) = (data, message.as_object_mut()) {
            object.insert("data".to_owned(), data);
        }
        clients.iter().for_each(|client| client.tell(&message));
    }

    /// Whether a client is connected that has ended the negotiation.
    pub fn has_clients(&self) -> bool {
        lock(&self.shared.clients).iter().filter_map(Weak::upgrade).any(|client| client.is_ready())
    }

    /// Waits until no client is connected, at most for `limit`. Returns whether that is so.
    pub fn wait_clients(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        let mut clients = lock(&self.shared.clients);
        loop {
            clients.retain(|client| client.strong_count() > 0);
            let left = deadline.saturating_duration_since(Instant::now());
            if clients.is_empty() || left.is_zero() {
                return clients.is_empty();
            }
            clients = match self.shared.gone.wait_timeout(clients, left) {
                Ok((clients, _)) => clients,
                Err(error) => error.into_inner().0,
            };
        }
    }

    fn accept(&self, listener: &UnixListener) {
        for stream in listener.incoming() {
            // Out of descriptors or threads: it would fail again at once.
            if stream.and_then(|stream| self.serve(stream)).is_err() {
                thread::sleep(AFTER_FAILURE);
            }
        }
    }

    /// The file's rights keep other users out; the check is for one who was given the socket by another way, such as a bind
    /// mount.
    fn serve(&self, stream: std::os::unix::net::UnixStream) -> io::Result<()> {
        let user = socket_peercred(&stream)?.uid;
        if user != geteuid() && !user.is_root() {
            return Ok(());
        }
        let connection = Arc::new(Connection::new(stream)?);
        {
            let mut clients = lock(&self.shared.clients);
            clients.retain(|client| client.strong_count() > 0);
            if clients.len() >= MOST_CLIENTS {
                return Ok(());
            }
            clients.push(Arc::downgrade(&connection));
        }
        let shared = self.shared.clone();
        let body = move || {
            connection.run(&shared);
            drop(connection);
            // The lock orders it after a look of a thread that is about to wait.
            drop(lock(&shared.clients));
            shared.gone.notify_all();
        };
        self.shared.handler.spawn("qmp client", Box::new(body))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A list of clients is whole at any moment.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// More are closed at once. QEMU has one for each socket.
const MOST_CLIENTS: usize = 16;
const AFTER_FAILURE: Duration = Duration::from_millis(10);

#[cfg(test)]
mod tests;
