//! The negative control: a destination that does not keep the rounds apart is caught by the guest's own check.
//!
//! One channel of the destination is slow. A page that it still has to read, of an earlier round, has been written and
//! sent again on another channel in the meantime; without the barrier the older content lands last. The same set-up
//! with the barrier finds nothing, so it is the missing barrier that is found.

use std::{
    io, thread,
    time::{Duration, Instant},
};

use multifd::{
    destination::{self, Destination},
    ram::GuestRange,
    source::{self, Source},
    testing::{broken::Broken, memory},
    transport::{Listen, Pending, RecvHalf, SendHalf, Stopper, Stream, wrapped},
};
use multifd_guest::{
    guest::{Guest, GuestConfig, Kind},
    log::DirtyLogChoice,
    pace::Rate,
};
use test_support::time_limit;

const LIMIT: Duration = Duration::from_secs(300);

/// Accepts connections of which every second one is slow.
struct SlowListener {
    inner: Box<dyn Listen>,
    accepted: usize,
}

impl SlowListener {
    fn slow(&mut self, pending: Box<dyn Pending>) -> Box<dyn Pending> {
        self.accepted += 1;
        // The first is main, which is as fast as it can: it must not be what holds the rounds apart.
        match self.accepted.is_multiple_of(2) {
            true => wrapped(pending, |inner| Ok(Box::new(SlowStream { inner }))),
            false => pending,
        }
    }
}

impl Listen for SlowListener {
    fn accept(&mut self, timeout: Option<Duration>) -> io::Result<Box<dyn Pending>> {
        let pending = self.inner.accept(timeout)?;
        Ok(self.slow(pending))
    }

    fn try_accept(&mut self) -> io::Result<Option<Box<dyn Pending>>> {
        let pending = self.inner.try_accept()?;
        Ok(pending.map(|pending| self.slow(pending)))
    }

    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        self.inner.stopper()
    }
}

/// Waits before it reads the pages of a packet.
struct SlowStream {
    inner: Box<dyn Stream>,
}

impl SendHalf for SlowStream {
    fn write(&mut self, header: &[u8], pages: &[GuestRange<'_>]) -> io::Result<()> {
        self.inner.write(header, pages)
    }

    fn finish(&mut self) -> io::Result<()> {
        self.inner.finish()
    }
}

impl RecvHalf for SlowStream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.inner.read(buf)
    }

    fn read_pages(&mut self, pages: &[GuestRange<'_>]) -> io::Result<()> {
        thread::sleep(DELAY);
        self.inner.read_pages(pages)
    }

    fn interrupter(&mut self) -> io::Result<Box<dyn Stopper>> {
        self.inner.interrupter()
    }
}

impl Stream for SlowStream {
    fn split(self: Box<Self>) -> io::Result<(Box<dyn SendHalf>, Box<dyn RecvHalf>)> {
        self.inner.split()
    }

    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        self.inner.stopper()
    }

    fn peer(&self) -> String {
        self.inner.peer()
    }
}

/// What was found wrong after one migration.
#[derive(Debug, Default)]
struct Found {
    /// Pages, by comparing digests while the guest stood still.
    pages_different: u64,
    /// By the guest itself, in its memory and its report.
    guest_errors: u64,
    /// By the destination's audit.
    stale_writes: u64,
}

fn migrate(broken: Option<Broken>) -> Found {
    let config = GuestConfig {
        kind: Kind::Process,
        dirty_log: DirtyLogChoice::Bitmap,
        // All of it is written between two rounds, so every round sends the same pages.
        memory: 8 << 20,
        working_set: 8 << 20,
        write_rate: Rate::Max,
        ..GuestConfig::default()
    };
    let (listener, connector) = memory::listener(CAPACITY);
    let listener = SlowListener { inner: Box::new(listener), accepted: 0 };
    let mut guest = Guest::create(&config).unwrap();
    let mut arrived = Guest::create_incoming(&config).unwrap();
    let mut options = destination::Options::default();
    options.audit = true;
    if let Some(broken) = broken {
        broken.at_destination(&mut options);
    }
    let destination = Destination::new(options);
    guest.run();
    assert!(guest.wait_passes(1, LIMIT));
    let report = thread::scope(|scope| {
        let into = &mut arrived;
        let receiving = scope.spawn(move || destination.run(into, Box::new(listener), &mut ()));
        Source::new(source::Options::default()).run(&mut guest, &connector, &mut ()).unwrap();
        receiving.join().unwrap().unwrap()
    });
    assert!(arrived.wait_passes(2, LIMIT));
    let pages_different = arrived.verified().unwrap().pages_different;
    let stale_writes = report.audit.unwrap().stale_writes;
    Found { pages_different, guest_errors: arrived.status().guest_errors(), stale_writes }
}

#[test]
fn a_destination_without_its_barrier_is_caught_by_the_guest() {
    time_limit(LIMIT, || {
        let begun = Instant::now();
        for attempt in 1..=ATTEMPTS {
            let found = migrate(Some(Broken::NoBarrier));
            assert_eq!(found.pages_different == 0, found.guest_errors == 0, "{found:?}");
            if found.guest_errors > 0 {
                assert!(found.stale_writes > 0, "the audit is silent about what the guest found: {found:?}");
                eprintln!("caught at attempt {attempt} after {:?}: {found:?}", begun.elapsed());
                return;
            }
        }
        panic!("{ATTEMPTS} migrations without the barrier, and nothing was found wrong");
    });
}

#[test]
fn the_same_destination_with_its_barrier_is_right() {
    time_limit(LIMIT, || {
        for _ in 0..3 {
            let found = migrate(None);
            assert_eq!((found.pages_different, found.guest_errors, found.stale_writes), (0, 0, 0));
        }
    });
}

/// How long a slow channel waits. Sending the next round takes less.
const DELAY: Duration = Duration::from_millis(3);
/// More than a whole migration, so that the source never waits for a slow channel.
const CAPACITY: usize = 64 << 20;
/// It took 1 to 4.
const ATTEMPTS: u32 = 50;
