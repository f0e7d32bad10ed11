//! A cancel in the middle of every operation, from either side: the source's guest runs on, the migration was through, or,
//! between GO and its answer, the source is in doubt and its guest stays paused.

use std::{collections::BTreeMap, time::Duration};

use super::injected::{Attempt, CHANNELS, Guest, Owner, Plans, migrate, settle, small};
use crate::{
    error::Error,
    testing::faulty::{Fault, Faults},
};

#[test]
fn a_cancel_during_each_operation_leaves_the_guest_with_one_side() {
    let (mut cancelled, mut owners) = (0, BTreeMap::new());
    for on_source in [true, false] {
        for connection in 0..=usize::from(CHANNELS) {
            for operation in 0.. {
                let held = Faults::new().at(operation, Fault::Hold);
                let mut plans = Plans::none();
                plans.0[connection] = held.clone();
                let mut attempt = Attempt::new(small());
                *(if on_source { &mut attempt.source } else { &mut attempt.destination }) = plans;
                let context = format!("source {on_source}, connection {connection}, operation {operation}");
                let mut guest = Guest::new();
                let running = std::sync::Arc::new(());
                let watch = std::sync::Arc::downgrade(&running);
                let outcome = std::thread::scope(|scope| {
                    let (cancel, take) = std::sync::mpsc::channel();
                    let held_here = held.clone();
                    scope.spawn(move || {
                        let handle: crate::stop::StopHandle = take.recv().unwrap();
                        while held_here.operations() <= operation && watch.strong_count() > 0 {
                            std::thread::sleep(Duration::from_micros(50));
                        }
                        handle.cancel();
                        held_here.release();
                    });
                    let outcome = migrate(&mut guest, attempt, |source, destination| {
                        cancel.send(if on_source { source.clone() } else { destination.clone() }).unwrap();
                    });
                    drop(running);
                    outcome
                });
                if held.operations() <= operation {
                    assert!(operation > 5, "{context}");
                    outcome.sent.unwrap();
                    outcome.received.unwrap();
                    break;
                }
                let own: Result<(), &Error> = match on_source {
                    true => outcome.sent.as_ref().map(drop),
                    false => outcome.received.as_ref().map(drop),
                };
                // Either it was in time, or it was without effect, or it ended the wait for the answer to GO.
                let in_doubt = match own {
                    Ok(()) | Err(Error::Cancelled) => false,
                    Err(Error::InDoubt { reason }) => on_source && matches!(**reason, Error::Cancelled),
                    Err(_) => panic!("{context}: {own:?}"),
                };
                if !on_source && own.is_err() {
                    // It has refused before its connections ended.
                    let sent = outcome.sent.as_ref().err();
                    assert!(!matches!(sent, None | Some(Error::InDoubt { .. })), "{context}: {sent:?}");
                }
                let ended = outcome.sent.is_err() && !in_doubt;
                let owner = settle(&mut guest, outcome, &context);
                assert!(owner != Owner::Source || ended, "{context}: {owner:?}");
                cancelled += 1;
                *owners.entry(owner).or_insert(0) += 1;
            }
        }
    }
    test_support::report("faults", &format!("cancels: {cancelled}, guests lost 0; {owners:?}"));
    // How many come too late to have an effect is up to the threads.
    assert!(owners[&Owner::Source] > 10, "{owners:?}");
}
