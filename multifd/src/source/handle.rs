//! Watches and steers one migration from other threads.

use super::parameters::{Live, Parameters};
use crate::{progress::Progress, stop::StopHandle};

/// Watches and steers one migration from any thread. Clones belong to the same one.
#[derive(Clone)]
pub struct Handle {
    pub(super) stop: StopHandle,
    pub(super) progress: Progress,
    pub(super) live: Live,
}

impl Handle {
    /// Cancels the migration, see [`StopHandle::cancel`].
    pub fn cancel(&self) {
        self.stop.cancel();
    }

    /// The counters of the migration.
    pub fn progress(&self) -> Progress {
        self.progress.clone()
    }

    /// The parameters that are in force.
    pub fn parameters(&self) -> Parameters {
        self.live.get()
    }

    /// Changes the parameters, at any moment. `change` gets those in force.
    ///
    /// The bandwidth counts from the next packet on, and has no effect once the guest is paused. The limits of convergence
    /// count from the end of the round on. The limits of the pause and of silence count from when the pause or the
    /// silence began.
    pub fn set_parameters(&self, change: impl FnOnce(&mut Parameters)) {
        self.live.change(change);
    }
}
