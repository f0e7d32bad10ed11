//! The end of a migration: all threads leave, and the VM is with the side that it belongs to.

use super::{Report, Run, return_path::ReturnPath};
use crate::{error::Error, sync::lock, threads::caught, vm::SourceVm};

impl Run {
    /// Ends all threads, and gives the VM back to whom it belongs to.
    pub(super) fn finish(mut self, vm: &mut dyn SourceVm, outcome: Result<(), Error>) -> Result<Report, Error> {
        let failure = outcome.err().map(|error| self.fail(error));
        if failure.is_none() {
            // A connection may not take the end: the limit of the pause, or a cancel, still ends it.
            whatever_happens("at the end of the connections", || {
                self.say_goodbye();
                Ok(())
            });
        }
        // What is still registered refers to what is about to go away.
        let _ = self.shared.stop.decide();
        // The connections close here; on success the destination has said that it needs them no longer.
        drop(self.main.take());
        self.report.auto_compression = self.ended.drain(..).filter_map(|channel| channel.compression()).collect();
        drop(self.return_path.take());
        self.shared.live.pause_limit.end();
        if self.tracking {
            whatever_happens("dirty log does not stop", || vm.dirty_log().stop().map_err(Error::dirty_log));
        }
        if self.report.throttle > 0 {
            whatever_happens("vCPUs stay slowed down", || {
                vm.throttle(0);
                Ok(())
            });
        }
        let Some(error) = failure else {
            if let (Some(report), Some(counters)) = (&mut self.report.zero_copy, &self.shared.zero_copy) {
                report.count(counters);
                report.refused = lock(&self.shared.copies_because).take();
            }
            self.report.finish(&self.shared.progress, self.shared.options.clock.now() - self.begun);
            return Ok(self.report);
        };
        if !matches!(error, Error::InDoubt { .. }) {
            self.lend(false);
        }
        if self.paused
            && !matches!(error, Error::InDoubt { .. })
            && let Err(resume) = caught(|| Ok(vm.resume())).unwrap_or_else(|panic| Err(panic.to_string().into()))
        {
            return Err(Error::NotResumed { first: Box::new(error), resume });
        }
        Err(error)
    }

    /// Ends all threads. Returns the first error of the migration, of which `error` is one.
    fn fail(&mut self, error: Error) -> Error {
        let not_first = self.shared.stop.stop(error);
        for channel in self.channels.drain(..) {
            // What they ran into is known: the first of it, or a consequence.
            drop(channel.join());
        }
        let refused = self.return_path.take().and_then(ReturnPath::end);
        let first = self.shared.stop.take_first();
        match (not_first, first) {
            // What interrupted the wait is the reason, and not the connection that ended with it.
            (Some(Error::InDoubt { .. }), Some(interruption)) => Error::InDoubt { reason: Box::new(interruption) },
            (Some(error @ (Error::InDoubt { .. } | Error::Refused { .. })), _) => error,
            // A connection that broke because the destination left: it may have said why.
            (_, Some(error @ Error::Io { .. })) => refused.unwrap_or(error),
            (not_first, first) => first.or(not_first).unwrap_or(Error::Unconfirmed),
        }
    }
}

/// Does `end`, a step of the end that no failure and no panic of the VMM's may keep from going on: the VM may be paused.
fn whatever_happens(otherwise: &'static str, end: impl FnOnce() -> Result<(), Error>) {
    if let Err(error) = caught(end) {
        tracing::warn!(%error, "{otherwise}");
    }
}
