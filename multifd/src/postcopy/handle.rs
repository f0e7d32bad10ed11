//! Steers a postcopy from other threads while it runs.

use super::inbox::Inbox;
use crate::{
    error::Error,
    stop::StopHandle,
    sync::{Arc, Mutex, lock},
};

/// Steers a postcopy from other threads. Clones steer the same one.
#[derive(Clone)]
pub struct Handle {
    steered: Arc<Mutex<Steered>>,
}

struct Steered {
    /// Bytes per second in the background; `None` for no limit.
    max_bandwidth: Option<u64>,
    /// What ends the attempt under way, and what its threads wait at.
    attempt: Option<(StopHandle, Inbox)>,
}

impl Handle {
    pub(super) fn new(max_bandwidth: Option<u64>) -> Handle {
        Handle { steered: Arc::new(Mutex::new(Steered { max_bandwidth, attempt: None })) }
    }

    /// Bytes per second in the background; `None` for no limit.
    pub fn max_bandwidth(&self) -> Option<u64> {
        lock(&self.steered).max_bandwidth
    }

    /// Changes the limit of the background, also for the pages that wait for their turn at this moment; `None` for no limit. It
    /// holds for later attempts, too.
    pub fn set_max_bandwidth(&self, bytes_per_second: Option<u64>) {
        let mut steered = lock(&self.steered);
        steered.max_bandwidth = bytes_per_second;
        let inbox = steered.attempt.as_ref().map(|(_, inbox)| inbox.clone());
        // A thread that waits looks at the limit with the inbox locked.
        drop(steered);
        if let Some(inbox) = inbox {
            inbox.update(|_| {});
        }
    }

    /// Gives up the connections of the attempt under way, which ends with [`Error::Paused`] as the reason: what an operator has
    /// a source do whose network says nothing. [`Source::recover`](super::Source::recover) goes on. Returns whether this ended it.
    pub fn pause(&self) -> bool {
        let stop = lock(&self.steered).attempt.as_ref().map(|(stop, _)| stop.clone());
        stop.is_some_and(|stop| stop.stop(Error::Paused).is_none())
    }

    /// An attempt begins that ends by `stop`, and whose threads wait at `inbox`.
    pub(super) fn begin(&self, stop: &StopHandle, inbox: &Inbox) {
        lock(&self.steered).attempt = Some((stop.clone(), inbox.clone()));
    }

    /// It is over.
    pub(super) fn end(&self) {
        lock(&self.steered).attempt = None;
    }
}
