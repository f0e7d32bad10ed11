//! Where the pages of a RAM block lie in a mapped-ram file.
//!
//! The block list of such a file carries a [`BlockHeader`] with each block. Behind it, in the middle of the list, lie the
//! block's bitmap and its pages; the next entry of the list starts where the pages end:
//!
//! ```text
//! name, length, header | bitmap | gap to 1 MiB | page 0, page 1, … | name, length, header | …
//! ```
//!
//! Page *i* lies at `pages_offset + i × page_size` and is valid when bit *i* is set. The bitmap is the only little-endian part
//! of the format: it is an array of 64-bit words in the order of an x86 host, which makes bit *i* the bit *i* mod 8 of byte
//! *i* / 8. Offsets count from where the stream starts in the file.
//!
//! A block whose memory is elsewhere (capability `x-ignore-shared`) has 0 for both offsets, and neither bitmap nor pages: the
//! next entry stands directly behind its header. QEMU 11.1 writes and reads that; 10.0 does neither.
//!
//! | offset | size | field         |
//! |-------:|-----:|---------------|
//! |      0 |    4 | version, 1    |
//! |      4 |    8 | page size     |
//! |     12 |    8 | bitmap offset |
//! |     20 |    8 | pages offset  |

use crate::ids::BlockName;
use crate::violation::{DecodeError, ProtocolError, Violation};
use crate::wire::{Codec, Reader, Step, Stop, Writer, step};

/// Where one block's bitmap and pages lie. QEMU: `MappedRamHeader`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockHeader {
    /// Size of the pages that the bitmap counts.
    pub page_size: u64,
    /// Where the bitmap begins.
    pub bitmap_offset: u64,
    /// Where page 0 begins.
    pub pages_offset: u64,
}

impl BlockHeader {
    /// Length of the header on the wire.
    pub const LEN: usize = 28;

    /// The header of a block of `len` bytes whose header ends at `header_end`: the bitmap directly behind it and the pages at
    /// the next multiple of [`PAGES_ALIGNMENT`].
    pub fn place(header_end: u64, len: u64, page_size: u64) -> Self {
        let bitmap_end = header_end + bitmap_len(len, page_size);
        Self { page_size, bitmap_offset: header_end, pages_offset: bitmap_end.next_multiple_of(PAGES_ALIGNMENT) }
    }

    /// The header of a block whose memory is elsewhere.
    pub const fn elsewhere(page_size: u64) -> Self {
        Self { page_size, bitmap_offset: 0, pages_offset: 0 }
    }

    /// Whether the block's memory is elsewhere: the file has no place for it.
    pub const fn is_elsewhere(&self) -> bool {
        self.bitmap_offset == 0 && self.pages_offset == 0
    }

    pub(crate) fn read(reader: &mut Reader<'_>) -> Result<Self, Stop> {
        let version = reader.u32()?;
        if version != VERSION {
            return Err(DecodeError::BadVersion { what: "mapped-ram", expected: VERSION, found: version }.into());
        }
        Ok(Self { page_size: reader.u64()?, bitmap_offset: reader.u64()?, pages_offset: reader.u64()? })
    }

    /// Refuses a header that does not fit a block of `len` bytes in a file of `file_len` bytes.
    ///
    /// `header_end` is where this header ends. The bitmap must lie directly behind it and the pages somewhere behind the
    /// bitmap, whole and page aligned; since the next entry starts behind the pages, blocks that pass cannot overlap.
    pub(crate) fn check(
        &self,
        block: &BlockName,
        len: u64,
        page_size: u64,
        header_end: u64,
        file_len: u64,
    ) -> Result<(), Violation> {
        let refuse = |what, value| Err(Violation::MappedRam { block: block.clone(), what, value });
        if self.page_size != page_size {
            return refuse("page size is not that of the stream", self.page_size);
        }
        if self.bitmap_offset != header_end {
            return refuse("bitmap does not begin where its header ends", self.bitmap_offset);
        }
        let Some(bitmap_end) = self.bitmap_offset.checked_add(bitmap_len(len, page_size)) else {
            return refuse("bitmap offset overflows", self.bitmap_offset);
        };
        if self.pages_offset < bitmap_end {
            return refuse("pages begin before the bitmap ends", self.pages_offset);
        }
        if !self.pages_offset.is_multiple_of(page_size) {
            return refuse("pages are not aligned", self.pages_offset);
        }
        match self.pages_offset.checked_add(len) {
            None => refuse("pages offset overflows", self.pages_offset),
            // A complete file goes on behind its last page, so no page can be a hole at the end of the file.
            Some(end) if end > file_len => refuse("pages end behind the end of the file", end),
            Some(_) => Ok(()),
        }
    }

    /// Bytes between the header and the next entry of the block list, for a header that passed [`check`](Self::check), or
    /// [is elsewhere](Self::is_elsewhere).
    pub(crate) const fn bytes_behind(&self, len: u64) -> u64 {
        if self.is_elsewhere() { 0 } else { self.next_entry(len) - self.bitmap_offset }
    }

    /// Where the next entry of the block list starts, for a header that passed [`check`](Self::check).
    pub const fn next_entry(&self, len: u64) -> u64 {
        self.pages_offset.saturating_add(len)
    }

    /// Where the page at `offset` of the block lies in the file.
    #[cfg(test)]
    pub(crate) const fn page_at(&self, offset: u64) -> u64 {
        self.pages_offset.saturating_add(offset)
    }
}

impl Codec for BlockHeader {
    /// The header at the start of `input`. Whether its offsets make sense depends on its block.
    fn decode(input: &[u8]) -> Result<Step<Self>, ProtocolError> {
        step(input, Self::read)
    }

    fn encode(&self, out: &mut Vec<u8>) {
        Writer::new(out).u32(VERSION).u64(self.page_size).u64(self.bitmap_offset).u64(self.pages_offset);
    }
}

/// Length of the bitmap of a block of `len` bytes: whole 64-bit words.
pub const fn bitmap_len(len: u64, page_size: u64) -> u64 {
    len.div_ceil(page_size).div_ceil(64) * 8
}

/// Whether the page with this number is valid, by a bitmap as it stands in the file.
pub fn is_set(bitmap: &[u8], page: usize) -> bool {
    bitmap.get(page / 8).is_some_and(|byte| byte & 1 << (page % 8) != 0)
}

/// Marks the page with this number as valid.
///
/// # Panics
///
/// When the page lies behind the bitmap.
pub fn set(bitmap: &mut [u8], page: usize) {
    bitmap[page / 8] |= 1 << (page % 8);
}

/// Where pages begin is a multiple of this, so that a file can be read and written without the page cache.
pub(crate) const PAGES_ALIGNMENT: u64 = 1 << 20;

const VERSION: u32 = 1;

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = 4096;
    const LEN: u64 = 65 * PAGE;

    fn refusal(header: BlockHeader, file_len: u64) -> (&'static str, u64) {
        let block = BlockName::new("pc.ram").unwrap();
        match header.check(&block, LEN, PAGE, 100, file_len) {
            Err(Violation::MappedRam { what, value, .. }) => (what, value),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_layout_is_bitmap_gap_pages() {
        let header = BlockHeader::place(100, LEN, PAGE);
        assert_eq!(header, BlockHeader { page_size: PAGE, bitmap_offset: 100, pages_offset: 1 << 20 });
        assert_eq!(bitmap_len(LEN, PAGE), 16);
        assert_eq!(bitmap_len(64 * PAGE, PAGE), 8);
        assert_eq!(header.next_entry(LEN), (1 << 20) + LEN);
        assert_eq!(header.page_at(PAGE), (1 << 20) + PAGE);
        assert_eq!(BlockHeader::place((1 << 20) - 16, LEN, PAGE).pages_offset, 1 << 20);
        assert_eq!(BlockHeader::place((1 << 20) - 15, LEN, PAGE).pages_offset, 2 << 20);
        let block = BlockName::new("pc.ram").unwrap();
        assert_eq!(header.check(&block, LEN, PAGE, 100, (1 << 20) + LEN), Ok(()));
    }

    #[test]
    fn pages_may_begin_where_the_bitmap_ends() {
        let (block, bitmap_end) = (BlockName::new("ram").unwrap(), 4096);
        let bitmap_offset = bitmap_end - bitmap_len(LEN, PAGE);
        let header = BlockHeader { page_size: PAGE, bitmap_offset, pages_offset: bitmap_end };
        assert_eq!(header.check(&block, LEN, PAGE, bitmap_offset, bitmap_end + LEN), Ok(()));
        assert_eq!(header.bytes_behind(LEN), bitmap_len(LEN, PAGE) + LEN);
    }

    #[test]
    fn a_block_is_elsewhere_only_if_it_has_neither_bitmap_nor_pages() {
        for (bitmap_offset, pages_offset, elsewhere) in [(0, 0, true), (0, 1, false), (1, 0, false), (1, 1, false)] {
            let header = BlockHeader { page_size: PAGE, bitmap_offset, pages_offset };
            assert_eq!(header.is_elsewhere(), elsewhere, "{bitmap_offset}, {pages_offset}");
        }
        let header = BlockHeader { page_size: PAGE, bitmap_offset: 0, pages_offset: 0 };
        assert_eq!(header.bytes_behind(LEN), 0);
    }

    #[test]
    fn header_survives_the_file() {
        let header = BlockHeader { page_size: PAGE, bitmap_offset: 0x1122, pages_offset: 0x33_4455_6677 };
        let mut bytes = Vec::new();
        header.encode(&mut bytes);
        assert_eq!(bytes[..12], *b"\0\0\0\x01\0\0\0\0\0\0\x10\0");
        assert_eq!(BlockHeader::decode(&bytes), Ok(Step::Item { item: header, used: BlockHeader::LEN }));
        let mut newer = bytes;
        newer[3] = 2;
        let refused = DecodeError::BadVersion { what: "mapped-ram", expected: 1, found: 2 };
        assert_eq!(BlockHeader::decode(&newer), Err(refused.into()));
    }

    #[test]
    fn a_header_that_points_elsewhere_is_refused() {
        let good = BlockHeader::place(100, LEN, PAGE);
        let end = good.next_entry(LEN);
        assert_eq!(
            refusal(BlockHeader { page_size: 8192, ..good }, end),
            ("page size is not that of the stream", 8192)
        );
        for bitmap_offset in [0, 99, 101, u64::MAX] {
            let header = BlockHeader { bitmap_offset, ..good };
            assert_eq!(refusal(header, end), ("bitmap does not begin where its header ends", bitmap_offset));
        }
        for pages_offset in [0, 100, 115] {
            let header = BlockHeader { pages_offset, ..good };
            assert_eq!(refusal(header, end), ("pages begin before the bitmap ends", pages_offset));
        }
        assert_eq!(refusal(BlockHeader { pages_offset: 4097, ..good }, end), ("pages are not aligned", 4097));
        let last = 0u64.wrapping_sub(PAGE);
        assert_eq!(refusal(BlockHeader { pages_offset: last, ..good }, end), ("pages offset overflows", last));
        assert_eq!(refusal(good, end - 1), ("pages end behind the end of the file", end));
    }

    #[test]
    fn bitmap_at_the_end_of_the_number_range_is_refused() {
        let block = BlockName::new("pc.ram").unwrap();
        let header = BlockHeader { page_size: PAGE, bitmap_offset: u64::MAX - 7, pages_offset: PAGE };
        let refused =
            Violation::MappedRam { block: block.clone(), what: "bitmap offset overflows", value: u64::MAX - 7 };
        assert_eq!(header.check(&block, LEN, PAGE, u64::MAX - 7, u64::MAX), Err(refused));
    }

    #[test]
    fn bit_i_is_page_i_counted_from_the_low_end_of_each_byte() {
        let mut bitmap = [0; 16];
        for page in [0, 9, 64] {
            set(&mut bitmap, page);
        }
        assert_eq!((bitmap[0], bitmap[1], bitmap[8]), (1, 2, 1));
        let set: Vec<_> = (0..200).filter(|page| is_set(&bitmap, *page)).collect();
        assert_eq!(set, [0, 9, 64]);
    }
}
