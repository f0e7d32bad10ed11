//! Every interleaving of what a postcopy source's threads share: the bits of its pages, and the requests.

use std::{
    sync::atomic::{AtomicU64 as Plain, Ordering::Relaxed as PlainRelaxed},
    time::Instant,
};

use multifd_proto::BlockName;

use super::{
    Claims, NO_FAULT,
    inbox::{Inbox, Urgent},
    push::next_batch,
};
use crate::{
    dirty_bitmap::DirtyBitmap,
    layout::Layout,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
        thread,
    },
    testing::loom::explore,
};

const PAGES: u64 = 3;

fn layout() -> Layout {
    Layout::new(4096, [(BlockName::new("ram").unwrap(), PAGES * 4096)]).unwrap()
}

/// What the two threads share, and how often each page was sent.
struct Sender {
    claims: Claims,
    present: DirtyBitmap,
    after_fault: AtomicU64,
    sent: Vec<Plain>,
}

impl Sender {
    fn new() -> Sender {
        let sent = (0..PAGES).map(|_| Plain::new(0)).collect();
        let present = DirtyBitmap::full(&layout());
        Sender { claims: Claims::new(&layout()).unwrap(), present, after_fault: AtomicU64::new(NO_FAULT), sent }
    }

    fn send(&self, page: u64) {
        self.sent[page as usize].fetch_add(1, PlainRelaxed);
    }

    /// The background, until there is nothing left for it.
    fn push(&self, most: usize) {
        let mut next = 0;
        while let Some(pages) = next_batch(&self.claims, &self.present, &self.after_fault, &mut next, most) {
            pages.into_iter().for_each(|page| self.send(page));
        }
    }

    /// The guest waits for `page`.
    fn answer(&self, page: u64) {
        self.after_fault.store(page + 1, Relaxed);
        if self.claims.claim(page) {
            self.send(page);
        }
    }

    fn assert_each_page_was_sent_once(&self) {
        let times: Vec<u64> = self.sent.iter().map(|times| times.load(PlainRelaxed)).collect();
        assert_eq!(times, [1; PAGES as usize]);
    }
}

#[test]
fn each_page_is_sent_by_the_background_or_for_a_request() {
    explore("postcopy, requests against the background, 3 pages", None, || {
        let sender = Arc::new(Sender::new());
        let background = {
            let sender = sender.clone();
            thread::spawn(move || sender.push(2))
        };
        sender.answer(2);
        sender.answer(0);
        background.join().unwrap();
        sender.assert_each_page_was_sent_once();
    });
}

/// A thread that looks whether a bit is set and then sets it, in two steps.
#[test]
fn a_bit_that_is_looked_at_and_then_set_is_caught() {
    let begun = Instant::now();
    let caught = std::panic::catch_unwind(|| {
        loom::model(|| {
            let sender = Arc::new(Sender::new());
            let background = {
                let sender = sender.clone();
                thread::spawn(move || sender.push(2))
            };
            if !sender.claims.contains(0) {
                sender.claims.claim(0);
                sender.send(0);
            }
            background.join().unwrap();
            sender.assert_each_page_was_sent_once();
        });
    });
    assert!(caught.is_err(), "every interleaving sent each page once");
    let seconds = begun.elapsed().as_secs_f64();
    test_support::report("proof", &format!("loom | broken: a bit is set in two steps | - | caught | {seconds:.1} s"));
}

/// The lost connections' threads have ended when the destination's bits are taken over.
#[test]
fn after_a_recovery_each_page_that_is_missing_is_sent_once() {
    explore("postcopy, recovery, requests against the background", None, || {
        let sender = Arc::new(Sender::new());
        let lost = {
            let sender = sender.clone();
            thread::spawn(move || sender.answer(1))
        };
        sender.answer(0);
        lost.join().unwrap();
        // The destination has page 0; page 1 was lost with its connection.
        sender.sent[1].store(0, PlainRelaxed);
        sender.claims.set_received(layout().blocks()[0].page_range(), &[1, 0, 0, 0, 0, 0, 0, 0]);
        let background = {
            let sender = sender.clone();
            thread::spawn(move || sender.push(1))
        };
        sender.answer(1);
        background.join().unwrap();
        sender.assert_each_page_was_sent_once();
    });
}

#[test]
fn a_request_that_came_before_the_inbox_closes_is_answered_and_the_wait_ends() {
    explore("postcopy, Inbox, two requests, close against next", None, || {
        let inbox = Inbox::default();
        let asking = {
            let inbox = inbox.clone();
            thread::spawn(move || {
                for page in 0..2 {
                    inbox.ask(Urgent { pages: page..page + 1, asked: Instant::now() }).unwrap();
                }
                inbox.close();
            })
        };
        let mut answered = Vec::new();
        while let Some(urgent) = inbox.next().unwrap() {
            answered.push(urgent.pages.start);
        }
        asking.join().unwrap();
        assert_eq!(answered, [0, 1]);
    });
}
