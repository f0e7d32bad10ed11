//! userfaultfd write protection: the suite, and what the documentation of the log says about the kernel.

use std::{fs::File, io::Read, io::Write, os::fd::AsRawFd};

use multifd::{
    dirty::{
        DirtyLog,
        conformance::{Effort, Subject, Writer, conformance},
        uffd_wp::UffdWpLog,
    },
    dirty_bitmap::DirtyBitmap,
    ram::Ram,
};
use test_support::skip;

use crate::memory::{Backing, Mapping, map, map_with_pages, read, write};

const BOTH: [Backing; 2] = [Backing::Anonymous, Backing::Memfd];

fn log() -> Option<UffdWpLog> {
    UffdWpLog::new().map_err(|reason| skip(&reason.to_string())).ok()
}

fn drain(log: &mut UffdWpLog, ram: &Ram) -> Vec<u64> {
    let mut dirty = DirtyBitmap::new(ram.layout());
    log.drain(&mut dirty).unwrap();
    dirty.iter().collect()
}

struct Threads {
    ram: Ram,
    log: UffdWpLog,
}

struct Thread(Ram);

impl Writer for Thread {
    fn write(&mut self, page: u64, value: u64) {
        write(&self.0, page, value);
    }
}

impl Subject for Threads {
    fn ram(&self) -> &Ram {
        &self.ram
    }

    fn log(&mut self) -> &mut dyn DirtyLog {
        &mut self.log
    }

    fn writer(&mut self) -> Box<dyn Writer> {
        Box::new(Thread(self.ram.clone()))
    }
}

#[test]
fn passes_the_conformance_suite() {
    for backing in BOTH {
        let Some(log) = log() else { return };
        let (ram, _files) = map(backing, &[("a", 700), ("b", 1), ("c", 65)]);
        let report = conformance(&mut Threads { ram: ram.clone(), log }, Effort::FULL).unwrap();
        assert_eq!(report.peeked_reported, report.peeked_written, "{backing:?}");
        println!("{backing:?}: {report:?}");
        assert_eq!(report.quiet_reported, report.quiet_written);
        // The first reading of untouched anonymous memory counts as a write of each page, once.
        let pages = ram.layout().pages();
        let most = if matches!(backing, Backing::Anonymous) { pages } else { 0 };
        assert!(report.clean_reported <= most, "{report:?}");
    }
}

#[test]
fn passes_with_pages_of_other_sizes() {
    for (page_size, blocks) in [(1024, [("a", 80), ("b", 8)]), (65536, [("a", 70), ("b", 1)])] {
        let Some(log) = log() else { return };
        let (ram, _files) = map_with_pages(Backing::Anonymous, page_size, &blocks);
        let report = conformance(&mut Threads { ram, log }, Effort { bursts: 30, ..Effort::FULL }).unwrap();
        println!("{page_size}: {report:?}");
    }
}

#[test]
fn a_first_write_to_a_page_that_was_never_touched_is_reported() {
    for backing in BOTH {
        let Some(mut log) = log() else { return };
        let (ram, _files) = map(backing, &[("a", 4096)]);
        // Page 0 gives one page table entries; pages 600 and 4095 are in tables that do not exist.
        write(&ram, 0, 1);
        log.start(&ram).unwrap();
        assert_eq!(drain(&mut log, &ram), [0u64; 0]);
        for page in [1, 600, 4095] {
            write(&ram, page, 7);
            let dirty = drain(&mut log, &ram);
            assert!(dirty.contains(&page), "{backing:?}: page {page} is not in {dirty:?}");
        }
        assert_eq!(drain(&mut log, &ram), [0u64; 0]);
    }
}

#[test]
fn reading_a_page_that_was_never_touched_hides_no_later_write() {
    for backing in BOTH {
        let Some(mut log) = log() else { return };
        let (ram, _files) = map(backing, &[("a", 2000)]);
        log.start(&ram).unwrap();
        for page in [3, 700] {
            assert_eq!(read(&ram, page), 0);
        }
        drain(&mut log, &ram);
        for page in [3, 700] {
            write(&ram, page, 7);
            assert!(drain(&mut log, &ram).contains(&page), "{backing:?}");
        }
    }
}

#[test]
fn starting_on_sparse_anonymous_memory_populates_nothing() {
    let Some(mut log) = log() else { return };
    // 1 TiB: page tables for all of it would take 2 GiB.
    let (ram, _files) = map(Backing::Anonymous, &[("a", 1 << 28)]);
    write(&ram, 12345, 1);
    let before = page_table_kib();
    log.start(&ram).unwrap();
    assert_eq!(drain(&mut log, &ram), [0u64; 0]);
    write(&ram, 1 << 27, 1);
    assert_eq!(drain(&mut log, &ram), [1 << 27]);
    let grown = page_table_kib() - before;
    // Other tests run beside this one in the same process, hence not 0.
    assert!(grown < 256 * 1024, "{grown} KiB of page tables");
}

#[test]
fn sparse_shared_memory_is_tracked_exactly() {
    let Some(mut log) = log() else { return };
    let (ram, _files) = map(Backing::Memfd, &[("a", 1 << 20)]);
    write(&ram, 12345, 1);
    log.start(&ram).unwrap();
    assert_eq!(drain(&mut log, &ram), [0u64; 0]);
    write(&ram, 1 << 19, 1);
    assert_eq!(drain(&mut log, &ram), [1 << 19]);
}

fn page_table_kib() -> i64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmPTE:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn writes_by_the_kernel_are_reported() {
    for backing in BOTH {
        let Some(mut log) = log() else { return };
        let (ram, _files) = map(backing, &[("a", 10)]);
        write(&ram, 5, 1);
        log.start(&ram).unwrap();
        let page = ram.page(5).unwrap();
        let zero = File::open("/dev/zero").unwrap();
        // SAFETY: the page is mapped and 4096 bytes long.
        let count = unsafe { libc::read(zero.as_raw_fd(), page.as_ptr().cast(), page.len()) };
        assert_eq!(count, 4096);
        assert!(drain(&mut log, &ram).contains(&5), "{backing:?}: read(2)");
        let (mut ours, mut theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        theirs.write_all(&[7; 100]).unwrap();
        // SAFETY: as above.
        let count = unsafe { libc::recv(ours.as_raw_fd(), page.as_ptr().cast(), 100, 0) };
        assert_eq!(count, 100);
        assert_eq!(drain(&mut log, &ram), [5], "{backing:?}: recv(2)");
        ours.set_nonblocking(true).unwrap();
        assert!(ours.read(&mut [0]).is_err());
    }
}

/// What the documentation warns of; should a kernel report these one day, the warning can go.
#[test]
fn writes_through_another_mapping_are_not_reported() {
    let Some(mut log) = log() else { return };
    let (ram, files) = map(Backing::Memfd, &[("a", 10)]);
    write(&ram, 5, 1);
    log.start(&ram).unwrap();
    let other = Mapping::of_file(&files[0], 10 * 4096);
    // SAFETY: page 5 lies within the mapping.
    unsafe { other.base.as_ptr().wrapping_add(5 * 4096).cast::<u64>().write_volatile(9) };
    assert_eq!(read(&ram, 5), 9);
    assert_eq!(drain(&mut log, &ram), [0u64; 0]);
}

/// Reclaim unmaps pages of shared memory and leaves empty entries behind. A log that took those for clean would lose
/// the write: the guest would run on at the destination with the old page.
#[test]
fn a_written_page_of_shared_memory_that_was_unmapped_is_still_reported() {
    let Some(mut log) = log() else { return };
    let (ram, _files) = map(Backing::Memfd, &[("a", 600)]);
    for page in 0..600 {
        write(&ram, page, 1);
    }
    log.start(&ram).unwrap();
    for page in [3, 599] {
        write(&ram, page, 2);
        let range = ram.page(page).unwrap();
        // SAFETY: drops the mapping of a page whose content the memfd keeps.
        let result = unsafe { libc::madvise(range.as_ptr().cast(), range.len(), libc::MADV_DONTNEED) };
        assert_eq!(result, 0);
        assert!(drain(&mut log, &ram).contains(&page), "page {page}");
        assert_eq!(read(&ram, page), 2);
    }
}

#[test]
fn transparent_huge_pages_are_tracked_by_small_pages() {
    let Some(mut log) = log() else { return };
    let (ram, _files) = map(Backing::Anonymous, &[("a", 4096)]);
    let block = &ram.blocks()[0];
    // SAFETY: advice on memory that is ours.
    unsafe { libc::madvise(block.address() as *mut _, block.bytes(), libc::MADV_HUGEPAGE) };
    for page in 0..4096 {
        write(&ram, page, 1);
    }
    log.start(&ram).unwrap();
    assert_eq!(drain(&mut log, &ram), [0u64; 0]);
    write(&ram, 1500, 2);
    assert_eq!(drain(&mut log, &ram), [1500]);
    write(&ram, 1501, 2);
    assert_eq!(drain(&mut log, &ram), [1501]);
}

#[test]
fn memory_that_cannot_be_protected_is_refused_by_name() {
    let Some(mut log) = log() else { return };
    // Not a page of the system: the log must not protect its neighbours.
    let (ram, _files) = map_with_pages(Backing::Anonymous, 1024, &[("odd", 9)]);
    let error = log.start(&ram).unwrap_err();
    assert!(error.to_string().contains("\"odd\""), "{error}");
    let (ram, _files) = map(Backing::Anonymous, &[("even", 9)]);
    log.start(&ram).unwrap();
    let second = UffdWpLog::new().unwrap().start(&ram).unwrap_err();
    assert!(second.to_string().contains("\"even\""), "{second}");
}
