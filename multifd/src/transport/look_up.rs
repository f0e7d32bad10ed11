//! Looks names of hosts up, in a thread that can be given up.
//!
//! The resolver of the C library has no limit of its own and cannot be interrupted. It is asked in a thread of the standard library
//! ("mfd look-up"), which nothing joins: where the answer comes too late, the thread ends by itself after it. An address is not
//! looked up, and takes no thread.

use std::{
    io,
    net::{IpAddr, SocketAddr, ToSocketAddrs},
    os::fd::AsFd,
    sync::mpsc,
    time::Duration,
};

use super::stop_event::StopEvent;
use crate::{sync::Deadline, threads};

/// What looks up a host and adds the port.
pub(super) type Resolver = fn(&str, u16) -> io::Result<Vec<SocketAddr>>;

/// The resolver of the C library, with all that the system's configuration has it ask.
pub(super) fn by_system(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    Ok((host, port).to_socket_addrs()?.collect())
}

/// Returns the addresses of `host`, at least one, each with `port`. Waits for `resolver` until `deadline`, for at most 30 s.
///
/// # Errors
/// [`io::ErrorKind::TimedOut`]; [`io::ErrorKind::Interrupted`] once `stopped` is set; [`io::ErrorKind::NotFound`] where the
/// host has no address; the resolver's; the kernel's where it has no thread for it.
pub(super) fn addresses(
    host: &str,
    port: u16,
    resolver: Resolver,
    stopped: &StopEvent,
    deadline: Deadline,
) -> io::Result<Vec<SocketAddr>> {
    if let Ok(address) = host.parse::<IpAddr>() {
        return Ok(vec![SocketAddr::new(address, port)]);
    }
    let limit = deadline.left().map_or(LIMIT, |left| left.min(LIMIT));
    let addresses = in_a_thread(host, port, resolver, stopped, limit)?;
    if addresses.is_empty() {
        return Err(io::Error::new(io::ErrorKind::NotFound, "the host has no address"));
    }
    Ok(addresses)
}

fn in_a_thread(
    host: &str,
    port: u16,
    resolver: Resolver,
    stopped: &StopEvent,
    limit: Duration,
) -> io::Result<Vec<SocketAddr>> {
    let (tell, told) = mpsc::sync_channel(1);
    // Closed at the end of the thread, also by a panic.
    let (ended, ends) = io::pipe()?;
    let host = host.to_owned();
    threads::spawn("mfd look-up", move || {
        let _ends = ends;
        let _ = tell.send(resolver(&host, port));
    })?;
    stopped.wait_readable(ended.as_fd(), Some(limit)).map_err(|error| match error.kind() {
        io::ErrorKind::TimedOut => {
            let message = format!("its name was not found within {:.1} s", limit.as_secs_f64());
            io::Error::new(io::ErrorKind::TimedOut, message)
        }
        _ => error,
    })?;
    told.try_recv().unwrap_or_else(|_| Err(io::Error::other("the thread that looks its name up panicked")))
}

/// For one name. The C library asks each server twice for 5 s, unless the system is configured otherwise.
const LIMIT: Duration = Duration::from_secs(30);

#[cfg(all(test, not(any(loom, shuttle))))]
pub(super) mod tests {
    use std::{
        fs,
        path::{Path, PathBuf},
        sync::{Condvar, Mutex},
        thread,
    };

    use super::*;

    /// A resolver that answers only when the test says so, so that the test leaves no thread behind.
    pub(in super::super) struct LateResolver {
        state: Mutex<LateState>,
        changed: Condvar,
    }

    struct LateState {
        /// The directory of its thread in `/proc`, once it was asked.
        thread: Option<PathBuf>,
        may_answer: bool,
    }

    impl LateResolver {
        pub(in super::super) const fn new() -> LateResolver {
            LateResolver { state: Mutex::new(LateState { thread: None, may_answer: false }), changed: Condvar::new() }
        }

        /// Returns no address, after [`LateResolver::finish`] was called.
        pub(in super::super) fn resolve(&self) -> io::Result<Vec<SocketAddr>> {
            let thread = Path::new("/proc").join(fs::read_link("/proc/thread-self")?);
            let mut state = self.state.lock().unwrap();
            state.thread = Some(thread);
            self.changed.notify_all();
            drop(self.changed.wait_while(state, |state| !state.may_answer).unwrap());
            Ok(Vec::new())
        }

        /// Waits until it is asked.
        pub(in super::super) fn wait_until_asked(&self) -> PathBuf {
            let state = self.state.lock().unwrap();
            let state = self.changed.wait_while(state, |state| state.thread.is_none()).unwrap();
            state.thread.clone().expect("it was waited for")
        }

        /// Lets it answer, and waits until its thread has ended.
        pub(in super::super) fn finish(&self) {
            let thread = self.wait_until_asked();
            self.state.lock().unwrap().may_answer = true;
            self.changed.notify_all();
            while thread.exists() {
                thread::sleep(Duration::from_millis(1));
            }
        }
    }

    fn never(_: &str, _: u16) -> io::Result<Vec<SocketAddr>> {
        panic!("an address was looked up");
    }

    fn kind(resolver: Resolver, limit: Option<Duration>) -> io::ErrorKind {
        let stopped = StopEvent::new().unwrap();
        addresses("host", 1, resolver, &stopped, Deadline::after(limit)).unwrap_err().kind()
    }

    #[test]
    fn an_address_is_not_looked_up() {
        test_support::time_limit(Duration::from_secs(60), || {
            let stopped = StopEvent::new().unwrap();
            for host in ["127.0.0.1", "::1"] {
                let found = addresses(host, 7, never, &stopped, Deadline::after(None)).unwrap();
                assert_eq!(found, [SocketAddr::new(host.parse().unwrap(), 7)]);
            }
        });
    }

    #[test]
    fn a_look_up_has_a_limit_and_all_its_ends_are_told_apart() {
        static LATE: LateResolver = LateResolver::new();

        test_support::time_limit(Duration::from_secs(60), || {
            assert_eq!(kind(|_, _| LATE.resolve(), Some(Duration::from_millis(50))), io::ErrorKind::TimedOut);
            LATE.finish();
            assert_eq!(kind(|_, _| Ok(Vec::new()), None), io::ErrorKind::NotFound);
            assert_eq!(kind(|_, _| Err(io::ErrorKind::PermissionDenied.into()), None), io::ErrorKind::PermissionDenied);
            assert_eq!(kind(|_, _| panic!("a defect"), None), io::ErrorKind::Other);
            let stopped = StopEvent::new().unwrap();
            let found = addresses("localhost", 7, by_system, &stopped, Deadline::after(None)).unwrap();
            assert!(found.iter().all(|address| address.ip().is_loopback() && address.port() == 7), "{found:?}");
        });
    }
}
