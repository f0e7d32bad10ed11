//! What the connections hold when a round is over: a source that can tell lets it out before it pauses its guest.

use std::{
    sync::atomic::{AtomicU64, Ordering::SeqCst},
    time::Duration,
};

use crate::source::Limits;
use test_support::time_limit;

use crate::{
    clock::Clock,
    destination::{self, Destination},
    error::Error,
    ram::Ram,
    source::{self, Source},
    sync::{Arc, lock},
    testing::{
        far::Far,
        memory,
        vm::{Calls, TestDestination, TestSource},
    },
};

/// Says how much is on its way on main, at each look.
type Look = Arc<dyn Fn() -> u64 + Send + Sync>;

fn filled() -> Ram {
    let ram = Ram::for_test(&[("ram", 700)]);
    (0..700).for_each(|page| ram.page(page).unwrap().write(&(page + 1).to_ne_bytes().repeat(512)));
    ram
}

/// Migrates `vm` over connections that hold what `look` says. Returns how it went, and whether the destination has the same memory.
fn migrate(vm: &mut TestSource, source: Source, look: Look) -> (Result<source::Report, Error>, bool) {
    migrate_over(vm, source, look, None)
}

/// The same, over a path that was seen to carry so much.
fn migrate_over(
    vm: &mut TestSource,
    source: Source,
    look: Look,
    carries: Option<u64>,
) -> (Result<source::Report, Error>, bool) {
    let (listener, inner) = memory::listener(100_000);
    let connector = Far::new(inner, move |dialed| {
        let look = look.clone();
        (dialed == 0).then(|| Box::new(move || Ok(look())) as _)
    });
    let connector = connector.carrying(carries);
    time_limit(Duration::from_secs(60), || {
        std::thread::scope(|scope| {
            let destination = scope.spawn(|| {
                let mut to = TestDestination::new(Ram::for_test(&[("ram", 700)]));
                let received =
                    Destination::new(destination::Options::default()).run(&mut to, Box::new(listener), &mut ());
                received.map(|_| to.ram).ok()
            });
            let sent = source.run(vm, &connector, &mut ());
            let there = destination.join().unwrap();
            let ours = vm.writer_ram();
            let same = |ram: Ram| (0..700).all(|page| ram.page_bytes(page) == ours.page_bytes(page));
            (sent, there.is_some_and(same))
        })
    })
}

fn is_paused(calls: &Calls) -> bool {
    lock(calls).contains(&"pause")
}

const MEGABYTE: u64 = 1 << 20;

/// The pause was as long as it took to send what lay in socket buffers when it began.
#[test]
fn the_guest_is_not_paused_before_the_connections_hold_little() {
    let mut vm = TestSource::new(filled());
    // A page is written before each drain, also before the one after the wait.
    let mut written = 0;
    vm.at_drain = Box::new(move |writer| {
        written += 1;
        writer.write(written, 7000 + written);
    });
    let (calls, looks) = (vm.calls.clone(), Arc::new(AtomicU64::new(0)));
    let look: Look = Arc::new({
        let (calls, looks) = (calls.clone(), looks.clone());
        move || {
            let before = looks.fetch_add(1, SeqCst);
            let held = (10 * MEGABYTE).saturating_sub(before * MEGABYTE);
            assert!(held == 0 || !is_paused(&calls), "paused with {held} bytes on their way");
            held
        }
    });
    let (sent, same) = migrate(&mut vm, Source::new(source::Options::default()), look);
    let sent = sent.unwrap();
    assert!(same && looks.load(SeqCst) >= 10);
    assert_eq!(sent.rounds.len(), 2);
    let drains = lock(&calls).iter().filter(|call| **call == "drain").count();
    assert_eq!(drains, 3, "after the round, after the wait, and in the pause");
    assert_eq!(sent.rounds[0].dirty_after, 2, "what was written until the wait was over counts");
}

#[test]
fn a_cancel_and_the_limit_of_time_end_the_wait() {
    let forever: Look = Arc::new(|| u64::MAX / 4);
    let source = Source::new(source::Options::default());
    let stop = source.stop_handle();
    let cancels: Look = Arc::new({
        let looks = AtomicU64::new(0);
        move || {
            if looks.fetch_add(1, SeqCst) == 5 {
                stop.cancel();
            }
            u64::MAX / 4
        }
    });
    let mut vm = TestSource::new(filled());
    let (sent, _) = migrate(&mut vm, source, cancels);
    assert!(matches!(sent, Err(Error::Cancelled)) && !is_paused(&vm.calls), "{sent:?}");

    let mut options = source::Options::default();
    options.parameters.limits.time = Some(Duration::from_millis(50));
    let mut vm = TestSource::new(filled());
    let (sent, _) = migrate(&mut vm, Source::new(options), forever);
    assert!(matches!(sent, Err(Error::DoesNotConverge { .. })) && !is_paused(&vm.calls), "{sent:?}");
}

/// What a busy guest writes during the wait may be more than what the wait has gained. It would never come to an end.
#[test]
fn a_wait_that_was_in_vain_is_not_waited_for_to_the_end_again() {
    let mut options = source::Options::default();
    options.parameters.limits = Limits { throttle: false, ..Limits::default() };
    // Each look at the clock takes 50 ms: the 2.8 MB of a round take seconds, and the 100 KiB that the connections keep fit into 300 ms.
    let ticks = AtomicU64::new(0);
    options.clock = Clock::from_fn(move || Duration::from_millis(50 * ticks.fetch_add(1, SeqCst)));
    let mut vm = TestSource::new(filled());
    let mut drains = 0;
    vm.at_drain = Box::new(move |writer| {
        drains += 1;
        if drains == 2 {
            (0..700).for_each(|page| assert!(writer.write(page, 9000 + page)));
        }
    });
    let looks = AtomicU64::new(0);
    let look: Look = Arc::new(move || if looks.fetch_add(1, SeqCst) == 3 { 0 } else { 100 << 10 });
    let (sent, same) = migrate(&mut vm, Source::new(options), look);
    let sent = sent.unwrap();
    assert!(same);
    assert_eq!(sent.rounds.len(), 3, "{:?}", sent.rounds);
}

/// Migrates a guest that writes all of its memory before each drain, below a limit of 20 MB/s, with 1 ms for the pause. By the clock each
/// look at it takes 1 ms, of which a round has more than one.
fn below_a_limit(carries: Option<u64>, switchover_bandwidth: Option<u64>) -> Result<source::Report, Error> {
    let mut options = source::Options::default();
    let downtime = Duration::from_millis(1);
    options.parameters.max_bandwidth = Some(20_000_000);
    options.parameters.limits =
        Limits { downtime, rounds: Some(2), throttle: false, switchover_bandwidth, ..Limits::default() };
    let ticks = AtomicU64::new(0);
    options.clock = Clock::from_fn(move || Duration::from_millis(ticks.fetch_add(1, SeqCst)));
    let mut vm = TestSource::new(filled());
    vm.at_drain =
        Box::new(|writer| (0..700).for_each(|page| assert!(writer.write(page, 5000 + page) || !writer.is_running())));
    let (sent, same) = migrate_over(&mut vm, Source::new(options), Arc::new(|| 0), carries);
    assert_eq!(same, sent.is_ok());
    sent
}

/// A demo was slowed down to 1 % of its speed, and took 37 s, for a last round that took 0.9 ms: the rest was counted at the speed of the
/// limit, which ends with the pause.
#[test]
fn what_the_limit_on_bandwidth_allows_is_not_what_the_pause_has() {
    let fast = 10_000_000_000;
    assert!(matches!(below_a_limit(None, None), Err(Error::DoesNotConverge { .. })));
    assert_eq!(below_a_limit(Some(fast), None).unwrap().rounds.len(), 2, "what the path carried");
    assert_eq!(below_a_limit(None, Some(fast)).unwrap().rounds.len(), 2, "what the operator says");
    let error = below_a_limit(Some(fast), Some(1_000_000)).unwrap_err();
    assert!(matches!(error, Error::DoesNotConverge { bytes_per_second: 1_000_000, .. }), "{error}");
}
