//! Device state that is sent while the guest runs, and sections of which the destination is told the length.

use std::{
    io::{Read, Write},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use multifd_proto::{
    command::{BodyLength, Command},
    encoder::MainEncoder,
    extension::{Extension, Extensions, Offer},
    stream::{Section, SectionKind},
};
use test_support::time_limit;

use super::{
    memory,
    vm::{AtLive, TestDestination, TestSource},
};
use crate::{
    destination::{self, Destination},
    error::Error,
    ram::Ram,
    section_body::chunk_head,
    sections::{LIVE_ROOM, Sections},
    source::{self, Peer, Source},
    transport::Connect,
    vm::{DestinationVm, SectionId, VmError},
};

const LIMIT: Duration = Duration::from_secs(120);

fn ram() -> Ram {
    Ram::for_test(&[("ram", 40)])
}

/// A source that sends state as `at_live` does.
fn source(at_live: AtLive) -> TestSource {
    let mut vm = TestSource::new(ram());
    for page in (0..40).step_by(3) {
        assert!(vm.writer.write(page, 1 + page));
    }
    vm.at_live = Some(at_live);
    vm
}

/// Sends the number of the round, and has an endless amount to come in the first `rounds`.
fn numbered(rounds: u64) -> AtLive {
    Box::new(move |out: &mut Sections| {
        let round = out.live_rounds();
        out.section("live", 3, 2, &round.to_be_bytes())?;
        Ok(if round < rounds { u64::MAX } else { 0 })
    })
}

fn migrate(
    vm: &mut TestSource,
    to: &mut (dyn DestinationVm + Send),
    options: source::Options,
    receiving: destination::Options,
) -> (Result<source::Report, Error>, Result<destination::Report, Error>) {
    let (listener, connector) = memory::listener(1 << 16);
    time_limit(LIMIT, || {
        std::thread::scope(|scope| {
            let receiving = scope.spawn(|| Destination::new(receiving).run(to, Box::new(listener), &mut ()));
            let sent = Source::new(options).run(vm, &connector, &mut ());
            (sent, receiving.join().unwrap())
        })
    })
}

fn count(vm: &TestSource, call: &str) -> usize {
    vm.calls().iter().filter(|&&made| made == call).count()
}

#[test]
fn state_arrives_early_and_in_order_and_what_is_to_come_keeps_the_guest_running() {
    for channels in [0, 2] {
        let mut vm = source(numbered(3));
        let mut to = TestDestination::new(ram());
        let mut options = source::Options::default();
        options.plan.channels = channels;
        let (sent, received) = migrate(&mut vm, &mut to, options, Default::default());
        received.unwrap();
        let sent = sent.unwrap();
        // Rounds 0 to 2 said that more is to come, so there was one more, and the last one with the guest paused.
        assert_eq!((sent.rounds_total, sent.live_state), (5, 4 * 8));
        let expected = SectionId { len: Some(8), is_bounded: true, ..SectionId::new("live", 3, 2) };
        let states: Vec<_> = to.live.iter().map(|(_, state)| state.clone()).collect();
        assert_eq!(states, [0u64, 1, 2, 3].map(u64::to_be_bytes));
        assert!(to.live.iter().all(|(id, _)| *id == expected), "{:?}", to.live);
        assert_eq!(to.loaded.len(), 2, "what `save` writes comes as well");
        assert_eq!(vm.live_rounds, Some(4));
        assert_eq!(to.calls()[..6], ["prepare", "load", "load", "load", "load", "load"]);
        let calls = vm.calls();
        let last = calls.iter().rposition(|call| *call == "save_live").unwrap();
        assert!(calls[last..].contains(&"pause") && !calls[..last].contains(&"pause"), "{calls:?}");
    }
}

/// The guest was paused when its state had been written, and waited for a destination that still loaded it: 8 MiB of a display were
/// most of the pause of a live upgrade.
#[test]
fn the_guest_runs_until_the_destination_has_loaded_what_came_early() {
    struct Slow(TestDestination, Arc<AtomicUsize>);

    impl DestinationVm for Slow {
        fn ram(&self) -> &Ram {
            self.0.ram()
        }

        fn load(&mut self, section: &SectionId, input: &mut dyn Read) -> Result<(), VmError> {
            self.0.load(section, input)?;
            if section.name == "live" {
                // Long enough for a source that does not wait.
                std::thread::sleep(Duration::from_millis(50));
                self.1.fetch_add(1, SeqCst);
            }
            Ok(())
        }

        fn start(&mut self) -> Result<(), VmError> {
            self.0.start()
        }
    }

    let loaded = Arc::new(AtomicUsize::new(0));
    let mut vm = source(numbered(1));
    let (seen, found) = (loaded.clone(), Arc::new(AtomicUsize::new(0)));
    let finds = found.clone();
    vm.at_save = Some(Box::new(move |_: &mut Sections| {
        finds.store(seen.load(SeqCst), SeqCst);
        Ok(())
    }));
    let mut to = Slow(TestDestination::new(ram()), loaded);
    let (sent, received) = migrate(&mut vm, &mut to, Default::default(), Default::default());
    received.unwrap();
    sent.unwrap();
    assert_eq!(found.load(SeqCst), 2, "sections loaded when the guest was paused");
}

#[test]
fn a_device_with_ever_more_to_come_ends_the_migration_at_its_limits_and_the_next_attempt_begins_anew() {
    let mut vm = source(numbered(u64::MAX));
    let mut options = source::Options::default();
    options.parameters.limits.rounds = Some(4);
    let mut to = TestDestination::new(ram());
    let (sent, received) = migrate(&mut vm, &mut to, options.clone(), Default::default());
    assert!(matches!(sent, Err(Error::DoesNotConverge { rounds: 4, .. })), "{sent:?}");
    assert!(received.is_err() && vm.writer.is_running());
    assert_eq!(count(&vm, "save_live"), 4);

    vm.at_live = Some(numbered(1));
    let mut to = TestDestination::new(ram());
    let (sent, received) = migrate(&mut vm, &mut to, options, Default::default());
    received.unwrap();
    sent.unwrap();
    let states: Vec<_> = to.live.iter().map(|(_, state)| state.clone()).collect();
    assert_eq!(states, [0u64, 1].map(u64::to_be_bytes));
}

#[test]
fn a_device_that_is_told_to_switch_over_at_the_limit_does() {
    let mut vm = source(numbered(u64::MAX));
    let mut options = source::Options::default();
    options.parameters.limits.rounds = Some(2);
    options.parameters.limits.at_limit = source::AtLimit::SwitchOver;
    let mut to = TestDestination::new(ram());
    let (sent, received) = migrate(&mut vm, &mut to, options, Default::default());
    received.unwrap();
    sent.unwrap();
    assert_eq!(vm.live_rounds, Some(2));
}

#[test]
fn more_state_than_one_round_has_room_for_ends_the_migration_and_the_guest_runs_on() {
    let too_much = |out: &mut Sections| {
        assert_eq!(out.room(), LIVE_ROOM);
        out.section("live", 0, 1, &vec![0; LIVE_ROOM as usize + 1])?;
        Ok(0)
    };
    let mut vm = source(Box::new(too_much));
    let mut to = TestDestination::new(ram());
    let (sent, received) = migrate(&mut vm, &mut to, Default::default(), Default::default());
    let error = sent.unwrap_err().to_string();
    assert_eq!(error, "the VM could not send its state while it runs: more state than there is room for in one round");
    assert!(received.is_err() && vm.writer.is_running() && !to.calls().contains(&"start"));
}

/// A QEMU must not see a byte of it, and an older version of ours does not understand it.
#[test]
fn a_destination_that_does_not_take_it_gets_all_state_at_the_end_and_no_lengths() {
    /// It finds the ends of sections by itself.
    struct Strict(TestDestination);

    impl DestinationVm for Strict {
        fn ram(&self) -> &Ram {
            self.0.ram()
        }

        fn load(&mut self, section: &SectionId, input: &mut dyn Read) -> Result<(), VmError> {
            assert_eq!((section.len, section.is_bounded), (None, false));
            self.0.load(section, input)
        }

        fn start(&mut self) -> Result<(), VmError> {
            self.0.start()
        }
    }

    let qemu = source::Options { peer: Peer::Qemu, ..Default::default() };
    let older = Extensions::known().without(Extension::SectionLength);
    let older = destination::Options { extensions: older, ..Default::default() };
    for (options, receiving) in [(qemu, Default::default()), (Default::default(), older)] {
        let mut vm = source(numbered(1));
        let mut to = Strict(TestDestination::new(ram()));
        let (sent, received) = migrate(&mut vm, &mut to, options, receiving);
        received.unwrap();
        sent.unwrap();
        assert_eq!((count(&vm, "save_live"), vm.live_rounds), (0, Some(0)));
        assert!(to.0.live.is_empty() && to.0.loaded.len() == 2);
    }
}

/// Reads `bytes` of each section, or to its end.
struct Reader {
    vm: TestDestination,
    bytes: Option<usize>,
    seen: Vec<(SectionId, usize)>,
}

impl Reader {
    fn new(bytes: Option<usize>) -> Reader {
        Reader { vm: TestDestination::new(ram()), bytes, seen: Vec::new() }
    }
}

impl DestinationVm for Reader {
    fn ram(&self) -> &Ram {
        self.vm.ram()
    }

    fn load(&mut self, section: &SectionId, input: &mut dyn Read) -> Result<(), VmError> {
        let mut state = Vec::new();
        match self.bytes {
            Some(bytes) => {
                state.resize(bytes, 0);
                input.read_exact(&mut state)?;
            }
            None => _ = input.read_to_end(&mut state)?,
        }
        self.seen.push((section.clone(), state.len()));
        Ok(())
    }

    fn start(&mut self) -> Result<(), VmError> {
        self.vm.start()
    }
}

#[test]
fn a_section_is_read_to_its_end_whether_its_length_was_known_or_not() {
    for written_first in [false, true] {
        let mut vm = source(Box::new(|out: &mut Sections| {
            let mut write = |out: &mut dyn Write| -> Result<(), VmError> {
                out.write_all(b"a few")?;
                out.write_all(&[1; 100_000])?;
                Ok(out.write_all(&[2; 70_000])?)
            };
            out.section_from("pieces", 0, 1, &mut write)?;
            out.section_from("none", 0, 1, &mut |_| Ok(()))?;
            out.framed("framed", 0, 1, b"state")?;
            Ok(0)
        }));
        // The state that waits until the last pages were sent goes the same way.
        vm.save_writes = written_first.then_some((7, 9));
        let mut to = Reader::new(None);
        let (sent, received) = migrate(&mut vm, &mut to, Default::default(), Default::default());
        received.unwrap();
        sent.unwrap();
        let seen: Vec<_> = to.seen.iter().map(|(id, read)| (&*id.name, id.len, *read, id.is_bounded)).collect();
        let early = [("pieces", None, 170_005, true), ("none", None, 0, true), ("framed", Some(13), 13, true)];
        assert_eq!(seen, [&early[..], &[("cpu", Some(14), 14, true), ("timer", Some(0), 0, true)]].concat());
    }
}

#[test]
fn a_vm_that_reads_less_than_there_is_or_more_refuses_the_guest_which_runs_on() {
    for (bytes, reason) in [(13, "the state has more bytes than were read"), (15, "failed to fill whole buffer")] {
        let mut vm = TestSource::new(ram());
        let mut to = Reader::new(Some(bytes));
        let (sent, received) = migrate(&mut vm, &mut to, Default::default(), Default::default());
        let Err(Error::Load { section, source }) = received else { panic!("{received:?}") };
        assert_eq!((&*section.name, &*source.to_string()), ("cpu", reason));
        assert!(matches!(sent, Err(Error::Refused { .. })), "{sent:?}");
        assert!(vm.writer.is_running() && !to.vm.calls().contains(&"start"));
    }
}

/// Main of a source of ours up to the state of a device, which is `len` long.
fn early(extensions: Extensions, len: BodyLength) -> MainEncoder {
    let mut encoder = MainEncoder::default();
    encoder.header().configuration("multifd").config_offer(&Offer { channels: 0, token: None, extensions });
    encoder.command(&Command::OpenReturnPath).command(&Command::SectionLength(len));
    let (kind, name) = (SectionKind::Full, "live".to_owned());
    encoder.section(&Section { kind, id: 7, name, instance: 0, version: 1 });
    encoder
}

/// Lets a destination hear `bytes`, and then nothing more. Returns how it ends, and what it has loaded.
fn hears(bytes: &[u8], extensions: Extensions) -> (Error, usize) {
    time_limit(LIMIT, || {
        let (listener, connector) = memory::listener(1 << 20);
        // It still listens.
        let (mut sends, _receives) = connector.connect().unwrap().split().unwrap();
        sends.write(bytes, &[]).unwrap();
        sends.finish().unwrap();
        let mut to = Reader::new(None);
        let options = destination::Options { extensions, ..Default::default() };
        let error = Destination::new(options).run(&mut to, Box::new(listener), &mut ()).unwrap_err();
        assert!(!to.vm.calls().contains(&"start"));
        (error, to.seen.len())
    })
}

#[test]
fn state_that_is_cut_off_anywhere_is_not_taken_for_a_whole_one() {
    let chunks = [&chunk_head(3)[..], b"sta", &chunk_head(2), b"te", &chunk_head(0)].concat();
    for (len, body) in [(BodyLength::Bytes(5), b"state".to_vec()), (BodyLength::Chunks, chunks)] {
        let head = early(Extensions::known(), len).bytes.clone();
        let whole = [&head[..], &body].concat();
        for cut in head.len() - 10..whole.len() {
            let (error, loaded) = hears(&whole[..cut], Extensions::known());
            assert!(matches!(error, Error::Io { .. } | Error::Load { .. }), "{cut}: {error}");
            assert_eq!(loaded, 0, "{cut}");
        }
        let (_, loaded) = hears(&whole, Extensions::known());
        assert_eq!(loaded, 1);
    }
}

#[test]
fn a_length_that_was_not_agreed_on_or_belongs_to_no_section_is_refused() {
    let known = Extensions::known;
    let without = || known().without(Extension::SectionLength);
    let mut lone = early(known(), BodyLength::Bytes(0));
    lone.footer(7).command(&Command::SectionLength(BodyLength::Bytes(0))).eof();
    let mut twice = early(known(), BodyLength::Bytes(0));
    let length = Command::SectionLength(BodyLength::Bytes(0));
    twice.footer(7).command(&length).command(&length);
    for (bytes, extensions, message) in [
        (early(known(), BodyLength::Bytes(1)), without(), "SECTION_LENGTH without being agreed on"),
        (early(without(), BodyLength::Bytes(1)), known(), "SECTION_LENGTH from a source that has not offered it"),
        (lone, known(), "EOF between SECTION_LENGTH and its section"),
        (twice, known(), "COMMAND between SECTION_LENGTH and its section"),
    ] {
        let (error, _) = hears(&bytes.bytes, extensions);
        assert!(error.to_string().contains(message), "{error}, expected {message}");
    }
}
