//! The commit: hands the VM over as [`SourceCommit`] decides by what the destination says.

use multifd_proto::{
    commit::{SourceAction, SourceCommit, SourceEvent},
    extension::Extension,
};

use super::Run;
use crate::{
    error::Error,
    round::{device_trace::DeviceStep, trace::Step},
};

impl Run {
    /// Hands the VM over: the messages of both sides, as [`SourceCommit`] decides by them.
    pub(super) fn confirm(&mut self) -> Result<(), Error> {
        let begun = self.now();
        let two_step = self.extensions.contains(Extension::TwoStepCommit);
        self.commit = if two_step { SourceCommit::two_step() } else { SourceCommit::one_step() };
        if !two_step {
            // The destination starts the VM by itself when it has the last byte.
            self.shared.stop.commit()?;
        }
        let _ = self.commit.on(SourceEvent::EndBegins);
        self.return_path().expect_answer();
        let token = self.shared.options.format.token.filter(|_| self.extensions.contains(Extension::EndToken));
        let mut written = self.main().end(token);
        if two_step && written.is_err() {
            return written;
        }
        loop {
            if written.is_err() {
                // The destination hears no more. What it says now is its answer: it has what it needs to start, or refuses.
                if self.main().finish().is_err() {
                    self.return_path().hang_up();
                }
            }
            let (event, error) = self.return_path().next_answer();
            // A cancel that came before READY wins.
            let cancelled = event == SourceEvent::Ready && self.shared.stop.commit().is_err();
            match self.commit.on(if cancelled { SourceEvent::Stopped } else { event }) {
                SourceAction::WriteGo => {
                    self.lend(true);
                    self.shared.options.trace.step(|| Step::Device(DeviceStep::Go));
                    written = self.main().go();
                }
                SourceAction::Finish => break,
                SourceAction::Resume => return Err(error),
                SourceAction::StayPaused | SourceAction::Nothing => {
                    return Err(Error::InDoubt { reason: Box::new(written.err().unwrap_or(error)) });
                }
            }
        }
        let now = self.now();
        self.report.downtime.confirm = now - begun;
        self.report.downtime.total = now - self.paused_at;
        Ok(())
    }
}
