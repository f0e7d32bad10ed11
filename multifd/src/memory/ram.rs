//! Guest memory as the engine sees it: RAM blocks, and ranges of them that cannot be forged.
//!
//! A [`GuestRange`] lies within its block by construction, so its holder may pass it to the kernel or copy from it without
//! a further check. A block knows whether it may be written, and whether it is still as it was mapped. Guest memory is
//! never a Rust slice: it changes under our hands.

use std::{
    any::Any,
    fmt,
    io,
    ops::Range,
    os::fd::AsFd,
    ptr::NonNull,
    // Not from `crate::sync`: only main threads look at it, between migrations.
    sync::atomic::{AtomicBool, AtomicU8, Ordering::Relaxed},
};

pub use multifd_proto::BlockName;

pub use super::{
    backing::{Backing, FileMemory, MemoryFile},
    shared::SharedBlock,
};
use crate::{
    error::Mismatch,
    layout::{BlockLayout, Layout},
    sync::Arc,
    sys::{guest_copy, heap, mapping::Mapping},
};

/// The memory of a VM: its RAM blocks and the numbering of their pages. Cheap to clone; all clones are the same memory.
#[derive(Clone)]
pub struct Ram {
    inner: Arc<Inner>,
}

struct Inner {
    layout: Layout,
    blocks: Vec<RamBlock>,
    /// A migration reads or writes it: [`InUse`].
    in_use: AtomicBool,
}

impl Ram {
    /// Puts `blocks` together, with pages of `page_size` bytes.
    ///
    /// # Errors
    /// As [`Layout::new`]; also for a block whose address is not a multiple of 8, and for two blocks that have bytes in common.
    pub fn new(page_size: usize, blocks: Vec<RamBlock>) -> Result<Ram, Mismatch> {
        let layout = Layout::new(page_size, blocks.iter().map(|block| (block.name.clone(), block.len as u64)))?;
        if let Some(block) = blocks.iter().find(|block| !(block.base.as_ptr() as usize).is_multiple_of(8)) {
            return Err(Mismatch::BlockAddress { name: block.name.clone() });
        }
        check_apart(&blocks)?;
        Ok(Ram { inner: Arc::new(Inner { layout, blocks, in_use: AtomicBool::new(false) }) })
    }

    /// One page of zeros.
    pub(crate) fn zeros(page_size: usize) -> Result<Ram, Mismatch> {
        let name = BlockName::new("zeros").expect("a valid name");
        Ram::new(page_size, vec![heap::zeroed_block(name, page_size)])
    }

    /// Names, lengths and page numbers of the blocks.
    pub fn layout(&self) -> &Layout {
        &self.inner.layout
    }

    /// All blocks, in the order of the layout.
    pub fn blocks(&self) -> &[RamBlock] {
        &self.inner.blocks
    }

    /// The block called `name`.
    pub fn block(&self, name: &str) -> Option<&RamBlock> {
        Some(&self.inner.blocks[self.inner.layout.index_of(name)?])
    }

    /// The page with number `page` of the layout; `None` for the numbers between two blocks.
    pub fn page(&self, page: u64) -> Option<GuestRange<'_>> {
        let index = self.inner.layout.block_of(page)?;
        let offset = self.inner.layout.blocks()[index].offset_of(page);
        self.inner.blocks[index].range(offset, self.inner.layout.page_size())
    }
}

impl Ram {
    /// The numbers of the pages in which any byte of `guest` lies, a range of guest physical addresses: for logs that speak
    /// these, as KVM's and vhost's do. One range for each block that it reaches, in the order of the layout.
    ///
    /// What lies in no block is left out, and so are blocks of which it is not known [where they are](RamBlock::at).
    pub fn pages_at(&self, guest: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        self.inner.blocks.iter().zip(self.layout().blocks()).filter_map(move |(block, layout)| {
            let base = block.guest_address?;
            // As offsets in the block: its end may be the end of the address space.
            let start = guest.start.saturating_sub(base);
            let end = guest.end.saturating_sub(base).min(block.len as u64);
            let page_size = self.layout().page_size() as u64;
            let pages = start / page_size..end.div_ceil(page_size);
            (start < end).then(|| layout.first_page() + pages.start..layout.first_page() + pages.end)
        })
    }

    /// Declares that no byte of any block was written since it was mapped; see [`RamBlock::fresh`]. Of no effect on memory
    /// that a migration has used.
    #[must_use]
    pub fn fresh(self) -> Ram {
        self.inner.blocks.iter().for_each(RamBlock::declare_fresh);
        self
    }

    /// Says of all blocks that devices hold pages of them; see [`RamBlock::pinned`].
    #[must_use]
    pub fn pinned(self) -> Ram {
        self.inner.blocks.iter().for_each(|block| block.pinned.store(true, Relaxed));
        self
    }

    /// Has the memory for one migration, until the value is dropped.
    ///
    /// # Errors
    /// [`Mismatch::MemoryInUse`]: another migration has it. A destination would make the memory of a running guest zero, and of two
    /// sources one would let the guest run while the other has paused it.
    pub(crate) fn begin_use(&self) -> Result<InUse, Mismatch> {
        match self.inner.in_use.swap(true, Relaxed) {
            true => Err(Mismatch::MemoryInUse),
            false => Ok(InUse(self.clone())),
        }
    }

    /// Whether `other` is a clone of this.
    pub(crate) fn is_same(&self, other: &Ram) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    /// Whether `other` has the same blocks in the same places, under the same page numbers.
    pub(crate) fn is_same_memory(&self, other: &Ram) -> bool {
        let page_size = |ram: &Ram| ram.layout().page_size();
        let same = |(a, b): (&RamBlock, &RamBlock)| (&a.name, a.base, a.len) == (&b.name, b.base, b.len);
        self.is_same(other)
            || (page_size(self) == page_size(other)
                && self.blocks().len() == other.blocks().len()
                && self.blocks().iter().zip(other.blocks()).all(same))
    }

    /// The memory is in use: no block is fresh any more.
    pub(crate) fn forget_fresh(&self) {
        for block in &self.inner.blocks {
            block.take_fresh();
        }
    }
}

impl fmt::Debug for Ram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ram").field("blocks", &self.inner.blocks).finish()
    }
}

/// The memory of a VM is in use by a migration, and by no other one.
pub(crate) struct InUse(Ram);

impl Drop for InUse {
    fn drop(&mut self) {
        self.0.inner.in_use.store(false, Relaxed);
    }
}

/// Makes sure that no byte is in two blocks: they would be sent, and written, as if they were two.
fn check_apart(blocks: &[RamBlock]) -> Result<(), Mismatch> {
    let mut places: Vec<_> = blocks.iter().map(|block| (block.address(), block)).collect();
    places.sort_unstable_by_key(|(address, _)| *address);
    let overlapping = places.windows(2).find(|pair| pair[1].0 - pair[0].0 < pair[0].1.len as u64);
    overlapping.map_or(Ok(()), |pair| {
        Err(Mismatch::BlocksOverlap { name: pair[0].1.name.clone(), other: pair[1].1.name.clone() })
    })
}

/// One named range of guest memory that is mapped in this process.
pub struct RamBlock {
    name: BlockName,
    base: NonNull<u8>,
    len: usize,
    access: Access,
    /// [`UNKNOWN`], [`FRESH`] or [`USED`]. Shared by all clones of a [`Ram`].
    contents: AtomicU8,
    backing: Backing,
    pinned: AtomicBool,
    guest_address: Option<u64>,
    /// Bytes in a page of the kernel's, where the VMM has said so.
    kernel_page: Option<u64>,
    /// It is the memory of a VM of another process.
    lent: AtomicBool,
    /// Keeps the mapping alive for as long as anybody can reach the block.
    _owner: Box<dyn Any + Send + Sync>,
}

/// What may be done with the memory of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Access {
    /// It can only be read: a source may send it, a destination refuses it.
    ReadOnly,
    /// It can be read and written.
    ReadWrite,
}

// SAFETY: a RAM block is plain memory that other threads and the guest write at any time anyway; all access goes
// through raw pointers, atomics or the kernel, never through references.
#[allow(unsafe_code)]
unsafe impl Send for RamBlock {}
// SAFETY: see `Send`.
#[allow(unsafe_code)]
unsafe impl Sync for RamBlock {}

impl RamBlock {
    /// Describes `len` bytes of guest memory at `base`, which may be read and written.
    ///
    /// `owner` is whatever unmaps the memory when dropped; it lives for as long as the block. What the memory is made of is not known
    /// from here; [`backed_by`](Self::backed_by) says it.
    ///
    /// # Safety
    /// - `base` points to `len` bytes that stay mapped readable and writable until `owner` is dropped, on a source, too; there, except
    ///   for what [`excluded`](crate::vm::SourceVm::excluded) names. For memory that is mapped for reading there is
    ///   [`read_only_from_raw`](Self::read_only_from_raw).
    /// - A part of them that belongs to a file keeps that part of the file: where the file becomes shorter, an access ends
    ///   the process.
    /// - No Rust reference to any of these bytes exists during that time, other than to atomics.
    #[allow(unsafe_code)]
    pub unsafe fn from_raw(
        name: BlockName,
        base: NonNull<u8>,
        len: usize,
        owner: Box<dyn Any + Send + Sync>,
    ) -> RamBlock {
        let (access, contents) = (Access::ReadWrite, AtomicU8::new(UNKNOWN));
        RamBlock {
            name,
            base,
            len,
            access,
            contents,
            backing: Backing::Foreign,
            pinned: AtomicBool::new(false),
            guest_address: None,
            kernel_page: None,
            lent: AtomicBool::new(false),
            _owner: owner,
        }
    }

    /// Describes `len` bytes of guest memory at `base`, which are never written through the block.
    ///
    /// # Safety
    /// As for [`from_raw`](Self::from_raw), but the bytes need not be writable.
    #[allow(unsafe_code)]
    pub unsafe fn read_only_from_raw(
        name: BlockName,
        base: NonNull<u8>,
        len: usize,
        owner: Box<dyn Any + Send + Sync>,
    ) -> RamBlock {
        // SAFETY: as the caller promises; that the bytes are writable is only relied on with `Access::ReadWrite`.
        let block = unsafe { RamBlock::from_raw(name, base, len, owner) };
        RamBlock { access: Access::ReadOnly, ..block }
    }

    /// The same block, whose memory is made of `backing`.
    ///
    /// Said wrongly, pages that hold something may be taken for pages of zeros, and are lost. A destination may throw pages
    /// away and have the kernel give new ones: see [`pinned`](Self::pinned).
    #[must_use]
    pub fn backed_by(self, backing: Backing) -> RamBlock {
        RamBlock { backing, ..self }
    }

    /// The same block, of which devices hold pages by their physical address: an assigned device (VFIO, vDPA), or buffers
    /// registered with `io_uring`.
    ///
    /// A destination then clears what the block held in place. Of memory that is [backed by](Self::backed_by) something it
    /// knows, it throws the pages away otherwise, and the devices would be left with the old ones.
    #[must_use]
    pub fn pinned(self) -> RamBlock {
        self.pinned.store(true, Relaxed);
        self
    }

    /// The same block, whose first byte the guest has at `guest_address`: [`Ram::pages_at`] then finds its pages.
    #[must_use]
    pub fn at(self, guest_address: u64) -> RamBlock {
        RamBlock { guest_address: Some(guest_address), ..self }
    }

    /// The same block, which the kernel backs with pages of `bytes`: 2 MiB or 1 GiB where it was mapped with such (hugetlbfs, `MAP_HUGETLB`).
    ///
    /// Without this it is looked up in `/proc/self/smaps`; a memory file that is [known](Backing::MemoryFile) says it by itself. A
    /// destination chooses by it how a page gets its first content. Said wrongly, that takes longer, and no byte differs.
    #[must_use]
    pub fn with_kernel_pages(self, bytes: u64) -> RamBlock {
        RamBlock { kernel_page: Some(bytes), ..self }
    }

    /// The same block, which is only read from now on.
    #[must_use]
    pub fn read_only(self) -> RamBlock {
        RamBlock { access: Access::ReadOnly, ..self }
    }

    /// The file that the contents are in, if they are not in memory.
    pub(crate) fn file(&self) -> Option<&FileMemory> {
        match &self.backing {
            Backing::File(file) => Some(file),
            _ => None,
        }
    }

    /// Maps `len` bytes of fresh private memory; the kernel gives it pages as they are touched.
    ///
    /// # Errors
    /// The kernel's.
    pub fn anonymous(name: BlockName, len: usize) -> io::Result<RamBlock> {
        Ok(RamBlock::mapped(name, len, Mapping::anonymous(len)?).backed_by(Backing::Anonymous))
    }

    /// Maps `len` bytes of a fresh memory file (memfd), as guests have it that share memory with device processes.
    ///
    /// # Errors
    /// The kernel's.
    pub fn memory_file(name: BlockName, len: usize) -> io::Result<RamBlock> {
        let (mapping, file) = Mapping::memory_file(len)?;
        Ok(RamBlock::mapped(name, len, mapping).backed_by(Backing::MemoryFile(MemoryFile::own(file))))
    }

    /// Maps the memory of a source that hands it over; see [`take_memory`](crate::vm::DestinationVm::take_memory).
    ///
    /// # Errors
    /// The kernel's: also where the block does not begin at a page of the file, or has huge pages and does not end at one.
    pub fn shared(block: SharedBlock) -> io::Result<RamBlock> {
        let (name, len) = (block.name().clone(), block.bytes());
        let (file, offset) = block.into_file();
        let mapping = Mapping::shared(&file, offset, len)?;
        let backing = Backing::MemoryFile(MemoryFile::new(file.as_fd(), offset)?);
        Ok(RamBlock::owned(name, len, mapping).backed_by(backing))
    }

    fn mapped(name: BlockName, len: usize, mapping: Mapping) -> RamBlock {
        RamBlock::owned(name, len, mapping).fresh()
    }

    #[allow(unsafe_code)]
    fn owned(name: BlockName, len: usize, mapping: Mapping) -> RamBlock {
        // SAFETY: the mapping is that long, new, and ends with its owner. No file in it becomes shorter: it is of this crate, or
        // sealed.
        unsafe { RamBlock::from_raw(name, mapping.base(), len, Box::new(mapping)) }
    }

    /// Declares that no byte of the block was written since it was mapped: every page still reads as zeros.
    ///
    /// A destination then does not touch zero pages that it receives before any content for them, so that they cost
    /// no memory. Declared wrongly, such pages keep what they hold.
    ///
    /// This holds for one migration. The next one into the same memory, after a failed attempt, makes the pages zero that
    /// the source does not name.
    #[must_use]
    pub fn fresh(self) -> RamBlock {
        self.declare_fresh();
        self
    }

    /// Memory that a migration has used does not become fresh again by being declared so.
    fn declare_fresh(&self) {
        let _ = self.contents.compare_exchange(UNKNOWN, FRESH, Relaxed, Relaxed);
    }

    /// Whether the block was declared [`fresh`](RamBlock::fresh) and no migration has used it since.
    pub fn is_fresh(&self) -> bool {
        self.contents.load(Relaxed) == FRESH
    }

    /// Whether the block was fresh until now. From here on it may be written.
    pub(crate) fn take_fresh(&self) -> bool {
        self.contents.swap(USED, Relaxed) == FRESH
    }

    /// Whether it is the memory of a VM of another process: lent by the source of a migration that has not come to its end, or
    /// given away.
    pub(crate) fn is_lent(&self) -> bool {
        self.lent.load(Relaxed)
    }

    /// From now on it is the memory of a VM of another process, or not any more.
    pub(crate) fn set_lent(&self, lent: bool) {
        self.lent.store(lent, Relaxed);
    }

    /// What may be done with the memory.
    pub fn access(&self) -> Access {
        self.access
    }

    /// What the memory is made of.
    pub fn backing(&self) -> &Backing {
        &self.backing
    }

    /// Whether devices hold pages of the block: [`pinned`](Self::pinned).
    pub fn is_pinned(&self) -> bool {
        self.pinned.load(Relaxed)
    }

    /// Where the guest has the first byte of the block, if the VMM has said so: [`at`](Self::at).
    pub fn guest_address(&self) -> Option<u64> {
        self.guest_address
    }

    /// Bytes in a page by which the kernel backs the block, if it is known without looking:
    /// [`with_kernel_pages`](Self::with_kernel_pages), or huge pages of a memory file.
    pub fn kernel_page_size(&self) -> Option<u64> {
        self.kernel_page.or_else(|| match &self.backing {
            Backing::MemoryFile(file) => file.memory().huge_page,
            _ => None,
        })
    }

    /// The name of the block.
    pub fn name(&self) -> &BlockName {
        &self.name
    }

    /// Bytes in the block.
    pub fn bytes(&self) -> usize {
        self.len
    }

    /// Address of the first byte in this process, for kernel interfaces that take addresses.
    pub fn address(&self) -> u64 {
        self.base.as_ptr() as u64
    }

    /// All of the block.
    pub(crate) fn whole(&self) -> GuestRange<'_> {
        GuestRange { base: self.base, len: self.len, block: self }
    }

    /// The `len` bytes from `offset` on; `None` where any of them lies outside the block, or where either is not a
    /// multiple of 8.
    pub fn range(&self, offset: u64, len: usize) -> Option<GuestRange<'_>> {
        let offset = usize::try_from(offset).ok()?;
        if offset.checked_add(len)? > self.len || offset % 8 != 0 || !len.is_multiple_of(8) {
            return None;
        }
        // In bounds, so the address cannot wrap; `wrapping_add` keeps this free of unsafe code.
        let base = NonNull::new(self.base.as_ptr().wrapping_add(offset))?;
        Some(GuestRange { base, len, block: self })
    }
}

/// It is not known what the memory holds.
const UNKNOWN: u8 = 0;
/// No byte was ever written, so all of it reads as zeros.
const FRESH: u8 = 1;
/// A migration may have written to it, or a guest.
const USED: u8 = 2;

impl fmt::Debug for RamBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} ({:#x} bytes at {:p})", self.name.as_str(), self.len, self.base)
    }
}

impl BlockLayout {
    /// Whether `block` has this name and length.
    pub fn describes(&self, block: &RamBlock) -> bool {
        *self.name() == block.name && self.bytes() == block.len as u64
    }
}

/// A range of guest memory that is mapped, in bounds and a multiple of 8 bytes at an address that is one too.
#[derive(Clone, Copy)]
pub struct GuestRange<'a> {
    base: NonNull<u8>,
    len: usize,
    block: &'a RamBlock,
}

// SAFETY: as `RamBlock`, of which this is a part that cannot outlive it.
#[allow(unsafe_code)]
unsafe impl Send for GuestRange<'_> {}
// SAFETY: as `RamBlock`.
#[allow(unsafe_code)]
unsafe impl Sync for GuestRange<'_> {}

impl<'a> GuestRange<'a> {
    /// Bytes in the range.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the range has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The block that the range lies in.
    pub(crate) fn block(&self) -> &'a RamBlock {
        self.block
    }

    /// Address of the first byte, for the kernel. Reading or writing through it races with the guest: use the copies
    /// below, or a system call.
    pub fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// The part from `offset` on, `len` bytes long; `None` where it does not lie within, or is not a multiple of 8.
    pub fn slice(&self, offset: usize, len: usize) -> Option<GuestRange<'a>> {
        if offset.checked_add(len)? > self.len || !offset.is_multiple_of(8) || !len.is_multiple_of(8) {
            return None;
        }
        let base = NonNull::new(self.base.as_ptr().wrapping_add(offset))?;
        Some(GuestRange { base, len, block: self.block })
    }

    /// Whether `next` begins where this range ends, in the same block. Two blocks may be mapped side by side.
    pub fn is_followed_by(&self, next: &GuestRange<'_>) -> bool {
        std::ptr::eq(self.block, next.block) && self.base.as_ptr().wrapping_add(self.len) == next.base.as_ptr()
    }

    /// Both ranges as one, where `next` begins where this one ends and both are of the same block.
    pub(crate) fn joined(&self, next: &GuestRange<'a>) -> Option<GuestRange<'a>> {
        self.is_followed_by(next).then_some(GuestRange { len: self.len + next.len, ..*self })
    }

    /// Whether every byte is zero. The guest may write meanwhile; dirty tracking reports what this misses.
    pub fn is_zero(&self) -> bool {
        guest_copy::is_zero(*self)
    }

    /// Copies the range into `into`, which is as long. The copy is not a snapshot while the guest writes.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn read(&self, into: &mut [u8]) {
        guest_copy::read(*self, into);
    }

    /// Whether the range may be written.
    pub fn access(&self) -> Access {
        self.block.access
    }

    /// Returns an error where the range may not be written: for what is about to have the kernel write it.
    pub(crate) fn require_writable(&self) -> io::Result<()> {
        match self.block.access {
            Access::ReadWrite => Ok(()),
            Access::ReadOnly => {
                let message = format!("RAM block {:?} is read-only", self.block.name.as_str());
                Err(io::Error::new(io::ErrorKind::PermissionDenied, message))
            }
        }
    }

    /// Copies `from`, which is as long as the range, into it.
    ///
    /// # Panics
    /// If the lengths differ, or the block is [read-only](Access::ReadOnly).
    pub fn write(&self, from: &[u8]) {
        assert_eq!(self.block.access, Access::ReadWrite, "RAM block {:?}", self.block.name.as_str());
        guest_copy::write(*self, from);
    }

    /// Sets every byte to zero.
    ///
    /// # Panics
    /// If the block is [read-only](Access::ReadOnly).
    pub fn clear(&self) {
        assert_eq!(self.block.access, Access::ReadWrite, "RAM block {:?}", self.block.name.as_str());
        guest_copy::clear(*self);
    }
}

impl fmt::Debug for GuestRange<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x} bytes at {:p}", self.len, self.base)
    }
}

#[cfg(test)]
impl Ram {
    /// Zeroed heap memory with the given blocks (name and pages) of 4 KiB pages.
    pub(crate) fn for_test(blocks: &[(&str, usize)]) -> Ram {
        Ram::for_test_with_pages(4096, blocks)
    }

    /// The same with a page size of the caller's choice.
    pub(crate) fn for_test_with_pages(page_size: usize, blocks: &[(&str, usize)]) -> Ram {
        let block =
            |&(name, pages): &(&str, usize)| heap::zeroed_block(BlockName::new(name).unwrap(), pages * page_size);
        Ram::new(page_size, blocks.iter().map(block).collect()).unwrap()
    }

    /// The same blocks in the same places, in another `Ram`.
    #[cfg(not(any(loom, shuttle)))]
    #[allow(unsafe_code)]
    pub(crate) fn put_together_again(&self) -> Ram {
        // SAFETY: the owner is a handle on the memory.
        let again = |block: &RamBlock| unsafe {
            RamBlock::from_raw(block.name.clone(), block.base, block.len, Box::new(self.clone()))
        };
        Ram::new(self.layout().page_size(), self.blocks().iter().map(again).collect()).unwrap()
    }

    /// The same memory, of which it is not known what it holds.
    #[cfg(not(any(loom, shuttle)))]
    pub(crate) fn not_fresh(self) -> Ram {
        self.forget_fresh();
        self
    }

    /// How many handles on this memory there are, this one included: a thread that was not joined would hold one.
    #[cfg(not(any(loom, shuttle)))]
    pub(crate) fn handles(&self) -> usize {
        Arc::strong_count(&self.inner)
    }

    /// The bytes of page number `page`.
    pub(crate) fn page_bytes(&self, page: u64) -> Vec<u8> {
        let mut bytes = vec![0; self.layout().page_size()];
        self.page(page).unwrap().read(&mut bytes);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_past_the_end_of_its_block_does_not_exist() {
        let ram = Ram::for_test(&[("pc.ram", 2)]);
        let block = ram.block("pc.ram").unwrap();
        assert!(block.range(4096, 4096).is_some());
        assert!(block.range(4104, 4096).is_none());
        assert!(block.range(8192, 8).is_none());
        assert!(block.range(u64::MAX - 7, 8).is_none());
        assert!(block.range(4, 8).is_none());
        let range = block.range(0, 4096).unwrap();
        assert!(range.slice(4088, 8).is_some());
        assert!(range.slice(4088, 16).is_none());
    }

    #[test]
    #[allow(clippy::single_range_in_vec_init, clippy::reversed_empty_ranges)]
    fn guest_addresses_are_pages_clipped_to_blocks_and_over_holes() {
        let block = |name: &str, pages: usize| heap::zeroed_block(BlockName::new(name).unwrap(), pages * 4096);
        let blocks = vec![
            block("high", 3).at(u64::MAX - 3 * 4096 + 1),
            block("low", 10).at(0x1000),
            block("elsewhere", 5),
            block("after a hole", 2).at(0xd000),
        ];
        let ram = Ram::new(4096, blocks).unwrap();
        let [high, low, _, after] = [0, 1, 2, 3].map(|index| ram.layout().blocks()[index].first_page());
        let pages = |guest| ram.pages_at(guest).collect::<Vec<_>>();
        assert_eq!(pages(0x1000..0x1001), [low..low + 1]);
        assert_eq!(pages(0x1fff..0x2001), [low..low + 2]);
        assert_eq!(pages(0..0xd001), [low..low + 10, after..after + 1]);
        assert_eq!(pages(0..u64::MAX), [high..high + 3, low..low + 10, after..after + 2]);
        for nothing in [0..0x1000, 0xb000..0xd000, 0xf000..0x10_0000, 0x2000..0x2000, u64::MAX..u64::MAX] {
            assert_eq!(pages(nothing.clone()), [], "{nothing:x?}");
        }
        assert_eq!(pages(0x5000..0x3000), []);
    }

    #[test]
    fn copies_arrive() {
        let ram = Ram::for_test(&[("a", 1), ("b", 3)]);
        let page = ram.page(65).unwrap();
        assert!(page.is_zero());
        let content: Vec<u8> = (0..4096u32).map(|i| (i * 7 + 1) as u8).collect();
        page.write(&content);
        assert!(!page.is_zero());
        assert_eq!(ram.page_bytes(65), content);
        assert!(ram.page(64).unwrap().is_zero());
        assert!(ram.page(66).unwrap().is_zero());
        page.clear();
        assert!(page.is_zero());
    }

    /// Joined, they would be one vector entry, one copy by the kernel, or one range of the other block's pages.
    #[test]
    fn blocks_that_are_mapped_side_by_side_do_not_join() {
        let memory = Arc::new(Mapping::anonymous(8192).unwrap());
        let half = |name: &str, offset| {
            let base = NonNull::new(memory.base().as_ptr().wrapping_add(offset)).unwrap();
            // SAFETY: half of the mapping, which the owner keeps.
            #[allow(unsafe_code)]
            unsafe {
                RamBlock::from_raw(BlockName::new(name).unwrap(), base, 4096, Box::new(memory.clone()))
            }
        };
        let (low, high) = (half("low", 0), half("high", 4096));
        let (first, second) = (low.range(0, 4096).unwrap(), high.range(0, 4096).unwrap());
        assert_eq!(first.as_ptr().wrapping_add(4096), second.as_ptr());
        assert!(!first.is_followed_by(&second) && first.joined(&second).is_none());
    }

    fn read_only() -> Ram {
        let memory = Mapping::anonymous(4096).unwrap();
        let (name, base) = (BlockName::new("rom").unwrap(), memory.base());
        // SAFETY: the mapping is that long and ends with its owner.
        #[allow(unsafe_code)]
        let block = unsafe { RamBlock::read_only_from_raw(name, base, 4096, Box::new(memory)) };
        Ram::new(4096, vec![block]).unwrap()
    }

    /// Safe code wrote through a mapping that the kernel had made for reading: SIGSEGV.
    #[test]
    fn a_read_only_block_is_not_written() {
        let ram = read_only();
        let page = ram.page(0).unwrap();
        assert!(page.is_zero());
        assert_eq!(page.require_writable().unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        for write in [|page: GuestRange<'_>| page.write(&[1; 4096]), |page: GuestRange<'_>| page.clear()] {
            assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| write(page))).is_err());
        }
        assert!(page.is_zero());
    }

    #[test]
    #[cfg(not(any(loom, shuttle)))]
    fn the_kernel_does_not_receive_into_a_read_only_block() {
        use crate::transport::{RecvHalf, socket::SocketStream};
        use std::{
            io::Write,
            os::{fd::OwnedFd, unix::net::UnixStream},
        };
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(&[1; 4096]).unwrap();
        let ram = read_only();
        let mut stream = SocketStream::new(OwnedFd::from(ours)).unwrap();
        let error = stream.read_pages(&[ram.page(0).unwrap()]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        assert!(ram.page(0).unwrap().is_zero());
    }

    #[test]
    #[allow(unsafe_code)]
    fn memory_belongs_to_one_block() {
        let ram = Ram::for_test(&[("all", 4)]);
        let part = |name: &str, offset: u64, pages: usize| {
            let base = ram.blocks()[0].range(offset, 4096).unwrap().base;
            // SAFETY: the owner is a handle on the memory, of which these are a part.
            unsafe { RamBlock::from_raw(BlockName::new(name).unwrap(), base, pages * 4096, Box::new(ram.clone())) }
        };
        Ram::new(4096, vec![part("high", 8192, 2), part("low", 0, 2)]).unwrap();
        for (offset, pages) in [(0, 1), (4096, 1), (4096, 3), (0, 4)] {
            let overlapping = Ram::new(4096, vec![part("other", offset, pages), part("low", 0, 2)]);
            assert!(matches!(overlapping, Err(Mismatch::BlocksOverlap { .. })), "{offset} {pages}");
        }
    }

    #[test]
    fn only_neighbours_join() {
        let ram = Ram::for_test(&[("a", 3)]);
        let [first, second, third] = [0, 1, 2].map(|page| ram.page(page).unwrap());
        assert_eq!(first.joined(&second).unwrap().len(), 8192);
        assert!(first.joined(&third).is_none());
        assert!(second.joined(&first).is_none());
    }
}
