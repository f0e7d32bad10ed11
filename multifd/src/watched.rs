//! A value that threads change and wait for, until the migration ends.

use std::time::Duration;

use crate::{
    error::Error,
    sync::{Arc, Condvar, Deadline, Mutex, lock, wait_for},
    transport::Stopper,
};

/// The value. Clones share it.
pub(crate) struct Watched<T> {
    shared: Arc<Shared<T>>,
}

struct Shared<T> {
    slot: Mutex<Slot<T>>,
    changed: Condvar,
}

struct Slot<T> {
    value: T,
    stopped: bool,
}

impl<T> Watched<T> {
    pub(crate) fn new(value: T) -> Watched<T> {
        let slot = Mutex::new(Slot { value, stopped: false });
        Watched { shared: Arc::new(Shared { slot, changed: Condvar::new() }) }
    }

    /// What `look` finds at this moment.
    pub(crate) fn look<R>(&self, look: impl FnOnce(&T) -> R) -> R {
        look(&lock(&self.shared.slot).value)
    }

    /// Changes the value, and wakes all who wait.
    pub(crate) fn update<R>(&self, change: impl FnOnce(&mut T) -> R) -> R {
        let changed = change(&mut lock(&self.shared.slot).value);
        self.shared.changed.notify_all();
        changed
    }

    /// Waits until `take` finds something. `None`: the deadline is over.
    ///
    /// # Errors
    /// [`Error::Stopped`]: nothing was found, and the migration has ended.
    pub(crate) fn wait<R>(
        &self,
        deadline: Deadline,
        mut take: impl FnMut(&mut T) -> Option<R>,
    ) -> Result<Option<R>, Error> {
        let mut slot = lock(&self.shared.slot);
        loop {
            if let Some(found) = take(&mut slot.value) {
                return Ok(Some(found));
            }
            if slot.stopped {
                return Err(Error::Stopped);
            }
            if deadline.is_over() {
                return Ok(None);
            }
            slot = wait_for(&self.shared.changed, slot, deadline.left());
        }
    }

    /// Lets `time` pass. Model checkers have no clock: under them none passes.
    ///
    /// # Errors
    /// [`Error::Stopped`]: the migration has ended meanwhile.
    pub(crate) fn rest(&self, time: Duration) -> Result<(), Error> {
        match cfg!(any(loom, shuttle)) {
            true if lock(&self.shared.slot).stopped => Err(Error::Stopped),
            true => Ok(()),
            false => self.wait(Deadline::after(Some(time)), |_| None::<()>).map(drop),
        }
    }
}

impl<T> Clone for Watched<T> {
    fn clone(&self) -> Watched<T> {
        Watched { shared: self.shared.clone() }
    }
}

impl<T: Default> Default for Watched<T> {
    fn default() -> Watched<T> {
        Watched::new(T::default())
    }
}

impl<T: Send> Stopper for Watched<T> {
    fn stop(&self) {
        lock(&self.shared.slot).stopped = true;
        self.shared.changed.notify_all();
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    #[test]
    fn a_wait_ends_by_what_it_waits_for_by_its_deadline_or_by_a_stop() {
        let watched = Watched::new(1);
        let at_once = Deadline::after(Some(Duration::ZERO));
        let two = |value: &mut i32| (*value == 2).then_some("two");
        assert_eq!(watched.wait(at_once, two).unwrap(), None);
        let other = watched.clone();
        let waiting = std::thread::spawn(move || other.wait(Deadline::after(None), two));
        watched.update(|value| *value = 2);
        assert_eq!(waiting.join().unwrap().unwrap(), Some("two"));
        let other = watched.clone();
        let resting = std::thread::spawn(move || other.rest(Duration::from_secs(3600)));
        watched.stop();
        assert!(matches!(resting.join().unwrap(), Err(Error::Stopped)));
        assert_eq!(
            watched.wait(Deadline::after(None), two).unwrap(),
            Some("two"),
            "what is there is found all the same"
        );
        assert!(matches!(watched.wait(at_once, |_| None::<()>), Err(Error::Stopped)));
    }
}
