//! A connection that the other end has opened, for a source, which opens its own everywhere else.

use std::{io, sync::Mutex, time::Duration};

use multifd::transport::{Connect, Pending, Stopper, Stream};

use crate::progress::lock;

/// Gives out one connection, once.
pub struct Single(Mutex<Option<Box<dyn Pending>>>);

impl Single {
    /// Gives out `pending`, which may take up to `limit` to be established.
    pub fn new(pending: Box<dyn Pending>, limit: Duration) -> Single {
        Single(Mutex::new(Some(Box::new(Limited { pending, limit }))))
    }
}

impl Connect for Single {
    fn dial(&self) -> io::Result<Box<dyn Pending>> {
        lock(&self.0).take().ok_or_else(|| io::Error::other("a client of serve is one connection"))
    }
}

struct Limited {
    pending: Box<dyn Pending>,
    limit: Duration,
}

impl Pending for Limited {
    fn establish(self: Box<Self>, limit: Option<Duration>) -> io::Result<Box<dyn Stream>> {
        self.pending.establish(Some(limit.map_or(self.limit, |limit| limit.min(self.limit))))
    }

    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        self.pending.stopper()
    }

    fn peer(&self) -> String {
        self.pending.peer()
    }
}
