//! Migrations into memory that is not as the kernel gave it: of an earlier attempt, of unknown contents, read-only.

use std::time::Duration;

use multifd_proto::{
    BlockName,
    command::Command,
    encoder::MainEncoder,
    extension::{Extensions, Offer},
};
use test_support::{skip, time_limit};

use crate::{
    destination::Destination,
    dirty::untouched::untouched,
    dirty_bitmap::DirtyBitmap,
    error::{Error, Mismatch},
    ram::{Ram, RamBlock},
    source::{Options, Source, Untouched},
    testing::memory,
    testing::vm::{TestDestination, TestSource},
    transport::Connect,
};

const PAGES: usize = 150;

fn name() -> BlockName {
    BlockName::new("ram").unwrap()
}

fn of(block: RamBlock) -> Ram {
    Ram::new(4096, vec![block]).unwrap()
}

/// Memory of each kind, as the crate makes it.
fn each_kind() -> [(&'static str, Ram); 3] {
    [
        ("heap", Ram::for_test(&[("ram", PAGES)])),
        ("anonymous", of(RamBlock::anonymous(name(), PAGES * 4096).unwrap())),
        ("memory file", of(RamBlock::memory_file(name(), PAGES * 4096).unwrap())),
    ]
}

/// Sends memory whose page `page` is filled with `value(page)`; zeros were never touched. Returns the source's memory and
/// what became of the migration.
fn send(to: &mut TestDestination, untouched: Untouched, value: impl Fn(u64) -> u64) -> (Ram, Result<(), Error>) {
    time_limit(Duration::from_secs(60), || {
        let mut vm = TestSource::new(Ram::for_test(&[("ram", PAGES)]));
        for page in 0..PAGES as u64 {
            match value(page) {
                0 => vm.untouched.push(page),
                value => assert!(vm.writer.write(page, value)),
            }
        }
        let (listener, connector) = memory::listener(1 << 15);
        let destination = Destination::new(Default::default());
        let received = std::thread::scope(|scope| {
            let receiving = scope.spawn(move || destination.run(to, Box::new(listener), &mut ()));
            let mut options = Options::default();
            options.plan.channels = 2;
            options.format.untouched = untouched;
            let sent = Source::new(options).run(&mut vm, &connector, &mut ());
            let received = receiving.join().unwrap();
            assert_eq!(sent.is_ok(), received.is_ok(), "{:?}, {:?}", sent.err(), received.err());
            received.map(drop)
        });
        (vm.writer_ram(), received)
    })
}

/// The memory was declared fresh, so pages that the second source did not name kept what the first had sent.
#[test]
fn a_second_attempt_into_the_same_memory_leaves_nothing_of_the_first() {
    for mode in [Untouched::Skip, Untouched::Name] {
        for (kind, ram) in each_kind() {
            assert!(ram.blocks()[0].is_fresh(), "{kind}");
            let mut to = TestDestination::new(ram.clone());
            to.fail = Some("load");
            let (_, first) = send(&mut to, mode, |page| page + 1);
            assert!(matches!(first, Err(Error::Load { .. })), "{kind}: {first:?}");
            assert!(!ram.page(7).unwrap().is_zero(), "{kind}: the first attempt wrote");
            assert!(!ram.clone().fresh().blocks()[0].is_fresh(), "{kind}: it does not become fresh by being called so");
            to.fail = None;
            let (from, second) = send(&mut to, mode, |page| if page % 3 == 0 { 1000 + page } else { 0 });
            second.unwrap();
            for page in 0..PAGES as u64 {
                assert!(ram.page_bytes(page) == from.page_bytes(page), "{kind}, {mode:?}: page {page}");
            }
        }
    }
}

/// Each page was cleared with the guest paused: seconds of downtime, and all of its memory allocated.
#[test]
fn absent_pages_of_memory_that_was_not_declared_fresh_are_not_written() {
    for pinned in [false, true] {
        let block = RamBlock::anonymous(name(), PAGES * 4096).unwrap();
        let ram = of(if pinned { block.pinned() } else { block }).not_fresh();
        let mut absent = DirtyBitmap::new(ram.layout());
        untouched(&ram, &mut absent).unwrap();
        if absent.is_empty() {
            return skip("absent pages cannot be told here");
        }
        assert_eq!(absent.count(), PAGES as u64);
        // The VMM has written these two, and the source names neither.
        for page in [4, 100] {
            ram.page(page).unwrap().write(&[0xee; 4096]);
        }
        let mut to = TestDestination::new(ram.clone());
        let value = |page| if page % 5 == 2 { page } else { 0 };
        let (from, received) = send(&mut to, Untouched::Skip, value);
        received.unwrap();
        let mut absent = DirtyBitmap::new(ram.layout());
        untouched(&ram, &mut absent).unwrap();
        for page in 0..PAGES as u64 {
            // Of pinned memory the pages stay, for the devices that hold them.
            let stays = value(page) != 0 || pinned && (page == 4 || page == 100);
            assert_eq!(absent.contains(page), !stays, "pinned: {pinned}, page {page}");
        }
        for page in 0..PAGES as u64 {
            assert!(ram.page_bytes(page) == from.page_bytes(page), "pinned: {pinned}, page {page}");
        }
    }
}

/// It was cleared after the last page had come, when the guest was paused at the source.
#[test]
fn memory_is_zeros_before_any_page_comes() {
    for (kind, ram) in each_kind() {
        let ram = ram.not_fresh();
        for page in [0, 77, PAGES as u64 - 1] {
            ram.page(page).unwrap().write(&[0xee; 4096]);
        }
        let mut to = TestDestination::new(ram.clone());
        let (listener, connector) = memory::listener(1 << 15);
        let destination = Destination::new(Default::default());
        let stop = destination.stop_handle();
        // The VM is made when its source has said what it is like.
        let mut said = MainEncoder::default();
        let extensions = Extensions::known();
        said.header().configuration("multifd").config_offer(&Offer { channels: 1, token: None, extensions });
        said.command(&Command::OpenReturnPath).command(&Command::Describe { len: 0 });
        let mut main = connector.connect().unwrap();
        main.write(&said.bytes, &[]).unwrap();
        let error = time_limit(Duration::from_secs(60), || {
            std::thread::scope(|scope| {
                let waiting = scope.spawn(|| destination.run(&mut to, Box::new(listener), &mut ()));
                while !(0..PAGES as u64).all(|page| ram.page(page).unwrap().is_zero()) {
                    std::thread::yield_now();
                }
                stop.cancel();
                waiting.join().unwrap().unwrap_err()
            })
        });
        assert!(matches!(error, Error::Cancelled), "{kind}: {error}");
    }
}

#[test]
fn a_destination_with_a_read_only_block_is_refused_before_any_page() {
    let memory = crate::sys::heap::zeroed_block(name(), PAGES * 4096);
    let mut to = TestDestination::new(of(memory.read_only()));
    let (_, received) = send(&mut to, Untouched::Skip, |page| page);
    let error = received.unwrap_err();
    assert!(matches!(error, Error::Mismatch(Mismatch::BlockReadOnly { .. })), "{error}");
}
