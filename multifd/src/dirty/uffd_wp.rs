//! A dirty log for the memory of this process: userfaultfd write protection, read through PAGEMAP_SCAN (Linux 6.7).
//!
//! The kernel protects pages; a write to a protected page unprotects it, without a message and without waiting
//! (WP_ASYNC). A drain asks for the unprotected pages and protects them again in the same call. The kernel does both for
//! a page under the lock of its page table and flushes the processors' caches of it before the call returns, so a write
//! is either before that (and in the page when it is read after the drain) or finds the page protected.
//!
//! It sees every write through the registered mapping: by threads, by the kernel on behalf of a system call, by vCPUs
//! of a KVM guest that runs on it. **It does not see writes through another mapping of the same memory** (a second
//! mapping of the memfd, another process): a thread that writes there marks its pages in a bitmap of its own.
//!
//! **Private anonymous memory that was never touched stays so.** To the kernel, a page without an entry in the page table
//! counts as written, and protecting it creates a page table to put a marker in: 2 GiB of tables for a sparse terabyte
//! (measured on Linux 6.18). So the scan asks for pages that are written *and* are there, in memory or in swap.
//! Registering populates nothing either. A page that was not there is not reported until it is written; its first
//! write makes an entry that is not protected, so the next drain reports it. So does its first read, once; that is why
//! [`untouched`](crate::dirty::untouched) pages had better not be read at all. Leaving out the kernel's page of zeros
//! would avoid this and is wrong: the kernel also puts it in place of pages on which it finds zeros, written or not.
//!
//! **Shared memory** (memfd, tmpfs) must do without that: the kernel may unmap a page that was written, to swap it out,
//! and leaves nothing in the page table, so there an absent page has to count as written or the write would be lost.
//! Starting puts markers everywhere instead, which costs 2 MiB of page tables for each GiB mapped, touched or not.
//! Afterwards the answers are exact here too. Huge pages in a memfd are reported as 512 pages at a time.
//!
//! A page of anonymous memory that is discarded (`MADV_DONTNEED`, a ballooned page) is not reported: a VMM that discards
//! pages whose content matters marks them.

use std::{io, ops::Range};

use crate::{
    dirty::{DirtyLog, mappings},
    dirty_bitmap::DirtyBitmap,
    host,
    ram::Ram,
    sys::{
        pagemap::{PRESENT, Pagemap, Query, SWAPPED, WRITTEN},
        uffd::{Step, Userfaultfd},
    },
};

/// Writes to the memory of this process, tracked by the kernel.
#[derive(Debug)]
pub struct UffdWpLog {
    pagemap: Pagemap,
    /// Opened when it was found that it can be; `None` after `stop`, since closing it is what ends tracking.
    uffd: Option<Userfaultfd>,
    parts: Vec<Part>,
    page_size: u64,
}

/// A part of a RAM block that is scanned in one way.
#[derive(Debug)]
struct Part {
    addresses: Range<u64>,
    /// The number of the block's first page, and the address of its first byte.
    first_page: u64,
    block_address: u64,
    shared: bool,
}

impl UffdWpLog {
    /// Finds out whether the kernel tracks writes for this process.
    ///
    /// # Errors
    /// What is missing; another log then has to do.
    pub fn new() -> Result<UffdWpLog, UffdUnavailable> {
        let pagemap = host::scanner()?;
        let uffd = open()?;
        Ok(UffdWpLog { pagemap, uffd: Some(uffd), parts: Vec::new(), page_size: 0 })
    }

    fn begin(&mut self, ram: &Ram) -> io::Result<()> {
        self.page_size = ram.layout().page_size() as u64;
        let uffd = match self.uffd.take() {
            Some(uffd) => uffd,
            None => open().map_err(io::Error::other)?,
        };
        for (block, layout) in ram.blocks().iter().zip(ram.layout().blocks()) {
            uffd.register(block.address(), block.bytes() as u64).map_err(|error| {
                let name = block.name().as_str();
                io::Error::new(error.kind(), format!("RAM block {name:?} cannot be write-protected: {error}"))
            })?;
            self.parts.extend(mappings::of_block(block)?.into_iter().map(|mapping| Part {
                addresses: mapping.addresses,
                first_page: layout.first_page(),
                block_address: block.address(),
                shared: mapping.shared,
            }));
        }
        self.uffd = Some(uffd);
        for part in &self.parts {
            self.pagemap.scan(part.addresses.clone(), part.query(true), |_| {})?;
        }
        Ok(())
    }

    /// Adds the pages that are not protected to `into`, and protects them if so told.
    fn scan(&mut self, into: &mut DirtyBitmap, protect: bool) -> io::Result<()> {
        let page_size = self.page_size;
        for part in &self.parts {
            self.pagemap.scan(part.addresses.clone(), part.query(protect), |written| {
                // Rounded outwards where pages of the layout and of the system differ in size.
                let first = (written.start - part.block_address) / page_size;
                let end = (written.end - part.block_address).div_ceil(page_size);
                into.set_range(part.first_page + first..part.first_page + end);
            })?;
        }
        Ok(())
    }
}

impl DirtyLog for UffdWpLog {
    fn name(&self) -> &'static str {
        "uffd-wp"
    }

    /// Registers the blocks and protects their pages, of anonymous memory only those that are there.
    ///
    /// # Errors
    /// Also for memory that is neither private anonymous nor shared memory, for a block that does not begin and end at
    /// pages of the system, and for one that is registered with another userfaultfd.
    fn start(&mut self, ram: &Ram) -> io::Result<()> {
        if !self.parts.is_empty() {
            self.stop()?;
        }
        self.begin(ram).inspect_err(|_| {
            self.parts.clear();
            self.uffd = None;
        })
    }

    fn drain(&mut self, into: &mut DirtyBitmap) -> io::Result<()> {
        self.scan(into, true)
    }

    /// Asks for the unprotected pages, and leaves them so.
    fn peek(&mut self, into: &mut DirtyBitmap) -> io::Result<()> {
        self.scan(into, false)
    }

    fn stop(&mut self) -> io::Result<()> {
        self.parts.clear();
        // Closing unregisters everything and takes the protection away.
        self.uffd = None;
        Ok(())
    }
}

impl Part {
    fn query(&self, protect: bool) -> Query {
        let any_of = if self.shared { 0 } else { PRESENT | SWAPPED };
        Query { all_of: WRITTEN, any_of, returned: WRITTEN, protect, ..Query::default() }
    }
}

/// Why the kernel does not track writes for this process.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UffdUnavailable {
    /// `/proc/self/pagemap` cannot be opened, e.g. because the process changed its user after it was started.
    #[error("/proc/self/pagemap: {source}")]
    NoPagemap {
        /// The kernel's error.
        source: io::Error,
    },
    /// The kernel is older than Linux 6.7, or was built without.
    #[error("PAGEMAP_SCAN is missing (Linux 6.7 has it): {source}")]
    NoPagemapScan {
        /// The kernel's error.
        source: io::Error,
    },
    /// Neither the system call nor `/dev/userfaultfd` is permitted, as in many containers.
    #[error("userfaultfd is not permitted: {source}")]
    NotPermitted {
        /// The kernel's error.
        source: io::Error,
    },
    /// userfaultfd is there, asynchronous write protection is not.
    #[error("userfaultfd has no asynchronous write protection (Linux 6.7 has it): {source}")]
    NoAsyncWriteProtection {
        /// The kernel's error.
        source: io::Error,
    },
}

pub(crate) fn open() -> Result<Userfaultfd, UffdUnavailable> {
    Userfaultfd::open().map_err(|(step, source)| match step {
        Step::Open => UffdUnavailable::NotPermitted { source },
        Step::Features => UffdUnavailable::NoAsyncWriteProtection { source },
    })
}
