//! The handshake: one record at a time, before a deadline.
//!
//! Nothing that follows the handshake is taken from the connection, so the records begin where this ends. A peer that is refused
//! is told why by an alert, and is read from for a moment so that the alert is not lost in a reset.

use std::{io, sync::Arc, time::Duration};

use rustls::{
    Error,
    client::UnbufferedClientConnection,
    pki_types::ServerName,
    server::UnbufferedServerConnection,
    unbuffered::{ConnectionState, EncodeError, EncodeTlsData, UnbufferedStatus},
};

use super::{
    credentials::{ClientCertificates, ClientCredentials, ServerCredentials},
    reasons::{self, Peer},
    records::{HEADER_LEN, MAX_RECORD, Session},
};
use crate::{sync::Deadline, transport::Stream};

/// The handshake of a source, with a destination whose certificate is for `name`.
///
/// # Errors
/// Why there is no connection; [`io::ErrorKind::TimedOut`].
pub(super) fn client(
    stream: &mut dyn Stream,
    credentials: &ClientCredentials,
    name: &ServerName<'static>,
    deadline: Deadline,
) -> io::Result<Session> {
    let connection = UnbufferedClientConnection::new(credentials.config.clone(), name.clone());
    Handshake::new(stream, Peer::Server, deadline).run(connection.map_err(io::Error::other)?)
}

/// The handshake of a destination.
///
/// # Errors
/// As [`client`].
pub(super) fn server(
    stream: &mut dyn Stream,
    credentials: &ServerCredentials,
    deadline: Deadline,
) -> io::Result<Session> {
    let connection = UnbufferedServerConnection::new(Arc::clone(&credentials.config));
    let session = Handshake::new(stream, Peer::Client, deadline).run(connection.map_err(io::Error::other)?)?;
    if credentials.clients == ClientCertificates::NotAsked {
        tracing::debug!("the source was not asked for a certificate");
    }
    Ok(session)
}

/// One end of a handshake.
trait Party: Sized {
    /// Goes on with `incoming`, which begins with a record where it has any. Returns how much of it was used.
    fn step(&mut self, incoming: &mut [u8], outgoing: &mut Vec<u8>) -> (usize, Result<Step, Error>);

    /// Whether there is something to be encoded.
    fn has_to_send(&self) -> bool;

    fn finish(self) -> Result<Session, Error>;
}

/// What a handshake needs next.
enum Step {
    /// To go on.
    Again,
    /// To have sent what there is to be sent.
    Send,
    /// One more record.
    Receive,
    Done,
}

macro_rules! party {
    ($connection:ty) => {
        impl Party for $connection {
            fn step(&mut self, incoming: &mut [u8], outgoing: &mut Vec<u8>) -> (usize, Result<Step, Error>) {
                let is_handshaking = self.is_handshaking();
                let UnbufferedStatus { discard, state, .. } = self.process_tls_records(incoming);
                let state = match state {
                    Ok(state) => state,
                    Err(error) => return (discard, Err(error)),
                };
                let step = match state {
                    ConnectionState::EncodeTlsData(data) => encode(data, outgoing).map(|()| Step::Again),
                    ConnectionState::TransmitTlsData(data) => {
                        data.done();
                        Ok(Step::Send)
                    }
                    ConnectionState::BlockedHandshake => Ok(Step::Receive),
                    // A server may send before it has heard all of the client.
                    ConnectionState::WriteTraffic(_) if is_handshaking => {
                        return (discard, Ok(if self.is_handshaking() { Step::Receive } else { Step::Done }));
                    }
                    ConnectionState::WriteTraffic(_) => Ok(Step::Done),
                    ConnectionState::PeerClosed | ConnectionState::Closed => {
                        Err(Error::General("it ends the connection within the handshake".to_owned()))
                    }
                    _ => Err(Error::General("it sends data within the handshake".to_owned())),
                };
                (discard, step)
            }

            fn has_to_send(&self) -> bool {
                self.wants_write()
            }

            fn finish(self) -> Result<Session, Error> {
                let (secrets, connection) = self.dangerous_into_kernel_connection()?;
                Session::new(secrets, connection)
            }
        }
    };
}

party!(UnbufferedClientConnection);
party!(UnbufferedServerConnection);

fn encode<D>(mut data: EncodeTlsData<'_, D>, outgoing: &mut Vec<u8>) -> Result<(), Error> {
    let from = outgoing.len();
    let mut encoded = data.encode(&mut []);
    if let Err(EncodeError::InsufficientSize(size)) = &encoded {
        outgoing.resize(from + size.required_size, 0);
        encoded = data.encode(&mut outgoing[from..]);
    }
    let written = encoded.map_err(|error| Error::General(error.to_string()))?;
    outgoing.truncate(from + written);
    Ok(())
}

/// A handshake that goes on.
struct Handshake<'a> {
    stream: &'a mut dyn Stream,
    peer: Peer,
    deadline: Deadline,
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
    /// Whether the peer has been seen to speak TLS.
    is_tls: bool,
}

impl<'a> Handshake<'a> {
    fn new(stream: &'a mut dyn Stream, peer: Peer, deadline: Deadline) -> Handshake<'a> {
        Handshake { stream, peer, deadline, incoming: Vec::new(), outgoing: Vec::new(), is_tls: false }
    }

    fn run(mut self, mut party: impl Party) -> io::Result<Session> {
        loop {
            let (used, step) = party.step(&mut self.incoming, &mut self.outgoing);
            self.incoming.drain(..used);
            match step {
                Ok(Step::Again) => {}
                Ok(Step::Send) => self.send()?,
                Ok(Step::Receive) => self.record()?,
                Ok(Step::Done) => {
                    self.send()?;
                    let session = party.finish();
                    return session.map_err(|error| refused(reasons::of(&error, self.peer)));
                }
                Err(error) => {
                    self.say_why(party);
                    return Err(refused(reasons::of(&error, self.peer)));
                }
            }
        }
    }

    fn send(&mut self) -> io::Result<()> {
        if !self.outgoing.is_empty() {
            self.stream.write(&self.outgoing, &[]).map_err(|error| self.explained(error))?;
            self.outgoing.clear();
        }
        Ok(())
    }

    /// Sends the alert that belongs to an error, as far as the peer takes it.
    fn say_why(&mut self, mut party: impl Party) {
        // Not a step more: it would look for the messages that it has not used, and they are gone.
        while party.has_to_send() {
            if !matches!(party.step(&mut [], &mut self.outgoing), (_, Ok(Step::Again))) {
                break;
            }
        }
        self.part();
    }

    /// Sends the last that there is to be sent, and waits for a moment until the peer has it.
    fn part(&mut self) {
        let told = self.send().and_then(|()| self.stream.finish());
        if let Err(error) = told {
            return tracing::debug!(%error, "the peer is not told why it is refused");
        }
        // A close with unread bytes resets the connection, and the alert with it.
        let until = Deadline::after(Some(self.deadline.left().map_or(LINGER, |left| left.min(LINGER))));
        let (mut scrap, mut rest) = ([0; 4096], MAX_SCRAP);
        while rest > 0 && !until.is_over() {
            match self.read(&mut scrap, until) {
                Ok(n @ 1..) => rest = rest.saturating_sub(n),
                _ => break,
            }
        }
    }

    /// Receives one more record.
    fn record(&mut self) -> io::Result<()> {
        let mut header = [0; HEADER_LEN];
        let first = self.fill(&mut header)?;
        if !std::mem::replace(&mut self.is_tls, true) {
            // The first record is of a handshake, or an alert.
            let is_tls = matches!(header, [0x15 | 0x16, 3, _, _, _]) && first == HEADER_LEN;
            if !is_tls {
                // A plain source takes it for a message of its destination, and ours knows what it is.
                self.outgoing.extend_from_slice(&UNEXPECTED_MESSAGE);
                self.part();
                return Err(refused(reasons::no_tls(&header[..first], self.peer)));
            }
        }
        let len = usize::from(u16::from_be_bytes([header[3], header[4]]));
        if HEADER_LEN + len > MAX_RECORD || self.incoming.len() > MAX_INCOMING {
            return Err(refused("the peer sends more in a handshake than there may be".to_owned()));
        }
        let from = self.incoming.len() + HEADER_LEN;
        self.incoming.extend_from_slice(&header);
        self.incoming.resize(from + len, 0);
        let mut record = std::mem::take(&mut self.incoming);
        let filled = self.fill(&mut record[from..]);
        self.incoming = record;
        filled.map(drop)
    }

    /// Fills `into`. Returns how much it has filled where the first bytes tell that this is no TLS.
    fn fill(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let mut filled = 0;
        while filled < into.len() {
            match self.read(&mut into[filled..], self.deadline)? {
                0 => return Err(self.ended()),
                n => filled += n,
            }
            // A peer that speaks something else may wait for an answer to fewer bytes than a header has.
            if !self.is_tls && filled >= 4 && !matches!(into, [0x15 | 0x16, 3, ..]) {
                break;
            }
        }
        Ok(filled)
    }

    fn ended(&self) -> io::Error {
        let hint = match (self.peer, self.is_tls) {
            (Peer::Server, false) => ": does the destination have TLS on?",
            _ => "",
        };
        refused(format!("the peer has closed the connection within the handshake{hint}"))
    }

    fn read(&mut self, into: &mut [u8], deadline: Deadline) -> io::Result<usize> {
        let over = || io::Error::new(io::ErrorKind::TimedOut, "the handshake takes too long");
        if deadline.is_over() {
            return Err(over());
        }
        self.stream.set_read_timeout(deadline.left())?;
        self.stream.read(into).map_err(|error| match error.kind() {
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => over(),
            _ => self.explained(error),
        })
    }

    /// A peer that closes the connection with our hello unread has the kernel reset it.
    fn explained(&self, error: io::Error) -> io::Error {
        match error.kind() {
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => self.ended(),
            _ => error,
        }
    }
}

fn refused(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, message)
}

/// Handshake messages have at most 64 KiB, and one may be spread over records.
const MAX_INCOMING: usize = 128 << 10;

/// A fatal alert, in a record of its own.
const UNEXPECTED_MESSAGE: [u8; 7] = [0x15, 3, 3, 0, 2, 2, 10];

/// How long a peer that is refused is read from.
const LINGER: Duration = Duration::from_secs(1);

/// How much of what it sends is read meanwhile.
const MAX_SCRAP: usize = 1 << 20;
