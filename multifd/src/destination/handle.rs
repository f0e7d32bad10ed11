//! Steers a destination from other threads while it runs.

use super::shared::Shared;
use crate::sync::{Arc, Mutex, Weak, lock};

/// Steers a destination from other threads. Clones steer the same one.
#[derive(Clone, Default)]
pub struct Handle {
    /// What is steered, while there is anything.
    shared: Arc<Mutex<Weak<Shared>>>,
}

impl Handle {
    /// Gives up all connections to a source that has switched to postcopy, and waits for it to go on over new ones: what an operator
    /// does where the network says nothing. Returns whether it did.
    ///
    /// Nothing happens where the source has not switched, has sent all of its pages, or is not waited for
    /// ([`Options::recover_limit`](super::Options::recover_limit)).
    pub fn pause(&self) -> bool {
        let shared = lock(&self.shared).upgrade();
        shared.is_some_and(|shared| shared.give_up_connections())
    }

    pub(super) fn begin(&self, shared: &Arc<Shared>) {
        *lock(&self.shared) = Arc::downgrade(shared);
    }
}
