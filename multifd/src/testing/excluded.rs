//! Memory that must not be read.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
    time::Duration,
};

use test_support::time_limit;

use super::{
    memory,
    vm::{TestDestination, TestSource, Writer},
};
use crate::{
    destination::Destination,
    error::Error,
    ram::Ram,
    source::{self, Peer, Source, Untouched, ZeroPages},
    sys::guarded,
};

const LIMIT: Duration = Duration::from_secs(60);
const PAGES: u64 = 48;

/// What is plugged in. What is not, the kernel lets nobody read.
#[derive(Clone)]
struct Memory {
    ram: Ram,
    unplugged: Arc<Mutex<BTreeSet<u64>>>,
}

impl Memory {
    fn new() -> Memory {
        let block = guarded::block(multifd_proto::BlockName::new("ram").unwrap(), PAGES as usize * 4096).unwrap();
        Memory { ram: Ram::new(4096, vec![block]).unwrap(), unplugged: Arc::default() }
    }

    fn unplug(&self, pages: impl IntoIterator<Item = u64>) {
        for page in pages {
            guarded::forbid(&self.ram.page(page).unwrap());
            self.unplugged.lock().unwrap().insert(page);
        }
    }

    fn plug(&self, pages: impl IntoIterator<Item = u64>) {
        for page in pages {
            guarded::permit(&self.ram.page(page).unwrap());
            self.unplugged.lock().unwrap().remove(&page);
        }
    }

    /// A guest of which each plugged page has content, and whose VM excludes the others. `at_round` is called with the number of the
    /// round that is about to begin.
    fn guest(&self, mut at_round: impl FnMut(u64, &Memory, &Writer) + Send + 'static) -> TestSource {
        let mut vm = TestSource::new(self.ram.clone());
        for page in 0..PAGES {
            if !self.unplugged.lock().unwrap().contains(&page) {
                assert!(vm.writer.write(page, 100 + page));
            }
        }
        let (memory, writer, mut round) = (self.clone(), vm.writer.clone(), 0);
        vm.at_excluded = Some(Box::new(move |into| {
            at_round(round, &memory, &writer);
            round += 1;
            memory.unplugged.lock().unwrap().iter().for_each(|&page| into.set(page));
            Ok(())
        }));
        vm
    }
}

fn options() -> Vec<source::Options> {
    let mut all = Vec::new();
    for channels in [0, 2] {
        for untouched in [Untouched::Skip, Untouched::Name] {
            for zero_pages in [ZeroPages::Multifd, ZeroPages::Legacy, ZeroPages::None] {
                for peer in [Peer::Multifd, Peer::Qemu] {
                    let mut options = source::Options { peer, ..Default::default() };
                    options.plan.channels = channels;
                    options.format.untouched = untouched;
                    options.qemu.zero_pages = zero_pages;
                    // Round after round as long as the guest writes.
                    options.parameters.limits.downtime = Duration::ZERO;
                    all.push(options);
                }
            }
        }
    }
    all
}

fn migrate(vm: &mut TestSource, to: &mut TestDestination, options: source::Options) -> Result<source::Report, Error> {
    let (listener, connector) = memory::listener(1 << 16);
    time_limit(LIMIT, || {
        std::thread::scope(|scope| {
            let receiving = scope.spawn(|| Destination::new(Default::default()).run(to, Box::new(listener), &mut ()));
            let sent = Source::new(options).run(vm, &connector, &mut ());
            assert_eq!(receiving.join().unwrap().is_ok(), sent.is_ok());
            sent
        })
    })
}

fn content(ram: &Ram, page: u64) -> u64 {
    let bytes = ram.page_bytes(page);
    let word = u64::from_ne_bytes(*bytes.first_chunk().unwrap());
    assert!(bytes == word.to_ne_bytes().repeat(512), "page {page} is in pieces");
    word
}

/// To read one of them ends the process, or is an error of the connection.
#[test]
fn memory_that_cannot_be_read_is_left_out_and_zero_at_the_destination() {
    for options in options() {
        let memory = Memory::new();
        memory.unplug([0, 7, 8, 9, PAGES - 1]);
        let mut vm = memory.guest(|_, _, _| ());
        // What the log says of such a page makes no difference.
        vm.at_drain = Box::new(|writer| writer.report(8));
        let to_ram = Ram::for_test(&[("ram", PAGES as usize)]).not_fresh();
        (0..PAGES).for_each(|page| to_ram.page(page).unwrap().write(&[0x77; 4096]));
        let mut to = TestDestination::new(to_ram.clone());
        let sent = migrate(&mut vm, &mut to, options).unwrap();
        assert_eq!(sent.excluded, 5);
        for page in 0..PAGES {
            let expected = if [0, 7, 8, 9, PAGES - 1].contains(&page) { 0 } else { 100 + page };
            assert_eq!(content(&to_ram, page), expected, "page {page}");
        }
    }
}

#[test]
fn memory_that_is_unplugged_meanwhile_becomes_zero_and_what_is_plugged_in_arrives() {
    for options in options() {
        let memory = Memory::new();
        memory.unplug([20, 21, 22]);
        let mut vm = memory.guest(|round, memory, writer| match round {
            1 => {
                // Sent before. The log need not hear of what is plugged in.
                memory.unplug([3, 4]);
                memory.plug([20]);
                memory.ram.page(20).unwrap().write(&5u64.to_ne_bytes().repeat(512));
            }
            2 => {
                memory.plug([4, 21]);
                memory.ram.page(4).unwrap().write(&6u64.to_ne_bytes().repeat(512));
                memory.ram.page(21).unwrap().write(&7u64.to_ne_bytes().repeat(512));
                writer.write(30, 8);
            }
            _ => {}
        });
        let mut drains = 0;
        vm.at_drain = Box::new(move |writer| {
            drains += 1;
            // So that there are some rounds.
            if drains < 3 {
                writer.write(40, drains);
            }
        });
        let mut to = TestDestination::new(Ram::for_test(&[("ram", PAGES as usize)]));
        let sent = migrate(&mut vm, &mut to, options).unwrap();
        assert!(sent.rounds_total >= 3, "{}", sent.rounds_total);
        assert_eq!(sent.excluded, 2);
        for page in 0..PAGES {
            let expected = match page {
                3 | 22 => 0,
                20 => 5,
                4 => 6,
                21 => 7,
                30 => 8,
                40 => 2,
                page => 100 + page,
            };
            assert_eq!(content(&to.ram, page), expected, "page {page}");
        }
    }
}

/// The guest is paused, and what it plugged in last comes with the last round.
#[test]
fn the_last_round_has_a_set_of_its_own() {
    let memory = Memory::new();
    memory.unplug([5, 6]);
    let mut vm = memory.guest(|_, memory, writer| {
        if !writer.is_running() {
            memory.plug([5]);
            memory.ram.page(5).unwrap().write(&9u64.to_ne_bytes().repeat(512));
            memory.unplug([11]);
        }
    });
    let mut to = TestDestination::new(Ram::for_test(&[("ram", PAGES as usize)]));
    migrate(&mut vm, &mut to, Default::default()).unwrap();
    assert_eq!([5, 6, 11, 12].map(|page| content(&to.ram, page)), [9, 0, 0, 112]);
}

#[test]
fn a_vm_that_cannot_say_it_runs_on() {
    for failing in [0, 1] {
        let mut vm = TestSource::new(Ram::for_test(&[("ram", 4)]));
        let mut round = 0;
        vm.at_excluded = Some(Box::new(move |_| {
            round += 1;
            if round > failing { Err("the balloon is stuck".into()) } else { Ok(()) }
        }));
        let mut to = TestDestination::new(Ram::for_test(&[("ram", 4)]));
        let error = migrate(&mut vm, &mut to, Default::default()).unwrap_err().to_string();
        assert_eq!(error, "the VM could not say which memory is not to be read: the balloon is stuck");
        assert!(vm.writer.is_running() && !to.calls().contains(&"start"));
    }
}
