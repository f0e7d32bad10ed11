//! Ctrl-C and SIGTERM, counted: the first one cancels, a second one ends the tidying up.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use crate::signals::{self, Hangup};

/// How often the command was interrupted. Clones count the same.
#[derive(Clone, Default)]
pub struct Interrupts {
    count: Arc<AtomicU32>,
}

impl Interrupts {
    /// Begins to count.
    ///
    /// # Errors
    /// The kernel's.
    pub fn listen() -> io::Result<Interrupts> {
        let interrupts = Interrupts::default();
        let counted = interrupts.clone();
        signals::on_interrupt(Hangup::Interrupts, move || {
            counted.count.fetch_add(1, Ordering::Relaxed);
        })?;
        Ok(interrupts)
    }

    /// How many there were.
    pub fn count(&self) -> u32 {
        self.count.load(Ordering::Relaxed)
    }

    /// Whether there was one.
    pub fn seen(&self) -> bool {
        self.count() > 0
    }
}
