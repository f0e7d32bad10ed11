//! Sockets that a service manager has opened and passed on, as systemd does: `LISTEN_PID`, `LISTEN_FDS`, `LISTEN_FDNAMES`.

use std::{
    env, io,
    os::fd::{BorrowedFd, RawFd},
    process,
    sync::OnceLock,
};

use multifd::transport::{Listen, fd::FdListener};
use rustix::io::{FdFlags, fcntl_setfd};

use crate::describe::counted;

/// Remembers what was passed to this process, hides it from its children, and takes the variables out of the environment: they
/// are for this process alone.
///
/// # Safety
/// This process has one thread, and no part of it owns a descriptor from 3 on that it was started with.
pub unsafe fn claim() {
    let variable = |name| env::var(name).ok();
    let passed = parse(
        process::id(),
        variable("LISTEN_PID").as_deref(),
        variable("LISTEN_FDS").as_deref(),
        variable("LISTEN_FDNAMES").as_deref(),
    );
    for (number, _) in passed.iter().flatten() {
        // SAFETY: it has no owner, as the caller promises. Of one that is not open the kernel says so, and so does its use.
        let _ = fcntl_setfd(unsafe { BorrowedFd::borrow_raw(*number) }, FdFlags::CLOEXEC);
    }
    for name in ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"] {
        // SAFETY: there is no other thread that could read the environment.
        unsafe { env::remove_var(name) };
    }
    let _ = PASSED.set(passed);
}

/// What accepts the connections of the only socket that was passed, or of the one that is called `name`, and what it is called in
/// messages.
///
/// # Errors
/// Why there is none; [`io::ErrorKind::InvalidInput`] for one that does not listen.
pub fn listener(name: Option<&str>) -> io::Result<(Box<dyn Listen>, String)> {
    let invalid = |message: String| io::Error::new(io::ErrorKind::InvalidInput, message);
    let none = || Err("no socket was passed to this process".to_owned());
    let passed = PASSED.get().cloned().unwrap_or_else(none).map_err(invalid)?;
    let number = choose(&passed, name).map_err(invalid)?;
    let listener = FdListener::inherited(number)?;
    if listener.is_single() {
        return Err(invalid(format!(
            "fd:{number}, which was passed to this process, does not listen; expected a stream socket that does: of systemd, \
             ListenStream= with Accept=no"
        )));
    }
    Ok((Box::new(listener), format!("fd:{number}")))
}

/// Numbers and names of descriptors.
type Passed = Vec<(RawFd, String)>;

static PASSED: OnceLock<Result<Passed, String>> = OnceLock::new();

/// What the variables say to the process `own`.
///
/// # Errors
/// There is nothing for it.
fn parse(own: u32, pid: Option<&str>, count: Option<&str>, names: Option<&str>) -> Result<Passed, String> {
    let Some(pid) = pid else {
        return Err("no socket was passed to this process: LISTEN_PID is not set, as systemd sets it".to_owned());
    };
    if number(pid) != Some(own) {
        return Err(format!("no socket was passed to this process, which is {own}: LISTEN_PID is {pid:?}"));
    }
    let expected = || format!("LISTEN_FDS is {:?}; expected a number from 1 to {MOST}", count.unwrap_or_default());
    let count = count.and_then(number).filter(|count| (1..=MOST).contains(count)).ok_or_else(expected)?;
    let mut names = names.unwrap_or_default().split(':');
    let descriptors = FIRST..FIRST + count as RawFd;
    Ok(descriptors.map(|number| (number, names.next().unwrap_or_default().to_owned())).collect())
}

/// Digits only.
fn number(text: &str) -> Option<u32> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

/// The number of the only descriptor, or of the one that is called `name`.
///
/// # Errors
/// What there is instead.
fn choose(passed: &Passed, name: Option<&str>) -> Result<RawFd, String> {
    let fits: Vec<_> = passed.iter().filter(|(_, other)| name.is_none_or(|name| name == other)).collect();
    let names: Vec<_> = passed.iter().map(|(_, name)| name.as_str()).collect();
    match (&*fits, name) {
        ([(number, _)], _) => Ok(*number),
        ([], Some(name)) => Err(format!("no socket called {name:?} was passed to this process, but {names:?}")),
        (_, Some(name)) => Err(format!("more than one socket called {name:?} was passed to this process: {names:?}")),
        (_, None) => Err(format!(
            "{} were passed to this process, called {names:?}; expected systemd:NAME for one of them",
            counted(passed.len(), "socket")
        )),
    }
}

/// Where systemd begins.
const FIRST: RawFd = 3;
/// More than anyone passes.
const MOST: u32 = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_for_another_process_or_makes_no_sense_is_named() {
        for (pid, count, expected) in [
            (None, Some("1"), "LISTEN_PID is not set"),
            (Some("8"), Some("1"), "LISTEN_PID is \"8\""),
            (Some("+7"), Some("1"), "LISTEN_PID is \"+7\""),
            (Some(""), Some("1"), "LISTEN_PID is \"\""),
            (Some("7"), None, "LISTEN_FDS is \"\""),
            (Some("7"), Some("0"), "LISTEN_FDS is \"0\""),
            (Some("7"), Some("-1"), "from 1 to 1024"),
            (Some("7"), Some("1025"), "from 1 to 1024"),
            (Some("7"), Some("99999999999"), "from 1 to 1024"),
        ] {
            let error = parse(7, pid, count, None).unwrap_err();
            assert!(error.contains(expected), "{pid:?} {count:?}: {error}");
        }
    }

    #[test]
    fn one_socket_is_chosen_by_itself_and_several_by_name() {
        let one = parse(7, Some("7"), Some("1"), None).unwrap();
        assert_eq!((one.len(), choose(&one, None)), (1, Ok(3)));
        assert!(choose(&one, Some("x")).unwrap_err().contains("\"x\""));
        let three = parse(7, Some("7"), Some("3"), Some("main:other:main")).unwrap();
        assert_eq!(choose(&three, Some("other")), Ok(4));
        assert!(choose(&three, None).unwrap_err().contains("3 sockets"));
        assert!(choose(&three, Some("main")).unwrap_err().contains("more than one"));
        // Fewer names than sockets.
        let two = parse(7, Some("7"), Some("2"), Some("a")).unwrap();
        assert_eq!(choose(&two, Some("a")), Ok(3));
    }
}
