//! Large device state that travels over the channels.

use std::{
    io::{Read, Write},
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    time::Duration,
};

use multifd_proto::extension::{Extension, Extensions};
use test_support::time_limit;

use super::{far::Far, machine, memory, trace::Trace, vm::TestSource};
use crate::{
    destination::{self, Destination, STATE_WINDOW},
    error::Error,
    ram::Ram,
    round::trace::Step,
    sections::{PACKET_STATE, Sections},
    source::{self, Peer, Source},
    sync::Arc,
    vm::{DestinationVm, SectionId, VmError},
};

const LIMIT: Duration = Duration::from_secs(120);

fn ram() -> Ram {
    Ram::for_test(&[("ram", 40)])
}

/// State that repeats nowhere within a packet.
fn state(len: usize, seed: u32) -> Vec<u8> {
    (0..len as u32 / 4 + 1).flat_map(|at| (at.wrapping_mul(0x9e37_79b1) ^ seed).to_le_bytes()).take(len).collect()
}

/// A source whose devices have these states, written in parts where its length is odd.
fn source(states: &[Vec<u8>]) -> TestSource {
    let mut vm = TestSource::new(ram());
    for page in (0..40).step_by(3) {
        assert!(vm.writer.write(page, 1 + page));
    }
    let states = states.to_vec();
    vm.at_save = Some(Box::new(move |out: &mut Sections| {
        for (instance, state) in states.iter().enumerate() {
            let instance = instance as u32;
            if state.len() % 2 == 0 {
                out.section("gpu", instance, 1, state)?;
                continue;
            }
            let write = |out: &mut dyn Write| Ok(state.chunks(70_001).try_for_each(|part| out.write_all(part))?);
            out.section_from("gpu", instance, 1, &mut { write })?;
        }
        Ok(())
    }));
    vm
}

/// Reads all state in parts, or so many bytes of each section.
struct Reader {
    ram: Ram,
    most: Option<usize>,
    loaded: Vec<(SectionId, Vec<u8>)>,
    started: bool,
    /// Bytes read so far.
    read: Arc<AtomicUsize>,
    /// How long it does not read what the window may hold.
    rests: Duration,
}

impl Reader {
    fn new(most: Option<usize>) -> Reader {
        Reader { ram: ram(), most, loaded: Vec::new(), started: false, read: Arc::default(), rests: Duration::ZERO }
    }
}

impl DestinationVm for Reader {
    fn ram(&self) -> &Ram {
        &self.ram
    }

    fn load(&mut self, section: &SectionId, input: &mut dyn Read) -> Result<(), VmError> {
        let (mut loaded, mut part) = (Vec::new(), vec![0; 65_537]);
        let most = match &*section.name {
            "gpu" => self.most.unwrap_or(usize::MAX),
            "cpu" => 14,
            _ => 0,
        };
        while loaded.len() < most {
            let room = part.len().min(most - loaded.len());
            match input.read(&mut part[..room])? {
                0 => break,
                n => loaded.extend_from_slice(&part[..n]),
            }
            self.read.store(loaded.len(), Relaxed);
            std::thread::sleep(std::mem::take(&mut self.rests));
        }
        self.loaded.push((section.clone(), loaded));
        Ok(())
    }

    fn start(&mut self) -> Result<(), VmError> {
        self.started = true;
        Ok(())
    }
}

type Ended = (Result<source::Report, Error>, Result<destination::Report, Error>);

fn migrate(vm: &mut TestSource, to: &mut Reader, options: source::Options, receiving: destination::Options) -> Ended {
    let (listener, connector) = memory::listener(1 << 16);
    time_limit(LIMIT, || {
        std::thread::scope(|scope| {
            let receiving = scope.spawn(|| Destination::new(receiving).run(to, Box::new(listener), &mut ()));
            let sent = Source::new(options).run(vm, &connector, &mut ());
            (sent, receiving.join().unwrap())
        })
    })
}

/// As [`migrate`], to a destination that is so far away.
fn migrate_far(vm: &mut TestSource, to: &mut Reader, options: source::Options) -> Ended {
    let (listener, inner) = memory::listener(1 << 16);
    let connector = Far::new(inner, |_| Some(Box::new(|| Ok(0u64)) as _)).away(Duration::from_millis(100));
    time_limit(LIMIT, || {
        std::thread::scope(|scope| {
            let receiving = scope.spawn(|| Destination::new(Default::default()).run(to, Box::new(listener), &mut ()));
            let sent = Source::new(options).run(vm, &connector, &mut ());
            (sent, receiving.join().unwrap())
        })
    })
}

fn channels(channels: u8) -> source::Options {
    let mut options = source::Options::default();
    options.plan.channels = channels;
    options
}

/// Migrates, and checks that each step was one of the machines that are proved.
fn migrate_in_steps(vm: &mut TestSource, to: &mut Reader, options: source::Options) -> Ended {
    let trace = Trace::recording();
    let count = options.plan.channels;
    let (mut options, mut receiving) = (options, destination::Options::default());
    (options.trace, receiving.trace) = (trace.clone(), trace.clone());
    let outcome = migrate(vm, to, options, receiving);
    if let Err(refused) = machine::check(&trace.steps(), count.into()) {
        panic!("{refused}");
    }
    outcome
}

#[test]
fn large_state_arrives_whole_and_in_order_over_the_channels() {
    let states = [
        state(3 * PACKET_STATE + 6, 1),
        state(PACKET_STATE, 2),
        state(2 * PACKET_STATE + 7, 3),
        state(PACKET_STATE - 1, 4),
        state(PACKET_STATE + 2, 5),
    ];
    for count in [1, 2, 5] {
        let trace = Trace::recording();
        let (mut options, mut receiving) = (channels(count), destination::Options::default());
        (options.trace, receiving.trace) = (trace.clone(), trace.clone());
        let (mut vm, mut to) = (source(&states), Reader::new(None));
        let (sent, received) = migrate(&mut vm, &mut to, options, receiving);
        received.unwrap();
        let sent = sent.unwrap();
        let gpus: Vec<_> = to.loaded.iter().filter(|(id, _)| id.name == "gpu").collect();
        assert_eq!(gpus.len(), states.len());
        for (instance, ((id, loaded), state)) in gpus.into_iter().zip(&states).enumerate() {
            assert!(loaded == state, "{count} channels, {instance}");
            // What fits into a packet goes over main, and its length is known.
            let known = state.len() % 2 == 0 || state.len() <= PACKET_STATE;
            let expected = SectionId {
                len: known.then_some(state.len() as u64),
                is_bounded: true,
                ..SectionId::new("gpu", instance as u32, 1)
            };
            assert_eq!(*id, expected);
        }
        let in_packets: usize = states.iter().map(Vec::len).filter(|len| *len > PACKET_STATE).sum();
        let on_main: usize = states.iter().map(Vec::len).filter(|len| *len <= PACKET_STATE).sum();
        let on_channels: u64 = sent.channel_bytes.iter().sum();
        assert!(on_channels as usize > in_packets, "{on_channels}");
        assert!((on_main..on_main + 10_000).contains(&(sent.main_bytes as usize)), "{}", sent.main_bytes);
        let steps = trace.steps();
        assert!(machine::check(&steps, count.into()).unwrap().started);
        assert_eq!(steps.iter().filter(|step| matches!(step, Step::State(_))).count(), 9);
    }
}

/// Main has carried next to nothing before the pause, so a path has it find its speed: state of 9 kB took two round trips more.
#[test]
fn far_away_little_state_travels_over_the_channels_that_have_had_pages() {
    let mut states: Vec<_> = (1..100).map(|seed| state(8999 + seed as usize, seed)).collect();
    states.push(state(3 * PACKET_STATE, 100));
    let all: usize = states.iter().map(Vec::len).sum();
    for (count, writes) in [(1, None), (40, None), (2, Some((7, 9)))] {
        let (mut vm, mut to) = (source(&states), Reader::new(None));
        vm.save_writes = writes;
        let (sent, received) = migrate_far(&mut vm, &mut to, channels(count));
        received.unwrap();
        let sent = sent.unwrap();
        let loaded: Vec<_> = to.loaded.iter().filter(|(id, _)| id.name == "gpu").map(|(_, loaded)| loaded).collect();
        assert!(loaded == states.iter().collect::<Vec<_>>());
        // Of each section its head, its end, and some 100 bytes in which it is described.
        assert!(sent.main_bytes < 25_000, "{}", sent.main_bytes);
        let (few, others) = sent.channel_bytes.split_at(usize::from(count).min(4));
        assert!(few.iter().sum::<u64>() as usize > all);
        // Hellos and SYNCs.
        assert!(others.iter().all(|bytes| *bytes < 10_000), "{others:?}");
    }
}

/// A QEMU must not see such a packet, and an older version of ours refuses it.
#[test]
fn a_destination_that_does_not_know_it_gets_all_state_on_main() {
    let states = [state(2 * PACKET_STATE, 1), state(2 * PACKET_STATE, 2)];
    let without = |extension| destination::Options {
        extensions: Extensions::known().without(extension),
        ..destination::Options::default()
    };
    let qemu = source::Options { peer: Peer::Qemu, ..channels(2) };
    for (options, receiving) in [
        (qemu, destination::Options::default()),
        (channels(0), destination::Options::default()),
        (channels(2), without(Extension::StatePackets)),
        // It would not know where sections end.
        (channels(2), without(Extension::SectionLength)),
    ] {
        let (mut vm, mut to) = (source(&states), Reader::new(Some(2 * PACKET_STATE)));
        let (sent, received) = migrate(&mut vm, &mut to, options, receiving);
        received.unwrap();
        let sent = sent.unwrap();
        let loaded: Vec<_> = to.loaded.iter().filter(|(id, _)| id.name == "gpu").map(|(_, loaded)| loaded).collect();
        assert!(loaded == states.iter().collect::<Vec<_>>());
        assert!(sent.main_bytes as usize > 4 * PACKET_STATE);
    }
}

/// The state of a VM that asks for it before the last round waits in memory, and goes over the channels behind that: it went over main.
#[test]
fn state_that_was_saved_before_the_last_round_arrives_as_well() {
    let states = [state((STATE_WINDOW as usize + 9) * PACKET_STATE, 1)];
    let (mut vm, mut to) = (source(&states), Reader::new(None));
    vm.save_writes = Some((7, 9));
    let (sent, received) = migrate_in_steps(&mut vm, &mut to, channels(2));
    received.unwrap();
    assert!(sent.unwrap().main_bytes < 10_000);
    assert!(to.loaded.last().unwrap().1 == states[0]);
}

/// Much more than the window of the destination and the buffers of the source have room for.
#[test]
fn state_that_is_longer_than_the_window_arrives_whole() {
    let states = [state((STATE_WINDOW as usize + 9) * PACKET_STATE + 2, 1)];
    let (mut vm, mut to) = (source(&states), Reader::new(None));
    // In which the channels come as far as there is room for packets, and would come further without the window.
    to.rests = Duration::from_millis(300);
    let (sent, received) = migrate_in_steps(&mut vm, &mut to, channels(3));
    received.unwrap();
    sent.unwrap();
    assert!(to.loaded.last().unwrap().1 == states[0]);
}

/// The channels wait for room in the window then, and the source for its channels.
#[test]
fn a_vm_that_reads_only_a_part_refuses_the_guest_which_runs_on() {
    let states = [state((STATE_WINDOW as usize + 9) * PACKET_STATE, 1)];
    let (mut vm, mut to) = (source(&states), Reader::new(Some(PACKET_STATE + 5)));
    let (sent, received) = migrate_in_steps(&mut vm, &mut to, channels(2));
    let Err(Error::Load { section, source }) = received else { panic!("{received:?}") };
    assert_eq!((&*section.name, &*source.to_string()), ("gpu", "the state has more bytes than were read"));
    assert!(matches!(sent, Err(Error::Refused { .. })), "{sent:?}");
    assert!(vm.writer.is_running() && !to.started);
}

#[test]
fn a_device_that_fails_in_the_middle_of_its_state_leaves_the_guest_at_the_source() {
    let mut vm = source(&[]);
    vm.at_save = Some(Box::new(|out: &mut Sections| {
        out.section_from("gpu", 0, 1, &mut |out| {
            out.write_all(&[1; 2 * PACKET_STATE + 1])?;
            Err("the device is busy".into())
        })
    }));
    let mut to = Reader::new(None);
    let (sent, received) = migrate(&mut vm, &mut to, channels(2), Default::default());
    assert_eq!(sent.unwrap_err().to_string(), "the VM could not save its state: the device is busy");
    assert!(received.is_err() && !to.started && vm.writer.is_running());
}

#[test]
fn a_cancel_in_the_middle_of_the_state_ends_every_wait() {
    for at_source in [true, false] {
        let mut vm = source(&[state((STATE_WINDOW as usize + 9) * PACKET_STATE, 1)]);
        let (listener, connector) = memory::listener(1 << 16);
        let (from, to) = (Source::new(channels(2)), Destination::new(Default::default()));
        let stop = if at_source { from.stop_handle() } else { to.stop_handle() };
        let mut reader = Reader::new(None);
        let read = reader.read.clone();
        let (sent, received) = time_limit(LIMIT, || {
            std::thread::scope(|scope| {
                let receiving = scope.spawn(|| to.run(&mut reader, Box::new(listener), &mut ()));
                scope.spawn(move || {
                    while read.load(Relaxed) < 2 * PACKET_STATE {
                        std::thread::yield_now();
                    }
                    stop.cancel();
                });
                let sent = from.run(&mut vm, &connector, &mut ());
                (sent, receiving.join().unwrap())
            })
        });
        // It may have come too late.
        let moved = sent.is_ok();
        assert_eq!((moved, reader.started), (received.is_ok(), received.is_ok()), "{sent:?} {received:?}");
        assert_ne!(vm.writer.is_running(), moved);
    }
}
