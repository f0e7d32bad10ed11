//! RAM_DISCARD: which pages of a block the destination must not keep.

use std::ops::Range;

use crate::command::Command;
use crate::ids::BlockName;
use crate::violation::Violation;

/// Bytes of a block that are discarded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiscardRange {
    /// The offset of the first byte inside the block.
    pub start: u64,
    /// How many bytes.
    pub len: u64,
}

impl DiscardRange {
    /// The range as offsets, if it is one of whole pages inside `block`, which has `block_len` bytes.
    ///
    /// # Errors
    /// [`Violation::BadDiscard`].
    pub fn check(&self, block: &BlockName, block_len: u64, page_size: u64) -> Result<Range<u64>, Violation> {
        let Self { start, len } = *self;
        let end = start.checked_add(len).filter(|&end| end <= block_len);
        match end {
            Some(end) if len > 0 && start.is_multiple_of(page_size) && len.is_multiple_of(page_size) => Ok(start..end),
            _ => Err(Violation::BadDiscard { block: block.clone(), start, len, block_len }),
        }
    }

    /// The commands that discard `ranges` of `block`: as many as it takes.
    pub fn commands<'a>(block: &'a BlockName, ranges: &'a [DiscardRange]) -> impl Iterator<Item = Command> + 'a {
        ranges
            .chunks(MAX_DISCARD_RANGES)
            .map(|ranges| Command::PostcopyRamDiscard { block: block.clone(), ranges: ranges.to_vec() })
    }
}

/// The most ranges of one command: its payload has at most 65,535 bytes, with up to 258 of them for the block's name.
pub(crate) const MAX_DISCARD_RANGES: usize = (u16::MAX as usize - 258) / 16;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{Codec, Step};

    #[test]
    fn a_range_is_whole_pages_inside_its_block() {
        let block = BlockName::new("pc.ram").unwrap();
        let check = |start, len| DiscardRange { start, len }.check(&block, 0x4000, 0x1000);
        assert_eq!(check(0, 0x4000), Ok(0..0x4000));
        assert_eq!(check(0x3000, 0x1000), Ok(0x3000..0x4000));
        for (start, len) in [
            (0, 0),
            (0, 0x5000),
            (0x4000, 0x1000),
            (0x800, 0x1000),
            (0, 0x800),
            (0x1000, u64::MAX - 0xfff),
            (u64::MAX - 0xfff, 0x1000),
        ] {
            let refused = Violation::BadDiscard { block: block.clone(), start, len, block_len: 0x4000 };
            assert_eq!(check(start, len), Err(refused));
        }
    }

    #[test]
    fn a_long_list_takes_several_commands_that_all_decode() {
        let block = BlockName::new(&"x".repeat(255)).unwrap();
        let ranges: Vec<_> = (0..10_000).map(|page| DiscardRange { start: page * 0x2000, len: 0x1000 }).collect();
        let mut decoded = Vec::new();
        for command in DiscardRange::commands(&block, &ranges) {
            let mut bytes = Vec::new();
            command.encode(&mut bytes);
            let used = bytes.len();
            assert_eq!(Command::decode(&bytes), Ok(Step::Item { item: command.clone(), used }));
            let Command::PostcopyRamDiscard { ranges, .. } = command else { panic!("{command:?}") };
            decoded.extend(ranges);
        }
        assert_eq!(decoded, ranges);
        assert_eq!(DiscardRange::commands(&block, &[]).count(), 0);
    }
}
