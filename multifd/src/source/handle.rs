//! Watches and steers one migration from other threads.

use std::time::Duration;

use super::pause_limit::PauseLimit;
use crate::{limiter::Limiter, progress::Progress, stop::StopHandle};

/// Watches and steers one migration from any thread. Clones belong to the same one.
#[derive(Clone)]
pub struct Handle {
    pub(super) stop: StopHandle,
    pub(super) progress: Progress,
    pub(super) pause_limit: PauseLimit,
    pub(super) limiter: Limiter,
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

    /// Changes [`Options::pause_limit`](super::Options::pause_limit), also while the guest is paused.
    pub fn set_pause_limit(&self, limit: Option<Duration>) {
        self.pause_limit.set(limit);
    }

    /// Changes [`Options::max_bandwidth`](super::Options::max_bandwidth), in bytes per second. Without effect once the guest
    /// is paused.
    pub fn set_max_bandwidth(&self, bytes_per_second: Option<u64>) {
        self.limiter.set(bytes_per_second);
    }
}
