//! What a guest says of itself, also while a migration has it.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{memory::field, pattern::Pattern, process::reported, sys::Mapping, worker::Reins};

/// Follows a guest while others have it.
#[derive(Clone)]
pub struct Monitor {
    pub(crate) control: Arc<Mapping>,
    pub(crate) reins: Vec<Arc<Reins>>,
    pub(crate) pattern: Pattern,
    /// When it was asked last, and the pages until then.
    pub(crate) last: Option<(Instant, u64)>,
}

impl Monitor {
    /// What the guest reports at this moment, with the speed since the previous call.
    pub fn status(&mut self) -> Status {
        let now = Instant::now();
        let sum = |field| (0..self.reins.len()).map(|index| reported(&self.control, index, field)).sum();
        let pages_written: u64 = sum(field::PAGES_DONE);
        let since = self.last.replace((now, pages_written));
        let pages_per_second = since.map_or(0.0, |(then, pages)| {
            pages_written.saturating_sub(pages) as f64 / (now - then).as_secs_f64().max(1e-9)
        });
        Status {
            passes: self.passes(),
            pages_written,
            pages_per_second,
            wrong_words: sum(field::WRONG_WORDS),
            register_errors: sum(field::REGISTER_ERRORS),
            report_errors: sum(field::REPORT_ERRORS),
            failure: self.reins.iter().find_map(|reins| reins.failure()),
        }
    }

    /// Waits until each CPU has gone `passes` more times over its whole share. Returns whether it has: not when the time
    /// is over, the guest is paused, or a CPU ended.
    pub fn wait_passes(&self, passes: u64, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let targets: Vec<u64> =
            (0..self.reins.len()).map(|index| self.pages_done(index) + passes * self.share(index)).collect();
        self.reins.iter().zip(targets).all(|(reins, target)| reins.wait_done(target, deadline))
    }

    /// Complete passes of the CPU that has made the fewest.
    fn passes(&self) -> u64 {
        (0..self.reins.len()).map(|index| self.pages_done(index) / self.share(index)).min().unwrap_or(0)
    }

    fn pages_done(&self, index: usize) -> u64 {
        reported(&self.control, index, field::PAGES_DONE)
    }

    fn share(&self, index: usize) -> u64 {
        let share = self.pattern.share(index as u64, self.reins.len() as u64);
        share.end - share.start
    }
}

/// What a guest reports about itself.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Status {
    /// Complete passes over the working set.
    pub passes: u64,
    /// Pages written since the beginning, over all passes.
    pub pages_written: u64,
    /// The same per second, since the previous status of the same monitor; 0 for the first.
    pub pages_per_second: f64,
    /// Words that were not what the previous pass had left there.
    pub wrong_words: u64,
    /// How often the counter in a vector register was wrong at the end of a pass.
    pub register_errors: u64,
    /// How often a CPU's page in the control block was not what the CPU had written there.
    pub report_errors: u64,
    /// Why a CPU ended, if one did.
    pub failure: Option<String>,
}

impl Status {
    /// All that the guest found wrong.
    pub fn guest_errors(&self) -> u64 {
        self.wrong_words + self.register_errors + self.report_errors
    }
}
