//! Connections that say what the test wants of how much is on its way.

use std::{
    io,
    sync::atomic::{AtomicU64, Ordering::SeqCst},
    time::Duration,
};

use crate::{
    ram::GuestRange,
    sync::Arc,
    transport::{Connect, Meter, Pending, RecvHalf, SendHalf, Stopper, Stream, Transit, wrapped},
};

/// Says how many bytes are on their way, at each look.
pub(super) type Look = Box<dyn Fn() -> io::Result<u64> + Send + Sync>;

/// A connector whose connections tell what is on its way.
pub(super) struct Far<C, L> {
    inner: C,
    /// What each connection says, by how many were dialed before; `None` where it cannot tell.
    look: L,
    /// What each path carries, if it can tell.
    carries: Option<u64>,
    /// How far away the destination is.
    round_trip: Duration,
    /// Called before pages are written, by the thread that does.
    at_pages: Option<AtPages>,
    dialed: AtomicU64,
}

type AtPages = Arc<dyn Fn() + Send + Sync>;

#[cfg_attr(shuttle, allow(dead_code, reason = "schedules ask only how far away it is"))]
impl<C: Connect, L: Fn(u64) -> Option<Look>> Far<C, L> {
    pub(super) fn new(inner: C, look: L) -> Far<C, L> {
        Far { inner, look, carries: None, round_trip: Duration::ZERO, at_pages: None, dialed: AtomicU64::new(0) }
    }

    /// The same, with connections that tell that their path carries so many bytes per second.
    pub(super) fn carrying(self, carries: Option<u64>) -> Far<C, L> {
        Far { carries, ..self }
    }

    /// The same, whose destination is so far away.
    pub(super) fn away(self, round_trip: Duration) -> Far<C, L> {
        Far { round_trip, ..self }
    }

    /// The same, with something that each thread does before it writes pages.
    pub(super) fn at_pages(self, at_pages: impl Fn() + Send + Sync + 'static) -> Far<C, L> {
        Far { at_pages: Some(Arc::new(at_pages)), ..self }
    }

    /// How many connections were begun.
    pub(super) fn dialed(&self) -> u64 {
        self.dialed.load(SeqCst)
    }
}

impl<C: Connect, L: Fn(u64) -> Option<Look>> Connect for Far<C, L> {
    fn dial(&self) -> io::Result<Box<dyn Pending>> {
        let look = (self.look)(self.dialed.fetch_add(1, SeqCst)).map(Arc::new);
        let (carries, round_trip, at_pages) = (self.carries, self.round_trip, self.at_pages.clone());
        let far = move |inner| Ok(Box::new(FarStream { inner, look, carries, round_trip, at_pages }) as _);
        Ok(wrapped(self.inner.dial()?, far))
    }
}

struct FarStream {
    inner: Box<dyn Stream>,
    look: Option<Arc<Look>>,
    carries: Option<u64>,
    round_trip: Duration,
    at_pages: Option<AtPages>,
}

struct FarMeter {
    look: Arc<Look>,
    carries: Option<u64>,
    round_trip: Duration,
}

impl Meter for FarMeter {
    fn transit(&self) -> io::Result<Transit> {
        let transit = Transit::new((self.look)()?, self.round_trip);
        Ok(self.carries.map_or(transit, |rate| transit.carrying(rate)))
    }
}

impl SendHalf for FarStream {
    fn write(&mut self, header: &[u8], pages: &[GuestRange<'_>]) -> io::Result<()> {
        if let Some(at_pages) = self.at_pages.as_ref().filter(|_| !pages.is_empty()) {
            at_pages();
        }
        self.inner.write(header, pages)
    }

    fn finish(&mut self) -> io::Result<()> {
        self.inner.finish()
    }
}

receives_as_inner!(FarStream);

impl Stream for FarStream {
    fn split(self: Box<Self>) -> io::Result<(Box<dyn SendHalf>, Box<dyn RecvHalf>)> {
        self.inner.split()
    }

    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        self.inner.stopper()
    }

    fn meter(&self) -> io::Result<Option<Box<dyn Meter>>> {
        let (carries, round_trip) = (self.carries, self.round_trip);
        Ok(self.look.clone().map(|look| Box::new(FarMeter { look, carries, round_trip }) as Box<dyn Meter>))
    }

    fn peer(&self) -> String {
        self.inner.peer()
    }
}
