//! What to do where a process may not open as many files as a migration has connections.

use multifd::error::Error;
use rustix::process::{Resource, getrlimit};

/// The message for `error`, with what helps where connections were too many for this process.
pub fn message(error: &Error) -> String {
    let message = error.to_string();
    match (lacks_files(error, &message), getrlimit(Resource::Nofile).current) {
        (true, Some(limit)) => format!(
            "{message}; this process may have {limit} open files, and needs up to three for each channel: ulimit -n (of a \
             service: LimitNOFILE) allows more, or use fewer channels"
        ),
        _ => message,
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
        assert!(!of(io::ErrorKind::ConnectionReset.into()).contains("ulimit"));
        assert!(!message(&Error::Cancelled).contains("ulimit"));
    }
}
