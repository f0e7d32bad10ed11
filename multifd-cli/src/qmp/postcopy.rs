//! Tells the clients how far the source of a postcopy has come, in QEMU's states.
//!
//! `setup`, `active`, `device`, `postcopy-active`, and after each break `postcopy-paused`, `postcopy-recover-setup`, `postcopy-recover`,
//! `postcopy-active`.

use multifd::{
    postcopy::Source,
    progress::{Event, Observer, Phase},
};

use super::{Qmp, Role};
use crate::progress::lock;

/// An observer that tells the clients of phases.
pub struct WatchedPostcopy {
    qmp: Qmp,
    /// The destination was told to run the VM: what begins now is a recovery.
    is_recovery: bool,
}

impl WatchedPostcopy {
    /// The postcopy of `source` begins; with `is_recovery` it goes on with a VM that was handed over.
    pub fn begin(qmp: Qmp, source: &Source, is_recovery: bool) -> WatchedPostcopy {
        qmp.begin(Role::Source, source.progress(), None, None);
        lock(&qmp.shared.state).migration.set_postcopy(source.handle());
        WatchedPostcopy { qmp, is_recovery }
    }
}

impl Observer for WatchedPostcopy {
    fn event(&mut self, event: &Event) {
        let Event::Phase(phase) = event else { return };
        match (phase, self.is_recovery) {
            (Phase::Setup, false) => self.qmp.set_status("active"),
            // Until the destination listens again it is paused.
            (Phase::Setup, true) => {
                self.qmp.set_status("postcopy-recover-setup");
                self.qmp.set_status("postcopy-recover");
            }
            (Phase::Postcopy, _) => {
                self.qmp.set_status("postcopy-active");
                self.is_recovery = true;
            }
            _ => {}
        }
    }
}

impl Qmp {
    /// The destination is about to be told to run the VM.
    pub fn hands_over(&self) {
        self.set_status("device");
    }

    /// The connections broke, and the VM waits at the destination for memory.
    pub fn postcopy_pauses(&self) {
        self.set_status("postcopy-paused");
    }
}
