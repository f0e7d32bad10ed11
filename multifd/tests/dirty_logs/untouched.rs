//! Untouched pages: found without touching them, and never one that holds something.

use std::os::fd::AsFd;

use multifd::{
    dirty::{DirtyLog, uffd_wp::UffdWpLog, untouched::untouched},
    dirty_bitmap::DirtyBitmap,
    ram::{MemoryFile, Ram},
};
use test_support::skip;

use crate::memory::{Backing, map, map_with_pages, read, second_half, write};

fn find(ram: &Ram) -> Option<DirtyBitmap> {
    let mut found = DirtyBitmap::new(ram.layout());
    match untouched(ram, &mut found) {
        Ok(()) => Some(found),
        Err(error) => {
            skip(&format!("PAGEMAP_SCAN: {error}"));
            None
        }
    }
}

#[test]
fn all_but_the_written_pages_are_untouched() {
    for backing in [Backing::Anonymous, Backing::Foreign, Backing::Memfd] {
        let (ram, _files) = map(backing, &[("a", 3000), ("b", 65)]);
        let first = ram.layout().blocks()[1].first_page();
        let written = [0, 1, 63, 700, 2999, first, first + 64];
        for page in written {
            write(&ram, page, 1);
        }
        let Some(found) = find(&ram) else { return };
        let expected =
            DirtyBitmap::full(ram.layout()).iter().filter(|page| !written.contains(page)).collect::<Vec<_>>();
        assert_eq!(found.iter().collect::<Vec<_>>(), expected, "{backing:?}");
        // Looking touched nothing.
        assert_eq!(find(&ram).unwrap(), found);
    }
}

#[test]
fn pages_that_were_only_read_count_as_untouched_where_the_kernel_tells() {
    let (ram, _files) = map(Backing::Anonymous, &[("a", 100)]);
    assert_eq!(read(&ram, 50), 0);
    let Some(found) = find(&ram) else { return };
    if found.count() == 99 {
        return skip("only PAGEMAP_SCAN tells the kernel's page of zeros from others");
    }
    assert_eq!(found.count(), 100);
}

#[test]
fn tracking_does_not_hide_untouched_pages() {
    for backing in [Backing::Anonymous, Backing::Foreign, Backing::Memfd] {
        let Ok(mut log) = UffdWpLog::new().map_err(|reason| skip(&reason.to_string())) else { return };
        let (ram, _files) = map(backing, &[("a", 1000)]);
        write(&ram, 5, 1);
        log.start(&ram).unwrap();
        assert_eq!(find(&ram).unwrap().count(), 999, "{backing:?}");
    }
}

#[test]
fn shared_memory_without_its_file_adds_nothing() {
    let (ram, _files) = map(Backing::ForeignMemfd, &[("a", 100)]);
    let Some(found) = find(&ram) else { return };
    assert!(found.is_empty());
}

#[test]
fn a_part_of_a_memory_file_is_looked_at_where_it_begins() {
    let ram = second_half(100);
    write(&ram, 3, 1);
    let Some(found) = find(&ram) else { return };
    assert!(!found.contains(3));
    assert_eq!(found.count(), 99);
}

#[test]
fn a_page_larger_than_the_systems_is_untouched_only_in_whole() {
    let (ram, _files) = map_with_pages(Backing::Anonymous, 65536, &[("a", 10)]);
    // The last word of page 4.
    ram.page(4).unwrap().slice(65528, 8).unwrap().write(&[1; 8]);
    let Some(found) = find(&ram) else { return };
    assert!(!found.contains(4));
    assert_eq!(found.count(), 9);
}

#[test]
fn a_file_that_is_not_memory_is_refused() {
    let file = std::fs::File::open("/proc/self/maps").unwrap();
    assert_eq!(MemoryFile::new(file.as_fd(), 0).unwrap_err().kind(), std::io::ErrorKind::InvalidInput);
}
