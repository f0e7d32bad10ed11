//! What main does at the end of a round: it waits for the channels, and notices meanwhile that its source has gone.
//!
//! A source that dies takes all its connections with it. Channels that have come end then, and that ends the round. Channels
//! that have not come cannot tell, so main looks at its own connection now and then. What has arrived there is kept: it
//! may be the beginning of the next round, and a source without return path may have said all and left.

use std::{io, time::Duration};

use multifd_proto::stream::{Item, MainDecoder, Step};

use super::{
    Run,
    main_reader::{BUFFER, MainReader},
};
use crate::{
    barrier::{Passed, Patience},
    error::{Error, Place},
};

impl Run {
    /// Waits until `round` is over, at whose end main has arrived.
    ///
    /// # Errors
    /// Channels that are missing did not come in time, or main has ended meanwhile; as
    /// [`RoundBarrier::pass`](crate::barrier::RoundBarrier::pass).
    pub(super) fn pass(&mut self, round: u64) -> Result<(), Error> {
        let mut patience = Patience::new(self.shared.options.setup_timeout, LOOK_EVERY);
        loop {
            match self.shared.barrier.pass_within(round, &mut patience)? {
                Passed::Over => return Ok(()),
                Passed::Missing => return Err(self.shared.channels_missing()),
                Passed::NotYet => self.look_at_main()?,
            }
        }
    }

    /// Notices that main has ended where it may not.
    fn look_at_main(&mut self) -> Result<(), Error> {
        let Some((at, source)) = self.main().look() else { return Ok(()) };
        Err(match self.shared.barrier.members(|members| members.is_complete()) {
            true => Error::Io { at, source },
            false => Error::SourceGone { at, channels: self.shared.channels_here(), source },
        })
    }
}

impl MainReader {
    /// Takes what has arrived, without waiting for more. Returns where and how the connection ended, if it did where the source
    /// does not end it.
    ///
    /// The end is seen behind at most [`BUFFER`] bytes that were not used yet.
    fn look(&mut self) -> Option<(Place, io::Error)> {
        if self.unread().len() >= BUFFER {
            return None;
        }
        match self.receive_within(AT_ONCE) {
            Ok(None | Some(1..)) => None,
            Ok(Some(0)) if !self.source_waits() && may_be_all(self.decoder(), self.unread()) => None,
            Ok(Some(0)) => Some((self.end_place(), io::ErrorKind::UnexpectedEof.into())),
            Err(Error::Io { at, source }) => Some((at, source)),
            // Nothing else is told by a connection; it is found again where it is read.
            Err(_) => None,
        }
    }
}

/// Whether a stream of which `rest` is all that is left can be complete.
///
/// The state of a device has no length on the wire: what follows one is not known.
fn may_be_all(decoder: &MainDecoder, mut rest: &[u8]) -> bool {
    let mut decoder = decoder.clone();
    loop {
        match decoder.step(rest) {
            Ok(Step::Item { item: Item::Eof | Item::Section(_), .. }) => return true,
            Ok(Step::Item { item, used }) => {
                let payload = usize::try_from(item.payload_len()).unwrap_or(usize::MAX);
                match rest.get(used.saturating_add(payload)..) {
                    Some(more) => rest = more,
                    None => return false,
                }
            }
            Ok(Step::Need(_)) => return false,
            // Main's own reader reports it.
            Err(_) => return true,
        }
    }
}

/// How often main's connection is looked at while main waits. Most rounds are over sooner.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How long a look waits: the least that every transport takes for a limit.
const AT_ONCE: Duration = Duration::from_millis(1);
