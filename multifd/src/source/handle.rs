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

    /// Switches over when the round that is being sent is over, whether or not the rest fits into the acceptable pause.
    ///
    /// Before the first round has begun it counts for that one. While the switchover is [held](Self::hold) it waits.
    /// Without effect once the guest is paused.
    pub fn switch_over(&self) {
        self.live.steering.switch_over();
    }

    /// With `true`, the switchover waits: the guest runs on and rounds go on, ten in a second where there is little to
    /// send, and more without channels where `stall_limit` is short. (A destination with a shorter one than the source takes that for silence.)
    /// With `false`, it comes as soon as the rest fits, as before.
    ///
    /// Returns whether it comes in time: `false` once it was decided to pause the guest, which is then not held. A hold has no
    /// limit of its own; rounds and time that pass meanwhile do not count towards those of
    /// [`Limits`](super::Limits). It ends by a cancel, an error or the limits of silence, as the migration does.
    pub fn hold(&self, hold: bool) -> bool {
        self.live.steering.hold(hold)
    }

    /// The counters of the migration.
    pub fn progress(&self) -> Progress {
        self.progress.clone()
    }

    /// The parameters that are in force.
    pub fn parameters(&self) -> Parameters {
        self.live.get()
    }

    /// Changes the parameters, at any moment. `change` gets those in force; what it changes holds once it has returned. It must not
    /// call this method itself: changes come one after the other, so that call would wait for its own end.
    ///
    /// The bandwidth counts from the next packet on, and has no effect once the guest is paused. The limits of convergence
    /// count from the end of the round on. The limits of the pause and of silence count from when the pause or the
    /// silence began.
    pub fn set_parameters(&self, change: impl FnOnce(&mut Parameters)) {
        self.live.change(change);
    }
}
