//! Connects to a destination that may not listen yet, or never answer.

use std::{
    io,
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use multifd::transport::{Connect, Pending, Stopper, Stream, uri::Uri};

use crate::{args::TlsArgs, replace::directory_of, units::Limit};

/// Opens connections to one destination, each within a limit. The first is tried again while it is refused or not answered; from then on
/// the destination is there. Clones open connections to the same destination.
#[derive(Clone)]
pub struct PatientConnector {
    uri: Uri,
    connector: Arc<dyn Connect + Send + Sync>,
    limit: Limit<Duration>,
    /// The option that sets it.
    limited_by: &'static str,
    /// The network may be away, and come back.
    is_lost: bool,
    is_connected: Arc<AtomicBool>,
}

/// A connection that is to be opened.
struct PatientPending {
    connector: PatientConnector,
    attempts: Attempts,
}

impl PatientConnector {
    /// Connects to `uri`, with TLS where that is asked for, for at most `limit` each time.
    ///
    /// # Errors
    /// As [`TlsArgs::connector`].
    pub fn new(uri: &Uri, tls: &TlsArgs, limit: Limit<Duration>) -> io::Result<PatientConnector> {
        let connector = tls.connector(uri)?.into();
        Ok(PatientConnector {
            uri: uri.clone(),
            connector,
            limit,
            limited_by: "--connect-timeout",
            is_lost: false,
            is_connected: Arc::default(),
        })
    }

    /// The same, to a destination to which connections have broken: `option` sets the limit, and within it whatever may pass is waited for.
    pub fn after_break(self, option: &'static str) -> PatientConnector {
        PatientConnector { limited_by: option, is_lost: true, ..self }
    }

    /// Whether the destination has taken a connection.
    pub fn is_connected(&self) -> bool {
        self.is_connected.load(SeqCst)
    }
}

impl PatientConnector {
    /// How long to wait before the next attempt where `error` is what a destination that does not listen yet looks like, or one whose host
    /// is not up. A unix socket that is not there is made by it. Nothing where the next one would fail as well.
    fn pause_after(&self, error: &io::Error) -> Option<Duration> {
        match (error.kind(), &self.uri) {
            (io::ErrorKind::ConnectionRefused | io::ErrorKind::TimedOut, _) => Some(PAUSE),
            (io::ErrorKind::NotFound, Uri::Unix(path)) => directory_of(path).is_dir().then_some(PAUSE),
            // It was stopped; or no attempt was made.
            (io::ErrorKind::ConnectionAborted | io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported, _) => None,
            // There is no route, a name is not found, or what forwards connections has nowhere to forward them to.
            _ => self.is_lost.then_some(LOST_PAUSE),
        }
    }
}

impl PatientPending {
    fn attempt(&self, deadline: Option<Instant>) -> io::Result<Box<dyn Stream>> {
        let pending = self.connector.connector.dial()?;
        self.attempts.begin(pending.stopper()?);
        pending.establish(deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())))
    }
}

impl Connect for PatientConnector {
    fn dial(&self) -> io::Result<Box<dyn Pending>> {
        Ok(Box::new(PatientPending { connector: self.clone(), attempts: Attempts::default() }))
    }
}

impl Pending for PatientPending {
    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        Ok(Box::new(self.attempts.clone()))
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
            let pause = self.connector.pause_after(&error).filter(|_| !self.connector.is_connected());
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let over = left.is_some_and(|left| left < PAUSE);
            if over && (pause.is_some() || error.kind() == io::ErrorKind::TimedOut) {
                let (tried, option) = (begun.elapsed().as_secs_f64(), self.connector.limited_by);
                let message = format!("{error}; tried for {tried:.1} s ({option})");
                return Err(io::Error::new(error.kind(), message));
            }
            let pause = pause.map(|pause| left.map_or(pause, |left| pause.min(left)));
            if pause.is_none_or(|pause| self.attempts.is_stopped_within(pause)) {
                return Err(error);
            }
            if !std::mem::replace(&mut told, true) {
                tracing::warn!(%error, "tries again until the destination listens");
            }
        }
    }
}

/// What ends the attempts of one connection. Clones are the same.
#[derive(Clone, Default)]
struct Attempts {
    state: Arc<Mutex<AttemptsState>>,
    stopped: Arc<Condvar>,
}

#[derive(Default)]
struct AttemptsState {
    is_stopped: bool,
    /// Ends the attempt that goes on, or went on last.
    current: Option<Box<dyn Stopper>>,
}

impl Attempts {
    /// Has `stopper` end the attempt that begins; at once where it was stopped before.
    fn begin(&self, stopper: Box<dyn Stopper>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.is_stopped {
            stopper.stop();
        }
        state.current = Some(stopper);
    }

    /// Waits for `pause`, or until it is stopped. Returns whether it was.
    fn is_stopped_within(&self, pause: Duration) -> bool {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.stopped.wait_timeout_while(state, pause, |state| !state.is_stopped);
        waited.unwrap_or_else(PoisonError::into_inner).0.is_stopped
    }
}

impl Stopper for Attempts {
    fn stop(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.is_stopped = true;
        self.stopped.notify_all();
        if let Some(current) = &state.current {
            current.stop();
        }
    }
}

/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(100);
/// The same where the destination is not what fails, or would see each attempt.
const LOST_PAUSE: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use std::{
        net::{TcpListener, TcpStream},
        thread,
    };

    use super::*;

    /// A port that is free.
    fn free() -> (Uri, String) {
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        (Uri::from(address), address.to_string())
    }

    fn fails(uri: &Uri, limit: Duration) -> io::Error {
        PatientConnector::new(uri, &TlsArgs::default(), Limit(Some(limit))).unwrap().connect().err().unwrap()
    }

    /// The error of a connect without a limit that is stopped, and whether it was stopped before it ended by itself.
    fn is_stopped(uri: &Uri) -> (io::Error, bool) {
        let pending = PatientConnector::new(uri, &TlsArgs::default(), Limit(None)).unwrap().dial().unwrap();
        let stopper = pending.stopper().unwrap();
        let waiting = thread::spawn(move || pending.establish(None).err().unwrap());
        thread::sleep(3 * PAUSE);
        let ended = waiting.is_finished();
        stopper.stop();
        (waiting.join().unwrap(), !ended)
    }

    #[test]
    fn a_destination_that_listens_late_is_waited_for() {
        test_support::time_limit(Duration::from_secs(60), || {
            let (uri, address) = free();
            let listener = thread::spawn(move || {
                thread::sleep(3 * PAUSE);
                TcpListener::bind(address).unwrap().accept().unwrap()
            });
            PatientConnector::new(&uri, &TlsArgs::default(), Limit(Some(Duration::from_secs(50))))
                .unwrap()
                .connect()
                .unwrap();
            listener.join().unwrap();
        });
    }

    /// A missing socket ended the migration at once, where a port that nothing listened at was waited for.
    #[test]
    fn a_unix_socket_that_is_made_late_is_waited_for() {
        test_support::time_limit(Duration::from_secs(60), || {
            let dir = test_support::TempDir::new().unwrap();
            let path = dir.join("late");
            let listener = thread::spawn({
                let path = path.clone();
                move || {
                    thread::sleep(3 * PAUSE);
                    std::os::unix::net::UnixListener::bind(path).unwrap().accept().unwrap()
                }
            });
            let limit = Limit(Some(Duration::from_secs(50)));
            PatientConnector::new(&Uri::Unix(path), &TlsArgs::default(), limit).unwrap().connect().unwrap();
            listener.join().unwrap();
            // By a relative path the directory is the one that the process is in, which always is there.
            let connector = PatientConnector::new(&Uri::Unix("late".into()), &TlsArgs::default(), limit).unwrap();
            assert!(connector.pause_after(&io::ErrorKind::NotFound.into()).is_some());
            // In a directory that is not there, no socket comes.
            let uri = Uri::Unix(dir.join("nonesuch/socket"));
            let error = PatientConnector::new(&uri, &TlsArgs::default(), limit).unwrap().connect().err().unwrap();
            assert_eq!(error.kind(), io::ErrorKind::NotFound);
        });
    }

    #[test]
    fn the_time_and_a_stop_end_the_attempts() {
        test_support::time_limit(Duration::from_secs(60), || {
            let (uri, _) = free();
            let message = fails(&uri, 3 * PAUSE).to_string();
            assert!(message.contains("--connect-timeout") && message.contains(&uri.to_string()), "{message}");
            let (error, in_time) = is_stopped(&uri);
            assert_eq!((error.kind(), in_time), (io::ErrorKind::ConnectionRefused, true), "{error}");
        });
    }

    /// Nothing could cancel it for ten seconds and each address.
    #[test]
    fn the_time_and_a_stop_end_a_connect_that_is_not_answered() {
        test_support::time_limit(Duration::from_secs(60), || {
            // The kernel does not answer once the queue of a listener is full.
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            rustix::net::listen(&listener, 0).unwrap();
            let address = listener.local_addr().unwrap();
            let full: Vec<TcpStream> =
                (0..8).map_while(|_| TcpStream::connect_timeout(&address, 2 * PAUSE).ok()).collect();
            assert!(full.len() < 8, "the queue is never full");
            let uri = Uri::from(address);
            let error = fails(&uri, 3 * PAUSE);
            assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
            assert!(error.to_string().contains("--connect-timeout"), "{error}");
            let (error, _) = is_stopped(&uri);
            assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted, "{error}");
        });
    }

    /// The first was tried for 10 s, whatever the limit was; and a recovery ended at once where the network was away, which is what it is for.
    #[test]
    fn what_may_pass_is_waited_for_and_more_of_that_after_a_break() {
        let of = |uri: &str, is_lost: bool| {
            let uri = uri.parse().unwrap();
            let connector = PatientConnector::new(&uri, &TlsArgs::default(), Limit(None)).unwrap();
            if is_lost { connector.after_break("--recover-timeout") } else { connector }
        };
        let waits = |uri: &str, is_lost, kind: io::ErrorKind| of(uri, is_lost).pause_after(&kind.into()).is_some();
        for is_lost in [false, true] {
            for kind in [io::ErrorKind::ConnectionRefused, io::ErrorKind::TimedOut] {
                assert!(waits("tcp:h:1", is_lost, kind), "{kind:?}");
            }
            for kind in [io::ErrorKind::ConnectionAborted, io::ErrorKind::InvalidInput, io::ErrorKind::Unsupported] {
                assert!(!waits("tcp:h:1", is_lost, kind), "{kind:?}");
            }
            // TLS says `PermissionDenied` of a connection that is closed within the handshake, and the resolver has a kind of its own.
            for kind in [
                io::ErrorKind::NetworkUnreachable,
                io::ErrorKind::HostUnreachable,
                io::ErrorKind::ConnectionReset,
                io::ErrorKind::PermissionDenied,
                io::ErrorKind::Other,
            ] {
                assert_eq!(waits("tcp:h:1", is_lost, kind), is_lost, "{kind:?}");
            }
            assert!(!waits("unix:/none/such/directory/socket", is_lost, io::ErrorKind::NotFound));
        }
    }

    /// It ended at once where the kernel has no route, also before the first pause was over.
    #[test]
    fn a_network_that_is_away_is_waited_for_as_long_as_the_limit_says() {
        test_support::time_limit(Duration::from_secs(60), || {
            // Of those that no host has: there is no route, or nothing answers.
            let uri = "tcp:[2001:db8::1]:1".parse().unwrap();
            let limit = 3 * PAUSE;
            let connector = PatientConnector::new(&uri, &TlsArgs::default(), Limit(Some(limit))).unwrap();
            let begun = Instant::now();
            let error = connector.after_break("--recover-timeout").connect().err().unwrap().to_string();
            assert!(error.contains("(--recover-timeout)"), "{error}");
            assert!(begun.elapsed() > limit - PAUSE, "{:?}", begun.elapsed());
        });
    }

    #[test]
    fn a_stop_before_the_connect_holds() {
        test_support::time_limit(Duration::from_secs(60), || {
            let (uri, _) = free();
            let pending = PatientConnector::new(&uri, &TlsArgs::default(), Limit(None)).unwrap().dial().unwrap();
            pending.stopper().unwrap().stop();
            assert!(pending.establish(None).is_err());
        });
    }
}
