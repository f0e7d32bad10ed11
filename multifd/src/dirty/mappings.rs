//! How the memory of RAM blocks is mapped in this process, from `/proc/self/maps`.

use std::{io, ops::Range};

use crate::ram::RamBlock;

/// A part of a RAM block that is mapped in one way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mapping {
    /// Addresses in this process.
    pub(crate) addresses: Range<u64>,
    /// MAP_SHARED: the pages belong to a file, a memfd or several processes.
    pub(crate) shared: bool,
    /// The file that backs it; `None` for memory without one.
    pub(crate) file: Option<FileId>,
    /// Where in the file the range begins.
    pub(crate) file_offset: u64,
}

/// Which file: device (major, minor) and inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileId {
    pub(crate) device: (u32, u32),
    pub(crate) inode: u64,
}

/// The mappings of all of `block`, in order of their addresses.
///
/// # Errors
/// Also where a part of the block is not mapped.
pub(crate) fn of_block(block: &RamBlock) -> io::Result<Vec<Mapping>> {
    let maps = std::fs::read_to_string("/proc/self/maps")?;
    let within = block.address()..block.address() + block.bytes() as u64;
    let parts: Vec<Mapping> = maps.lines().filter_map(parse).filter_map(|mapping| mapping.part(&within)).collect();
    let mapped: u64 = parts.iter().map(|part| part.addresses.end - part.addresses.start).sum();
    if mapped != block.bytes() as u64 {
        let message = format!("RAM block {:?} is not mapped in whole", block.name().as_str());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    Ok(parts)
}

impl Mapping {
    fn part(&self, within: &Range<u64>) -> Option<Mapping> {
        let addresses = self.addresses.start.max(within.start)..self.addresses.end.min(within.end);
        (addresses.start < addresses.end).then(|| Mapping {
            file_offset: self.file_offset + (addresses.start - self.addresses.start),
            addresses,
            ..self.clone()
        })
    }
}

/// `7f12a0000000-7f12a0200000 rw-s 00001000 00:01 1033   /memfd:ram (deleted)`
fn parse(line: &str) -> Option<Mapping> {
    let hex = |text| u64::from_str_radix(text, 16).ok();
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let shared = fields.next()?.ends_with('s');
    let file_offset = hex(fields.next()?)?;
    let (major, minor) = fields.next()?.split_once(':')?;
    let device = (u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?);
    let inode = fields.next()?.parse().ok()?;
    let file = (inode != 0).then_some(FileId { device, inode });
    Some(Mapping { addresses: hex(start)?..hex(end)?, shared, file, file_offset })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_becomes_a_mapping() {
        let mapping = parse("7f12a0000000-7f12a0200000 rw-s 00001000 00:1f 1033   /memfd:ram (deleted)").unwrap();
        assert_eq!(mapping.addresses, 0x7f12_a000_0000..0x7f12_a020_0000);
        assert!(mapping.shared);
        assert_eq!(mapping.file, Some(FileId { device: (0, 0x1f), inode: 1033 }));
        let part = mapping.part(&(0x7f12_a010_0000..0x7f12_b000_0000)).unwrap();
        assert_eq!(part.addresses, 0x7f12_a010_0000..0x7f12_a020_0000);
        assert_eq!(part.file_offset, 0x10_1000);
        assert_eq!(mapping.part(&(0..4096)), None);
    }

    #[test]
    fn anonymous_memory_has_no_file() {
        let mapping = parse("7ffd0a5c2000-7ffd0a5e4000 rw-p 00000000 00:00 0   [anon: a name]").unwrap();
        assert!(!mapping.shared);
        assert_eq!(mapping.file, None);
    }
}
