//! The shape of guest memory: which RAM blocks there are and how their pages are numbered.
//!
//! Pages of all blocks share one numbering, the one of the dirty bitmap. Each block begins at a multiple of 64, so a
//! kernel's bitmap of one block can be merged word by word; the numbers between two blocks belong to no page.

use multifd_proto::BlockName;

use crate::error::Mismatch;

/// The RAM blocks of a VM, their lengths and the numbering of their pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    page_size: usize,
    blocks: Vec<BlockLayout>,
    bits: u64,
}

/// One RAM block in a [`Layout`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockLayout {
    name: BlockName,
    len: u64,
    page_size: usize,
    first_page: u64,
}

impl Layout {
    /// Numbers the pages of `blocks` (name and length in bytes), in the order given.
    ///
    /// # Errors
    /// A page size that is not a power of two of at least 1024, a block that is empty or not a multiple of the page size,
    /// two blocks of one name, or more than 2^63 bytes in all.
    pub fn new(page_size: usize, blocks: impl IntoIterator<Item = (BlockName, u64)>) -> Result<Layout, Mismatch> {
        check_page_size(page_size)?;
        let mut layout = Layout { page_size, blocks: Vec::new(), bits: 0 };
        let mut total = 0u64;
        for (name, len) in blocks {
            if len == 0 || len % page_size as u64 != 0 {
                return Err(Mismatch::BlockLength { name, len, page_size });
            }
            if layout.index_of(name.as_str()).is_some() {
                return Err(Mismatch::BlockTwice { name });
            }
            total = total.checked_add(len).filter(|&sum| sum < 1 << 63).ok_or(Mismatch::TooMuchRam)?;
            let first_page = layout.bits;
            layout.bits = (first_page + len / page_size as u64).next_multiple_of(64);
            layout.blocks.push(BlockLayout { name, len, page_size, first_page });
        }
        Ok(layout)
    }

    /// Bytes in a page, a power of two.
    pub fn page_size(&self) -> usize {
        self.page_size
    }

    /// All blocks, in the order of their page numbers.
    pub fn blocks(&self) -> &[BlockLayout] {
        &self.blocks
    }

    /// The position of the block called `name`.
    pub fn index_of(&self, name: &str) -> Option<usize> {
        self.blocks.iter().position(|block| block.name.as_str() == name)
    }

    /// Length of a bitmap with one bit per page number, in bits; a multiple of 64.
    pub fn bits(&self) -> u64 {
        self.bits
    }

    /// Number of pages in all blocks.
    pub fn pages(&self) -> u64 {
        self.blocks.iter().map(BlockLayout::pages).sum()
    }

    /// Number of bytes in all blocks.
    pub fn bytes(&self) -> u64 {
        self.blocks.iter().map(|block| block.len).sum()
    }

    /// The block that page number `page` belongs to; `None` for the numbers between two blocks.
    pub fn block_of(&self, page: u64) -> Option<usize> {
        let index = self.blocks.partition_point(|block| block.first_page <= page).checked_sub(1)?;
        self.blocks[index].page_range().contains(&page).then_some(index)
    }
}

impl BlockLayout {
    /// The name of the block.
    pub fn name(&self) -> &BlockName {
        &self.name
    }

    /// Bytes in the block, a multiple of the page size and more than 0.
    pub fn bytes(&self) -> u64 {
        self.len
    }

    /// Pages in the block.
    pub fn pages(&self) -> u64 {
        self.len / self.page_size as u64
    }

    /// The number of the block's first page, a multiple of 64.
    pub fn first_page(&self) -> u64 {
        self.first_page
    }

    /// The numbers of the block's pages.
    pub fn page_range(&self) -> std::ops::Range<u64> {
        self.first_page..self.first_page + self.pages()
    }

    /// The number of the page at `offset` bytes, which lies within the block.
    pub fn page_at(&self, offset: u64) -> u64 {
        debug_assert!(offset < self.len);
        self.first_page + offset / self.page_size as u64
    }

    /// The offset in bytes of page number `page`, which is one of the block's.
    pub fn offset_of(&self, page: u64) -> u64 {
        debug_assert!(self.page_range().contains(&page));
        (page - self.first_page) * self.page_size as u64
    }
}

/// # Errors
/// `page_size` is not a power of two, or out of bounds.
pub(crate) fn check_page_size(page_size: usize) -> Result<(), Mismatch> {
    match page_size.is_power_of_two() && (MIN_PAGE_SIZE..=MAX_PAGE_SIZE).contains(&page_size) {
        true => Ok(()),
        false => Err(Mismatch::PageSize { page_size }),
    }
}

/// The smallest page size: the low 10 bits of a RAM word are flags, FLUSH (0x200) the highest, so no offset may use them.
pub const MIN_PAGE_SIZE: usize = 1024;
/// The largest page size: one page fills a packet.
pub const MAX_PAGE_SIZE: usize = multifd_proto::packet::PACKET_BYTES;

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(blocks: &[(&str, u64)]) -> Result<Layout, Mismatch> {
        Layout::new(4096, blocks.iter().map(|&(name, pages)| (BlockName::new(name).unwrap(), pages * 4096)))
    }

    #[test]
    fn every_block_starts_at_a_word_of_the_bitmap() {
        let layout = layout(&[("a", 1), ("b", 65), ("c", 64)]).unwrap();
        let first: Vec<u64> = layout.blocks().iter().map(BlockLayout::first_page).collect();
        assert_eq!(first, [0, 64, 192]);
        assert_eq!(layout.bits(), 256);
        assert_eq!(layout.pages(), 130);
    }

    #[test]
    fn numbers_between_two_blocks_belong_to_no_page() {
        let layout = layout(&[("a", 1), ("b", 2)]).unwrap();
        assert_eq!(layout.block_of(0), Some(0));
        assert_eq!(layout.block_of(1), None);
        assert_eq!(layout.block_of(64), Some(1));
        assert_eq!(layout.block_of(66), None);
    }

    #[test]
    fn bad_shapes_are_refused() {
        assert!(matches!(layout(&[("a", 0)]), Err(Mismatch::BlockLength { .. })));
        assert!(matches!(layout(&[("a", 1), ("a", 1)]), Err(Mismatch::BlockTwice { .. })));
        for page_size in [512, 4095, 1 << 20] {
            assert!(matches!(Layout::new(page_size, []), Err(Mismatch::PageSize { .. })));
        }
        let huge = [("a", 1u64 << 62), ("b", 1 << 62)].map(|(name, len)| (BlockName::new(name).unwrap(), len));
        assert!(matches!(Layout::new(4096, huge), Err(Mismatch::TooMuchRam)));
    }
}
