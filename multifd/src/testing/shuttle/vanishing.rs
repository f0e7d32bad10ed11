//! Connections of a process that ends.

use std::io;

use crate::{
    ram::GuestRange,
    sync::{Arc, Mutex, lock},
    testing::memory,
    transport::{Connect, Pending, RecvHalf, SendHalf, Stopper, Stream, wrapped},
};

/// Connections of a process that is no more at one byte: what was written is read, and then all of them have ended.
pub(super) struct Vanishing {
    pub(super) inner: memory::MemoryConnector,
    /// Bytes that are still written, on all connections together.
    pub(super) left: Arc<Mutex<usize>>,
    pub(super) all: Arc<Mutex<Vec<Box<dyn Stopper>>>>,
}

impl Connect for Vanishing {
    fn dial(&self) -> io::Result<Box<dyn Pending>> {
        let (left, all) = (self.left.clone(), self.all.clone());
        Ok(wrapped(self.inner.dial()?, move |inner| {
            lock(&all).push(inner.stopper()?);
            Ok(Box::new(VanishingStream { inner, left, all }))
        }))
    }
}

struct VanishingStream<S: ?Sized = dyn Stream> {
    left: Arc<Mutex<usize>>,
    all: Arc<Mutex<Vec<Box<dyn Stopper>>>>,
    inner: Box<S>,
}

impl<S: SendHalf + ?Sized> SendHalf for VanishingStream<S> {
    fn write(&mut self, header: &[u8], pages: &[GuestRange<'_>]) -> io::Result<()> {
        let mut bytes = header.to_vec();
        for page in pages {
            let begin = bytes.len();
            bytes.resize(begin + page.len(), 0);
            page.read(&mut bytes[begin..]);
        }
        let now = {
            let mut left = lock(&self.left);
            let now = bytes.len().min(*left);
            *left -= now;
            now
        };
        self.inner.write(&bytes[..now], &[])?;
        if now < bytes.len() {
            lock(&self.all).iter().for_each(|connection| connection.stop());
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        Ok(())
    }

    fn finish(&mut self) -> io::Result<()> {
        self.inner.finish()
    }
}

receives_as_inner!(VanishingStream);

impl Stream for VanishingStream {
    fn split(self: Box<Self>) -> io::Result<(Box<dyn SendHalf>, Box<dyn RecvHalf>)> {
        let VanishingStream { left, all, inner } = *self;
        let (inner, receives) = inner.split()?;
        Ok((Box::new(VanishingStream { left, all, inner }), receives))
    }

    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        self.inner.stopper()
    }

    fn peer(&self) -> String {
        self.inner.peer()
    }
}
