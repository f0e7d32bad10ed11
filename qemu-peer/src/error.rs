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
    /// QEMU refused a QMP command, or does not answer.
    #[error(transparent)]
    Qmp(#[from] multifd_qmp::Error),
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
