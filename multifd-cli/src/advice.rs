//! What to look at when a QEMU destination hangs up: it says why in its own log, and on the wire nothing at all.

use std::{
    sync::mpsc,
    time::{Duration, Instant},
};

use multifd::{
    checkpoint::Checkpoint,
    error::{Connection, Error},
    progress::Progress,
    source, threads,
};
use multifd_proto::packet::Compression;

use crate::{describe, files, report::compression_name, terminal, units};

/// The message for `error`, which ended the sending of `checkpoint` with `options`: with what was sent and what to compare
/// where a QEMU may have hung up because of it.
pub fn for_sender(error: &Error, checkpoint: &Checkpoint, options: &source::Options, progress: &Progress) -> String {
    let is_ours = checkpoint.machine().starts_with("multifd");
    // Before the first byte, it is the connection itself.
    let was_connected = progress.snapshot().bytes() > 0;
    if is_ours || !was_connected || !hung_up(error) {
        return files::message(error);
    }
    format!("{error}. {}", what_to_compare(checkpoint, options))
}

/// The message for `error`, which ended a migration to here over connections: a source that gives up tells its destination no reason, and
/// only closes them.
pub fn for_receiver(error: &Error) -> String {
    let message = files::message(error);
    if !is_gone(error) {
        return message;
    }
    format!("{message}; the source has ended the migration or is gone: it says itself why, and what its guest does")
}

/// Whether a connection has ended and nothing else is known.
fn is_gone(error: &Error) -> bool {
    use std::io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    match error {
        Error::Io { source, .. } => matches!(source.kind(), UnexpectedEof | ConnectionReset | BrokenPipe),
        Error::SourceGone { .. } => true,
        // A channel that has ended where there was more to come.
        Error::Protocol { .. } => !error.is_peers_fault(),
        _ => false,
    }
}

/// Says what to compare once the destination has taken nothing for [`PATIENCE`], in a thread that ends when this is dropped.
pub struct Impatience {
    _end: mpsc::Sender<()>,
}

impl Impatience {
    /// Watches the sending of `checkpoint` with `options`, which `progress` counts. A destination of ours says itself what is
    /// wrong, so there is nothing to watch.
    pub fn watch(checkpoint: &Checkpoint, options: &source::Options, progress: &Progress) -> Option<Impatience> {
        if options.peer != source::Peer::Qemu {
            return None;
        }
        let (end, ended) = mpsc::channel();
        let (progress, advice) = (progress.clone(), what_to_compare(checkpoint, options));
        let watch = move || {
            let (mut bytes, mut since) = (0, Instant::now());
            while ended.recv_timeout(LOOK_EVERY) == Err(mpsc::RecvTimeoutError::Timeout) {
                let now = progress.snapshot().bytes();
                if now != bytes {
                    (bytes, since) = (now, Instant::now());
                } else if bytes > 0 && since.elapsed() >= PATIENCE {
                    let seconds = PATIENCE.as_secs();
                    return terminal::say(&format!(
                        "no progress for {seconds} s: the destination takes nothing. {advice}"
                    ));
                }
            }
        };
        // Without it, all but the message is as it was.
        threads::spawn("impatience", watch).ok()?;
        Some(Impatience { _end: end })
    }
}

/// What a QEMU was sent, and where to look.
fn what_to_compare(checkpoint: &Checkpoint, options: &source::Options) -> String {
    let blocks: Vec<String> =
        checkpoint.blocks().iter().map(|block| format!("{:?} {}", block.name, units::show_size(block.bytes))).collect();
    let compression = match options.format.compression {
        Compression::None => "no compression".to_owned(),
        method => format!("compression {}", compression_name(method)),
    };
    let uuid = match options.qemu.uuid {
        uuid if uuid == [0; 16] => "no UUID".to_owned(),
        uuid => format!("UUID {}", describe::uuid(&uuid)),
    };
    let multifd = match options.plan.channels {
        0 => "the capability multifd (it has to be off), and the parameter",
        _ => "the capability multifd, and the parameters multifd-channels, multifd-compression and",
    };
    format!(
        "A QEMU says nothing on the connection when it is set up otherwise. It was sent: machine {}, {}, {compression}, \
         {uuid}, RAM blocks {}. Compare its -machine, -m and devices, -uuid, {multifd} \
         tls-creds (query-migrate-parameters). It writes its reason to its \
         stderr (with libvirt: /var/log/libvirt/qemu/NAME.log) and to error-desc of query-migrate",
        checkpoint.machine(),
        describe::channels(usize::from(options.plan.channels)),
        blocks.join(", "),
    )
}

/// Whether the destination ended the connection, does nothing, or said something in answer that is no migration.
fn hung_up(error: &Error) -> bool {
    match error {
        Error::Io { .. } | Error::Unconfirmed | Error::Refused { .. } => true,
        // One that waits for more channels than there are says nothing either.
        Error::Stalled { .. } | Error::PauseLimit { .. } => true,
        Error::InDoubt { reason } => hung_up(reason),
        Error::Protocol { at, .. } => at.connection == Connection::ReturnPath,
        _ => false,
    }
}

/// A QEMU that is set up otherwise waits for what never comes, without a word; one that is only slow takes some bytes in this
/// time.
const PATIENCE: Duration = Duration::from_secs(10);
const LOOK_EVERY: Duration = Duration::from_millis(500);

#[cfg(test)]
mod tests {
    use std::io;

    use multifd::error::{Mismatch, Place};

    use super::*;

    /// A destination said `channel 3 ended without the SYNC packet of round 1` of a source that was cancelled.
    #[test]
    fn a_destination_whose_source_has_ended_says_where_the_reason_is() {
        let io = |kind: io::ErrorKind| Error::Io {
            at: Place { connection: Connection::Main, offset: 7 },
            source: kind.into(),
        };
        for kind in [io::ErrorKind::UnexpectedEof, io::ErrorKind::ConnectionReset] {
            let message = for_receiver(&io(kind));
            assert!(message.starts_with("main, at byte 7: ") && message.contains("it says itself why"), "{message}");
        }
        for other in [io(io::ErrorKind::StorageFull), Error::Cancelled, Error::Mismatch(Mismatch::TooMuchRam)] {
            assert_eq!(for_receiver(&other), other.to_string());
        }
    }
}
