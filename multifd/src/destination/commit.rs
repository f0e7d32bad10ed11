//! The commit: takes the VM over as [`DestinationCommit`] decides, or refuses it.

use multifd_proto::{
    Violation,
    commit::{DestinationAction, DestinationCommit, DestinationEvent},
    extension::Extension,
    return_path::Message,
};

use super::{Mode, Run, Target};
use crate::{
    checkpoint::MAX_DEVICE_STATE,
    error::Error,
    pulse::Pulse,
    round::{device_trace::DeviceStep, trace::Step},
    sync::lock,
    threads::caught,
};

impl Run {
    /// Takes the VM over, as [`DestinationCommit`] decides by the messages of the source.
    pub(super) fn confirm(&mut self, target: &mut dyn Target) -> Result<(), Error> {
        let place = self.main().place();
        if self.report.mode == Mode::Snapshot {
            self.snapshot_is_whole(target)?;
        } else if !self.main().decoder().ram_ended() {
            return Err(Error::protocol(place)(Violation::UnexpectedElement {
                element: "end of the stream",
                place: "before the END section of ram",
            }));
        }
        match self.report.mode {
            Mode::Postcopy => {
                // Its source has said all: to load the devices is not its silence.
                Pulse::rest(self.watchdog.timers());
                self.postcopy_is_whole(target)?;
            }
            _ => self.nothing_is_missing()?,
        }
        if self.report.mode == Mode::Live {
            self.opaque_state_is_here()?;
        }
        // A source without uuid names one of zeros.
        let named = lock(&self.shared.seen).uuid.filter(|uuid| *uuid != [0; 16]);
        // What it takes to make everything durable is not the source's silence.
        Pulse::rest(self.watchdog.timers());
        target.make_durable(self.report.uuid.or(named))?;
        self.report.memory_elsewhere = target.memory_elsewhere();
        let two_step = self.extensions.contains(Extension::TwoStepCommit);
        let mut commit = if two_step { DestinationCommit::two_step() } else { DestinationCommit::one_step() };
        let mut action = commit.on(DestinationEvent::Loaded);
        if action == DestinationAction::WriteReady {
            self.watch_the_source();
            self.shared.options.trace.step(|| Step::Device(DeviceStep::Ready));
            self.main().reply(&Message::Ready)?;
            if let Err(error) = self.main().await_go() {
                // The source hears of it before its connections end: GO may be under way, and only we can tell.
                let action = commit.on(DestinationEvent::Stopped);
                debug_assert_eq!(action, DestinationAction::Refuse);
                return Err(error);
            }
            Pulse::rest(self.watchdog.timers());
            action = commit.on(DestinationEvent::Go);
        }
        debug_assert_eq!(action, DestinationAction::Start);
        // A cancel that came before wins.
        self.shared.stop.decide()?;
        let mut kept = target.commit();
        if two_step && kept.is_ok() {
            self.shared.options.trace.step(|| Step::Start);
            kept = self.start(target);
        }
        let _ = commit.on(if kept.is_ok() { DestinationEvent::Started } else { DestinationEvent::StartFailed });
        // What is left to do needs the source, and has a limit.
        self.shared.bound_the_end();
        let told = match &kept {
            Ok(()) => self.accept(),
            Err(_) if self.answered => Ok(()),
            Err(error) => {
                self.refuse(&error.to_string());
                Ok(())
            }
        };
        kept?;
        if two_step {
            // The VM runs here, and the source will not resume it, whether it heard of that or not.
            if let Err(error) = told {
                tracing::warn!(%error, "the VM runs here, and the source could not be told");
            }
            return Ok(());
        }
        // Without GO the source may resume when it has not heard of it: then the VM must not start here.
        told.map_err(|error| Error::InDoubt { reason: Box::new(error) })?;
        self.has_the_vm = true;
        self.shared.options.trace.step(|| Step::Start);
        self.start(target)
    }

    fn start(&mut self, target: &mut dyn Target) -> Result<(), Error> {
        let begun = self.shared.options.clock.now();
        let started = caught(|| Ok(target.start())).unwrap_or_else(|panic| {
            // It does not say that no vCPU has run, so the source must not resume its VM: as if this process had died.
            (self.answered, self.has_the_vm) = (true, true);
            let message = match panic {
                Error::Panicked { message } => message,
                other => other.to_string(),
            };
            let text =
                format!("{message}, in the start of the VM: it may run here, so the source is not told to resume it");
            Err(Error::Panicked { message: text })
        });
        self.report.start = self.shared.options.clock.now() - begun;
        started
    }

    /// Tells the source that the VM runs here, or is about to, if it listens.
    fn accept(&mut self) -> Result<(), Error> {
        self.answered = true;
        if self.return_path { self.main().reply(&Message::Shut(0)) } else { Ok(()) }
    }

    /// Tells the source that the VM does not run here and never will, if it listens and has not been told anything; why, if it
    /// understands that.
    pub(super) fn refuse(&mut self, reason: &str) {
        if std::mem::replace(&mut self.answered, true) || !self.return_path {
            return;
        }
        let ours = self.extensions.contains(Extension::TwoStepCommit);
        let Some(main) = &mut self.main else { return };
        // A source that has switched to postcopy keeps its VM paused either way, and QEMU 7.2 does not take it back after a refusal.
        if main.decoder().switches_to_postcopy() {
            return;
        }
        let told = if ours { main.reply(&Message::Reason(reason.to_owned())) } else { Ok(()) };
        if let Err(error) = told.and_then(|()| main.reply(&Message::Shut(1))) {
            tracing::debug!(%error, "the source could not be told that the VM does not run here");
        }
    }

    /// Waits until the source has closed main, for a while: it may not like to lose connections it still uses. The VM
    /// runs by now, so a source that does not is only logged.
    pub(super) fn await_close(&mut self, target: &mut dyn Target) -> Result<(), Error> {
        let timeout = self.shared.options.close_timeout;
        let mut rest = Vec::new();
        if let Err(error) = self.main().await_close(timeout, &mut rest, MAX_DEVICE_STATE) {
            tracing::debug!(%error, "while waiting for the source to close main");
        }
        if !rest.is_empty() {
            target.rest(&rest)?;
        }
        self.opaque_state_ends(target)
    }
}
