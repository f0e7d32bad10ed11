//! Notices that the source has gone while main waits for its channels.
//!
//! A source that dies takes all its connections with it. Channels that have come end then, and that ends the round. Channels
//! that have not come cannot tell, so main looks at its own connection now and then. What has arrived there is kept: it
//! may be the beginning of the next round, and a source without return path may have said all and left.

use std::{io, time::Duration};

use multifd_proto::Step;
use multifd_proto::stream::{Item, MainDecoder};

use super::main_reader::{BUFFER, MainReader};
use crate::error::{Error, Place};

impl MainReader {
    /// Takes what has arrived, without waiting for more. Returns where and how the connection ended, if it did where the source
    /// does not end it.
    ///
    /// The end is seen behind at most [`BUFFER`] bytes that were not used yet.
    pub(super) fn look(&mut self) -> Option<(Place, io::Error)> {
        if self.unread().len() >= BUFFER {
            return None;
        }
        match self.receive_within(AT_ONCE) {
            Ok(None | Some(1..)) => None,
            Ok(Some(0)) if !self.source_listens() && may_be_all(self.decoder(), self.unread()) => None,
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

/// How long a look waits: the least that every transport takes for a limit.
const AT_ONCE: Duration = Duration::from_millis(1);
