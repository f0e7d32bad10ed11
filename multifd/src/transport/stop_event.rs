//! Ends a wait for a descriptor from another thread.

use std::{
    io,
    os::fd::{BorrowedFd, OwnedFd},
    // Not from `crate::sync`: model checkers open no descriptors.
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll},
    io::Errno,
};

use super::Stopper;

/// An event that stays set. Clones are the same event.
#[derive(Clone)]
pub(super) struct StopEvent(Arc<OwnedFd>);

impl StopEvent {
    /// An event that is not set.
    ///
    /// # Errors
    /// The kernel's, when it is out of descriptors.
    pub(super) fn new() -> io::Result<StopEvent> {
        Ok(StopEvent(Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)))
    }

    /// Whether the event is set.
    pub(super) fn is_set(&self) -> io::Result<bool> {
        Ok(self.wait(Some(Duration::ZERO))? == io::ErrorKind::Interrupted)
    }

    /// Waits until the event is set: [`io::ErrorKind::Interrupted`], or for `timeout`: [`io::ErrorKind::TimedOut`].
    pub(super) fn wait(&self, timeout: Option<Duration>) -> io::Result<io::ErrorKind> {
        self.poll(None, PollFlags::IN, timeout).map(|ended| ended.expect_err("nothing else was waited for"))
    }

    /// Waits until a read of `descriptor` does not block.
    ///
    /// # Errors
    /// [`io::ErrorKind::Interrupted`] once the event is set; [`io::ErrorKind::TimedOut`]; the kernel's.
    pub(super) fn wait_readable(&self, descriptor: BorrowedFd<'_>, timeout: Option<Duration>) -> io::Result<()> {
        self.poll(Some(descriptor), PollFlags::IN, timeout)?.map_err(io::Error::from)
    }

    /// Waits until a write to `descriptor` does not block, or its connect has ended.
    ///
    /// # Errors
    /// As [`wait_readable`](Self::wait_readable).
    pub(super) fn wait_writable(&self, descriptor: BorrowedFd<'_>, timeout: Option<Duration>) -> io::Result<()> {
        self.poll(Some(descriptor), PollFlags::OUT, timeout)?.map_err(io::Error::from)
    }

    fn poll(
        &self,
        descriptor: Option<BorrowedFd<'_>>,
        events: PollFlags,
        timeout: Option<Duration>,
    ) -> io::Result<Result<(), io::ErrorKind>> {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            // A time beyond the kernel's range has no end either.
            let left = left.and_then(|left| Timespec::try_from(left).ok());
            let mut entries = vec![PollFd::new(&self.0, PollFlags::IN)];
            entries.extend(descriptor.map(|descriptor| PollFd::from_borrowed_fd(descriptor, events)));
            match poll(&mut entries, left.as_ref()) {
                Err(Errno::INTR) => {}
                Ok(0) => return Ok(Err(io::ErrorKind::TimedOut)),
                Ok(_) if !entries[0].revents().is_empty() => return Ok(Err(io::ErrorKind::Interrupted)),
                // Readable, at its end, or broken: a read says which.
                Ok(_) => return Ok(Ok(())),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Stopper for StopEvent {
    fn stop(&self) {
        // Fails only where the counter is at its maximum: then it is readable, as it should be.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }
}
