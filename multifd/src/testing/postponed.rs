//! Pages that the guest writes again before they are sent: they wait for the next round, and none is lost.

use std::{io, time::Duration};

use test_support::time_limit;

use crate::{
    destination::{self, Destination},
    dirty_bitmap::DirtyBitmap,
    error::Error,
    ram::Ram,
    source::{self, Handle, Source},
    testing::{
        memory,
        vm::{TestDestination, TestSource, Writer},
    },
};

const PAGES: u64 = 700;

fn ram() -> Ram {
    Ram::for_test(&[("ram", PAGES as usize)])
}

fn filled() -> Ram {
    let ram = ram();
    (0..PAGES).for_each(|page| ram.page(page).unwrap().write(&(page + 1).to_ne_bytes().repeat(512)));
    ram
}

/// Migrates a guest over one channel, which sends at most a packet of the first round before the first look into the log, and has taken at
/// most two. `peek` is that look.
fn migrate(
    mut options: source::Options,
    mut peek: impl FnMut(&Writer, &mut DirtyBitmap) -> io::Result<()> + Send + 'static,
) -> (Result<source::Report, Error>, Vec<&'static str>) {
    options.plan.channels = 1;
    // The first packet passes, and the next waits until the limit is lifted.
    options.parameters.max_bandwidth = Some(1);
    options.peek_every = Duration::from_millis(1);
    let source = Source::new(options);
    let handle: Handle = source.handle();
    let mut vm = TestSource::new(filled());
    let mut looks = 0;
    vm.at_peek = Some(Box::new(move |writer, into| {
        looks += 1;
        let seen = if looks == 1 { peek(writer, into) } else { Ok(()) };
        handle.set_parameters(|parameters| parameters.max_bandwidth = None);
        seen
    }));
    let (listener, connector) = memory::listener(100_000);
    let mut to = TestDestination::new(ram());
    let sent = time_limit(Duration::from_secs(60), || {
        std::thread::scope(|scope| {
            let destination = scope
                .spawn(|| Destination::new(destination::Options::default()).run(&mut to, Box::new(listener), &mut ()));
            let sent = source.run(&mut vm, &connector, &mut ());
            destination.join().unwrap().unwrap();
            sent
        })
    });
    let ours = vm.writer_ram();
    assert!((0..PAGES).all(|page| to.ram.page_bytes(page) == ours.page_bytes(page)), "a page is not as it was written");
    (sent, vm.calls())
}

/// The pages that were in no packet at the first look.
const NOT_TAKEN: [u64; 3] = [256, 300, 699];

#[test]
fn a_page_that_is_written_again_before_it_is_sent_is_sent_once_and_later() {
    let (sent, calls) = migrate(source::Options::default(), |writer, into| {
        for page in [0, 1].into_iter().chain(NOT_TAKEN) {
            assert!(writer.write(page, 9000 + page));
            into.set(page);
        }
        Ok(())
    });
    let sent = sent.unwrap();
    let [first, last] = &sent.rounds[..] else { panic!("{:?}", sent.rounds) };
    // The first two had been taken, perhaps as they are now.
    assert!((3..=5).contains(&first.postponed), "{first:?}");
    assert_eq!((first.normal, first.dirty_after), (PAGES - first.postponed, 5));
    assert_eq!((last.normal, last.postponed), (5, 0));
    let pause = calls.iter().position(|call| *call == "pause").unwrap();
    assert!(!calls[pause..].contains(&"peek"), "the last round sends all: {calls:?}");
}

/// A log may say anything: what waits is sent in the next round, also where no drain reports it.
#[test]
fn a_page_that_was_not_written_at_all_is_not_lost_when_the_log_says_so() {
    let mut options = source::Options::default();
    options.parameters.limits.downtime = Duration::ZERO;
    let (sent, _) = migrate(options, |_, into| {
        into.set_range(0..u64::MAX);
        Ok(())
    });
    let sent = sent.unwrap();
    assert!(sent.rounds[0].postponed >= PAGES - 256, "{:?}", sent.rounds[0]);
    assert_eq!(sent.normal, PAGES, "each page is sent once");
}

#[test]
fn a_log_that_cannot_be_looked_into_is_not_asked_again() {
    let (sent, calls) = migrate(source::Options::default(), |writer, _| {
        assert!(writer.write(699, 1));
        Err(io::Error::other("told to fail"))
    });
    let sent = sent.unwrap();
    assert_eq!((sent.rounds[0].postponed, sent.rounds[0].normal), (0, PAGES));
    assert_eq!(calls.iter().filter(|call| **call == "peek").count(), 1, "{calls:?}");
}

#[test]
fn pages_wait_also_where_each_section_ends_with_a_sync_point() {
    let mut options = source::Options::default();
    options.qemu.dialect = source::Dialect::PerSection;
    let (sent, _) = migrate(options, |writer, into| {
        for page in NOT_TAKEN {
            assert!(writer.write(page, 9000 + page));
            into.set(page);
        }
        Ok(())
    });
    let sent = sent.unwrap();
    assert_eq!((sent.rounds[0].postponed, sent.rounds[0].normal), (3, PAGES - 3));
    assert_eq!(sent.normal, PAGES);
}
