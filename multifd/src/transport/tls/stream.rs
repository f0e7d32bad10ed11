//! An established connection with TLS, and its halves.

use std::{io, sync::Arc, time::Duration};

use super::{receives::TlsReceives, records::Session, sends::TlsSends};
use crate::{
    ram::GuestRange,
    transport::{FarEnd, Meter, RecvHalf, SendHalf, Stopper, Stream, Transit},
};

/// A connection with TLS over another one.
pub(super) struct TlsStream {
    sends: TlsSends,
    receives: TlsReceives,
    stopper: Arc<dyn Stopper>,
    meter: Option<Arc<dyn Meter>>,
    far_end: FarEnd,
    peer: String,
}

impl TlsStream {
    /// Goes on where the handshake on `stream` has ended.
    pub(super) fn new(stream: Box<dyn Stream>, session: Session) -> io::Result<TlsStream> {
        let (stopper, far_end, peer) = (stream.stopper()?.into(), stream.far_end(), stream.peer());
        let meter = stream.meter()?.map(Arc::from);
        let (sends, receives) = stream.split()?;
        Ok(TlsStream {
            sends: TlsSends::new(sends, session.sealer),
            receives: TlsReceives::new(receives, session.opener),
            stopper,
            meter,
            far_end,
            peer,
        })
    }
}

impl SendHalf for TlsStream {
    fn write(&mut self, header: &[u8], pages: &[GuestRange<'_>]) -> io::Result<()> {
        self.sends.write(header, pages)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.sends.flush()
    }

    fn limit_unsent(&mut self, bytes: usize) -> io::Result<()> {
        self.sends.limit_unsent(bytes)
    }

    fn limit_untaken(&mut self, limit: Option<Duration>) -> io::Result<()> {
        self.sends.limit_untaken(limit)
    }

    fn discard(&mut self) -> io::Result<()> {
        self.sends.discard()
    }

    fn finish(&mut self) -> io::Result<()> {
        self.sends.finish()
    }
}

impl RecvHalf for TlsStream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.receives.read(buf)
    }

    fn read_pages(&mut self, pages: &[GuestRange<'_>]) -> io::Result<()> {
        self.receives.read_pages(pages)
    }

    fn set_read_timeout(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.receives.set_read_timeout(timeout)
    }

    fn interrupter(&mut self) -> io::Result<Box<dyn Stopper>> {
        self.receives.interrupter()
    }
}

impl Stream for TlsStream {
    fn split(self: Box<Self>) -> io::Result<(Box<dyn SendHalf>, Box<dyn RecvHalf>)> {
        Ok((Box::new(self.sends), Box::new(self.receives)))
    }

    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        Ok(Box::new(self.stopper.clone()))
    }

    /// Counts what the records add, too.
    fn meter(&self) -> io::Result<Option<Box<dyn Meter>>> {
        Ok(self.meter.clone().map(|meter| Box::new(meter) as Box<dyn Meter>))
    }

    fn far_end(&self) -> FarEnd {
        self.far_end
    }

    fn peer(&self) -> String {
        self.peer.clone()
    }
}

impl Meter for Arc<dyn Meter> {
    fn transit(&self) -> io::Result<Transit> {
        (**self).transit()
    }
}
