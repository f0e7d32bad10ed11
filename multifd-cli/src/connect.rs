//! Connects to a destination that may not listen yet, or never answer.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::{Duration, Instant},
};

use multifd::{
    stop::StopHandle,
    threads,
    transport::{Connect, Pending, Stopper, Stream, uri::Uri},
};

use crate::units::Limit;

/// Opens connections to one destination. Each is given up when the time is over, or at once when the migration is
/// cancelled. The first is tried again while it is refused; from then on the destination is there. Clones open connections to
/// the same destination.
#[derive(Clone)]
pub struct PatientConnector {
    uri: Uri,
    connector: Arc<dyn Connect + Send + Sync>,
    limit: Limit<Duration>,
    stop: StopHandle,
    is_connected: Arc<AtomicBool>,
}

/// A connection that is to be opened.
struct PatientPending {
    connector: PatientConnector,
    given_up: Arc<AtomicBool>,
}

impl PatientConnector {
    /// Connects to `uri`, for at most `limit` each time.
    ///
    /// # Errors
    /// As [`Uri::connector`].
    pub fn new(uri: &Uri, limit: Limit<Duration>, stop: StopHandle) -> io::Result<PatientConnector> {
        let connector = uri.connector()?.into();
        Ok(PatientConnector { uri: uri.clone(), connector, limit, stop, is_connected: Arc::default() })
    }
}

impl PatientPending {
    fn is_stopped(&self) -> bool {
        self.given_up.load(SeqCst) || self.connector.stop.is_stopped()
    }

    /// One attempt, in a thread of its own: nothing ends a look-up of a name, and a connect to a host that does not answer
    /// ends by itself after ten seconds for each address. A thread that is given up ends then.
    fn attempt(&self, deadline: Option<Instant>) -> io::Result<Box<dyn Stream>> {
        let (connector, (done, is_done)) = (self.connector.connector.clone(), mpsc::channel());
        // A result that is not wanted any more is a connection that is closed again.
        let thread = threads::spawn("connect", move || drop(done.send(connector.connect())));
        if let Err(error) = thread {
            tracing::debug!(%error, "no thread to connect in, a cancel has to wait");
            return self.connector.connector.connect();
        }
        loop {
            match is_done.recv_timeout(PAUSE) {
                Ok(connected) => return connected,
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(io::Error::other("the thread that connects panicked"));
                }
                Err(RecvTimeoutError::Timeout) if self.is_stopped() => {
                    return Err(io::ErrorKind::Interrupted.into());
                }
                Err(RecvTimeoutError::Timeout) if deadline.is_some_and(|deadline| Instant::now() >= deadline) => {
                    return Err(io::Error::new(io::ErrorKind::TimedOut, format!("{}: no answer", self.connector.uri)));
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }
}

impl Connect for PatientConnector {
    fn dial(&self) -> io::Result<Box<dyn Pending>> {
        Ok(Box::new(PatientPending { connector: self.clone(), given_up: Arc::default() }))
    }
}

struct GiveUp(Arc<AtomicBool>);

impl Stopper for GiveUp {
    fn stop(&self) {
        self.0.store(true, SeqCst);
    }
}

impl Pending for PatientPending {
    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        Ok(Box::new(GiveUp(self.given_up.clone())))
    }

    fn peer(&self) -> String {
        self.connector.uri.to_string()
    }

    fn establish(self: Box<Self>, limit: Option<Duration>) -> io::Result<Box<dyn Stream>> {
        let (begun, mut told) = (Instant::now(), false);
        let limit = self.connector.limit.0.into_iter().chain(limit).min();
        let deadline = limit.and_then(|limit| begun.checked_add(limit));
        loop {
            let error = match self.attempt(deadline) {
                Ok(stream) => {
                    self.connector.is_connected.store(true, SeqCst);
                    return Ok(stream);
                }
                Err(error) => error,
            };
            let refused = error.kind() == io::ErrorKind::ConnectionRefused && !self.connector.is_connected.load(SeqCst);
            let over = deadline.is_some_and(|deadline| Instant::now() + PAUSE > deadline);
            if over && (refused || error.kind() == io::ErrorKind::TimedOut) {
                let message = format!("{error}; tried for {:.1} s (--connect-timeout)", begun.elapsed().as_secs_f64());
                return Err(io::Error::new(error.kind(), message));
            }
            if !refused || self.is_stopped() {
                return Err(error);
            }
            if !std::mem::replace(&mut told, true) {
                tracing::warn!(%error, "tries again until the destination listens");
            }
            thread::sleep(PAUSE);
        }
    }
}

/// Between two attempts; the longest that a cancel has to wait for.
const PAUSE: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    /// A port that is free.
    fn free() -> (Uri, String) {
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        (Uri::from(address), address.to_string())
    }

    /// The error, and whether it came in less than the ten seconds after which a connect ends by itself.
    fn fails(uri: &Uri, limit: Limit<Duration>, stop: StopHandle) -> (io::Error, bool) {
        let begun = Instant::now();
        let error = PatientConnector::new(uri, limit, stop).unwrap().connect().err().unwrap();
        (error, begun.elapsed() < Duration::from_secs(8))
    }

    #[test]
    fn a_destination_that_listens_late_is_waited_for() {
        test_support::time_limit(Duration::from_secs(60), || {
            let (uri, address) = free();
            let listener = thread::spawn(move || {
                thread::sleep(3 * PAUSE);
                TcpListener::bind(address).unwrap().accept().unwrap()
            });
            let limit = Limit(Some(Duration::from_secs(50)));
            PatientConnector::new(&uri, limit, StopHandle::new()).unwrap().connect().unwrap();
            listener.join().unwrap();
        });
    }

    #[test]
    fn the_time_and_a_cancel_end_the_attempts() {
        test_support::time_limit(Duration::from_secs(60), || {
            let (uri, _) = free();
            let (error, _) = fails(&uri, Limit(Some(Duration::from_millis(300))), StopHandle::new());
            let message = error.to_string();
            assert!(message.contains("--connect-timeout") && message.contains(&uri.to_string()), "{message}");

            let stop = StopHandle::new();
            let cancel = thread::spawn({
                let stop = stop.clone();
                move || {
                    thread::sleep(3 * PAUSE);
                    stop.cancel();
                }
            });
            assert_eq!(fails(&uri, Limit(None), stop).0.kind(), io::ErrorKind::ConnectionRefused);
            cancel.join().unwrap();
        });
    }

    /// Nothing could cancel it for ten seconds and each address.
    #[test]
    fn the_time_and_a_cancel_end_a_connect_that_is_not_answered() {
        test_support::time_limit(Duration::from_secs(60), || {
            // The kernel does not answer once the queue of a listener is full.
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            rustix::net::listen(&listener, 0).unwrap();
            let address = listener.local_addr().unwrap();
            let full: Vec<TcpStream> =
                (0..8).map_while(|_| TcpStream::connect_timeout(&address, 2 * PAUSE).ok()).collect();
            assert!(full.len() < 8, "the queue is never full");
            let uri = Uri::from(address);
            let (error, soon) = fails(&uri, Limit(Some(3 * PAUSE)), StopHandle::new());
            assert_eq!((error.kind(), soon), (io::ErrorKind::TimedOut, true), "{error}");
            assert!(error.to_string().contains("--connect-timeout"), "{error}");
            let stop = StopHandle::new();
            stop.cancel();
            let (error, soon) = fails(&uri, Limit(None), stop);
            assert_eq!((error.kind(), soon), (io::ErrorKind::Interrupted, true), "{error}");
        });
    }
}
