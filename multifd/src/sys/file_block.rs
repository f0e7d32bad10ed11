//! RAM blocks whose contents are in a file.
//!
//! The file is read, and not mapped: reading a mapping behind the end of a file that became shorter ends the process
//! (SIGBUS), and a library must not handle signals.
//!
//! What the page cache does not have is read past it, where the file system permits it: each byte is needed once, and a cold
//! file would drive out what others have there. Nor is the kernel to read ahead, which it does for any read that goes through the page
//! cache, also for one that must not wait.

use std::{
    fmt,
    fs::File,
    io,
    os::fd::AsRawFd,
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
};

use rustix::fs::{CWD, Mode, OFlags};

use multifd_proto::BlockName;

use super::{kvm::system_page_size, mapping::Mapping};
use crate::{
    checkpoint::CheckpointError,
    error::Error,
    ram::{Backing, GuestRange, RamBlock},
};

/// The `len` bytes of `file`, as a block that has addresses of its own, and nothing there.
pub(crate) fn file_block(name: BlockName, file: FilePart, len: usize) -> io::Result<RamBlock> {
    let memory = Mapping::anonymous(len)?;
    let base = memory.base();
    // SAFETY: the mapping is that long and lives as long as its owner, which the block keeps. No reference to it exists.
    let block = unsafe { RamBlock::from_raw(name, base, len, Box::new(memory)) };
    let path = format!("/proc/self/fd/{}", file.file.as_raw_fd());
    let flags = OFlags::RDONLY | OFlags::DIRECT | OFlags::CLOEXEC;
    let direct = rustix::fs::openat(CWD, path, flags, Mode::empty()).ok().map(File::from);
    let cached = direct.as_ref().and_then(|_| Mapping::unread(&file.file, file.offset, len).ok());
    let refused = AtomicBool::new(false);
    Ok(block.read_only().backed_by(Backing::File(FileMemory { len, file, direct, cached, refused })))
}

/// Where a block lies in a file.
pub(crate) struct FilePart {
    pub(crate) file: File,
    /// What it is called in errors.
    pub(crate) path: PathBuf,
    pub(crate) offset: u64,
}

/// The part of a file that the contents of a RAM block are in.
pub struct FileMemory {
    len: usize,
    file: FilePart,
    /// The file, opened to be read past the page cache.
    direct: Option<File>,
    /// This part of the file, to ask what the page cache has of it. It is never read: the file may be shorter by now.
    cached: Option<Mapping>,
    /// The file system has refused such a read, and is not asked again.
    refused: AtomicBool,
}

impl FileMemory {
    /// Reads what is from `offset` on, as much as `to` has room for. No other thread loads into `to` meanwhile.
    ///
    /// # Errors
    /// It cannot be had. What `to` holds then is undefined.
    ///
    /// # Panics
    /// If it does not lie in the block.
    pub(crate) fn load(&self, offset: u64, to: GuestRange<'_>) -> Result<(), Error> {
        let FilePart { path, offset: begin, .. } = &self.file;
        let end = offset.checked_add(to.len() as u64).filter(|&end| end <= self.len as u64);
        let end = end.unwrap_or_else(|| panic!("{} bytes at {offset} of {}", to.len(), self.len));
        let failed = |source| CheckpointError::Io { path: path.clone(), doing: "reading it", source };
        let mut at = offset;
        while at < end {
            let read = match begin.checked_add(at).and_then(|from| libc::off_t::try_from(from).ok()) {
                Some(from) => self.read_some(to, (at - offset) as usize, at, from),
                None => Err(io::ErrorKind::InvalidInput.into()),
            };
            match read {
                Ok(0) => return Err(CheckpointError::Changed { path: path.clone() }.into()),
                Ok(n) => at += n as u64,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(failed(error).into()),
            }
        }
        Ok(())
    }

    /// Reads some of what is from `offset` on, which is `from` in the file, to what follows the first `done` bytes of `to`: from the page
    /// cache, past it, or through it. Returns how many bytes; 0 at the end of the file.
    fn read_some(&self, to: GuestRange<'_>, done: usize, offset: u64, from: libc::off_t) -> io::Result<usize> {
        let left = to.len() - done;
        let aligned = |number: usize| number.is_multiple_of(ALIGNMENT);
        let is_aligned = aligned(to.as_ptr().addr() + done) && aligned(left) && from % ALIGNMENT as libc::off_t == 0;
        let direct = self.direct.as_ref().filter(|_| is_aligned && !self.refused.load(Relaxed));
        let Some(direct) = direct else { return read(&self.file.file, to, done, left, from) };
        let (len, is_cached) = self.alike(offset, left);
        if is_cached {
            return read(&self.file.file, to, done, len, from);
        }
        match read(direct, to, done, len, from) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                self.refused.store(true, Relaxed);
                read(&self.file.file, to, done, len, from)
            }
            read => read,
        }
    }

    /// How many of the `len` bytes from `offset` on are alike in whether the page cache has them, and whether it does. Where the kernel
    /// does not tell, it counts as if it did: it tells only those who may write the file.
    fn alike(&self, offset: u64, len: usize) -> (usize, bool) {
        let Some(cached) = &self.cached else { return (len, true) };
        let page = system_page_size() as usize;
        let mut resident = [0u8; PAGES_AT_ONCE];
        let len = len.min(PAGES_AT_ONCE * page);
        let at = cached.base().as_ptr().wrapping_add(offset as usize);
        // SAFETY: takes addresses, and writes one byte for each page of `len` bytes, of which there are at most as many as
        // `resident` has. Nothing is read or written at the addresses.
        if unsafe { libc::mincore(at.cast(), len, resident.as_mut_ptr()) } < 0 {
            return (len, true);
        }
        let pages = &resident[..len.div_ceil(page)];
        let first = pages[0] & 1;
        let alike = pages.iter().take_while(|&resident| resident & 1 == first).count();
        (len.min(alike * page), first == 1)
    }
}

/// Reads some of the `len` bytes from `from` of `file` on to what follows the first `done` bytes of `to`.
///
/// # Panics
/// If there are fewer.
fn read(file: &File, to: GuestRange<'_>, done: usize, len: usize, from: libc::off_t) -> io::Result<usize> {
    assert!(done.checked_add(len).is_some_and(|end| end <= to.len()), "{len} bytes behind {done} of {}", to.len());
    let to = to.as_ptr().wrapping_add(done).cast();
    // SAFETY: these bytes are mapped; the kernel writes them, and no reference to them exists.
    let read = unsafe { libc::pread(file.as_raw_fd(), to, len, from) };
    usize::try_from(read).map_err(|_| io::Error::last_os_error())
}

impl fmt::Debug for FileMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} from {:#x} on", self.file.path, self.file.offset)
    }
}

/// What addresses, places and lengths of reads past the page cache are multiples of, on any disk.
const ALIGNMENT: usize = 4096;
/// 1 MiB of small pages: more than a packet has.
const PAGES_AT_ONCE: usize = 256;

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use std::io::Write;

    use test_support::TempDir;

    use super::*;

    const PAGE: usize = 4096;

    /// A new file, and what `pages` pages of it hold, on disk and in no cache.
    fn cold(dir: &TempDir, pages: u32) -> (File, PathBuf, Vec<u8>) {
        let path = dir.join("x");
        let mut file = File::options().create_new(true).read(true).write(true).open(&path).unwrap();
        let content: Vec<u8> = (0..pages).flat_map(|page| (page + 1).to_le_bytes().repeat(PAGE / 4)).collect();
        file.write_all(&content).unwrap();
        file.sync_all().unwrap();
        forget(&file);
        (file, path, content)
    }

    fn forget(file: &File) {
        rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    }

    fn block(file: &File, path: PathBuf, offset: usize, pages: usize) -> RamBlock {
        let part = FilePart { file: file.try_clone().unwrap(), path, offset: offset as u64 };
        file_block(BlockName::new("ram").unwrap(), part, pages * PAGE).unwrap()
    }

    /// Loads `pages` pages from the one at `first` on.
    fn load(block: &RamBlock, first: usize, pages: usize) -> Result<Vec<u8>, Error> {
        let room = RamBlock::anonymous(BlockName::new("room").unwrap(), pages * PAGE).unwrap();
        let room = room.range(0, pages * PAGE).unwrap();
        block.file().unwrap().load((first * PAGE) as u64, room)?;
        let mut bytes = vec![0; pages * PAGE];
        room.read(&mut bytes);
        Ok(bytes)
    }

    /// A mapping of the file would have ended the process here.
    #[test]
    fn a_file_that_became_shorter_is_an_error() {
        let dir = TempDir::new().unwrap();
        let (file, path, content) = cold(&dir, 5);
        let block = block(&file, path, PAGE, 4);
        assert!(load(&block, 0, 2).unwrap() == content[PAGE..3 * PAGE]);
        assert!(load(&block, 3, 1).unwrap() == content[4 * PAGE..]);
        file.set_len(2 * PAGE as u64 + 100).unwrap();
        assert!(load(&block, 0, 1).unwrap() == content[PAGE..2 * PAGE]);
        let error = load(&block, 1, 1).unwrap_err().to_string();
        assert!(error.ends_with("/x\" was changed while it was read"), "{error}");
    }

    /// Whatever the page cache has of it: nothing, the middle, or all.
    #[test]
    fn a_file_is_read_whatever_part_of_it_is_cached() {
        let dir = TempDir::new().unwrap();
        let (file, path, content) = cold(&dir, 600);
        let block = block(&file, path, 0, 600);
        for cached in [0..0, 100..150, 0..600] {
            forget(&file);
            let mut some = vec![0; cached.len() * PAGE];
            std::os::unix::fs::FileExt::read_exact_at(&file, &mut some, (cached.start * PAGE) as u64).unwrap();
            assert!(load(&block, 0, 600).unwrap() == content, "{cached:?}");
            assert!(load(&block, 120, 77).unwrap() == content[120 * PAGE..197 * PAGE], "{cached:?}");
        }
    }

    /// To ask for what is cached had the kernel read ahead: all of a cold file was read twice, and stayed in the page cache.
    #[test]
    fn a_cold_file_does_not_come_into_the_page_cache() {
        let dir = TempDir::new().unwrap();
        let (file, path, content) = cold(&dir, 4096);
        let block = block(&file, path, 0, 4096);
        let memory = block.file().unwrap();
        let is_cold = || (0..4096).all(|page| memory.alike(page * PAGE as u64, PAGE) == (PAGE, false));
        if memory.direct.is_none() || !is_cold() {
            return test_support::skip("this file system has files in memory only, or no way past the page cache");
        }
        for first in (0..4096).step_by(128) {
            assert!(load(&block, first, 128).unwrap() == content[first * PAGE..][..128 * PAGE]);
        }
        assert!(memory.refused.load(Relaxed) || is_cold());
        load(&block, 0, 4096).unwrap();
        let mut byte = [0];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut byte, 0).unwrap();
        assert!(memory.alike(0, PAGE).1, "what is read through the page cache is there");
    }
}
