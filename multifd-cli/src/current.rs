//! The migration of this process, for what looks at it from the side: metrics and the log.

use std::sync::Mutex;

use multifd::progress::{Phase, Progress};

use crate::{progress::lock, role::Role};

/// The latest migration, under way or over.
#[derive(Clone)]
pub struct Current {
    /// Which side this is.
    pub role: Role,
    /// Its counters.
    pub progress: Progress,
    /// It is over.
    pub is_over: bool,
}

/// How the migrations of this process ended so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ended {
    /// With the VM at the destination.
    pub completed: u64,
    /// In any other way.
    pub failed: u64,
}

/// A migration begins.
pub fn begin(role: Role, progress: &Progress) {
    lock(&STATE).0 = Some(Current { role, progress: progress.clone(), is_over: false });
}

/// It is over.
pub fn end() {
    let mut state = lock(&STATE);
    let (current, ended) = &mut *state;
    if let Some(current) = current.as_mut().filter(|current| !current.is_over) {
        current.is_over = true;
        match current.progress.snapshot().phase {
            Some(Phase::Done) => ended.completed += 1,
            _ => ended.failed += 1,
        }
    }
}

/// The latest migration, and how those before it ended; its own end is counted once it is over.
pub fn get() -> (Option<Current>, Ended) {
    lock(&STATE).clone()
}

static STATE: Mutex<(Option<Current>, Ended)> = Mutex::new((None, Ended { completed: 0, failed: 0 }));
