//! When a channel's connection closes because its thread failed: after the error is known as the reason of the end.
//!
//! The other side may see the closed connection at once, end main because of it, and main's thread would then be the first
//! to report anything.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use test_support::time_limit;

use crate::{
    destination::{self, Destination},
    error::Error,
    ram::{GuestRange, Ram},
    source::Source,
    stop::StopHandle,
    testing::memory,
    testing::vm::{TestDestination, TestSource},
    threads::{
        Threads,
        test_doubles::{FailsAt, LosesAt},
    },
    transport::{Connect, Listen, Pending, RecvHalf, SendHalf, Stopper, Stream, wrapped},
};

/// How the first transfer of pages on a channel fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Failure {
    Error,
    Panic,
    /// None of its own: its thread cannot be made.
    NoThread,
}

/// Closed connections of failed channels: after the migration was stopped, and before.
#[derive(Clone, Default)]
struct Closed {
    after: Arc<AtomicUsize>,
    before: Arc<AtomicUsize>,
}

impl Closed {
    #[track_caller]
    fn assert_order(&self, failure: Failure) {
        assert!(self.after.load(Relaxed) > 0, "{failure:?}: no channel has failed");
        assert_eq!(self.before.load(Relaxed), 0, "{failure:?}: a connection closed before its error was known");
    }
}

/// A connection on which pages fail to move.
struct Breaking {
    /// Nothing before it is established, and once it was split.
    stream: Option<Box<dyn Stream>>,
    plan: Plan,
    failed: bool,
}

#[derive(Clone)]
struct Plan {
    failure: Failure,
    stop: StopHandle,
    closed: Closed,
}

impl Plan {
    fn pending(&self, pending: Box<dyn Pending>) -> Box<dyn Pending> {
        let failed = self.failure == Failure::NoThread;
        let mut breaking = Breaking { stream: None, plan: self.clone(), failed };
        wrapped(pending, move |stream| {
            breaking.stream = Some(stream);
            Ok(Box::new(breaking))
        })
    }
}

impl Breaking {
    fn stream(&mut self) -> io::Result<&mut dyn Stream> {
        Ok(&mut **self.stream.as_mut().ok_or(io::ErrorKind::NotConnected)?)
    }

    fn fail(&mut self) -> io::Error {
        self.failed = true;
        match self.plan.failure {
            Failure::Error => io::ErrorKind::StorageFull.into(),
            Failure::Panic => panic!("a planned defect"),
            Failure::NoThread => unreachable!("nothing moves without a thread"),
        }
    }
}

impl SendHalf for Breaking {
    fn write(&mut self, header: &[u8], pages: &[GuestRange<'_>]) -> io::Result<()> {
        if pages.is_empty() { self.stream()?.write(header, pages) } else { Err(self.fail()) }
    }

    fn finish(&mut self) -> io::Result<()> {
        self.stream()?.finish()
    }
}

impl RecvHalf for Breaking {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        // Pages that the kernel is to put into place are read into a buffer before; headers are shorter.
        if buf.len() >= PAGE { Err(self.fail()) } else { self.stream()?.read(buf) }
    }

    fn read_pages(&mut self, _pages: &[GuestRange<'_>]) -> io::Result<()> {
        Err(self.fail())
    }

    fn interrupter(&mut self) -> io::Result<Box<dyn Stopper>> {
        self.stream()?.interrupter()
    }
}

impl Stream for Breaking {
    /// Main never fails.
    fn split(mut self: Box<Self>) -> io::Result<(Box<dyn SendHalf>, Box<dyn RecvHalf>)> {
        self.failed = false;
        self.stream.take().ok_or(io::ErrorKind::NotConnected)?.split()
    }

    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        self.stream.as_ref().ok_or(io::ErrorKind::NotConnected)?.stopper()
    }

    fn peer(&self) -> String {
        "breaking".to_owned()
    }
}

impl Drop for Breaking {
    fn drop(&mut self) {
        if self.failed {
            let closed = &self.plan.closed;
            let count = if self.plan.stop.is_stopped() { &closed.after } else { &closed.before };
            count.fetch_add(1, Relaxed);
        }
    }
}

struct BreakingListener(memory::MemoryListener, Plan);

impl Listen for BreakingListener {
    fn accept(&mut self, timeout: Option<Duration>) -> io::Result<Box<dyn Pending>> {
        Ok(self.1.pending(self.0.accept(timeout)?))
    }

    fn try_accept(&mut self) -> io::Result<Option<Box<dyn Pending>>> {
        Ok(self.0.try_accept()?.map(|pending| self.1.pending(pending)))
    }

    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        self.0.stopper()
    }
}

struct BreakingConnector(memory::MemoryConnector, Plan);

impl Connect for BreakingConnector {
    fn dial(&self) -> io::Result<Box<dyn Pending>> {
        Ok(self.1.pending(self.0.dial()?))
    }
}

const PAGE: usize = 4096;

fn ram() -> Ram {
    let ram = Ram::for_test(&[("ram", 300)]);
    for page in 0..300 {
        ram.page(page).unwrap().write(&(page + 1).to_ne_bytes().repeat(PAGE / 8));
    }
    ram
}

#[track_caller]
fn assert_reason(failure: Failure, error: &Error) {
    match (failure, error) {
        (Failure::Error, Error::Io { source, .. }) if source.kind() == io::ErrorKind::StorageFull => {}
        (Failure::Panic, Error::Panicked { .. }) => {}
        (Failure::NoThread, Error::Thread { .. }) => {}
        _ => panic!("{failure:?} is reported as: {error}"),
    }
}

#[test]
fn a_receiving_channel_closes_after_its_error_is_known() {
    for failure in [Failure::Error, Failure::Panic] {
        time_limit(Duration::from_secs(60), move || {
            let (listener, connector) = memory::listener(1 << 20);
            let destination = Destination::new(Default::default());
            let plan = Plan { failure, stop: destination.stop_handle(), closed: Closed::default() };
            let source = std::thread::spawn(move || {
                Source::new(Default::default()).run(&mut TestSource::new(ram()), &connector, &mut ())
            });
            let mut vm = TestDestination::new(Ram::for_test(&[("ram", 300)]));
            let from = Box::new(BreakingListener(listener, plan.clone()));
            assert_reason(failure, &destination.run(&mut vm, from, &mut ()).unwrap_err());
            source.join().unwrap().unwrap_err();
            plan.closed.assert_order(failure);
        });
    }
}

#[test]
fn a_sending_channel_closes_after_its_error_is_known() {
    for failure in [Failure::Error, Failure::Panic] {
        time_limit(Duration::from_secs(60), move || {
            let (listener, connector) = memory::listener(1 << 20);
            let source = Source::new(Default::default());
            let plan = Plan { failure, stop: source.stop_handle(), closed: Closed::default() };
            let destination = std::thread::spawn(move || {
                let mut vm = TestDestination::new(Ram::for_test(&[("ram", 300)]));
                Destination::new(Default::default()).run(&mut vm, Box::new(listener), &mut ())
            });
            let to = BreakingConnector(connector, plan.clone());
            assert_reason(failure, &source.run(&mut TestSource::new(ram()), &to, &mut ()).unwrap_err());
            destination.join().unwrap().unwrap_err();
            plan.closed.assert_order(failure);
        });
    }
}

/// The watchdog and one more thread come before the first that has a connection.
const WITH_A_CONNECTION: std::ops::Range<usize> = 2..4;

fn threads(index: usize, loses: bool) -> crate::sync::Arc<dyn Threads> {
    let spawned = AtomicUsize::new(0);
    match loses {
        true => crate::sync::Arc::new(LosesAt { index, spawned }),
        false => crate::sync::Arc::new(FailsAt { index, spawned }),
    }
}

/// The source saw its connection close, ended main, and the destination reported that.
#[test]
fn a_received_connection_without_a_thread_closes_after_that_is_known() {
    for (index, loses) in WITH_A_CONNECTION.flat_map(|index| [(index, false), (index, true)]) {
        time_limit(Duration::from_secs(60), move || {
            let (listener, connector) = memory::listener(1 << 20);
            let receiving = destination::Options { threads: threads(index, loses), ..Default::default() };
            let destination = Destination::new(receiving);
            let plan = Plan { failure: Failure::NoThread, stop: destination.stop_handle(), closed: Closed::default() };
            let source = std::thread::spawn(move || {
                Source::new(Default::default()).run(&mut TestSource::new(ram()), &connector, &mut ())
            });
            let mut vm = TestDestination::new(Ram::for_test(&[("ram", 300)]));
            let from = Box::new(BreakingListener(listener, plan.clone()));
            assert_reason(Failure::NoThread, &destination.run(&mut vm, from, &mut ()).unwrap_err());
            source.join().unwrap().unwrap_err();
            plan.closed.assert_order(Failure::NoThread);
        });
    }
}

#[test]
fn a_channel_to_be_sent_on_without_a_thread_closes_after_that_is_known() {
    for (index, loses) in WITH_A_CONNECTION.flat_map(|index| [(index, false), (index, true)]) {
        time_limit(Duration::from_secs(60), move || {
            let (listener, connector) = memory::listener(1 << 20);
            let options = crate::source::Options { threads: threads(index, loses), ..Default::default() };
            let source = Source::new(options);
            let plan = Plan { failure: Failure::NoThread, stop: source.stop_handle(), closed: Closed::default() };
            let destination = std::thread::spawn(move || {
                let mut vm = TestDestination::new(Ram::for_test(&[("ram", 300)]));
                Destination::new(Default::default()).run(&mut vm, Box::new(listener), &mut ())
            });
            let to = BreakingConnector(connector, plan.clone());
            assert_reason(Failure::NoThread, &source.run(&mut TestSource::new(ram()), &to, &mut ()).unwrap_err());
            destination.join().unwrap().unwrap_err();
            plan.closed.assert_order(Failure::NoThread);
        });
    }
}
