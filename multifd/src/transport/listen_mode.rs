//! The non-blocking mode of sockets that listen. It belongs to the open file description, so all duplicates of one socket share it: it is
//! switched on with the first listener of this process on any of them, and put back with the last.

// `std`, because model checkers open no sockets.
use std::{
    collections::BTreeMap,
    io,
    os::fd::AsFd,
    sync::{Mutex, MutexGuard, PoisonError},
};

use rustix::{
    fs::{OFlags, fcntl_getfl, fstat},
    io::ioctl_fionbio,
};

/// What tells a socket from all others: device and inode.
type Key = (u64, u64);

/// A socket in non-blocking mode.
struct Taken {
    listeners: usize,
    was_blocking: bool,
}

static TAKEN: Mutex<BTreeMap<Key, Taken>> = Mutex::new(BTreeMap::new());

fn taken() -> MutexGuard<'static, BTreeMap<Key, Taken>> {
    TAKEN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A listener's part in the mode of its socket, which it has to [give back](ListenMode::give_back).
pub(super) struct ListenMode(Key);

impl ListenMode {
    /// Has `socket` not wait.
    ///
    /// # Errors
    /// The kernel's; then the mode is as it was.
    pub(super) fn take(socket: impl AsFd) -> io::Result<ListenMode> {
        let stat = fstat(&socket)?;
        let key = (stat.st_dev, stat.st_ino);
        let mut taken = taken();
        if let Some(known) = taken.get_mut(&key) {
            known.listeners += 1;
            return Ok(ListenMode(key));
        }
        let was_blocking = !fcntl_getfl(&socket)?.contains(OFlags::NONBLOCK);
        ioctl_fionbio(&socket, true)?;
        taken.insert(key, Taken { listeners: 1, was_blocking });
        Ok(ListenMode(key))
    }

    /// The listener on `socket` is done: puts the mode back, if it is the last.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn give_back(&self, socket: impl AsFd) -> io::Result<()> {
        let mut taken = taken();
        let Some(known) = taken.get_mut(&self.0) else { return Ok(()) };
        known.listeners -= 1;
        if known.listeners > 0 {
            return Ok(());
        }
        let was_blocking = known.was_blocking;
        taken.remove(&self.0);
        if was_blocking { Ok(ioctl_fionbio(&socket, false)?) } else { Ok(()) }
    }
}
