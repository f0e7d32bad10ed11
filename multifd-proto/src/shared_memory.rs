//! Memory that a source hands over instead of copying it: which RAM blocks, and where each lies in the file of its descriptor.
//!
//! The list follows the command SHARED_MEMORY, outside of it. The descriptors travel beside its bytes (`SCM_RIGHTS`), one for
//! each block, in the same order.
//!
//! | bytes | field                                            |
//! |------:|--------------------------------------------------|
//! |     2 | number of blocks, 1 to 128                       |
//! |       | for each: its name (length byte, bytes),         |
//! |     8 | where it begins in the file, in bytes            |
//! |     8 | its length in bytes                              |

use crate::ids::BlockName;
use crate::violation::{DecodeError, ProtocolError, Violation};
use crate::wire::{Reader, Stop, Writer};

/// A RAM block whose memory is handed over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SharedBlock {
    /// Its name.
    pub name: BlockName,
    /// Where it begins in the file.
    pub offset: u64,
    /// Bytes in the block, more than 0; `offset + len` does not overflow an `i64`, the kernel's type for places in files.
    pub len: u64,
}

/// The list of `blocks`.
///
/// # Panics
/// For more than [`MAX_SHARED_BLOCKS`].
pub fn encode(blocks: &[SharedBlock]) -> Vec<u8> {
    assert!(blocks.len() <= MAX_SHARED_BLOCKS, "{} blocks do not fit the list", blocks.len());
    let mut out = Vec::new();
    let mut writer = Writer::new(&mut out);
    writer.u16(blocks.len() as u16);
    for block in blocks {
        writer.pstr(block.name.as_str().as_bytes()).u64(block.offset).u64(block.len);
    }
    out
}

/// Reads a whole list.
///
/// # Errors
/// It is cut off or longer than it says; no blocks or too many; a block twice, without bytes, or beyond what a file can have.
pub fn decode(list: &[u8]) -> Result<Vec<SharedBlock>, ProtocolError> {
    let mut reader = Reader::new(list);
    match read(&mut reader) {
        Ok(_) if reader.remaining() > 0 => Err(bad("it is longer than its blocks").into()),
        Ok(blocks) => Ok(blocks),
        Err(Stop::Short(_)) => Err(bad("it is cut off").into()),
        Err(Stop::Refused(error)) => Err(error),
    }
}

fn read(reader: &mut Reader<'_>) -> Result<Vec<SharedBlock>, Stop> {
    let count = usize::from(reader.u16()?);
    if count == 0 || count > MAX_SHARED_BLOCKS {
        return Err(bad("the number of blocks is not 1 to 128").into());
    }
    let mut blocks: Vec<SharedBlock> = Vec::with_capacity(count);
    for _ in 0..count {
        let name = BlockName::from_wire(reader.pstr()?)?;
        let (offset, len) = (reader.u64()?, reader.u64()?);
        if blocks.iter().any(|block| block.name == name) {
            return Err(Violation::DuplicateBlock { name }.into());
        }
        if len == 0 || offset.checked_add(len).is_none_or(|end| end > i64::MAX as u64) {
            return Err(bad("a block lies where no file has bytes").into());
        }
        blocks.push(SharedBlock { name, offset, len });
    }
    Ok(blocks)
}

const fn bad(what: &'static str) -> DecodeError {
    DecodeError::BadSharedMemory { what }
}

/// The most blocks that are handed over: a process may send 253 descriptors at once.
pub const MAX_SHARED_BLOCKS: usize = 128;
/// The longest list, in bytes.
pub(crate) const MAX_SHARED_LIST: u32 = (2 + MAX_SHARED_BLOCKS * (1 + BlockName::MAX_LEN + 16)) as u32;

#[cfg(test)]
mod tests {
    use super::*;

    fn block(name: &str, offset: u64, len: u64) -> SharedBlock {
        SharedBlock { name: BlockName::new(name).unwrap(), offset, len }
    }

    fn refused(list: &[u8]) -> String {
        decode(list).unwrap_err().to_string()
    }

    #[test]
    fn a_list_survives_the_wire_and_any_other_length_is_refused() {
        let blocks = vec![block("ram", 0, 1 << 40), block("rom", 0x1000, i64::MAX as u64 - 0x1000)];
        let list = encode(&blocks);
        assert_eq!(list[..7], *b"\0\x02\x03ram\0");
        assert_eq!(decode(&list), Ok(blocks));
        for len in 0..list.len() {
            assert_eq!(refused(&list[..len]), "list of shared memory: it is cut off", "{len}");
        }
        assert_eq!(refused(&[&list[..], &[0]].concat()), "list of shared memory: it is longer than its blocks");
    }

    #[test]
    fn the_longest_list_fits_and_a_longer_one_is_refused() {
        let name = |index: usize| format!("{index:0>255}");
        let blocks: Vec<_> = (0..MAX_SHARED_BLOCKS).map(|index| block(&name(index), 0, 1)).collect();
        let list = encode(&blocks);
        assert_eq!(list.len(), MAX_SHARED_LIST as usize);
        assert_eq!(decode(&list), Ok(blocks));
        for count in [0u16, 129, u16::MAX] {
            let list = [&count.to_be_bytes()[..], &list[2..]].concat();
            assert_eq!(refused(&list), "list of shared memory: the number of blocks is not 1 to 128");
        }
    }

    #[test]
    fn blocks_that_no_file_can_have_are_refused() {
        for (offset, len) in [(0, 0), (1, i64::MAX as u64), (u64::MAX, 1), (0, u64::MAX)] {
            let list = encode(&[block("ram", offset, len)]);
            assert_eq!(refused(&list), "list of shared memory: a block lies where no file has bytes");
        }
        let twice = encode(&[block("ram", 0, 1), block("ram", 1, 1)]);
        assert_eq!(refused(&twice), r#"block "ram" is listed twice"#);
        assert!(decode(b"\0\x01\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x01").is_err(), "a block without a name");
    }
}
