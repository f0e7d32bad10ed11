//! Every interleaving, and every order in which memory may become visible, of the small types: barrier, scan and stop. Those of a
//! postcopy are beside its parts: `postcopy::loom`, and `loom` below the destination's `postcopy`.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p multifd --lib loom::`. Sizes are what can be explored in seconds; loom ends
//! a test with a panic at a deadlock, so a wake-up that can get lost is found without an assertion.

use std::{
    sync::atomic::{AtomicU64 as Plain, Ordering::Relaxed as PlainRelaxed},
    time::Instant,
};

use loom::model::Builder;
use multifd_proto::{BlockName, ChannelId, rounds::Party};

use crate::{
    dirty_bitmap::DirtyBitmap,
    error::{Connection, Error, Place},
    layout::Layout,
    round::barrier::RoundBarrier,
    round::scan::{Batch, PageScan},
    stop::StopHandle,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
        thread,
    },
    testing::broken::{Broken, LooseBarrier},
};

const AT: Place = Place { connection: Connection::Main, offset: 0 };

/// Runs `body` in every interleaving with up to `preemptions` forced switches (`None`: any number), and reports how many
/// there were.
pub(crate) fn explore(name: &str, preemptions: Option<usize>, body: impl Fn() + Send + Sync + 'static) {
    let begun = Instant::now();
    let executions = Arc::new(Plain::new(0));
    let mut builder = Builder::new();
    builder.preemption_bound = preemptions;
    let counted = executions.clone();
    builder.check(move || {
        counted.fetch_add(1, PlainRelaxed);
        body();
    });
    let (executions, seconds) = (executions.load(PlainRelaxed), begun.elapsed().as_secs_f64());
    let bound = preemptions.map_or("all interleavings".to_owned(), |bound| format!("up to {bound} preemptions"));
    test_support::report("proof", &format!("loom | {name}, {bound} | {executions} executions | - | {seconds:.1} s"));
}

fn party(index: usize) -> Party {
    match index.checked_sub(1) {
        None => Party::Main,
        Some(id) => Party::Channel(ChannelId(u8::try_from(id).unwrap())),
    }
}

/// What each party does before it arrives is seen by everybody who has passed, round after round.
fn rounds(parties: usize, rounds: usize) -> impl Fn() + Send + Sync {
    move || {
        let barrier = RoundBarrier::new(parties - 1);
        let done: Arc<Vec<AtomicU64>> = Arc::new((0..parties * rounds).map(|_| AtomicU64::new(0)).collect());
        let run = move |me: usize, barrier: RoundBarrier, done: Arc<Vec<AtomicU64>>| {
            for round in 0..rounds {
                done[round * parties + me].store(1, Relaxed);
                assert_eq!(barrier.meet(party(me), AT).unwrap(), round as u64);
                for other in 0..parties {
                    assert_eq!(done[round * parties + other].load(Relaxed), 1, "{other} has not passed round {round}");
                }
            }
        };
        let others: Vec<_> = (1..parties)
            .map(|me| {
                let (barrier, done) = (barrier.clone(), done.clone());
                thread::spawn(move || run(me, barrier, done))
            })
            .collect();
        run(0, barrier, done);
        others.into_iter().for_each(|other| other.join().unwrap());
    }
}

#[test]
fn two_parties_keep_the_round_law_for_three_rounds() {
    explore("RoundBarrier, 2 parties × 3 rounds", None, rounds(2, 3));
}

#[test]
fn three_parties_keep_the_round_law() {
    explore("RoundBarrier, 3 parties × 1 round", None, rounds(3, 1));
}

#[test]
fn three_parties_keep_the_round_law_for_two_rounds() {
    explore("RoundBarrier, 3 parties × 2 rounds", Some(3), rounds(3, 2));
}

/// As above, for who does something between arriving and passing, and for main, which gathers the channels first.
#[test]
fn who_arrives_first_and_passes_later_keeps_the_round_law() {
    explore("RoundBarrier, arrive, then pass; gather, 3 parties × 2 rounds", Some(3), || {
        const ROUNDS: usize = 2;
        let barrier = RoundBarrier::new(2);
        let done: Arc<Vec<AtomicU64>> = Arc::new((0..ROUNDS * 2).map(|_| AtomicU64::new(0)).collect());
        let over: Arc<Vec<AtomicU64>> = Arc::new((0..ROUNDS).map(|_| AtomicU64::new(0)).collect());
        let channels: Vec<_> = (0..2)
            .map(|me| {
                let (barrier, done, over) = (barrier.clone(), done.clone(), over.clone());
                thread::spawn(move || {
                    for round in 0..ROUNDS {
                        done[round * 2 + me].store(1, Relaxed);
                        assert_eq!(barrier.arrive(party(me + 1), AT).unwrap(), round as u64);
                        barrier.pass(round as u64).unwrap();
                        assert_eq!(done[round * 2 + 1 - me].load(Relaxed), 1);
                        assert_eq!(over[round].load(Relaxed), 1, "main has not arrived in round {round}");
                    }
                })
            })
            .collect();
        for round in 0..ROUNDS {
            barrier.gather().unwrap();
            assert!(done[round * 2..][..2].iter().all(|done| done.load(Relaxed) == 1));
            over[round].store(1, Relaxed);
            assert_eq!(barrier.meet(Party::Main, AT).unwrap(), round as u64);
        }
        channels.into_iter().for_each(|channel| channel.join().unwrap());
    });
}

/// The same rounds at a barrier that lets one party go too early: the law is broken, and the search sees it.
#[test]
fn a_barrier_that_releases_one_party_early_is_caught() {
    let begun = Instant::now();
    let caught = std::panic::catch_unwind(|| {
        let mut builder = Builder::new();
        builder.preemption_bound = Some(3);
        builder.check(|| {
            let barrier = LooseBarrier::new(Some(Broken::BarrierShort));
            barrier.fix_channels(2);
            let done: Arc<Vec<AtomicU64>> = Arc::new((0..3).map(|_| AtomicU64::new(0)).collect());
            let run = move |me: usize, barrier: LooseBarrier, done: Arc<Vec<AtomicU64>>| {
                // The first time it is the real barrier's turn, and nobody waits here.
                assert!(barrier.arrive(party(me)).is_none());
                done[me].store(1, Relaxed);
                barrier.arrive(party(me)).unwrap().unwrap();
                assert!(done.iter().all(|done| done.load(Relaxed) == 1), "passed before all had arrived");
            };
            let others: Vec<_> = (1..3)
                .map(|me| {
                    let (barrier, done) = (barrier.clone(), done.clone());
                    thread::spawn(move || run(me, barrier, done))
                })
                .collect();
            run(0, barrier, done);
            others.into_iter().for_each(|other| other.join().unwrap());
        });
    });
    let message =
        *caught.expect_err("every interleaving kept the law").downcast::<&str>().expect("an assertion's text");
    assert_eq!(message, "passed before all had arrived");
    let seconds = begun.elapsed().as_secs_f64();
    test_support::report(
        "proof",
        &format!("loom | broken: barrier released one party early | - | caught | {seconds:.1} s"),
    );
}

fn three_pages() -> Layout {
    let blocks = ["a", "b", "c"].map(|name| (BlockName::new(name).unwrap(), 4096));
    Layout::new(4096, blocks).unwrap()
}

/// Takes batches until there are none, and counts what was taken.
fn pull(scan: &PageScan, taken: &[AtomicU64], packets: &AtomicU64) {
    let mut batch = Batch::default();
    while scan.next(&mut batch) {
        assert_eq!(batch.pages, [0]);
        taken[batch.block].fetch_add(1, Relaxed);
        packets.fetch_add(1 << (8 * scan.packet_number()), Relaxed);
    }
}

#[test]
fn two_channels_take_each_page_once() {
    explore("PageScan, 2 channels × 3 pages", None, || {
        let scan = PageScan::new(three_pages(), 128, 1);
        scan.load(&mut DirtyBitmap::full(&three_pages()));
        scan.allow(u64::MAX);
        let taken: Arc<Vec<AtomicU64>> = Arc::new((0..3).map(|_| AtomicU64::new(0)).collect());
        let packets = Arc::new(AtomicU64::new(0));
        let other = {
            let (scan, taken, packets) = (scan.clone(), taken.clone(), packets.clone());
            thread::spawn(move || pull(&scan, &taken, &packets))
        };
        pull(&scan, &taken, &packets);
        other.join().unwrap();
        assert!(scan.is_empty());
        assert!(taken.iter().all(|times| times.load(Relaxed) == 1));
        assert_eq!(packets.load(Relaxed), 0x01_01_01, "each packet has a number of its own");
    });
}

#[test]
fn a_round_that_opens_while_a_channel_asks_is_handed_out_once() {
    explore("PageScan, load and allow against next", None, || {
        let scan = PageScan::new(three_pages(), 128, 1);
        let taken: Arc<Vec<AtomicU64>> = Arc::new((0..3).map(|_| AtomicU64::new(0)).collect());
        let packets = Arc::new(AtomicU64::new(0));
        let other = {
            let (scan, taken, packets) = (scan.clone(), taken.clone(), packets.clone());
            thread::spawn(move || pull(&scan, &taken, &packets))
        };
        let mut dirty = DirtyBitmap::new(&three_pages());
        dirty.set(0);
        scan.load(&mut dirty);
        scan.allow(1);
        other.join().unwrap();
        // Whatever the channel came too late or too early for is still there.
        scan.allow(u64::MAX);
        pull(&scan, &taken, &packets);
        assert!(scan.is_empty());
        assert_eq!(taken.iter().map(|times| times.load(Relaxed)).collect::<Vec<_>>(), [1, 0, 0]);
    });
}

#[test]
fn a_page_is_taken_by_a_channel_or_postponed_by_main() {
    explore("PageScan, postpone against next", None, || {
        let scan = PageScan::new(three_pages(), 128, 1);
        scan.load(&mut DirtyBitmap::full(&three_pages()));
        scan.allow(u64::MAX);
        let taken: Arc<Vec<AtomicU64>> = Arc::new((0..3).map(|_| AtomicU64::new(0)).collect());
        let channel = {
            let (scan, taken) = (scan.clone(), taken.clone());
            thread::spawn(move || pull(&scan, &taken, &AtomicU64::new(0)))
        };
        let mut written = DirtyBitmap::new(&three_pages());
        (1..3).for_each(|block| written.set(three_pages().blocks()[block].first_page()));
        let postponed = scan.postpone(&written);
        channel.join().unwrap();
        assert!(scan.is_empty());
        let mut next = DirtyBitmap::new(&three_pages());
        scan.take_postponed(&mut next);
        assert_eq!(next.count(), postponed);
        for (block, times) in three_pages().blocks().iter().zip(&*taken) {
            let waits = u64::from(next.contains(block.first_page()));
            assert_eq!(times.load(Relaxed) + waits, 1, "once in this round, or once in the next");
        }
    });
}

#[test]
fn a_round_is_sent_completely_when_main_has_gathered_the_channels() {
    explore("RoundBarrier + PageScan, 1 channel × 2 rounds", Some(3), || {
        let (scan, barrier) = (PageScan::new(three_pages(), 128, 1), RoundBarrier::new(1));
        let taken: Arc<Vec<AtomicU64>> = Arc::new((0..3).map(|_| AtomicU64::new(0)).collect());
        let packets = Arc::new(AtomicU64::new(0));
        let channel = {
            let (scan, barrier, taken) = (scan.clone(), barrier.clone(), taken.clone());
            thread::spawn(move || {
                for _ in 0..2 {
                    barrier.meet(party(1), AT).unwrap();
                    pull(&scan, &taken, &packets);
                }
                barrier.meet(party(1), AT).unwrap();
            })
        };
        for round in 1..=2 {
            let mut dirty = DirtyBitmap::new(&three_pages());
            dirty.set(0);
            scan.load(&mut dirty);
            scan.allow(u64::MAX);
            barrier.meet(Party::Main, AT).unwrap();
            barrier.gather().unwrap();
            assert!(scan.is_empty());
            assert_eq!(taken[0].load(Relaxed), round);
        }
        barrier.meet(Party::Main, AT).unwrap();
        channel.join().unwrap();
    });
}

#[test]
fn stop_releases_everybody_and_the_first_error_wins() {
    explore("StopHandle + RoundBarrier, 2 wait, 2 stop", Some(3), || {
        let (stop, barrier) = (StopHandle::new(), RoundBarrier::new(2));
        stop.register(Box::new(barrier.clone()));
        let waiting = {
            let barrier = barrier.clone();
            thread::spawn(move || assert!(matches!(barrier.meet(Party::Main, AT), Err(Error::Stopped))))
        };
        let failing = {
            let stop = stop.clone();
            thread::spawn(move || stop.stop(Error::Unconfirmed).is_none())
        };
        let ours_won = stop.stop(Error::Cancelled).is_none();
        // The third party never comes.
        assert!(matches!(barrier.meet(party(1), AT), Err(Error::Stopped)));
        waiting.join().unwrap();
        let theirs_won = failing.join().unwrap();
        assert_ne!(ours_won, theirs_won);
        match stop.take_first() {
            Some(Error::Cancelled) => assert!(ours_won),
            Some(Error::Unconfirmed) => assert!(theirs_won),
            other => panic!("{other:?}"),
        }
    });
}

#[test]
fn what_is_registered_while_the_migration_stops_is_stopped_too() {
    explore("StopHandle, register against stop", None, || {
        let (stop, barrier) = (StopHandle::new(), RoundBarrier::new(1));
        let registering = {
            let (stop, barrier) = (stop.clone(), barrier.clone());
            thread::spawn(move || {
                stop.register(Box::new(barrier.clone()));
                assert!(matches!(barrier.meet(party(1), AT), Err(Error::Stopped)));
            })
        };
        stop.cancel();
        registering.join().unwrap();
    });
}

#[test]
fn a_cancel_comes_before_the_commit_or_ends_the_wait_after_it() {
    explore("StopHandle, cancel against commit", None, || {
        let (stop, barrier) = (StopHandle::new(), RoundBarrier::new(0));
        stop.register(Box::new(barrier.clone()));
        let cancelling = {
            let stop = stop.clone();
            thread::spawn(move || stop.cancel())
        };
        let committed = stop.commit().is_ok();
        cancelling.join().unwrap();
        assert_eq!(committed, !stop.is_stopped());
        assert!(barrier.meet(Party::Main, AT).is_err(), "the wait has ended in either case");
        assert!(matches!(stop.take_first(), Some(Error::Cancelled)));
    });
}

#[test]
fn either_the_cancel_or_the_decision_comes_first() {
    explore("StopHandle, cancel against commit", None, || {
        let (stop, barrier) = (StopHandle::new(), RoundBarrier::new(0));
        stop.register(Box::new(barrier.clone()));
        let cancelling = {
            let stop = stop.clone();
            thread::spawn(move || stop.cancel())
        };
        let decided = stop.decide().is_ok();
        cancelling.join().unwrap();
        assert_eq!(decided, !stop.is_stopped());
        assert_eq!(decided, barrier.meet(Party::Main, AT).is_ok());
    });
}
