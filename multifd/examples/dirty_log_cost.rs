//! What each dirty log costs on 1 GiB: switching on, a clean drain, one with 1 % dirty, one with all dirty.
//!
//! `cargo run --release -p multifd --example dirty_log_cost`

#[path = "../tests/dirty_logs/kvm_guest.rs"]
mod kvm_guest;
#[allow(dead_code, reason = "memory of more kinds is for the tests")]
#[path = "../tests/dirty_logs/memory.rs"]
mod memory;

use std::time::Instant;

use multifd::{
    dirty::{
        DirtyLog,
        bitmap::AtomicDirtyBitmap,
        kvm_log::{KvmDirtyLog, Protection},
        uffd_wp::UffdWpLog,
        untouched::untouched,
    },
    dirty_bitmap::DirtyBitmap,
    ram::Ram,
};

use kvm_guest::Guest;
use memory::{Backing, map, read, write};

const PAGES: u64 = 1 << 18;

fn main() {
    println!("{:<44} {:>9} {:>9} {:>9} {:>9}", "ms for 1 GiB", "start", "clean", "1 %", "all");
    for backing in [Backing::Anonymous, Backing::Memfd] {
        match UffdWpLog::new() {
            Ok(mut log) => {
                let (ram, _files) = map(backing, &[("ram", PAGES as usize)]);
                (0..PAGES).for_each(|page| write(&ram, page, 1));
                measure(&format!("uffd-wp, {backing:?}"), &ram, &mut log, |pages| {
                    pages.iter().for_each(|&page| write(&ram, page, 2));
                });
                assert_eq!(read(&ram, PAGES - 1), 2, "writes to protected pages have to go through");
            }
            Err(reason) => println!("uffd-wp: {reason}"),
        }
    }

    let (ram, _files) = map(Backing::Anonymous, &[("ram", PAGES as usize)]);
    let marked = AtomicDirtyBitmap::new(ram.layout());
    measure("atomic bitmap", &ram, &mut marked.clone(), |pages| {
        pages.iter().for_each(|&page| marked.mark(0, page * 4096, 4096));
    });
    let mut found = DirtyBitmap::new(ram.layout());
    let before = Instant::now();
    match untouched(&ram, &mut found) {
        Ok(()) => println!("untouched: {:.2} ms for {} pages", before.elapsed().as_secs_f64() * 1e3, found.count()),
        Err(reason) => println!("untouched: {reason}"),
    }

    for protection in [Protection::Plain, Protection::Manual, Protection::ManualInitiallySet] {
        with_guest(|guest| {
            let mut vcpu = guest.vcpu();
            // SAFETY: the slots of the test guest never change.
            let mut log = unsafe { KvmDirtyLog::with_protection(guest.vm(), guest.slots.clone(), protection) }.unwrap();
            let ram = guest.ram.clone();
            measure(&format!("KVM dirty log, {protection:?}"), &ram, &mut log, |pages| {
                let writes: Vec<(u64, u64)> = pages.iter().map(|&page| (page, 3)).collect();
                vcpu.write_all(&writes);
            });
        });
    }
}

fn with_guest(body: impl FnOnce(&mut Guest)) {
    match Guest::new(&[("ram", PAGES as usize)], None) {
        Ok(mut guest) => body(&mut guest),
        Err(reason) => println!("KVM: {reason}"),
    }
}

/// Prints the medians of five times.
fn measure(name: &str, ram: &Ram, log: &mut dyn DirtyLog, mut write_pages: impl FnMut(&[u64])) {
    let all: Vec<u64> = (0..PAGES).collect();
    let few: Vec<u64> = (0..PAGES).step_by(100).collect();
    // Everything is there before anything is measured.
    write_pages(&all);
    let mut times = [const { Vec::new() }; 4];
    for _ in 0..5 {
        let before = Instant::now();
        log.start(ram).unwrap();
        times[0].push(before.elapsed());
        for (index, pages) in [&[][..], &few, &all].into_iter().enumerate() {
            write_pages(pages);
            let mut dirty = DirtyBitmap::new(ram.layout());
            let before = Instant::now();
            log.drain(&mut dirty).unwrap();
            times[index + 1].push(before.elapsed());
            assert!(dirty.count() >= pages.len() as u64);
        }
        log.stop().unwrap();
    }
    let medians = times.map(|mut times| {
        times.sort();
        times[times.len() / 2].as_secs_f64() * 1e3
    });
    let [start, clean, one, all] = medians;
    println!("{name:<44} {start:>9.3} {clean:>9.3} {one:>9.3} {all:>9.3}");
}
