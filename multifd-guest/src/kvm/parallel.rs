//! Work on the vCPUs of a paused machine by as many threads as there are processors.
//!
//! The state of a vCPU takes the kernel some hundred microseconds each way. One after the other, 64 vCPUs had their guest paused for
//! 20 ms.

use std::{
    collections::VecDeque,
    num::NonZero,
    panic::resume_unwind,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
};

use multifd::threads;

/// Returns what `work` makes of each of `items`, in their order. The caller's thread is one of those that work; where no other can be
/// made, it is the only one.
pub(super) fn map<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let next = AtomicUsize::new(0);
    let done: Mutex<Vec<(usize, R)>> = Mutex::default();
    let some = || {
        // Counts only: what a thread finds at its index was there before all threads.
        while let Some((index, item)) = Some(next.fetch_add(1, Relaxed)).and_then(|at| Some((at, items.get(at)?))) {
            let result = work(item);
            lock(&done).push((index, result));
        }
    };
    thread::scope(|scope| {
        for _ in 1..processors().min(items.len()) {
            // Without it, the others have more to do.
            let _ = thread::Builder::new().name("vcpu state".to_owned()).spawn_scoped(scope, some);
        }
        some();
    });
    let mut done = done.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
    done.sort_unstable_by_key(|(index, _)| *index);
    done.into_iter().map(|(_, result)| result).collect()
}

/// Pieces of work that go on while the next ones arrive, at most as many at a time as there are processors.
pub(super) struct Background<E> {
    running: VecDeque<JoinHandle<Result<(), E>>>,
    /// What went wrong first, in the order of the pieces.
    failed: Option<E>,
}

impl<E: Send + 'static> Background<E> {
    pub(super) fn new() -> Background<E> {
        Background { running: VecDeque::new(), failed: None }
    }

    /// Begins `work` in a thread, or does it here where there is none to be had.
    ///
    /// # Errors
    /// That of an earlier piece, if it is known.
    pub(super) fn begin(&mut self, work: impl FnOnce() -> Result<(), E> + Send + 'static) -> Result<(), E> {
        while self.running.len() >= processors() {
            self.join_first();
        }
        // Left where no thread takes it.
        let piece = Arc::new(Mutex::new(Some(work)));
        let taken = piece.clone();
        match threads::spawn("vcpu state", move || take_and_do(&taken)) {
            Ok(thread) => self.running.push_back(thread),
            Err(_) => self.failed = self.failed.take().or(take_and_do(&piece).err()),
        }
        self.failed.take().map_or(Ok(()), Err)
    }

    /// Waits until all are done.
    ///
    /// # Errors
    /// The first of theirs.
    pub(super) fn finish(&mut self) -> Result<(), E> {
        while !self.running.is_empty() {
            self.join_first();
        }
        self.failed.take().map_or(Ok(()), Err)
    }

    fn join_first(&mut self) {
        let Some(thread) = self.running.pop_front() else { return };
        let result = thread.join().unwrap_or_else(|panic| resume_unwind(panic));
        self.failed = self.failed.take().or(result.err());
    }
}

fn take_and_do<E>(piece: &Mutex<Option<impl FnOnce() -> Result<(), E>>>) -> Result<(), E> {
    let work = lock(piece).take();
    work.map_or(Ok(()), |work| work())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn processors() -> usize {
    thread::available_parallelism().map_or(1, NonZero::get)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_in_the_order_of_the_items_and_each_is_worked_on_once() {
        for len in [0, 1, 2, 100] {
            let items: Vec<usize> = (0..len).collect();
            let calls = AtomicUsize::new(0);
            let results = map(&items, |item| {
                calls.fetch_add(1, Relaxed);
                item * 2
            });
            assert_eq!(results, items.iter().map(|item| item * 2).collect::<Vec<_>>());
            assert_eq!(calls.into_inner(), len);
        }
    }

    #[test]
    fn all_work_is_done_at_the_end_and_the_first_error_is_told() {
        let done = Arc::new(AtomicUsize::new(0));
        let mut background = Background::new();
        for _ in 0..50 {
            let done = done.clone();
            background
                .begin(move || {
                    done.fetch_add(1, Relaxed);
                    Ok::<(), &str>(())
                })
                .unwrap();
        }
        background.finish().unwrap();
        assert_eq!(done.load(Relaxed), 50);
        // Which of the calls tells it depends on when a thread ends; one of them does, and once.
        let mut told = vec![background.begin(|| Err("first"))];
        told.push(background.begin(|| Err("second")));
        told.push(background.finish());
        let errors: Vec<_> = told.into_iter().filter_map(Result::err).collect();
        assert_eq!(errors.first(), Some(&"first"));
        background.finish().unwrap();
    }
}
