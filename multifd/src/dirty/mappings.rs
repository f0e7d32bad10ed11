//! How the memory of RAM blocks is mapped in this process: as their [`Backing`] says, or from `/proc/self/smaps`.

use std::{io, ops::Range};

use crate::ram::{Backing, RamBlock};

/// A part of a RAM block that is mapped in one way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mapping {
    /// Addresses in this process.
    pub(crate) addresses: Range<u64>,
    /// MAP_SHARED: the pages belong to a file, a memfd or several processes.
    pub(crate) shared: bool,
    /// A page that is absent reads as zeros: private memory without a file, whose missing pages no userfaultfd fills in.
    pub(crate) absent_is_zero: bool,
}

/// The mappings of all of `block`, in order of their addresses.
///
/// # Errors
/// Where nothing is said of the block: `/proc` cannot be read, or a part of the block is not mapped.
pub(crate) fn of_block(block: &RamBlock) -> io::Result<Vec<Mapping>> {
    let addresses = block.address()..block.address() + block.bytes() as u64;
    match block.backing() {
        Backing::Anonymous => Ok(vec![Mapping { addresses, shared: false, absent_is_zero: true }]),
        Backing::MemoryFile(_) => Ok(vec![Mapping { addresses, shared: true, absent_is_zero: false }]),
        // Absent pages are those that were not read yet, or not any more.
        Backing::File(_) => Ok(vec![Mapping { addresses, shared: false, absent_is_zero: false }]),
        Backing::Foreign => {
            for _ in 0..ATTEMPTS {
                let parts = parts(&std::fs::read_to_string("/proc/self/smaps")?, &addresses);
                if covers(&parts, &addresses) {
                    return Ok(parts);
                }
            }
            let message = format!("RAM block {:?} is not mapped in whole", block.name().as_str());
            Err(io::Error::new(io::ErrorKind::InvalidInput, message))
        }
    }
}

/// The kernel writes the file in portions. Where other threads map and unmap memory in between, which may join mappings or
/// split them, one is missing, or there twice.
const ATTEMPTS: usize = 100;

/// Whether `parts` are all of `addresses`, one after the other.
fn covers(parts: &[Mapping], addresses: &Range<u64>) -> bool {
    let end =
        parts.iter().try_fold(addresses.start, |end, part| (part.addresses.start == end).then_some(part.addresses.end));
    end == Some(addresses.end)
}

/// The parts of `within` that `smaps` lists.
fn parts(smaps: &str, within: &Range<u64>) -> Vec<Mapping> {
    let mut parts: Vec<Mapping> = Vec::new();
    let (mut inside, mut huge) = (false, false);
    for line in smaps.lines() {
        if let Some((mapping, names_huge_pages)) = parse(line) {
            let addresses = mapping.addresses.start.max(within.start)..mapping.addresses.end.min(within.end);
            (inside, huge) = (addresses.start < addresses.end, names_huge_pages);
            parts.extend(inside.then_some(Mapping { addresses, ..mapping }));
        } else if let (true, Some(flags), Some(part)) = (inside, line.strip_prefix("VmFlags:"), parts.last_mut()) {
            let has = |wanted| flags.split_ascii_whitespace().any(|flag| flag == wanted);
            // A userfaultfd gets the faults of missing pages; a file on a disk can have any name.
            part.absent_is_zero &= !has("um") && (!huge || has("ht"));
        }
    }
    parts
}

/// `7f12a0000000-7f12a0200000 rw-s 00001000 00:01 1033   /memfd:ram (deleted)`; and whether the name is that of private memory
/// of huge pages, for which the kernel makes a file.
fn parse(line: &str) -> Option<(Mapping, bool)> {
    let hex = |text| u64::from_str_radix(text, 16).ok();
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let shared = fields.next()?.ends_with('s');
    let inode: u64 = fields.nth(2)?.parse().ok()?;
    let huge = fields.next() == Some("/anon_hugepage") && fields.next() == Some("(deleted)");
    let addresses = hex(start)?..hex(end)?;
    Some((Mapping { addresses, shared, absent_is_zero: !shared && (inode == 0 || huge) }, huge))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
7f12a0000000-7f12a0200000 rw-s 00001000 00:1f 1033   /memfd:ram (deleted)
Size:               2048 kB
VmFlags: rd wr sh mr mw me ms
7f12a0200000-7f12a0300000 rw-p 00000000 00:00 0   [anon: a name]
Size:               1024 kB
VmFlags: rd wr mr mw me ac uw
7f12a0300000-7f12a0400000 rw-p 00000000 00:00 0
VmFlags: rd wr mr mw me ac um
7f12a0400000-7f12a0500000 r--p 00000000 08:01 77   /a/file
VmFlags: rd mr mw me
7f12a0600000-7f12a0800000 rw-p 00000000 00:0f 78   /anon_hugepage (deleted)
VmFlags: rd wr mr mw me de ht
7f12a0800000-7f12a0a00000 rw-p 00000000 08:01 79   /anon_hugepage (deleted)
VmFlags: rd wr mr mw me
";

    fn found(within: Range<u64>) -> Vec<(Range<u64>, bool, bool)> {
        parts(SMAPS, &within).into_iter().map(|part| (part.addresses, part.shared, part.absent_is_zero)).collect()
    }

    #[test]
    fn a_block_has_the_parts_that_lie_within_it() {
        assert_eq!(found(0x7f12_a010_0000..0x7f12_a020_0000), [(0x7f12_a010_0000..0x7f12_a020_0000, true, false)]);
        assert_eq!(found(0..4096), []);
        let all = found(0x7f12_a000_0000..0x7f12_a050_0000);
        assert_eq!(all.iter().map(|(_, shared, _)| *shared).collect::<Vec<_>>(), [true, false, false, false]);
    }

    /// Found by a test that ran beside others: a listing in which a part was missing made the whole block one of which nothing
    /// is known.
    #[test]
    fn parts_cover_a_block_when_they_follow_each_other() {
        let within = 0x7f12_a000_0000..0x7f12_a050_0000;
        let mut all = parts(SMAPS, &within);
        assert!(covers(&all, &within));
        assert!(!covers(&all, &(within.start..within.end + 4096)) && !covers(&all[1..], &within));
        all.swap(1, 2);
        assert!(!covers(&all, &within));
        all.swap(1, 2);
        all.insert(1, all[1].clone());
        assert!(!covers(&all, &within));
    }

    /// Mappings come and go beside the block, and one joins with it: it was found to be "not mapped in whole".
    #[test]
    #[cfg(not(any(loom, shuttle)))]
    fn a_block_is_found_while_other_threads_map_and_unmap() {
        use crate::sys::mapping::Mapping as Pages;
        let block = |len| {
            let memory = Pages::anonymous(len).unwrap();
            let (name, base) = (multifd_proto::BlockName::new("ram").unwrap(), memory.base());
            // SAFETY: the mapping is that long and ends with its owner.
            #[allow(unsafe_code)]
            unsafe {
                RamBlock::from_raw(name, base, len, Box::new(memory))
            }
        };
        let block = block(1 << 20);
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    let _beside: Vec<Pages> = (0..50).map(|_| Pages::anonymous(1 << 20).unwrap()).collect();
                }
            });
            let found: Vec<_> = (0..50).map(|_| of_block(&block)).collect();
            done.store(true, std::sync::atomic::Ordering::Relaxed);
            for found in found {
                assert!(found.unwrap().iter().all(|part| part.absent_is_zero));
            }
        });
    }

    /// Each was cleared, and by that allocated.
    #[test]
    fn absent_huge_pages_of_private_memory_are_zeros_and_those_of_a_file_are_not() {
        let all = found(0x7f12_a060_0000..0x7f12_a0a0_0000);
        assert_eq!(all.iter().map(|(_, _, zero)| *zero).collect::<Vec<_>>(), [true, false]);
    }

    /// Its pages were taken for zeros: they are wherever the other end of the userfaultfd has them.
    #[test]
    fn absent_pages_are_zeros_only_where_no_other_part_fills_them_in() {
        let all = found(0x7f12_a000_0000..0x7f12_a050_0000);
        assert_eq!(all.iter().map(|(_, _, zero)| *zero).collect::<Vec<_>>(), [false, true, false, false]);
    }
}
