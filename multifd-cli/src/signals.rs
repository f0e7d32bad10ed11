//! Interrupts: Ctrl-C and SIGTERM cancel what is under way. A terminal that goes away (SIGHUP) is an interrupt, too, but
//! for a guest, which runs on. SIGUSR1 resumes a guest that is paused in doubt.
//!
//! A thread waits for the signals, so what they do is ordinary code. Other signals that would end the process because of
//! something outside of it are errors of a system call instead, in every verb: SIGXFSZ (a file above the limit of `ulimit -f`) here,
//! SIGPIPE by Rust.

use std::{
    fs, io,
    sync::{Arc, atomic::AtomicBool},
};

use multifd::stop::StopHandle;
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGXFSZ},
    flag,
    iterator::Signals,
};

use crate::threads;

/// What it means when the terminal goes away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hangup {
    /// The same as Ctrl-C, unless the process was started with SIGHUP ignored, as `nohup` does.
    Interrupts,
    /// Nothing.
    IsIgnored,
}

/// Has a write above the limit of `ulimit -f` fail instead of ending the process.
///
/// # Errors
/// The kernel's.
pub fn survive_file_size_limit() -> io::Result<()> {
    // The flag is never read: a signal that is handled is enough. Unlike one that is ignored, it is not inherited.
    flag::register(SIGXFSZ, Arc::new(AtomicBool::new(false))).map(drop)
}

/// Calls `interrupted` at each interrupt, from a thread of its own, until the process ends.
///
/// # Errors
/// The kernel's.
pub fn on_interrupt(hangup: Hangup, mut interrupted: impl FnMut() + Send + 'static) -> io::Result<()> {
    let ignores_hangup = hangup == Hangup::IsIgnored || ignored_from_the_start(SIGHUP);
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP])?;
    threads::spawn("signals", move || {
        for signal in signals.forever() {
            match signal {
                SIGHUP if ignores_hangup => tracing::info!("SIGHUP is ignored"),
                _ => interrupted(),
            }
        }
    })?;
    Ok(())
}

/// Calls `resumed` at each SIGUSR1, from a thread of its own, until the process ends.
///
/// # Errors
/// The kernel's.
pub fn on_resume(mut resumed: impl FnMut() + Send + 'static) -> io::Result<()> {
    let mut signals = Signals::new([SIGUSR1])?;
    threads::spawn("resume", move || signals.forever().for_each(|_| resumed()))?;
    Ok(())
}

/// Cancels `stop`'s migration at an interrupt.
///
/// # Errors
/// The kernel's.
pub fn cancel_on_interrupt(stop: StopHandle) -> io::Result<()> {
    on_interrupt(Hangup::Interrupts, move || stop.cancel())
}

/// Whether this process was told to ignore `signal` by its parent.
fn ignored_from_the_start(signal: i32) -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask & 1 << (signal - 1) != 0)
}
