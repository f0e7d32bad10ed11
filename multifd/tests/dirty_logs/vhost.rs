//! The log of vhost: the suite with back ends that have nothing of it but the file, and its union with KVM's.

use std::{
    fs::File,
    sync::atomic::{AtomicU8, Ordering::Release},
};

use multifd::{
    dirty::{
        DirtyLog,
        conformance::{Effort, Subject, Writer, conformance},
        kvm_log::KvmDirtyLog,
        merged::MergedLog,
        vhost::VhostLog,
    },
    ram::Ram,
};
use test_support::skip;

use crate::{
    kvm_guest::Guest,
    memory::{Backing, Mapping, map, map_with_pages, write},
};

const BLOCKS: [(&str, usize); 3] = [("a", 150), ("b", 1), ("c", 65)];

/// A back end: it has mapped the guest's memory, and the file of the log.
struct BackEnd {
    ram: Ram,
    log: Mapping,
    bytes: u64,
}

impl BackEnd {
    fn new(ram: &Ram, log: &File, bytes: u64) -> BackEnd {
        BackEnd { ram: ram.clone(), log: Mapping::of_file(log, bytes as usize), bytes }
    }

    fn mark(&self, guest_page: u64) {
        assert!(guest_page / 8 < self.bytes);
        let byte = self.log.base.as_ptr().wrapping_add((guest_page / 8) as usize);
        // SAFETY: within the mapping, and nobody accesses it but by atomics.
        unsafe { AtomicU8::from_ptr(byte) }.fetch_or(1 << (guest_page % 8), Release);
    }
}

impl Writer for BackEnd {
    fn write(&mut self, page: u64, value: u64) {
        write(&self.ram, page, value);
        let index = self.ram.layout().block_of(page).unwrap();
        let address = self.ram.blocks()[index].guest_address().unwrap();
        self.mark((address + self.ram.layout().blocks()[index].offset_of(page)) / 4096);
    }
}

/// One above the last address of `ram`.
fn end(ram: &Ram) -> u64 {
    ram.blocks().iter().map(|block| block.guest_address().unwrap() + block.bytes() as u64).max().unwrap()
}

fn log_of(ram: &Ram) -> (VhostLog, File, u64) {
    let log = VhostLog::new(end(ram), |_| Ok(())).unwrap();
    let (file, bytes) = (log.file().try_clone_to_owned().unwrap().into(), log.bytes());
    (log, file, bytes)
}

struct Vhost {
    ram: Ram,
    log: VhostLog,
    file: File,
}

impl Subject for Vhost {
    fn ram(&self) -> &Ram {
        &self.ram
    }

    fn log(&mut self) -> &mut dyn DirtyLog {
        &mut self.log
    }

    fn writer(&mut self) -> Box<dyn Writer> {
        Box::new(BackEnd::new(&self.ram, &self.file, self.log.bytes()))
    }
}

#[test]
fn the_log_passes_the_conformance_suite() {
    for page_size in [4096, 1024] {
        let (ram, _files) = map_with_pages(Backing::Memfd, page_size, &BLOCKS);
        let (log, file, _) = log_of(&ram);
        let report = conformance(&mut Vhost { ram, log, file }, Effort::FULL).unwrap();
        println!("pages of {page_size} bytes: {report:?}");
        assert_eq!(report.clean_reported, 0);
        assert_eq!(report.peeked_reported, report.peeked_written);
        if page_size == 4096 {
            assert_eq!(report.quiet_reported, report.quiet_written);
        }
    }
}

/// vCPUs and back ends take turns as writers.
struct Both {
    guest: Guest,
    log: MergedLog,
    file: File,
    bytes: u64,
    writers: usize,
}

impl Subject for Both {
    fn ram(&self) -> &Ram {
        &self.guest.ram
    }

    fn log(&mut self) -> &mut dyn DirtyLog {
        &mut self.log
    }

    fn writer(&mut self) -> Box<dyn Writer> {
        self.writers += 1;
        match self.writers % 2 {
            0 => Box::new(self.guest.vcpu()),
            _ => Box::new(BackEnd::new(&self.guest.ram, &self.file, self.bytes)),
        }
    }
}

#[test]
fn the_union_with_kvms_log_misses_neither_vcpus_nor_back_ends() {
    let Ok(guest) = Guest::new(&BLOCKS, None).map_err(|reason| skip(&reason)) else { return };
    let (log, file, bytes) = log_of(&guest.ram);
    // SAFETY: the slots of the test guest never change.
    let vcpus = unsafe { KvmDirtyLog::new(guest.vm(), guest.slots.clone()) }.unwrap();
    let log = MergedLog::new(vec![Box::new(vcpus), Box::new(log)]);
    let effort = Effort { writers: 4, ..Effort::SLOW_WRITER };
    let report = conformance(&mut Both { guest, log, file, bytes, writers: 0 }, effort).unwrap();
    println!("{report:?}");
    assert_eq!(report.clean_reported, 0);
}

/// Negative control: each log alone misses the writers of the other.
#[test]
fn neither_log_alone_passes_with_both_kinds_of_writers() {
    let (ram, _files) = map(Backing::Memfd, &BLOCKS);
    let (mut log, file, bytes) = log_of(&ram);
    log.start(&ram).unwrap();
    write(&ram, 7, 1);
    let mut dirty = multifd::dirty_bitmap::DirtyBitmap::new(ram.layout());
    log.drain(&mut dirty).unwrap();
    assert!(dirty.is_empty(), "nobody marked it");
    let mut back_end = BackEnd::new(&ram, &file, bytes);
    back_end.write(7, 2);
    log.drain(&mut dirty).unwrap();
    assert!(dirty.iter().eq([7]));

    let Ok(guest) = Guest::new(&BLOCKS, None).map_err(|reason| skip(&reason)) else { return };
    // SAFETY: the slots of the test guest never change.
    let mut vcpus = unsafe { KvmDirtyLog::new(guest.vm(), guest.slots.clone()) }.unwrap();
    let (_, file, bytes) = log_of(&guest.ram);
    vcpus.start(&guest.ram).unwrap();
    BackEnd::new(&guest.ram, &file, bytes).write(9, 3);
    dirty.clear();
    vcpus.drain(&mut dirty).unwrap();
    assert!(dirty.is_empty(), "KVM does not see the writes of others");
}
