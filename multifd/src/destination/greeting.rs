//! What a new connection says with its first bytes, and whether that makes it a part of the migration.
//!
//! Main is the first connection with the magic number of main. A channel says hello and becomes a part of the migration with
//! its first SYNC, once main has said whose migration it is. Every other connection is a stranger's: it is logged and dropped, and
//! neither ends the migration nor holds it up. So is one that says all this too slowly.

use std::{fmt, io, time::Duration};

use multifd_proto::{
    Mismatch as ProtoMismatch, Step,
    membership::{Evidence, Stranger},
    packet::{HELLO_LEN, Hello},
    postcopy::Beginning,
    stream::{Item, MainDecoder},
};

use super::{
    channel::ReceiveChannel,
    connections::Stage,
    preempt::PreemptReader,
    shared::{MainConnection, Shared},
};
use crate::{
    error::{Connection, Error, Mismatch, Place},
    sync::{Arc, Deadline, lock},
    transport::{Pending, Stream, end_if_untaken},
};

/// Why a connection goes no further.
pub(super) enum Refused {
    /// It is none of this migration; this is what it did.
    Stranger(String),
    /// It is over before it has said what it is; this is how.
    Gone(String),
    /// It is one of this migration, which ends because of it.
    Error(Error),
}

impl From<Error> for Refused {
    fn from(error: Error) -> Refused {
        Refused::Error(error)
    }
}

/// Establishes `pending` as `connection`, finds out what it is and treats it so, until it ends. Takes it if it is main, which lives
/// on in another thread. Returns whether the migration goes on.
///
/// Else the caller closes it, and an error is known as the reason before: the source sees the closed connection, ends main,
/// and main's thread would take that for the reason.
pub(super) fn serve(
    pending: Box<dyn Pending>,
    connection: &mut Option<Box<dyn Stream>>,
    number: usize,
    shared: &Arc<Shared>,
) -> bool {
    let peer = pending.peer();
    let deadline = Deadline::after(shared.options.setup_timeout);
    let greeted = establish(pending, connection, number, shared, deadline)
        .and_then(|()| greet(connection, number, shared, deadline));
    match greeted {
        Ok(()) => true,
        Err(Refused::Stranger(what)) => {
            if shared.single {
                // No other connection can be the migration.
                shared.stop.stop(Mismatch::NoMigration { peer, what }.into());
            } else {
                shared.drop_stranger(&peer, &what);
            }
            !shared.single
        }
        Err(Refused::Gone(what)) => {
            let at = Place { connection: Connection::Unknown(number), offset: 0 };
            if shared.single {
                shared.stop.stop(Error::Io { at, source: io::Error::other(format!("{peer} {what}")) });
            } else {
                shared.drop_stranger(&peer, &what);
            }
            !shared.single
        }
        Err(Refused::Error(error)) => match shared.break_off(error) {
            Ok(()) => true,
            Err(error) => {
                shared.stop.stop(error);
                false
            }
        },
    }
}

/// Waits until the connection is established, which its peer may delay or prevent.
fn establish(
    pending: Box<dyn Pending>,
    connection: &mut Option<Box<dyn Stream>>,
    number: usize,
    shared: &Shared,
    deadline: Deadline,
) -> Result<(), Refused> {
    let mut stream =
        pending.establish(deadline.left()).map_err(|error| gone(format!("is not established: {error}")))?;
    let stopper = stream.stopper().map_err(|error| gone(format!("cannot be ended: {error}")))?;
    shared.connections.established(number, stopper);
    end_if_untaken(&mut *stream, shared.options.stall_limit);
    *connection = Some(stream);
    Ok(())
}

fn greet(
    connection: &mut Option<Box<dyn Stream>>,
    number: usize,
    shared: &Arc<Shared>,
    deadline: Deadline,
) -> Result<(), Refused> {
    let Some(stream) = connection.as_deref_mut() else { return Ok(()) };
    let mut hello = [0; HELLO_LEN];
    let (first, rest) = hello.split_at_mut(4);
    if shared.single {
        // It was opened before its source was there, as a FIFO is: how long that takes is as open as with a listener.
        hear(stream, &mut first[..1], Deadline::after(None))?;
    }
    let deadline = if shared.single { Deadline::after(shared.options.setup_timeout) } else { deadline };
    if !hear_beginning(stream, &mut first[usize::from(shared.single)..], deadline, shared)? {
        // QEMU from 10.0 on ends a preempt connection so, if no page was asked for.
        tracing::debug!(peer = stream.peer(), "a connection has ended without a word");
        return Ok(());
    }
    match Beginning::of(*first.first_chunk().expect("four bytes")) {
        Beginning::Main => {
            let mut heard = first.to_vec();
            if let Some(token) = &shared.options.token {
                hear_token(stream, &mut heard, shared.page_size, token, deadline)?;
            }
            unlimited(stream)?;
            shared.take_main(connection, heard, number)
        }
        Beginning::Channel if shared.single => Err(stranger("is one channel of a migration, without its main")),
        Beginning::Channel => {
            // What is left of the limit holds until its first packet.
            hear(stream, rest, deadline)?;
            let hello = Hello::decode(&hello).map_err(|error| stranger(format!("says hello wrongly: {error}")))?;
            if !shared.connections.advance(number, Stage::Candidate) {
                return Err(stranger("comes when the channels are complete"));
            }
            match shared.is_identified() {
                true => shared.judge(&hello, &stream.peer())?,
                // Main has not said yet whose migration it is: it is judged when it joins.
                false if shared.options.token.is_none() => {}
                false => shared.recognize(&hello)?,
            }
            ReceiveChannel::new(hello, number, stream, shared.clone()).run()
        }
        Beginning::Recovery if shared.may_go_on() => {
            unlimited(stream)?;
            shared.keep_next_main(connection, first.to_vec(), number)
        }
        Beginning::Recovery => Err(stranger(
            "continues a postcopy migration that was interrupted (RECV_BITMAP): it can only be taken from its beginning",
        )),
        Beginning::Bare if shared.may_be_preempt(first, deadline) => {
            unlimited(stream)?;
            PreemptReader::new(stream, first, number, shared).run()
        }
        Beginning::Bare => Err(stranger(language(first))),
    }
}

/// Fills `into` with the first bytes of a connection before `deadline`. A preempt connection says nothing before the switch to postcopy:
/// where the source has announced that, one that is silent is left in peace. Returns whether it has said anything then.
fn hear_beginning(
    stream: &mut dyn Stream,
    into: &mut [u8],
    deadline: Deadline,
    shared: &Shared,
) -> Result<bool, Refused> {
    let (first, rest) = into.split_at_mut(1);
    match hear(stream, first, deadline) {
        Ok(()) => hear(stream, rest, deadline).map(|()| true),
        Err(_) if shared.may_have_preempt() && !deadline.is_over() => Ok(false),
        Err(_) if shared.may_have_preempt() => match hear(stream, first, Deadline::after(None)) {
            Ok(()) => hear(stream, rest, Deadline::after(shared.options.setup_timeout)).map(|()| true),
            Err(_) => Ok(false),
        },
        Err(refused) => Err(refused),
    }
}

/// Reads the configuration of main, of which `heard` has been read, and puts its bytes behind it. Its source has to offer
/// `token`: only then its main takes the place of main.
fn hear_token(
    stream: &mut dyn Stream,
    heard: &mut Vec<u8>,
    page_size: usize,
    token: &[u8; 16],
    deadline: Deadline,
) -> Result<(), Refused> {
    let mut decoder = MainDecoder::new(page_size);
    let mut used = 0;
    loop {
        match decoder.step(&heard[used..]).map_err(|error| stranger(format!("says it is main, and {error}")))? {
            Step::Item { item: Item::ConfigOffer(offer), .. } => {
                return match offer.token {
                    Some(theirs) if equal_in_constant_time(token, &theirs) => Ok(()),
                    _ => Err(stranger("says it is main, without the token of this migration")),
                };
            }
            Step::Item { used: more, .. } if decoder.in_configuration() => used += more,
            Step::Item { .. } => return Err(stranger("says it is main, without the token of this migration")),
            Step::Need(total) => {
                let from = heard.len();
                heard.resize(used + total, 0);
                hear(stream, &mut heard[from..], deadline)?;
            }
        }
    }
}

/// Fills `into` before `deadline`.
fn hear(stream: &mut dyn Stream, mut into: &mut [u8], deadline: Deadline) -> Result<(), Refused> {
    while !into.is_empty() {
        if deadline.is_over() {
            return Err(gone("does not say in time what it is"));
        }
        // A timeout of 0 is none.
        let left = deadline.left().map(|left| left.max(Duration::from_millis(1)));
        stream.set_read_timeout(left).map_err(|error| gone(format!("breaks: {error}")))?;
        match stream.read(into) {
            Ok(0) => return Err(gone("ends before it has said what it is")),
            Ok(n) => into = &mut into[n..],
            Err(error) if is_timeout(&error) => {}
            // A packed stream that is damaged.
            Err(error) if error.kind() == io::ErrorKind::InvalidData => return Err(stranger(error)),
            Err(error) => return Err(gone(format!("breaks before it has said what it is: {error}"))),
        }
    }
    Ok(())
}

/// Whether a read has waited for as long as it may.
pub(super) fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock)
}

/// From here on the connection may say nothing for as long as it likes: the limits of the migration hold for it.
pub(super) fn unlimited(stream: &mut dyn Stream) -> Result<(), Refused> {
    stream.set_read_timeout(None).map_err(|error| stranger(format!("breaks: {error}")))
}

/// What a connection speaks that begins with `first`.
fn language(first: &[u8]) -> String {
    let name = match first {
        [0x16, 0x03, ..] => "TLS; a source with TLS needs a destination with TLS",
        b"GET " | b"POST" | b"HEAD" | b"PUT " | b"OPTI" | b"CONN" => "HTTP",
        b"SSH-" => "SSH",
        b"Libv" => "libvirt's save image; `multifd convert IMAGE CHECKPOINT` takes the VM in it",
        [0x1f, 0x8b, ..] => "gzip; `gunzip -c` unpacks it",
        [0xfd, b'7', b'z', b'X'] => "xz; `xz -dc` unpacks it",
        [0x28, 0xb5, 0x2f, 0xfd] => "zstd; `zstd -dc` unpacks it",
        [b'B', b'Z', b'h', _] => "bzip2; `bunzip2 -c` unpacks it",
        _ => return format!("begins with {:?}, not with QEVM or a hello", first.escape_ascii().to_string()),
    };
    format!("speaks {name}")
}

fn stranger(what: impl fmt::Display) -> Refused {
    Refused::Stranger(what.to_string())
}

fn gone(what: impl fmt::Display) -> Refused {
    Refused::Gone(what.to_string())
}

impl Shared {
    /// `connection` says that it is main, with the bytes `heard`: takes it, if it can be.
    fn take_main(
        &self,
        connection: &mut Option<Box<dyn Stream>>,
        heard: Vec<u8>,
        number: usize,
    ) -> Result<(), Refused> {
        let mut slot = lock(&self.main);
        if slot.taken {
            return Err(stranger("says it is main, which is here already: a second source?"));
        }
        if !self.connections.advance(number, Stage::Member) {
            return Err(stranger("comes when the migration is over"));
        }
        slot.taken = true;
        if let Some(stream) = connection.take() {
            let at = Place { connection: Connection::Main, offset: 0 };
            let (far_end, peer) = (stream.far_end(), stream.peer());
            let (sends, mut receives) = stream.split().map_err(Error::io(at))?;
            self.connections.main_is_here(number, receives.interrupter().map_err(Error::io(at))?);
            slot.connection = Some(MainConnection { sends, receives, far_end, peer, heard });
        }
        drop(slot);
        self.main_changed.notify_all();
        Ok(())
    }

    /// Whether the source may have a preempt connection. No token can be named on it.
    fn may_have_preempt(&self) -> bool {
        self.switch.is_announced() && self.options.token.is_none()
    }

    /// Whether a connection may be one of postcopy's that begins with `first`: part of a RAM word, not of another protocol.
    fn may_be_preempt(&self, first: &[u8], deadline: Deadline) -> bool {
        // A word is an offset, and that of a block with less than 2^56 bytes.
        let possible = first[0] == 0 && !self.single && self.options.token.is_none();
        possible && self.switch.await_announcement(deadline)
    }

    /// Whether the channel that said `hello` is one of this migration and may join now.
    pub(super) fn judge(&self, hello: &Hello, peer: &str) -> Result<(), Refused> {
        self.recognize(hello)?;
        self.barrier.admit(hello.channel, hello.channels).map_err(|why| self.refusal(why, hello, peer))
    }

    /// Compares the token or the uuid of `hello` with what is known.
    fn recognize(&self, hello: &Hello) -> Result<(), Refused> {
        let seen = lock(&self.seen);
        if let Some(token) = self.options.token.or(seen.main_token) {
            return match equal_in_constant_time(&token, &hello.uuid) {
                true => Ok(()),
                false => Err(stranger("says hello with another token than this migration's")),
            };
        }
        match self.options.uuid.or(seen.main_uuid).or(seen.uuid) {
            Some(expected) if expected != hello.uuid => {
                Err(stranger(format!("says hello: {}", ProtoMismatch::Uuid { expected, found: hello.uuid })))
            }
            _ => Ok(()),
        }
    }

    /// What follows from `why` for the channel that said `hello`.
    pub(super) fn refusal(&self, why: Stranger, hello: &Hello, peer: &str) -> Refused {
        let (joined, evidence) = self.barrier.members(|members| (members.joined(), members.evidence()));
        match why {
            // Its pages belong to rounds that are over: only this can be right.
            Stranger::TooLate { id } => Error::from(Mismatch::ChannelTooLate { id, peer: peer.to_owned() }).into(),
            // The first to come says so, and none of its own can follow.
            Stranger::OtherCount { told, channels, .. } if joined == 0 && evidence == Some(Evidence::Required) => {
                Error::from(Mismatch::Channels { opened: told, expected: channels }).into()
            }
            why => {
                if let (Stranger::OutOfRange { id, channels }, Some(Evidence::Required)) = (why, evidence) {
                    lock(&self.seen).beyond = Some((id, channels));
                }
                stranger(format!("says hello as channel {}: {why}", hello.channel))
            }
        }
    }

    /// A channel has joined.
    pub(super) fn welcome(&self, hello: &Hello) {
        let mut seen = lock(&self.seen);
        // With a token these bytes are not a uuid.
        if self.options.token.or(seen.main_token).is_none() {
            seen.uuid.get_or_insert(hello.uuid);
        }
    }

    /// Logs that a connection is dropped, and why.
    pub(super) fn drop_stranger(&self, peer: &str, what: &str) {
        if self.connections.are_complete() {
            return tracing::debug!(peer, what, "drops a connection, the channels are complete");
        }
        let mut seen = lock(&self.seen);
        seen.strangers += 1;
        seen.last_stranger = Some(format!("{peer} {what}"));
        // One that comes again and again must not fill the log.
        if seen.strangers <= LOGGED_STRANGERS {
            tracing::warn!(peer, what, "drops a connection that is none of this migration");
        } else {
            tracing::debug!(peer, what, count = seen.strangers, "drops a connection that is none of this migration");
        }
    }
}

/// A stranger learns nothing about `token` from how long this takes.
fn equal_in_constant_time(token: &[u8; 16], other: &[u8; 16]) -> bool {
    let [token, other] = [token, other].map(|bytes| std::hint::black_box(u128::from_ne_bytes(*bytes)));
    token ^ other == 0
}

/// Strangers of one migration that are logged as warnings.
pub(super) const LOGGED_STRANGERS: u64 = 100;
