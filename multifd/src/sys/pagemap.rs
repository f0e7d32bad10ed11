//! What the kernel knows about the pages of this process: PAGEMAP_SCAN (Linux 6.7), and the entries that came before it.

use std::{
    fs::File,
    io,
    ops::Range,
    os::{fd::AsRawFd, unix::fs::FileExt},
};

use linux_raw_sys::general::{self, PM_SCAN_CHECK_WPASYNC, PM_SCAN_WP_MATCHING, page_region, pm_scan_arg};

use super::kvm::system_page_size;

/// `/proc/self/pagemap`, open.
#[derive(Debug)]
pub(crate) struct Pagemap {
    file: File,
    /// Where the kernel puts what it found.
    regions: Vec<page_region>,
}

/// Which pages to look for, and what to do with them.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Query {
    /// Categories that a page must have; of those in `inverted`, must not have.
    pub(crate) all_of: u64,
    /// Categories of which a page must have at least one; 0 for no such condition.
    pub(crate) any_of: u64,
    /// Categories whose absence is asked for.
    pub(crate) inverted: u64,
    /// Categories that the kernel tells apart in its answer.
    pub(crate) returned: u64,
    /// Protects the pages found against writing; they have to be registered with a userfaultfd that has WP_ASYNC.
    pub(crate) protect: bool,
}

impl Pagemap {
    /// Opens the one of this process.
    pub(crate) fn open() -> io::Result<Pagemap> {
        Ok(Pagemap {
            file: File::open("/proc/self/pagemap")?,
            regions: vec![page_region { start: 0, end: 0, categories: 0 }; REGIONS],
        })
    }

    /// Whether the kernel knows PAGEMAP_SCAN.
    pub(crate) fn can_scan(&mut self) -> io::Result<()> {
        self.scan(0..0, Query { all_of: WRITTEN, returned: WRITTEN, ..Query::default() }, |_| {})
    }

    /// Calls `found` with the ranges of addresses in `within` (a multiple of the system's page size) whose pages match
    /// `query`, in order.
    ///
    /// A page that is protected by the scan is protected before the call that reports it ends, for all threads.
    pub(crate) fn scan(
        &mut self,
        within: Range<u64>,
        query: Query,
        mut found: impl FnMut(Range<u64>),
    ) -> io::Result<()> {
        let mut from = within.start;
        loop {
            let mut scan = pm_scan_arg {
                size: size_of::<pm_scan_arg>() as u64,
                flags: if query.protect { u64::from(PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC) } else { 0 },
                start: from,
                end: within.end,
                walk_end: 0,
                vec: self.regions.as_mut_ptr() as u64,
                vec_len: self.regions.len() as u64,
                max_pages: 0,
                category_inverted: query.inverted,
                category_mask: query.all_of,
                category_anyof_mask: query.any_of,
                return_mask: query.returned,
            };
            // SAFETY: the kernel reads and writes one struct `pm_scan_arg`, and writes up to `vec_len` regions to
            // `vec`. Of the memory in the range it changes at most the write protection, which WP_ASYNC undoes by
            // itself at the next write.
            let count = unsafe { libc::ioctl(self.file.as_raw_fd(), PAGEMAP_SCAN, &raw mut scan) };
            let Ok(count) = usize::try_from(count) else { return Err(io::Error::last_os_error()) };
            for region in &self.regions[..count] {
                found(region.start..region.end);
            }
            if scan.walk_end >= within.end || scan.walk_end <= from {
                return Ok(());
            }
            from = scan.walk_end;
        }
    }
}

impl Pagemap {
    /// Calls `found` with the ranges of addresses in `within` (a multiple of the system's page size) whose pages are neither
    /// in memory nor in swap, in order. For kernels without PAGEMAP_SCAN.
    pub(crate) fn absent(&self, within: Range<u64>, mut found: impl FnMut(Range<u64>)) -> io::Result<()> {
        let page = system_page_size();
        let mut entries = vec![0u8; ENTRIES * ENTRY];
        let mut absent: Option<Range<u64>> = None;
        for from in within.clone().step_by(ENTRIES * page as usize) {
            let pages = ((within.end - from) / page).min(ENTRIES as u64) as usize;
            self.file.read_exact_at(&mut entries[..pages * ENTRY], from / page * ENTRY as u64)?;
            for (index, entry) in entries[..pages * ENTRY].as_chunks::<ENTRY>().0.iter().enumerate() {
                let at = from + index as u64 * page;
                if u64::from_ne_bytes(*entry) & (ENTRY_PRESENT | ENTRY_SWAPPED) != 0 {
                    absent.take().into_iter().for_each(&mut found);
                } else {
                    absent.get_or_insert(at..at).end = at + page;
                }
            }
        }
        absent.into_iter().for_each(found);
        Ok(())
    }
}

/// PAGE_IS_WRITTEN: not protected by a userfaultfd; also set for a page that has no entry in the page table.
pub(crate) const WRITTEN: u64 = general::PAGE_IS_WRITTEN as u64;
/// PAGE_IS_PRESENT
pub(crate) const PRESENT: u64 = general::PAGE_IS_PRESENT as u64;
/// PAGE_IS_SWAPPED: also set for a page that was never there and is protected.
pub(crate) const SWAPPED: u64 = general::PAGE_IS_SWAPPED as u64;
/// PAGE_IS_PFNZERO: the kernel's shared page of zeros.
pub(crate) const PFNZERO: u64 = general::PAGE_IS_PFNZERO as u64;

/// Bytes of one entry of `/proc/PID/pagemap`, its bit 63, and its bit 62, which is also set for a page that was never there
/// and is protected.
const ENTRY: usize = 8;
const ENTRY_PRESENT: u64 = 1 << 63;
const ENTRY_SWAPPED: u64 = 1 << 62;
/// Entries read at a time: 64 KiB.
const ENTRIES: usize = 8192;
/// The kernel itself works in portions of 512 regions; twice that keeps the calls few and the buffer (24 KiB) in cache.
const REGIONS: usize = 1024;
/// `_IOWR('f', 16, struct pm_scan_arg)`, which `linux-raw-sys` does not have.
const PAGEMAP_SCAN: libc::Ioctl = 0xc060_6610_u32 as libc::Ioctl;
