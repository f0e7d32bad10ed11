//! A source of postcopy that goes on over new connections after those that it had broke.
//!
//! Its VM runs nowhere then: the devices and some pages are here, the rest is there. What is here is kept, and the listener takes a
//! new main, which asks which pages are here and brings the others.
//!
//! **The third law**: the source sends again what it is told to be missing. So all old connections have ended, with their threads,
//! before it is told: none of them can place a page any more.

use std::time::Duration;

use multifd_proto::{
    BlockName,
    channel_end::End,
    command::Command,
    postcopy::{MeaningAfterSwitch as Meaning, ReachedAfterSwitch as Reached, meaning_after_switch, received},
    return_path::Message,
    stream::Item,
};

use super::{
    Run, Target,
    connections::{Connections, Stage},
    greeting::Refused,
    main_reader::MainReader,
    postcopy::Switch,
    shared::{MainConnection, Shared},
};
use crate::{
    channel_end::end_by,
    error::{Connection, Error, Place},
    postcopy::trace::HandOver,
    progress::{Event, Observer},
    pulse::Pulse,
    sync::{Arc, Deadline, lock, wait_for},
    transport::Stream,
};

/// How often and how long it was waited for a source that goes on.
#[derive(Default)]
pub(super) struct Recoveries {
    /// When it has been waited for long enough, and how many pages were missing when the wait began.
    waits: Option<(Deadline, u64)>,
}

impl Run {
    /// Takes all that the source sends, over as many connections as it takes.
    pub(super) fn take(&mut self, target: &mut dyn Target, observer: &mut dyn Observer) -> Result<(), Error> {
        loop {
            let taken = self.stream(target, observer).and_then(|()| self.await_pushed_pages());
            let Err(error) = taken else { return Ok(()) };
            match self.shared.meaning(Reached::Stream, &error) {
                Meaning::Interrupted => self.go_on(error, observer)?,
                Meaning::Fatal | Meaning::Finished | Meaning::Replace => return Err(error),
            }
        }
    }

    /// Waits until the source goes on.
    ///
    /// # Errors
    /// [`Error::NotContinued`] with `lost`, which ended the connections; [`Error::Stopped`].
    fn go_on(&mut self, lost: Error, observer: &mut dyn Observer) -> Result<(), Error> {
        Pulse::rest(self.watchdog.timers());
        let limit = self.shared.options.recover_limit;
        let (lost, missing) = self.shared.switch.lost(lost);
        // A source that comes back and brings no page is not waited for any longer.
        let deadline = match self.recoveries.waits {
            Some((deadline, before)) if before == missing => deadline,
            _ => Deadline::after(Some(limit)),
        };
        self.recoveries.waits = Some((deadline, missing));
        tracing::debug!(missing, "the connections to the source are lost: {lost}");
        observer.event(&Event::Interrupted { reason: lost.to_string(), missing, limit });
        while self.next_main(deadline)? {
            match self.resume() {
                Ok(()) => {
                    self.shared.watch_for_breaks(self.shared.options.stall_limit);
                    self.report.recoveries += 1;
                    observer.event(&Event::Continued { missing });
                    return Ok(());
                }
                Err(error) => match self.shared.meaning(Reached::Nothing, &error) {
                    Meaning::Replace => tracing::warn!("the source did not get as far as to go on: {error}"),
                    Meaning::Fatal | Meaning::Finished | Meaning::Interrupted => return Err(error),
                },
            }
        }
        Err(Error::NotContinued { reason: Box::new(lost), limit })
    }

    /// Gives all old connections up and takes the new main of the source. Returns whether one came before `deadline`.
    fn next_main(&mut self, deadline: Deadline) -> Result<bool, Error> {
        let shared = self.shared.clone();
        shared.connections.end_members(&shared.switch.suspend());
        shared.await_suspension()?;
        shared.step(|| HandOver::Break);
        shared.connections.forget_main();
        let Some((number, mut main)) = self.await_next_main(deadline)? else { return Ok(false) };
        let at = Place { connection: Connection::Main, offset: 0 };
        shared.connections.main_is_here(number, main.receives.interrupter().map_err(Error::io(at))?);
        shared.connections.advance(number, Stage::Member);
        shared.step(|| HandOver::Recover);
        shared.switch.go_on_from(number);
        // By now its break would be noticed by nobody else.
        shared.watch_for_breaks(shared.options.setup_timeout);
        let decoder = self.main().decoder().resumed();
        let (progress, pulse) = (shared.progress.clone(), shared.pulse.clone());
        self.main = Some(MainReader::resumed(main, decoder, progress, pulse));
        Ok(true)
    }

    fn await_next_main(&self, deadline: Deadline) -> Result<Option<(usize, MainConnection)>, Error> {
        let mut slot = lock(&self.shared.main);
        loop {
            if slot.stopped {
                return Err(Error::Stopped);
            }
            if let Some(next) = slot.next.take() {
                return Ok(Some(next));
            }
            if deadline.is_over() {
                return Ok(None);
            }
            slot = wait_for(&self.shared.main_changed, slot, deadline.left());
        }
    }

    /// Tells the source what is here, until it says that it goes on.
    fn resume(&mut self) -> Result<(), Error> {
        while self.main().decoder().is_recovering() {
            match self.main().next_item()? {
                Item::Command(Command::RecvBitmap { block }) => self.tell_received(block)?,
                Item::Command(Command::Ping(value)) => self.main().reply(&Message::Pong(value))?,
                Item::Command(Command::PostcopyResume) => self.main().reply(&Message::ResumeAck(1))?,
                item => unreachable!("the decoder lets no {item:?} pass before POSTCOPY_RESUME"),
            }
        }
        Ok(())
    }

    fn tell_received(&mut self, block: BlockName) -> Result<(), Error> {
        let pages = self.pages();
        let index = pages.layout.index_of(block.as_str()).expect("the decoder knows the block");
        let mut bitmap = Vec::new();
        self.shared.switch.received(&pages.layout.blocks()[index], |count, pages| {
            received::encode(count, pages, &mut bitmap);
        });
        self.main().reply_with(&Message::RecvBitmap { block }, &bitmap)
    }
}

impl Shared {
    /// A connection says that it is main of a source that goes on. It is kept until the main before it breaks, or another one comes.
    pub(super) fn keep_next_main(
        &self,
        connection: &mut Option<Box<dyn Stream>>,
        heard: Vec<u8>,
        number: usize,
    ) -> Result<(), Refused> {
        let Some(stream) = connection.take() else { return Ok(()) };
        let at = Place { connection: Connection::Main, offset: 0 };
        let (far_end, peer) = (stream.far_end(), stream.peer());
        let (sends, receives) = stream.split().map_err(Error::io(at))?;
        let main = MainConnection { sends, receives, far_end, peer, heard };
        let mut slot = lock(&self.main);
        if slot.stopped || !self.connections.keep_for_later(number) {
            return Err(Refused::Stranger("comes when the migration is over".to_owned()));
        }
        let replaced = slot.next.replace((number, main));
        drop(slot);
        if let Some((number, _)) = replaced {
            self.connections.forget(number);
        }
        self.main_changed.notify_all();
        Ok(())
    }

    /// Waits until no thread of an old connection places a page any more.
    fn await_suspension(&self) -> Result<(), Error> {
        #[cfg(any(test, feature = "__broken-variants"))]
        if self.options.broken == Some(crate::testing::broken::Broken::TellsTooEarly) {
            return Ok(());
        }
        self.switch.await_suspension(|| !self.connections.members_have_threads())
    }

    /// Whether a source that has lost its connections may go on over new ones.
    pub(super) fn may_go_on(&self) -> bool {
        // Nothing on such a connection could name a token.
        let allowed = !self.options.recover_limit.is_zero() && !self.single && self.options.token.is_none();
        allowed && self.switch.has_package()
    }

    /// What it means that a connection which has come as far as `reached` ends by `error`.
    pub(super) fn meaning(&self, reached: Reached, error: &Error) -> Meaning {
        let end = if self.stop.is_stopped() { End::Stopped } else { end_by(error, false) };
        meaning_after_switch(reached, end, self.may_go_on())
    }

    /// The thread of a connection other than main ends with `error`. Does what that means where it ends nothing but connections; else
    /// gives it back.
    pub(super) fn break_off(&self, error: Error) -> Result<(), Error> {
        match self.meaning(self.switch.reached(), &error) {
            Meaning::Interrupted => break_off(&self.switch, &self.connections, error),
            Meaning::Finished if !self.stop.is_stopped() => {
                tracing::debug!(%error, "a connection ends that has brought all");
            }
            // The connection stays until main has said why the migration ends.
            Meaning::Fatal | Meaning::Finished | Meaning::Replace => return Err(error),
        }
        Ok(())
    }

    /// Gives all connections up, for the source to go on over new ones. Returns whether it did: the source has switched, pages are
    /// missing, and it is waited for.
    pub(super) fn give_up_connections(&self) -> bool {
        let reached = self.switch.reached();
        let may_pause = reached == Reached::Pages && self.meaning(reached, &Error::Paused) == Meaning::Interrupted;
        if may_pause {
            break_off(&self.switch, &self.connections, Error::Paused);
        }
        may_pause
    }

    /// From now on a source that is silent for `limit` is one whose connections are lost, as one that cannot be reached is. To be called
    /// only where a source may go on.
    pub(super) fn watch_for_breaks(&self, limit: Option<Duration>) {
        // Not `self`, which has the timers.
        let (switch, connections) = (self.switch.clone(), self.connections.clone());
        let silent = move |limit| break_off(&switch, &connections, Error::Stalled { limit });
        self.pulse.watch_with(&self.timers, move || limit, silent);
    }
}

/// Gives all connections up because of `error`; main notices that its own has ended.
fn break_off(switch: &Arc<Switch>, connections: &Arc<Connections>, error: Error) {
    connections.end_members(&switch.lose(error));
}
