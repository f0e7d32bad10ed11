//! Which part of guest memory is registered with a userfaultfd: what a VM waits for when that ends.

use multifd_proto::{BlockName, machine::Dialect};

use super::vm::{TestDestination, TestSource};
use crate::{
    destination::{self, Destination},
    progress::{Event, Observer, Phase},
    ram::{Ram, RamBlock},
    source::{self, Source},
    testing::memory,
};

/// How many bytes of `ram` the kernel says are registered for write protection.
pub(crate) fn registered(ram: &Ram) -> u64 {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut mapping = 0..0;
    let mut sum = 0;
    for line in smaps.lines() {
        let word = line.split(' ').next().unwrap_or("");
        if let Some((start, end)) = word.split_once('-')
            && let (Ok(start), Ok(end)) = (u64::from_str_radix(start, 16), u64::from_str_radix(end, 16))
        {
            mapping = start..end;
        } else if line.starts_with("VmFlags:") && line.split(' ').any(|flag| flag == "uw") {
            let part = |block: &RamBlock| {
                let (start, end) = (block.address(), block.address() + block.bytes() as u64);
                mapping.end.min(end).saturating_sub(mapping.start.max(start))
            };
            sum += ram.blocks().iter().map(part).sum::<u64>();
        }
    }
    sum
}

/// Looks at the destination's memory whenever something happens.
struct Look {
    ram: Ram,
    /// How much was registered after each round, and when each phase was entered.
    after_rounds: Vec<u64>,
    in_phases: Vec<(Phase, u64)>,
}

impl Observer for Look {
    fn event(&mut self, event: &Event) {
        match event {
            Event::Round(_) => self.after_rounds.push(registered(&self.ram)),
            Event::Phase(phase) => self.in_phases.push((*phase, registered(&self.ram))),
            _ => {}
        }
    }
}

/// Migrates memory of which two pages in three have content, and looks.
fn look(dialect: Dialect) -> Look {
    let pages = 3300;
    let from = Ram::for_test(&[("ram", pages)]);
    (0..pages as u64).filter(|page| page % 3 != 0).for_each(|page| from.page(page).unwrap().write(&[7; 4096]));
    let mut vm = TestSource::new(from.clone());
    let mut round = 0;
    vm.at_drain = Box::new(move |writer| {
        round += 1;
        for page in (0..3000).step_by(1000) {
            writer.write(page + round, round);
        }
    });
    let block = RamBlock::memory_file(BlockName::new("ram").unwrap(), pages * 4096).unwrap();
    let ram = Ram::new(4096, vec![block]).unwrap();
    let mut to = TestDestination::new(ram.clone());
    let mut look = Look { ram: ram.clone(), after_rounds: Vec::new(), in_phases: Vec::new() };
    let mut options = source::Options::default();
    options.qemu.dialect = dialect;
    let (listener, connector) = memory::listener(100_000);
    std::thread::scope(|scope| {
        let look = &mut look;
        let destination = scope
            .spawn(move || Destination::new(destination::Options::default()).run(&mut to, Box::new(listener), look));
        Source::new(options).run(&mut vm, &connector, &mut ()).unwrap();
        destination.join().unwrap().unwrap();
    });
    for page in 0..pages as u64 {
        assert!(from.page_bytes(page) == ram.page_bytes(page), "page {page}");
    }
    assert_eq!(registered(&ram), 0);
    look
}

/// All memory was registered until the destination had ended, soon after it had started its guest: that stood still for 30 to
/// 75 ms for each GiB while the kernel went through the page tables.
#[test]
fn after_round_0_no_memory_is_registered() {
    let look = look(Dialect::PerRound);
    assert!(look.after_rounds.len() >= 2);
    assert_eq!(look.after_rounds, vec![0; look.after_rounds.len()]);
}

#[test]
fn when_the_guest_starts_no_memory_is_registered() {
    for dialect in [Dialect::PerRound, Dialect::PerSection] {
        let look = look(dialect);
        let late = |phase: &Phase| matches!(phase, Phase::Devices | Phase::Confirm | Phase::Done);
        let late: Vec<u64> = look.in_phases.iter().filter(|(phase, _)| late(phase)).map(|(_, bytes)| *bytes).collect();
        assert_eq!(late, [0, 0, 0], "{dialect:?}");
    }
}
