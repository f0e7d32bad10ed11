//! Guests that are migrated by the engine while they write, from one to another in this process.

use std::{thread, time::Duration};

use multifd::{
    destination::{self, Destination},
    error::Error,
    source::{self, Report, Source},
    stop::StopHandle,
    transport::unix::{self, UnixConnector},
};
use multifd_guest::{
    guest::{Guest, GuestConfig, GuestError, Kind},
    log::DirtyLogChoice,
    memory::Backing,
    pace::Rate,
};
use test_support::{TempDir, skip, time_limit};

const LIMIT: Duration = Duration::from_secs(120);
const MIB: u64 = 1 << 20;

fn config(kind: Kind, dirty_log: DirtyLogChoice) -> GuestConfig {
    GuestConfig {
        kind,
        dirty_log,
        memory: 32 * MIB,
        working_set: 8 * MIB,
        write_rate: Rate::BytesPerSecond(40_000_000),
        ..GuestConfig::default()
    }
}

/// Every guest with every log that works here; the others are skipped with their reason.
fn each_guest(test: impl Fn(GuestConfig)) {
    let mut ran = 0;
    for (kind, log) in [
        (Kind::Process, DirtyLogChoice::UffdWp),
        (Kind::Process, DirtyLogChoice::Bitmap),
        (Kind::Kvm, DirtyLogChoice::UffdWp),
        (Kind::Kvm, DirtyLogChoice::KvmDirtyLog),
        (Kind::Kvm, DirtyLogChoice::KvmDirtyRing),
    ] {
        match Guest::create(&config(kind, log)) {
            Ok(_) => {
                ran += 1;
                time_limit(LIMIT, || test(config(kind, log)));
            }
            Err(why @ (GuestError::NoKvm { .. } | GuestError::NoDirtyLog { .. })) => {
                eprintln!("not with {} and {}: {why}", kind.name(), log.name());
            }
            Err(error) => panic!("{} with {}: {error}", kind.name(), log.name()),
        }
    }
    if ran < 2 {
        skip("only the process guest with its own bitmap is possible here");
    }
}

/// Migrates `guest`; returns both, and what each side says.
fn migrate(
    mut guest: Guest,
    incoming: &GuestConfig,
    options: source::Options,
    with_stop: impl FnOnce(StopHandle, StopHandle) + Send,
) -> (Guest, Guest, Result<Report, Error>, Result<destination::Report, Error>) {
    let dir = TempDir::new().unwrap();
    let path = dir.join("socket");
    let listener = unix::listen(&path).unwrap();
    let mut arrived = Guest::create_incoming(incoming).unwrap();
    let (source, destination) = (Source::new(options), Destination::new(destination::Options::default()));
    let (stop_source, stop_destination) = (source.stop_handle(), destination.stop_handle());
    let (sent, received) = thread::scope(|scope| {
        let into = &mut arrived;
        let receiving = scope.spawn(move || destination.run(into, Box::new(listener), &mut ()));
        scope.spawn(|| with_stop(stop_source, stop_destination));
        let sent = source.run(&mut guest, &UnixConnector::new(&path), &mut ());
        (sent, receiving.join().unwrap())
    });
    (guest, arrived, sent, received)
}

#[track_caller]
fn assert_sound(guest: &mut Guest) {
    guest.stop().unwrap();
    let report = guest.check_all().unwrap();
    assert_eq!(report.pages_different, 0, "{report}");
    assert!(guest.registers_agree().unwrap());
    let status = guest.status();
    assert_eq!((status.guest_errors(), &status.failure), (0, &None), "{status:?}");
}

#[test]
fn a_guest_moves_while_it_writes_and_nothing_is_lost() {
    each_guest(|config| {
        for (whole_pages, cpus, backing) in
            [(false, 1, Backing::Anonymous), (true, 2, Backing::Anonymous), (true, 1, Backing::Memfd)]
        {
            let config = GuestConfig { whole_pages, cpus, backing, ..config.clone() };
            let mut guest = Guest::create(&config).unwrap();
            guest.run();
            assert!(guest.wait_passes(1, LIMIT));
            let (guest, mut arrived, sent, received) = migrate(guest, &config, source::Options::default(), |_, _| {});
            let (report, _) = (sent.unwrap(), received.unwrap());
            assert!(report.rounds.len() > 1);
            let verified = arrived.verified().expect("the digests came").clone();
            assert_eq!((verified.pages_compared, verified.pages_different), (8192 + 512, 0), "{verified:?}");
            let before = guest.status().passes;
            drop(guest);
            assert!(arrived.wait_passes(2, LIMIT), "{:?}", arrived.status());
            assert!(arrived.status().passes >= before + 2);
            assert_sound(&mut arrived);
        }
    });
}

#[test]
fn a_guest_that_was_sent_on_is_still_right() {
    each_guest(|config| {
        let mut guest = Guest::create(&config).unwrap();
        guest.run();
        for _ in 0..3 {
            assert!(guest.wait_passes(1, LIMIT), "{:?}", guest.status());
            let (_, arrived, sent, received) = migrate(guest, &config, source::Options::default(), |_, _| {});
            sent.unwrap();
            received.unwrap();
            guest = arrived;
        }
        assert!(guest.wait_passes(1, LIMIT));
        assert_sound(&mut guest);
    });
}

#[test]
fn untouched_memory_stays_untouched_on_the_other_side() {
    each_guest(|config| {
        let config = GuestConfig { filled_percent: 0, ..config };
        let mut guest = Guest::create(&config).unwrap();
        guest.run();
        let (_, arrived, sent, received) = migrate(guest, &config, source::Options::default(), |_, _| {});
        let report = sent.unwrap();
        received.unwrap();
        assert_eq!(arrived.verified().unwrap().pages_different, 0);
        assert!(report.skipped + report.zero >= 24 * MIB / 4096, "{report:?}");
        if report.skipped > 0 {
            let touched = arrived.touched_pages();
            assert!(touched <= 8 * MIB / 4096 + 512, "{touched} pages are touched");
        }
    });
}

#[test]
fn after_a_failure_the_guest_runs_on_and_moves_at_the_second_attempt() {
    each_guest(|config| {
        // So slow that it cannot be over before it is cancelled.
        let mut slow = source::Options::default();
        slow.parameters.max_bandwidth = Some(4 << 20);
        for cancel_source in [true, false] {
            let mut guest = Guest::create(&config).unwrap();
            guest.run();
            let monitor = guest.monitor();
            let (guest, arrived, sent, received) = migrate(guest, &config, slow.clone(), |source, destination| {
                assert!(monitor.wait_passes(1, LIMIT));
                if cancel_source { source.cancel() } else { destination.cancel() }
            });
            assert!(sent.is_err() && received.is_err(), "{sent:?} {received:?}");
            drop(arrived);
            assert!(guest.wait_passes(1, LIMIT), "{:?}", guest.status());
            let (_, mut arrived, sent, received) = migrate(guest, &config, source::Options::default(), |_, _| {});
            sent.unwrap();
            received.unwrap();
            assert!(arrived.wait_passes(2, LIMIT));
            assert_sound(&mut arrived);
        }
    });
}
