//! Each callback of either VMM in turn panics, in the thread that called `run`.
//!
//! The panic ends the migration as an error does: no thread stays behind, and exactly one side has the guest.

use std::time::Duration;

use test_support::time_limit;

use super::injected::{Attempt, BLOCKS, Guest, Owner, migrate, settle, small};
use crate::{
    destination::Destination,
    error::Error,
    progress::{Event, Observer},
    ram::Ram,
    source::Source,
    testing::memory,
    testing::vm::TestDestination,
};

/// The guest would have been paused for good, and the other threads would have waited for the one that panicked.
#[test]
fn the_guest_runs_on_when_any_callback_of_its_vmm_panics() {
    for index in 0..100 {
        let mut guest = Guest::new();
        (guest.vm.fail_at, guest.vm.panics) = (Some(index), true);
        let outcome = migrate(&mut guest, Attempt::new(small()), |_, _| {});
        if outcome.sent.is_ok() {
            assert!(index > 4, "only {index} callbacks");
            return;
        }
        assert!(matches!(outcome.sent, Err(Error::Panicked { .. })), "call {index}: {:?}", outcome.sent);
        guest.vm.panics = false;
        assert_eq!(settle(&mut guest, outcome, &format!("call {index}")), Owner::Source);
    }
    panic!("each call fails");
}

#[test]
fn the_guest_stays_at_the_source_when_the_destination_panics_while_it_loads() {
    for index in 0..2 {
        let mut guest = Guest::new();
        let mut attempt = Attempt::new(small());
        (attempt.load_fails_at, attempt.load_panics) = (Some(index), true);
        let outcome = migrate(&mut guest, attempt, |_, _| {});
        assert!(matches!(outcome.received, Err(Error::Panicked { .. })), "call {index}: {:?}", outcome.received);
        assert_eq!(settle(&mut guest, outcome, &format!("call {index}")), Owner::Source);
    }
}

/// Panics at the event with this index.
struct PanicsAt {
    index: usize,
    seen: usize,
}

impl PanicsAt {
    fn new(index: Option<usize>) -> PanicsAt {
        PanicsAt { index: index.unwrap_or(usize::MAX), seen: 0 }
    }
}

impl Observer for PanicsAt {
    fn event(&mut self, _event: &Event) {
        self.seen += 1;
        assert!(self.seen - 1 != self.index, "told to panic at event {}", self.index);
    }
}

/// Migrates with such observers. Returns the result of each side, whether the guest runs at the source, and whether it was
/// started at the destination.
fn observed(
    at_source: Option<usize>,
    at_destination: Option<usize>,
) -> (Result<(), Error>, Result<(), Error>, bool, bool) {
    time_limit(Duration::from_secs(60), || {
        let (listener, connector) = memory::listener(1 << 15);
        let mut guest = Guest::new();
        let mut to = TestDestination::new(Ram::for_test(&BLOCKS));
        let destination = Destination::new(Default::default());
        let stop = destination.stop_handle();
        let (sent, received) = std::thread::scope(|scope| {
            let to = &mut to;
            let receiving =
                scope.spawn(move || destination.run(to, Box::new(listener), &mut PanicsAt::new(at_destination)));
            let sent = Source::new(small()).run(&mut guest.vm, &connector, &mut PanicsAt::new(at_source));
            if sent.is_err() {
                // It may not even have connected.
                stop.cancel();
            }
            (sent.map(drop), receiving.join().unwrap().map(drop))
        });
        (sent, received, guest.vm.writer.is_running(), to.calls().contains(&"start"))
    })
}

#[test]
fn one_side_has_the_guest_when_an_observer_of_the_source_panics_at_any_event() {
    for index in 0..100 {
        let (sent, received, here, there) = observed(Some(index), None);
        if sent.is_ok() {
            assert!(index > 5, "only {index} events");
            return;
        }
        assert!(here != there, "event {index} of the source: {sent:?}, {received:?}");
        assert_eq!(there, matches!(sent, Err(Error::InDoubt { .. })), "event {index} of the source: {sent:?}");
    }
    panic!("each event fails");
}

/// The destination that has started the guest says so, whatever happens afterwards.
#[test]
fn one_side_has_the_guest_when_an_observer_of_the_destination_panics_at_any_event() {
    for index in 0..12 {
        let (sent, received, here, there) = observed(None, Some(index));
        assert!(here != there, "event {index} of the destination: {sent:?}, {received:?}");
        assert_eq!(there, received.is_ok(), "event {index} of the destination: {received:?}");
    }
}
