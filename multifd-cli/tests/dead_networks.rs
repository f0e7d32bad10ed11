//! What a migration makes of a network that goes away, or a peer that does: in each phase, for longer and for shorter than
//! `--stall-timeout`. The guest runs on at the source where it lasts longer, and the migration goes on where it does not.
//!
//! `MULTIFD_DEAD_NETWORKS` sets how often each is tried.

mod common;

use std::{
    env, fs, thread,
    time::{Duration, Instant},
};

use common::{
    Guest, LIMIT,
    hosts::{Host, two_hosts},
    number,
};
use rustix::process::Signal;
use serde_json::{Value, json};
use test_support::{TempDir, skip, time_limit};

/// The guest writes faster than its pages are sent, so rounds go on until they are told to end. What is sent in one of them has
/// room in the buffers of the connections.
const SMALL: &str = "--guest process --memory 8MiB --working-set 64KiB --filled 0 --write-rate 40MB/s --channels 2 \
                     --max-bandwidth 250kB/s --downtime-limit 0 --max-rounds 1000000 --no-throttle";
/// Limits that pass while the test watches, and one that never does.
const SHORT: &str = "--stall-timeout 2s --pause-timeout 2s";
const LONG: &str = "--stall-timeout 2min --pause-timeout 2min";

const LEFT: (&str, &str) = ("192.0.2.1", "02:00:00:00:00:01");
const RIGHT: (&str, &str) = ("192.0.2.2", "02:00:00:00:00:02");

/// When the network goes away.
#[derive(Clone, Copy, Debug)]
enum When {
    /// The destination has not answered anything.
    Setup,
    /// The guest runs.
    Rounds,
    /// The guest is paused, and its last pages are on their way to a destination that is stopped.
    Switchover,
}

const PHASES: [When; 3] = [When::Setup, When::Rounds, When::Switchover];

fn times() -> usize {
    env::var("MULTIFD_DEAD_NETWORKS").map_or(1, |text| text.parse().expect("a number"))
}

/// Two hosts whose cable can be cut.
struct Network {
    left: Host,
    right: Host,
}

impl Network {
    /// Skips the test where there is none.
    fn new() -> Option<Network> {
        let made = two_hosts().and_then(|(left, right)| {
            left.ip(&format!("link set dev cable address {}", LEFT.1))?;
            right.ip(&format!("link set dev cable address {}", RIGHT.1))?;
            Ok(Network { left, right })
        });
        let network = made.map_err(|reason| skip(&reason)).ok()?;
        network.cut(false);
        Some(network)
    }

    fn cut(&self, cut: bool) {
        self.left.reaches(RIGHT.0, RIGHT.1, cut);
        self.right.reaches(LEFT.0, LEFT.1, cut);
    }

    /// A guest on the left, and a process that waits for it on the right, and where.
    fn guests(&self, dir: &TempDir, limits: &str) -> (Guest, Guest, String) {
        let options = format!("{SMALL} {limits}");
        let source = self.left.guest(dir.path(), "source", &options);
        let incoming = format!("{options} --incoming tcp:{}:0", RIGHT.0);
        let destination = self.right.guest(dir.path(), "destination", &incoming);
        let uri = destination.listening();
        source.wait_for(|status| status["state"] == "running");
        (source, destination, uri)
    }
}

/// The same on this host.
fn neighbours(dir: &TempDir, limits: &str) -> (Guest, Guest, String) {
    let source = Guest::start(dir.path(), "source", &format!("{SMALL} {limits}"));
    let incoming = format!("{SMALL} {limits} --incoming tcp:127.0.0.1:0");
    let destination = Guest::start(dir.path(), "destination", &incoming);
    let uri = destination.listening();
    source.wait_for(|status| status["state"] == "running");
    (source, destination, uri)
}

fn migrate(source: &Guest, uri: &str) {
    let answer = source.ask("migrate", json!({ "uri": uri })).unwrap();
    assert!(answer["return"].is_object(), "{answer}");
}

fn stop(guest: &Guest) {
    guest.signal(Signal::STOP);
}

fn go_on(guest: &Guest) {
    guest.signal(Signal::CONT);
}

/// Waits until the migration of `source` says that `enough` has happened. A machine that is so slow that it has failed before
/// tries the rest all the same. `false`: the guest has left.
#[track_caller]
fn wait_for(source: &Guest, enough: impl Fn(&Value) -> bool) -> bool {
    let deadline = Instant::now() + LIMIT;
    loop {
        let answer = source.ask("query-migrate", json!({})).map(|mut answer| answer["return"].take());
        let over = |answer: &Value| answer["status"] == "failed" || enough(answer);
        match &answer {
            Some(answer) if answer["status"] == "completed" => return false,
            Some(answer) if over(answer) => return true,
            Some(_) => {}
            None => return false,
        }
        assert!(Instant::now() < deadline, "{answer:?}: {}", source.stderr());
        thread::sleep(Duration::from_millis(2));
    }
}

/// What `start` starts, in the phase `when` of its migration, in which it stays. The destination may be stopped.
#[track_caller]
fn in_phase(when: When, start: impl Fn(&TempDir) -> (Guest, Guest, String)) -> (TempDir, Guest, Guest, String) {
    // A guest that is not given a CPU for a whole round has nothing left to send, and leaves.
    for _ in 0..5 {
        let dir = TempDir::new().unwrap();
        let (source, destination, uri) = start(&dir);
        if until(when, &source, &destination, &uri) {
            return (dir, source, destination, uri);
        }
    }
    panic!("the guest leaves at once");
}

/// What `begin` begins, with `disturb` done to it. A guest that leaves at that very moment does not count.
fn disturbed(
    begin: impl Fn() -> (TempDir, Guest, Guest, String),
    mut disturb: impl FnMut(&Guest, bool),
) -> (TempDir, Guest, Guest, String) {
    for _ in 0..5 {
        let begun = begin();
        disturb(&begun.1, true);
        if begun.1.status().is_some() {
            return begun;
        }
        disturb(&begun.1, false);
        let (exit, report) = begun.1.end();
        println!("the guest has left: {exit} {report}");
        assert_eq!(exit, 0, "{report}");
    }
    panic!("the guest leaves at once");
}

/// `false`: the guest has left.
fn until(when: When, source: &Guest, destination: &Guest, uri: &str) -> bool {
    match when {
        When::Setup => {
            stop(destination);
            migrate(source, uri);
            wait_for(source, |answer| answer["status"] == "setup")
        }
        When::Rounds => {
            migrate(source, uri);
            // The first one takes no time: --max-bandwidth lets it pass as a whole. Those after it take a quarter of a second each,
            // and so never end by themselves. The one after the last one that the guest runs in is counted too.
            wait_for(source, |answer| answer["ram"]["dirty-sync-count"].as_u64() >= Some(4))
        }
        When::Switchover => {
            if !until(When::Rounds, source, destination, uri) {
                return false;
            }
            stop(destination);
            let_it_leave(source);
            wait_for(source, |answer| answer["status"] == "device")
        }
    }
}

/// Has the guest leave in the next round.
fn let_it_leave(source: &Guest) {
    source.ask("migrate-set-parameters", json!({ "max-bandwidth": 0, "downtime-limit": 60_000 }));
}

/// The migration has failed because nothing moved, and the guest runs on where it was.
#[track_caller]
fn assert_runs_on(source: &Guest, context: &str) -> String {
    let status = source.wait_for(|status| status["state"] != "outgoing");
    assert_eq!((&status["state"], &status["status"]), (&json!("running"), &json!("failed")), "{context}: {status}");
    source.runs_on();
    status["error"].as_str().unwrap().to_owned()
}

/// The guest has moved, and is whole.
#[track_caller]
fn assert_moved(source: Guest, destination: Guest, context: &str) {
    // A guest that stays would be waited for.
    while let Some(status) = source.ask("x-guest-status", json!({})) {
        let status = &status["return"];
        assert_ne!(status["state"], "running", "{context}: {status}, {}", destination.stderr());
        thread::sleep(Duration::from_millis(5));
    }
    let (exit, report) = source.end();
    assert_eq!((exit, &report["status"]), (0, &json!("completed")), "{context}: {report}");
    destination.runs_on();
    destination.ask("quit", json!({}));
    let (exit, report) = destination.end();
    assert_eq!(exit, 0, "{context}: {report}");
    assert_eq!(number(&report, "/guest-errors") + number(&report, "/pages-wrong"), 0.0, "{context}");
}

#[test]
fn a_cut_for_longer_than_the_limit_ends_the_migration_in_each_phase_and_the_port_is_free_at_once() {
    time_limit(LIMIT, || {
        let Some(network) = Network::new() else { return };
        for when in PHASES.repeat(times()) {
            let context = format!("{when:?}");
            let (dir, source, destination, uri) =
                disturbed(|| in_phase(when, |dir| network.guests(dir, SHORT)), |_, cut| network.cut(cut));
            go_on(&destination);
            let error = assert_runs_on(&source, &context);
            assert!(error.contains("2.0 s"), "{context}: {error}");
            if matches!(when, When::Setup) {
                // A source that has said nothing is waited for without end.
                destination.kill();
            } else {
                let (exit, report) = destination.end();
                assert!(exit != 0 && report["error"].is_string(), "{context}: {exit} {report}");
            }
            // The same port, while the network is still cut, and the same guest, once it is not.
            let port = uri.rsplit_once(':').unwrap().1;
            let again = format!("{SMALL} {LONG} --incoming tcp:{}:{port}", RIGHT.0);
            let destination = network.right.guest(dir.path(), "again", &again);
            assert_eq!(destination.listening(), uri, "{context}");
            network.cut(false);
            let_it_leave(&source);
            migrate(&source, &uri);
            assert_moved(source, destination, &context);
        }
    });
}

#[test]
fn a_cut_for_shorter_than_the_limit_delays_the_migration_in_each_phase() {
    time_limit(LIMIT, || {
        let Some(network) = Network::new() else { return };
        for when in PHASES.repeat(times()) {
            let context = format!("{when:?}");
            let (_dir, source, destination, _) = in_phase(when, |dir| network.guests(dir, LONG));
            network.cut(true);
            go_on(&destination);
            thread::sleep(Duration::from_millis(300));
            network.cut(false);
            let_it_leave(&source);
            assert_moved(source, destination, &context);
        }
    });
}

/// The local port of the connection number `at` of those that `source` has, in the order in which they were made; `None` if it has
/// left.
fn port_of(source: &Guest, at: usize) -> Option<u16> {
    let table = fs::read_to_string(format!("/proc/{}/net/tcp", source.pid().as_raw_nonzero())).ok()?;
    // Number, address here and there, state, ..., inode.
    let fields = table.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
    let mut made: Vec<(u64, u16)> = fields
        .filter(|fields| fields[3] == "01")
        .map(|fields| {
            let port = fields[1].rsplit_once(':').unwrap().1;
            (fields[9].parse().unwrap(), u16::from_str_radix(port, 16).unwrap())
        })
        .collect();
    made.sort_unstable();
    Some(made.get(at)?.1)
}

/// Whether what is sent from `port` is lost.
fn lose(host: &Host, port: u16, lost: bool) -> Result<(), String> {
    if lost {
        host.ip("route replace blackhole default table 99")?;
    }
    let what = if lost { "add" } else { "delete" };
    host.ip(&format!("rule {what} pref 1 ipproto tcp sport {port} lookup 99"))?;
    // Before the table of this host's own addresses, which has the other host as a neighbour.
    host.ip("route flush cache")
}

#[test]
fn one_channel_whose_packets_are_lost_ends_the_migration_or_delays_it() {
    time_limit(LIMIT, || {
        let Some(network) = Network::new() else { return };
        for limits in [SHORT, LONG].repeat(times()) {
            let begun = || in_phase(When::Rounds, |dir| network.guests(dir, limits));
            let (mut channel, mut lost) = (None, Ok(()));
            let (_dir, source, destination, _) = disturbed(begun, |source, begins| {
                channel = if begins { port_of(source, 2) } else { channel };
                if let Some(port) = channel {
                    lost = lose(&network.left, port, begins);
                }
            });
            if let Err(reason) = lost {
                return skip(&reason);
            }
            let channel = channel.expect("the guest is still here, and so are its connections");
            if limits == SHORT {
                let error = assert_runs_on(&source, limits);
                assert!(error.contains("2.0 s"), "{error}");
                let (exit, report) = destination.end();
                assert!(exit != 0 && report["error"].is_string(), "{exit} {report}");
                lose(&network.left, channel, false).unwrap();
                continue;
            }
            let rounds = source.ask("query-migrate", json!({})).unwrap();
            thread::sleep(Duration::from_millis(300));
            lose(&network.left, channel, false).unwrap();
            let passed = rounds["return"]["ram"]["dirty-sync-count"].as_u64().unwrap();
            // It was in the middle of one.
            wait_for(&source, |answer| answer["ram"]["dirty-sync-count"].as_u64() > Some(passed));
            let_it_leave(&source);
            assert_moved(source, destination, limits);
        }
    });
}

#[test]
fn a_stopped_peer_is_given_up_at_the_limit_and_waited_for_before() {
    time_limit(LIMIT, || {
        // The other phases have a destination that is stopped and a network that is cut.
        let phases = if times() > 1 { PHASES.repeat(times()) } else { vec![When::Rounds] };
        for when in phases {
            for (limits, source_stops) in [(SHORT, false), (SHORT, true), (LONG, false), (LONG, true)] {
                // The source is not heard before it has begun, and that is not limited.
                if source_stops && !matches!(when, When::Rounds) {
                    continue;
                }
                let context = format!("{when:?}, {limits}, source {source_stops}");
                let (_dir, source, destination, _) = in_phase(when, |dir| neighbours(dir, limits));
                let (stops, watches) = if source_stops { (&source, &destination) } else { (&destination, &source) };
                stop(stops);
                if limits == LONG {
                    thread::sleep(Duration::from_millis(300));
                    go_on(stops);
                    let_it_leave(&source);
                    assert_moved(source, destination, &context);
                    continue;
                }
                if source_stops {
                    let mut silent = None;
                    while silent.is_none() {
                        let said = watches.ask("query-migrate", json!({}));
                        silent = said.is_none_or(|answer| answer["return"]["status"] == "failed").then_some(());
                        thread::sleep(Duration::from_millis(10));
                    }
                    let (exit, report) = destination.end();
                    assert_eq!(exit, 1, "{context}: {report}");
                    go_on(&source);
                    assert_runs_on(&source, &context);
                } else {
                    assert_runs_on(&source, &context);
                    go_on(&destination);
                    if !matches!(when, When::Setup) {
                        let (exit, report) = destination.end();
                        assert!(exit != 0 && report["error"].is_string(), "{context}: {exit} {report}");
                    }
                }
            }
        }
    });
}
