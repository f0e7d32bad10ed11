//! Listeners that were taken over: their mode, with a ring and without, and waits beside others who accept.

use std::{
    env,
    io::Write,
    net::{SocketAddr, TcpListener, TcpStream},
    os::unix::net::{UnixListener, UnixStream},
    sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    thread,
    time::Duration,
};

use seccompiler::{BpfProgram, apply_filter, compile_from_json};

use super::*;
use crate::transport::{Listen, RecvHalf, Stream, socket::SocketListener, uri::Uri};

const LIMIT: Duration = Duration::from_secs(120);

fn is_blocking(socket: impl AsFd) -> bool {
    !fcntl_getfl(socket).unwrap().contains(OFlags::NONBLOCK)
}

fn over(socket: impl AsFd) -> SocketListener {
    SocketListener::new(socket.as_fd().try_clone_to_owned().unwrap(), Uri::Fd(3)).unwrap()
}

/// Whether this system gives out rings; says why not.
fn has_rings() -> bool {
    AcceptOnce::new().map_err(|error| test_support::skip(&format!("no io_uring here: {error}"))).is_ok()
}

/// Runs `body` in a thread in which `call` is refused, as in a container.
fn without(call: &str, body: impl FnOnce() + Send) {
    let json = format!(
        r#"{{"f":{{"mismatch_action":"allow","match_action":{{"errno":1}},"filter":[{{"syscall":"{call}"}}]}}}}"#
    );
    let filter: BpfProgram =
        compile_from_json(json.as_bytes(), env::consts::ARCH.try_into().unwrap()).unwrap().remove("f").unwrap();
    test_support::time_limit(LIMIT, || {
        thread::scope(|scope| {
            let filtered = scope.spawn(move || {
                apply_filter(&filter).unwrap();
                body();
            });
            filtered.join().unwrap();
        });
    });
}

/// Takes the connection whose other end is `theirs`.
fn take_one(listener: &mut SocketListener, mut theirs: impl Write) {
    theirs.write_all(b"x").unwrap();
    let mut taken: Box<dyn Stream> = listener.accept(None).unwrap().establish(None).unwrap();
    let mut read = [0];
    assert_eq!(RecvHalf::read(&mut *taken, &mut read).unwrap(), 1);
}

/// Others who accept from the same socket got `EAGAIN`, in other processes too.
#[test]
fn the_mode_of_a_listener_that_is_taken_over_never_changes() {
    if !has_rings() {
        return;
    }
    test_support::time_limit(LIMIT, || {
        let dir = test_support::TempDir::new().unwrap();
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let unix = UnixListener::bind(dir.join("s")).unwrap();
        for blocking in [true, false] {
            tcp.set_nonblocking(!blocking).unwrap();
            unix.set_nonblocking(!blocking).unwrap();
            let (mut over_tcp, mut over_unix) = (over(&tcp), over(&unix));
            let unchanged = || assert_eq!((is_blocking(&tcp), is_blocking(&unix)), (blocking, blocking));
            for listener in [&mut over_tcp, &mut over_unix] {
                assert!(listener.try_accept().unwrap().is_none());
                let none = listener.accept(Some(Duration::from_millis(5))).err().unwrap();
                assert_eq!(none.kind(), io::ErrorKind::TimedOut);
                unchanged();
            }
            take_one(&mut over_tcp, TcpStream::connect(tcp.local_addr().unwrap()).unwrap());
            take_one(&mut over_unix, UnixStream::connect(dir.join("s")).unwrap());
            unchanged();
            drop((over_tcp, over_unix));
            unchanged();
        }
    });
}

/// What the other thread takes may be what `poll` has told of: an `accept` that blocks would wait for the next one.
#[test]
fn waits_end_beside_another_who_accepts_from_the_same_listener() {
    if !has_rings() {
        return;
    }
    beside_a_thief(true);
}

/// The same for a listener that cannot be accepted from without the mode: the other one is told that there is nothing.
#[test]
fn waits_end_beside_another_who_accepts_from_a_listener_whose_mode_is_changed() {
    without("io_uring_setup", || beside_a_thief(false));
}

const CONNECTIONS: usize = 2000;

fn beside_a_thief(keeps_mode: bool) {
    test_support::time_limit(LIMIT, || {
        let ours = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = ours.local_addr().unwrap();
        let mut listener = over(&ours);
        let stopper = listener.stopper().unwrap();
        let (ends, stolen, refused) = (AtomicBool::new(false), AtomicUsize::new(0), AtomicUsize::new(0));
        let mut taken = 0;
        thread::scope(|scope| {
            let thief = scope.spawn(|| {
                while !ends.load(SeqCst) {
                    match ours.accept() {
                        Ok(_) => stolen.fetch_add(1, SeqCst),
                        Err(_) => refused.fetch_add(1, SeqCst),
                    };
                }
            });
            let clients = scope.spawn(|| (0..CONNECTIONS).for_each(|_| drop(TcpStream::connect(address))));
            // Waits of all lengths, until each connection has been taken by one or the other.
            for length in (0..200).cycle() {
                match listener.accept(Some(Duration::from_micros(length * 10))) {
                    Ok(_) => taken += 1,
                    Err(error) => assert_eq!(error.kind(), io::ErrorKind::TimedOut),
                }
                if clients.is_finished() && taken + stolen.load(SeqCst) == CONNECTIONS {
                    break;
                }
            }
            let waits = scope.spawn(move || listener.accept(None).map(drop));
            stopper.stop();
            assert_eq!(waits.join().unwrap().unwrap_err().kind(), io::ErrorKind::Interrupted);
            ends.store(true, SeqCst);
            end(address, || thief.is_finished());
        });
        assert_eq!(
            refused.load(SeqCst) == 0,
            keeps_mode,
            "{refused:?} calls of another were told that there is nothing"
        );
    });
}

/// Ends an accept of another thread, which waits for a connection.
fn end(address: SocketAddr, has_ended: impl Fn() -> bool) {
    while !has_ended() {
        drop(TcpStream::connect(address));
    }
}

/// Two migrations that share a listener, and rings: neither changes the mode, and each stop ends its own wait.
#[test]
fn two_listeners_on_one_socket_leave_its_mode_alone() {
    if !has_rings() {
        return;
    }
    test_support::time_limit(LIMIT, || {
        let ours = TcpListener::bind("127.0.0.1:0").unwrap();
        let (first, mut second) = (over(&ours), over(&ours));
        drop(first);
        assert!(is_blocking(&ours));
        second.stopper().unwrap().stop();
        assert_eq!(second.accept(None).err().unwrap().kind(), io::ErrorKind::Interrupted);
        assert!(second.try_accept().unwrap().is_none() && is_blocking(&ours));
    });
}

/// A VMM that went on with its own listener after a migration got `EAGAIN` from `accept`.
#[test]
fn without_rings_a_listener_that_was_taken_over_has_its_mode_back() {
    without("io_uring_setup", || {
        let ours = TcpListener::bind("127.0.0.1:0").unwrap();
        for blocking in [true, false] {
            ours.set_nonblocking(!blocking).unwrap();
            let mut listener = over(&ours);
            assert!(!is_blocking(&ours));
            take_one(&mut listener, TcpStream::connect(ours.local_addr().unwrap()).unwrap());
            drop(listener);
            assert_eq!(is_blocking(&ours), blocking);
        }
    });
}

/// The first of two migrations that share a listener put the mode back, and the other one could wait for a connection that a third
/// process had taken, in a call that neither a limit nor a stop ends. Then the second left the mode as it had found it: changed.
#[test]
fn without_rings_two_listeners_on_one_socket_never_wait_in_accept_and_the_last_puts_the_mode_back() {
    without("io_uring_setup", || {
        let ours = TcpListener::bind("127.0.0.1:0").unwrap();
        let (first, mut second) = (over(&ours), over(&ours));
        drop(first);
        assert!(!is_blocking(&ours), "the second still listens");
        // As another process does at the end of its listener.
        ioctl_fionbio(&ours, false).unwrap();
        assert!(second.try_accept().unwrap().is_none());
        let stopper = second.stopper().unwrap();
        stopper.stop();
        assert_eq!(second.accept(None).err().unwrap().kind(), io::ErrorKind::Interrupted);
        drop(second);
        assert!(is_blocking(&ours), "as before the first");
    });
}

/// A thread whose filter was made from an older list: the listener was made before, with a ring.
#[test]
fn a_ring_that_may_not_be_used_is_given_up_and_the_mode_comes_back() {
    if !has_rings() {
        return;
    }
    let ours = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut listener = over(&ours);
    without("io_uring_enter", || {
        assert!(listener.try_accept().unwrap().is_none());
        assert!(!is_blocking(&ours));
        take_one(&mut listener, TcpStream::connect(ours.local_addr().unwrap()).unwrap());
        drop(listener);
    });
    assert!(is_blocking(&ours));
}
