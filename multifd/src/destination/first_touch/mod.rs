//! How memory that was never touched gets its first content: the destination's bottleneck.
//!
//! A plain read into such memory takes a page fault for each page, in which the kernel clears a page that is overwritten
//! at once. The alternatives save the fault, the clearing, or both.

mod advised;
mod choice;
mod slices;

use std::io;

pub use self::slices::FreshMemory;
use self::{
    choice::{Trial, Way},
    slices::Slices,
};
use crate::{
    ram::{GuestRange, Ram},
    sys::{advice, kvm::system_page_size},
};

/// How fresh memory is filled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FirstTouch {
    /// [`Copy`](FirstTouch::Copy) where the kernel permits it and the memory has small pages, else
    /// [`Direct`](FirstTouch::Direct). Where the host gives pages of 64 to 512 KiB, or private memory such of 2 MiB where they
    /// are asked for (`madvise`), long runs of pages are read into those instead if that costs less CPU time, which is tried for each
    /// block, and again every 256 MiB or, where it costs far more, up to 4 GiB. A sparse guest does not grow by the smaller ones, and
    /// by those of 2 MiB for a quarter of its content and 16 MiB for each block at most; where the host gives large pages to all memory,
    /// unasked, to four times its content at most.
    #[default]
    Auto,
    /// Read from the socket into place. Best where the memory is present already or has huge pages.
    Direct,
    /// Read into private memory, then have the kernel copy runs of pages into place (`UFFDIO_COPY`): one system call a
    /// run instead of one page fault a page. Needs userfaultfd; without it as `Direct`.
    Copy,
    /// Make each run of pages present (`MADV_POPULATE_WRITE`), then read into place.
    Populate,
    /// Ask for transparent huge pages once, then read into place. Fast where memory is dense; a sparse guest grows, as
    /// one page with content takes a whole huge page.
    Huge,
}

/// A strategy, prepared for the memory of one VM.
pub(crate) enum Filler {
    Direct,
    Copy(Slices),
    Populate,
}

impl Filler {
    /// Prepares `ram` as `strategy` says. What the kernel refuses is logged and done without.
    pub(crate) fn new(strategy: FirstTouch, ram: &Ram) -> Filler {
        match strategy {
            FirstTouch::Direct => Filler::Direct,
            FirstTouch::Populate => Filler::Populate,
            FirstTouch::Huge => {
                for_each_block(ram, "huge pages", advice::huge_pages);
                Filler::Direct
            }
            // The kernel fills whole pages of its own, and some guests have smaller ones.
            _ if !(ram.layout().page_size() as u64).is_multiple_of(system_page_size()) => Filler::Direct,
            FirstTouch::Auto if has_huge_pages(ram) => Filler::Direct,
            FirstTouch::Auto => Filler::of(Slices::or_large_pages(ram)),
            FirstTouch::Copy => Filler::of(Slices::new(ram)),
        }
    }

    fn of(slices: io::Result<Slices>) -> Filler {
        match slices {
            Ok(slices) => Filler::Copy(slices),
            Err(error) => {
                tracing::debug!(%error, "no userfaultfd; fresh memory is filled by page faults");
                Filler::Direct
            }
        }
    }

    /// Whether content for `range`, which was never touched, comes through private memory and [`fill`](Self::fill).
    pub(super) fn copies(&self, range: GuestRange<'_>) -> bool {
        matches!(self, Filler::Copy(slices) if slices.way(range) == Way::Copy)
    }

    /// Begins to measure what it costs to fill `range`, which was never touched, where the result is of interest. `copies`
    /// says how it is filled.
    pub(super) fn trial(&self, range: GuestRange<'_>, copies: bool) -> Option<Trial<'_>> {
        let Filler::Copy(slices) = self else { return None };
        slices.trial(range, if copies { Way::Copy } else { Way::InPlace })
    }

    /// How each block got its first content, where there was a choice.
    pub(super) fn account(&self) -> Vec<FreshMemory> {
        if let Filler::Copy(slices) = self { slices.account() } else { Vec::new() }
    }

    /// Gets `range`, which was never touched, ready to be read into.
    pub(crate) fn prepare(&self, range: GuestRange<'_>) {
        match self {
            Filler::Copy(slices) => slices.prepare(range),
            Filler::Populate => {
                if let Err(error) = advice::populate(range) {
                    tracing::debug!(%error, "memory is not populated ahead");
                }
            }
            Filler::Direct => {}
        }
    }

    /// Puts `from` into `range`, which was never touched as far as is known.
    pub(crate) fn fill(&self, range: GuestRange<'_>, from: &[u8], page_size: usize) -> io::Result<()> {
        match self {
            Filler::Copy(slices) => slices.fill(range, from, page_size),
            Filler::Direct | Filler::Populate => {
                // To write to a page that cannot be had would end the process. A kernel before 5.14 is not asked.
                match advice::populate(range) {
                    Err(error) if matches!(error.raw_os_error(), Some(libc::EFAULT | libc::ENOMEM)) => Err(error),
                    _ => {
                        range.write(from);
                        Ok(())
                    }
                }
            }
        }
    }

    /// A sync point has passed; if `round_over`, it was the end of a whole round. What is prepared of memory and was not
    /// needed is given back, since later nothing may be left to do that grows with memory.
    pub(super) fn settle(&self, round_over: bool) {
        match self {
            Filler::Copy(slices) if round_over => slices.close(),
            Filler::Copy(slices) => slices.age(),
            Filler::Direct | Filler::Populate => {}
        }
    }
}

fn for_each_block(ram: &Ram, what: &str, advise: impl Fn(GuestRange<'_>) -> io::Result<()>) {
    for block in ram.blocks() {
        let whole = block.range(0, block.bytes()).expect("the whole block");
        if let Err(error) = advise(whole) {
            tracing::debug!(block = block.name().as_str(), %error, "no {what}");
        }
    }
}

/// Whether any block may be backed by pages larger than the smallest, as the VMM says or the kernel describes its mapping.
fn has_huge_pages(ram: &Ram) -> bool {
    let said = ram.blocks().iter().map(|block| block.kernel_page_size().map(|bytes| bytes > LARGEST_FILLED));
    let said: Vec<Option<bool>> = said.collect();
    if said.contains(&Some(true)) || !said.contains(&None) {
        return said.contains(&Some(true));
    }
    let Ok(smaps) = std::fs::read_to_string("/proc/self/smaps") else { return false };
    let unsaid = ram.blocks().iter().zip(&said).filter(|(_, said)| said.is_none());
    unsaid.into_iter().any(|(block, _)| mapping_is_huge(&smaps, block.address()))
}

/// The largest page of the kernel's that it fills from a copy: its smallest, on any machine.
const LARGEST_FILLED: u64 = 64 << 10;

/// Whether the mapping that `address` lies in has huge pages now, or gets them at a page fault.
fn mapping_is_huge(smaps: &str, address: u64) -> bool {
    let mut inside = false;
    for line in smaps.lines() {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        if let Some((start, end)) = word.split_once('-')
            && let (Ok(start), Ok(end)) = (u64::from_str_radix(start, 16), u64::from_str_radix(end, 16))
        {
            inside = (start..end).contains(&address);
        } else if inside {
            let number = rest.split_whitespace().next().and_then(|number| number.parse::<u64>().ok()).unwrap_or(0);
            match word {
                "KernelPageSize:" if number << 10 > LARGEST_FILLED => return true,
                "THPeligible:" => return number == 1,
                _ => {}
            }
        }
    }
    false
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use std::os::fd::AsFd;

    use multifd_proto::BlockName;
    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;
    use crate::ram::{Backing, MemoryFile, RamBlock};

    /// Found by a sanitizer, whose heap begins at a page: the kernel refused the copy, and the migration failed.
    #[test]
    fn pages_smaller_than_the_kernels_are_filled() {
        for page_size in [1024, 2048, system_page_size() as usize] {
            let block = RamBlock::anonymous(BlockName::new("ram").unwrap(), 16 * system_page_size() as usize).unwrap();
            let ram = Ram::new(page_size, vec![block]).unwrap();
            let filler = Filler::new(FirstTouch::Copy, &ram);
            let content = [7; 16].repeat(page_size / 16);
            for page in [0, 1, 3] {
                filler.fill(ram.page(page).unwrap(), &content, page_size).unwrap();
            }
            assert_eq!(ram.page_bytes(1), content, "pages of {page_size}");
            assert_eq!(ram.page_bytes(2), vec![0; page_size], "pages of {page_size}");
            assert_eq!(ram.page_bytes(3), content, "pages of {page_size}");
        }
    }

    /// A jail without /proc and memory of huge pages: the migration failed at the first page.
    #[test]
    fn memory_that_the_kernel_does_not_fill_is_written() {
        let page = system_page_size() as usize;
        let block = RamBlock::anonymous(BlockName::new("ram").unwrap(), 4 * page).unwrap();
        let ram = Ram::new(page, vec![block]).unwrap();
        let filler = Filler::new(FirstTouch::Copy, &ram);
        if !filler.copies(ram.page(0).unwrap()) {
            return test_support::skip("no userfaultfd");
        }
        let content = vec![7; page];
        // The kernel answers a range that does not begin at a page of its own as it answers one within a huge page.
        let askew = ram.blocks()[0].range(8, page).unwrap();
        filler.fill(askew, &content, page).unwrap();
        let mut found = vec![0; page];
        askew.read(&mut found);
        assert_eq!(found, content);
        assert!(!filler.copies(ram.page(2).unwrap()), "it is not asked again");
        filler.fill(ram.page(2).unwrap(), &content, page).unwrap();
        assert_eq!(ram.page_bytes(2), content);
    }

    const SMAPS: &str = "\
7f0000000000-7f0000200000 rw-p 00000000 00:00 0 \n\
Size:               2048 kB\n\
KernelPageSize:        4 kB\n\
THPeligible:           0\n\
VmFlags: rd wr mr mw me ac sd \n\
7f0000400000-7f0000600000 rw-p 00000000 00:00 0 \n\
KernelPageSize:        4 kB\n\
THPeligible:           1\n\
7f0000800000-7f0000a00000 rw-s 00000000 00:0f 123   /anon_hugepage\n\
KernelPageSize:     2048 kB\n\
THPeligible:           0\n";

    #[test]
    fn what_a_vmm_says_of_its_pages_is_not_looked_up() {
        let is_huge = |said: [Option<u64>; 2]| {
            let blocks = ["a", "b"].into_iter().zip(said).map(|(name, pages)| {
                let block = RamBlock::anonymous(BlockName::new(name).unwrap(), 4 << 20).unwrap();
                pages.into_iter().fold(block, RamBlock::with_kernel_pages)
            });
            has_huge_pages(&Ram::new(4096, blocks.collect()).unwrap())
        };
        assert!(is_huge([Some(4096), Some(2 << 20)]));
        assert!(is_huge([None, Some(1 << 30)]));
        assert!(!is_huge([Some(4096), Some(16 << 10)]));
    }

    /// A memory file knows its pages; nothing of it is said by the VMM.
    #[test]
    fn a_file_of_huge_pages_says_how_large_they_are() {
        let file = memfd_create(c"ram", MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB);
        let Ok(file) = file else { return test_support::skip("no huge pages") };
        let memory = MemoryFile::new(file.as_fd(), 0).unwrap();
        let block = RamBlock::anonymous(BlockName::new("ram").unwrap(), 4096).unwrap();
        assert_eq!(block.backed_by(Backing::MemoryFile(memory)).kernel_page_size(), Some(2 << 20));
        let small = RamBlock::memory_file(BlockName::new("ram").unwrap(), 4096).unwrap();
        assert_eq!(small.kernel_page_size(), None);
    }

    #[test]
    fn the_kernel_tells_which_mapping_has_huge_pages() {
        assert!(!mapping_is_huge(SMAPS, 0x7f00_0000_0000));
        assert!(!mapping_is_huge(SMAPS, 0x7f00_0020_0000), "between two mappings");
        assert!(mapping_is_huge(SMAPS, 0x7f00_005f_ffff));
        assert!(mapping_is_huge(SMAPS, 0x7f00_0080_0000));
    }
}
