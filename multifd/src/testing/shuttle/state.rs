//! Device state in many packets on the channels, and state of the running guest, under schedules.
//!
//! Under shuttle a packet has at most 8 bytes and the window of the destination 4 packets, so channels wait for room, and main for packets.

use multifd_proto::rounds::Party;
use shuttle::rand::{Rng, thread_rng};

use super::{
    Beside, EARLY, Ending, Fault, Mode, Outcome, PER_SECTION, TestDestination, TestSource, Vanishing, explore,
    explore_endings, far, migrate, ram, receiving, source_vm,
};
use crate::{
    round::trace::Step,
    sync::{Arc, Mutex, lock},
};

/// Bytes of state of each section, in packets of at most 8: 5, none, 3 and 1.
const SECTIONS: [usize; 4] = [40, 3, 21, 9];
/// The instances of sections that are sent while the guest runs begin here.
const LIVE: u32 = 100;

/// What the section of this instance holds.
fn state(instance: u32) -> Vec<u8> {
    let len = SECTIONS.get(instance as usize).copied().unwrap_or(12);
    (0..len).map(|at| (instance as usize * 50 + at) as u8).collect()
}

/// A VM with these sections, which also sends one while it runs, in each of two rounds.
fn stateful() -> TestSource {
    let mut vm = source_vm();
    vm.at_save = Some(Box::new(|out| {
        for instance in 0..SECTIONS.len() as u32 {
            out.section("live", instance, 1, &state(instance))?;
        }
        Ok(())
    }));
    vm.at_live = Some(Box::new(|out| {
        let round = out.live_rounds() as u32;
        if round < 2 {
            out.section("live", LIVE + round, 1, &state(LIVE + round))?;
        }
        Ok(0)
    }));
    vm
}

/// Asserts that a destination was given all that [`stateful`] sends, in its order: what `at_save` is there for, of `rounds` with live state.
pub(super) fn assert_state(vm: &TestSource, to: &TestDestination) {
    let rounds = lock(&vm.calls).iter().filter(|&&call| call == "save_live").count();
    let saved = if vm.at_save.is_some() { SECTIONS.len() as u32 } else { 0 };
    let found: Vec<u32> = to.live.iter().map(|(section, _)| section.instance).collect();
    let sent = found.iter().filter(|&&instance| instance >= LIVE).count();
    assert!(sent <= rounds.min(2), "{found:?} of {rounds} rounds");
    let expected: Vec<u32> = (LIVE..LIVE + sent as u32).chain(0..saved).collect();
    assert_eq!(found, expected, "sections in their order");
    for (section, found) in &to.live {
        assert!(*found == state(section.instance), "section {} has {found:?}", section.instance);
    }
}

fn moved(mode: Mode, beside: Beside) -> Outcome {
    migrate(stateful(), TestDestination::new(ram()), mode, mode.source(), receiving(), beside)
}

const MODES: [(&str, Mode); 2] =
    [("FLUSH early", Mode { channels: 3, ..EARLY }), ("per section", Mode { channels: 2, ..PER_SECTION })];

#[test]
fn every_part_of_device_state_reaches_its_device_in_order() {
    for (distance, away) in [("near", false), ("far", true)] {
        for (name, mode) in MODES {
            explore(&format!("device state on channels, {distance}, {name}"), 300, move || {
                let outcome = moved(mode, if away { far() } else { Beside::default() });
                outcome.assert_migrated();
                outcome.assert_allowed();
                let steps = outcome.trace.steps();
                let packets = steps.iter().filter(|step| matches!(step, Step::State(Party::Channel(_)))).count();
                // And two or three of the section that each VM here has.
                assert!(packets >= 9 + 2, "{packets} packets on channels");
            });
        }
    }
}

#[test]
fn device_state_whose_channel_is_lost_leaves_one_guest() {
    for (name, mode) in MODES {
        let endings =
            explore_endings(&format!("device state, a channel of the source fails, {name}"), 300, move || {
                let connection = thread_rng().gen_range(1..=usize::from(mode.channels));
                moved(mode, Fault::new(Some(connection), thread_rng().gen_range(0..24)).at_source())
            });
        assert!(endings.of(Ending::Stayed) > 0 && endings.of(Ending::Moved) > 0, "{}", endings.text());
        let endings =
            explore_endings(&format!("device state, a connection of the destination fails, {name}"), 300, move || {
                // A channel that is lost before it has joined is waited for, up to a limit, and here is no clock: the source sees nothing of
                // it while it waits for PONG.
                let connection = thread_rng().gen_range(0..=usize::from(mode.channels));
                moved(mode, Fault::new(Some(connection), thread_rng().gen_range(10..80)).at_destination())
            });
        assert!(endings.of(Ending::Stayed) > 0 && endings.of(Ending::Moved) > 0, "{}", endings.text());
        let endings = explore_endings(&format!("device state, a source that vanishes, {name}"), 300, move || {
            let left = Arc::new(Mutex::new(thread_rng().gen_range(0..90_000)));
            let connect = move |inner| Box::new(Vanishing { inner, left: left.clone(), all: Arc::default() }) as _;
            moved(mode, Beside { connect: Box::new(connect), ..Default::default() })
        });
        assert!(endings.of(Ending::Stayed) > 0, "{}", endings.text());
    }
}
