//! Whole migrations whose VMM decides when to switch over, or whose VM is not exact.

use std::time::Duration;

use test_support::time_limit;

use crate::{
    destination::Destination,
    error::Error,
    progress::{Event, Observer},
    ram::Ram,
    source::{AtLimit, Handle, Options, Report, Source},
    testing::memory,
    testing::vm::{TestDestination, TestSource},
};

const PAGES: usize = 300;

/// Calls `act` after each round that the guest ran in, with how many there were.
struct AfterRounds<'a> {
    rounds: u64,
    act: &'a mut dyn FnMut(u64),
}

impl Observer for AfterRounds<'_> {
    fn event(&mut self, event: &Event) {
        if let Event::Round(stats) = event
            && stats.guest_running
        {
            self.rounds += 1;
            (self.act)(self.rounds);
        }
    }
}

/// A guest that writes all its pages in each round, and one that writes nothing.
fn guest(writes: bool) -> TestSource {
    let mut vm = TestSource::new(Ram::for_test(&[("ram", PAGES)]));
    for page in 0..PAGES as u64 {
        vm.writer.write(page, page + 1);
    }
    let mut round = 0;
    vm.at_drain = Box::new(move |writer| {
        round += 1;
        for page in 0..PAGES as u64 {
            if writes {
                writer.write(page, round * 1000 + page);
            }
        }
    });
    vm
}

fn never_fits() -> Options {
    let mut options = Options::default();
    options.plan.channels = 2;
    options.parameters.limits.downtime = Duration::ZERO;
    options.parameters.limits.rounds = None;
    options
}

/// Migrates `vm`, and calls `act` with the handle after each round. Checks its memory, where it has moved.
fn migrate(
    vm: &mut TestSource,
    options: Options,
    mut act: impl FnMut(u64, &Handle),
) -> (Result<Report, Error>, Handle) {
    time_limit(Duration::from_secs(60), || {
        let (listener, connector) = memory::listener(1 << 16);
        let mut to = TestDestination::new(Ram::for_test(&[("ram", PAGES)]));
        let source = Source::new(options);
        let handle = source.handle();
        act(0, &handle);
        let sent = std::thread::scope(|scope| {
            let receiving =
                scope.spawn(|| Destination::new(Default::default()).run(&mut to, Box::new(listener), &mut ()));
            let mut act = |rounds| act(rounds, &handle);
            let sent = source.run(vm, &connector, &mut AfterRounds { rounds: 0, act: &mut act });
            assert_eq!(receiving.join().unwrap().is_ok(), sent.is_ok(), "{sent:?}");
            sent
        });
        if sent.is_ok() {
            for page in 0..PAGES as u64 {
                assert!(vm.writer_ram().page_bytes(page) == to.ram.page_bytes(page), "page {page} differs");
            }
        }
        assert_eq!(vm.writer.is_running(), sent.is_err());
        (sent, handle)
    })
}

#[test]
fn a_guest_that_never_fits_is_paused_when_it_is_told_to() {
    let mut vm = guest(true);
    let (sent, _) = migrate(&mut vm, never_fits(), |rounds, handle| {
        if rounds == 3 {
            handle.switch_over();
        }
    });
    // The decision about the third round was made when it was reported.
    assert_eq!(sent.unwrap().rounds_total, 4 + 1);
}

#[test]
fn a_guest_that_never_fits_is_paused_at_the_limit_where_that_is_asked_for() {
    for (at_limit, moves) in [(AtLimit::SwitchOver, true), (AtLimit::GiveUp, false)] {
        let mut options = never_fits();
        options.parameters.limits.rounds = Some(3);
        options.parameters.limits.at_limit = at_limit;
        let (sent, _) = migrate(&mut guest(true), options, |_, _| {});
        match sent {
            Ok(report) => assert!(moves && report.rounds_total == 3 + 1),
            Err(error) => assert!(!moves && matches!(error, Error::DoesNotConverge { .. }), "{error}"),
        }
    }
}

#[test]
fn a_switchover_that_is_held_comes_when_it_is_released() {
    for writes in [false, true] {
        let mut options = never_fits();
        // Of no effect while it is held.
        options.parameters.limits.rounds = Some(2);
        options.parameters.limits.at_limit = AtLimit::SwitchOver;
        let mut held = 0;
        let (sent, handle) = migrate(&mut guest(writes), options, |rounds, handle| {
            if rounds == 0 {
                assert!(handle.hold(true));
                handle.switch_over();
            }
            if rounds == 6 {
                held = rounds;
                assert!(handle.hold(false));
            }
        });
        let report = sent.unwrap();
        assert_eq!((held, report.rounds_total), (6, 7 + 1), "{writes}");
        assert!(!handle.hold(true), "it comes too late");
    }
}

/// What rounds without content are worth as a sign of life depends on it.
#[test]
fn an_empty_section_has_eighteen_bytes_on_main_alone() {
    let mut options = never_fits();
    options.plan.channels = 0;
    let (sent, _) = migrate(&mut guest(false), options, |rounds, handle| _ = handle.hold(rounds < 3));
    let report = sent.unwrap();
    let empty: Vec<u64> =
        report.rounds.iter().filter(|round| round.normal + round.zero == 0).map(|round| round.bytes).collect();
    assert!(empty.len() >= 2 && empty.iter().all(|bytes| *bytes >= 18), "{empty:?}");
}

#[test]
fn a_migration_that_is_held_can_be_cancelled() {
    let (sent, handle) = migrate(&mut guest(false), never_fits(), |rounds, handle| match rounds {
        0 => assert!(handle.hold(true)),
        4 => handle.cancel(),
        _ => {}
    });
    assert!(matches!(sent, Err(Error::Cancelled)), "{sent:?}");
    assert!(handle.hold(false), "the guest was not paused");
}

/// A source in a jail without `/proc`, or on a kernel that is too old, could not migrate.
#[test]
fn a_vm_that_cannot_tell_what_was_never_touched_sends_all() {
    let mut vm = guest(false);
    vm.untouched = (0..PAGES as u64).collect();
    vm.untouched_fails = true;
    let (sent, _) = migrate(&mut vm, Options::default(), |_, _| {});
    let report = sent.unwrap();
    assert_eq!((report.skipped, report.normal), (0, PAGES as u64));
}

#[test]
fn pages_that_there_are_not_are_left_out_and_counted() {
    let mut vm = guest(false);
    vm.at_drain = Box::new(|writer| {
        for page in [299, 300, 319, 320, u64::MAX] {
            writer.report(page);
        }
    });
    let (sent, _) = migrate(&mut vm, Options::default(), |_, _| {});
    let report = sent.unwrap();
    let drains = report.rounds_total;
    assert_eq!(report.dirty_outside, 4 * drains);
    assert_eq!(report.normal, PAGES as u64 + drains - 1);
}

/// A device of vhost-user writes its last answers when it is asked for its state: they were lost.
#[test]
fn what_is_written_while_the_state_is_saved_arrives_where_the_vm_says_that_it_may() {
    let mut vm = guest(false);
    vm.save_writes = Some((17, 0x1234));
    let (sent, _) = migrate(&mut vm, Options::default(), |_, _| {});
    assert_eq!(sent.unwrap().rounds_total, 2);
    assert_eq!(vm.writer_ram().page_bytes(17), 0x1234u64.to_ne_bytes().repeat(512));
    let calls = vm.calls();
    let last = |name| calls.iter().rposition(|call| *call == name).unwrap();
    assert!(last("pause") < last("save") && last("save") < last("drain"), "{calls:?}");
}
