//! Whole postcopies under random and priority-based schedules, with pages that are asked for, connections that are lost and sources
//! that go on. See [`handed_over`](super::handed_over).

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use shuttle::rand::{Rng, thread_rng};

use super::{
    broken::Broken,
    handed_over::{BYTES, Original, Plan, hand_over},
    shuttle::{explore, must_be_caught},
};

/// Some pages that the guest waits for, any of them more than once.
fn asks() -> Vec<u64> {
    let pages = [0, 1, 2, 64, 65];
    (0..thread_rng().gen_range(0..4)).map(|_| pages[thread_rng().gen_range(0..pages.len())]).collect()
}

fn preempt() -> Plan {
    Plan { preempt: true, asks: asks(), ..Plan::default() }
}

#[test]
fn every_page_of_a_postcopy_is_placed_once() {
    let original = Original::new();
    explore("postcopy, pages asked for on two connections", 300, move || {
        let plan = Plan { preempt: thread_rng().r#gen(), prefetch: thread_rng().r#gen(), ..preempt() };
        let machine = hand_over(&original, plan).assert_right();
        assert!(machine.done && machine.recoveries == 0);
    });
}

#[test]
fn a_postcopy_whose_connections_are_lost_goes_on_and_every_page_is_placed_once() {
    let original = Original::new();
    let went_on = Arc::new(AtomicU64::new(0));
    let counted = went_on.clone();
    explore("postcopy, connections lost at any byte, twice", 300, move || {
        let (preempt, prefetch, one) = (thread_rng().r#gen(), thread_rng().r#gen(), thread_rng().r#gen());
        let cuts = vec![thread_rng().gen_range(0..BYTES), thread_rng().gen_range(0..BYTES)];
        let plan = Plan { preempt, prefetch, asks: asks(), cuts, one, broken: None };
        let outcome = hand_over(&original, plan);
        let recoveries = outcome.assert_right().recoveries;
        if outcome.arrived() && recoveries > 0 {
            counted.fetch_add(1, Relaxed);
        }
    });
    assert!(went_on.load(Relaxed) > 0, "no source went on and arrived");
}

#[test]
fn a_source_that_sends_a_page_twice_is_caught() {
    let original = Original::new();
    must_be_caught("a page is sent though its bit was set, by its steps", "the bit was not set", move || {
        let plan = Plan { asks: vec![0, 2, 65, 64], broken: Some(Broken::SourceIgnoresItsBits), ..preempt() };
        hand_over(&original, plan).assert_allowed();
    });
}

/// A thread of an old connection places a page that the source was told is missing.
#[test]
fn a_destination_that_says_what_it_has_too_early_is_caught() {
    let original = Original::new();
    must_be_caught("pages of lost connections come after the recovery, by its steps", "is not allowed", move || {
        let cuts = vec![thread_rng().gen_range(2000..BYTES)];
        let plan = Plan { asks: vec![0, 2, 65], cuts, broken: Some(Broken::TellsTooEarly), ..preempt() };
        hand_over(&original, plan).assert_allowed();
    });
}
