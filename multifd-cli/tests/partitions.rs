//! A guest moves between two hosts while the network between them is cut: at a random moment, in one direction or both,
//! for longer or shorter than every limit, with TLS or without.
//!
//! It never runs on both hosts. In the end it runs on one of them, or it is paused at the source, in doubt, and can be
//! resumed there if the destination does not run it.
//!
//! `MULTIFD_PARTITIONS` sets how many cuts are tried, `MULTIFD_SEED` repeats a run.

mod common;

use std::{
    collections::BTreeMap,
    env, thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use common::{
    Guest, LIMIT, exit_code,
    hosts::{Host, two_hosts},
    number, run,
};
use fastrand::Rng;
use serde_json::{Value, json};
use test_support::{TempDir, report, skip, time_limit};

/// Limits that pass while the test watches.
const OPTIONS: &str = "--guest process --memory 24MiB --working-set 4MiB --write-rate 40MB/s --channels 2 \
                       --stall-timeout 1500ms --pause-timeout 1s";

/// By then the connections of a migration with TLS are established, mostly.
const HANDSHAKES: Duration = Duration::from_millis(30);

/// One end of the cable: how its host is reached from the other.
const LEFT: (&str, &str) = ("192.0.2.1", "02:00:00:00:00:01");
const RIGHT: (&str, &str) = ("192.0.2.2", "02:00:00:00:00:02");

/// Which directions are cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Cut {
    There,
    Back,
    Both,
}

/// Who has the guest in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Owner {
    Source,
    Destination,
    /// The source was in doubt, and the destination did not run it.
    ResumedByOperator,
    /// The source was in doubt, and the destination runs it.
    KeptPaused,
}

#[test]
fn a_guest_runs_on_one_host_whenever_the_network_between_them_is_cut() {
    let wanted: u32 = env::var("MULTIFD_PARTITIONS").map_or(8, |text| text.parse().expect("a number"));
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
    let seed: u64 = env::var("MULTIFD_SEED").map_or_else(|_| now(), |text| text.parse().expect("a number"));
    println!("seed {seed}");
    time_limit(LIMIT + Duration::from_secs(20) * wanted, || {
        let (left, right) = match two_hosts() {
            Ok(hosts) => hosts,
            Err(reason) => return skip(&reason),
        };
        for (host, (_, own), (other, mac)) in [(&left, LEFT, RIGHT), (&right, RIGHT, LEFT)] {
            if let Err(reason) = host.ip(&format!("link set dev cable address {own}")) {
                return skip(&reason);
            }
            host.reaches(other, mac, false);
        }
        let mut random = Rng::with_seed(seed);
        let mut owners = BTreeMap::new();
        let dir = TempDir::new().unwrap();
        let tls = dir.path().join("tls").display().to_string();
        let made = run(&format!("tls-init {tls} --host {} --quiet", RIGHT.0));
        assert_eq!(exit_code(&made), 0, "{made:?}");
        let with_tls = format!("{OPTIONS} --tls-dir {tls}");
        // How long an undisturbed migration takes here: cuts fall before its end.
        let took = undisturbed(&left, &right, OPTIONS);
        for round in 0..wanted {
            // Every other one with TLS, and half of these are cut where the handshakes are.
            let (options, took) = match round % 4 {
                0 | 2 => (OPTIONS, took),
                1 => (&*with_tls, took),
                _ => (&*with_tls, HANDSHAKES.min(took)),
            };
            let owner = partition(&left, &right, &mut random, options, took, round);
            *owners.entry(owner).or_insert(0) += 1;
        }
        report("partitions", &format!("cuts {wanted} (seed {seed}), guests lost 0, doubled 0; {owners:?}"));
    });
}

/// A guest on the left, and a process that waits for it on the right, at an address.
fn guests(left: &Host, right: &Host, dir: &TempDir, options: &str) -> (Guest, Guest, String) {
    let source = left.guest(dir.path(), "source", options);
    let destination = right.guest(dir.path(), "destination", &format!("{options} --incoming tcp:{}:0", RIGHT.0));
    let uri = destination.listening();
    source.wait_for(|status| status["state"] == "running");
    (source, destination, uri)
}

fn undisturbed(left: &Host, right: &Host, options: &str) -> Duration {
    let dir = TempDir::new().unwrap();
    let (source, destination, uri) = guests(left, right, &dir, options);
    let begun = Instant::now();
    source.ask("migrate", json!({ "uri": uri })).unwrap();
    while !runs(&destination.status()) {
        assert!(begun.elapsed() < LIMIT);
        thread::sleep(Duration::from_millis(1));
    }
    begun.elapsed()
}

fn partition(left: &Host, right: &Host, random: &mut Rng, options: &str, took: Duration, round: u32) -> Owner {
    let dir = TempDir::new().unwrap();
    let (source, destination, uri) = guests(left, right, &dir, options);
    let cut = [Cut::There, Cut::Back, Cut::Both][random.usize(..3)];
    let wait = Duration::from_micros(random.u64(..took.as_micros() as u64));
    // Shorter than every limit, between them, or longer than all.
    let hold = Duration::from_millis([100, 1200, 4000][random.usize(..3)]);
    let context = format!("round {round}: {cut:?} after {wait:?} for {hold:?}, {options}");

    let begun = Instant::now();
    source.ask("migrate", json!({ "uri": uri })).unwrap();
    thread::sleep(wait);
    left.reaches(RIGHT.0, RIGHT.1, cut != Cut::Back);
    right.reaches(LEFT.0, LEFT.1, cut != Cut::There);
    let healed = Instant::now() + hold;
    let mut whole = false;
    let deadline = Instant::now() + LIMIT;
    let (here, there) = loop {
        if !whole && Instant::now() >= healed {
            left.reaches(RIGHT.0, RIGHT.1, false);
            right.reaches(LEFT.0, LEFT.1, false);
            whole = true;
        }
        // The destination is asked first: a guest that starts there after its answer is not running here before.
        let (there, here) = (destination.status(), source.status());
        assert!(!(runs(&here) && runs(&there)), "{context}: it runs on both: {here:?}, {there:?}");
        let settled = |state: &Option<Value>| state.as_ref().is_none_or(|state| state["state"] != "outgoing");
        let waits = there.as_ref().is_some_and(|state| state["state"] == "incoming");
        if whole && settled(&here) && !waits {
            break (here, there);
        }
        // A destination that the source never reached waits as before.
        if whole && runs(&here) && begun.elapsed() > wait + hold + Duration::from_secs(8) {
            break (here, there);
        }
        assert!(Instant::now() < deadline, "{context}: {here:?}, {there:?}");
        thread::sleep(Duration::from_millis(5));
    };
    let owner = match (&here, &there) {
        (None, Some(_)) => Owner::Destination,
        (Some(here), _) if here["state"] == "running" => Owner::Source,
        (Some(here), there) if here["state"] == "paused" => {
            assert_eq!(here["in-doubt"], true, "{context}: {here}");
            if runs(there) { Owner::KeptPaused } else { Owner::ResumedByOperator }
        }
        _ => panic!("{context}: neither side has it: {here:?}, {there:?}; {}", source.stderr()),
    };
    match owner {
        Owner::Destination | Owner::KeptPaused => destination.runs_on(),
        Owner::Source => source.runs_on(),
        Owner::ResumedByOperator => {
            assert_eq!(source.ask("x-guest-resume", json!({})), Some(json!({ "return": {} })), "{context}");
            source.runs_on();
        }
    }
    let keeper = if matches!(owner, Owner::Destination | Owner::KeptPaused) { destination } else { source };
    assert!(keeper.ask("quit", json!({})).is_some(), "{context}");
    let (exit, report) = keeper.end();
    assert_eq!(number(&report, "/guest-errors") + number(&report, "/pages-wrong"), 0.0, "{context}: {exit} {report}");
    owner
}

fn runs(state: &Option<Value>) -> bool {
    state.as_ref().is_some_and(|state| state["state"] == "running")
}
