//! Several things go wrong in one migration, anywhere: operations of connections on either side, a call of either VM, a
//! cancel. What holds after one fault holds after several. Likewise connections that are lost again and again in a postcopy.
//!
//! `MULTIFD_FAULTS` sets how many are injected, `MULTIFD_SEED` repeats the choice of them. The order of the threads is not
//! repeated.

use std::{
    collections::BTreeMap,
    env, io,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    thread,
    time::{Duration, SystemTime},
};

use fastrand::Rng;
use test_support::{report, time_limit};

use super::injected::{Attempt, Guest, Outcome, Owner, migrate, modes, print, settle};
use crate::{
    error::Error,
    source,
    testing::{
        faulty::{Fault, Faults},
        handed_over::{BYTES, Original, Plan, hand_over},
    },
};

/// Injected by every test run.
const FEW: usize = 300;
/// Most migrations that break wait for connections that do not come, so many go on side by side.
const AT_ONCE: usize = 8;
const MOST: usize = 4;

#[test]
fn any_faults_together_leave_the_guest_with_one_side() {
    let (wanted, seed, limit) = run();
    let lengths: Vec<_> = modes().into_iter().map(|(mode, options)| (mode, lengths(&options), options)).collect();
    let (injected, several, owners) = (AtomicUsize::new(0), AtomicUsize::new(0), Mutex::new(BTreeMap::new()));
    time_limit(limit, || {
        thread::scope(|scope| {
            for worker in 0..AT_ONCE {
                let (lengths, injected, several, owners) = (&lengths, &injected, &several, &owners);
                scope.spawn(move || {
                    let mut random = Rng::with_seed(seed.wrapping_add(worker as u64));
                    let mut number = 0;
                    while injected.load(SeqCst) < wanted {
                        number += 1;
                        let (mode, lengths, options) = &lengths[random.usize(..lengths.len())];
                        let script = Script::new(&mut random, lengths);
                        let context = format!("seed {seed}, worker {worker}, migration {number}, {mode}, {script:?}");
                        let (owner, happened) = script.run(options, &context);
                        injected.fetch_add(happened, SeqCst);
                        several.fetch_add(usize::from(happened > 1), SeqCst);
                        *owners.lock().unwrap().entry(owner).or_insert(0) += 1;
                    }
                });
            }
        });
    });
    let (injected, several, owners) = (injected.into_inner(), several.into_inner(), owners.into_inner().unwrap());
    print(&format!("several at once, {several} migrations with more than one"), injected, &owners);
    assert!(several * 10 > wanted, "{several}");
    assert!(owners.contains_key(&Owner::Source) && owners.contains_key(&Owner::Destination), "{owners:?}");
}

#[test]
fn a_postcopy_whose_connections_are_lost_again_and_again_brings_each_page_once() {
    let (wanted, seed, limit) = run();
    let mut random = Rng::with_seed(seed);
    let (mut lost, mut recoveries, mut arrived) = (0, 0, 0);
    time_limit(limit, || {
        let original = Original::new();
        while lost < wanted {
            let asks = (0..random.usize(..8)).map(|_| [0, 1, 2, 64, 65][random.usize(..5)]).collect();
            let cuts: Vec<usize> = (0..random.usize(1..=6)).map(|_| random.usize(..BYTES)).collect();
            lost += cuts.len();
            let [preempt, prefetch, one] = [(); 3].map(|()| random.bool());
            let outcome = hand_over(&original, Plan { preempt, prefetch, asks, cuts, one, broken: None });
            recoveries += outcome.assert_right().recoveries;
            arrived += usize::from(outcome.arrived());
        }
    });
    report("faults", &format!("postcopies: {lost} losses planned, {recoveries} recoveries, {arrived} VMs arrived"));
    assert!(arrived > 20 && recoveries > 20, "{arrived} arrived, with {recoveries} recoveries");
}

/// How many faults to inject, the seed, and how long that may take.
fn run() -> (usize, u64, Duration) {
    let wanted = env::var("MULTIFD_FAULTS").ok().map_or(FEW, |text| text.parse().expect("a number"));
    let clock = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos() as u64;
    let seed = env::var("MULTIFD_SEED").ok().map_or_else(clock, |text| text.parse().expect("a number"));
    println!("seed {seed}");
    (wanted, seed, Duration::from_secs(600) + Duration::from_millis(200) * u32::try_from(wanted).unwrap())
}

/// How many operations each connection has at each side, the source first, where nothing goes wrong.
fn lengths(options: &source::Options) -> [Vec<u64>; 2] {
    let attempt = Attempt::new(options.clone());
    let plans = [attempt.source.clone(), attempt.destination.clone()];
    let outcome = migrate(&mut Guest::new(), attempt, |_, _| {});
    outcome.sent.unwrap();
    outcome.received.unwrap();
    plans.map(|plans| plans.0.iter().map(Faults::operations).collect())
}

/// What goes wrong.
#[derive(Debug, Default)]
struct Script {
    /// Whether it is at the destination, which connection, which operation.
    operations: Vec<(bool, usize, u64, Fault)>,
    /// The call of the source's VM, and whether it panics.
    source_call: Option<(usize, bool)>,
    destination_call: Option<(usize, bool)>,
    /// Whether it is at the destination, and when.
    cancel: Option<(bool, Duration)>,
}

impl Script {
    fn new(random: &mut Rng, lengths: &[Vec<u64>; 2]) -> Script {
        let mut script = Script::default();
        for _ in 0..random.usize(1..=MOST) {
            match random.u8(..8) {
                0 => script.source_call = Some((random.usize(..9), random.bool())),
                1 => script.destination_call = Some((random.usize(..4), random.bool())),
                2 => script.cancel = Some((random.bool(), Duration::from_micros(random.u64(..8000)))),
                _ => {
                    let there = random.bool();
                    let lengths = &lengths[usize::from(there)];
                    let connections = lengths.iter().rposition(|&operations| operations > 0).unwrap() + 1;
                    let connection = random.usize(..connections);
                    let operation = random.u64(..lengths[connection] + 2);
                    script.operations.push((there, connection, operation, fault(random)));
                }
            }
        }
        script
    }

    /// Runs a migration with it. Returns who has the guest, and how many of the faults happened.
    fn run(&self, options: &source::Options, context: &str) -> (Owner, usize) {
        let (mut guest, mut attempt) = (Guest::new(), Attempt::new(options.clone()));
        for &(there, connection, operation, ref fault) in &self.operations {
            let plans = if there { &mut attempt.destination } else { &mut attempt.source };
            plans.0[connection] = plans.0[connection].clone().at(operation, fault.clone());
        }
        if let Some((call, panics)) = self.source_call {
            (guest.vm.fail_at, guest.vm.panics) = (Some(call), panics);
        }
        if let Some((call, panics)) = self.destination_call {
            (attempt.load_fails_at, attempt.load_panics) = (Some(call), panics);
        }
        let plans = [attempt.source.clone(), attempt.destination.clone()];
        let outcome = migrate(&mut guest, attempt, |source, destination| {
            if let Some((there, after)) = self.cancel {
                thread::sleep(after);
                if there { destination.cancel() } else { source.cancel() }
            }
        });
        let happened = self.happened(&plans, &guest, &outcome);
        guest.vm.panics = false;
        let owner = settle(&mut guest, outcome, context);
        let harmless = self.operations.iter().all(|(.., fault)| matches!(fault, Fault::Delay(_)));
        let callbacks = self.source_call.is_none() && self.destination_call.is_none();
        if harmless && callbacks && self.cancel.is_none() {
            assert_eq!(owner, Owner::Destination, "{context}: delays are no failure");
        }
        (owner, happened)
    }

    /// A cancel counts where it was what ended a side.
    fn happened(&self, plans: &[super::injected::Plans; 2], guest: &Guest, outcome: &Outcome) -> usize {
        let mut happened = 0;
        for &(there, connection, operation, _) in &self.operations {
            happened += usize::from(plans[usize::from(there)].0[connection].operations() > operation);
        }
        happened += usize::from(self.source_call.is_some_and(|(call, _)| guest.vm.fallible() > call));
        happened += usize::from(self.destination_call.is_some_and(|(call, _)| {
            let calls = outcome.to.calls();
            calls.iter().filter(|name| **name != "abandon").count() > call
        }));
        let errors = [outcome.sent.as_ref().err(), outcome.received.as_ref().err()];
        happened += usize::from(self.cancel.is_some() && errors.into_iter().flatten().any(by_cancel));
        happened
    }
}

fn by_cancel(error: &Error) -> bool {
    match error {
        Error::InDoubt { reason } => by_cancel(reason),
        other => matches!(other, Error::Cancelled),
    }
}

fn fault(random: &mut Rng) -> Fault {
    const KINDS: [io::ErrorKind; 5] = [
        io::ErrorKind::TimedOut,
        io::ErrorKind::ConnectionReset,
        io::ErrorKind::BrokenPipe,
        io::ErrorKind::OutOfMemory,
        io::ErrorKind::Other,
    ];
    match random.u8(..4) {
        0 => Fault::Fail(KINDS[random.usize(..KINDS.len())]),
        1 => Fault::Cut,
        2 => Fault::Shorten(random.usize(..3000)),
        _ => Fault::Delay(Duration::from_micros(random.u64(..3000))),
    }
}
