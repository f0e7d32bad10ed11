//! What may change while a migration runs.

use std::time::Duration;

use super::convergence::Limits;

use super::{pause_limit::PauseLimit, steering::Steering};
use crate::{
    limiter::Limiter,
    sync::{Arc, Mutex, lock},
};

/// Limits of a migration, which may change while it runs.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Parameters {
    /// Bytes per second on all connections together while the guest runs; `None` for no limit. So little that fewer than 4 KiB are sent within
    /// the `stall_limit` of either side is silence, and ends the migration as a silent peer does; 0 sends nothing (QEMU's 0, no limit, is
    /// `None`).
    pub max_bandwidth: Option<u64>,
    /// When to switch over, when to give up.
    pub limits: Limits,
    /// The longest pause of the guest, from the call of [`SourceVm::pause`](crate::vm::SourceVm::pause) on; `None` for no
    /// limit. When it has passed, the guest resumes, or, where the destination was told to start it and has not answered,
    /// the outcome is in doubt.
    pub pause_limit: Option<Duration>,
    /// How long the destination may take fewer than 4 KiB on all connections while the guest runs; `None` for no limit.
    pub stall_limit: Option<Duration>,
}

impl Default for Parameters {
    /// No limit on bandwidth, those of [`Limits`], two minutes for the pause and for silence.
    fn default() -> Parameters {
        Parameters {
            max_bandwidth: None,
            limits: Limits::default(),
            pause_limit: Some(Duration::from_secs(120)),
            stall_limit: Some(Duration::from_secs(120)),
        }
    }
}

/// The parameters of one migration, with what each takes effect on. Clones are the same parameters.
#[derive(Clone)]
pub(super) struct Live {
    parameters: Arc<Mutex<Parameters>>,
    /// Held by the thread that changes them.
    changing: Arc<Mutex<()>>,
    pub(super) limiter: Limiter,
    pub(super) pause_limit: PauseLimit,
    pub(super) steering: Steering,
}

impl Live {
    pub(super) fn new(parameters: Parameters, pause_limit: PauseLimit) -> Live {
        let limiter = Limiter::new(parameters.max_bandwidth);
        let (parameters, changing) = (Arc::new(Mutex::new(parameters)), Arc::default());
        Live { parameters, changing, limiter, pause_limit, steering: Steering::default() }
    }

    pub(super) fn get(&self) -> Parameters {
        lock(&self.parameters).clone()
    }

    /// Changes what `change` changes. Changes of several threads come one after the other, and nothing else waits for them: `change` is
    /// the VMM's.
    pub(super) fn change(&self, change: impl FnOnce(&mut Parameters)) {
        let _turn = lock(&self.changing);
        let before = self.get();
        let mut parameters = before.clone();
        change(&mut parameters);
        lock(&self.parameters).clone_from(&parameters);
        if parameters.max_bandwidth != before.max_bandwidth {
            self.limiter.set(parameters.max_bandwidth);
        }
        if parameters.pause_limit != before.pause_limit {
            self.pause_limit.set(parameters.pause_limit);
        }
    }
}
