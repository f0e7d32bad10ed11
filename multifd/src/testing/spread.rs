//! Destinations that are far away, to which a few channels take pages at first.

use std::{
    sync::{Arc, Condvar, Mutex},
    thread,
    time::Duration,
};

use test_support::time_limit;

use crate::{
    clock::Clock,
    destination::{self, Destination},
    error::Error,
    ram::Ram,
    source::{self, Source},
    sync::atomic::{AtomicU64, Ordering::SeqCst},
    testing::{
        far::Far,
        memory,
        vm::{TestDestination, TestSource},
    },
};

const PAGES: u64 = 2000;
const CHANNELS: u8 = 8;

/// Migrates a guest that writes over eight channels to a destination that is `round_trip` away. Returns what each channel sent.
fn migrate(round_trip: Duration, options: source::Options, cancel: bool) -> (Result<(), Error>, Vec<u64>) {
    migrate_with(round_trip, options, cancel, || ())
}

/// The same, and each thread calls `at_pages` before it sends pages.
fn migrate_with(
    round_trip: Duration,
    options: source::Options,
    cancel: bool,
    at_pages: impl Fn() + Send + Sync + 'static,
) -> (Result<(), Error>, Vec<u64>) {
    let mut vm = TestSource::new(Ram::for_test(&[("ram", PAGES as usize)]));
    (0..PAGES).for_each(|page| assert!(vm.writer.write(page, page + 1)));
    let mut drains = 0;
    vm.at_drain = Box::new(move |writer| {
        drains += 1;
        (0..200 / drains).for_each(|page| _ = writer.write(page, page + 1000 * drains));
    });
    let (listener, inner) = memory::listener(20_000);
    let source = Source::new(options);
    let (progress, stop) = (source.progress(), source.stop_handle());
    // It is asked for by each channel when it is open, and behind round 0.
    let looks = AtomicU64::new(0);
    let look = Arc::new(move || {
        if cancel && looks.fetch_add(1, SeqCst) > u64::from(CHANNELS) + 1 {
            stop.cancel();
        }
        Ok(0u64)
    });
    let connector = Far::new(inner, move |_| {
        Some(Box::new({
            let look = look.clone();
            move || look()
        }) as _)
    })
    .away(round_trip)
    .at_pages(at_pages);
    let ram = Ram::for_test(&[("ram", PAGES as usize)]);
    let outcome = time_limit(Duration::from_secs(60), || {
        thread::scope(|scope| {
            let there = scope.spawn(|| {
                let mut to = TestDestination::new(ram.clone());
                Destination::new(destination::Options::default()).run(&mut to, Box::new(listener), &mut ()).map(drop)
            });
            let sent = source.run(&mut vm, &connector, &mut ());
            let received = there.join().unwrap();
            assert_eq!(sent.is_ok(), received.is_ok(), "{sent:?}, {received:?}");
            sent.map(drop)
        })
    });
    if outcome.is_ok() {
        let ours = vm.writer_ram();
        assert!((0..PAGES).all(|page| ram.page_bytes(page) == ours.page_bytes(page)));
    }
    (outcome, progress.channel_bytes(CHANNELS.into()))
}

fn options() -> source::Options {
    let mut options = source::Options::default();
    options.plan.channels = CHANNELS;
    options
}

/// A clock that moves on by `step` at each look.
fn counting(step: Duration) -> Clock {
    let looks = AtomicU64::new(0);
    Clock::from_fn(move || Duration::from_nanos(looks.fetch_add(1, SeqCst) * step.as_nanos() as u64))
}

/// What a channel sends that has no pages: its SYNCs are less than the four pages of the smallest packet.
fn is_idle(bytes: u64) -> bool {
    bytes < 4 * 4096
}

#[test]
fn a_few_channels_take_the_pages_of_a_destination_that_is_far_away() {
    // Round 0 is over before it is known whether more are faster.
    let far = source::Options { clock: counting(Duration::from_micros(1)), ..options() };
    let (outcome, bytes) = migrate(Duration::from_millis(20), far, false);
    outcome.unwrap();
    assert!(bytes[4..].iter().copied().all(is_idle), "{bytes:?}");
    assert!(bytes[..4].iter().sum::<u64>() > PAGES * 4096, "{bytes:?}");
}

/// Settling is over before the first packet of channel 0, and a measurement after its second: more are tried then. The first four leave
/// pages to them.
#[test]
fn more_channels_take_pages_where_round_0_takes_long() {
    let far = source::Options { clock: counting(Duration::from_millis(200)), ..options() };
    let others = Arc::new((Mutex::new(false), Condvar::new()));
    let packets = AtomicU64::new(0);
    let at_pages = move || {
        let name = thread::current().name().and_then(|name| name.strip_prefix("multifd-ch")?.parse::<u8>().ok());
        let channel = name.expect("a channel has its name");
        let (have_begun, begin) = &*others;
        let mut have_begun = have_begun.lock().unwrap();
        if channel >= 4 {
            *have_begun = true;
            begin.notify_all();
        } else if channel > 0 || packets.fetch_add(1, SeqCst) > 1 {
            // Long enough for any machine; then the test fails.
            drop(begin.wait_timeout_while(have_begun, Duration::from_secs(20), |have_begun| !*have_begun).unwrap());
        }
    };
    let (outcome, bytes) = migrate_with(Duration::from_millis(20), far, false, at_pages);
    outcome.unwrap();
    assert!(!bytes[4..].iter().copied().all(is_idle), "{bytes:?}");
}

#[test]
fn channels_may_have_their_turn_in_the_middle_of_round_0() {
    // More are tried after some packets, and found to be faster or not.
    let far = source::Options { clock: counting(Duration::from_millis(1)), ..options() };
    migrate(Duration::from_millis(1), far, false).0.unwrap();
}

#[test]
fn a_cancel_ends_the_wait_for_a_turn() {
    let (outcome, _) = migrate(Duration::from_millis(20), options(), true);
    assert!(matches!(outcome, Err(Error::Cancelled)), "{outcome:?}");
}
