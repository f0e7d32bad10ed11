//! Where the engine's time comes from: measured speed decides when to switch over, so tests bring their own.

use std::{sync::Arc, time::Duration};

/// Tells the time since some fixed moment. It never goes backwards.
#[derive(Clone)]
pub struct Clock(Arc<dyn Fn() -> Duration + Send + Sync>);

impl Clock {
    /// The monotonic clock of the machine.
    pub fn monotonic() -> Clock {
        let start = std::time::Instant::now();
        Clock(Arc::new(move || start.elapsed()))
    }

    /// A clock that tells what `now` returns.
    pub fn from_fn(now: impl Fn() -> Duration + Send + Sync + 'static) -> Clock {
        Clock(Arc::new(now))
    }

    pub(crate) fn now(&self) -> Duration {
        (self.0)()
    }
}

impl std::fmt::Debug for Clock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Clock").field(&self.now()).finish()
    }
}
