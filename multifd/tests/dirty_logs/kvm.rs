//! KVM's dirty log and dirty rings: the suite with vCPUs as writers, and what only KVM does.

use multifd::{
    dirty::{
        DirtyLog,
        bitmap::AtomicDirtyBitmap,
        conformance::{Effort, Subject, Writer, conformance},
        kvm_log::{KvmDirtyLog, Protection},
        kvm_ring::KvmRingLog,
        merged::MergedLog,
    },
    dirty_bitmap::DirtyBitmap,
    ram::Ram,
};
use test_support::skip;

use crate::{
    kvm_guest::{Guest, Vcpu},
    memory::write,
};

const BLOCKS: [(&str, usize); 3] = [("a", 150), ("b", 1), ("c", 65)];

fn guest(ring_entries: Option<u32>) -> Option<Guest> {
    Guest::new(&BLOCKS, ring_entries).map_err(|reason| skip(&reason)).ok()
}

fn ring_log(guest: &Guest) -> KvmRingLog {
    guest.ring.as_ref().expect("a guest with a ring").log(guest.slots.clone())
}

fn drain(log: &mut dyn DirtyLog, ram: &Ram) -> Vec<u64> {
    let mut dirty = DirtyBitmap::new(ram.layout());
    log.drain(&mut dirty).unwrap();
    dirty.iter().collect()
}

struct Virtual {
    guest: Guest,
    log: Box<dyn DirtyLog>,
}

impl Subject for Virtual {
    fn ram(&self) -> &Ram {
        &self.guest.ram
    }

    fn log(&mut self) -> &mut dyn DirtyLog {
        &mut *self.log
    }

    fn writer(&mut self) -> Box<dyn Writer> {
        Box::new(self.guest.vcpu())
    }
}

#[test]
fn the_log_passes_the_conformance_suite_with_each_protection() {
    for protection in [Protection::Plain, Protection::Manual, Protection::ManualInitiallySet] {
        let Some(guest) = guest(None) else { return };
        // SAFETY: the slots of the test guest never change.
        let best = unsafe { KvmDirtyLog::new(guest.vm(), guest.slots.clone()) }.unwrap().protection();
        if best != Protection::ManualInitiallySet && protection != Protection::Plain && best != protection {
            return skip("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 is missing, or has not all flags");
        }
        // SAFETY: the slots of the test guest never change.
        let log =
            Box::new(unsafe { KvmDirtyLog::with_protection(guest.vm(), guest.slots.clone(), protection) }.unwrap());
        let report = conformance(&mut Virtual { guest, log }, Effort::SLOW_WRITER).unwrap();
        println!("{protection:?}: {report:?}");
        assert_eq!(report.clean_reported, 0, "{protection:?}");
        // Where fetching the log re-arms it, there is no look into it.
        let looks = if protection == Protection::Plain { 0 } else { report.peeked_written };
        assert_eq!(report.peeked_reported, looks, "{protection:?}");
        assert!(report.reported_per_written() < 1.5, "{report:?}");
    }
}

#[test]
fn the_ring_passes_the_conformance_suite() {
    // The small ring is full again and again, while the main thread drains.
    for entries in [65536, 1024, 256] {
        let Some(guest) = guest(Some(entries)) else { return };
        let log = Box::new(ring_log(&guest));
        let report = conformance(&mut Virtual { guest, log }, Effort::SLOW_WRITER).unwrap();
        println!("{entries} entries: {report:?}");
        assert_eq!(report.peeked_reported, report.peeked_written);
        assert!(report.reported_per_written() < 1.5, "{report:?}");
    }
}

#[test]
fn a_full_ring_is_collected_while_the_vcpu_runs() {
    let blocks = [("a", 3000), ("b", 1)];
    let Ok(mut guest) = Guest::new(&blocks, Some(1024)).map_err(|reason| skip(&reason)) else { return };
    let mut vcpu: Vcpu = guest.vcpu();
    let mut log = ring_log(&guest);
    log.start(&guest.ram).unwrap();
    let pages: Vec<(u64, u64)> = guest.ram.layout().blocks()[0].page_range().map(|page| (page, page + 1)).collect();
    for &(page, value) in &pages {
        // One run each: KVM looks at the ring when a vCPU enters the guest.
        vcpu.write_all(&[(page, value)]);
    }
    // 3000 entries did not fit.
    assert!(vcpu.ring_full_exits > 0);
    let dirty = drain(&mut log, &guest.ram);
    assert!(pages.iter().all(|(page, _)| dirty.contains(page)));
    assert_eq!(drain(&mut log, &guest.ram), [0u64; 0]);
}

#[test]
fn a_ring_that_is_too_large_is_refused() {
    match Guest::new(&BLOCKS, Some(1 << 30)) {
        Err(reason) if reason.starts_with("dirty ring: a dirty ring has at most") => {}
        Err(reason) => skip(&reason),
        Ok(_) => panic!("a ring of 16 GiB"),
    }
}

#[test]
fn writes_by_the_host_are_seen_only_by_the_merged_log() {
    let Some(mut guest) = guest(None) else { return };
    let mut vcpu = guest.vcpu();
    // SAFETY: the slots of the test guest never change.
    let mut cpus = unsafe { KvmDirtyLog::new(guest.vm(), guest.slots.clone()) }.unwrap();
    cpus.start(&guest.ram).unwrap();
    // A device model writes page 7 and marks it; KVM does not notice.
    let devices = AtomicDirtyBitmap::new(guest.ram.layout());
    write(&guest.ram, 7, 1);
    devices.mark(0, 7 * 4096, 8);
    assert_eq!(drain(&mut cpus, &guest.ram), [0u64; 0]);

    let mut merged = MergedLog::new(vec![Box::new(cpus), Box::new(devices.clone())]);
    merged.start(&guest.ram).unwrap();
    write(&guest.ram, 7, 2);
    devices.mark(0, 7 * 4096, 8);
    vcpu.write_all(&[(9, 3)]);
    assert_eq!(drain(&mut merged, &guest.ram), [7, 9]);
}

#[test]
fn plain_fetching_works_after_somebody_switched_manual_protection_on() {
    let Some(mut guest) = guest(None) else { return };
    let mut vcpu = guest.vcpu();
    // SAFETY: the slots of the test guest never change.
    let mut manual = unsafe { KvmDirtyLog::new(guest.vm(), guest.slots.clone()) }.unwrap();
    manual.start(&guest.ram).unwrap();
    manual.stop().unwrap();
    // SAFETY: the slots of the test guest never change.
    let mut plain =
        unsafe { KvmDirtyLog::with_protection(guest.vm(), guest.slots.clone(), Protection::Plain) }.unwrap();
    plain.start(&guest.ram).unwrap();
    for value in 1..4 {
        vcpu.write_all(&[(5, value)]);
        assert_eq!(drain(&mut plain, &guest.ram), [5]);
    }
}

#[test]
fn a_slot_outside_the_ram_blocks_is_refused() {
    let Some(guest) = guest(None) else { return };
    let mut slots = guest.slots.clone();
    slots[0].host_address += 1 << 40;
    // SAFETY: the slots of the test guest never change.
    let error = unsafe { KvmDirtyLog::new(guest.vm(), slots) }.unwrap().start(&guest.ram).unwrap_err();
    assert!(error.to_string().contains("does not lie in RAM blocks"), "{error}");
}
