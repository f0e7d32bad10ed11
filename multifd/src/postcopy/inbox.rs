//! What the destination said, for the threads that wait for it: requests, and answers by kind.

use std::{collections::VecDeque, ops::Range, time::Instant};

use multifd_proto::Violation;

use crate::{error::Error, sync::Deadline, transport::Stopper, watched::Watched};

/// Where the thread of the return path puts what it read. Clones are the same.
#[derive(Clone, Default)]
pub(super) struct Inbox {
    mail: Watched<Mail>,
}

/// What was said and not taken yet.
#[derive(Default)]
pub(super) struct Mail {
    /// Requests in the order in which they came: at most [`MAX_OPEN`].
    urgent: VecDeque<Urgent>,
    /// No request is answered any more, but for those that are here.
    is_closed: bool,
    /// The destination has taken the block list: it answered the PING behind RAM_DISCARD.
    pub(super) is_set_up: bool,
    /// It has loaded the devices: it answered the PING before RUN, or asked for a page after RUN was sent.
    pub(super) is_loaded: bool,
    /// Bitmaps of a recovery that have come, by block.
    pub(super) received: Vec<Vec<u8>>,
    /// Whether bitmaps may come, and how many.
    pub(super) bitmaps_due: usize,
    /// It goes on after a recovery.
    pub(super) is_resumed: bool,
    /// RUN was sent, or is being sent.
    pub(super) run_sent: bool,
    /// The end of the stream was sent, or is being sent.
    pub(super) end_sent: bool,
    /// The destination has everything.
    pub(super) is_complete: bool,
}

/// Pages that the guest waits for.
#[derive(Clone, Debug)]
pub(super) struct Urgent {
    /// Their numbers, all of one block.
    pub(super) pages: Range<u64>,
    /// When the request came.
    pub(super) asked: Instant,
}

impl Inbox {
    /// Adds a request, which is as good a sign as any that the destination has loaded the devices. The thread that waits for the sign
    /// finds the request with it.
    ///
    /// # Errors
    /// [`Violation::TooManyRequests`].
    pub(super) fn ask(&self, urgent: Urgent) -> Result<(), Violation> {
        self.update(|mail| {
            if mail.is_closed {
                return Ok(());
            }
            if mail.urgent.len() == MAX_OPEN {
                return Err(Violation::TooManyRequests { limit: MAX_OPEN });
            }
            mail.urgent.push_back(urgent);
            mail.is_loaded = true;
            Ok(())
        })
    }

    /// Changes what is known, and wakes all who wait.
    pub(super) fn update<T>(&self, change: impl FnOnce(&mut Mail) -> T) -> T {
        self.mail.update(change)
    }

    /// Takes the oldest request.
    pub(super) fn take(&self) -> Option<Urgent> {
        self.update(|mail| mail.urgent.pop_front())
    }

    /// Waits for a request and takes it. `None`: there will be none any more, see [`close`](Self::close).
    ///
    /// # Errors
    /// [`Error::Stopped`].
    pub(super) fn next(&self) -> Result<Option<Urgent>, Error> {
        self.wait(Deadline::after(None), |mail| !mail.urgent.is_empty() || mail.is_closed)?;
        Ok(self.take())
    }

    /// Takes no more requests.
    pub(super) fn close(&self) {
        self.update(|mail| mail.is_closed = true);
    }

    /// Waits until `arrived`. `Ok(false)`: the deadline is over.
    ///
    /// # Errors
    /// [`Error::Stopped`]: nothing more will come.
    pub(super) fn wait(&self, deadline: Deadline, arrived: impl Fn(&Mail) -> bool) -> Result<bool, Error> {
        let arrived = self.mail.wait(deadline, |mail| arrived(mail).then_some(()))?;
        Ok(arrived.is_some())
    }
}

impl Mail {
    /// Whether a request is here.
    pub(super) fn has_urgent(&self) -> bool {
        !self.urgent.is_empty()
    }
}

impl Stopper for Inbox {
    fn stop(&self) {
        self.mail.stop();
    }
}

/// The most requests that wait to be answered. A guest has one for each of its vCPUs and of QEMU's threads, with asynchronous page
/// faults some tens for each vCPU.
pub(super) const MAX_OPEN: usize = 64 << 10;
