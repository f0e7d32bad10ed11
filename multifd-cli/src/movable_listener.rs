//! A listener that moves to another address while a thread waits at it: a destination whose source comes back elsewhere.

use std::{
    io,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use multifd::transport::{Listen, Pending, Stopper, uri::Uri};

use crate::progress::lock;

/// Moves a listener, and knows where it is. Clones move the same one.
#[derive(Clone, Default)]
pub struct ListenerHandle {
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    /// The address, where it has one.
    uri: Option<Uri>,
    /// Ends the waiting at the listener that was opened last.
    current: Option<Box<dyn Stopper>>,
    /// The listener that was opened last, until the thread that accepts has taken it.
    next: Option<Box<dyn Listen>>,
    is_stopped: bool,
}

impl ListenerHandle {
    /// Begins with `listener`, which listens at `uri`. What is returned takes its connections until another takes its place.
    ///
    /// # Errors
    /// The kernel's.
    pub fn open(&self, listener: Box<dyn Listen>, uri: Option<Uri>) -> io::Result<Box<dyn Listen>> {
        let mut state = lock(&self.state);
        (state.current, state.uri) = (Some(listener.stopper()?), uri);
        Ok(Box::new(MovableListener { inner: listener, handle: self.clone() }))
    }

    /// Has connections come from `listener`, which listens at `uri`. The one before is closed by the thread that accepts.
    ///
    /// # Errors
    /// No connection is taken any more; the kernel's.
    pub fn replace(&self, listener: Box<dyn Listen>, uri: Option<Uri>) -> io::Result<()> {
        let mut state = lock(&self.state);
        if state.is_stopped {
            return Err(io::Error::new(io::ErrorKind::NotConnected, "no connection is taken any more"));
        }
        let before = state.current.replace(listener.stopper()?);
        (state.next, state.uri) = (Some(listener), uri);
        if let Some(before) = before {
            before.stop();
        }
        Ok(())
    }

    /// Where connections come to, where that has an address.
    pub fn uri(&self) -> Option<Uri> {
        lock(&self.state).uri.clone()
    }
}

impl Stopper for ListenerHandle {
    fn stop(&self) {
        let mut state = lock(&self.state);
        state.is_stopped = true;
        if let Some(current) = &state.current {
            current.stop();
        }
    }
}

/// The listener that moves.
struct MovableListener {
    inner: Box<dyn Listen>,
    handle: ListenerHandle,
}

impl MovableListener {
    /// Goes over to the listener that was opened last. Returns whether there was one.
    fn go_over(&mut self) -> bool {
        let mut state = lock(&self.handle.state);
        let next = if state.is_stopped { None } else { state.next.take() };
        drop(state);
        let is_new = next.is_some();
        if let Some(next) = next {
            self.inner = next;
        }
        is_new
    }
}

impl Listen for MovableListener {
    fn accept(&mut self, timeout: Option<Duration>) -> io::Result<Box<dyn Pending>> {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            match self.inner.accept(left) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted && self.go_over() => {}
                accepted => return accepted,
            }
        }
    }

    fn try_accept(&mut self) -> io::Result<Option<Box<dyn Pending>>> {
        self.inner.try_accept()
    }

    fn is_single(&self) -> bool {
        self.inner.is_single()
    }

    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        Ok(Box::new(self.handle.clone()))
    }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::net::UnixStream, thread};

    use test_support::{TempDir, time_limit};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(60);

    fn listener(dir: &TempDir, name: &str) -> (Box<dyn Listen>, Uri) {
        let uri = Uri::Unix(dir.join(name));
        (Box::new(uri.listener().unwrap()), uri)
    }

    #[test]
    fn connections_come_from_the_listener_that_was_opened_last() {
        time_limit(LIMIT, || {
            let (dir, handle) = (TempDir::new().unwrap(), ListenerHandle::default());
            let (first, uri) = listener(&dir, "first");
            let mut listening = handle.open(first, Some(uri)).unwrap();
            let waiting = thread::spawn(move || (listening.accept(None).map(drop), listening));
            // Twice, so that the thread that accepts may have seen the one between or not.
            for name in ["second", "third"] {
                let (next, uri) = listener(&dir, name);
                handle.replace(next, Some(uri)).unwrap();
            }
            assert_eq!(handle.uri(), Some(Uri::Unix(dir.join("third"))));
            let _peer = UnixStream::connect(dir.join("third")).unwrap();
            let (accepted, listening) = waiting.join().unwrap();
            accepted.unwrap();
            // Those before are closed, with their sockets.
            assert!(!dir.join("first").exists() && !dir.join("second").exists());
            drop(listening);
            assert!(!dir.join("third").exists());
        });
    }

    #[test]
    fn a_stop_holds_also_for_a_listener_that_is_next() {
        time_limit(LIMIT, || {
            let (dir, handle) = (TempDir::new().unwrap(), ListenerHandle::default());
            let (first, uri) = listener(&dir, "first");
            let mut listening = handle.open(first, Some(uri)).unwrap();
            let (second, uri) = listener(&dir, "second");
            handle.replace(second, Some(uri)).unwrap();
            listening.stopper().unwrap().stop();
            assert_eq!(listening.accept(None).err().unwrap().kind(), io::ErrorKind::Interrupted);
            let (third, uri) = listener(&dir, "third");
            assert!(handle.replace(third, Some(uri)).is_err());
            // What had come before is still found.
            let _peer = UnixStream::connect(dir.join("first")).unwrap();
            assert!(listening.try_accept().unwrap().is_some());
        });
    }
}
