//! Connections that fail at one of their operations.

use std::{io, time::Duration};

use super::Beside;
use crate::{
    ram::GuestRange,
    sync::{Arc, Mutex, lock},
    testing::memory,
    transport::{Connect, Listen, Pending, RecvHalf, SendHalf, Stopper, Stream, wrapped},
};

/// An operation on connections of one side that fails, and breaks them.
pub(super) struct Fault {
    /// Which connection, in the order in which they are opened; main is the first. `None` for all together.
    connection: Option<usize>,
    /// Operations that succeed.
    left: Mutex<usize>,
    opened: Mutex<usize>,
    broken: Mutex<Vec<Box<dyn Stopper>>>,
}

impl Fault {
    pub(super) fn new(connection: Option<usize>, after: usize) -> Arc<Fault> {
        let (opened, broken) = (Mutex::new(0), Mutex::new(Vec::new()));
        Arc::new(Fault { connection, left: Mutex::new(after), opened, broken })
    }

    pub(super) fn at_source(self: Arc<Fault>) -> Beside {
        let connect = move |inner| Box::new(FailingConnector { inner, fault: self.clone() }) as _;
        Beside { connect: Box::new(connect), ..Default::default() }
    }

    pub(super) fn at_destination(self: Arc<Fault>) -> Beside {
        let listen = move |inner| Box::new(FailingListener { inner, fault: self.clone() }) as _;
        Beside { listen: Box::new(listen), ..Default::default() }
    }

    /// Has the fault happen to `pending`, if it is the one.
    fn apply(self: &Arc<Fault>, pending: Box<dyn Pending>) -> Box<dyn Pending> {
        let index = {
            let mut opened = lock(&self.opened);
            *opened += 1;
            *opened - 1
        };
        if self.connection.is_some_and(|connection| connection != index) {
            return pending;
        }
        let fault = self.clone();
        wrapped(pending, move |inner| {
            let stopper = inner.stopper()?;
            lock(&fault.broken).push(stopper);
            Ok(Box::new(FailingStream { inner, fault }))
        })
    }

    fn operation(&self) -> io::Result<()> {
        let succeeds = {
            let mut left = lock(&self.left);
            let succeeds = *left > 0;
            *left = left.saturating_sub(1);
            succeeds
        };
        if succeeds {
            return Ok(());
        }
        lock(&self.broken).iter().for_each(|connection| connection.stop());
        Err(io::ErrorKind::ConnectionReset.into())
    }
}

struct FailingConnector {
    inner: memory::MemoryConnector,
    fault: Arc<Fault>,
}

impl Connect for FailingConnector {
    fn dial(&self) -> io::Result<Box<dyn Pending>> {
        Ok(self.fault.apply(self.inner.dial()?))
    }
}

struct FailingListener {
    inner: memory::MemoryListener,
    fault: Arc<Fault>,
}

impl Listen for FailingListener {
    fn accept(&mut self, timeout: Option<Duration>) -> io::Result<Box<dyn Pending>> {
        Ok(self.fault.apply(self.inner.accept(timeout)?))
    }

    fn try_accept(&mut self) -> io::Result<Option<Box<dyn Pending>>> {
        Ok(self.inner.try_accept()?.map(|pending| self.fault.apply(pending)))
    }

    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        self.inner.stopper()
    }
}

struct FailingStream<S: ?Sized = dyn Stream> {
    fault: Arc<Fault>,
    inner: Box<S>,
}

impl<S: SendHalf + ?Sized> SendHalf for FailingStream<S> {
    fn write(&mut self, header: &[u8], pages: &[GuestRange<'_>]) -> io::Result<()> {
        self.fault.operation()?;
        self.inner.write(header, pages)
    }

    fn finish(&mut self) -> io::Result<()> {
        self.inner.finish()
    }
}

impl<S: RecvHalf + ?Sized> RecvHalf for FailingStream<S> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.fault.operation()?;
        self.inner.read(buf)
    }

    fn read_pages(&mut self, pages: &[GuestRange<'_>]) -> io::Result<()> {
        self.fault.operation()?;
        self.inner.read_pages(pages)
    }

    fn interrupter(&mut self) -> io::Result<Box<dyn Stopper>> {
        self.inner.interrupter()
    }
}

impl Stream for FailingStream {
    fn split(self: Box<Self>) -> io::Result<(Box<dyn SendHalf>, Box<dyn RecvHalf>)> {
        let FailingStream { fault, inner } = *self;
        let (sends, receives) = inner.split()?;
        let sends = FailingStream { fault: fault.clone(), inner: sends };
        Ok((Box::new(sends), Box::new(FailingStream { fault, inner: receives })))
    }

    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        self.inner.stopper()
    }

    fn peer(&self) -> String {
        self.inner.peer()
    }
}
