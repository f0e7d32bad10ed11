//! Connections that take their time, or forever, to be established: what a handshake of TLS may do.

use std::{
    io,
    sync::{Arc, Barrier, Condvar, Mutex},
    time::Duration,
};

use test_support::time_limit;

use super::injected::{CHANNELS, Guest, small};
use crate::{
    destination::{Destination, Options},
    error::Error,
    ram::Ram,
    source::Source,
    testing::{
        faults::injected::BLOCKS,
        memory::{self, MemoryConnector, MemoryListener},
        vm::TestDestination,
    },
    transport::{Connect, Listen, Pending, Stopper, Stream, wrapped},
};

/// Establishes main at once, and a channel when all channels are about to be established.
struct Together {
    inner: MemoryConnector,
    dialed: Mutex<usize>,
    channels: Arc<Barrier>,
}

impl Connect for Together {
    fn dial(&self) -> io::Result<Box<dyn Pending>> {
        let number = {
            let mut dialed = self.dialed.lock().unwrap();
            *dialed += 1;
            *dialed
        };
        let channels = self.channels.clone();
        Ok(wrapped(self.inner.dial()?, move |stream| {
            if number > 1 {
                channels.wait();
            }
            Ok(stream)
        }))
    }
}

/// One after the other they took a round trip each, and a handshake.
#[test]
fn the_channels_of_a_source_are_established_at_the_same_time() {
    time_limit(Duration::from_secs(60), || {
        let (listener, inner) = memory::listener(1 << 15);
        let channels = Arc::new(Barrier::new(usize::from(CHANNELS)));
        let to = Together { inner, dialed: Mutex::new(0), channels };
        let mut guest = Guest::new();
        std::thread::scope(|scope| {
            let receiver = scope.spawn(|| {
                let mut vm = TestDestination::new(Ram::for_test(&BLOCKS));
                Destination::new(Options::default()).run(&mut vm, Box::new(listener), &mut ()).unwrap();
            });
            Source::new(small()).run(&mut guest.vm, &to, &mut ()).unwrap();
            receiver.join().unwrap();
        });
    });
}

/// Set by a stopper.
#[derive(Clone, Default)]
struct Told(Arc<(Mutex<bool>, Condvar)>);

impl Told {
    fn wait(&self) {
        let mut told = self.0.0.lock().unwrap();
        while !*told {
            told = self.0.1.wait(told).unwrap();
        }
    }
}

impl Stopper for Told {
    fn stop(&self) {
        *self.0.0.lock().unwrap() = true;
        self.0.1.notify_all();
    }
}

/// A handshake that nothing ends but a stop.
struct Endless {
    told: Told,
}

impl Pending for Endless {
    fn establish(self: Box<Self>, _limit: Option<Duration>) -> io::Result<Box<dyn Stream>> {
        self.told.wait();
        Err(io::ErrorKind::ConnectionAborted.into())
    }

    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        Ok(Box::new(self.told.clone()))
    }

    fn peer(&self) -> String {
        "one that shakes hands".to_owned()
    }
}

/// Accepts `endless` connections that are never established, and then those of `inner`.
struct Crowded {
    endless: Vec<Endless>,
    inner: MemoryListener,
}

impl Listen for Crowded {
    fn accept(&mut self, timeout: Option<Duration>) -> io::Result<Box<dyn Pending>> {
        match self.endless.pop() {
            Some(endless) => Ok(Box::new(endless)),
            None => self.inner.accept(timeout),
        }
    }

    fn try_accept(&mut self) -> io::Result<Option<Box<dyn Pending>>> {
        self.inner.try_accept()
    }

    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        self.inner.stopper()
    }
}

fn crowd(connections: usize) -> (Crowded, MemoryConnector) {
    let (inner, connector) = memory::listener(1 << 15);
    (Crowded { endless: (0..connections).map(|_| Endless { told: Told::default() }).collect(), inner }, connector)
}

/// More of them than there may be silent connections: the oldest make room, also while they shake hands.
#[test]
fn connections_that_are_never_established_hold_up_no_other() {
    time_limit(Duration::from_secs(60), || {
        let (listener, connector) = crowd(100);
        let mut guest = Guest::new();
        std::thread::scope(|scope| {
            let receiver = scope.spawn(|| {
                let mut vm = TestDestination::new(Ram::for_test(&BLOCKS));
                let options = Options { setup_timeout: None, ..Options::default() };
                Destination::new(options).run(&mut vm, Box::new(listener), &mut ()).unwrap();
            });
            Source::new(small()).run(&mut guest.vm, &connector, &mut ()).unwrap();
            receiver.join().unwrap();
        });
    });
}

#[test]
fn a_cancel_ends_connections_that_are_not_established() {
    time_limit(Duration::from_secs(60), || {
        let (listener, _connector) = crowd(3);
        let destination = Destination::new(Options { setup_timeout: None, ..Options::default() });
        let stop = destination.stop_handle();
        std::thread::scope(|scope| {
            let receiver = scope.spawn(|| {
                let mut vm = TestDestination::new(Ram::for_test(&BLOCKS));
                destination.run(&mut vm, Box::new(listener), &mut ()).unwrap_err()
            });
            std::thread::sleep(Duration::from_millis(50));
            stop.cancel();
            assert!(matches!(receiver.join().unwrap(), Error::Cancelled));
        });
    });
}

/// A destination that does not accept: with all that wait before it the connect of a unix socket waits, too.
#[test]
fn a_cancel_ends_a_source_that_is_not_connected() {
    struct Nowhere(Told);

    impl Connect for Nowhere {
        fn dial(&self) -> io::Result<Box<dyn Pending>> {
            Ok(Box::new(Endless { told: self.0.clone() }))
        }
    }

    time_limit(Duration::from_secs(60), || {
        let mut guest = Guest::new();
        let source = Source::new(small());
        let stop = source.stop_handle();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                std::thread::sleep(Duration::from_millis(50));
                stop.cancel();
            });
            let error = source.run(&mut guest.vm, &Nowhere(Told::default()), &mut ()).unwrap_err();
            assert!(matches!(error, Error::Cancelled), "{error}");
        });
        assert!(guest.vm.writer.is_running());
    });
}

/// The same with a real listener whose queue is full.
#[test]
fn a_connect_to_a_full_queue_ends_when_it_is_stopped_or_its_time_is_over() {
    time_limit(Duration::from_secs(60), || {
        let directory = test_support::TempDir::new().unwrap();
        let path = directory.join("s");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let connector = crate::transport::unix::UnixConnector::new(&path);
        let _first = connector.connect().unwrap();
        let limited = connector.dial().unwrap().establish(Some(Duration::from_millis(100)));
        assert_eq!(limited.err().map(|error| error.kind()), Some(io::ErrorKind::TimedOut));
        let pending = connector.dial().unwrap();
        let stopper = pending.stopper().unwrap();
        let waiting = std::thread::spawn(move || pending.establish(None).err().map(|error| error.kind()));
        std::thread::sleep(Duration::from_millis(20));
        stopper.stop();
        assert_eq!(waiting.join().unwrap(), Some(io::ErrorKind::ConnectionAborted));

        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let address = listener.local_addr().unwrap();
        let connector = crate::transport::tcp::TcpConnector::new(address.ip().to_string(), address.port());
        let limit = Some(Duration::from_millis(200));
        let outcomes: Vec<_> = (0..8).map(|_| connector.dial().unwrap().establish(limit)).collect();
        let kind = outcomes.last().unwrap().as_ref().err().map(io::Error::kind);
        assert_eq!(kind, Some(io::ErrorKind::TimedOut), "the queue is never full");
        let pending = connector.dial().unwrap();
        let stopper = pending.stopper().unwrap();
        let waiting = std::thread::spawn(move || pending.establish(None).err().map(|error| error.kind()));
        std::thread::sleep(Duration::from_millis(20));
        stopper.stop();
        assert_eq!(waiting.join().unwrap(), Some(io::ErrorKind::ConnectionAborted));
    });
}
