//! What a process may have.

use super::{Asked, Check, settings::Settings};

/// Open files, of which each channel takes up to three.
pub fn open_files(asked: &Asked) -> Check {
    const NAME: &str = "open-files";
    match asked.open_files.current {
        None => Check::ok(NAME, "no limit"),
        Some(limit) if limit >= OPEN_FILES => Check::ok(NAME, format!("{limit}: enough for 255 channels")),
        Some(limit) => {
            // A few are open anyway.
            let channels = limit.saturating_sub(OPEN_FILES - 3 * 255) / 3;
            let hard = asked.open_files.maximum.filter(|&hard| hard < OPEN_FILES);
            let first = if hard.is_some() { "raise the hard limit first, then " } else { "" };
            Check::warning(
                NAME,
                format!("{limit}: enough for {channels} channels"),
                format!("{first}ulimit -n {OPEN_FILES}, or LimitNOFILE={OPEN_FILES} of a service"),
            )
        }
    }
}

/// Memory that may be locked, and notes of a socket: what `--zero-copy` pins and counts.
pub fn zero_copy(settings: &Settings<'_>, asked: &Asked) -> Check {
    const NAME: &str = "zero-copy";
    let notes = match settings.number("proc/sys/net/core/optmem_max") {
        Ok(notes) => notes,
        Err(error) => return error.check(NAME),
    };
    let locked = asked.locked_memory.current;
    let found = match locked {
        None => format!("no limit of locked memory, {notes} bytes for a socket's notes"),
        Some(locked) => format!("{} KiB of locked memory, {notes} bytes for a socket's notes", locked >> 10),
    };
    let mut advice = Vec::new();
    if locked.is_some_and(|locked| locked < LOCKED) {
        advice.push(format!("ulimit -l {}, or LimitMEMLOCK={LOCKED} of a service", LOCKED >> 10));
    }
    if notes < NOTES {
        advice.push(format!("sysctl net.core.optmem_max={NOTES}"));
    }
    if advice.is_empty() {
        return Check::ok(NAME, found);
    }
    Check::warning(NAME, format!("{found}: sends with --zero-copy may wait, or are copied"), advice.join("; "))
}

/// The usual limit, within which 255 channels fit.
const OPEN_FILES: u64 = 1024;

/// Two packets of 512 KiB on their way on each of 4 channels, twice: what systemd and Linux give by themselves.
const LOCKED: u64 = 8 << 20;

/// Linux gave each socket 20 KiB before it gave 128 KiB; a send that is on its way takes less than 1 KiB, and a channel keeps 32.
const NOTES: u64 = 32 << 10;
