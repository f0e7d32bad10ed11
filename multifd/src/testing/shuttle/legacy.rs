//! Connections as those of QEMU 7.2, whose packet of SYNC has pages as well.

use std::io;

use multifd_proto::packet::Prefix;

use crate::{
    ram::GuestRange,
    transport::{Connect, Pending, RecvHalf, SendHalf, Stopper, Stream, wrapped},
};

/// Channels whose last packet of a section carries SYNC.
pub(super) struct Legacy(pub(super) Box<dyn Connect>);

impl Connect for Legacy {
    fn dial(&self) -> io::Result<Box<dyn Pending>> {
        Ok(wrapped(self.0.dial()?, |inner| Ok(Box::new(LegacyStream { inner, held: None }))))
    }
}

struct LegacyStream<S: ?Sized = dyn Stream> {
    /// A packet that was not sent yet: SYNC may be next.
    held: Option<(Vec<u8>, Vec<u8>)>,
    inner: Box<S>,
}

impl<S: SendHalf + ?Sized> LegacyStream<S> {
    fn send_held(&mut self) -> io::Result<()> {
        match self.held.take() {
            Some((header, payload)) => {
                self.inner.write(&header, &[])?;
                if payload.is_empty() { Ok(()) } else { self.inner.write(&payload, &[]) }
            }
            None => Ok(()),
        }
    }
}

impl<S: SendHalf + ?Sized> SendHalf for LegacyStream<S> {
    fn write(&mut self, header: &[u8], pages: &[GuestRange<'_>]) -> io::Result<()> {
        let prefix = header.first_chunk().map(Prefix::decode);
        let Some(Ok(prefix)) = prefix.filter(|_| header.len() > 100) else {
            // Main, or a hello.
            return self.inner.write(header, pages);
        };
        if let (true, Some((held, _))) = (prefix.sync(), &mut self.held) {
            // The flags are the third word of a packet.
            for (held, sync) in held[8..12].iter_mut().zip(&header[8..12]) {
                *held |= sync;
            }
            // Both had a number, and the packet has the later one, as with QEMU 7.2.
            held[24..32].copy_from_slice(&header[24..32]);
            return self.send_held();
        }
        self.send_held()?;
        // No SYNC follows device state.
        if prefix.sync() || prefix.device_state() {
            return self.inner.write(header, pages);
        }
        let mut payload = Vec::new();
        for page in pages {
            let begin = payload.len();
            payload.resize(begin + page.len(), 0);
            page.read(&mut payload[begin..]);
        }
        self.held = Some((header.to_vec(), payload));
        Ok(())
    }

    fn finish(&mut self) -> io::Result<()> {
        self.inner.finish()
    }
}

receives_as_inner!(LegacyStream);

impl Stream for LegacyStream {
    fn split(self: Box<Self>) -> io::Result<(Box<dyn SendHalf>, Box<dyn RecvHalf>)> {
        let LegacyStream { held, inner } = *self;
        let (inner, receives) = inner.split()?;
        Ok((Box::new(LegacyStream { held, inner }), receives))
    }

    fn stopper(&self) -> io::Result<Box<dyn Stopper>> {
        self.inner.stopper()
    }

    fn peer(&self) -> String {
        self.inner.peer()
    }
}
