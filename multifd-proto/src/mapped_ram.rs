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
//! | offset | size | field         |
//! |-------:|-----:|---------------|
//! |      0 |    4 | version, 1    |
//! |      4 |    8 | page size     |
//! |     12 |    8 | bitmap offset |
//! |     20 |    8 | pages offset  |

use crate::ids::BlockName;
use crate::violation::{DecodeError, Violation};
use crate::wire::{Reader, Short, Writer};

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

    /// The header in `bytes`. Whether its offsets make sense is for [`check`](Self::check) to say.
    pub fn decode(bytes: &[u8; Self::LEN]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(bytes);
        let version = reader.u32()?;
        if version != VERSION {
            return Err(DecodeError::BadVersion { what: "mapped-ram", expected: VERSION, found: version });
        }
        let mut field = || -> Result<u64, Short> { reader.u64() };
        Ok(Self { page_size: field()?, bitmap_offset: field()?, pages_offset: field()? })
    }

    /// The header as it stands in the file.
    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut bytes = Vec::with_capacity(Self::LEN);
        let mut writer = Writer::new(&mut bytes);
        writer.u32(VERSION).u64(self.page_size).u64(self.bitmap_offset).u64(self.pages_offset);
        bytes.try_into().expect("4 + 3 × 8 bytes were written")
    }

    /// Refuses a header that does not fit a block of `len` bytes in a file of `file_len` bytes.
    ///
    /// `header_end` is where this header ends. The bitmap must lie behind it and the pages behind the bitmap, whole and page
    /// aligned; since the next entry starts behind the pages, blocks that pass cannot overlap.
    pub fn check(
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
        if self.bitmap_offset < header_end {
            return refuse("bitmap begins before its header ends", self.bitmap_offset);
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

    /// Where the next entry of the block list starts, for a header that passed [`check`](Self::check).
    pub const fn next_entry(&self, len: u64) -> u64 {
        self.pages_offset.saturating_add(len)
    }

    /// Where the page at `offset` of the block lies in the file.
    pub const fn page_at(&self, offset: u64) -> u64 {
        self.pages_offset.saturating_add(offset)
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
pub const PAGES_ALIGNMENT: u64 = 1 << 20;

const VERSION: u32 = 1;
