//! The body of the `ram` section on main: 64-bit words, and the list of RAM blocks.
//!
//! A word is an offset inside a RAM block (a multiple of the page size) with flags below it. What follows a word:
//!
//! | flag   | word         | followed by                                                       |
//! |-------:|--------------|-------------------------------------------------------------------|
//! | `0x002`| Zero         | block name unless CONTINUE, fill byte 0                           |
//! | `0x004`| MemSize      | the block list; the offset is the total of all block lengths      |
//! | `0x008`| Page         | block name unless CONTINUE, one page                              |
//! | `0x010`| Eos          | nothing; ends the body                                            |
//! | `0x020`| CONTINUE     | (modifies a page word) the block is that of the previous page word |
//! | `0x040`| Xbzrle       | block name unless CONTINUE, `01`, 16-bit length, a diff           |
//! | `0x080`| RDMA's hook  | refused                                                           |
//! | `0x100`| CompressPage | block name unless CONTINUE, 32-bit length, a zlib stream          |
//! | `0x200`| Flush        | nothing; sync point of the per-round dialect                      |
//!
//! QEMU: `RAM_SAVE_FLAG_*`. CONTINUE is the only flag that goes with another one.

use crate::ids::BlockName;
use crate::mapped_ram::BlockHeader;
use crate::violation::{DecodeError, ProtocolError, Violation};
use crate::wire::{Codec, Reader, Stop, Writer};
#[cfg(test)]
use crate::wire::{Step, step};

/// One word of the `ram` section.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RamWord {
    /// A page of zeros.
    Zero {
        /// The page's offset inside its block.
        offset: u64,
        /// Whether the block is that of the previous page word, so that no name follows.
        cont: bool,
    },
    /// A page as it is.
    Page {
        /// The page's offset inside its block.
        offset: u64,
        /// Whether no name follows.
        cont: bool,
    },
    /// A page as a difference to the copy the receiver has.
    Xbzrle {
        /// The page's offset inside its block.
        offset: u64,
        /// Whether no name follows.
        cont: bool,
    },
    /// A page as a zlib stream of its own (QEMU before 9.1).
    CompressPage {
        /// The page's offset inside its block.
        offset: u64,
        /// Whether no name follows.
        cont: bool,
    },
    /// The block list follows.
    MemSize {
        /// The sum of the lengths of all blocks.
        total: u64,
    },
    /// Sync point of the per-round dialect.
    Flush,
    /// End of the section's body; sync point of the per-section dialect.
    Eos,
}

impl RamWord {
    /// The word in `word`, whose flags lie below `page_size`.
    pub(crate) fn decode(word: u64, page_size: usize) -> Result<Self, ProtocolError> {
        let mask = page_size as u64 - 1;
        let (offset, flags) = (word & !mask, word & mask);
        let cont = flags & CONTINUE != 0;
        Ok(match flags & !CONTINUE {
            ZERO => Self::Zero { offset, cont },
            PAGE => Self::Page { offset, cont },
            XBZRLE => Self::Xbzrle { offset, cont },
            COMPRESS_PAGE => Self::CompressPage { offset, cont },
            MEM_SIZE if !cont => Self::MemSize { total: offset },
            FLUSH if word == FLUSH => Self::Flush,
            EOS if word == EOS => Self::Eos,
            HOOK => return Err(Violation::RdmaRefused { word }.into()),
            _ => return Err(DecodeError::BadRamFlags { word, flags }.into()),
        })
    }

    /// The word as it stands on the wire.
    pub(crate) const fn encode(self) -> u64 {
        const fn page(offset: u64, flag: u64, cont: bool) -> u64 {
            offset | flag | if cont { CONTINUE } else { 0 }
        }
        match self {
            Self::Zero { offset, cont } => page(offset, ZERO, cont),
            Self::Page { offset, cont } => page(offset, PAGE, cont),
            Self::Xbzrle { offset, cont } => page(offset, XBZRLE, cont),
            Self::CompressPage { offset, cont } => page(offset, COMPRESS_PAGE, cont),
            Self::MemSize { total } => total | MEM_SIZE,
            Self::Flush => FLUSH,
            Self::Eos => EOS,
        }
    }
}

/// One RAM block as the START section lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockEntry {
    /// The name, by which all pages refer to the block.
    pub name: BlockName,
    /// The block's length in bytes: never 0, a multiple of the page size.
    pub used_len: u64,
    /// The size of the pages that back the block, where a postcopy-capable peer mentions it (huge pages).
    pub page_size: Option<u64>,
    /// Where the block lies in guest physical memory, in streams with `x-ignore-shared`.
    pub gpa: Option<u64>,
    /// Where the block's pages lie in the file, in mapped-ram files.
    pub mapped_ram: Option<BlockHeader>,
}

impl BlockEntry {
    /// A block in an ordinary stream, with a name and a length only.
    pub const fn new(name: BlockName, used_len: u64) -> Self {
        Self { name, used_len, page_size: None, gpa: None, mapped_ram: None }
    }

    /// The entry at the start of `input`, in a stream of this `layout` with pages of `page_size` bytes.
    ///
    /// With [`BlockLayout::backing_page_size`] bytes behind the entry are looked at, so more may be asked for; a block list
    /// is always followed by at least one word.
    #[cfg(test)]
    pub(crate) fn decode(input: &[u8], layout: BlockLayout, page_size: usize) -> Result<Step<Self>, ProtocolError> {
        step(input, |reader| Self::read(reader, layout, page_size))
    }

    pub(crate) fn read(reader: &mut Reader<'_>, layout: BlockLayout, page_size: usize) -> Result<Self, Stop> {
        let name = BlockName::from_wire(reader.pstr()?)?;
        let used_len = reader.u64()?;
        if used_len == 0 || !used_len.is_multiple_of(page_size as u64) {
            return Err(Violation::BadBlockLength { name, len: used_len }.into());
        }
        let backing = if layout.backing_page_size { backing_page_size(reader)? } else { None };
        let gpa = if layout.gpa { Some(reader.u64()?) } else { None };
        let mapped_ram = if layout.mapped_ram { Some(BlockHeader::read(reader)?) } else { None };
        Ok(Self { name, used_len, page_size: backing, gpa, mapped_ram })
    }

    /// Appends the entry; which optional fields it has must fit the stream's [`BlockLayout`].
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        let mut writer = Writer::new(out);
        writer.pstr(self.name.as_str().as_bytes()).u64(self.used_len);
        for field in [self.page_size, self.gpa].into_iter().flatten() {
            writer.u64(field);
        }
        if let Some(header) = &self.mapped_ram {
            header.encode(out);
        }
    }

    /// Refuses a page at `offset` that is not aligned or not inside this block.
    pub(crate) fn check_page(&self, offset: u64, page_size: usize) -> Result<(), Violation> {
        check_page(&self.name, self.used_len, offset, page_size as u64)
    }
}

/// The backing page size, if one stands here.
///
/// The format has no mark for it: a QEMU receiver looks at its own block. It can be told apart all the same. What else may
/// stand here is the next block's name, which begins with a length that is not 0, or a word, which has flags in its low bits;
/// a page size is a power of two from 4 KiB up and has neither.
fn backing_page_size(reader: &mut Reader<'_>) -> Result<Option<u64>, Stop> {
    if reader.clone().u8()? != 0 {
        return Ok(None);
    }
    let size = reader.clone().u64()?;
    if !size.is_power_of_two() || size < 4096 {
        return Ok(None);
    }
    reader.u64()?;
    Ok(Some(size))
}

/// Which optional fields the entries of the block list have: decided by what came before it on main.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BlockLayout {
    /// Blocks in huge pages mention their size: after POSTCOPY_ADVISE with a summary other than the page size.
    pub backing_page_size: bool,
    /// Guest physical addresses are listed: capability `x-ignore-shared`.
    pub gpa: bool,
    /// Mapped-ram headers are listed: capability `mapped-ram`.
    pub mapped_ram: bool,
}

/// Refuses a page at `offset` that is not aligned or not inside `block`, which is `len` bytes long.
pub(crate) fn check_page(block: &BlockName, len: u64, offset: u64, page_size: u64) -> Result<(), Violation> {
    if !offset.is_multiple_of(page_size) {
        return Err(Violation::UnalignedPage { block: block.clone(), offset, page_size });
    }
    if offset.checked_add(page_size).is_none_or(|end| end > len) {
        return Err(Violation::PageOutsideBlock { block: block.clone(), offset, len });
    }
    Ok(())
}

/// The most blocks accepted in a block list. A large VM has some tens.
pub(crate) const MAX_BLOCKS: usize = 4096;

const ZERO: u64 = 0x002;
const MEM_SIZE: u64 = 0x004;
const PAGE: u64 = 0x008;
const EOS: u64 = 0x010;
const CONTINUE: u64 = 0x020;
const XBZRLE: u64 = 0x040;
const HOOK: u64 = 0x080;
const COMPRESS_PAGE: u64 = 0x100;
const FLUSH: u64 = 0x200;

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE_SIZE: usize = 4096;

    fn name(text: &str) -> BlockName {
        BlockName::new(text).unwrap()
    }

    #[test]
    fn the_words_seen_on_the_wire_decode_and_encode_back() {
        for (word, expected) in [
            (0x1002, RamWord::Zero { offset: 0x1000, cont: false }),
            (0x2022, RamWord::Zero { offset: 0x2000, cont: true }),
            (0x3008, RamWord::Page { offset: 0x3000, cont: false }),
            (0x0028, RamWord::Page { offset: 0, cont: true }),
            (0x1060, RamWord::Xbzrle { offset: 0x1000, cont: true }),
            (0x1120, RamWord::CompressPage { offset: 0x1000, cont: true }),
            (0x88_2004, RamWord::MemSize { total: 0x88_2000 }),
            (0x200, RamWord::Flush),
            (0x010, RamWord::Eos),
        ] {
            assert_eq!(RamWord::decode(word, PAGE_SIZE), Ok(expected));
            assert_eq!(expected.encode(), word);
        }
    }

    #[test]
    fn flags_that_do_not_go_together_are_refused() {
        for word in [0, 0x20, 0x1, 0xa, 0x18, 0x24, 0x30, 0x220, 0x1200, 0x1010, 0x400, 0x800, 0x204, 0x60a] {
            let flags = word & 0xfff;
            assert_eq!(RamWord::decode(word, PAGE_SIZE), Err(DecodeError::BadRamFlags { word, flags }.into()));
        }
    }

    #[test]
    fn rdma_is_refused_by_name() {
        assert_eq!(RamWord::decode(0x80, PAGE_SIZE), Err(Violation::RdmaRefused { word: 0x80 }.into()));
    }

    #[test]
    fn larger_pages_leave_more_room_for_flags() {
        let word = RamWord::Page { offset: 0x1_0000, cont: true };
        assert_eq!(RamWord::decode(word.encode(), 65536), Ok(word));
        assert!(matches!(RamWord::decode(0x1_1008, 65536), Err(ProtocolError::Decode(_))));
    }

    #[test]
    fn block_entries_survive_the_wire_in_every_layout() {
        let header = BlockHeader { page_size: 4096, bitmap_offset: 100, pages_offset: 1 << 20 };
        for layout in (0..8).map(|bits| BlockLayout {
            backing_page_size: bits & 1 != 0,
            gpa: bits & 2 != 0,
            mapped_ram: bits & 4 != 0,
        }) {
            let entry = BlockEntry {
                page_size: layout.backing_page_size.then_some(2 << 20),
                gpa: layout.gpa.then_some(0xfffc_0000),
                mapped_ram: layout.mapped_ram.then_some(header),
                ..BlockEntry::new(name("pc.bios"), 0x4_0000)
            };
            let mut bytes = Vec::new();
            entry.encode(&mut bytes);
            for len in 0..bytes.len() {
                let step = BlockEntry::decode(&bytes[..len], layout, PAGE_SIZE).unwrap();
                assert!(matches!(step, Step::Need(total) if total > len && total <= bytes.len()), "{layout:?} {len}");
            }
            let used = bytes.len();
            assert_eq!(BlockEntry::decode(&bytes, layout, PAGE_SIZE), Ok(Step::Item { item: entry, used }));
        }
    }

    #[test]
    fn a_backing_page_size_is_told_from_what_may_follow_an_entry() {
        let layout = BlockLayout { backing_page_size: true, ..BlockLayout::default() };
        let plain = BlockEntry::new(name("a"), 0x1000);
        let huge = BlockEntry { page_size: Some(1 << 30), ..plain.clone() };
        for (entry, follower) in
            [(&plain, &b"\x06pc.bio"[..]), (&plain, b"\0\0\0\0\0\0\x02\0"), (&huge, b"\0\0\0\0\0\0\0\x10")]
        {
            let mut bytes = Vec::new();
            entry.encode(&mut bytes);
            let used = bytes.len();
            bytes.extend_from_slice(follower);
            assert_eq!(BlockEntry::decode(&bytes, layout, PAGE_SIZE), Ok(Step::Item { item: entry.clone(), used }));
        }
    }

    #[test]
    fn blocks_without_whole_pages_are_refused() {
        for len in [0, 1, 4095, 4097] {
            let mut bytes = Vec::new();
            BlockEntry::new(name("pc.ram"), len).encode(&mut bytes);
            let refused = Violation::BadBlockLength { name: name("pc.ram"), len };
            assert_eq!(BlockEntry::decode(&bytes, BlockLayout::default(), PAGE_SIZE), Err(refused.into()));
        }
    }

    #[test]
    fn a_page_must_be_aligned_and_inside() {
        let block = BlockEntry::new(name("pc.ram"), 0x2000);
        assert_eq!(block.check_page(0x1000, PAGE_SIZE), Ok(()));
        for offset in [0x2000, 0xffff_ffff_ffff_f000] {
            let outside = Violation::PageOutsideBlock { block: name("pc.ram"), offset, len: 0x2000 };
            assert_eq!(block.check_page(offset, PAGE_SIZE), Err(outside));
        }
        let unaligned = Violation::UnalignedPage { block: name("pc.ram"), offset: 1, page_size: 4096 };
        assert_eq!(block.check_page(1, PAGE_SIZE), Err(unaligned));
    }
}
