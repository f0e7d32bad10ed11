//! Starts the threads of the command that are none of a migration's.

use std::{io, thread::JoinHandle};

/// Starts a thread called `name`.
///
/// # Errors
/// The kernel's, with what raises the limit.
pub fn spawn<T: Send + 'static>(
    name: impl Into<String>,
    body: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    let name = name.into();
    multifd::threads::spawn(name.clone(), body).map_err(|error| {
        let message = format!(
            "cannot create the thread {name:?}: {error}; raise the limit on threads (ulimit -u, pids.max) or on memory (ulimit -v)"
        );
        io::Error::new(error.kind(), message)
    })
}
