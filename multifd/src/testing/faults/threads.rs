//! Each thread of a migration in turn cannot be created, on either side, or is lost before it runs.
//!
//! The migration fails with the reason, all other threads end, and the guest runs on at the source.

use std::sync::atomic::AtomicUsize;

use super::injected::{Attempt, CHANNELS, Guest, Outcome, Owner, migrate, settle, small};
use crate::{
    error::Error,
    sync::Arc,
    threads::{
        StdThreads, ThreadRole, Threads,
        test_doubles::{FailsAt, LosesAt},
    },
};

/// The watchdog, the return path and the channels.
const OF_THE_SOURCE: usize = CHANNELS as usize + 2;

/// The watchdog, the one that accepts, main and the channels.
const OF_THE_DESTINATION: usize = CHANNELS as usize + 3;

fn fails_at(index: usize) -> Arc<dyn Threads> {
    Arc::new(FailsAt { index, spawned: AtomicUsize::new(0) })
}

fn loses_at(index: usize) -> Arc<dyn Threads> {
    Arc::new(LosesAt { index, spawned: AtomicUsize::new(0) })
}

/// Migrates with such threads on either side.
fn attempt(guest: &mut Guest, source: Arc<dyn Threads>, destination: Arc<dyn Threads>) -> Outcome {
    let mut options = small();
    options.threads = source;
    let mut attempt = Attempt::new(options);
    attempt.receiving_threads = destination;
    migrate(guest, attempt, |_, _| {})
}

fn role_of<T>(result: &Result<T, Error>) -> Option<ThreadRole> {
    match result {
        Err(Error::Thread { role, .. }) => Some(*role),
        _ => None,
    }
}

/// `std::thread::spawn` would have panicked in the VMM's thread, and the guest with it.
#[test]
fn the_guest_runs_on_when_any_thread_of_the_source_cannot_be_created() {
    for index in 0..OF_THE_SOURCE {
        let mut guest = Guest::new();
        let outcome = attempt(&mut guest, fails_at(index), Arc::new(StdThreads));
        let failed = matches!(
            (index, role_of(&outcome.sent)),
            (0, Some(ThreadRole::Watchdog))
                | (1, Some(ThreadRole::ReturnPath))
                | (2.., Some(ThreadRole::SendChannel(_)))
        );
        assert!(failed, "thread {index}: {:?}", outcome.sent);
        assert_eq!(settle(&mut guest, outcome, &format!("thread {index} of the source")), Owner::Source);
    }
}

#[test]
fn the_guest_runs_on_when_any_thread_of_the_destination_cannot_be_created() {
    for index in 0..OF_THE_DESTINATION {
        let mut guest = Guest::new();
        let outcome = attempt(&mut guest, Arc::new(StdThreads), fails_at(index));
        let failed = matches!(
            (index, role_of(&outcome.received)),
            (0, Some(ThreadRole::Watchdog)) | (1, Some(ThreadRole::Accept)) | (2.., Some(ThreadRole::Connection(_)))
        );
        assert!(failed, "thread {index}: {:?}", outcome.received);
        assert_eq!(settle(&mut guest, outcome, &format!("thread {index} of the destination")), Owner::Source);
    }
}

/// The other threads would have waited for it.
#[test]
fn a_thread_that_is_lost_before_it_runs_ends_the_migration() {
    for index in 0..OF_THE_SOURCE {
        let mut guest = Guest::new();
        let outcome = attempt(&mut guest, loses_at(index), Arc::new(StdThreads));
        assert_eq!(settle(&mut guest, outcome, &format!("thread {index} of the source")), Owner::Source);
    }
    for index in 0..OF_THE_DESTINATION {
        let mut guest = Guest::new();
        let outcome = attempt(&mut guest, Arc::new(StdThreads), loses_at(index));
        assert!(role_of(&outcome.received).is_some(), "thread {index}: {:?}", outcome.received);
        assert_eq!(settle(&mut guest, outcome, &format!("thread {index} of the destination")), Owner::Source);
    }
}

/// The limits above cover every thread: with one more nothing fails.
#[test]
fn these_are_all_threads() {
    let mut guest = Guest::new();
    let outcome = attempt(&mut guest, fails_at(OF_THE_SOURCE), fails_at(OF_THE_DESTINATION));
    assert_eq!(settle(&mut guest, outcome, "no thread fails"), Owner::Destination);
}
