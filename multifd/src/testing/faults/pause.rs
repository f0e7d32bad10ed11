//! A destination that takes everything and does not answer: the pause has a limit, and a cancel ends it at any moment.

use std::{io::Read, sync::mpsc, thread, time::Duration};

use test_support::time_limit;

use super::injected::{BLOCKS, Guest, small};
use crate::{
    destination::Destination,
    error::Error,
    ram::Ram,
    source::{self, Handle, Peer, Source},
    testing::memory,
    testing::vm::TestDestination,
    vm::{DestinationVm, SectionId, VmError},
};

/// A VM whose first device loads only when the test says so.
struct Slow {
    vm: TestDestination,
    loading: mpsc::Sender<()>,
    gate: mpsc::Receiver<()>,
}

impl DestinationVm for Slow {
    fn prepare(&mut self, description: &[u8]) -> Result<Vec<u8>, VmError> {
        self.vm.prepare(description)
    }

    fn ram(&self) -> &Ram {
        self.vm.ram()
    }

    fn load(&mut self, section: &SectionId, input: &mut dyn Read) -> Result<(), VmError> {
        // Ends with the test.
        let _ = self.loading.send(());
        let _ = self.gate.recv();
        self.vm.load(section, input)
    }

    fn start(&mut self) -> Result<(), VmError> {
        self.vm.start()
    }
}

/// `options` with this limit for the pause.
fn limited(mut options: source::Options, limit: Option<Duration>) -> source::Options {
    options.parameters.pause_limit = limit;
    options
}

/// Migrates a guest to such a VM, calls `meanwhile` while it loads, and lets it load when the source has ended. Returns how the
/// source ended, whether the guest runs there, and whether the destination has started it.
fn migrate(options: source::Options, meanwhile: impl FnOnce(&Handle) + Send) -> (Error, bool, bool) {
    time_limit(Duration::from_secs(60), || {
        let (listener, connector) = memory::listener(1 << 20);
        let (loading, loads) = mpsc::channel();
        let never = loading.clone();
        let (open, gate) = mpsc::channel();
        let mut to = Slow { vm: TestDestination::new(Ram::for_test(&BLOCKS)), loading, gate };
        let mut guest = Guest::new();
        let source = Source::new(options);
        let handle = source.handle();
        let error = thread::scope(|scope| {
            let receiving =
                scope.spawn(|| Destination::new(Default::default()).run(&mut to, Box::new(listener), &mut ()));
            scope.spawn(move || {
                loads.recv().unwrap();
                meanwhile(&handle);
            });
            let sent = source.run(&mut guest.vm, &connector, &mut ());
            drop(open);
            // With a source that is no longer there.
            let _ = receiving.join().unwrap();
            // On a busy machine a limit may end the source before the destination loads anything.
            let _ = never.send(());
            sent.unwrap_err()
        });
        (error, guest.vm.writer.is_running(), to.vm.calls().contains(&"start"))
    })
}

const SHORT: Option<Duration> = Some(Duration::from_millis(100));

/// The guest was paused forever, and neither cancel nor any signal ended that.
#[test]
fn a_guest_resumes_when_the_destination_does_not_become_ready() {
    let (error, here, there) = migrate(limited(small(), SHORT), |_| {});
    assert!(matches!(error, Error::PauseLimit { .. }), "{error}");
    assert!(here && !there);
}

#[test]
fn the_limit_can_be_set_while_the_guest_is_paused() {
    let options = limited(small(), None);
    let (error, here, there) =
        migrate(options, |handle| handle.set_parameters(|parameters| parameters.pause_limit = SHORT));
    assert!(matches!(error, Error::PauseLimit { .. }), "{error}");
    assert!(here && !there);
}

#[test]
fn a_cancel_while_the_destination_loads_resumes_the_guest() {
    let (error, here, there) = migrate(limited(small(), None), Handle::cancel);
    assert!(matches!(error, Error::Cancelled), "{error}");
    assert!(here && !there);
}

/// What takes the VM over by itself may do so at any moment after the last byte. A cancel or a limit that comes before that
/// byte resumes the guest.
#[test]
fn with_a_qemu_the_limit_and_a_cancel_leave_the_outcome_in_doubt() {
    let qemu = || {
        let mut options = small();
        options.peer = Peer::Qemu;
        options
    };
    let limit = migrate(limited(qemu(), SHORT), |_| {});
    let cancel = migrate(limited(qemu(), None), |handle| {
        // By then the last byte has been written on any machine that is not very busy.
        thread::sleep(Duration::from_millis(200));
        handle.cancel();
    });
    for (error, here, _) in [limit, cancel] {
        match error {
            Error::InDoubt { reason } => {
                assert!(matches!(*reason, Error::PauseLimit { .. } | Error::Cancelled), "{reason}");
                assert!(!here);
            }
            error => assert!(here && matches!(error, Error::PauseLimit { .. } | Error::Cancelled), "{error}"),
        }
    }
}
