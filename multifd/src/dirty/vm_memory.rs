//! Guest memory and dirty bitmaps of the `vm-memory` crate, for VMMs that use it (feature `vm-memory`).
//!
//! `vm-memory` marks a page after it wrote there, by a sequentially consistent read-modify-write, and its bits are taken
//! out the same way: the order that [`bitmap`](crate::dirty::bitmap) shows to be sufficient. Device code that writes
//! through raw pointers (`ptr_guard_mut`) has to mark by itself, when it is done. As with every bitmap of the host
//! process, vCPUs are tracked by another log: merge both.

use std::{any::Any, fmt, io};

use multifd_proto::BlockName;
use vm_memory::{
    GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress, MmapRegion,
    bitmap::{AtomicBitmap, Bitmap},
};

use crate::{
    dirty::DirtyLog,
    dirty_bitmap::DirtyBitmap,
    error::Mismatch,
    ram::{Backing, Ram, RamBlock},
    sys,
};

/// The regions of `memory` as RAM blocks, with pages of `page_size` bytes, called what `name` says for the position and
/// the guest physical address of a region.
///
/// The blocks keep the regions mapped. Where devices hold pages of them (VFIO), say so: [`Ram::pinned`].
///
/// # Errors
/// As [`Ram::new`]; [`Mismatch::BlockNotMapped`] for a region that is not mapped for reading.
pub fn ram<B: Bitmap + Send + Sync + 'static>(
    memory: &GuestMemoryMmap<B>,
    page_size: usize,
    mut name: impl FnMut(usize, u64) -> BlockName,
) -> Result<Ram, Mismatch> {
    let blocks = memory.iter().enumerate().map(|(index, region)| {
        let name = name(index, region.start_addr().0);
        let block = sys::vm_memory::block(name.clone(), region.get_mmap()).ok_or(Mismatch::BlockNotMapped { name })?;
        Ok(block.at(region.start_addr().0))
    });
    Ram::new(page_size, blocks.collect::<Result<_, _>>()?)
}

/// What a VMM says of a region of a memory of its own kind: see [`ram_of`].
pub struct RegionBlock {
    name: BlockName,
    owner: Box<dyn Any + Send + Sync>,
    backing: Backing,
    pinned: bool,
    read_only: bool,
    kernel_page: Option<u64>,
}

impl RegionBlock {
    /// A block called `name`, whose region stays mapped until `owner` is dropped: a clone of the `Arc` that holds it, or of all of the
    /// memory. What it is made of is looked up where it matters.
    pub fn new(name: BlockName, owner: impl Any + Send + Sync) -> RegionBlock {
        let owner = Box::new(owner);
        RegionBlock { name, owner, backing: Backing::Foreign, pinned: false, read_only: false, kernel_page: None }
    }

    /// The same, made of `backing`: see [`RamBlock::backed_by`](crate::ram::RamBlock::backed_by).
    #[must_use]
    pub fn backed_by(self, backing: Backing) -> RegionBlock {
        RegionBlock { backing, ..self }
    }

    /// The same, of which devices hold pages: see [`RamBlock::pinned`](crate::ram::RamBlock::pinned).
    #[must_use]
    pub fn pinned(self) -> RegionBlock {
        RegionBlock { pinned: true, ..self }
    }

    /// The same, which is only read: see [`RamBlock::read_only`](crate::ram::RamBlock::read_only).
    #[must_use]
    pub fn read_only(self) -> RegionBlock {
        RegionBlock { read_only: true, ..self }
    }

    /// The same, which the kernel backs with pages of `bytes`: see [`RamBlock::with_kernel_pages`](crate::ram::RamBlock::with_kernel_pages).
    #[must_use]
    pub fn with_kernel_pages(self, bytes: u64) -> RegionBlock {
        RegionBlock { kernel_page: Some(bytes), ..self }
    }
}

/// The regions of any memory as RAM blocks, in pages of `page_size` bytes, for VMMs whose regions are of a type of their
/// own. `describe` is given the position of a region and the region, and says what is not known from it.
///
/// # Safety
/// What [`RamBlock::from_raw`](crate::ram::RamBlock::from_raw) asks for holds for each region, with the owner that `describe` names: all of
/// it is mapped readable and writable at its host address until that owner is dropped.
///
/// # Errors
/// As [`Ram::new`]; [`Mismatch::BlockNotMapped`] for a region without an address in this process.
#[allow(unsafe_code)]
pub unsafe fn ram_of<M: GuestMemoryBackend>(
    memory: &M,
    page_size: usize,
    mut describe: impl FnMut(usize, &M::R) -> RegionBlock,
) -> Result<Ram, Mismatch> {
    let blocks = memory.iter().enumerate().map(|(index, region)| {
        let RegionBlock { name, owner, backing, pinned, read_only, kernel_page } = describe(index, region);
        // SAFETY: as the caller promises.
        let block = unsafe { sys::vm_memory::region_block(name.clone(), region, owner) };
        let block = block.ok_or(Mismatch::BlockNotMapped { name })?;
        let mut block = block.backed_by(backing).at(region.start_addr().0);
        if let Some(bytes) = kernel_page {
            block = block.with_kernel_pages(bytes);
        }
        if pinned {
            block = block.pinned();
        }
        Ok(if read_only { block.read_only() } else { block })
    });
    Ram::new(page_size, blocks.collect::<Result<_, _>>()?)
}

/// The bitmaps of a `vm-memory` guest memory: what the devices wrote.
pub struct VmMemoryLog<M: GuestMemoryBackend = GuestMemoryMmap<AtomicBitmap>> {
    memory: M,
    bitmap: BitmapOf<M::R>,
    /// While tracking, for each region.
    regions: Vec<Tracked>,
    page_size: u64,
}

/// The bitmap of a region, if it has one.
type BitmapOf<R> = fn(&R) -> Option<&AtomicBitmap>;

/// A region and its block.
#[derive(Debug)]
struct Tracked {
    first_page: u64,
    pages: u64,
    /// Bytes that one bit of the bitmap stands for.
    unit: u64,
}

impl VmMemoryLog {
    /// A log over the bitmaps of `memory`, which is cloned: all clones share their regions.
    pub fn new(memory: &GuestMemoryMmap<AtomicBitmap>) -> VmMemoryLog {
        VmMemoryLog::of(memory.clone(), |region| Some(MmapRegion::bitmap(region)))
    }
}

impl<M: GuestMemoryBackend> VmMemoryLog<M> {
    /// A log over any memory, where `bitmap` finds the bitmap of a region: also `Option<AtomicBitmap>`, by `as_ref`.
    pub fn of(memory: M, bitmap: fn(&M::R) -> Option<&AtomicBitmap>) -> VmMemoryLog<M> {
        VmMemoryLog { memory, bitmap, regions: Vec::new(), page_size: 0 }
    }
}

impl<M: GuestMemoryBackend> fmt::Debug for VmMemoryLog<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VmMemoryLog").field("regions", &self.regions).finish_non_exhaustive()
    }
}

impl<M: GuestMemoryBackend + Send> DirtyLog for VmMemoryLog<M> {
    fn name(&self) -> &'static str {
        "vm-memory"
    }

    /// Forgets the marks of earlier writes.
    ///
    /// # Errors
    /// If a region is no RAM block of `ram`, has no bitmap, or one whose pages have a size that is not a power of two.
    fn start(&mut self, ram: &Ram) -> io::Result<()> {
        let refused = |why| io::Error::new(io::ErrorKind::InvalidInput, why);
        self.page_size = ram.layout().page_size() as u64;
        self.regions.clear();
        let mut regions = Vec::new();
        for region in self.memory.iter() {
            let address = region.get_host_address(MemoryRegionAddress(0)).map_err(io::Error::other)? as u64;
            let is_region = |block: &RamBlock| block.address() == address && block.bytes() as u64 == region.len();
            let index = ram.blocks().iter().position(is_region);
            let layout = &ram.layout().blocks()[index.ok_or_else(|| refused("a region is no RAM block"))?];
            let bitmap = (self.bitmap)(region).ok_or_else(|| refused("a region has no bitmap"))?;
            let unit = bytes_per_bit(bitmap.byte_size() as u64, bitmap.len() as u64);
            let unit = unit.ok_or_else(|| refused("a bitmap has pages of a size that is no power of two"))?;
            bitmap.get_and_reset();
            regions.push(Tracked { first_page: layout.first_page(), pages: layout.pages(), unit });
        }
        self.regions = regions;
        Ok(())
    }

    fn drain(&mut self, into: &mut DirtyBitmap) -> io::Result<()> {
        for (region, &Tracked { first_page, pages, unit }) in self.memory.iter().zip(&self.regions) {
            let bitmap = (self.bitmap)(region).ok_or_else(|| io::Error::other("a region lost its bitmap"))?;
            for (index, mut word) in bitmap.get_and_reset().into_iter().enumerate() {
                if unit == self.page_size {
                    into.merge_word((first_page / 64) as usize + index, word);
                    continue;
                }
                while word != 0 {
                    let start = (index as u64 * 64 + u64::from(word.trailing_zeros())) * unit;
                    let end = (start + unit).div_ceil(self.page_size).min(pages);
                    into.set_range(first_page + start / self.page_size..first_page + end);
                    word &= word - 1;
                }
            }
        }
        Ok(())
    }

    fn stop(&mut self) -> io::Result<()> {
        self.regions.clear();
        Ok(())
    }
}

/// Bytes that each of the `bits` stands for, where together they stand for `bytes`; `vm-memory` does not tell.
fn bytes_per_bit(bytes: u64, bits: u64) -> Option<u64> {
    // Only for a single bit is there more than one answer; each says that it stands for all bytes.
    (0..63).map(|shift| 1 << shift).find(|&unit| bytes.div_ceil(unit) == bits)
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use std::{
        num::NonZeroUsize,
        sync::{Arc, atomic::Ordering},
    };

    use vm_memory::{Bytes, GuestAddress, GuestRegionMmap, mmap::MmapRegionBuilder};

    use super::*;
    use crate::{
        dirty::conformance::{Effort, Subject, Writer, conformance},
        ram::Access,
    };

    fn memory(unit: usize, regions: &[(u64, usize)]) -> GuestMemoryMmap<AtomicBitmap> {
        let regions = regions.iter().map(|&(address, len)| {
            let bitmap = AtomicBitmap::new(len, NonZeroUsize::new(unit).unwrap());
            let mapping = MmapRegionBuilder::new_with_bitmap(len, bitmap)
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS)
                .build()
                .unwrap();
            Arc::new(GuestRegionMmap::new(mapping, GuestAddress(address)).unwrap())
        });
        GuestMemoryMmap::from_arc_regions(regions.collect()).unwrap()
    }

    fn name(index: usize, address: u64) -> BlockName {
        BlockName::new(&format!("region{index}@{address:x}")).unwrap()
    }

    /// The engine looks for zeros in it: a fault of the process, from safe code.
    #[test]
    fn a_region_that_cannot_be_read_is_refused() {
        let mapping = MmapRegionBuilder::new_with_bitmap(4096, ())
            .with_mmap_prot(libc::PROT_NONE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS)
            .build()
            .unwrap();
        let region = Arc::new(GuestRegionMmap::new(mapping, GuestAddress(0)).unwrap());
        let memory = GuestMemoryMmap::from_arc_regions(vec![region]).unwrap();
        assert_eq!(ram(&memory, 4096, name).err(), Some(Mismatch::BlockNotMapped { name: name(0, 0) }));
    }

    struct Devices {
        memory: GuestMemoryMmap<AtomicBitmap>,
        ram: Ram,
        log: VmMemoryLog,
    }

    struct Device(GuestMemoryMmap<AtomicBitmap>, Ram);

    impl Writer for Device {
        fn write(&mut self, page: u64, value: u64) {
            let block = self.1.layout().block_of(page).unwrap();
            let region = self.0.iter().nth(block).unwrap();
            let address = region.start_addr().0 + self.1.layout().blocks()[block].offset_of(page);
            // As one word, as our reader reads it meanwhile: two sides of a race that both know of it.
            self.0.store(value, GuestAddress(address), Ordering::Relaxed).unwrap();
        }
    }

    impl Subject for Devices {
        fn ram(&self) -> &Ram {
            &self.ram
        }

        fn log(&mut self) -> &mut dyn DirtyLog {
            &mut self.log
        }

        fn writer(&mut self) -> Box<dyn Writer> {
            Box::new(Device(self.memory.clone(), self.ram.clone()))
        }
    }

    #[test]
    fn passes_the_conformance_suite() {
        for unit in [4096, 1024, 16384] {
            let memory = memory(unit, &[(0, 150 * 4096), (0x1000_0000, 4096), (0x2000_0000, 65 * 4096)]);
            let ram = ram(&memory, 4096, name).unwrap();
            let log = VmMemoryLog::new(&memory);
            let report = conformance(&mut Devices { memory, ram, log }, Effort { bursts: 50, ..Effort::FULL }).unwrap();
            assert_eq!(report.clean_reported, 0);
            if unit <= 4096 {
                assert_eq!(report.quiet_reported, report.quiet_written);
            }
        }
    }

    #[test]
    fn blocks_are_the_regions() {
        let memory = memory(4096, &[(0, 8192), (0x1000_0000, 4096)]);
        let ram = ram(&memory, 4096, name).unwrap();
        memory.write_obj(0x1234_5678u64, GuestAddress(0x1000_0000)).unwrap();
        drop(memory);
        assert!(ram.blocks().iter().all(|block| !block.is_pinned()));
        let ram = ram.pinned();
        assert!(ram.blocks().iter().all(RamBlock::is_pinned));
        let block = ram.block("region1@10000000").unwrap();
        let mut word = [0; 8];
        block.range(0, 8).unwrap().read(&mut word);
        assert_eq!(u64::from_ne_bytes(word), 0x1234_5678);
    }

    /// A region of a VMM's own, as Firecracker has it: it knows more than `vm-memory`, and may have no bitmap.
    struct Region {
        inner: GuestRegionMmap<Option<AtomicBitmap>>,
        plugged: bool,
    }

    impl GuestMemoryRegion for Region {
        type B = Option<AtomicBitmap>;

        fn len(&self) -> u64 {
            self.inner.len()
        }

        fn start_addr(&self) -> GuestAddress {
            self.inner.start_addr()
        }

        fn bitmap(&self) -> vm_memory::bitmap::BS<'_, Self::B> {
            GuestMemoryRegion::bitmap(&self.inner)
        }

        fn get_host_address(&self, address: MemoryRegionAddress) -> vm_memory::guest_memory::Result<*mut u8> {
            self.inner.get_host_address(address)
        }

        fn get_slice(
            &self,
            offset: MemoryRegionAddress,
            count: usize,
        ) -> vm_memory::guest_memory::Result<vm_memory::VolatileSlice<'_, vm_memory::bitmap::BS<'_, Self::B>>> {
            self.inner.get_slice(offset, count)
        }
    }

    impl vm_memory::GuestMemoryRegionBytes for Region {}

    #[test]
    fn regions_of_a_type_of_the_vmms_own_are_blocks_and_their_bitmaps_a_log() {
        type Memory = vm_memory::GuestRegionCollection<Region>;
        let region = |address, bitmap: Option<AtomicBitmap>| {
            let mapping = MmapRegionBuilder::new_with_bitmap(0x3000, bitmap)
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS)
                .build()
                .unwrap();
            Region { inner: GuestRegionMmap::new(mapping, GuestAddress(address)).unwrap(), plugged: true }
        };
        let memory = |bitmap: fn() -> Option<AtomicBitmap>| {
            let regions = vec![region(0, bitmap()), region(0x10_0000, bitmap())];
            Memory::from_regions(regions).unwrap()
        };
        let blocks = |memory: &Memory| {
            let describe = |index, region: &Region| {
                assert!(region.plugged);
                let block = RegionBlock::new(name(index, region.start_addr().0), memory.clone());
                let block = block.backed_by(Backing::Anonymous).with_kernel_pages(4096);
                if index == 1 { block.pinned().read_only() } else { block }
            };
            // SAFETY: a clone of the memory keeps its regions.
            #[allow(unsafe_code)]
            unsafe { ram_of(memory, 4096, describe) }.unwrap()
        };
        let said = |block: &RamBlock| (block.is_pinned(), block.access(), block.kernel_page_size());
        let some = blocks(&memory(|| None));
        let [first, second] = some.blocks() else { panic!("two regions") };
        assert_eq!(said(first), (false, Access::ReadWrite, Some(4096)));
        assert_eq!(said(second), (true, Access::ReadOnly, Some(4096)));
        let of: BitmapOf<Region> = |region| MmapRegion::bitmap(&region.inner).as_ref();

        let tracked = memory(|| Some(AtomicBitmap::new(0x3000, NonZeroUsize::new(4096).unwrap())));
        let ram = blocks(&tracked);
        let mut log = VmMemoryLog::of(tracked.clone(), of);
        log.start(&ram).unwrap();
        tracked.write_obj(7u64, GuestAddress(0x10_1000)).unwrap();
        let mut written = DirtyBitmap::new(ram.layout());
        log.drain(&mut written).unwrap();
        drop((tracked, log));
        let page = ram.pages_at(0x10_1000..0x10_1008).next().unwrap().start;
        assert_eq!(written.iter().collect::<Vec<_>>(), [page]);
        assert_eq!(ram.page_bytes(page)[0], 7, "the block keeps the region");

        let untracked = memory(|| None);
        let error = VmMemoryLog::of(untracked.clone(), of).start(&blocks(&untracked)).unwrap_err();
        assert_eq!(error.to_string(), "a region has no bitmap", "its devices' writes would be lost");
    }

    #[test]
    fn memory_of_another_vm_is_refused() {
        let (ours, other) = (memory(4096, &[(0, 8192)]), memory(4096, &[(0, 8192)]));
        let ram = ram(&ours, 4096, name).unwrap();
        assert!(VmMemoryLog::new(&other).start(&ram).is_err());
    }
}
