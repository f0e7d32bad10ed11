//! How an error of a connection's thread is an end of that connection.
//!
//! Of a page that could not be put into place an [`Error::Io`] has to come from [`local`]: what a file system says sounds like what a
//! network says.

use std::io;

use multifd_proto::channel_end::End;
use rustix::io::Errno;

use crate::error::Error;

/// How the connection ends whose thread ran into `error`; `within` a packet or a word, or between two.
pub(crate) fn end_by(error: &Error, within: bool) -> End {
    match error {
        Error::Stopped => End::Stopped,
        Error::Protocol { .. } | Error::Mismatch(_) => End::Violation,
        Error::Refused { .. } => End::Refused,
        Error::Unconfirmed => End::Clean,
        Error::Stalled { .. } | Error::Paused => End::Unreachable,
        Error::Io { source, .. } => end_by_io(source, within),
        _ => End::Local,
    }
}

fn end_by_io(error: &io::Error, within: bool) -> End {
    use io::ErrorKind as Kind;
    match error.kind() {
        Kind::UnexpectedEof | Kind::WriteZero => End::Cut,
        Kind::ConnectionReset | Kind::ConnectionAborted | Kind::BrokenPipe | Kind::NotConnected if within => End::Cut,
        Kind::ConnectionReset | Kind::ConnectionAborted | Kind::BrokenPipe | Kind::NotConnected => End::Reset,
        // A peer, or one in between, damages what a transport carries.
        Kind::InvalidData => End::Violation,
        Kind::TimedOut
        | Kind::ConnectionRefused
        | Kind::HostUnreachable
        | Kind::NetworkUnreachable
        | Kind::NetworkDown => End::Unreachable,
        _ if Errno::from_io_error(error).is_some_and(|error| FROM_THE_WAY.contains(&error)) => End::Unreachable,
        _ => End::Local,
    }
}

/// `error`, of this side, so that it is taken for no end of a connection: a file on another host may be out of reach, too.
pub(crate) fn local(error: io::Error) -> io::Error {
    io::Error::other(error)
}

/// What the kernel makes of ICMP messages, and reports in place of a time-out, where the standard library has no kind of its own for it.
/// A firewall that rejects IPv6 has it say "permission denied".
const FROM_THE_WAY: [Errno; 6] =
    [Errno::HOSTDOWN, Errno::NONET, Errno::NETRESET, Errno::PROTO, Errno::NOPROTOOPT, Errno::ACCESS];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Connection, Place};

    #[test]
    fn a_reset_within_a_packet_is_a_cut_and_what_is_not_of_the_connection_is_local() {
        let at = Place { connection: Connection::Main, offset: 0 };
        let end = |kind: io::ErrorKind, within| end_by(&Error::Io { at, source: kind.into() }, within);
        assert_eq!(end(io::ErrorKind::ConnectionReset, false), End::Reset);
        assert_eq!(end(io::ErrorKind::ConnectionReset, true), End::Cut);
        assert_eq!(end(io::ErrorKind::UnexpectedEof, false), End::Cut);
        assert_eq!(end(io::ErrorKind::TimedOut, false), End::Unreachable);
        assert_eq!(end(io::ErrorKind::OutOfMemory, false), End::Local);
        assert_eq!(end(io::ErrorKind::InvalidData, false), End::Violation);
        assert_eq!(end_by(&Error::Stopped, true), End::Stopped);
        assert_eq!(end_by(&Error::Unconfirmed, true), End::Clean);
        assert_eq!(end_by(&Error::Refused { status: 1, reason: None }, false), End::Refused);
        assert_eq!(end_by(&Error::Stalled { limit: std::time::Duration::ZERO }, false), End::Unreachable);
    }

    /// A source behind a firewall that began to reject was not waited for: "permission denied" was an error of this side.
    #[test]
    fn what_routers_answer_is_an_end_of_the_connection_and_what_a_file_system_answers_is_not() {
        let at = Place { connection: Connection::Main, offset: 0 };
        for error in FROM_THE_WAY.into_iter().chain([Errno::HOSTUNREACH, Errno::NETUNREACH, Errno::TIMEDOUT]) {
            assert_eq!(end_by(&Error::Io { at, source: error.into() }, false), End::Unreachable, "{error}");
        }
        for error in [Errno::TIMEDOUT, Errno::NOTCONN, Errno::HOSTDOWN, Errno::IO, Errno::NOSPC] {
            let source = local(error.into());
            assert_eq!(source.to_string(), io::Error::from(error).to_string());
            assert_eq!(end_by(&Error::Io { at, source }, false), End::Local, "{error}");
        }
    }
}
