//! Interrupts: Ctrl-C and SIGTERM cancel what is under way.
//!
//! A thread waits for the signals, so what they do is ordinary code.

use std::{io, thread};

use multifd::stop::StopHandle;
use signal_hook::{
    consts::{SIGINT, SIGTERM},
    iterator::Signals,
};

/// Calls `interrupted` at each interrupt, from a thread of its own, until the process ends.
///
/// # Errors
/// The kernel's.
pub fn on_interrupt(mut interrupted: impl FnMut() + Send + 'static) -> io::Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    thread::Builder::new().name("signals".to_owned()).spawn(move || {
        for _signal in signals.forever() {
            interrupted();
        }
    })?;
    Ok(())
}

/// Cancels `stop`'s migration at an interrupt.
///
/// # Errors
/// The kernel's.
pub fn cancel_on_interrupt(stop: StopHandle) -> io::Result<()> {
    on_interrupt(move || stop.cancel())
}
