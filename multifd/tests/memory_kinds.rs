//! Sparse guests through the `vm-memory` adapter: nothing is allocated that is not in use, and nothing old is left.

use std::{
    io::{self, Read},
    num::NonZeroUsize,
    os::fd::{AsFd, AsRawFd, FromRawFd},
    sync::Arc,
    time::Duration,
};

use multifd::{
    destination::Destination,
    dirty::{
        DirtyLog,
        untouched::untouched,
        vm_memory::{VmMemoryLog, ram},
    },
    dirty_bitmap::DirtyBitmap,
    ram::Ram,
    sections::Sections,
    source::Source,
    transport::uri::Uri,
    vm::{DestinationVm, SectionId, SourceVm, VmError},
};
use multifd_proto::BlockName;
use test_support::{HugePages, skip, time_limit};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    bitmap::AtomicBitmap, mmap::MmapRegionBuilder,
};

type Memory = GuestMemoryMmap<AtomicBitmap>;

/// What a VM's memory is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Anonymous,
    Memfd,
    /// Pages of 2 MiB, private.
    Huge,
    /// Pages of 2 MiB in a memfd.
    HugeMemfd,
}

/// `len` bytes in one region, which nothing has touched.
fn map(kind: Kind, len: usize) -> Memory {
    let bitmap = AtomicBitmap::new(len, NonZeroUsize::new(4096).unwrap());
    let builder = MmapRegionBuilder::new_with_bitmap(len, bitmap).with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE);
    let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let builder = match kind {
        Kind::Anonymous => builder.with_mmap_flags(private),
        Kind::Huge => builder.with_mmap_flags(private | libc::MAP_HUGETLB),
        Kind::Memfd => builder.with_mmap_flags(libc::MAP_SHARED).with_file_offset(memfd(len, 0)),
        Kind::HugeMemfd => builder
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .with_file_offset(memfd(len, libc::MFD_HUGETLB)),
    };
    let region = GuestRegionMmap::new(builder.build().unwrap(), GuestAddress(0)).unwrap();
    GuestMemoryMmap::from_arc_regions(vec![Arc::new(region)]).unwrap()
}

fn memfd(len: usize, flags: libc::c_uint) -> FileOffset {
    // SAFETY: a terminated name and flags.
    let fd = unsafe { libc::memfd_create(c"ram".as_ptr(), libc::MFD_CLOEXEC | flags) };
    assert!(fd >= 0, "{}", io::Error::last_os_error());
    // SAFETY: just created, known to nothing else.
    let file = unsafe { std::fs::File::from_raw_fd(fd) };
    file.set_len(len as u64).unwrap();
    FileOffset::new(file, 0)
}

/// Bytes that `memory` costs, as the kernel accounts for them.
fn cost(memory: &Memory) -> u64 {
    let region = memory.iter().next().unwrap();
    match region.file_offset() {
        Some(file) => {
            // SAFETY: zeros are valid.
            let mut status: libc::stat = unsafe { std::mem::zeroed() };
            // SAFETY: the kernel fills one struct stat.
            assert_eq!(unsafe { libc::fstat(file.file().as_fd().as_raw_fd(), &raw mut status) }, 0);
            status.st_blocks as u64 * 512
        }
        None => resident(region.as_ptr().cast(), region.size()),
    }
}

fn resident(address: *mut libc::c_void, len: usize) -> u64 {
    let mut pages = vec![0u8; len / 4096];
    // SAFETY: writes a byte for each page.
    assert_eq!(unsafe { libc::mincore(address, len, pages.as_mut_ptr()) }, 0);
    pages.iter().map(|page| u64::from(page & 1) * 4096).sum()
}

fn write(ram: &Ram, page: u64, value: u64) {
    ram.page(page).unwrap().write(&value.to_ne_bytes().repeat(512));
}

fn first_word(ram: &Ram, page: u64) -> u64 {
    let mut word = [0; 8];
    ram.page(page).unwrap().slice(0, 8).unwrap().read(&mut word);
    u64::from_ne_bytes(word)
}

struct Vm {
    ram: Ram,
    log: VmMemoryLog,
}

impl Vm {
    /// Through the adapter, and nothing is said about the memory.
    fn new(memory: &Memory) -> Vm {
        let ram = ram(memory, 4096, |_, _| BlockName::new("ram").unwrap()).unwrap();
        Vm { ram, log: VmMemoryLog::new(memory) }
    }
}

impl SourceVm for Vm {
    fn ram(&self) -> &Ram {
        &self.ram
    }

    fn dirty_log(&mut self) -> &mut dyn DirtyLog {
        &mut self.log
    }

    fn untouched(&mut self, into: &mut DirtyBitmap) -> Result<(), VmError> {
        Ok(untouched(&self.ram, into)?)
    }

    fn pause(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    fn save(&mut self, _: &mut Sections) -> Result<(), VmError> {
        Ok(())
    }

    fn resume(&mut self) -> Result<(), VmError> {
        Ok(())
    }
}

impl DestinationVm for Vm {
    fn ram(&self) -> &Ram {
        &self.ram
    }

    fn load(&mut self, section: &SectionId, _: &mut dyn Read) -> Result<(), VmError> {
        Err(format!("no device {section:?}").into())
    }

    fn start(&mut self) -> Result<(), VmError> {
        Ok(())
    }
}

fn migrate(from: &mut Vm, to: &mut Vm) {
    time_limit(Duration::from_secs(120), || {
        let dir = test_support::TempDir::new().unwrap();
        let uri: Uri = format!("unix:{}", dir.join("socket").display()).parse().unwrap();
        let listener = uri.listener().unwrap();
        std::thread::scope(|scope| {
            let receiving =
                scope.spawn(move || Destination::new(Default::default()).run(to, Box::new(listener), &mut ()));
            Source::new(Default::default()).run(from, &*uri.connector().unwrap(), &mut ()).unwrap();
            receiving.join().unwrap().unwrap();
        });
    });
}

/// A page in each 2 MiB is in use. Elsewhere, the destination's memory holds something old.
fn check(kind: Kind, len: usize, old_pages: u64) {
    let (source, destination) = (map(kind, len), map(kind, len));
    let (mut from, mut to) = (Vm::new(&source), Vm::new(&destination));
    let in_use = |page: u64| page.is_multiple_of(512) && page / 512 < 4096;
    let pages = (len / 4096) as u64;
    for page in (0..pages).filter(|&page| in_use(page)) {
        write(&from.ram, page, page + 1);
    }
    // Beside pages that the source names, in their place, and where the source has nothing.
    let old = |index: u64| index * (pages / old_pages.max(1)) + index % 2;
    for page in (0..old_pages).map(old) {
        write(&to.ram, page, u64::MAX);
    }
    let (before, bound) = (cost(&source), cost(&source) + cost(&destination) + (4 << 20));
    migrate(&mut from, &mut to);
    // The source costs what it did: nothing was read to find out that it is zero.
    assert_eq!(cost(&source), before, "{kind:?}");
    let found = cost(&destination);
    assert!(found >= before && found <= bound, "{kind:?}: {found} bytes, in use are {before}");
    let looked_at = (0..pages).filter(|&page| in_use(page)).chain((0..old_pages).map(old));
    for page in looked_at {
        let expected = if in_use(page) { page + 1 } else { 0 };
        assert_eq!(first_word(&to.ram, page), expected, "{kind:?}: page {page}");
    }
}

/// Each page that the source did not name was cleared with the guest paused: 8.95 s of downtime instead of 7 ms, and
/// gigabytes of memory.
#[test]
fn a_sparse_guest_costs_what_is_in_use() {
    check(Kind::Anonymous, 64 << 30, 0);
    check(Kind::Memfd, 64 << 30, 0);
}

#[test]
fn what_memory_held_before_is_gone() {
    check(Kind::Anonymous, 1 << 30, 200);
    check(Kind::Memfd, 1 << 30, 200);
}

/// The file of a hugetlbfs was refused, and private huge pages were cleared one by one.
#[test]
fn a_sparse_guest_with_huge_pages_costs_what_is_in_use() {
    let Some(_pages) = HugePages::reserve(24) else { return skip("no huge pages can be reserved here (as root)") };
    for kind in [Kind::Huge, Kind::HugeMemfd] {
        let (len, pages) = (512 << 20, (512u64 << 20) / 4096);
        let (source, destination) = (map(kind, len), map(kind, len));
        let (mut from, mut to) = (Vm::new(&source), Vm::new(&destination));
        for page in [0, 1, pages / 2 + 7, pages - 1] {
            write(&from.ram, page, page + 1);
        }
        for page in [3, pages / 4, pages - 2] {
            write(&to.ram, page, u64::MAX);
        }
        let before = cost(&source);
        assert_eq!(before, 6 << 20, "{kind:?}");
        migrate(&mut from, &mut to);
        assert_eq!(cost(&source), before, "{kind:?}");
        assert_eq!(cost(&destination), 8 << 20, "{kind:?}: what is in use, and what was there");
        for (page, expected) in [(0, 1), (1, 2), (pages - 1, pages), (3, 0), (pages / 4, 0), (pages - 2, 0)] {
            assert_eq!(first_word(&to.ram, page), expected, "{kind:?}: page {page}");
        }
    }
}
