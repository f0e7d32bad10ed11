//! The second connection of capability `postcopy-preempt`: bare RAM words, from source to destination.
//!
//! It has neither a header nor sections: PAGE and ZERO words with a block name or CONTINUE, which refers to the words of this
//! connection only, and one EOS word at the end. [`MainEncoder`](crate::encoder::MainEncoder) writes them.

use crate::ids::BlockName;
use crate::ram::{BlockEntry, RamWord, check_page};
use crate::violation::{DecodeError, ProtocolError, Violation};
use crate::wire::{Reader, Step, Stop, step};

/// Decodes a preempt connection, one word at a time.
#[derive(Debug, Default)]
pub struct PreemptDecoder {
    /// The block of the word before.
    last: Option<usize>,
    ended: bool,
}

/// One word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PreemptItem {
    /// A page, whose content follows: so many bytes as a page has.
    Page {
        /// The index of the block in the block list.
        block: usize,
        /// The page's offset inside it.
        offset: u64,
    },
    /// A page of zeros.
    Zero {
        /// The index of the block in the block list.
        block: usize,
        /// The page's offset inside it.
        offset: u64,
    },
    /// The end. Nothing follows.
    End,
}

impl PreemptDecoder {
    /// The word at the start of `input`, of a stream with these `blocks`. After a page the next call must be shown what
    /// follows its content. An error is final.
    ///
    /// # Errors
    /// A word that may not stand here, a block that is not listed, a page that is not one of the block's.
    pub fn step(
        &mut self,
        input: &[u8],
        blocks: &[BlockEntry],
        page_size: usize,
    ) -> Result<Step<PreemptItem>, ProtocolError> {
        let step = step(input, |reader| self.read(reader, blocks, page_size))?;
        if let Step::Item { item, .. } = &step {
            match *item {
                PreemptItem::Page { block, .. } | PreemptItem::Zero { block, .. } => self.last = Some(block),
                PreemptItem::End => self.ended = true,
            }
        }
        Ok(step)
    }

    /// Whether the EOS word was read.
    pub const fn ended(&self) -> bool {
        self.ended
    }

    fn read(&self, reader: &mut Reader<'_>, blocks: &[BlockEntry], page_size: usize) -> Result<PreemptItem, Stop> {
        let word = reader.u64()?;
        if self.ended {
            let place = "after the end of a preempt connection";
            return Err(Violation::UnexpectedElement { element: "a word", place }.into());
        }
        match RamWord::decode(word, page_size)? {
            RamWord::Page { offset, cont } => {
                let block = self.block(reader, blocks, offset, cont, page_size)?;
                Ok(PreemptItem::Page { block, offset })
            }
            RamWord::Zero { offset, cont } => {
                let block = self.block(reader, blocks, offset, cont, page_size)?;
                match reader.u8()? {
                    0 => Ok(PreemptItem::Zero { block, offset }),
                    byte => Err(DecodeError::ZeroFillByte { offset, byte }.into()),
                }
            }
            RamWord::Eos => Ok(PreemptItem::End),
            _ => Err(Violation::NotAllowed { what: "a word other than a page on a preempt connection" }.into()),
        }
    }

    fn block(
        &self,
        reader: &mut Reader<'_>,
        blocks: &[BlockEntry],
        offset: u64,
        cont: bool,
        page_size: usize,
    ) -> Result<usize, Stop> {
        let block = match cont {
            true => self.last.ok_or(Violation::FirstPageWithoutBlock { offset })?,
            false => {
                let name = BlockName::from_wire(reader.pstr()?)?;
                let block = blocks.iter().position(|block| block.name == name);
                block.ok_or(Violation::UnknownBlock { name })?
            }
        };
        check_page(&blocks[block].name, blocks[block].used_len, offset, page_size as u64)?;
        Ok(block)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::encoder::MainEncoder;

    fn blocks() -> Vec<BlockEntry> {
        ["pc.ram", "pc.bios"].map(|name| BlockEntry::new(BlockName::new(name).unwrap(), 0x4000)).to_vec()
    }

    #[test]
    fn words_are_read_back_and_truncated_asks_for_more() {
        let blocks = blocks();
        let mut encoder = MainEncoder::default();
        let mut decoder = PreemptDecoder::default();
        for (block, offset, zero) in [(0, 0x1000, false), (0, 0x3000, true), (1, 0, true), (1, 0x2000, false)] {
            let name = &blocks[block].name;
            encoder.bytes.clear();
            match zero {
                true => encoder.zero_page(name, offset),
                false => encoder.page(name, offset),
            };
            let bytes = &encoder.bytes;
            for len in 0..bytes.len() {
                let step = decoder.step(&bytes[..len], &blocks, 4096).unwrap();
                assert!(matches!(step, Step::Need(total) if len < total && total <= bytes.len()));
            }
            let item = if zero { PreemptItem::Zero { block, offset } } else { PreemptItem::Page { block, offset } };
            assert_eq!(decoder.step(bytes, &blocks, 4096), Ok(Step::Item { item, used: bytes.len() }));
        }
        let end = b"\0\0\0\0\0\0\0\x10";
        assert!(!decoder.ended());
        assert_eq!(decoder.step(end, &blocks, 4096), Ok(Step::Item { item: PreemptItem::End, used: 8 }));
        assert!(decoder.ended());
        assert!(decoder.step(end, &blocks, 4096).is_err());
    }

    #[test]
    fn what_is_not_a_page_of_a_block_is_refused() {
        let blocks = blocks();
        let step = |bytes: &[u8]| PreemptDecoder::default().step(bytes, &blocks, 4096).unwrap_err();
        assert_eq!(step(b"\0\0\0\0\0\0\x10\x28"), Violation::FirstPageWithoutBlock { offset: 0x1000 }.into());
        let name = BlockName::new("x").unwrap();
        assert_eq!(step(b"\0\0\0\0\0\0\x10\x08\x01x"), Violation::UnknownBlock { name }.into());
        let block = blocks[0].name.clone();
        let outside = Violation::PageOutsideBlock { block, offset: 0x4000, len: 0x4000 };
        assert_eq!(step(b"\0\0\0\0\0\0\x40\x08\x06pc.ram"), outside.into());
        for word in [&b"\0\0\0\0\0\0\x02\0"[..], b"\0\0\0\0\0\0\x10\x04", b"\0\0\0\0\0\0\x10\x40"] {
            assert!(matches!(step(word), ProtocolError::Violation(Violation::NotAllowed { .. })), "{word:?}");
        }
        let fill = DecodeError::ZeroFillByte { offset: 0, byte: 7 };
        assert_eq!(step(b"\0\0\0\0\0\0\0\x02\x06pc.ram\x07"), fill.into());
    }
}
