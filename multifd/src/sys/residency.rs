//! Which pages of a mapping the kernel has nothing of, without `/proc`: `mincore`, for jails.

use std::{io, mem::MaybeUninit, ops::Range};

use super::kvm::system_page_size;
use crate::ram::GuestRange;

/// The parts of `range` that are neither in memory nor in swap, as addresses: ascending, and joined where they touch.
///
/// `range` is memory without a file, or belongs to a file that is in memory only; of such a file the kernel tells only
/// what this process could write, and calls the rest present.
///
/// # Errors
/// [`io::ErrorKind::Unsupported`] where the system has swap: `mincore` does not tell a page in swap from none;
/// [`io::ErrorKind::InvalidInput`] where `range` does not begin at a page of the kernel's; the kernel's.
pub(crate) fn absent(range: GuestRange<'_>) -> io::Result<Vec<Range<u64>>> {
    let page = system_page_size() as usize;
    let start = range.as_ptr() as usize;
    if !start.is_multiple_of(page) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    without_swap()?;
    let mut found: Vec<Range<u64>> = Vec::new();
    let mut resident = vec![0u8; PAGES_AT_ONCE];
    for done in (0..range.len()).step_by(PAGES_AT_ONCE * page) {
        let len = (range.len() - done).min(PAGES_AT_ONCE * page);
        // SAFETY: takes addresses, and writes one byte for each page of `len` bytes, of which there are at most as many as
        // `resident` has. Nothing is read or written at the addresses.
        let result = unsafe { libc::mincore((start + done) as *mut libc::c_void, len, resident.as_mut_ptr()) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        for index in (0..len.div_ceil(page)).filter(|&index| resident[index] & 1 == 0) {
            let at = (start + done + index * page) as u64;
            match found.last_mut() {
                Some(last) if last.end == at => last.end += page as u64,
                _ => found.push(at..at + page as u64),
            }
        }
    }
    // Switched on meanwhile, it may have taken a page out of memory before that page was looked at.
    without_swap()?;
    Ok(found)
}

/// How many pages of the first `len` bytes of `file` are in the page cache, for a test.
#[cfg(all(test, not(any(loom, shuttle))))]
pub(crate) fn cached(file: &std::fs::File, len: usize) -> usize {
    let mapping = super::mapping::Mapping::unread(file, 0, len).unwrap();
    let mut resident = vec![0u8; len.div_ceil(system_page_size() as usize)];
    // SAFETY: takes addresses of a mapping, and writes one byte for each page of it. Nothing is read or written at the addresses.
    let result = unsafe { libc::mincore(mapping.base().as_ptr().cast(), len, resident.as_mut_ptr()) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
    resident.iter().filter(|resident| *resident & 1 == 1).count()
}

/// # Errors
/// The system has swap.
fn without_swap() -> io::Result<()> {
    let mut system = MaybeUninit::<libc::sysinfo>::zeroed();
    // SAFETY: the kernel fills one struct sysinfo.
    let result = unsafe { libc::sysinfo(system.as_mut_ptr()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: filled above; zeros are valid as well.
    let system = unsafe { system.assume_init() };
    match system.totalswap {
        0 => Ok(()),
        _ => Err(io::Error::new(io::ErrorKind::Unsupported, "mincore does not tell which pages are in swap")),
    }
}

/// 256 MiB of small pages.
const PAGES_AT_ONCE: usize = 1 << 16;

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use multifd_proto::BlockName;

    use super::*;
    use crate::ram::RamBlock;

    #[test]
    fn all_but_the_pages_written_are_absent() {
        let page = system_page_size() as usize;
        let name = || BlockName::new("ram").unwrap();
        for block in [RamBlock::anonymous(name(), 100 * page), RamBlock::memory_file(name(), 100 * page)] {
            let block = block.unwrap();
            for written in [0, 1, 50, 99] {
                block.range((written * page) as u64, page).unwrap().write(&vec![1; page]);
            }
            let found = match absent(block.range(0, 100 * page).unwrap()) {
                Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                    return test_support::skip(&error.to_string());
                }
                found => found.unwrap(),
            };
            let pages = |range: &Range<u64>| {
                (range.start - block.address()) / page as u64..(range.end - block.address()) / page as u64
            };
            assert_eq!(found.iter().map(pages).collect::<Vec<_>>(), [2..50, 51..99], "{:?}", block.backing());
        }
    }
}
