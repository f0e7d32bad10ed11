//! Every interleaving of the threads that place pages after a switch to postcopy, with connections that are lost.

use std::{
    sync::atomic::{AtomicU64 as Plain, Ordering::Relaxed as PlainRelaxed},
    time::Instant,
};

use super::*;
use crate::{
    error::Connection,
    layout::Layout,
    sync::{
        atomic::{AtomicBool, Ordering::Relaxed},
        thread,
    },
    testing::loom::explore,
};

const AT: Place = Place { connection: Connection::Main, offset: 0 };
const PAGE: u64 = 4096;

fn layout(pages: u64) -> Layout {
    Layout::new(PAGE as usize, [(BlockName::new("ram").unwrap(), pages * PAGE)]).unwrap()
}

/// A switch whose source has discarded all of its pages, and sent the package; and how often each page was placed.
struct Switched {
    switch: Switch,
    layout: Layout,
    placed: Vec<Plain>,
}

impl Switched {
    fn new(pages: u64) -> Arc<Switched> {
        let layout = layout(pages);
        let mut discarded = Discarded::new(&layout).unwrap();
        discarded.discard(&layout.blocks()[0], &(0..pages * PAGE)).unwrap();
        let switch = Switch::default();
        {
            let mut state = lock(&switch.state);
            state.discarded = Some(discarded);
            state.blocks = Some(Arc::from([]));
        }
        Arc::new(Switched { switch, layout, placed: (0..pages).map(|_| Plain::new(0)).collect() })
    }

    fn place(&self, page: u64) -> Result<(), Error> {
        self.switch.place(&self.layout.blocks()[0], page * PAGE, AT, || {
            self.placed[page as usize].fetch_add(1, PlainRelaxed);
            Ok(())
        })
    }

    fn placed(&self) -> Vec<u64> {
        self.placed.iter().map(|times| times.load(PlainRelaxed)).collect()
    }
}

#[test]
fn a_page_that_comes_on_two_connections_is_placed_once() {
    explore("postcopy, Switch, one page on two connections", None, || {
        let switched = Switched::new(1);
        let other = {
            let switched = switched.clone();
            thread::spawn(move || switched.place(0).is_ok())
        };
        let mine = switched.place(0).is_ok();
        assert_ne!(mine, other.join().unwrap(), "one of both is refused");
        assert_eq!(switched.placed(), [1]);
        switched.switch.await_pages(None, || false).unwrap();
    });
}

#[test]
fn main_that_has_ended_waits_for_the_last_page_of_another_connection() {
    explore("postcopy, Switch, the last page against the end of main", None, || {
        let switched = Switched::new(2);
        let preempt = {
            let switched = switched.clone();
            thread::spawn(move || {
                switched.switch.preempt_begins(1).unwrap().unwrap();
                switched.switch.preempt_is_accepted();
                switched.place(1).unwrap();
                switched.switch.preempt_ends(1, true);
            })
        };
        switched.place(0).unwrap();
        switched.switch.await_pages(None, || false).unwrap();
        assert_eq!(switched.placed(), [1, 1]);
        preempt.join().unwrap();
    });
}

#[test]
fn main_that_has_ended_is_told_that_a_connection_with_the_last_page_is_lost() {
    explore("postcopy, Switch, a lost connection against the end of main", None, || {
        let switched = Switched::new(1);
        let preempt = {
            let switched = switched.clone();
            thread::spawn(move || drop(switched.switch.lose(Error::Unconfirmed)))
        };
        assert!(matches!(switched.switch.await_pages(None, || false), Err(Error::Unconfirmed)));
        preempt.join().unwrap();
    });
}

/// A recovery beside a connection that is lost with two pages under way; `waits`: until the thread of that connection has ended.
fn recovery(waits: bool) -> impl Fn() + Send + Sync {
    move || {
        let switched = Switched::new(2);
        let alive = Arc::new(AtomicBool::new(true));
        let preempt = {
            let (switched, alive) = (switched.clone(), alive.clone());
            thread::spawn(move || {
                // It may come to the switch after the next main did: then its pages are not taken.
                if switched.switch.preempt_begins(1).unwrap().is_none() {
                    return;
                }
                for page in 0..2 {
                    if alive.load(Relaxed) {
                        switched.place(page).unwrap();
                    }
                }
                switched.switch.preempt_ends(1, false);
            })
        };
        switched.switch.suspend();
        alive.store(false, Relaxed);
        if waits {
            switched.switch.await_suspension(|| true).unwrap();
        }
        let mut missing = Vec::new();
        switched.switch.received(&switched.layout.blocks()[0], |pages, here| {
            let here: BTreeSet<u64> = here.collect();
            missing.extend((0..pages).filter(|page| !here.contains(page)));
        });
        switched.switch.go_on_from(2);
        missing.into_iter().for_each(|page| switched.place(page).unwrap());
        assert_eq!(switched.placed(), [1, 1]);
        switched.switch.await_pages(None, || false).unwrap();
        preempt.join().unwrap();
        assert_eq!(switched.placed(), [1, 1]);
    }
}

/// What the source is told to send again is what no thread of a lost connection places afterwards.
#[test]
fn after_the_suspension_no_lost_connection_places_a_page() {
    explore("postcopy, Switch, a recovery against a lost connection with 2 pages", None, recovery(true));
}

#[test]
fn a_recovery_that_does_not_wait_for_lost_connections_is_caught() {
    let begun = Instant::now();
    let caught = std::panic::catch_unwind(|| ::loom::model(recovery(false)));
    assert!(caught.is_err(), "no thread of a lost connection placed a page too late");
    let seconds = begun.elapsed().as_secs_f64();
    let row = format!("loom | broken: a recovery before lost connections have ended | - | caught | {seconds:.1} s");
    test_support::report("proof", &row);
}
