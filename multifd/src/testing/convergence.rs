//! Guests that write many times as fast as the link: whole migrations in the time of the link, which moves on with each byte that is
//! sent and with nothing else.
//!
//! Main carries the pages, so one thread does everything, and each run is the same whatever the machine does meanwhile.

use std::{sync::OnceLock, time::Duration};

use test_support::time_limit;

use crate::{
    clock::Clock,
    destination::{self, Destination},
    error::Error,
    progress::{Progress, RoundStats},
    ram::Ram,
    source::{self, Limits, Source},
    sync::{Arc, Mutex, lock},
    testing::{
        memory,
        vm::{TestDestination, TestSource, Writer},
    },
};

/// The memory of the guest, which takes the link 2.6 s, as 1 GiB does at 0.4 GB/s.
const PAGES: u64 = 4096;
const LINK: f64 = PAGES as f64 * 4096.0 / 2.6;

/// A guest that writes ten times as fast as the link, 90 % of it to 2 % of its memory and the rest anywhere.
struct Guest {
    clock: Clock,
    written: u64,
    random: u64,
}

impl Guest {
    /// Writes all that is due by now, and says where.
    fn write(&mut self, writer: &Writer, mut at: impl FnMut(u64)) {
        let due = (self.clock.now().as_secs_f64() * 10.0 * LINK / 4096.0) as u64;
        while self.written < due {
            self.written += 1;
            let is_hot = self.random() % 10 < 9;
            // In the middle, where the order of pages favours none.
            let page = if is_hot { PAGES / 2 + self.random() % (PAGES / 50) } else { self.random() % PAGES };
            assert!(writer.write(page, PAGES + self.written));
            at(page);
        }
    }

    /// xorshift64: the same in each run.
    fn random(&mut self) -> u64 {
        for (left, shift) in [(true, 13), (false, 7), (true, 17)] {
            self.random ^= if left { self.random << shift } else { self.random >> shift };
        }
        self.random >> 11
    }
}

/// Migrates such a guest, whose log can be looked into or not.
fn migrate(peeks: bool) -> Result<source::Report, Error> {
    let progress: Arc<OnceLock<Progress>> = Arc::default();
    let clock = Clock::from_fn({
        let progress = progress.clone();
        move || Duration::from_secs_f64(progress.get().map_or(0, |progress| progress.snapshot().bytes()) as f64 / LINK)
    });
    let mut options = source::Options::default();
    options.plan.channels = 0;
    options.clock = clock.clone();
    options.peek_every = Duration::ZERO;
    options.parameters.limits = Limits { throttle: false, rounds: Some(ROUNDS), ..Limits::default() };
    let source = Source::new(options);
    progress.set(source.progress()).unwrap_or_else(|_| panic!("set once"));

    let ram = Ram::for_test(&[("ram", PAGES as usize)]);
    (0..PAGES).for_each(|page| ram.page(page).unwrap().write(&(page + 1).to_ne_bytes().repeat(512)));
    let mut vm = TestSource::new(ram);
    let guest = Arc::new(Mutex::new(Guest { clock, written: 0, random: 0x9e37_79b9_7f4a_7c15 }));
    let (at_drain, at_peek) = (guest.clone(), guest);
    vm.at_drain = Box::new(move |writer| {
        if writer.is_running() {
            lock(&at_drain).write(writer, |_| {});
        }
    });
    if peeks {
        vm.at_peek = Some(Box::new(move |writer, into| {
            lock(&at_peek).write(writer, |page| into.set(page));
            Ok(())
        }));
    }
    let (listener, connector) = memory::listener(1 << 20);
    let mut to = TestDestination::new(Ram::for_test(&[("ram", PAGES as usize)]));
    let sent = std::thread::scope(|scope| {
        let destination =
            scope.spawn(|| Destination::new(destination::Options::default()).run(&mut to, Box::new(listener), &mut ()));
        let sent = source.run(&mut vm, &connector, &mut ());
        (sent, destination.join().unwrap().is_ok())
    });
    let ours = vm.writer_ram();
    let same = || (0..PAGES).all(|page| to.ram.page_bytes(page) == ours.page_bytes(page));
    assert_eq!(sent.0.is_ok(), sent.1);
    assert!(sent.0.is_err() || same(), "a page is not as it was written");
    sent.0
}

/// The pages that it writes all the time are sent once, in the pause; the rest of each round becomes shorter by what is written again
/// meanwhile, round by round, until it fits.
#[test]
fn a_guest_that_mostly_writes_a_small_part_ten_times_as_fast_as_the_link_is_migrated() {
    let sent = time_limit(LIMIT, || migrate(true)).unwrap();
    // Eleven rounds, three times its memory less a half, and 6.4 s of the link were seen.
    assert!(sent.rounds_total <= 14 && sent.normal < 3 * PAGES, "{:?}", sent.rounds);
    let took: Duration = sent.rounds.iter().map(|round| round.took).sum();
    assert!(took < Duration::from_secs(8), "{took:?}");
    let shrink = |rounds: &[RoundStats]| rounds.windows(2).all(|two| two[1].dirty_pages < two[0].dirty_pages);
    assert!(shrink(&sent.rounds), "each round is shorter: {:?}", sent.rounds);
    let [running @ .., paused] = &sent.rounds[..] else { panic!("no round") };
    assert!(running.iter().all(|round| round.guest_running && round.postponed > 0), "{running:?}");
    assert!(!paused.guest_running && paused.postponed == 0, "in the pause no page waits: {paused:?}");
    assert!(paused.took <= Duration::from_millis(300), "the pause is as long as it may be: {paused:?}");
}

/// The other side of it: what the test above shows is due to the looks into the log.
#[test]
fn the_same_guest_is_given_up_where_its_log_cannot_be_looked_into() {
    let error = time_limit(LIMIT, || migrate(false)).unwrap_err();
    assert!(matches!(error, Error::DoesNotConverge { rounds: ROUNDS, .. }), "{error}");
}

/// More than three times as many as are needed.
const ROUNDS: u64 = 40;
const LIMIT: Duration = Duration::from_secs(120);
