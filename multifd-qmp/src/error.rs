//! What can go wrong with a QMP server, one variant per cause that a caller can act on.

use std::{io, path::PathBuf, time::Duration};

use crate::codec::CodecError;

/// Why a QMP server did not do what it was told.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no connection to the socket.
    #[error("{path}: {source}", path = path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The server refused a command.
    #[error("{command}: {class}: {description}")]
    Refused {
        /// The command.
        command: String,
        /// QMP's error class.
        class: String,
        /// QMP's description.
        description: String,
    },
    /// No answer came in time. The main loop of that QEMU may be blocked, or another client may have its monitor.
    #[error("no answer to {command} within {limit:?}")]
    NoAnswer {
        /// The command, or `greeting`.
        command: String,
        /// How long the answer was waited for.
        limit: Duration,
    },
    /// The server closed the connection, usually because it ended.
    #[error("QMP connection closed during {command}")]
    Closed {
        /// The command, or `greeting`.
        command: String,
    },
    /// The server sent something else than QMP.
    #[error("{command}: unexpected QMP message {message}")]
    Unexpected {
        /// The command, or `greeting`.
        command: String,
        /// The beginning of the message as it came.
        message: String,
    },
    /// The server sent bytes that are no messages at all.
    #[error("{command}: this is not QMP: {source}")]
    Codec {
        /// The command, or `greeting`.
        command: String,
        /// What is wrong with them.
        source: CodecError,
    },
    /// A state that was waited for did not come in time, or another one came that is final.
    #[error("waited {limit:?} for {awaited}, last seen: {seen}")]
    TooLate {
        /// What was waited for.
        awaited: String,
        /// How long.
        limit: Duration,
        /// The last state.
        seen: String,
    },
    /// The caller ended the wait.
    #[error("the wait for the answer to {command} was interrupted")]
    Interrupted {
        /// The command, or `greeting`.
        command: String,
    },
    /// The connection broke.
    #[error("{command}: {source}")]
    Io {
        /// The command, or `greeting`.
        command: String,
        /// The cause.
        source: io::Error,
    },
}

impl Error {
    /// The bytes of the server were not QMP.
    pub fn is_protocol(&self) -> bool {
        matches!(self, Error::Unexpected { .. } | Error::Codec { .. })
    }

    /// The server is gone, or does not answer: no later command on this connection will do better.
    pub fn is_lost(&self) -> bool {
        !matches!(self, Error::Refused { .. } | Error::TooLate { .. } | Error::Interrupted { .. })
    }
}
