//! What the channels of a source report to the main thread until all of them are open.
//!
//! A channel is open when the destination's host is known to have its hello. A listener whose queue is full answers more
//! connections than it has room for, and resets those that are too many later: such a channel is dialed again, by the main thread.

use std::{collections::VecDeque, time::Duration};

use multifd_proto::ChannelId;

use super::{Run, channel::SendChannel};
use crate::{
    error::{Connection, Error, Place},
    sync::Deadline,
    threads::{Task, ThreadRole},
    transport::{Connect, Stopper},
    watched::Watched,
};

/// One connection that is to become a channel.
#[derive(Clone, Copy, Debug)]
pub(super) struct Attempt {
    pub(super) id: ChannelId,
    /// How many there were before.
    before: u32,
}

impl Attempt {
    /// Whether another one may follow.
    pub(super) fn may_be_repeated(self) -> bool {
        self.before + 1 < MOST_ATTEMPTS
    }

    /// How long to wait before it begins: the listener needs time to make room.
    pub(super) fn wait_before(self) -> Option<Duration> {
        let doublings = self.before.checked_sub(1)?;
        Some(FIRST_WAIT.saturating_mul(1 << doublings.min(16)).min(LONGEST_WAIT))
    }

    fn next(self) -> Attempt {
        Attempt { before: self.before + 1, ..self }
    }
}

/// The reports. Clones share them.
#[derive(Clone, Default)]
pub(super) struct Openings {
    reports: Watched<VecDeque<Report>>,
}

enum Report {
    /// A channel is open.
    Open,
    /// Its connection ended before, by this error.
    Lost(Attempt, Error),
}

impl Openings {
    /// A channel is open.
    pub(super) fn open(&self) {
        self.reports.update(|reports| reports.push_back(Report::Open));
    }

    /// The connection of `attempt` ended before the channel was open, by `error`: another one may take its place.
    pub(super) fn lost(&self, attempt: Attempt, error: Error) {
        self.reports.update(|reports| reports.push_back(Report::Lost(attempt, error)));
    }

    /// Waits for the next report.
    ///
    /// # Errors
    /// [`Error::Stopped`]: the migration has ended.
    fn next(&self) -> Result<Report, Error> {
        let next = self.reports.wait(Deadline::after(None), VecDeque::pop_front)?;
        Ok(next.expect("a wait without a deadline finds something"))
    }

    pub(super) fn stopper(&self) -> Box<dyn Stopper> {
        Box::new(self.reports.clone())
    }
}

impl Run {
    /// Opens all channels at the same time, each in its own thread.
    pub(super) fn dial_channels(&mut self, to: &dyn Connect) -> Result<(), Error> {
        for id in (0..self.shared.options.plan.channels).map(ChannelId) {
            let task = self.open_channel(to, Attempt { id, before: 0 })?;
            self.channels.push(task);
        }
        Ok(())
    }

    /// Waits until all channels are open.
    pub(super) fn await_channels(&mut self, to: &dyn Connect) -> Result<(), Error> {
        let mut open = 0;
        while open < self.shared.options.plan.channels {
            match self.shared.openings.next()? {
                Report::Open => open += 1,
                Report::Lost(attempt, error) => self.open_again(to, attempt, error)?,
            }
        }
        Ok(())
    }

    /// Opens another connection in the place of that of `attempt`, which `error` ended.
    fn open_again(&mut self, to: &dyn Connect, attempt: Attempt, error: Error) -> Result<(), Error> {
        tracing::debug!(%error, attempt = attempt.before, "a channel is dialed again");
        let task = match self.open_channel(to, attempt.next()) {
            Ok(task) => task,
            // There is one connection for each channel only: how it ended is the reason.
            Err(Error::Io { source, .. }) => {
                tracing::debug!(error = %source, "a channel cannot be dialed again");
                return Err(error);
            }
            Err(other) => return Err(other),
        };
        let ended = std::mem::replace(&mut self.channels[attempt.id.index()], task);
        // It has reported its error, and closed its connection or is about to.
        drop(ended.join());
        Ok(())
    }

    fn open_channel(&self, to: &dyn Connect, attempt: Attempt) -> Result<Task<Result<SendChannel, Error>>, Error> {
        let shared = &self.shared;
        let at = Place { connection: Connection::Channel(attempt.id), offset: 0 };
        let pending = to.dial().map_err(Error::io(at))?;
        shared.stop.register(pending.stopper().map_err(Error::io(at))?);
        let channel = SendChannel::new(attempt, shared)?;
        let (threads, role) = (&*shared.options.threads, ThreadRole::SendChannel(attempt.id));
        Task::spawn(threads, role, &shared.stop, move || channel.run(pending))
    }
}

/// With the waits between them more than ten seconds.
const MOST_ATTEMPTS: u32 = 16;
/// Before a connection is dialed again.
const FIRST_WAIT: Duration = if cfg!(test) { Duration::from_millis(1) } else { Duration::from_millis(50) };
const LONGEST_WAIT: Duration = if cfg!(test) { Duration::from_millis(50) } else { Duration::from_secs(1) };
