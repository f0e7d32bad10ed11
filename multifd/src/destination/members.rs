//! Whether all channels are here, and what it means that some are not.

use super::{
    Run, Target,
    named::NamedPages,
    shared::{Pages, Shared},
};
use crate::{
    error::{Error, Mismatch},
    sync::lock,
};

impl Run {
    /// Finds out whether all channels are here. Then no further connection is needed, but for one of postcopy.
    pub(super) fn look_at_members(&mut self) {
        if self.complete {
            return;
        }
        let (complete, joined, evidence) =
            self.shared.barrier.members(|members| (members.is_complete(), members.joined(), members.evidence()));
        self.report.channels = joined;
        if complete {
            tracing::debug!(channels = joined, ?evidence, "all channels are here");
            self.complete = true;
            // A preempt connection may come as late as at the switch.
            if !self.shared.switch.is_announced() {
                self.acceptor.close();
            }
        }
    }

    /// Main shows that there are channels.
    ///
    /// # Errors
    /// They cannot come: there is one connection only.
    pub(super) fn refuse_channels(&mut self) -> Result<(), Error> {
        match self.shared.single {
            true => Err(Mismatch::NeedsChannels { peer: self.main().peer() }.into()),
            false => Ok(()),
        }
    }

    /// All that carries pages is over: verifies that no page can be missing or still come.
    ///
    /// # Errors
    /// A channel goes on behind the last sync point, or nothing shows that all channels have come.
    pub(super) fn nothing_is_missing(&mut self) -> Result<(), Error> {
        let place = self.main().place();
        self.shared.barrier.close(place)?;
        self.look_at_members();
        if self.complete {
            return Ok(());
        }
        if let (opened, Some(expected)) = self.shared.barrier.members(|members| (members.joined(), members.channels()))
        {
            return Err(Mismatch::Channels { opened, expected }.into());
        }
        let named = self.named.as_ref().map_or(0, NamedPages::count);
        let all_named = lock(&self.shared.pages).as_ref().is_some_and(|pages| pages.layout.pages() == named);
        match all_named {
            true => Ok(()),
            false => self.refuse_channels().and(Err(Mismatch::ChannelsUnknown.into())),
        }
    }

    /// The stream of a background snapshot is over: verifies that it is one that `target` can take, and that every page came.
    pub(super) fn snapshot_is_whole(&mut self, target: &dyn Target) -> Result<(), Error> {
        if !target.takes_snapshots() {
            return Err(Mismatch::SnapshotRunsOn.into());
        }
        let pages = lock(&self.shared.pages).clone();
        if let (Some(named), Some(Pages { layout, .. })) = (&self.named, pages) {
            return Ok(named.verify_each_once(&layout)?);
        }
        Err(Mismatch::ChannelsUnknown.into())
    }
}

impl Shared {
    /// Which channels have come.
    pub(super) fn channels_here(&self) -> String {
        let (joined, known) = self.barrier.members(|members| (members.joined(), members.channels()));
        match (joined, known) {
            (joined, Some(channels)) => format!("{joined} of {channels} channels came"),
            (0, None) => "no channel came".to_owned(),
            (joined, None) => format!(
                "{joined} channels came, and the numbers of their packets show that there are more (if there are not, \
                 give the number of channels): these did not come"
            ),
        }
    }

    /// The channels that are missing did not come in time.
    pub(super) fn channels_missing(&self) -> Error {
        let mut what = self.channels_here();
        if let Some(stranger) = &lock(&self.seen).last_stranger {
            what = format!("a connection was dropped ({stranger}), and {what}");
        }
        Error::SetupTimeout { what, seconds: self.options.setup_timeout.unwrap_or_default().as_secs() }
    }

    /// What is behind `error` where a channel of the source's may have been dropped: a QEMU whose channel is closed ends all
    /// connections, or says nothing any more.
    pub(super) fn explained(&self, error: Error) -> Error {
        use std::io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
        let is_the_sources_end = match &error {
            Error::Io { source, .. } => {
                matches!(source.kind(), UnexpectedEof | ConnectionReset | ConnectionAborted | BrokenPipe)
            }
            Error::SourceGone { .. } | Error::Stalled { .. } => true,
            _ => false,
        };
        match lock(&self.seen).beyond.filter(|_| is_the_sources_end) {
            Some((id, expected)) => Mismatch::ChannelBeyond { id, expected, then: error.to_string() }.into(),
            None => error,
        }
    }
}
