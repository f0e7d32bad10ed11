//! The source describes its VM and the destination makes one like it: what both are told, and what ends the migration there.

use multifd_proto::{
    Codec,
    command::Command,
    encoder::MainEncoder,
    extension::{Extension, Extensions, Offer},
    return_path::Message,
};
use test_support::time_limit;

use super::script::*;
use crate::{
    destination::{self, Destination},
    error::{Error, Mismatch},
    ram::Ram,
    source::{self, Peer, Source},
    testing::memory,
    testing::vm::{TestDestination, TestSource},
    transport::Listen,
    vm::MAX_DESCRIPTION,
};

const LIMIT: std::time::Duration = std::time::Duration::from_secs(60);

fn ram() -> Ram {
    Ram::for_test(&BLOCKS)
}

/// Migrates `vm` to `to`.
fn migrate(
    vm: &mut TestSource,
    to: &mut TestDestination,
    options: source::Options,
    receiving: destination::Options,
) -> (Result<(), Error>, Result<(), Error>) {
    time_limit(LIMIT, || {
        let (listener, connector) = memory::listener(1 << 16);
        let destination = Destination::new(receiving);
        let stop = destination.stop_handle();
        std::thread::scope(|scope| {
            let receiving = scope.spawn(move || destination.run(to, Box::new(listener), &mut ()).map(drop));
            let sent = Source::new(options).run(vm, &connector, &mut ()).map(drop);
            if sent.is_err() {
                stop.cancel();
            }
            (sent, receiving.join().unwrap())
        })
    })
}

fn both() -> (TestSource, TestDestination) {
    let (mut vm, mut to) = (TestSource::new(ram()), TestDestination::new(ram()));
    vm.description = vec![7; 70_000];
    to.answer = b"most of it".to_vec();
    (vm, to)
}

#[test]
fn each_vm_is_told_what_the_other_says_before_there_is_memory() {
    for len in [0, 1, 70_000, MAX_DESCRIPTION as usize] {
        let (mut vm, mut to) = both();
        (vm.description, to.answer) = (vec![7; len], vec![9; len]);
        let (sent, received) = migrate(&mut vm, &mut to, Default::default(), Default::default());
        received.unwrap();
        sent.unwrap();
        assert!(to.description.as_ref() == Some(&vm.description), "{len}");
        assert!(!to.asked_early.into_inner(), "its memory was asked for before it was made");
        assert!(vm.answer.as_ref() == Some(&to.answer), "{len}");
        assert_eq!(vm.calls()[..3], ["describe", "agreed", "start log"]);
    }
}

/// A QEMU must not see a byte of it, and an older version of ours does not understand it.
#[test]
fn a_source_is_not_asked_where_the_destination_takes_no_description() {
    let qemu = source::Options { peer: Peer::Qemu, ..Default::default() };
    let older =
        destination::Options { extensions: Extensions::known().without(Extension::Prepare), ..Default::default() };
    for (options, receiving) in [(qemu, Default::default()), (Default::default(), older)] {
        let (mut vm, mut to) = both();
        let (sent, received) = migrate(&mut vm, &mut to, options, receiving);
        received.unwrap();
        sent.unwrap();
        assert_eq!(to.description.as_deref(), Some(&[][..]), "it is made all the same");
        assert!(vm.answer.is_none() && !vm.calls().contains(&"describe"));
    }
}

#[test]
fn what_the_destination_says_when_it_cannot_make_the_vm_reaches_the_source() {
    let (mut vm, mut to) = both();
    to.fail = Some("prepare");
    let (sent, received) = migrate(&mut vm, &mut to, Default::default(), Default::default());
    assert!(matches!(&received, Err(Error::Vm { .. })), "{received:?}");
    let Err(Error::Refused { reason: Some(reason), .. }) = sent else { panic!("{sent:?}") };
    assert_eq!(reason, "the VM could not be prepared: told to fail at prepare");
    assert!(vm.writer.is_running() && vm.answer.is_none() && !vm.calls().contains(&"start log"));
}

#[test]
fn a_description_or_answer_that_is_too_long_is_not_sent() {
    let (mut vm, mut to) = both();
    vm.description = vec![0; MAX_DESCRIPTION as usize + 1];
    let (sent, received) = migrate(&mut vm, &mut to, Default::default(), Default::default());
    let text = sent.unwrap_err().to_string();
    assert_eq!(text, "the VM could not describe itself: the description has 1048577 bytes, at most 1048576 are sent");
    assert!(received.is_err() && to.description.is_none());

    let (mut vm, mut to) = both();
    to.answer = vec![0; MAX_DESCRIPTION as usize + 1];
    let (sent, received) = migrate(&mut vm, &mut to, Default::default(), Default::default());
    let text = received.unwrap_err().to_string();
    assert_eq!(text, "the VM could not be prepared: the answer has 1048577 bytes, at most 1048576 are sent");
    assert!(matches!(sent, Err(Error::Refused { reason: Some(reason), .. }) if reason == text));
}

#[test]
fn memory_with_pages_of_another_size_than_the_vm_said_is_refused() {
    /// It makes memory whose pages it has not told the size of.
    struct Forgetful(TestDestination);

    impl crate::vm::DestinationVm for Forgetful {
        fn prepare(&mut self, description: &[u8]) -> Result<Vec<u8>, crate::vm::VmError> {
            self.0.prepare(description)
        }

        fn ram(&self) -> &Ram {
            self.0.ram()
        }

        fn load(&mut self, _: &crate::vm::SectionId, _: &mut dyn std::io::Read) -> Result<(), crate::vm::VmError> {
            unreachable!("there is no memory")
        }

        fn start(&mut self) -> Result<(), crate::vm::VmError> {
            unreachable!("there is no memory")
        }
    }

    let mut vm = TestSource::new(ram());
    let mut to = Forgetful(TestDestination::new(Ram::for_test_with_pages(16384, &[("ram", 2)])));
    let (listener, connector) = memory::listener(1 << 16);
    let (sent, received) = time_limit(LIMIT, || {
        std::thread::scope(|scope| {
            let receiving =
                scope.spawn(|| Destination::new(Default::default()).run(&mut to, Box::new(listener), &mut ()));
            let sent = Source::new(Default::default()).run(&mut vm, &connector, &mut ());
            (sent, receiving.join().unwrap())
        })
    });
    assert!(matches!(sent, Err(Error::Refused { .. })), "{sent:?}");
    let expected = Mismatch::PageSizeChanged { said: 4096, found: 16384 };
    assert!(matches!(received, Err(Error::Mismatch(found)) if found == expected));
}

/// The report says how long the guest's start took, and nothing else: the clock moves in it only.
#[test]
fn the_report_has_the_time_of_the_start() {
    use std::{
        sync::atomic::{AtomicU64, Ordering::SeqCst},
        time::Duration,
    };

    use crate::{clock::Clock, sync::Arc};

    struct Slow(TestDestination, Arc<AtomicU64>);

    impl crate::vm::DestinationVm for Slow {
        fn ram(&self) -> &Ram {
            &self.0.ram
        }

        fn load(
            &mut self,
            section: &crate::vm::SectionId,
            input: &mut dyn std::io::Read,
        ) -> Result<(), crate::vm::VmError> {
            self.0.load(section, input)
        }

        fn start(&mut self) -> Result<(), crate::vm::VmError> {
            self.1.fetch_add(7, SeqCst);
            Ok(())
        }
    }

    let seconds = Arc::new(AtomicU64::new(100));
    let now = seconds.clone();
    let clock = Clock::from_fn(move || Duration::from_secs(now.load(SeqCst)));
    let options = destination::Options { clock, ..Default::default() };
    let (listener, connector) = memory::listener(1 << 16);
    let mut to = Slow(TestDestination::new(ram()), seconds);
    let received = time_limit(LIMIT, || {
        std::thread::scope(|scope| {
            let running = scope.spawn(|| Destination::new(options).run(&mut to, Box::new(listener), &mut ()));
            Source::new(Default::default()).run(&mut TestSource::new(ram()), &connector, &mut ()).unwrap();
            running.join().unwrap().unwrap()
        })
    });
    let took = Duration::from_secs(7);
    assert_eq!((received.start, received.downtime, received.setup), (took, Some(took), Duration::ZERO));
}

/// Main of a source of ours up to its description of `len` bytes.
fn described(extensions: Extensions, len: u32) -> Wire {
    let mut encoder = MainEncoder::default();
    encoder.header().configuration("multifd").config_offer(&Offer { channels: 1, token: None, extensions });
    encoder.command(&Command::OpenReturnPath).command(&Command::Describe { len });
    Wire::from_encoder(&encoder)
}

#[test]
fn a_description_is_cut_off_anywhere_and_no_vm_is_made() {
    let whole = described(Extensions::known(), 5000).then(vec![1; 5000]);
    for missing in [1, 2, 4999, 5000, 5001] {
        let received = receive_untold(&[whole.clone().cut_by(missing)], Default::default());
        let error = received.outcome.unwrap_err();
        // The answer to the offer may find the connection closed.
        assert!(matches!(error, Error::Io { .. }), "{missing}: {error}");
        assert!(received.calls.is_empty(), "{missing}");
    }
}

#[test]
fn a_description_that_was_not_agreed_on_or_is_too_long_is_refused() {
    let options =
        || destination::Options { extensions: Extensions::known().without(Extension::Prepare), ..Default::default() };
    let unwanted = "DESCRIBE without being agreed on";
    let too_long = "description of the VM of 4294967295 bytes exceeds 1048576";
    for (wire, options, message) in [
        (described(Extensions::known(), 0), options(), unwanted),
        (described(Extensions::known(), u32::MAX), Default::default(), too_long),
        (
            described(Extensions::known().without(Extension::Prepare), 0),
            Default::default(),
            "from a source that has not",
        ),
    ] {
        let received = receive_untold(&[wire], options);
        let error = received.outcome.unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
        assert!(received.calls.is_empty());
    }
}

/// Lets a source hear `answers` of a destination that takes every extension. Returns why it ends.
fn hears(answers: &[u8]) -> Error {
    time_limit(LIMIT, || {
        let (mut listener, connector) = memory::listener(1 << 20);
        let (mut vm, _) = both();
        let mut options = source::Options::default();
        options.plan.channels = 1;
        let error = std::thread::scope(|scope| {
            let sending = scope.spawn(|| Source::new(options).run(&mut vm, &connector, &mut ()).unwrap_err());
            let mut main = listener.accept(None).unwrap().establish(None).unwrap();
            let mut bytes = Vec::new();
            // What was offered: no memory is handed over.
            Message::Accepted(Extensions::known().without(Extension::SharedMemory)).encode(&mut bytes);
            bytes.extend_from_slice(answers);
            main.write(&bytes, &[]).unwrap();
            // Until the source closes it.
            while matches!(main.read(&mut [0; 512]), Ok(1..)) {}
            drop((main, listener));
            sending.join().unwrap()
        });
        assert!(vm.writer.is_running() && vm.answer.is_none());
        error
    })
}

#[test]
fn an_answer_that_breaks_a_rule_ends_the_migration_and_the_vm_runs_on() {
    let mut too_long = Vec::new();
    Message::Prepared { len: MAX_DESCRIPTION + 1 }.encode(&mut too_long);
    let error = hears(&too_long).to_string();
    assert!(error.ends_with("answer to the description of the VM of 1048577 bytes exceeds 1048576"), "{error}");
    // Before the source has said anything: there was no DESCRIBE, as far as its order is concerned.
    let mut shut = Vec::new();
    Message::Reason("no room for\x1b[2J\n it".to_owned()).encode(&mut shut);
    Message::Shut(1).encode(&mut shut);
    let error = hears(&shut);
    assert!(matches!(&error, Error::Refused { reason: Some(text), .. } if text == "no room for [2J  it"), "{error}");
}
