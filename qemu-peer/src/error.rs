//! What can go wrong with a QEMU peer, one variant per cause a test can name.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// Why a QEMU peer is not there or does not do what it was told.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// This machine cannot have that QEMU: the test is skipped with this reason.
    #[error("QEMU {version} is not available here: {reason}")]
    Unavailable {
        /// The version that was asked for.
        version: &'static str,
        /// What is missing, in words.
        reason: String,
    },
    /// QEMU ended by itself; `log` is what it wrote to stderr.
    #[error("QEMU ended with {status}: {log}")]
    Ended {
        /// The exit status in words.
        status: String,
        /// The last part of its stderr.
        log: String,
    },
    /// QEMU refused a QMP command.
    #[error("{command}: {class}: {description}")]
    Refused {
        /// The QMP command.
        command: String,
        /// QMP's error class.
        class: String,
        /// QMP's description.
        description: String,
    },
    /// QMP gave no answer in time. The main loop of that QEMU may be frozen.
    #[error("no answer to {command} within {limit:?}")]
    NoAnswer {
        /// The QMP command.
        command: String,
        /// How long was waited.
        limit: Duration,
    },
    /// QEMU closed the QMP connection, usually because it ended.
    #[error("QMP connection closed during {command}")]
    Closed {
        /// The QMP command.
        command: String,
    },
    /// QMP sent something that is not a QMP message.
    #[error("{command}: unexpected QMP message {message}")]
    Unexpected {
        /// The QMP command.
        command: String,
        /// The message as it came.
        message: String,
    },
    /// A state that was waited for did not come in time.
    #[error("waited {limit:?} for {awaited}, last seen: {seen}")]
    TooLate {
        /// What was waited for.
        awaited: String,
        /// How long.
        limit: Duration,
        /// The last state.
        seen: String,
    },
    /// A file of the peer cannot be read or written.
    #[error("{path}: {source}", path = path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A connection to the peer broke.
    #[error(transparent)]
    Io(#[from] io::Error),
}
