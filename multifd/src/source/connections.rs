//! The connections of a source: how they are opened and how they end.

use std::io;

use super::{Run, Shared, channel::SendChannel, main_channel::MainChannel, return_path::ReturnPath};
use crate::{
    error::{Connection, Error, Mismatch, Place},
    sync::lock,
    transport::{Connect, end_if_untaken},
    vm::SourceVm,
};

impl Run {
    /// Opens main, with its first bytes: a destination may take the first connection for main, and may wait for those bytes
    /// before it accepts the next. Then opens all channels; while they are on their way both ends begin to agree.
    pub(super) fn connect(&mut self, vm: &mut dyn SourceVm, to: &dyn Connect) -> Result<(), Error> {
        self.connect_main(to)?;
        self.dial_channels(to)?;
        self.propose(vm)?;
        self.await_channels(to)
    }

    fn connect_main(&mut self, to: &dyn Connect) -> Result<(), Error> {
        let shared = &self.shared;
        let at = Place { connection: Connection::Main, offset: 0 };
        let pending = to.dial().map_err(Error::io(at))?;
        shared.stop.register(pending.stopper().map_err(Error::io(at))?);
        let mut stream = pending.establish(None).map_err(Error::io(at))?;
        shared.stop.register(stream.stopper().map_err(Error::io(at))?);
        end_if_untaken(&mut *stream, shared.live.get().stall_limit);
        let stopper = stream.stopper().map_err(Error::io(at))?;
        shared.backlog.add(at.connection, &*stream).map_err(Error::io(at))?;
        let peer = stream.peer();
        let (sends, receives) = stream.split().map_err(Error::io(at))?;
        if shared.options.plan.hand_over && !sends.sends_descriptors() {
            return Err(Mismatch::NoDescriptors { peer }.into());
        }
        self.main_copies(&peer);
        let mut main = MainChannel::new(sends, shared);
        main.header()?;
        let offered = shared.options.offer().map(|offer| offer.extensions);
        let (pulse, threads) = (shared.pulse.clone(), &*shared.options.threads);
        self.return_path = Some(ReturnPath::listen(receives, Some(stopper), offered, pulse, &shared.stop, threads)?);
        main.open_return_path()?;
        self.main = Some(main);
        Ok(())
    }

    /// Ends all connections in order: there is no more to be sent.
    pub(super) fn say_goodbye(&mut self) {
        let main = self.main.as_mut().map(MainChannel::finish);
        for outcome in main.into_iter().chain(self.ended.iter_mut().map(SendChannel::finish)) {
            if let Err(error) = outcome {
                tracing::debug!(%error, "at the end of a connection");
            }
        }
    }
}

impl Shared {
    /// A channel was asked to send to `peer` without copying. If it cannot, the first reason is kept.
    pub(super) fn copies(&self, peer: &str, outcome: io::Result<()>) {
        let Err(error) = outcome else { return };
        let mut because = lock(&self.copies_because);
        if because.is_none() {
            tracing::warn!(peer, %error, "zero-copy is not possible here, pages are copied");
            *because = Some(error.to_string());
        }
    }
}
