//! Where a sending thread has the contents of pages that are in a file: the same memory for one batch after the other.
//!
//! Its pages are there already. In a place of its own each page would be made and cleared before it is read, and given back
//! once it is sent, which takes longer than to read it.

use std::io;

use multifd_proto::packet;

use crate::{
    error::Error,
    ram::{GuestRange, Ram, RamBlock},
    sys::advice,
};

/// Room for the contents of one batch.
pub(super) struct Room {
    page_size: usize,
    /// None where all contents are in memory.
    memory: Option<RamBlock>,
}

impl Room {
    /// Makes room for batches of the pages of `ram`.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn new(ram: &Ram) -> io::Result<Room> {
        let page_size = ram.layout().page_size();
        let memory = match ram.blocks().iter().find(|block| block.file().is_some()) {
            Some(block) => Some(RamBlock::anonymous(block.name().clone(), packet::capacity(page_size) * page_size)?),
            None => None,
        };
        Ok(Room { page_size, memory })
    }

    /// Reads the pages at `offsets`, which are ascending, where the contents of `block` are in a file.
    ///
    /// # Errors
    /// They cannot be had.
    pub(super) fn load(&self, block: &RamBlock, offsets: &[u64]) -> Result<(), Error> {
        let Some((file, memory)) = block.file().zip(self.memory.as_ref()) else { return Ok(()) };
        let mut at = 0;
        for run in offsets.chunk_by(|a, b| a + self.page_size as u64 == *b) {
            let len = run.len() * self.page_size;
            file.load(run[0], memory.range(at, len).expect("a batch has no more pages"))?;
            at += len as u64;
        }
        Ok(())
    }

    /// The contents of the page at `offset` of `block`, which was the one at `index` of those that were loaded last.
    pub(super) fn page<'a>(&'a self, block: &'a RamBlock, offset: u64, index: usize) -> GuestRange<'a> {
        let in_room = self.memory.as_ref().filter(|_| block.file().is_some());
        let range = match in_room {
            Some(memory) => memory.range((index * self.page_size) as u64, self.page_size),
            None => block.range(offset, self.page_size),
        };
        range.expect("the scan hands out pages of the block")
    }

    /// The kernel may still be sending what was loaded, from where it is: it keeps these pages, and the room gets others.
    ///
    /// # Errors
    /// It still has the same pages: the memory of the process is locked. They must not be loaded into before all is sent.
    pub(super) fn leave_to_kernel(&self) -> io::Result<()> {
        let Some(memory) = &self.memory else { return Ok(()) };
        let len = packet::capacity(self.page_size) * self.page_size;
        advice::discard_private(memory.range(0, len).expect("it is that long"))
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use std::{fs::File, io::Write};

    use multifd_proto::BlockName;
    use test_support::TempDir;

    use super::*;
    use crate::sys::file_block::{FilePart, file_block};

    const PAGE: usize = 4096;

    fn bytes(range: GuestRange<'_>) -> Vec<u8> {
        let mut bytes = vec![0; range.len()];
        range.read(&mut bytes);
        bytes
    }

    /// A batch has gaps where pages are zeros or were not written.
    #[test]
    fn pages_are_found_at_their_place_in_the_batch() {
        let dir = TempDir::new().unwrap();
        let path = dir.join("x");
        let mut file = File::options().create_new(true).read(true).write(true).open(&path).unwrap();
        for page in 0..8u8 {
            file.write_all(&[page + 1; PAGE]).unwrap();
        }
        let name = |name| BlockName::new(name).unwrap();
        let in_file = file_block(name("file"), FilePart { file, path, offset: 0 }, 8 * PAGE).unwrap();
        let in_memory = RamBlock::anonymous(name("memory"), 8 * PAGE).unwrap();
        in_memory.range(5 * PAGE as u64, PAGE).unwrap().write(&[9; PAGE]);
        let ram = Ram::new(PAGE, vec![in_memory, in_file]).unwrap();
        let (in_memory, in_file) = (&ram.blocks()[0], &ram.blocks()[1]);
        let room = Room::new(&ram).unwrap();
        for batch in [&[0, 1, 5][..], &[7], &[1, 2, 3, 4, 6]] {
            let offsets: Vec<u64> = batch.iter().map(|page| page * PAGE as u64).collect();
            room.load(in_file, &offsets).unwrap();
            for (index, (&page, &offset)) in batch.iter().zip(&offsets).enumerate() {
                assert_eq!(bytes(room.page(in_file, offset, index)), [page as u8 + 1; PAGE], "{batch:?}");
            }
        }
        room.load(in_memory, &[5 * PAGE as u64]).unwrap();
        assert_eq!(bytes(room.page(in_memory, 5 * PAGE as u64, 0)), [9; PAGE]);
        room.leave_to_kernel().unwrap();
        assert_eq!(bytes(room.page(in_file, 0, 0)), [0; PAGE], "it has other pages");
    }

    #[test]
    fn memory_alone_needs_none() {
        let block = RamBlock::anonymous(BlockName::new("ram").unwrap(), PAGE).unwrap();
        let room = Room::new(&Ram::new(PAGE, vec![block]).unwrap()).unwrap();
        assert!(room.memory.is_none());
        room.leave_to_kernel().unwrap();
    }
}
