//! A channel that only the destination's process has lost, while the source has nothing to send on it.

use std::{
    io,
    sync::{Arc, Condvar, Mutex},
    time::Duration,
};

use test_support::time_limit;

use crate::{
    destination::{self, Destination},
    error::{Connection, Error, Place},
    ram::{GuestRange, Ram},
    source::{self, Source},
    testing::vm::{TestDestination, TestSource},
    transport::{
        Listen, Pending, RecvHalf, SendHalf, Stopper, Stream, socket::SocketListener, tcp::TcpConnector, uri::Uri,
        wrapped,
    },
};

/// Opened when main is about to wait.
type Gate = Arc<(Mutex<bool>, Condvar)>;

/// Loses the connection that comes behind main, once it has its hello and the gate is open.
struct Losing {
    inner: SocketListener,
    gate: Gate,
    accepted: usize,
}

struct LosingStream {
    /// None once it is lost.
    inner: Option<Box<dyn Stream>>,
    gate: Gate,
    /// Bytes of the hello that are to come.
    hello: usize,
}

impl Losing {
    fn take(&mut self, pending: Box<dyn Pending>) -> Box<dyn Pending> {
        self.accepted += 1;
        if self.accepted != 2 {
            return pending;
        }
        let gate = self.gate.clone();
        wrapped(pending, |inner| Ok(Box::new(LosingStream { inner: Some(inner), gate, hello: 64 })))
    }
}

impl Listen for Losing {
    fn accept(&mut self, timeout: Option<Duration>) -> io::Result<Box<dyn Pending>> {
        let pending = self.inner.accept(timeout)?;
        Ok(self.take(pending))
    }

    fn try_accept(&mut self) -> io::Result<Option<Box<dyn Pending>>> {
        let pending = self.inner.try_accept()?;
        Ok(pending.map(|pending| self.take(pending)))
    }

    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        self.inner.stopper()
    }
}

impl LosingStream {
    fn inner(&mut self) -> io::Result<&mut dyn Stream> {
        Ok(&mut **self.inner.as_mut().ok_or(io::ErrorKind::NotConnected)?)
    }
}

impl RecvHalf for LosingStream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.hello == 0 {
            let (is_open, opened) = &*self.gate;
            drop(opened.wait_while(is_open.lock().unwrap(), |is_open| !*is_open).unwrap());
            self.inner()?.discard()?;
            self.inner = None;
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        let most = buf.len().min(self.hello);
        let n = self.inner()?.read(&mut buf[..most])?;
        self.hello -= n;
        Ok(n)
    }

    fn read_pages(&mut self, _: &[GuestRange<'_>]) -> io::Result<()> {
        unreachable!("it is lost before")
    }

    fn interrupter(&mut self) -> io::Result<Box<dyn Stopper>> {
        self.inner()?.interrupter()
    }
}

impl SendHalf for LosingStream {
    fn write(&mut self, header: &[u8], pages: &[GuestRange<'_>]) -> io::Result<()> {
        self.inner()?.write(header, pages)
    }

    fn finish(&mut self) -> io::Result<()> {
        self.inner()?.finish()
    }
}

impl Stream for LosingStream {
    fn split(self: Box<Self>) -> io::Result<(Box<dyn SendHalf>, Box<dyn RecvHalf>)> {
        self.inner.ok_or(io::ErrorKind::NotConnected)?.split()
    }

    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        self.inner.as_ref().ok_or(io::ErrorKind::NotConnected)?.stopper()
    }

    fn peer(&self) -> String {
        "a channel that is lost".to_owned()
    }
}

/// The destination waited for another channel and the source for PONG, until a limit ended it. Here are none.
#[test]
fn a_channel_that_is_lost_while_the_source_waits_for_pong_ends_the_migration() {
    time_limit(Duration::from_secs(60), || {
        let socket = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let address = socket.local_addr().unwrap();
        let gate = Gate::default();
        let inner = SocketListener::new(socket.into(), Uri::from(address)).unwrap();
        let listener = Losing { inner, gate: gate.clone(), accepted: 0 };
        let receiving =
            destination::Options { setup_timeout: None, stall_limit: None, ..destination::Options::default() };

        let mut vm = TestSource::new(Ram::for_test(&[("ram", 4)]));
        vm.at_live = Some(Box::new(move |out| {
            out.section("live", 0, 1, b"state")?;
            // All channels have ended the round.
            *gate.0.lock().unwrap() = true;
            gate.1.notify_all();
            Ok(0)
        }));
        let mut options = source::Options::default();
        options.plan.channels = 1;
        options.parameters.stall_limit = None;
        let connector = TcpConnector::new("127.0.0.1", address.port());

        let (sent, received) = std::thread::scope(|scope| {
            let mut to = TestDestination::new(Ram::for_test(&[("ram", 4)]));
            let receives =
                scope.spawn(move || Destination::new(receiving).run(&mut to, Box::new(listener), &mut ()).err());
            let sent = Source::new(options).run(&mut vm, &connector, &mut ()).unwrap_err();
            (sent, receives.join().unwrap())
        });
        let Error::Io { at: Place { connection, offset }, source } = &sent else { panic!("{sent}") };
        // Behind the SYNCs of the set-up and of the first round.
        assert!(matches!(connection, Connection::Channel(_)) && *offset > 64, "{sent}");
        assert_eq!(source.kind(), io::ErrorKind::ConnectionReset, "{sent}");
        assert!(vm.writer.is_running());
        assert!(received.is_some());
    });
}
