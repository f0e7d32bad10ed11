//! Guest memory and dirty bitmaps of the `vm-memory` crate, for VMMs that use it (feature `vm-memory`).
//!
//! `vm-memory` marks a page after it wrote there, by a sequentially consistent read-modify-write, and its bits are taken
//! out the same way: the order that [`bitmap`](crate::dirty::bitmap) shows to be sufficient. Device code that writes
//! through raw pointers (`ptr_guard_mut`) has to mark by itself, when it is done. As with every bitmap of the host
//! process, vCPUs are tracked by another log: merge both.

use std::io;

use multifd_proto::BlockName;
use vm_memory::{
    GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MmapRegion,
    bitmap::{AtomicBitmap, Bitmap},
};

use crate::{dirty::DirtyLog, dirty_bitmap::DirtyBitmap, error::Mismatch, ram::Ram, sys};

/// The regions of `memory` as RAM blocks, with pages of `page_size` bytes, called what `name` says for the position and
/// the guest physical address of a region.
///
/// The blocks keep the regions mapped.
///
/// # Errors
/// As [`Ram::new`].
pub fn ram<B: Bitmap + Send + Sync + 'static>(
    memory: &GuestMemoryMmap<B>,
    page_size: usize,
    mut name: impl FnMut(usize, u64) -> BlockName,
) -> Result<Ram, Mismatch> {
    let blocks = memory.iter().enumerate().map(|(index, region)| {
        let name = name(index, region.start_addr().0);
        sys::vm_memory::block(name.clone(), region.get_mmap()).ok_or(Mismatch::BlockAddress { name })
    });
    Ram::new(page_size, blocks.collect::<Result<_, _>>()?)
}

/// The bitmaps of a `vm-memory` guest memory: what the devices wrote.
#[derive(Debug)]
pub struct VmMemoryLog {
    memory: GuestMemoryMmap<AtomicBitmap>,
    /// While tracking: for each region the number of its block's first page, the pages of the block, and the bytes
    /// that one bit stands for.
    regions: Vec<(u64, u64, u64)>,
    page_size: u64,
}

impl VmMemoryLog {
    /// A log over the bitmaps of `memory`, which is cloned: all clones share their regions.
    pub fn new(memory: &GuestMemoryMmap<AtomicBitmap>) -> VmMemoryLog {
        VmMemoryLog { memory: memory.clone(), regions: Vec::new(), page_size: 0 }
    }
}

impl DirtyLog for VmMemoryLog {
    fn name(&self) -> &'static str {
        "vm-memory"
    }

    /// Forgets the marks of earlier writes.
    ///
    /// # Errors
    /// If a region is no RAM block of `ram`, or its bitmap has pages whose size is not a power of two.
    fn start(&mut self, ram: &Ram) -> io::Result<()> {
        let refused = |why| io::Error::new(io::ErrorKind::InvalidInput, why);
        self.page_size = ram.layout().page_size() as u64;
        self.regions.clear();
        let mut regions = Vec::new();
        for region in self.memory.iter() {
            let address = region.as_ptr() as u64;
            let index =
                ram.blocks().iter().position(|block| block.address() == address && block.bytes() == region.size());
            let layout = &ram.layout().blocks()[index.ok_or_else(|| refused("a region is no RAM block"))?];
            let bitmap = MmapRegion::bitmap(region);
            let unit = bytes_per_bit(bitmap.byte_size() as u64, bitmap.len() as u64);
            let unit = unit.ok_or_else(|| refused("a bitmap has pages of a size that is no power of two"))?;
            bitmap.get_and_reset();
            regions.push((layout.first_page(), layout.pages(), unit));
        }
        self.regions = regions;
        Ok(())
    }

    fn drain(&mut self, into: &mut DirtyBitmap) -> io::Result<()> {
        for (region, &(first_page, pages, unit)) in self.memory.iter().zip(&self.regions) {
            for (index, mut word) in MmapRegion::bitmap(region).get_and_reset().into_iter().enumerate() {
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
    use crate::dirty::conformance::{Effort, Subject, Writer, conformance};

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
        let block = ram.block("region1@10000000").unwrap();
        let mut word = [0; 8];
        block.range(0, 8).unwrap().read(&mut word);
        assert_eq!(u64::from_ne_bytes(word), 0x1234_5678);
    }

    #[test]
    fn memory_of_another_vm_is_refused() {
        let (ours, other) = (memory(4096, &[(0, 8192)]), memory(4096, &[(0, 8192)]));
        let ram = ram(&ours, 4096, name).unwrap();
        assert!(VmMemoryLog::new(&other).start(&ram).is_err());
    }
}
