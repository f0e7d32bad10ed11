//! Connections at whose operations one side is cancelled, or at whose GO something happens.

use std::io;

use multifd_proto::{command::Command, encoder::MainEncoder};

use super::AtGo;
use crate::{
    ram::GuestRange,
    stop::StopHandle,
    sync::{Arc, Mutex, lock, thread},
    transport::{Connect, Pending, RecvHalf, SendHalf, Stopper, Stream, wrapped},
};

/// Connections of a source, and what is to happen at some of their operations.
pub(super) struct WatchingConnector {
    pub(super) inner: Box<dyn Connect>,
    pub(super) watched: Watched,
}

#[derive(Clone)]
pub(super) struct Watched {
    /// Set when GO is written.
    pub(super) go: Arc<Mutex<bool>>,
    pub(super) at_go: AtGo,
    /// Operations before `cancelled` are.
    pub(super) left: Arc<Mutex<usize>>,
    pub(super) cancelled: Vec<StopHandle>,
    /// Of the source and of the destination.
    pub(super) stops: [StopHandle; 2],
    pub(super) cancelling: Arc<Mutex<Vec<thread::JoinHandle<()>>>>,
}

impl Watched {
    fn operation(&self) {
        if self.cancelled.is_empty() {
            return;
        }
        let now = {
            let mut left = lock(&self.left);
            let now = *left == 0;
            *left = left.wrapping_sub(1);
            now
        };
        if now {
            self.cancelled.iter().for_each(|stop| self.cancel(stop));
        }
    }

    /// At some later moment of the schedule.
    fn cancel(&self, stop: &StopHandle) {
        let stop = stop.clone();
        lock(&self.cancelling).push(thread::spawn(move || stop.cancel()));
    }
}

impl Connect for WatchingConnector {
    fn dial(&self) -> io::Result<Box<dyn Pending>> {
        self.watched.operation();
        let watched = self.watched.clone();
        Ok(wrapped(self.inner.dial()?, move |inner| {
            let stopper = std::sync::Arc::from(inner.stopper()?);
            Ok(Box::new(WatchingStream { watched, stopper, inner }))
        }))
    }
}

struct WatchingStream<S: ?Sized = dyn Stream> {
    watched: Watched,
    stopper: std::sync::Arc<dyn Stopper>,
    inner: Box<S>,
}

impl<S: SendHalf + ?Sized> WatchingStream<S> {
    fn break_off(&self) -> io::Result<()> {
        self.stopper.stop();
        Err(io::ErrorKind::ConnectionReset.into())
    }

    fn go(&mut self, go: &[u8]) -> io::Result<()> {
        *lock(&self.watched.go) = true;
        let [source, destination] = &self.watched.stops;
        match self.watched.at_go {
            AtGo::Lost => return self.break_off(),
            AtGo::Cut => {
                self.inner.write(&go[..go.len() - 1], &[])?;
                return self.break_off();
            }
            AtGo::DestinationCancelled => self.watched.cancel(destination),
            _ => {}
        }
        self.inner.write(go, &[])?;
        match self.watched.at_go {
            AtGo::Reset => self.stopper.stop(),
            AtGo::Failed => return Err(io::ErrorKind::ConnectionReset.into()),
            AtGo::SourceCancelled => self.watched.cancel(source),
            _ => {}
        }
        Ok(())
    }
}

impl<S: SendHalf + ?Sized> SendHalf for WatchingStream<S> {
    fn write(&mut self, header: &[u8], pages: &[GuestRange<'_>]) -> io::Result<()> {
        self.watched.operation();
        if pages.is_empty() && header == MainEncoder::default().command(&Command::Go).bytes {
            return self.go(header);
        }
        self.inner.write(header, pages)
    }

    fn finish(&mut self) -> io::Result<()> {
        self.inner.finish()
    }
}

impl<S: RecvHalf + ?Sized> RecvHalf for WatchingStream<S> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.watched.operation();
        self.inner.read(buf)
    }

    fn read_pages(&mut self, pages: &[GuestRange<'_>]) -> io::Result<()> {
        self.inner.read_pages(pages)
    }

    fn interrupter(&mut self) -> io::Result<Box<dyn Stopper>> {
        self.inner.interrupter()
    }
}

impl Stream for WatchingStream {
    fn split(self: Box<Self>) -> io::Result<(Box<dyn SendHalf>, Box<dyn RecvHalf>)> {
        let WatchingStream { watched, stopper, inner } = *self;
        let (sends, receives) = inner.split()?;
        let sends = WatchingStream { watched: watched.clone(), stopper: stopper.clone(), inner: sends };
        Ok((Box::new(sends), Box::new(WatchingStream { watched, stopper, inner: receives })))
    }

    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        self.inner.stopper()
    }

    fn peer(&self) -> String {
        self.inner.peer()
    }
}
