//! Connects to a destination that may not listen yet.

use std::{
    cell::Cell,
    io, thread,
    time::{Duration, Instant},
};

use multifd::{
    stop::StopHandle,
    transport::{Connect, Stream, uri::Uri},
};

use crate::units::Limit;

/// Opens connections to one destination. The first is tried again while it is refused, until the time is over or the
/// migration is cancelled; from then on the destination is there.
pub struct PatientConnector {
    inner: Box<dyn Connect + Send>,
    limit: Limit<Duration>,
    stop: StopHandle,
    is_connected: Cell<bool>,
}

impl PatientConnector {
    /// Connects to `uri`, for at most `limit`.
    ///
    /// # Errors
    /// As [`Uri::connector`].
    pub fn new(uri: &Uri, limit: Limit<Duration>, stop: StopHandle) -> io::Result<PatientConnector> {
        Ok(PatientConnector { inner: uri.connector()?, limit, stop, is_connected: Cell::new(false) })
    }
}

impl Connect for PatientConnector {
    fn connect(&self) -> io::Result<Box<dyn Stream>> {
        let (begun, mut told) = (Instant::now(), false);
        loop {
            let error = match self.inner.connect() {
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused && !self.is_connected.get() => error,
                other => {
                    self.is_connected.set(true);
                    return other;
                }
            };
            if self.stop.is_stopped() {
                return Err(error);
            }
            if let Some(limit) = self.limit.0
                && begun.elapsed() + PAUSE > limit
            {
                let message = format!("{error}; tried for {:.1} s (--connect-timeout)", begun.elapsed().as_secs_f64());
                return Err(io::Error::new(error.kind(), message));
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
    use std::net::TcpListener;

    use super::*;

    /// A port that is free.
    fn free() -> (Uri, String) {
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        (Uri::from(address), address.to_string())
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
            let limit = Limit(Some(Duration::from_millis(300)));
            let error = PatientConnector::new(&uri, limit, StopHandle::new()).unwrap().connect().err().unwrap();
            let message = error.to_string();
            assert!(message.contains("--connect-timeout") && message.contains(&uri.to_string()), "{message}");

            let stop = StopHandle::new();
            let connector = PatientConnector::new(&uri, Limit(None), stop.clone()).unwrap();
            let cancel = thread::spawn(move || {
                thread::sleep(3 * PAUSE);
                stop.cancel();
            });
            assert_eq!(connector.connect().err().unwrap().kind(), io::ErrorKind::ConnectionRefused);
            cancel.join().unwrap();
        });
    }
}
