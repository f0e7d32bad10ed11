//! How an error of a channel's thread is an end of that channel.

use std::io;

use multifd_proto::channel_end::End;

use crate::error::Error;

/// How the channel ends whose thread ran into `error`; `within` a packet, or between two.
pub(crate) fn end_by(error: &Error, within: bool) -> End {
    use io::ErrorKind as Kind;
    match error {
        Error::Stopped => End::Stopped,
        Error::Protocol { .. } => End::Violation,
        Error::Io { source, .. } => match source.kind() {
            Kind::UnexpectedEof | Kind::WriteZero => End::Cut,
            Kind::ConnectionReset | Kind::ConnectionAborted | Kind::BrokenPipe | Kind::NotConnected if within => {
                End::Cut
            }
            Kind::ConnectionReset | Kind::ConnectionAborted | Kind::BrokenPipe | Kind::NotConnected => End::Reset,
            Kind::TimedOut
            | Kind::ConnectionRefused
            | Kind::HostUnreachable
            | Kind::NetworkUnreachable
            | Kind::NetworkDown => End::Unreachable,
            _ => End::Local,
        },
        _ => End::Local,
    }
}

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
        assert_eq!(end_by(&Error::Stopped, true), End::Stopped);
    }
}
