//! The exit statuses of the command, which scripts rely on.

use std::process::ExitCode;

use multifd::error::Error;

/// How the command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Done.
    Done = 0,
    /// Failed for a reason that has no status of its own.
    Failed = 1,
    /// The command line makes no sense.
    Usage = 2,
    /// Cancelled by a signal or a command.
    Cancelled = 3,
    /// The peer broke the protocol or does not match.
    Peer = 4,
    /// The guest writes faster than its memory can be sent.
    DoesNotConverge = 5,
    /// Memory has wrong contents.
    Different = 6,
    /// It is not known which side has the guest; it is paused here.
    InDoubt = 7,
}

impl Exit {
    /// The status of a process that ended with `code`.
    pub fn from_code(code: i32) -> Exit {
        ALL.into_iter().find(|exit| *exit as i32 == code).unwrap_or(Exit::Failed)
    }

    /// The value of `status` in the JSON report, in the words of QMP's `query-migrate`.
    pub fn status(self) -> &'static str {
        match self {
            Exit::Done => "completed",
            Exit::Cancelled => "cancelled",
            _ => "failed",
        }
    }
}

impl From<&Error> for Exit {
    fn from(error: &Error) -> Exit {
        match error {
            Error::Cancelled => Exit::Cancelled,
            Error::DoesNotConverge { .. } => Exit::DoesNotConverge,
            Error::NotResumed { first, .. } => Exit::from(&**first),
            Error::Undecided { .. } => Exit::InDoubt,
            error if error.is_peers_fault() => Exit::Peer,
            _ => Exit::Failed,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit as u8)
    }
}

const ALL: [Exit; 8] = [
    Exit::Done,
    Exit::Failed,
    Exit::Usage,
    Exit::Cancelled,
    Exit::Peer,
    Exit::DoesNotConverge,
    Exit::Different,
    Exit::InDoubt,
];

#[cfg(test)]
mod tests {
    use multifd::error::Mismatch;

    use super::*;

    #[test]
    fn each_cause_has_its_status() {
        let no_convergence = Error::DoesNotConverge {
            rounds: 1,
            seconds: 1.0,
            remaining: 1,
            bytes_per_second: 1,
            expected_downtime_ms: 1.0,
            downtime_limit_ms: 1.0,
        };
        let not_resumed = Error::NotResumed { first: Box::new(Error::Cancelled), resume: "no".into() };
        for (error, exit) in [
            (Error::Cancelled, Exit::Cancelled),
            (not_resumed, Exit::Cancelled),
            (no_convergence, Exit::DoesNotConverge),
            (Error::Mismatch(Mismatch::TooMuchRam), Exit::Peer),
            (Error::Refused { status: 1 }, Exit::Failed),
            (Error::Unconfirmed, Exit::Failed),
            (Error::Undecided { source: std::io::ErrorKind::TimedOut.into() }, Exit::InDoubt),
        ] {
            assert_eq!(Exit::from(&error), exit, "{error}");
        }
    }

    #[test]
    fn a_childs_status_is_read_back() {
        for code in 0..=7 {
            assert_eq!(Exit::from_code(code) as i32, code);
        }
        assert_eq!(Exit::from_code(101), Exit::Failed);
    }
}
