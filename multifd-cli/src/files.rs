//! What to do where a process may not open as many files as a migration has connections.

use multifd::error::Error;
use rustix::process::{Resource, getrlimit};

/// The message for `error`, with what helps where connections were too many for this process.
pub fn message(error: &Error) -> String {
    let message = error.to_string();
    match (lacks_files(error, &message), getrlimit(Resource::Nofile).current) {
        (true, Some(limit)) if message.contains("ulimit -n") => {
            format!("{message}; this process may have {limit} open files, and needs up to three for each channel")
        }
        (true, Some(limit)) => format!(
            "{message}; this process may have {limit} open files, and needs up to three for each channel: ulimit -n (of a \
             service: LimitNOFILE) allows more, or use fewer channels"
        ),
        _ => message,
    }
}

/// The message for `error` of a server, with what helps where it has too many connections for this process.
pub fn with_limit(error: &std::io::Error) -> String {
    match (error.raw_os_error(), getrlimit(Resource::Nofile).current) {
        (Some(code), Some(limit)) if code == rustix::io::Errno::MFILE.raw_os_error() => format!(
            "{error}; this process may have {limit} open files: ulimit -n (of a service: LimitNOFILE) allows more, or serve fewer \
             clients at a time (--max-clients)"
        ),
        _ => error.to_string(),
    }
}

/// Whether there were no descriptors; or channels did not come, as where a destination cannot accept them.
fn lacks_files(error: &Error, message: &str) -> bool {
    let few = |needed: u64| getrlimit(Resource::Nofile).current.is_some_and(|limit| limit < needed);
    match error {
        Error::SetupTimeout { what, .. } => what.ends_with("channels came") && few(3 * 255),
        // The place is in front of the kernel's number, which is all that is left of it there.
        _ => message.contains(&format!("(os error {})", rustix::io::Errno::MFILE.raw_os_error())),
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use multifd::error::{Connection, Place};

    use super::*;

    #[test]
    fn only_an_error_about_files_says_what_to_do_about_them() {
        let at = Place { connection: Connection::Main, offset: 0 };
        let of = |source: io::Error| message(&Error::Io { at, source });
        let too_many = || io::Error::from(rustix::io::Errno::MFILE);
        assert!(of(too_many()).contains("ulimit -n"));
        assert!(of(io::Error::new(too_many().kind(), format!("tcp:h:1: {}", too_many()))).contains("ulimit -n"));
        let known = of(io::Error::other(format!("{}; what helps: ulimit -n", too_many())));
        assert!(known.contains("open files, and needs") && known.matches("ulimit -n").count() == 1, "{known}");
        assert!(!of(io::ErrorKind::ConnectionReset.into()).contains("ulimit"));
        assert!(!message(&Error::Cancelled).contains("ulimit"));
    }
}
